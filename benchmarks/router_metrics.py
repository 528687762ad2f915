"""What watching the routers costs a training step, and what the load-balance loss does.

    python benchmarks/router_metrics.py [--methods mov molora] [--rounds 21] [--size small]

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
from collections.abc import Callable, Iterator
from unittest import mock

import common
import ours

ROWS, INPUTS, TARGETS, EXPERTS = 8, 128, 32, 10
WAYS = ("bare", "off", "on", "balanced")


@contextlib.contextmanager
def untold(bare: bool) -> Iterator[None]:
    """Routers that tell zeros, where `bare`."""
    import jax.numpy as jnp

    from pemoe_jax.core import routing

    zeros = jnp.zeros(len(routing.STATISTICS) - 1)
    with contextlib.ExitStack() as stack:
        if bare:
            stack.enter_context(mock.patch.object(routing, "compute_statistics", lambda *_: zeros))
        yield


def way(name: str, method: str, size: str) -> Callable[[], None]:
    """A step of its own state, compiled, that waits until it is done."""
    spec = {
        "dimensions": common.dimensions(size),
        "method": method,
        "experts": EXPERTS,
        "rows": ROWS,
        "lengths": [INPUTS, TARGETS],
        "router": {"balance_loss": 1e-2} if name == "balanced" else {},
        "router_metrics": name in ("on", "balanced"),
    }
    with untold(name == "bare"):
        step, _ = ours.training_step(spec)
    for _ in range(2):
        step()
    return step


def compare(method: str, rounds: int, size: str) -> None:
    """Prints a table."""
    sides, others = common.in_turn({name: way(name, method, size) for name in WAYS}, rounds)
    print(
        f"\n{method}-{EXPERTS}, {ROWS} rows of {INPUTS} and {TARGETS} tokens, {rounds} rounds,"
        f" in which others used {others:.0%} of the cores"
    )
    print("| way | time | seconds a step | over off | middle half | over bare | middle half |")
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    times = {side.name: side.times for side in sides}
    for name in WAYS:
        for kind, which in enumerate(("clock", "CPU")):
            own = [taken[kind] for taken in times[name]]
            cells = [f"{common.quartiles(own)[1]:.3f}"]
            for other in ("off", "bare"):
                ratios = common.paired(own, [taken[kind] for taken in times[other]])
                cells += [f"{ratios[1]:.3f}", f"{ratios[0]:.3f}–{ratios[2]:.3f}"]
            print(f"| {name} | {which} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", default=21, type=int)
    parser.add_argument("--size", default="small")
    parser.add_argument("--methods", nargs="+", default=["mov", "molora"])
    args = parser.parse_args()
    common.pin()
    print(f"{common.machine()}; {common.versions('jax', 'jaxlib', 'flax')}")
    for method in args.methods:
        compare(method, args.rounds, args.size)


if __name__ == "__main__":
    main()
