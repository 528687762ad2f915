"""A worker with the training step of Hugging Face's T5 and PEFT (see `workers.Worker`).

Its spec: `dimensions` under T5Config's names, `method` (ia3, lora, full) with `rank`, `rows` and
`lengths` of inputs and targets, `sparse` with the `capacity` of an expert in a row, `dtype`,
`steps`, `gpu`, `mask` (whether rows have one; it is all ones, as in batches that might have
padding), and `mode`, words among:

- eager, sdpa, flex: the attention implementation;
- compile: torch.compile of the model, or with `blocks` of each block, which compiles faster;
  `autotune` tries kernels, `wrapper` makes inductor call them from C++, `graphs` uses CUDA graphs;
- fused: AdamW in one kernel per tensor (default: torch's choice);
- checkpoint: activations are recomputed.

It runs in its own environment, `benchmarks/environments/torch.txt`, and imports no model code of
this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import common
import machine
import ours
import workers


def network(spec: Mapping[str, Any]) -> Any:
    """Returns Hugging Face's T5 v1.1, or Switch, of the spec's dimensions with random weights."""
    import torch
    import transformers

    if not spec.get("gpu"):
        torch.set_num_threads(machine.CORES)
    dimensions = spec["dimensions"]
    settings: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if spec.get("sparse"):
        settings = {
            "num_experts": spec["sparse"]["num_experts"],
            "expert_capacity": spec["capacity"],
            "num_sparse_encoder_layers": dimensions["num_encoder_layers"] // 2,
            "num_sparse_decoder_layers": dimensions["num_decoder_layers"] // 2,
        }
    kind = "SwitchTransformers" if spec.get("sparse") else "T5"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=common.VOCAB_SIZE,
        d_model=dimensions["emb_dim"],
        d_kv=dimensions["head_dim"],
        d_ff=dimensions["mlp_dim"],
        num_layers=dimensions["num_encoder_layers"],
        num_decoder_layers=dimensions["num_decoder_layers"],
        num_heads=dimensions["num_heads"],
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
        **settings,
    )
    torch.manual_seed(0)
    device = torch.device("cuda" if spec.get("gpu") else "cpu")
    with device:
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model = model.to(getattr(torch, spec.get("dtype", "float32")))
    mode = spec["mode"].split()
    attention = "eager" if "eager" in mode else "flex_attention" if "flex" in mode else "sdpa"
    model.set_attn_implementation(attention)
    return model


def add_adapters(model: Any, method: str, rank: int) -> Any:
    """Returns the model with PEFT's adapters at our sites; for `full`, the model itself."""
    from peft import IA3Config, LoraConfig, TaskType, get_peft_model

    task = TaskType.SEQ_2_SEQ_LM
    if method == "ia3":
        # At a feed-forward module PEFT scales the input, and the input of wo is our gate.
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
    """Runs the worker."""
    worker = workers.Worker()
    spec = worker.spec
    # Libraries are imported before the memory is measured, so that `before` includes them.
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    mode = spec["mode"].split()
    before = machine.memory("VmRSS")
    model = add_adapters(network(spec), spec["method"], spec.get("rank", 4)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True if "fused" in mode else None)
    forward = compile_model(model, mode)
    batch = ours.random_batch(spec["rows"], spec["lengths"])
    inputs, targets = (
        torch.tensor(batch[name], dtype=torch.long, device=next(model.parameters()).device)
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    mask = torch.ones_like(inputs) if spec.get("mask", True) else None

    def step() -> float:
        for _ in range(spec.get("steps", 1)):
            optimizer.zero_grad(set_to_none=True)
            loss = forward(input_ids=inputs, attention_mask=mask, labels=targets).loss
            loss.backward()
            optimizer.step()
        return loss.item()  # waits for the device

    info = {
        "before": before,
        "trained": sum(p.numel() for p in trained),
        "tokens": spec["rows"] * sum(spec["lengths"]),
        "versions": machine.versions("torch", "transformers", "peft"),
    }

    worker.run(step, info, lambda: final_info(spec))


def compile_model(model: Any, mode: Sequence[str]) -> Any:
    """Returns the model, compiled as the mode says."""
    import torch

    if "checkpoint" in mode:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "compile" not in mode:
        return model
    options_by_word = {
        "autotune": "max_autotune",
        "wrapper": "cpp_wrapper",
        "graphs": "triton.cudagraphs",
    }
    # For its defaults, torch.compile takes None and refuses an empty dict.
    options = {option: True for word, option in options_by_word.items() if word in mode} or None
    if "blocks" not in mode:
        return torch.compile(model, options=options)
    for module in model.modules():
        if type(module).__name__ == "T5Block":
            module.compile(options=options)
    return model


def final_info(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the GPU's peak memory, or the CPU's rates in float32."""
    import floors
    import torch

    if spec.get("gpu"):
        return {"device peak": torch.cuda.max_memory_allocated()}
    # Measured as in `floors.device_rates`, but with torch's kernels, which may be faster.
    side, size = floors.SIDE, floors.SIZE
    square, vector = torch.ones(side, side), torch.ones(size)
    product, total = torch.empty_like(square), torch.empty_like(vector)
    with torch.no_grad():
        multiply = floors.fastest_time(lambda: torch.mm(square, square, out=product))
        add = floors.fastest_time(lambda: torch.add(vector, 1, out=total))
    return {"rates": {"flops": 2 * side**3 / multiply, "bytes": 2 * size * 4 / add}}


if __name__ == "__main__":
    main()
