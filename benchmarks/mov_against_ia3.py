"""Whole training steps of MoV-30 against (IA)³.

    python benchmarks/mov_against_ia3.py [--rounds 9] [--size small] [--gpu] [--json FILE]

On two CPU threads T5 v1.1 Small, 8 rows of 128 and 32 tokens in float32; with --gpu packed rows of
1024 and 256 tokens in bfloat16, for a size such as Large.
"""

import pairs

if __name__ == "__main__":
    methods = {"MoV-30": {"method": "mov", "experts": 30}, "(IA)³": {"method": "ia3"}}
    pairs.compare(__doc__, "mov_against_ia3", methods)
