"""Speed of scoring answer choices with each input encoded once, against one pass per choice.

    python benchmarks/score_choices.py [--inputs 16] [--choices 4] [--rounds 5] [--size small]
        [--torch .venv-torch/bin/python] [--search] [--gpu] [--json FILE]

Random inputs of 256 tokens with choices of 8, T5 v1.1 Small with random weights in float32 (with
--gpu bfloat16). Compares `steps.score_choices` with one pass per choice (the faster of all rows at
once and `inputs` rows at a time), and with torch, which also encodes each input once
(`torch_choices.py`), if its environment exists.
"""

import argparse
import shutil
from typing import Any

import common
import floors
import workers

TORCH_MODES = ("sdpa", "sdpa compile", "sdpa compile freezing")


def make_spec(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the spec's entries of all sides."""
    spec = {
        "dimensions": common.dimensions(args.size),
        "inputs": args.inputs,
        "choices": args.choices,
        "lengths": args.lengths,
    }
    return spec | ({"gpu": True, "dtype": "bfloat16"} if args.gpu else {})


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=5, size="small", gpu=True)
    parser.add_argument("--inputs", default=16, type=int)
    parser.add_argument("--choices", default=4, type=int)
    parser.add_argument("--lengths", default=[256, 8], type=int, nargs=2)
    common.add_torch_flags(parser, TORCH_MODES[-1])
    args = parser.parse_args()
    spec, device = make_spec(args), "gpu" if args.gpu else "cpu"

    def torch_side(mode: str) -> workers.Side:
        name = f"torch, inputs encoded once, {mode}"
        return workers.Side(name, "torch_choices.py", {**spec, "mode": mode}, args.torch)

    if args.search:
        args.torch_mode = workers.fastest_mode(torch_side, TORCH_MODES, args.rounds)
    ours, rows, pieces = (
        workers.Side(name, "choices.py", {**spec, "mode": mode})
        for mode, name in (
            ("shared", "encoded once for all choices"),
            ("rows", "one pass per choice, all rows at once"),
            ("pieces", f"one pass per choice, {args.inputs} rows at a time"),
        )
    )
    sides = [ours, rows, pieces]
    if shutil.which(args.torch):
        sides.append(torch_side(args.torch_mode))
    other_load = workers.alternate(sides, args.rounds, args.gpu)
    for side in (rows, pieces):
        error = abs(side.info["first"] / ours.info["first"] - 1)
        if error > (1e-2 if args.gpu else 1e-4):
            raise SystemExit(
                f"scores must agree, but {side.name} differs by {error:.1e} of their square"
            )
    plain = min((rows, pieces), key=lambda side: common.quartiles(side.seconds)[1])
    rates = [side.info["rates"] for side in sides if "rates" in side.info]
    floor = floors.floor_time(ours.info["floor"], *rates)
    peers = {"passes": plain}
    if len(sides) > 3:
        peers["torch"] = sides[3]
    else:
        print(f"without torch: {args.torch} does not exist (make bench-peers)")
    rows = [
        common.make_row(f"score_choices/{device} {name}", ours, peer, other_load, floor)
        for name, peer in peers.items()
    ]
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
