"""Our training step against T5X's, with (IA)³ and LoRA of rank 4 added to its minimal T5.

    python benchmarks/step_against_t5x.py [--methods ia3 lora] [--rounds 7]
        [--t5x .venv-t5x/bin/python] [--json FILE]

T5 v1.1 Small, 8 rows of 128 and 32 tokens without padding, float32, Adafactor, no dropout, two CPU
threads per side. `t5x_peer.py` explains which parts are T5X's; `make bench-peers` installs its
environment.
"""

import common
import pairs
import workers


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=7, size="small")
    methods = ("ia3", "lora")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--t5x", default=common.peer_python("t5x"), help="Python of the T5X peer")
    args = parser.parse_args()
    common.check_peer(args.t5x, "t5x")
    rows = []
    for method in args.methods:
        spec = {**pairs.step_spec(args.size), "method": method, "rank": 4}
        name = common.METHODS[method]
        ours = workers.Side(name, "ours.py", spec)
        peer = workers.Side(f"T5X, {name}", "t5x_peer.py", spec, args.t5x)
        rows.append(common.measure_row(f"step_against_t5x/{method}", [ours, peer], args.rounds))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
