"""A worker that scores answer choices with Hugging Face's T5 (see `workers.Worker`).

As in our code, each input is encoded once, its cross-attention keys and values are projected once,
and the tokens of all its choices are queries of the same cross-attention. transformers has no
function for that, so the worker calls the decoder's modules in order. It checks at the start that
the scores equal those of one pass per choice. Its spec is that of `choices.py`, with a `mode`,
words among: `sdpa` or `eager`, the encoder's attention (the decoder's is always sdpa); `compile`;
`freezing` (inductor packs the weights).
"""

from __future__ import annotations

from typing import Any

import choices
import machine
import torch_peer
import workers


def score_choices(model: Any, inputs: Any, targets: Any) -> Any:
    """Returns log-probabilities [B, C] of targets [B, C, Lt] with inputs [B, L]."""
    import torch
    from torch.nn import functional

    rows, num_choices, length = targets.shape
    heads = model.config.num_heads

    def attend(query: Any, key: Any, value: Any, bias: Any) -> Any:
        """Attends from [B, Lq, H·K] to [B, Lk, H·K]; returns [B, Lq, H·K]."""
        # T5 does not scale the logits.
        split = [x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value)]
        output = functional.scaled_dot_product_attention(*split, attn_mask=bias, scale=1.0)
        return output.transpose(1, 2).reshape(query.shape)

    encoded = model.encoder(input_ids=inputs).last_hidden_state
    flat = targets.reshape(rows * num_choices, length)
    x = model.shared(functional.pad(flat, (1, 0))[:, :-1])
    # Only the first block has position biases; all others reuse them.
    first = model.decoder.block[0].layer[0].SelfAttention
    future_mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    bias = first.compute_bias(length, length, device=x.device)
    bias = bias.masked_fill(future_mask, torch.finfo(x.dtype).min)
    for block in model.decoder.block:
        own, cross, mlp = block.layer
        h, part = own.layer_norm(x), own.SelfAttention
        x = x + part.o(attend(part.q(h), part.k(h), part.v(h), bias))
        h, part = cross.layer_norm(x), cross.EncDecAttention
        query = part.q(h).view(rows, num_choices * length, -1)  # an input's choices in one row
        output = attend(query, part.k(encoded), part.v(encoded), None)
        x = x + part.o(output.view(rows * num_choices, length, -1))
        x = mlp(x)
    logits = model.lm_head(model.decoder.final_layer_norm(x)).float()
    nll = functional.cross_entropy(logits.flatten(0, 1), flat.flatten(), reduction="none")
    return -nll.view(rows, num_choices, length).sum(-1)


def score_by_passes(model: Any, inputs: Any, targets: Any) -> Any:
    """Returns what `score_choices` does, by transformers' own function: one pass per choice."""
    import torch

    rows, num_choices, length = targets.shape
    repeated = inputs.repeat_interleave(num_choices, 0)
    logits = model(input_ids=repeated, labels=targets.reshape(-1, length)).logits.float()
    picked = torch.log_softmax(logits, -1).gather(-1, targets.reshape(-1, length, 1))
    return picked.sum((1, 2)).view(rows, num_choices)


def main() -> None:
    """Runs the worker."""
    worker = workers.Worker()
    spec = worker.spec
    # Libraries are imported before the memory is measured, so that `before` includes them.
    import torch
    import transformers  # noqa: F401

    mode = spec["mode"].split()
    before = machine.memory("VmRSS")
    model = torch_peer.network(spec).eval()
    batch = choices.random_batch(spec)
    inputs, targets = (
        torch.tensor(batch[name], dtype=torch.long, device=model.device)
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    scorer: Any = score_choices
    if "freezing" in mode:
        import torch._inductor.config as inductor

        # Inductor reads the setting when it compiles, in the first step.
        inductor.freezing = True
    if "compile" in mode:
        scorer = torch.compile(score_choices)

    with torch.no_grad():
        part = (inputs[:2], targets[:2])
        error = (score_choices(model, *part) - score_by_passes(model, *part)).abs().max().item()
        if error > 1e-2:
            raise SystemExit(f"scores must equal those of one pass per choice, differ by {error}")

        def step() -> float:
            return scorer(model, inputs, targets).square().mean().item()

        info = {"before": before, "versions": machine.versions("torch", "transformers")}
        worker.run(step, info, lambda: torch_peer.final_info(spec))


if __name__ == "__main__":
    main()
