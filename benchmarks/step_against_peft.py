"""Our training step against Hugging Face's T5 with PEFT on torch: (IA)³, LoRA of rank 4, full.

    python benchmarks/step_against_peft.py [--methods ia3 lora full] [--rounds 7] [--search]
        [--torch .venv-torch/bin/python] [--json FILE]

T5 v1.1 Small, 8 rows of 128 and 32 tokens without padding, float32, AdamW, no dropout, two CPU
threads per side. torch runs in the mode that `--search`, which tries several, found fastest, or in
`--torch_mode`. `make bench-peers` installs its environment. Our remat policy is the one closest to
the targets of both time and memory.
"""

import argparse
import functools

import common
import floors
import pairs
import workers

NAMES = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "full": "full"}
TORCH_MODES = (
    "eager",
    "sdpa",
    "sdpa fused",
    "sdpa compile",
    "sdpa compile wrapper",
    "eager compile",
)
FASTEST = "sdpa compile"
REMAT = {"ia3": "minimal", "lora": "minimal", "full": "none"}


def torch_side(args: argparse.Namespace, method: str, mode: str) -> workers.Side:
    """Returns the peer in a mode of `torch_peer.py`."""
    spec = {**pairs.step_spec(args.size), "method": method, "rank": 4, "mode": mode}
    return workers.Side(f"PEFT {NAMES[method]}, {mode}", "torch_peer.py", spec, args.torch)


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=7, size="small")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=NAMES)
    common.add_torch_flags(parser, FASTEST)
    parser.add_argument("--remat", choices=("none", "minimal", "full"), help="our REMAT_POLICY")
    args = parser.parse_args()
    common.check_peer(args.torch, "torch")
    rows = []
    for method in args.methods:
        make_peer = functools.partial(torch_side, args, method)
        mode = args.torch_mode
        if args.search:
            mode = workers.fastest_mode(make_peer, TORCH_MODES, args.rounds)
        remat = args.remat or REMAT[method]
        settings = {"method": method, "optimizer": "adamw", "remat_policy": remat}
        name = f"{NAMES[method]}, remat {remat}"
        ours = workers.Side(name, "ours.py", {**pairs.step_spec(args.size), **settings})
        peer = make_peer(mode)
        other_load = workers.alternate([ours, peer], args.rounds)
        floor = floors.floor_time(ours.info["floor"], ours.info["rates"], peer.info["rates"])
        name = f"step_against_peft/{method}"
        rows.append(common.make_row(name, ours, peer, other_load, floor))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
