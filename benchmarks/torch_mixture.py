"""Our mixtures in PyTorch against PEFT's plain adapters on the same T5: the forward pass.

    python benchmarks/torch_mixture.py [--rounds 15] [--size small] [--json FILE]

MoV-10 against PEFT's (IA)³, and MoLORA-10 of rank 4 against PEFT's LoRA of rank 40, which has as
many parameters except for the routers. T5 v1.1 Small of transformers, 8 rows of 128 and 32 tokens
without padding, float32, no gradients, two CPU threads. Both sides run in this process, in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import machine
import ours
import torch_peer
import workers

# Row -> our method, its name, PEFT's method, its name and its rank.
COMPARISONS = {
    "mov": ("mov", "MoV-10", "ia3", "PEFT (IA)³", 0),
    "molora": ("molora", "MoLORA-10, rank 4", "lora", "PEFT LoRA, rank 40", 40),
}


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=15, size="small")
    args = parser.parse_args()
    machine.pin()
    import torch

    from pemoe_jax.torch import MixtureConfig, MixtureModel

    spec = {"dimensions": common.dimensions(args.size), "mode": "sdpa"}
    batch = ours.random_batch(8, [128, 32])
    inputs, targets = (
        torch.tensor(batch[name], dtype=torch.long)
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    tensors = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": targets}

    def make_forward(model: Any) -> Callable[[], float]:
        model.eval()

        def forward() -> float:
            with torch.no_grad():
                return model(**tensors).loss.item()

        # Warms up, as `workers.Worker.run` does.
        forward()
        forward()
        return forward

    rows = []
    for name, (method, label, peer_method, peer_label, rank) in COMPARISONS.items():
        # Both sides are built with the same seed, so that they have the same base.
        mixture = MixtureModel(torch_peer.network(spec), MixtureConfig(method, num_experts=10))
        peer = torch_peer.add_adapters(torch_peer.network(spec), peer_method, rank)
        functions = {label: make_forward(mixture), peer_label: make_forward(peer)}
        sides, other_load = workers.alternate_functions(functions, args.rounds)
        for side in sides:
            side.info["versions"] = machine.versions("torch", "transformers", "peft")
            side.info["tokens"] = inputs.numel() + targets.numel()
        rows.append(common.make_row(f"torch_mixture/{name}", *sides, other_load))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
