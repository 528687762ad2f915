"""Upcycling a dense base against reading it dense: seconds, and memory beyond the parameters.

    python benchmarks/upcycling.py [--size base] [--experts 8] [--rounds 5] [--dtype bfloat16]

Writes a random T5 v1.1 as a Hugging Face folder, once. Each load is a process of its own, dense and
upcycled ones in turn; it is timed without imports and the construction of the network. Memory is
the peak anonymous memory above that before the load, minus the bytes of the loaded parameters,
which are on the host too where the device is a CPU. Files are in the page cache.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import common
import load_base
import machine
import ours

SIDES = ("dense", "upcycled")


def network(args: argparse.Namespace, side: str) -> Any:
    """Returns T5 v1.1, or the same with experts in every second block (methods/flan_switch.gin)."""
    spec = {"dimensions": common.dimensions(args.size), "dtype": args.dtype}
    if side == "upcycled":
        spec["sparse"] = {"num_experts": args.experts, "combine": "straight"}
    return ours.make_model(spec)


def write_base(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Writes a random dense base in the dtype."""
    import jax.numpy as jnp
    import numpy as np

    from pemoe_jax.checkpoints import huggingface, lazy_array
    from pemoe_jax.core import network as network_lib
    from pemoe_jax.core import params as params_lib

    params = network_lib.init_params(
        network(args, "dense"), 0, params_lib.is_base, lambda _, a: a.astype(jnp.dtype(args.dtype))
    )
    arrays = {
        path: lazy_array.from_numpy(np.asarray(leaf))
        for path, leaf in params_lib.flatten(params).items()
    }
    huggingface.save_checkpoint(folder, arrays)


def reader(args: argparse.Namespace, side: str, folder: pathlib.Path) -> Callable[[], Any]:
    """Returns a function that loads the base for a model of one side."""
    import jax.numpy as jnp

    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import network as network_lib
    from pemoe_jax.core import params as params_lib

    model = network(args, side)
    # Traced, and the device started, before the clock: neither is a part of loading.
    network_lib.param_shapes(model, params_lib.is_base)
    jnp.zeros(1).block_until_ready()
    return lambda: models.load_base(model, str(folder), 0)[0]


def measure(args: argparse.Namespace, side: str, folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of a load, and in bytes its peak memory, parameters and largest array."""
    import jax

    load, loaded = reader(args, side, folder), []
    measured = load_base.measure(lambda: loaded.append(load()) or loaded[0])
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(loaded[0])]
    return {**measured, "parameters": sum(sizes), "largest": max(sizes)}


def measure_in_process(args: argparse.Namespace, side: str) -> dict[str, float]:
    """Runs `measure` in a process that has loaded nothing else."""
    command = [sys.executable, __file__, *sys.argv[1:], "--load", side]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Writes the base if necessary, and prints the table and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base")
    parser.add_argument("--experts", default=8, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", default="/tmp/pemoe_upcycling", type=pathlib.Path)
    parser.add_argument("--load", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder / f"{args.size}_{args.dtype}"
    if args.load:
        machine.pin()
        print(json.dumps(measure(args, args.load, folder)))
        return
    if not folder.exists():
        write_base(args, folder)
    rounds = [{side: measure_in_process(args, side) for side in SIDES} for _ in range(args.rounds)]
    print(f"{args.size}, {args.experts} experts, {args.dtype}, {args.rounds} rounds")
    print("| side | parameters, MB | largest array, MB | seconds | memory beyond parameters, MB |")
    print("| :-- | --: | --: | --: | --: |")
    for side in SIDES:
        runs = [measured[side] for measured in rounds]
        seconds = common.quartiles([run["seconds"] for run in runs])[1]
        beyond = [(run["bytes"] - run["parameters"]) / machine.MEGABYTE for run in runs]
        sizes = [runs[0][name] / machine.MEGABYTE for name in ("parameters", "largest")]
        print(
            f"| {side} | {sizes[0]:,.0f} | {sizes[1]:,.0f} | {seconds:.2f}"
            f" | {common.quartiles(beyond)[1]:,.0f} |"
        )
    times = [[measured[side]["seconds"] for measured in rounds] for side in reversed(SIDES)]
    low, ratio, high = common.paired_ratios(*times)
    print(f"upcycled over dense: {ratio:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
