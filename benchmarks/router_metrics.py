"""What watching the routers costs a training step, and what the load-balance loss does.

    python benchmarks/router_metrics.py [--methods mov molora] [--rounds 21] [--size …]

Trains on random rows, 8 of 128 and 32 tokens, T5 v1.1 Small with random weights in float32, ten
experts a site, on two CPU threads. Ways of taking the step take turns, one step each a round, in
an order that turns too:

- bare: routers tell nothing, as if nobody had ever asked (the statistics are cut out);
- off: ROUTER_METRICS=None;
- on: ROUTER_METRICS='sites' (or 'layers': the step is the same);
- balanced: on, with routing/top_2_balanced.gin's loss on soft routing.

Printed are the medians, and the median over rounds of a way's time over that of `off` (and of
`bare`) in the same round, with the middle half of these ratios: of the clock's time, and of the
time that the process had on the CPU, which others on the machine disturb less.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

if hasattr(os, "sched_setaffinity"):  # before jax looks how many there are
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.core import network, optim, params, routing, steps

ROWS, INPUTS, TARGETS, EXPERTS = 8, 128, 32, 10
WAYS = ("bare", "off", "on", "balanced")


def transformer(size: str, method: str, *bindings: str) -> network.Transformer:
    """The size's network with the method's adapters, through their gin files."""
    import gin

    from pemoe_jax import config, train

    config.quiet()
    files = [f"--gin_file={size}", f"--gin_file=methods/{method}.gin"]
    flags = [f"--gin.NUM_EXPERTS={EXPERTS}", *(f"--gin.{binding}" for binding in bindings)]
    rest, found = config.split_bindings([*files, *flags])
    config.load(train.FLAGS.parse_args(rest), found)
    model = gin.get_configurable(network.Transformer)()
    return model.clone(config=dataclasses.replace(model.config, dtype="float32"))


def random_batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Rows of which the last quarter is padding, as of packed ones the end is."""
    rng = np.random.default_rng(0)
    encoder = rng.integers(3, vocab_size, (ROWS, INPUTS)).astype(np.int32)
    targets = rng.integers(3, vocab_size, (ROWS, TARGETS)).astype(np.int32)
    encoder[: ROWS // 2, -INPUTS // 4 :] = 0
    targets[: ROWS // 2, -TARGETS // 4 :] = 0
    return {
        "encoder_input_tokens": encoder,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }


@contextlib.contextmanager
def untold(bare: bool) -> Iterator[None]:
    """Routers that tell zeros, where `bare`."""
    zeros = jnp.zeros(len(routing.STATISTICS) - 1)
    with contextlib.ExitStack() as stack:
        if bare:
            stack.enter_context(mock.patch.object(routing, "statistics", lambda *_: zeros))
        yield


def way(name: str, method: str, size: str) -> Callable[[], None]:
    """A step of its own state, compiled, that waits until it is done."""
    bindings = ["routing.Router.balance_loss=1e-2"] if name == "balanced" else []
    model = transformer(size, method, *bindings)
    everything = network.init_params(model, 0, lambda _: True)
    trained, frozen = params.split(everything, [params.ADAPTER_PATTERN])
    optimizer = optim.adafactor(lambda step: jnp.asarray(3e-4))
    state = steps.TrainState.create(trained, optimizer)
    step = steps.make_train_step(
        model, optimizer, steps.Loss(), router_metrics=name in ("on", "balanced")
    )
    batch, key = random_batch(model.config.vocab_size), jax.random.key(0)
    held = [state]

    def take() -> None:
        held[0], metrics = step(held[0], frozen, batch, key)
        jax.block_until_ready((held[0].params, metrics))

    with untold(name == "bare"):
        take()  # compiles
    take()
    return take


def compare(method: str, rounds: int, size: str) -> dict[str, float]:
    """Prints a table and returns the ratio of each way to `off`."""
    taken = {name: way(name, method, size) for name in WAYS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for number in range(rounds):
        for place in range(len(WAYS)):
            name = WAYS[(number + place) % len(WAYS)]
            start, cpu = time.perf_counter(), time.process_time()
            taken[name]()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    print(f"\n{method}-{EXPERTS}, {ROWS} rows of {INPUTS} and {TARGETS} tokens, {rounds} rounds")
    print("| way | time | seconds a step | over off | middle half | over bare | middle half |")
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    found = {}
    for name in WAYS:
        for kind, which in enumerate(("clock", "CPU")):
            own = [taken[kind] for taken in times[name]]
            cells = [f"{statistics.median(own):.3f}"]
            for other in ("off", "bare"):
                pairs = zip(own, [taken[kind] for taken in times[other]], strict=True)
                low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4)
                cells += [f"{middle:.3f}", f"{low:.3f}–{high:.3f}"]
                found.setdefault(name, middle)
            print(f"| {name} | {which} | {' | '.join(cells)} |", flush=True)
    return found


def main() -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["mov", "molora"])
    parser.add_argument("--rounds", default=21, type=int)
    parser.add_argument("--size", default="models/t5_1_1_small.gin", help="a file of dimensions")
    args = parser.parse_args()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax")]
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f"{jax.devices()[0].device_kind} on {platform.machine()}, {count} threads"
    print(f"{device}; {', '.join(versions)}, Python {platform.python_version()}")
    for method in args.methods:
        compare(method, args.rounds, args.size)


if __name__ == "__main__":
    main()
