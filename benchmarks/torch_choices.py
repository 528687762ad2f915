"""A worker: scores of answer choices by Hugging Face's T5, with our trick (see `common.Service`).

An input is encoded once, its keys and values for the decoder are projected once, and its choices
are decoded against them as so many more queries. transformers has no call for that, so its
decoder's own modules are called here in their order; that the scores are those of one pass a choice
is checked at the start. Its spec is that of `choices.py`; `way`: `eager` or nothing, `compile`,
`freezing` (inductor packs the weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import common
import torch_peer


def score_choices(model: Any, inputs: Any, targets: Any) -> Any:
    """Log-probability of every choice: inputs [B, L], targets [B, C, Lt] -> [B, C]."""
    import torch
    from torch.nn import functional

    rows, choices, length = targets.shape
    heads = model.config.num_heads

    def attend(query: Any, key: Any, value: Any, bias: Any) -> Any:
        """[B, Lq, H·K], [B, Lk, H·K] -> [B, Lq, H·K]; T5 does not scale."""
        split = [x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value)]
        found = functional.scaled_dot_product_attention(*split, attn_mask=bias, scale=1.0)
        return found.transpose(1, 2).reshape(query.shape)

    encoded = model.encoder(input_ids=inputs).last_hidden_state
    flat = targets.reshape(rows * choices, length)
    x = model.shared(functional.pad(flat, (1, 0))[:, :-1])
    first = model.decoder.block[0].layer[0].SelfAttention
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    bias = first.compute_bias(length, length, device=x.device)
    bias = bias.masked_fill(later, torch.finfo(x.dtype).min)
    for block in model.decoder.block:
        own, cross, mlp = block.layer
        h, part = own.layer_norm(x), own.SelfAttention
        x = x + part.o(attend(part.q(h), part.k(h), part.v(h), bias))
        h, part = cross.layer_norm(x), cross.EncDecAttention
        query = part.q(h).view(rows, choices * length, -1)  # the choices of an input in one row
        found = attend(query, part.k(encoded), part.v(encoded), None)
        x = x + part.o(found.view(rows * choices, length, -1))
        x = mlp(x)
    logits = model.lm_head(model.decoder.final_layer_norm(x)).float()
    nll = functional.cross_entropy(logits.flatten(0, 1), flat.flatten(), reduction="none")
    return -nll.view(rows, choices, length).sum(-1)


def plainly(model: Any, inputs: Any, targets: Any) -> Any:
    """The same by transformers' own call, one pass a choice."""
    import torch

    rows, choices, length = targets.shape
    repeated = inputs.repeat_interleave(choices, 0)
    logits = model(input_ids=repeated, labels=targets.reshape(-1, length)).logits.float()
    picked = torch.log_softmax(logits, -1).gather(-1, targets.reshape(-1, length, 1))
    return picked.sum((1, 2)).view(rows, choices)


def random_batch(spec: Mapping[str, Any], device: Any) -> tuple[Any, Any]:
    """Token ids without padding: inputs [B, L], targets [B, C, Lt]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs, choices, (length, of_target) = spec["inputs"], spec["choices"], spec["lengths"]
    shapes = ((inputs, length), (inputs, choices, of_target))
    found = (torch.randint(3, common.VOCABULARY, s, generator=generator) for s in shapes)
    return tuple(one.to(device) for one in found)


def main() -> None:
    """Serves."""
    service = common.Service()
    spec = service.spec
    import torch

    ways = spec["way"].split()
    if not spec.get("gpu"):
        torch.set_num_threads(common.CORES)
    import transformers  # noqa: F401

    before = common.memory("VmRSS")
    model = torch_peer.network(spec).eval()
    inputs, targets = random_batch(spec, model.device)
    scorer: Any = score_choices
    if "freezing" in ways:
        import torch._inductor.config as inductor

        inductor.freezing = True
    if "compile" in ways:
        scorer = torch.compile(score_choices)

    with torch.no_grad():
        some = (inputs[:2], targets[:2])
        apart = (score_choices(model, *some) - plainly(model, *some)).abs().max().item()
        if apart > 1e-2:
            raise SystemExit(f"the scores differ from those of one pass a choice by {apart}")

        def step() -> float:
            return scorer(model, inputs, targets).square().mean().item()

        told = {"before": before, "versions": common.versions("torch", "transformers")}
        service.run(step, told, lambda: torch_peer.told_at_the_end(spec))


if __name__ == "__main__":
    main()
