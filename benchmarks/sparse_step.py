"""Our training step with sparse layers, against Hugging Face's and flaxformer's and a dense T5.

    python benchmarks/sparse_step.py [--pairs hf flaxformer …] [--rounds 7]
        [--torch .venv-torch/bin/python] [--flaxformer .venv-t5x/bin/python] [--json FILE]
    python benchmarks/sparse_step.py --gpu --size base [--rounds 7] [--json FILE]

T5 Small's width with T5 1.0's ReLU and tied logits, every second MLP sparse: 8 experts, top-1,
capacity factor 1.25; 8 rows of 128 and 32 tokens without padding, float32, AdamW, no dropout, two
CPU threads per side. The pairs:

- `hf`: Hugging Face's Switch. Its capacity is a number of tokens per expert and row: 20, which is
  the capacity factor 1.25 for inputs of 128 tokens;
- `flaxformer`: as shipped, it embeds tokens by a product with one-hot vectors; `lookup`: it reads
  rows of the embedding instead;
- `dense`, `dense_top_2`: our dense T5, which has the operations of top-1 per token. Both sides
  compute gradients without an update, because the optimizer's time grows with the experts;
- `no_limit`, `one_expert`: gradients without a limit of capacity against those with one. Each token
  goes to its expert; in `one_expert` all tokens go to the same one.

With --gpu, `dense` is the only pair: 16 rows of 512 and 128 tokens in bfloat16.
"""

from __future__ import annotations

from typing import Any

import common
import pairs
import workers

T5_1_0 = {"mlp_activations": ["relu"], "logits_via_embedding": True}
SWITCH = {"num_experts": 8, "top_k": 1, "capacity_factor": 1.25}
PAIRS = ("hf", "flaxformer", "lookup", "dense", "dense_top_2", "no_limit", "one_expert")


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=7, size="small", gpu=True)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=PAIRS)
    common.add_torch_flags(parser, "eager")
    parser.add_argument(
        "--flaxformer", default=common.peer_python("t5x"), help="Python of the T5X peer"
    )
    args = parser.parse_args()
    spec = {**pairs.step_spec(args.size, args.gpu), **T5_1_0}
    spec |= {"method": "full", "optimizer": "adamw"}
    if args.gpu:
        spec |= {"lengths": [512, 128], "packed": False}
    grads = {**spec, "gradients_only": True}

    def ours(name: str, spec: dict[str, Any], **sparse: Any) -> workers.Side:
        return workers.Side(name, "ours.py", {**spec, "sparse": {**SWITCH, **sparse}})

    rows = []
    for pair in ("dense",) if args.gpu else args.pairs:
        # Our side of the pairs with other libraries; the others replace it.
        sides = [ours("Switch-8", spec)]
        if pair == "hf":
            common.check_peer(args.torch, "torch")
            peer = {**spec, "sparse": SWITCH, "capacity": 20, "mode": args.torch_mode}
            name = f"Hugging Face, {args.torch_mode}"
            sides.append(workers.Side(name, "torch_peer.py", peer, args.torch))
        elif pair in ("flaxformer", "lookup"):
            common.check_peer(args.flaxformer, "flaxformer")
            peer = {**spec, "sparse": SWITCH, "one_hot": pair == "flaxformer"}
            name = {"flaxformer": "flaxformer", "lookup": "flaxformer, lookup"}[pair]
            sides.append(workers.Side(name, "flaxformer_peer.py", peer, args.flaxformer))
        elif pair in ("dense", "dense_top_2"):
            top_k = 2 if pair == "dense_top_2" else 1
            sides = [ours(f"Switch-8, top-{top_k}, gradients", grads, top_k=top_k)]
            sides.append(workers.Side("dense, gradients", "ours.py", grads))
        else:
            # With routers of zeros all experts tie, and every token goes to the first one.
            no_limit = {**grads, "router_scale": 0.0 if pair == "one_expert" else 1.0}
            sides = [
                ours("without a limit, gradients", no_limit, capacity_factor=None),
                ours("capacity factor 1.25, gradients", grads),
            ]
        name = f"sparse_step/{'gpu ' if args.gpu else ''}{pair}"
        rows.append(common.measure_row(name, sides, args.rounds))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
