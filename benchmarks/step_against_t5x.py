"""Our training step against T5X's, with (IA)³ and LoRA of rank 4 added to its minimal T5.

    python benchmarks/step_against_t5x.py [--methods ia3 lora] [--rounds 7]
        [--t5x .venv-t5x/bin/python] [--json FILE]

T5 v1.1 Small, 8 rows of 128 and 32 tokens without padding, float32, Adafactor, no dropout, two CPU
threads per side. `t5x_peer.py` explains which parts are T5X's; `make bench-peers` installs its
environment.
"""

import common
import floors
import pairs
import workers

NAMES = {"ia3": "(IA)³", "lora": "LoRA, rank 4"}


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=7, size="small")
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--t5x", default=common.peer_python("t5x"), help="Python of the T5X peer")
    args = parser.parse_args()
    common.check_peer(args.t5x, "t5x")
    rows = []
    for method in args.methods:
        spec = {**pairs.step_spec(args.size), "method": method, "rank": 4}
        ours = workers.Side(NAMES[method], "ours.py", spec)
        peer = workers.Side(f"T5X, {NAMES[method]}", "t5x_peer.py", spec, args.t5x)
        other_load = workers.alternate([ours, peer], args.rounds)
        floor = floors.floor_time(ours.info["floor"], ours.info["rates"])
        rows.append(common.make_row(f"step_against_t5x/{method}", ours, peer, other_load, floor))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
