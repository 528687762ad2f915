"""Training throughput and utilization of one GPU against torch and PEFT.

    python benchmarks/gpu_throughput.py --gpu [--size xl] [--methods ia3 lora mov] [--rows 16]
        [--peer_rows 16] [--torch_mode 'sdpa compile blocks fused'] [--search] [--torch python3]
        [--attention fused] [--scan] [--remat none] [--plain_mov] [--frozen int8]
        [--microbatches 1] [--sequential] [--rounds 5] [--json FILE]

Rows of 1024 and 256 tokens in bfloat16, AdamW, no dropout. Our rows are packed with four examples
and masked accordingly; torch's rows have one example and need no mask. The sides may differ in
batch size, so the row compares seconds per token. Utilization counts the operations that a frozen
base needs (forward pass, gradients of activations, and the adapters' own) over the chip's published
peak. (IA)³ and LoRA of rank 4 have a peer; MoV-10 has none. Without --gpu the script takes a small
step on two CPU threads, as a trial, whose row no table shows.
"""

import argparse
from typing import Any

import common
import pairs
import workers

TORCH_MODES = ("sdpa compile blocks fused", "flex compile blocks fused", "sdpa compile fused")


def shared_spec(args: argparse.Namespace, method: str, rows: int) -> dict[str, Any]:
    """Returns the entries of the spec that both sides have."""
    spec = {**pairs.step_spec(args.size, args.gpu), "method": method, "rank": 4}
    # XL's steps are long enough that three of them suffice for one measurement.
    return {**spec, "optimizer": "adamw", "rows": rows, "steps": 3 if args.gpu else 1}


def our_side(args: argparse.Namespace, method: str) -> workers.Side:
    """Returns our side with the flags' settings."""
    spec = {**shared_spec(args, method, args.rows), "packed": True}
    spec |= {"microbatches": args.microbatches, **(pairs.gpu_settings(args) if args.gpu else {})}
    words = [common.METHODS[method], f"{args.rows} rows", f"attention {args.attention}"]
    words += ["scan"] * args.scan_layers + [f"remat {args.remat_policy}"]
    words += [f"base in {args.frozen_dtype}"] * (args.frozen_dtype != "activations")
    return workers.Side(", ".join(words), "ours.py", spec)


def add_flags(parser: argparse.ArgumentParser, rows: int) -> None:
    """Adds the flags of our side."""
    parser.add_argument("--rows", default=rows, type=int)
    parser.add_argument("--microbatches", default=1, type=int)
    pairs.add_gpu_flags(parser)


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=5, size="xl", gpu=True)
    add_flags(parser, rows=16)
    methods = ("ia3", "lora", "mov")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
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
        # `method` is bound as a default, because a closure would see that of the last iteration.
        def peer(mode: str, method: str = method) -> workers.Side:
            spec = {**shared_spec(args, method, args.peer_rows), "mode": mode, "mask": False}
            name = f"PEFT {common.METHODS[method]}, {args.peer_rows} rows, {mode}"
            return workers.Side(name, "torch_peer.py", spec, args.torch)

        sides = [our_side(args, method)]
        if method != "mov":
            sides.append(peer(common.torch_mode(args, peer, TORCH_MODES)))
        name = f"gpu_throughput/{args.size if args.gpu else 'trial'} {method}"
        rows.append(common.measure_row(name, sides, args.rounds, args.sequential))
        common.add_utilization(rows[-1])
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
