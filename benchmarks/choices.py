"""A worker: scores of answer choices by ours (see `common.Service`).

Its spec: `dimensions`, `dtype`, `inputs`, `choices`, `lengths`, and `way`: shared
(`steps.score_choices`: each input encoded once), rows (as seqio's Evaluator hands rows to T5X:
every choice a row of its own with its input, all at once), pieces (so, as many rows at a time as
there are inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import common
import numpy as np
import ours


def random_batch(spec: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rows without padding: encoder_input_tokens [B, L], decoder_* [B, C, Lt]."""
    rng = np.random.default_rng(0)
    inputs, choices, (length, of_target) = spec["inputs"], spec["choices"], spec["lengths"]
    encoder = rng.integers(3, common.VOCABULARY, (inputs, length)).astype(np.int32)
    targets = rng.integers(3, common.VOCABULARY, (inputs, choices, of_target)).astype(np.int32)
    encoder[:, -1] = targets[..., -1] = 1
    return {
        "encoder_input_tokens": encoder,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
    }


def as_rows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row a choice: every array [B·C, …], the input repeated."""
    choices = batch["decoder_target_tokens"].shape[1]
    return {
        key: np.repeat(value, choices, axis=0)
        if key == "encoder_input_tokens"
        else value.reshape(-1, value.shape[-1])
        for key, value in batch.items()
    }


def score_rows(model: Any, params: Any, rows: Mapping[str, Any]) -> Any:
    """Log-probability of every row's target, the whole network run over each row: [rows]."""
    import jax.numpy as jnp

    from pemoe_jax.core import cross_entropy, steps

    logits = steps.apply_model(model, params, rows, None)
    nll, _ = cross_entropy.token_losses(logits, rows["decoder_target_tokens"])
    return -jnp.sum(nll * (rows["decoder_target_tokens"] > 0), axis=-1)


def main() -> None:
    """Serves."""
    service = common.Service()
    spec = service.spec
    import floors
    import jax

    from pemoe_jax.core import params as params_lib
    from pemoe_jax.core import steps

    model = ours.transformer(spec)
    before = common.memory("VmRSS")
    params = params_lib.unflatten(ours.random_params(model, ()))
    batch = random_batch(spec)
    scorer: Any = steps.score_choices
    pieces = [batch]
    if spec["way"] != "shared":
        scorer, rows = score_rows, as_rows(batch)
        many = spec["inputs"] * (spec["choices"] if spec["way"] == "rows" else 1)
        pieces = [
            {key: value[start : start + many] for key, value in rows.items()}
            for start in range(0, spec["inputs"] * spec["choices"], many)
        ]
    compiled = jax.jit(functools.partial(scorer, model)).lower(params, pieces[0]).compile()

    def step() -> float:
        scores = [np.asarray(compiled(params, piece)).ravel() for piece in pieces]
        return float(np.square(np.concatenate(scores)).mean())

    told = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "floor": floors.of_scoring(
            model,
            params_lib.flatten(params),
            spec["inputs"],
            spec["choices"],
            spec["lengths"],
        ),
    }
    told |= ours.told_of_device(spec)
    service.run(step, told, functools.partial(ours.told_at_the_end, spec))


if __name__ == "__main__":
    main()
