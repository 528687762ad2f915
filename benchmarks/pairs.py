"""Shapes and GPU settings of our training steps, and comparisons of two of our methods."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import common
import workers

GPU_SETTINGS = ("attention", "scan_layers", "remat_policy", "fused", "frozen_dtype")


def add_gpu_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each of `GPU_SETTINGS`, the settings of our side on a GPU."""
    # The defaults were the fastest on an H200.
    parser.add_argument("--attention", default="fused", choices=("plain", "chunked", "fused"))
    parser.add_argument(
        "--scan", dest="scan_layers", action="store_true", help="run the layers as a loop"
    )
    parser.add_argument(
        "--remat", dest="remat_policy", default="none", choices=("none", "minimal", "full")
    )
    parser.add_argument(
        "--plain_mov", dest="fused", action="store_false", help="MoV without fused kernels"
    )
    parser.add_argument(
        "--frozen",
        dest="frozen_dtype",
        default="activations",
        choices=("activations", "int8", "float8_e4m3fn"),
    )


def gpu_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings as entries of a spec."""
    return {name: getattr(args, name) for name in GPU_SETTINGS}


def step_spec(size: str, gpu: bool = False) -> dict[str, Any]:
    """Returns the model and the batch of the CPU rows, or of the GPU rows, of RESULTS.md."""
    spec: dict[str, Any] = {"dimensions": common.dimensions(size)}
    if not gpu:
        return {**spec, "rows": 8, "lengths": [128, 32]}
    # Five steps per measurement, because one is too short to time.
    batch = {"rows": 16, "lengths": [1024, 256], "dtype": "bfloat16", "packed": True}
    return {**spec, **batch, "gpu": True, "steps": 5}


def compare(doc: str | None, name: str, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Runs a benchmark that measures the first of two methods against the second.

    Args:
      doc: the script's docstring.
      name: name of the row, without the device.
      methods: name of each method -> its entries in the spec.
    """
    parser = common.make_parser(doc, size="small", gpu=True)
    add_gpu_flags(parser)
    args = parser.parse_args()
    spec = {**step_spec(args.size, args.gpu), **(gpu_settings(args) if args.gpu else {})}
    sides = [
        workers.Side(label, "ours.py", {**spec, **method}) for label, method in methods.items()
    ]
    name = f"{name}/{'gpu' if args.gpu else 'cpu'}"
    common.write_rows([common.measure_row(name, sides, args.rounds)], args.json)
