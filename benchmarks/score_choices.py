"""How much faster answer choices are scored when an input is encoded once for all of them.

    python benchmarks/score_choices.py [--inputs 16] [--choices 4] [--repeats 11] [--dtype float32]

Scores random inputs of 256 tokens with choices of 8, T5 v1.1 Small with random weights, in two
ways: `steps.score_choices`, and as seqio's Evaluator hands rows to T5X: every choice is a row of
its own with its input, and the whole network runs over it, all rows in one batch and (second
figure) as many rows at a time as there are inputs. The ways take turns; medians are printed, the
ratio is of the medians against the faster of the two, and the scores must agree. One line says how
busy the machine was with other things: the share of its cores that others used meanwhile.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.core import cross_entropy, steps
from pemoe_jax.core import network as network_lib

SIZE = "models/t5_1_1_small.gin"
INPUT_LENGTH, TARGET_LENGTH = 256, 8


def network(size: str, dtype: str) -> network_lib.Transformer:
    """The size's network, through its gin file."""
    import gin

    from pemoe_jax import config, train

    config.quiet()
    config.load(train.FLAGS.parse_args([f"--gin_file={size}"]), [])
    model = gin.get_configurable(network_lib.Transformer)()
    return model.clone(config=dataclasses.replace(model.config, dtype=dtype))


def random_batch(inputs: int, choices: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Rows without padding: encoder_input_tokens [B, L], decoder_* [B, C, Lt]."""
    rng = np.random.default_rng(0)
    targets = rng.integers(3, vocab_size, (inputs, choices, TARGET_LENGTH))
    targets[..., -1] = 1
    encoder = rng.integers(3, vocab_size, (inputs, INPUT_LENGTH))
    encoder[:, -1] = 1
    return {
        "encoder_input_tokens": encoder.astype(np.int32),
        "decoder_target_tokens": targets.astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1].astype(
            np.int32
        ),
    }


def as_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row a choice: every array [B·C, …], the input repeated."""
    choices = batch["decoder_target_tokens"].shape[1]
    return {
        key: np.repeat(value, choices, axis=0)
        if key == "encoder_input_tokens"
        else value.reshape(-1, value.shape[-1])
        for key, value in batch.items()
    }


def score_rows(model: Any, params: Any, rows: dict[str, Any]) -> jax.Array:
    """Log-probability of every row's target, the whole network run over each row: [rows]."""
    logits = steps.apply_model(model, params, rows, None)
    nll, _ = cross_entropy.token_losses(logits, rows["decoder_target_tokens"])
    return -jnp.sum(nll * (rows["decoder_target_tokens"] > 0), axis=-1)


def busy_elsewhere(work: Callable[[], None]) -> float:
    """The share of the cores that other processes used while `work` ran (Linux)."""

    def used() -> float:
        with open("/proc/stat") as stat:
            fields = [int(field) for field in stat.readline().split()[1:]]
        idle = fields[3] + fields[4]
        return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")

    before, own, start = used(), time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    others = used() - before - (time.process_time() - own)
    return max(0.0, others) / (seconds * (os.cpu_count() or 1))


def compare(inputs: int, choices: int, repeats: int, dtype: str, size: str = SIZE) -> float:
    """Prints the medians and returns the ratio."""
    model = network(size, dtype)
    params = network_lib.init_params(model, 0, lambda _: True)
    batch = random_batch(inputs, choices, model.config.vocab_size)
    rows = as_rows(batch)
    pieces = [
        {key: value[start : start + inputs] for key, value in rows.items()}
        for start in range(0, inputs * choices, inputs)
    ]
    shared = jax.jit(functools.partial(steps.score_choices, model))
    separate = jax.jit(functools.partial(score_rows, model))
    ways: dict[str, Callable[[], np.ndarray]] = {
        "shared": lambda: np.asarray(shared(params, batch)).ravel(),
        "all": lambda: np.asarray(separate(params, rows)),
        "pieces": lambda: np.concatenate([np.asarray(separate(params, p)) for p in pieces]),
    }
    scores = {name: way() for name, way in ways.items()}  # compiles
    apart = max(float(np.abs(scores["shared"] - scores[name]).max()) for name in ways)
    times: dict[str, list[float]] = {name: [] for name in ways}

    def take_turns() -> None:
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)

    busy = busy_elsewhere(take_turns)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = min(medians["all"], medians["pieces"]) / medians["shared"]
    device = jax.devices()[0]
    print(
        f"{inputs} inputs of {INPUT_LENGTH} tokens, {choices} choices of {TARGET_LENGTH}, {dtype},"
        f" {device.device_kind}, {os.cpu_count()} cores, medians of {repeats}"
    )
    print("| way | seconds | fastest | inputs a second |")
    print("| :-- | --: | --: | --: |")
    labels = {
        "shared": "encoded once for all choices",
        "all": f"one pass a choice, {inputs * choices} rows at a time",
        "pieces": f"one pass a choice, {inputs} rows at a time",
    }
    for name, label in labels.items():
        least, median = min(times[name]), medians[name]
        print(f"| {label} | {median:.3f} | {least:.3f} | {inputs / median:.1f} |")
    print(f"ratio {ratio:.2f}; scores agree within {apart:.1e}")
    print(f"others used {busy:.0%} of the cores meanwhile")
    return ratio


def main() -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", default=16, type=int)
    parser.add_argument("--choices", default=4, type=int)
    parser.add_argument("--repeats", default=11, type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--size", default=SIZE, help="a gin file of dimensions")
    args = parser.parse_args()
    compare(args.inputs, args.choices, args.repeats, args.dtype, args.size)


if __name__ == "__main__":
    main()
