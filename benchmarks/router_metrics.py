"""Cost of router metrics and of the load-balancing loss in a training step.

    python benchmarks/router_metrics.py [--methods mov molora] [--rounds 21] [--size small]

Trains on 8 random rows of 128 and 32 tokens: T5 v1.1 Small with random weights in float32, ten
experts per site, two CPU threads. The variants of the step alternate, one step each per round:

- bare: routers compute no statistics at all;
- off: ROUTER_METRICS=None;
- on: ROUTER_METRICS='sites' ('layers' has the same step);
- balanced: on, with the loss of routing/top_2_balanced.gin on soft routing.

Prints medians, and the median and middle half of each variant's time over that of `off` (and of
`bare`) in the same round: of wall-clock time, and of CPU time, which other processes disturb less.
"""

import argparse
import contextlib
from collections.abc import Callable
from unittest import mock

import common
import machine
import ours
import workers

ROWS, INPUTS, TARGETS, EXPERTS = 8, 128, 32, 10
VARIANTS = ("bare", "off", "on", "balanced")


def without_statistics() -> contextlib.AbstractContextManager[object]:
    """Replaces the routers' statistics with zeros."""
    import jax.numpy as jnp

    from pemoe_jax.core import routing

    zeros = jnp.zeros(len(routing.STATISTICS) - 1)
    return mock.patch.object(routing, "compute_statistics", lambda *_: zeros)


def make_step(name: str, method: str, size: str) -> Callable[[], None]:
    """Returns a compiled and warm step with its own state, which waits for its end."""
    spec = {
        "dimensions": common.dimensions(size),
        "method": method,
        "experts": EXPERTS,
        "rows": ROWS,
        "lengths": [INPUTS, TARGETS],
        "router": {"balance_loss": 1e-2} if name == "balanced" else {},
        "router_metrics": name in ("on", "balanced"),
    }
    with without_statistics() if name == "bare" else contextlib.nullcontext():
        step, _ = ours.training_step(spec)
    for _ in range(2):
        step()
    return step


def compare(method: str, rounds: int, size: str) -> None:
    """Prints a method's table."""
    sides, other_load = workers.alternate_functions(
        {name: make_step(name, method, size) for name in VARIANTS}, rounds
    )
    print(
        f"\n{method}-{EXPERTS}, {ROWS} rows of {INPUTS} and {TARGETS} tokens, {rounds} rounds,"
        f" in which others used {other_load:.0%} of the cores"
    )
    print(
        "| variant | time | seconds per step | over off | middle half | over bare | middle half |"
    )
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    times = {side.name: side.times for side in sides}
    for name in VARIANTS:
        for index, clock in enumerate(("wall", "CPU")):
            own = [step_times[index] for step_times in times[name]]
            cells = [f"{common.quartiles(own)[1]:.3f}"]
            for other in ("off", "bare"):
                ratios = common.paired_ratios(own, [t[index] for t in times[other]])
                cells += [f"{ratios[1]:.3f}", f"{ratios[0]:.3f}–{ratios[2]:.3f}"]
            print(f"| {name} | {clock} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", default=21, type=int)
    parser.add_argument("--size", default="small")
    parser.add_argument("--methods", nargs="+", default=["mov", "molora"])
    args = parser.parse_args()
    machine.pin()
    print(f"{machine.description()}; {machine.versions('jax', 'jaxlib', 'flax')}")
    for method in args.methods:
        compare(method, args.rounds, args.size)


if __name__ == "__main__":
    main()
