"""Shapes of our training steps, their settings on a GPU, and comparisons of two of our methods."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import common
import floors
import workers


def add_gpu_flags(parser: argparse.ArgumentParser) -> None:
    """Adds settings of our side on a GPU; the defaults were fastest on an H200."""
    parser.add_argument("--attention", default="fused", choices=("plain", "chunked", "fused"))
    parser.add_argument("--scan", action="store_true", help="layers as one loop")
    parser.add_argument("--remat", default="none", choices=("none", "minimal", "full"))
    parser.add_argument("--plain_mov", action="store_true", help="MoV in XLA, not in our kernels")
    parser.add_argument(
        "--frozen", default="activations", choices=("activations", "int8", "float8_e4m3fn")
    )


def gpu_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings as entries of a spec."""
    return {
        "attention": args.attention,
        "scan_layers": args.scan,
        "remat_policy": args.remat,
        "fused": not args.plain_mov,
        "frozen_dtype": args.frozen,
    }


def describe_settings(args: argparse.Namespace) -> str:
    """Returns 'attention fused, scan, remat minimal'."""
    words = [f"attention {args.attention}", "scan" * args.scan, f"remat {args.remat}"]
    words.append("" if args.frozen == "activations" else f"base in {args.frozen}")
    return ", ".join(word for word in words if word)


def step_spec(size: str, gpu: bool = False) -> dict[str, Any]:
    """Returns the model and the batch of the table's CPU rows, or of its GPU rows."""
    spec: dict[str, Any] = {"dimensions": common.dimensions(size)}
    if not gpu:
        return {**spec, "rows": 8, "lengths": [128, 32]}
    batch = {"rows": 16, "lengths": [1024, 256], "dtype": "bfloat16", "packed": True}
    return {**spec, **batch, "gpu": True, "steps": 5}


def compare(args: argparse.Namespace, name: str, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Measures the first method against the second and writes the row."""
    spec = {**step_spec(args.size, args.gpu), **(gpu_settings(args) if args.gpu else {})}
    sides = [
        workers.Side(label, "ours.py", {**spec, **method}) for label, method in methods.items()
    ]
    other_load = workers.alternate(sides, args.rounds)
    floor = floors.floor_time(sides[0].info["floor"], *(side.info["rates"] for side in sides))
    device = "gpu" if args.gpu else "cpu"
    common.write_rows([common.make_row(f"{name}/{device}", *sides, other_load, floor)], args.json)
