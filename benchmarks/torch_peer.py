"""A worker: the training step of Hugging Face's T5 with PEFT (see `common.Service`).

Its spec, beside `gpu`: `dimensions` by T5Config's names, `method` (ia3, lora, full) with `rank`,
`rows`, `lengths` of inputs and targets, `dtype`, `steps`, whether rows have a `mask` (of ones, as a
batch that could have padding has), and `way`, words of:

- eager, sdpa, flex: the attention;
- compile: torch.compile of the model, or with `blocks` of each block by itself, which is sooner
  done; `autotune` tries kernels, `wrapper` has inductor call them from C++, `graphs` uses CUDA's;
- fused: AdamW in one kernel a tensor (else torch's own choice);
- checkpoint: activations are computed again.

Nothing of this project is imported: it runs in an environment of its own,
`benchmarks/environments/torch.txt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import common


def network(spec: Mapping[str, Any]) -> Any:
    """Hugging Face's T5 v1.1 of these dimensions, random, without its optimiser or adapters."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    given = spec["dimensions"]
    config = T5Config(
        vocab_size=common.VOCABULARY,
        d_model=given["emb_dim"],
        d_kv=given["head_dim"],
        d_ff=given["mlp_dim"],
        num_layers=given["num_encoder_layers"],
        num_decoder_layers=given["num_decoder_layers"],
        num_heads=given["num_heads"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(0)
    device = torch.device("cuda" if spec.get("gpu") else "cpu")
    with device:
        model = T5ForConditionalGeneration(config)
    model = model.to(getattr(torch, spec.get("dtype", "float32")))
    ways = spec["way"].split()
    kind = "eager" if "eager" in ways else "flex_attention" if "flex" in ways else "sdpa"
    model.set_attn_implementation(kind)
    return model


def with_adapters(model: Any, method: str, rank: int) -> Any:
    """PEFT's adapters at the sites of ours; `full` trains everything."""
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model

    task = TaskType.SEQ_2_SEQ_LM
    if method == "ia3":
        config: Any = IA3Config(
            task_type=task, target_modules=["k", "v", "wo"], feedforward_modules=["wo"]
        )
    elif method == "lora":
        sites = ["q", "k", "v", "o", "wi_0", "wo"]
        config = LoraConfig(
            task_type=task, r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=sites
        )
    else:
        return model
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def main() -> None:
    """Serves."""
    service = common.Service()
    spec = service.spec
    import torch

    ways = spec["way"].split()
    if not spec.get("gpu"):
        torch.set_num_threads(common.CORES)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    before = common.memory("VmRSS")
    model = with_adapters(network(spec), spec["method"], spec.get("rank", 4)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True if "fused" in ways else None)
    run = compiled(model, ways)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    inputs, targets = (
        torch.randint(3, common.VOCABULARY, (spec["rows"], length), generator=generator).to(device)
        for length in spec["lengths"]
    )
    mask = torch.ones_like(inputs) if spec.get("mask", True) else None

    def one() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = run(input_ids=inputs, attention_mask=mask, labels=targets).loss
        loss.backward()
        optimizer.step()
        return loss

    def step() -> float:
        for _ in range(spec.get("steps", 1)):
            loss = one()
        return loss.item()  # waits

    told = {
        "before": before,
        "trained": sum(p.numel() for p in trained),
        "tokens": spec["rows"] * sum(spec["lengths"]),
        "versions": common.versions("torch", "transformers", "peft"),
    }

    service.run(step, told, lambda: told_at_the_end(spec))


def compiled(model: Any, ways: Sequence[str]) -> Any:
    """The model, or what torch makes of it."""
    import torch

    if "checkpoint" in ways:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "compile" not in ways:
        return model
    words = {"autotune": "max_autotune", "wrapper": "cpp_wrapper", "graphs": "triton.cudagraphs"}
    options = {option: True for word, option in words.items() if word in ways} or None
    if "blocks" not in ways:
        return torch.compile(model, options=options)
    for module in model.modules():
        if type(module).__name__ == "T5Block":
            module.compile(options=options)
    return model


def told_at_the_end(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The device's memory, or the machine's rates."""
    import torch

    if spec.get("gpu"):
        return {"device peak": torch.cuda.max_memory_allocated()}
    return {"rates": rates()}


def rates() -> dict[str, float]:
    """What the machine does a second by torch's own kernels, float32: the best of some tries."""
    import time

    import torch

    side, many = 2048, 1 << 26
    square, line = torch.ones(side, side), torch.ones(many)
    into, target = torch.empty_like(square), torch.empty_like(line)

    def fastest(work: Any) -> float:
        taken = []
        for _ in range(6):
            clock = time.perf_counter()
            work()
            taken.append(time.perf_counter() - clock)
        return min(taken)

    with torch.no_grad():
        return {
            "flops": 2 * side**3 / fastest(lambda: torch.mm(square, square, out=into)),
            "bytes": 2 * many * 4 / fastest(lambda: torch.add(line, 1, out=target)),
        }


if __name__ == "__main__":
    main()
