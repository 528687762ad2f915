"""Whole training steps of MoLORA-10 of rank 4 against LoRA of rank 40 at the same sites.

    python benchmarks/molora_against_lora.py [--rounds 9] [--size small] [--gpu] [--json FILE]

Both train the same number of parameters, except for the routers. On two CPU threads T5 v1.1 Small,
8 rows of 128 and 32 tokens in float32; with --gpu packed rows of 1024 and 256 tokens in bfloat16,
for a size such as Large.
"""

import pairs

if __name__ == "__main__":
    molora = {"method": "molora", "experts": 10, "rank": 4}
    methods = {"MoLORA-10, rank 4": molora, "LoRA, rank 40": {"method": "lora", "rank": 40}}
    pairs.compare(__doc__, "molora_against_lora", methods)
