"""Our training step against Hugging Face's T5 with PEFT on torch: (IA)³, LoRA of rank 4, full.

    python benchmarks/step_against_peft.py [--methods ia3 lora full] [--rounds 7] [--search]
        [--torch .venv-torch/bin/python] [--json FILE]

T5 v1.1 Small, 8 rows of 128 and 32 tokens without padding, float32, AdamW, no dropout, two CPU
threads per side. torch runs in `--torch_mode`; with `--search`, in the fastest of several modes,
which are tried first. `make bench-peers` installs its environment. Our remat policy is the one that
comes closest to the targets of both time and memory.
"""

from typing import Any

import common
import pairs
import workers

TORCH_MODES = (
    "eager",
    "sdpa",
    "sdpa fused",
    "sdpa compile",
    "sdpa compile wrapper",
    "eager compile",
)
# Our remat policy by method. Full fine-tuning keeps all activations, because most of its memory is
# gradients and copies of the parameters.
REMAT = {"ia3": "minimal", "lora": "minimal", "full": "none"}


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=7, size="small")
    parser.add_argument("--methods", nargs="+", default=list(REMAT), choices=REMAT)
    common.add_torch_flags(parser, "sdpa compile")
    parser.add_argument("--remat", choices=("none", "minimal", "full"), help="our REMAT_POLICY")
    args = parser.parse_args()
    common.check_peer(args.torch, "torch")
    rows = []
    for method in args.methods:
        label = common.METHODS[method]
        spec = {**pairs.step_spec(args.size), "method": method, "optimizer": "adamw", "rank": 4}

        # Variables of the loop are bound as defaults; a closure would see those of its last round.
        def peer(mode: str, spec: dict[str, Any] = spec, label: str = label) -> workers.Side:
            name = f"PEFT {label}, {mode}"
            return workers.Side(name, "torch_peer.py", {**spec, "mode": mode}, args.torch)

        remat = args.remat or REMAT[method]
        name = f"{label}, remat {remat}"
        ours = workers.Side(name, "ours.py", {**spec, "remat_policy": remat})
        sides = [ours, peer(common.torch_mode(args, peer, TORCH_MODES))]
        rows.append(common.measure_row(f"step_against_peft/{method}", sides, args.rounds))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
