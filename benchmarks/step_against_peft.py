"""A training step against Hugging Face's T5 with PEFT on torch: (IA)³, LoRA of rank 4, full.

    python benchmarks/step_against_peft.py [--methods ia3 lora full] [--rounds 7] [--search]
        [--torch .venv-torch/bin/python] [--json FILE]

T5 v1.1 Small, 8 rows of 128 and 32 tokens without padding, float32, AdamW, no dropout, two CPU
threads a side. torch runs as `--way` says, by default as --search, which tries all ways that are
known to `torch_peer.py` for some steps, found it fastest. `make bench-peers` makes its environment.
Ours keeps of the layers what comes nearest to the targets of time and memory, both of one run.
"""

import argparse
import functools

import common
import floors
import pairs

NAMES = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "full": "full"}
WAYS = ("eager", "sdpa", "sdpa fused", "sdpa compile", "sdpa compile wrapper", "eager compile")
FASTEST = "sdpa compile"
REMAT = {"ia3": "minimal", "lora": "minimal", "full": "none"}


def peer(args: argparse.Namespace, method: str, way: str) -> common.Side:
    """torch, as `way` says."""
    spec = {**pairs.shape(args.size), "method": method, "rank": 4, "way": way}
    return common.Side(f"PEFT {NAMES[method]}, {way}", "torch_peer.py", spec, args.torch)


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=7, size="small")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--torch", default=common.peer_python("torch"), help="its Python")
    parser.add_argument("--way", default=FASTEST, help="settings of torch")
    parser.add_argument("--search", action="store_true", help="try all settings first")
    parser.add_argument("--remat", choices=("none", "minimal", "full"), help="REMAT_POLICY of ours")
    args = parser.parse_args()
    common.check_peer(args.torch, "torch")
    rows = []
    for method in args.methods:
        way = args.way
        if args.search:
            way = common.fastest(functools.partial(peer, args, method), WAYS, args.rounds)
        remat = args.remat or REMAT[method]
        how = {"method": method, "optimizer": "adamw", "remat_policy": remat}
        name = f"{NAMES[method]}, remat {remat}"
        ours = common.Side(name, "ours.py", {**pairs.shape(args.size), **how})
        other = peer(args, method, way)
        others = common.alternate([ours, other], args.rounds)
        floor = floors.together(ours.told["floor"], ours.told["rates"], other.told["rates"])
        rows.append(common.row(f"step_against_peft/{method}", ours, other, others, floor))
    common.write(rows, args.json)


if __name__ == "__main__":
    main()
