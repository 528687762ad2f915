"""Training of T5 v1.1 XXL (11 billion parameters) with MoV-10 on one GPU of 80 GB.

    python benchmarks/xxl_on_one_gpu.py --gpu [--rows 8] [--microbatches 1] [--remat minimal]
        [--frozen int8] [--rounds 3] [--json FILE]

Packed rows of 1024 and 256 tokens, a frozen base in bfloat16 (22 GB; 11 GB with --frozen),
Adafactor, layers as one loop. Memory is the device's peak. Without --gpu the script takes a small
step on two CPU threads, as a trial, whose row no table shows.
"""

import common
import gpu_throughput


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=3, size="xxl", gpu=True)
    gpu_throughput.add_flags(parser, rows=8)
    parser.set_defaults(scan_layers=True, remat_policy="minimal")
    args = parser.parse_args()
    ours = gpu_throughput.our_side(args, "mov")
    # The paper uses Adafactor. A step is long enough to be timed alone.
    ours.spec = {**ours.spec, "optimizer": "adafactor", "steps": 1}
    name = f"xxl_on_one_gpu/{'gpu' if args.gpu else 'trial'}"
    row = common.measure_row(name, [ours], args.rounds)
    common.add_utilization(row)
    common.write_rows([row], args.json)


if __name__ == "__main__":
    main()
