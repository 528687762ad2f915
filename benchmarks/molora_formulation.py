"""MoLORA's layer against the paper's formulation, which mixes the outputs of all experts.

    python benchmarks/molora_formulation.py [--experts 30] [--rounds 15] [--gpu] [--json FILE]

Forward and backward pass of one layer of rank 4 over [8, 128, 512] (with --gpu [16, 1024, 1024] in
bfloat16), to the same and to twice the number of features; gradients of the input, of A, B and the
router. The paper's side follows its formula (arXiv 2309.05444, section 2.2),
`y + (α/R) Σ_e p_e B_e A_e x`, with Σ_e last. The script checks that both agree.
"""

from __future__ import annotations

import functools
from typing import Any

import common
import floors
import machine
import workers

ALPHA, RANK = 16.0, 4


def paper_layer(params: Any, x: Any, y: Any) -> Any:
    """Computes the formula in its order: expert outputs [B, L, E, Dout], then their mixture."""
    import jax
    import jax.numpy as jnp

    logits = jnp.einsum("bld,de->ble", x.astype(jnp.float32), params["router"]["kernel"])
    probs = jax.nn.softmax(logits)
    low = jnp.einsum("bld,der->bler", x, params["lora_a"].astype(x.dtype))
    outputs = jnp.einsum("bler,erk->blek", low, params["lora_b"].astype(x.dtype))
    mixed = jnp.einsum("ble,blek->blk", probs, outputs.astype(jnp.float32))
    return y + (mixed * (ALPHA / RANK)).astype(y.dtype)


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=15, gpu=True)
    parser.add_argument("--experts", default=30, type=int)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("B", "L", "D"))
    args = parser.parse_args()
    if not args.gpu:
        machine.pin()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pemoe_jax.core import adapters, routing

    batch, length, in_features = args.shape or ((16, 1024, 1024) if args.gpu else (8, 128, 512))
    dtype = jnp.bfloat16 if args.gpu else jnp.float32
    rows = []
    for out_features in (in_features, 2 * in_features):
        draw = functools.partial(jax.random.normal, dtype=dtype)
        x, y, cotangent = (
            draw(jax.random.key(i), (batch, length, size))
            for i, size in enumerate((in_features, out_features, out_features))
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
            "expert outputs, then mixed": paper_layer,
        }

        def loss(layer: Any, params: Any, x: Any, y: Any, cotangent: Any) -> Any:
            output = layer(params, x, y).astype(jnp.float32)
            return jnp.vdot(output, cotangent.astype(jnp.float32))

        inputs = (params, x, y, cotangent)
        functions, temporaries, results = {}, {}, []
        for name, layer in layers.items():
            grads = jax.value_and_grad(functools.partial(loss, layer), argnums=(0, 1))
            compiled = jax.jit(grads).lower(*inputs).compile()
            temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
            results.append(compiled(*inputs))
            functions[name] = lambda compiled=compiled, inputs=inputs: jax.block_until_ready(
                compiled(*inputs)
            )
        for own, other in zip(*(jax.tree.leaves(result) for result in results), strict=True):
            scale = float(jnp.abs(other).max()) or 1.0
            error = np.abs(np.asarray(own, np.float32) - np.asarray(other, np.float32)).max()
            assert error <= (0.05 if args.gpu else 1e-4) * scale, f"they differ by {error}"
        sides, other_load = workers.alternate_functions(functions, args.rounds)
        for side in sides:
            side.info["temporaries"] = temporaries[side.name]
            side.info["versions"] = machine.versions("jax", "jaxlib", "flax")
        if args.gpu:
            sides[0].info["device"] = jax.devices()[0].device_kind
        tokens, width = batch * length, jnp.dtype(dtype).itemsize
        # three products (forward, of activations, of weights) with A, B and the router
        operations = 6 * tokens * args.experts * (RANK * (in_features + out_features) + in_features)
        # The forward pass reads x and y and writes the output; the backward pass reads x and the
        # output's gradient and writes that of x.
        moved = tokens * width * 3 * (in_features + out_features)
        rates = floors.device_rates("bfloat16" if args.gpu else "float32")
        floor = floors.floor_time({"flops": operations, "bytes": moved}, rates)
        device = "gpu" if args.gpu else "cpu"
        shape = "D to D" if out_features == in_features else "D to 2D"
        name = f"molora_formulation/{device} {shape}"
        rows.append(common.make_row(name, *sides, other_load, floor))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
