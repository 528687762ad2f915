"""Two methods of ours against one another: what their scripts share."""

import argparse
from collections.abc import Mapping
from typing import Any

import common
import floors


def shape(size: str, gpu: bool = False) -> dict[str, Any]:
    """Size and rows of a step: of the table's CPU rows, or of its GPU rows."""
    found: dict[str, Any] = {"dimensions": common.dimensions(size)}
    if not gpu:
        return {**found, "rows": 8, "lengths": [128, 32]}
    many = {"rows": 16, "lengths": [1024, 256], "dtype": "bfloat16", "packed": True}
    return {**found, **many, "gpu": True, "steps": 5}


def compare(args: argparse.Namespace, name: str, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Measures the first against the second and writes the row."""
    sides = [
        common.Side(label, "ours.py", {**shape(args.size, args.gpu), **way})
        for label, way in ways.items()
    ]
    others = common.alternate(sides, args.rounds, args.gpu)
    floor = floors.together(sides[0].told["floor"], *(side.told["rates"] for side in sides))
    where = "gpu" if args.gpu else "cpu"
    common.write([common.row(f"{name}/{where}", *sides, others, floor)], args.json)
