"""Training throughput and utilization of one GPU against torch and PEFT.

    python benchmarks/gpu_throughput.py --gpu [--size xl] [--methods ia3 lora mov] [--rows 16]
        [--peer_rows 16] [--torch_mode 'sdpa compile blocks fused'] [--search] [--torch python3]
        [--attention fused] [--scan] [--remat none] [--plain_mov] [--frozen int8]
        [--microbatches 1] [--sequential] [--rounds 5] [--json FILE]

Rows of 1024 and 256 tokens in bfloat16, AdamW, no dropout. Our rows are packed with four examples
and masked accordingly; torch's rows have one example and need no mask. The sides may differ in
batch size: the row compares seconds per token. Utilization counts the operations that a frozen base
needs (forward, gradients of activations, and the adapters' own) over the chip's published peak.
(IA)³ and LoRA of rank 4 have a peer; MoV-10 has none. Without --gpu the script takes a small step
on two CPU threads, as a trial: no table has its row.
"""

import argparse
from typing import Any

import common
import floors
import pairs
import workers

METHODS = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "mov": "MoV-10"}
TORCH_MODES = ("sdpa compile blocks fused", "flex compile blocks fused", "sdpa compile fused")


def shared_spec(args: argparse.Namespace, method: str, rows: int) -> dict[str, Any]:
    """Returns the spec's entries of both sides."""
    spec: dict[str, Any] = {"dimensions": common.dimensions(args.size), "method": method}
    spec |= {"dtype": "bfloat16", "rank": 4, "optimizer": "adamw", "rows": rows}
    if args.gpu:
        return {**spec, "lengths": [1024, 256], "gpu": True, "steps": 3}
    return {**spec, "lengths": [64, 16]}


def our_side(args: argparse.Namespace, method: str) -> workers.Side:
    """Returns our side with the flags' settings."""
    spec = {
        **shared_spec(args, method, args.rows),
        "packed": True,
        "microbatches": args.microbatches,
    }
    if args.gpu:
        spec |= pairs.gpu_settings(args)
    name = f"{METHODS[method]}, {args.rows} rows, {pairs.describe_settings(args)}"
    return workers.Side(name, "ours.py", spec)


def add_flags(parser: argparse.ArgumentParser, rows: int) -> None:
    """Adds the flags of our side."""
    parser.add_argument("--rows", default=rows, type=int)
    parser.add_argument("--microbatches", default=1, type=int)
    pairs.add_gpu_flags(parser)


def measure_utilization(side: workers.Side) -> dict[str, float]:
    """Adds the utilization to our side and returns its floor."""
    floor = floors.floor_time(side.info["floor"], side.info["rates"])
    seconds = common.quartiles(side.seconds)[1]
    side.info["utilisation"] = floor["flops"] / seconds / floor["flops a second"]
    return floor


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=5, size="xl", gpu=True)
    add_flags(parser, rows=16)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--peer_rows", default=16, type=int)
    common.add_torch_flags(parser, TORCH_MODES[0])
    parser.add_argument(
        "--sequential", action="store_true", help="for a GPU without memory for both sides"
    )
    args = parser.parse_args()
    if {*args.methods} != {"mov"}:
        common.check_peer(args.torch, "torch")
    rows = []
    for method in args.methods:

        def torch_side(mode: str, method: str = method) -> workers.Side:
            spec = {**shared_spec(args, method, args.peer_rows), "mode": mode, "mask": False}
            name = f"PEFT {METHODS[method]}, {args.peer_rows} rows, {mode}"
            return workers.Side(name, "torch_peer.py", spec, args.torch)

        sides = [our_side(args, method)]
        if method != "mov":
            mode = args.torch_mode
            if args.search:
                mode = workers.fastest_mode(torch_side, TORCH_MODES, args.rounds)
            sides.append(torch_side(mode))
        other_load = workers.alternate(sides, args.rounds, args.sequential)
        floor = measure_utilization(sides[0])
        name = f"gpu_throughput/{args.size if args.gpu else 'trial'} {method}"
        peer = sides[1] if len(sides) > 1 else None
        rows.append(common.make_row(name, sides[0], peer, other_load, floor))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
