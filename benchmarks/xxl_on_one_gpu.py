"""T5 v1.1 XXL, 11 billion parameters, with MoV-10 on one GPU of 80 GB: does it train, how fast?

    python benchmarks/xxl_on_one_gpu.py --gpu [--rows 8] [--microbatches 1] [--remat minimal]
        [--frozen int8] [--rounds 3] [--json FILE]

Packed rows of 1024 and 256 tokens, the base frozen in bfloat16 (22 GB; --frozen: 11 GB),
Adafactor; layers run as one loop. Memory is the device's own peak. Without --gpu a small step is
taken on two CPU threads, to try the script: its row is in no table.
"""

import common
import gpu_throughput


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=3, size="xxl", gpu=True)
    gpu_throughput.add_flags(parser, rows=8)
    parser.set_defaults(scan=True, remat="minimal")
    args = parser.parse_args()
    ours = gpu_throughput.ours_of(args, "mov")
    ours.spec = {**ours.spec, "optimizer": "adafactor", "steps": 1}
    others = common.alternate([ours], args.rounds)
    floor = gpu_throughput.floor_of(ours)
    name = f"xxl_on_one_gpu/{'gpu' if args.gpu else 'trial'}"
    common.write([common.row(name, ours, None, others, floor)], args.json)


if __name__ == "__main__":
    main()
