"""MoLORA's layer against the paper's formulation, which mixes the outputs of all experts.

    python benchmarks/molora_formulation.py [--experts 30] [--rounds 15] [--gpu] [--json FILE]

Forward and backward pass of one layer of rank 4 over [8, 128, 512] (with --gpu [16, 1024, 1024] in
bfloat16). One layer has as many output features as input features, another twice as many. Gradients
are those of the input, of A, B and the router. The paper's side follows its formula (arXiv
2309.05444, section 2.2), `y + (α/R) Σ_e p_e B_e A_e x`, with Σ_e last. The script checks that both
sides agree.
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

    from pemoe_jax.core import adapters, routing

    batch, length, in_features = args.shape or ((16, 1024, 1024) if args.gpu else (8, 128, 512))
    dtype, device = (jnp.bfloat16, "gpu") if args.gpu else (jnp.float32, "cpu")
    experts = adapters.LoRAExperts(
        num_experts=args.experts, rank=RANK, alpha=ALPHA, router=routing.Router
    )
    layers = {
        "folded into the rank": lambda params, x, y: experts.apply({"params": params}, x, y),
        "expert outputs, then mixed": paper_layer,
    }

    def loss(layer: Any, params: Any, x: Any, y: Any, cotangent: Any) -> Any:
        output = layer(params, x, y).astype(jnp.float32)
        return jnp.vdot(output, cotangent.astype(jnp.float32))

    rows = []
    for out_features, label in ((in_features, "D"), (2 * in_features, "2D")):
        x, y, cotangent = (
            jax.random.normal(jax.random.key(i), (batch, length, size), dtype)
            for i, size in enumerate((in_features, out_features, out_features))
        )
        params = experts.init(jax.random.key(0), x, y)["params"]
        # B starts at zero, which would make the gradients of A and of the router zero.
        params["lora_b"] = 0.02 * jax.random.normal(jax.random.key(9), params["lora_b"].shape)
        inputs = (params, x, y, cotangent)
        programs = {}
        for name, layer in layers.items():
            grads = jax.value_and_grad(functools.partial(loss, layer), argnums=(0, 1))
            programs[name] = jax.jit(grads).lower(*inputs).compile()
        results = [jax.tree.leaves(program(*inputs)) for program in programs.values()]
        for own, other in zip(*results, strict=True):
            own, other = own.astype(jnp.float32), other.astype(jnp.float32)
            error, scale = jnp.abs(own - other).max(), float(jnp.abs(other).max()) or 1.0
            assert error <= (0.05 if args.gpu else 1e-4) * scale, f"they differ by {error}"
        sides, other_load = workers.alternate_programs(programs, inputs, args.rounds, args.gpu)
        tokens, width = batch * length, jnp.dtype(dtype).itemsize
        size = RANK * (in_features + out_features) + in_features
        work = {
            # A, B and the router each have a product in the forward pass and two in the backward
            # pass (gradients of activations and of weights), of two operations per weight.
            "flops": 6 * tokens * args.experts * size,
            # The forward pass reads x and y and writes the output; the backward pass reads x and
            # the output's gradient and writes that of x.
            "bytes": tokens * width * 3 * (in_features + out_features),
        }
        floor = floors.floor_time(work, floors.device_rates(jnp.dtype(dtype).name))
        name = f"molora_formulation/{device} D to {label}"
        rows.append(common.make_row(name, *sides, other_load, floor))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
