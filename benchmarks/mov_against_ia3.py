"""MoV-30 against (IA)³: whole training steps.

    python benchmarks/mov_against_ia3.py [--rounds 9] [--size small] [--gpu] [--json FILE]

On two CPU threads T5 v1.1 Small, 8 rows of 128 and 32 tokens, float32; with --gpu, Large say,
packed rows of 1024 and 256 tokens in bfloat16.
"""

import common
import pairs


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, size="small", gpu=True)
    pairs.add_flags(parser)
    args = parser.parse_args()
    ways = {"MoV-30": {"method": "mov", "experts": 30}, "(IA)³": {"method": "ia3"}}
    pairs.compare(args, "mov_against_ia3", ways)


if __name__ == "__main__":
    main()
