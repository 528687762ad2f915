"""Tokens a second of training on one GPU, and how much of the chip that is, against torch and PEFT.

    python benchmarks/gpu_throughput.py --gpu [--size xl] [--methods ia3 lora mov] [--rows 16]
        [--peer_rows 16] [--way 'sdpa compile blocks fused'] [--search] [--torch python3]
        [--attention fused] [--scan] [--remat none] [--plain_mov] [--frozen int8]
        [--microbatches 1] [--one_by_one] [--rounds 5] [--json FILE]

Rows of 1024 and 256 tokens in bfloat16, AdamW, no dropout; ours are packed, of four examples each
and so masked, torch's are of one example each and need no mask. Each side may have a batch of its
own, what is compared is the time of a token. Utilisation is of the operations that a frozen base
needs (forward, gradients of activations, and the adapters' own) over the chip's published peak.
(IA)³ and LoRA of rank 4 have a peer; MoV-10 stands by itself. Without --gpu a small step is taken
on two CPU threads, to try the script: its row is in no table.
"""

import argparse
from typing import Any

import common
import floors
import pairs

METHODS = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "mov": "MoV-10"}
WAYS = ("sdpa compile blocks fused", "flex compile blocks fused", "sdpa compile fused")


def step_of(args: argparse.Namespace, method: str, rows: int) -> dict[str, Any]:
    """What both sides are told."""
    found: dict[str, Any] = {"dimensions": common.dimensions(args.size), "method": method}
    found |= {"dtype": "bfloat16", "rank": 4, "optimizer": "adamw", "rows": rows}
    if args.gpu:
        return {**found, "lengths": [1024, 256], "gpu": True, "steps": 3}
    return {**found, "lengths": [64, 16]}


def ours_of(args: argparse.Namespace, method: str) -> common.Side:
    """Ours, as the flags say."""
    spec = {**step_of(args, method, args.rows), "packed": True, "microbatches": args.microbatches}
    if args.gpu:
        spec |= pairs.how(args)
    name = f"{METHODS[method]}, {args.rows} rows, {pairs.how_in_words(args)}"
    return common.Side(name, "ours.py", spec)


def add_flags(parser: argparse.ArgumentParser, rows: int) -> None:
    """Those of ours."""
    parser.add_argument("--rows", default=rows, type=int)
    parser.add_argument("--microbatches", default=1, type=int)
    pairs.add_flags(parser)


def floor_of(side: common.Side) -> dict[str, float]:
    """The floor of its step; tells the side its utilisation."""
    floor = floors.together(side.told["floor"], side.told["rates"])
    taken = common.quartiles(side.seconds)[1]
    side.told["utilisation"] = floor["flops"] / taken / floor["flops a second"]
    return floor


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=5, size="xl", gpu=True)
    add_flags(parser, rows=16)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--peer_rows", default=16, type=int)
    parser.add_argument("--torch", default=common.peer_python("torch"), help="its Python")
    parser.add_argument("--way", default=WAYS[0], help="settings of torch")
    parser.add_argument("--search", action="store_true", help="try all settings of torch first")
    parser.add_argument(
        "--one_by_one", action="store_true", help="where the GPU has no room for both sides"
    )
    args = parser.parse_args()
    if {*args.methods} != {"mov"}:
        common.check_peer(args.torch, "torch")
    found = []
    for method in args.methods:

        def torch(way: str, method: str = method) -> common.Side:
            spec = {**step_of(args, method, args.peer_rows), "way": way, "mask": False}
            name = f"PEFT {METHODS[method]}, {args.peer_rows} rows, {way}"
            return common.Side(name, "torch_peer.py", spec, args.torch)

        sides = [ours_of(args, method)]
        if method != "mov":
            way = common.fastest(torch, WAYS, args.rounds) if args.search else args.way
            sides.append(torch(way))
        others = common.alternate(sides, args.rounds, args.one_by_one)
        floor = floor_of(sides[0])
        name = f"gpu_throughput/{args.size if args.gpu else 'trial'} {method}"
        peer = sides[1] if len(sides) > 1 else None
        found.append(common.row(name, sides[0], peer, others, floor))
    common.write(found, args.json)


if __name__ == "__main__":
    main()
