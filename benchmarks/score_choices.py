"""Speed of scoring answer choices with each input encoded once, against one pass per choice.

    python benchmarks/score_choices.py [--inputs 16] [--choices 4] [--rounds 5] [--size small]
        [--torch .venv-torch/bin/python] [--search] [--gpu] [--json FILE]

Random inputs of 256 tokens with choices of 8, T5 v1.1 Small with random weights in float32 (with
--gpu bfloat16). Compares `steps.score_choices` with one pass per choice (all rows at once, or as
many rows at a time as there are inputs, whichever is faster). If the environment of torch exists,
compares it also with torch, which encodes each input once as well (`torch_choices.py`).
"""

import shutil
import statistics

import common
import floors
import workers

TORCH_MODES = ("sdpa", "sdpa compile", "sdpa compile freezing")


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=5, size="small", gpu=True)
    parser.add_argument("--inputs", default=16, type=int)
    parser.add_argument("--choices", default=4, type=int)
    parser.add_argument("--lengths", default=[256, 8], type=int, nargs=2)
    common.add_torch_flags(parser, TORCH_MODES[-1])
    args = parser.parse_args()
    spec = {name: getattr(args, name) for name in ("inputs", "choices", "lengths")}
    spec["dimensions"] = common.dimensions(args.size)
    if args.gpu:
        spec |= {"gpu": True, "dtype": "bfloat16"}

    def torch_side(mode: str) -> workers.Side:
        name = f"torch, inputs encoded once, {mode}"
        return workers.Side(name, "torch_choices.py", {**spec, "mode": mode}, args.torch)

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
        sides.append(torch_side(common.torch_mode(args, torch_side, TORCH_MODES)))
    else:
        print(f"without torch: {args.torch} does not exist (make bench-peers)")
    other_load = workers.alternate(sides, args.rounds, args.gpu)
    for side in (rows, pieces):
        error = abs(side.info["first"] / ours.info["first"] - 1)
        if error > (1e-2 if args.gpu else 1e-4):
            raise SystemExit(
                f"scores must agree, but the mean squared score of {side.name!r} differs by"
                f" {error:.1e}"
            )
    # Either may be faster: fewer rows at a time fit into the cache, more rows need fewer calls.
    plain = min((rows, pieces), key=lambda side: statistics.median(side.seconds))
    rates = [side.info["rates"] for side in sides if "rates" in side.info]
    floor = floors.floor_time(ours.info["floor"], *rates)
    name = f"score_choices/{'gpu' if args.gpu else 'cpu'}"
    results = [common.make_row(f"{name} passes", ours, plain, other_load, floor)]
    results += [
        common.make_row(f"{name} torch", ours, peer, other_load, floor) for peer in sides[3:]
    ]
    common.write_rows(results, args.json)


if __name__ == "__main__":
    main()
