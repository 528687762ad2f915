"""MoLORA's layer against the paper's formulation: the output of every expert, and then their mix.

    python benchmarks/molora_formulation.py [--experts 30] [--rounds 15] [--gpu] [--json FILE]

Forward and backward of one layer over [8, 128, 512] (with --gpu [16, 1024, 1024] in bfloat16),
rank 4, to as many features and to twice as many; gradients of the input, of A and B and of the
router. The paper's (arXiv 2309.05444, section 2.2) is written from its formula,
`y + (α/R) Σ_e p_e B_e A_e x`, as it says: Σ_e last. Both give the same, which is checked.
"""

from __future__ import annotations

import functools
from typing import Any

import common

ALPHA, RANK = 16.0, 4


def paper(params: Any, x: Any, y: Any) -> Any:
    """Expert outputs [B, L, E, Dout], then mixed: what the formula says, in its order."""
    import jax
    import jax.numpy as jnp

    logits = jnp.einsum("bld,de->ble", x.astype(jnp.float32), params["router"]["kernel"])
    probs = jax.nn.softmax(logits)
    low = jnp.einsum("bld,der->bler", x, params["lora_a"].astype(x.dtype))
    outputs = jnp.einsum("bler,erk->blek", low, params["lora_b"].astype(x.dtype))
    mixed = jnp.einsum("ble,blek->blk", probs, outputs.astype(jnp.float32))
    return y + (mixed * (ALPHA / RANK)).astype(y.dtype)


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=15, gpu=True)
    parser.add_argument("--experts", default=30, type=int)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("B", "L", "D"))
    args = parser.parse_args()
    if not args.gpu:
        common.pin()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pemoe_jax.core import adapters, routing

    batch, length, features = args.shape or ((16, 1024, 1024) if args.gpu else (8, 128, 512))
    dtype = jnp.bfloat16 if args.gpu else jnp.float32
    rows = []
    for made in (features, 2 * features):
        draw = functools.partial(jax.random.normal, dtype=dtype)
        x, y, wanted = (
            draw(jax.random.key(i), (batch, length, size))
            for i, size in enumerate((features, made, made))
        )
        ours = adapters.LoRAExperts(
            num_experts=args.experts, rank=RANK, alpha=ALPHA, router=routing.Router
        )
        params = ours.init(jax.random.key(0), x, y)["params"]
        params["lora_b"] = 0.02 * jax.random.normal(jax.random.key(9), params["lora_b"].shape)
        layers = {
            "folded into the rank": lambda params, x, y, ours=ours: ours.apply(
                {"params": params}, x, y
            ),
            "expert outputs, then mixed": paper,
        }

        def loss(layer: Any, params: Any, x: Any, y: Any, wanted: Any) -> Any:
            return jnp.vdot(layer(params, x, y).astype(jnp.float32), wanted.astype(jnp.float32))

        ways, temporaries, results = {}, {}, []
        for name, layer in layers.items():
            taken = jax.value_and_grad(functools.partial(loss, layer), argnums=(0, 1))
            compiled = jax.jit(taken).lower(params, x, y, wanted).compile()
            temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
            results.append(compiled(params, x, y, wanted))
            ways[name] = lambda compiled=compiled, given=(params, x, y, wanted): (
                jax.block_until_ready(compiled(*given))
            )
        for one, other in zip(*(jax.tree.leaves(result) for result in results), strict=True):
            scale = float(jnp.abs(other).max()) or 1.0
            apart = np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max()
            assert apart <= (0.05 if args.gpu else 1e-4) * scale, f"they differ by {apart}"
        sides, others = common.in_turn(ways, args.rounds)
        for side in sides:
            side.told["temporaries"] = temporaries[side.name]
            side.told["versions"] = common.versions("jax", "jaxlib", "flax")
        if args.gpu:
            sides[0].told["device"] = jax.devices()[0].device_kind
        tokens, width = batch * length, jnp.dtype(dtype).itemsize
        # three products (forward, of activations, of weights) with A, B and the router
        operations = 6 * tokens * args.experts * (RANK * (features + made) + features)
        # forward x and y are read and the output written; backward x and the output's gradient
        # are read, and x's is written
        moved = tokens * width * (3 * features + 3 * made)
        floor = {"flops": operations, "bytes": moved}
        rows.append(row(args, made == features, sides, others, floor))
    common.write(rows, args.json)


def row(args: Any, square: bool, sides: Any, others: float, floor: Any) -> dict[str, Any]:
    """The table's row, with the floor at this device's rates."""
    import floors

    rates = floors.rates("bfloat16" if args.gpu else "float32")
    name = f"molora_formulation/{'gpu' if args.gpu else 'cpu'} {'D to D' if square else 'D to 2D'}"
    return common.row(name, *sides, others, floors.together(floor, rates))


if __name__ == "__main__":
    main()
