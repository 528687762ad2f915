"""Load time of a base model and its memory beyond the parameters, by format.

    python benchmarks/load_base.py [--folder /tmp/pemoe_bases] [--repeats 5] [--dtype float32]

Writes a random T5 v1.1 Base (0.99 GB in float32) in every format. Then loads each in separate
processes, alternately with our reader and with the format's own library, and prints medians:

- the seconds of the load, without imports and the construction of the network;
- the increase of anonymous memory from the start of the load to its peak, divided by the
  parameters' bytes (1.00: nothing but the parameters).

Files are in the page cache. pytorch_model.bin needs torch; the comparison with transformers is
optional.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import machine
import ours

FOLDERS = {
    "own": "base.safetensors",
    "huggingface": "huggingface",
    "huggingface, 5 shards": "huggingface_shards",
    "pytorch_model.bin": "huggingface_bin",
    "T5X legacy": "t5x_legacy/checkpoint_0",
    "T5X Orbax": "t5x_orbax/checkpoint_0",
}


def network(dtype: str = "float32") -> Any:
    """Returns T5 v1.1 Base."""
    return ours.make_model({"dimensions": common.dimensions("base"), "dtype": dtype})


# --- writing ---


def write_all(folder: pathlib.Path) -> None:
    """Writes the base model in every format."""
    import jax
    import orbax.checkpoint as ocp

    from pemoe_jax.checkpoints import base_model, huggingface, lazy_array
    from pemoe_jax.core import network as network_lib
    from pemoe_jax.core import params as params_lib

    model = network()
    params = jax.device_get(network_lib.init_params(model, 0, params_lib.is_base))
    flat = params_lib.flatten(params)
    arrays = {path: lazy_array.from_numpy(array) for path, array in flat.items()}
    base_model.save_base(folder / FOLDERS["own"], params, model.config.as_dict())
    huggingface.save_checkpoint(folder / FOLDERS["huggingface"], arrays)
    shards = folder / FOLDERS["huggingface, 5 shards"]
    huggingface.save_checkpoint(shards, arrays, shard_bytes=200_000_000)
    if importlib.util.find_spec("torch"):
        import torch
        from safetensors.torch import load_file

        source, target = folder / FOLDERS["huggingface"], folder / FOLDERS["pytorch_model.bin"]
        target.mkdir(parents=True)
        shutil.copy(source / "config.json", target)
        torch.save(load_file(source / "model.safetensors"), target / "pytorch_model.bin")
    write_legacy(folder / FOLDERS["T5X legacy"], flat)
    # Orbax's layout as T5X uses it, with optimizer state that readers must skip.
    tree = {"target": params, "state": {"step": 0}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / FOLDERS["T5X Orbax"] / "state", args=ocp.args.PyTreeSave(tree))


# Written by this script, because the package reads T5X's formats but does not write them.
def write_legacy(folder: pathlib.Path, flat: dict[str, Any]) -> None:
    """Writes T5X's legacy layout: gzip, chunks of at most 64 MiB along the first axis."""
    import tensorstore as ts
    from flax import serialization

    from pemoe_jax.core import params as params_lib

    folder.mkdir(parents=True)
    index = {}
    for path, array in flat.items():
        name = f"target.{path.replace('/', '.')}"
        # As many rows as fit into 64 MiB.
        rows = max(1, min(array.shape[0], (1 << 26) * array.shape[0] // array.nbytes))
        metadata = {"compressor": {"id": "gzip", "level": 1}, "shape": array.shape, "dtype": "<f4"}
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/{name}/"},
            "metadata": {**metadata, "chunks": [rows, *array.shape[1:]]},
        }
        ts.open(spec, create=True).result().write(array).result()
        index[path] = f"PLACEHOLDER://{name}"
    tree = {"version": 3, "optimizer": {"target": params_lib.unflatten(index), "state": {}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


# --- loading, in a separate process ---


def our_reader(path: str, dtype: str) -> Callable[[], Any]:
    """Returns a function that loads as training does."""
    import jax.numpy as jnp

    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import network as network_lib
    from pemoe_jax.core import params as params_lib

    model = network(dtype)
    # The network is traced and the device started before the clock starts: neither is loading.
    network_lib.param_shapes(model, params_lib.is_base)
    jnp.zeros(1).block_until_ready()
    return lambda: models.load_base(model, path, 0)[0]


def library_reader(path: str, dtype: str) -> Callable[[], Any]:
    """Returns a function that loads with safetensors, transformers (torch) or orbax."""
    if path.endswith(".safetensors"):
        import safetensors.flax

        return lambda: safetensors.flax.load_file(path)
    if "huggingface" in path:
        import torch
        from transformers import T5ForConditionalGeneration

        kind = getattr(torch, dtype)
        return lambda: T5ForConditionalGeneration.from_pretrained(path, dtype=kind)
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    return lambda: checkpointer.restore(pathlib.Path(path) / "state")


def measure(load: Callable[[], Any]) -> dict[str, float]:
    """Returns the seconds of a load and its peak memory."""
    with machine.PeakMemory(interval=0.002) as peak:
        start = time.perf_counter()
        params = load()
        if type(params) is dict:  # of jax arrays, which load asynchronously
            import jax

            jax.block_until_ready(params)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak.added}


# --- the table ---


def compare(folder: pathlib.Path, repeats: int, dtype: str) -> None:
    """Prints the medians of each format and reader."""
    # T5 v1.1 Base has 247,577,856 parameters. In bfloat16 the logits matrix stays float32.
    param_bytes = 4 * 247_577_856 if dtype == "float32" else 2 * (247_577_856 + 32_128 * 768)
    print(f"| format | reader | {dtype}: seconds | peak / parameters |")
    print("| :-- | :-- | --: | --: |")
    for name, location in FOLDERS.items():
        path = folder / location
        if not path.exists():
            print(f"| {name} | not written: torch is absent | | |")
            continue
        readers = ["ours", "library"] if has_library(name) else ["ours"]
        # The readers alternate, so that a slow minute of the machine slows both.
        rounds = [
            [run_load(__file__, ["--load", r, str(path), "--dtype", dtype]) for r in readers]
            for _ in range(repeats)
        ]
        for reader, runs in zip(readers, zip(*rounds, strict=True), strict=True):
            seconds = statistics.median(run["seconds"] for run in runs)
            share = statistics.median(run["bytes"] for run in runs) / param_bytes
            print(f"| {name} | {reader} | {seconds:.2f} | {share:.2f} |", flush=True)


def has_library(name: str) -> bool:
    """Returns whether a library reads the format; only T5X reads its legacy format."""
    if name.startswith(("huggingface", "pytorch")):
        return bool(importlib.util.find_spec("transformers"))
    return name != "T5X legacy"


def run_load(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a script with --load in a process that has loaded nothing else; returns its JSON."""
    process = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Writes the files if necessary, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="/tmp/pemoe_bases", type=pathlib.Path)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        reader, path = args.load
        print(
            json.dumps(
                measure({"ours": our_reader, "library": library_reader}[reader](path, args.dtype))
            )
        )
        return
    if not args.folder.exists():
        os.environ["JAX_PLATFORMS"] = "cpu"
        write_all(args.folder)
    compare(args.folder, args.repeats, args.dtype)


if __name__ == "__main__":
    main()
