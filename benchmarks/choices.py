"""A worker that scores answer choices with our code (see `workers.Worker`).

Its spec: `dimensions`, `dtype`, `inputs`, `choices`, `lengths`, and `mode`: `shared`
(`steps.score_choices`, which encodes each input once), `rows` (a row per choice with its input, as
seqio's Evaluator passes them to T5X, all at once), or `pieces` (the same, `inputs` rows at a time).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import common
import machine
import numpy as np
import ours
import workers


def random_batch(spec: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns rows without padding: encoder_input_tokens [B, L], decoder_* [B, C, Lt]."""
    rng = np.random.default_rng(0)
    inputs, choices = spec["inputs"], spec["choices"]
    shapes = ((inputs, spec["lengths"][0]), (inputs, choices, spec["lengths"][1]))
    encoder, targets = (
        rng.integers(3, common.VOCAB_SIZE, shape).astype(np.int32) for shape in shapes
    )
    encoder[:, -1] = targets[..., -1] = 1  # EOS
    return {
        "encoder_input_tokens": encoder,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1],
    }


def as_rows(batch: Mapping[str, np.ndarray], pieces: int) -> list[dict[str, np.ndarray]]:
    """Returns a row per choice, with the input repeated, in pieces: arrays [B·C / pieces, …]."""
    rows = {key: value.reshape(-1, value.shape[-1]) for key, value in batch.items()}
    choices = batch["decoder_target_tokens"].shape[1]
    rows["encoder_input_tokens"] = np.repeat(rows["encoder_input_tokens"], choices, axis=0)
    return [{key: np.split(value, pieces)[i] for key, value in rows.items()} for i in range(pieces)]


def score_rows(model: Any, params: Any, rows: Mapping[str, Any]) -> Any:
    """Returns each row's target log-probability [rows]; runs the whole network on each row."""
    import jax.numpy as jnp
    import optax

    from pemoe_jax.core import steps

    logits, targets = steps.apply_model(model, params, rows, None), rows["decoder_target_tokens"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return -jnp.sum(nll * (targets > 0), axis=-1)


def main() -> None:
    """Runs the worker."""
    worker = workers.Worker()
    spec = worker.spec
    workers.check_gpu(spec)
    import floors
    import jax

    from pemoe_jax.core import params as params_lib
    from pemoe_jax.core import steps

    model = ours.make_model(spec)
    before = machine.memory("VmRSS")
    params = params_lib.unflatten(ours.random_params(model, ()))
    batch = random_batch(spec)
    scorer: Any = steps.score_choices
    pieces = [batch]
    if spec["mode"] != "shared":
        scorer = score_rows
        # With as many pieces as choices, a piece has as many rows as there are inputs. All pieces
        # have the same shape, so that one program serves all of them.
        pieces = as_rows(batch, spec["choices"] if spec["mode"] == "pieces" else 1)
    compiled = jax.jit(functools.partial(scorer, model)).lower(params, pieces[0]).compile()

    def step() -> float:
        scores = [np.asarray(compiled(params, piece)).ravel() for piece in pieces]
        # The benchmark compares this number between the sides.
        return float(np.square(np.concatenate(scores)).mean())

    info = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "floor": floors.scoring_floor(
            model, params_lib.flatten(params), spec["inputs"], spec["choices"], spec["lengths"]
        ),
        **workers.jax_info(spec.get("gpu", False)),
    }
    worker.run(step, info, functools.partial(ours.final_info, spec))


if __name__ == "__main__":
    main()
