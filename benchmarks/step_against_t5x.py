"""A training step against T5X's own, with (IA)³ and LoRA of rank 4 added to its minimal T5.

    python benchmarks/step_against_t5x.py [--methods ia3 lora] [--rounds 7]
        [--t5x .venv-t5x/bin/python] [--json FILE]

T5 v1.1 Small, 8 rows of 128 and 32 tokens without padding, float32, Adafactor, no dropout, two CPU
threads a side. `t5x_peer.py` says what of it is T5X's; `make bench-peers` makes its environment.
"""

import common
import floors
import pairs

NAMES = {"ia3": "(IA)³", "lora": "LoRA, rank 4"}


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=7, size="small")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--t5x", default=common.peer_python("t5x"), help="its Python")
    args = parser.parse_args()
    common.check_peer(args.t5x, "t5x")
    rows = []
    for method in args.methods:
        spec = {**pairs.shape(args.size), "method": method, "rank": 4}
        ours = common.Side(NAMES[method], "ours.py", spec)
        peer = common.Side(f"T5X, {NAMES[method]}", "t5x_peer.py", spec, args.t5x)
        others = common.alternate([ours, peer], args.rounds)
        floor = floors.together(ours.told["floor"], ours.told["rates"])
        rows.append(common.row(f"step_against_t5x/{method}", ours, peer, others, floor))
    common.write(rows, args.json)


if __name__ == "__main__":
    main()
