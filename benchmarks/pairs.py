"""Two methods of ours against one another: what their scripts share."""

import argparse
from typing import Any

import common
import floors

Way = tuple[str, str, list[str]]  # name, method, bindings of gin


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of a step: of the table's CPU rows, or of its GPU rows."""
    if not args.gpu:
        return {"size": args.size, "rows": 8, "lengths": [128, 32]}
    many = {"rows": 16, "lengths": [1024, 256], "dtype": "bfloat16", "packed": True}
    return {"size": args.size, "gpu": True, "steps": 5, **many}


def compare(args: argparse.Namespace, name: str, ours: Way, peer: Way) -> None:
    """Measures one against the other and writes the row."""
    sides = [
        common.Side(label, "ours.py", {**shape(args), "method": method, "bindings": bindings})
        for label, method, bindings in (ours, peer)
    ]
    others = common.alternate(sides, args.rounds)
    mine, other = sides
    floor = floors.together(mine.told["floor"], mine.told["rates"], other.told["rates"])
    where = "gpu" if args.gpu else "cpu"
    common.write([common.row(f"{name}/{where}", mine, other, others, floor)], args.json)
