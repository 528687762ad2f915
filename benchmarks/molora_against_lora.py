"""MoLORA-10 of rank 4 against LoRA of rank 40: whole training steps, the same sites.

    python benchmarks/molora_against_lora.py [--rounds 9] [--size small] [--gpu] [--json FILE]

Both train as many parameters but for the routers. On two CPU threads T5 v1.1 Small, 8 rows of 128
and 32 tokens, float32; with --gpu, Large say, packed rows of 1024 and 256 tokens in bfloat16.
"""

import common
import pairs


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, size="small", gpu=True)
    pairs.add_flags(parser)
    args = parser.parse_args()
    molora = {"method": "molora", "experts": 10, "rank": 4}
    ways = {"MoLORA-10, rank 4": molora, "LoRA, rank 40": {"method": "lora", "rank": 40}}
    pairs.compare(args, "molora_against_lora", ways)


if __name__ == "__main__":
    main()
