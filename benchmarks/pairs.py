"""Steps of ours: their shape, how a GPU runs them, and two methods against one another."""

import argparse
from collections.abc import Mapping
from typing import Any

import common
import floors


def add_flags(parser: argparse.ArgumentParser) -> None:
    """How ours runs on a GPU; by default as was fastest on an H200."""
    parser.add_argument("--attention", default="fused", choices=("plain", "chunked", "fused"))
    parser.add_argument("--scan", action="store_true", help="layers as one loop")
    parser.add_argument("--remat", default="none", choices=("none", "minimal", "full"))
    parser.add_argument("--plain_mov", action="store_true", help="MoV by XLA, not in our kernels")
    parser.add_argument(
        "--frozen", default="activations", choices=("activations", "int8", "float8_e4m3fn")
    )


def how(args: argparse.Namespace) -> dict[str, Any]:
    """What a spec says of it."""
    return {
        "attention": args.attention,
        "scan_layers": args.scan,
        "remat_policy": args.remat,
        "fused": not args.plain_mov,
        "frozen_dtype": args.frozen,
    }


def how_in_words(args: argparse.Namespace) -> str:
    """'attention fused, scan, remat minimal'."""
    words = [f"attention {args.attention}", "scan" * args.scan, f"remat {args.remat}"]
    words.append("" if args.frozen == "activations" else f"base in {args.frozen}")
    return ", ".join(word for word in words if word)


def shape(size: str, gpu: bool = False) -> dict[str, Any]:
    """Size and rows of a step: of the table's CPU rows, or of its GPU rows."""
    found: dict[str, Any] = {"dimensions": common.dimensions(size)}
    if not gpu:
        return {**found, "rows": 8, "lengths": [128, 32]}
    many = {"rows": 16, "lengths": [1024, 256], "dtype": "bfloat16", "packed": True}
    return {**found, **many, "gpu": True, "steps": 5}


def compare(args: argparse.Namespace, name: str, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Measures the first against the second and writes the row."""
    of_all = {**shape(args.size, args.gpu), **(how(args) if args.gpu else {})}
    sides = [common.Side(label, "ours.py", {**of_all, **way}) for label, way in ways.items()]
    others = common.alternate(sides, args.rounds)
    floor = floors.together(sides[0].told["floor"], *(side.told["rates"] for side in sides))
    where = "gpu" if args.gpu else "cpu"
    common.write([common.row(f"{name}/{where}", *sides, others, floor)], args.json)
