"""How much faster answer choices are scored when an input is encoded once for all of them.

    python benchmarks/score_choices.py [--inputs 16] [--choices 4] [--rounds 5] [--size small]
        [--torch .venv-torch/bin/python] [--search] [--gpu] [--json FILE]

Random inputs of 256 tokens with choices of 8, T5 v1.1 Small with random weights in float32 (with
--gpu bfloat16), by `steps.score_choices`; by one pass a choice, all rows at once and as many at a
time as there are inputs, the faster of which counts; and by torch with the same trick
(`torch_choices.py`), if its environment is there.
"""

import argparse
import shutil
from typing import Any

import common
import floors

WAYS = ("sdpa", "sdpa compile", "sdpa compile freezing")
FASTEST = "sdpa compile freezing"


def specs(args: argparse.Namespace) -> dict[str, Any]:
    """What is scored."""
    found = {
        "dimensions": common.dimensions(args.size),
        "inputs": args.inputs,
        "choices": args.choices,
        "lengths": args.lengths,
    }
    return found | ({"gpu": True, "dtype": "bfloat16"} if args.gpu else {})


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=5, size="small", gpu=True)
    parser.add_argument("--inputs", default=16, type=int)
    parser.add_argument("--choices", default=4, type=int)
    parser.add_argument("--lengths", default=[256, 8], type=int, nargs=2)
    parser.add_argument("--torch", default=common.peer_python("torch"), help="its Python")
    parser.add_argument("--way", default=FASTEST, help="settings of torch")
    parser.add_argument("--search", action="store_true", help="try all settings of torch first")
    args = parser.parse_args()
    spec, where = specs(args), "gpu" if args.gpu else "cpu"

    def torch(way: str) -> common.Side:
        name = f"torch, the same trick, {way}"
        return common.Side(name, "torch_choices.py", {**spec, "way": way}, args.torch)

    if args.search:
        args.way = common.fastest(torch, WAYS, args.rounds)
    ours, rows, pieces = (
        common.Side(name, "choices.py", {**spec, "way": way})
        for way, name in (
            ("shared", "encoded once for all choices"),
            ("rows", "one pass a choice, all rows at once"),
            ("pieces", f"one pass a choice, {args.inputs} rows at a time"),
        )
    )
    sides = [ours, rows, pieces]
    if shutil.which(args.torch):
        sides.append(torch(args.way))
    others = common.alternate(sides, args.rounds, args.gpu)
    for side in (rows, pieces):
        apart = abs(side.told["first"] / ours.told["first"] - 1)
        if apart > (1e-2 if args.gpu else 1e-4):
            raise SystemExit(f"the scores differ: {side.name}, by {apart:.1e} of their square")
    plain = min((rows, pieces), key=lambda side: common.quartiles(side.seconds)[1])
    rates = [side.told["rates"] for side in sides if "rates" in side.told]
    floor = floors.together(ours.told["floor"], *rates)
    found = [common.row(f"score_choices/{where} passes", ours, plain, others, floor)]
    if len(sides) > 3:
        found.append(common.row(f"score_choices/{where} torch", ours, sides[3], others, floor))
    else:
        print(f"no torch: {args.torch} is not there (make bench-peers)")
    common.write(found, args.json)


if __name__ == "__main__":
    main()
