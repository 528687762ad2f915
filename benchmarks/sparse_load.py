"""Load time and memory of sparse models: upcycling a dense base, and reading a Switch checkpoint.

    python benchmarks/sparse_load.py [--rounds 5] [--size large] [--folder DIR] [--json FILE]

Writes a random T5 v1.1 and a random Switch-Base-8 as Hugging Face folders in bfloat16, once. Then
loads the T5 dense and upcycled, in turn, and the Switch model. Each load is a process of its own,
and is timed without imports and the construction of the network. `beyond` in a row is the increase
of anonymous memory from the start of the load to its peak, minus the bytes of the loaded
parameters, which are on the host because the device is a CPU. Files are in the page cache.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import load_base
import machine
import ours
import workers

EXPERTS = 8
# The network of Switch-Base-8.
_SWITCH = {
    "dimensions": {
        "vocab_size": common.VOCAB_SIZE,
        "emb_dim": 768,
        "num_heads": 12,
        "num_encoder_layers": 12,
        "num_decoder_layers": 12,
        "head_dim": 64,
        "mlp_dim": 3072,
    },
    "mlp_activations": ("relu",),
    "logits_via_embedding": True,
}
# side -> what its process does
SIDES = {
    "dense": "T5 v1.1, read dense",
    "upcycled": f"T5 v1.1, upcycled to {EXPERTS} experts",
    "switch": "Switch-Base-8, read",
}


def make_spec(size: str, side: str) -> dict[str, Any]:
    """Returns the spec of a side's network; sparse ones are those of methods/flan_switch.gin."""
    spec = dict(_SWITCH) if side == "switch" else {"dimensions": common.dimensions(size)}
    # A Switch checkpoint was trained with outputs weighted by the router's probabilities. Upcycled
    # experts must compute the function of the dense MLP, so their outputs keep the weight 1.
    combine = "probability" if side == "switch" else "straight"
    sparse = {} if side == "dense" else {"sparse": {"num_experts": EXPERTS, "combine": combine}}
    return {**spec, **sparse, "dtype": "bfloat16"}


def write_base(spec: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes random parameters for a spec's network as a Hugging Face folder."""
    import jax.numpy as jnp
    import numpy as np

    from pemoe_jax.checkpoints import huggingface, lazy_array
    from pemoe_jax.core import network
    from pemoe_jax.core import params as params_lib

    model = ours.make_model(spec)
    params = network.init_params(model, 0, params_lib.is_base, lambda _, a: a.astype(jnp.bfloat16))
    arrays = {
        path: lazy_array.from_numpy(np.asarray(leaf))
        for path, leaf in params_lib.flatten(params).items()
    }
    huggingface.save_checkpoint(folder, arrays, sparse=model.sparse)


def reader(spec: dict[str, Any], folder: pathlib.Path) -> Callable[[], Any]:
    """Returns a function that loads a folder for the model of a spec."""
    import jax.numpy as jnp

    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import network
    from pemoe_jax.core import params as params_lib

    model = ours.make_model(spec)
    # The network is traced and the device started before the clock starts: neither is loading.
    network.param_shapes(model, params_lib.is_base)
    jnp.zeros(1).block_until_ready()
    return lambda: models.load_base(model, str(folder), 0)[0]


def measure(spec: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Returns the seconds of a load, and in bytes its parameters, largest array and peak beyond."""
    import jax

    load, loaded = reader(spec, folder), []

    def load_and_keep() -> Any:
        loaded.append(load())
        return loaded[0]

    measured = load_base.measure(load_and_keep)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(loaded[0])]
    return {
        "seconds": measured["seconds"],
        "cpu": sum(os.times()[:2]),
        "parameters": sum(sizes),
        "largest": max(sizes),
        "beyond": measured["bytes"] - sum(sizes),
        "versions": machine.versions("jax", "jaxlib", "flax"),
    }


def measure_row(name: str, sides: Sequence[str], rounds: int) -> dict[str, Any]:
    """Loads the sides in turn, each `rounds` times, and returns the row."""
    measured = [workers.Side(SIDES[side]) for side in sides]
    load = machine.OtherLoad()
    for _ in range(rounds):
        for side, result in zip(sides, measured, strict=True):
            run = load_base.run_load(__file__, [*sys.argv[1:], "--load", side])
            result.times.append((run.pop("seconds"), run.pop("cpu")))
            run["beyond"] = [*result.info.get("beyond", []), run["beyond"]]
            result.info |= run
    for result in measured:
        result.info["beyond"] = statistics.median(result.info["beyond"])
    share = load.share(sum(cpu for side in measured for _, cpu in side.times))
    return common.make_row(name, measured[0], measured[1] if len(measured) > 1 else None, share)


def main() -> None:
    """Writes the folders if necessary, and measures both rows."""
    parser = common.make_parser(__doc__, rounds=5, size="large")
    parser.add_argument("--folder", default="/tmp/pemoe_sparse_load", type=pathlib.Path)
    parser.add_argument("--load", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folders = {side: args.folder / args.size for side in SIDES} | {
        "switch": args.folder / "switch_base_8"
    }
    if args.load:
        machine.pin()
        print(json.dumps(measure(make_spec(args.size, args.load), folders[args.load])))
        return
    for side in ("dense", "switch"):
        if not folders[side].exists():
            write_base(make_spec(args.size, side), folders[side])
    rows = [
        measure_row("sparse_load/upcycled", ("upcycled", "dense"), args.rounds),
        measure_row("sparse_load/switch", ("switch",), args.rounds),
    ]
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
