"""Routing, dispatch and combination of a sparse layer without its experts, against a dense MLP.

    python benchmarks/sparse_routing.py [--experts 128] [--rows 16] [--rounds 9] [--json FILE]

Switch Base's width (D 768, F 3072, ReLU) and 128 experts, rows of 512 tokens, top-1, capacity
factor 1.25, forward and backward, float32, two CPU threads. Our side computes the router's product
and softmax, chooses experts and places, and copies tokens to the experts' slots and back.
"""

from __future__ import annotations

from typing import Any

import common
import machine
import workers

LENGTH, EMB_DIM, MLP_DIM = 512, 768, 3072


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--experts", default=128, type=int)
    parser.add_argument("--rows", default=16, type=int)
    args = parser.parse_args()
    machine.pin()
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import dispatch, layers

    x, cotangent = (
        jax.random.normal(jax.random.key(i), (args.rows, LENGTH, EMB_DIM)) for i in (0, 1)
    )
    router = 0.02 * jax.random.normal(jax.random.key(2), (EMB_DIM, args.experts))
    mlp = layers.MlpBlock(MLP_DIM, ("relu",))
    params = {"router": router, "mlp": jax.jit(mlp.init)(jax.random.key(3), x)["params"]}
    # Each row is a group. The last argument is the least capacity.
    capacity = dispatch.capacity(LENGTH, args.experts, 1.25, 4)

    def route(params: Any, x: jax.Array) -> jax.Array:
        experts, chosen = dispatch.choose_experts(jax.nn.softmax(x @ params["router"]), 1)
        is_token = jnp.ones(experts.shape, bool)
        places = dispatch.assign_places(experts, is_token, args.experts)
        slots = dispatch.slots_with_capacity(experts, *places, is_token, capacity)
        return dispatch.combine(dispatch.dispatch(x, slots), chosen, slots)

    def apply_mlp(params: Any, x: jax.Array) -> jax.Array:
        return mlp.apply({"params": params["mlp"]}, x)

    def both(function: Any) -> Any:
        def run(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            y, vjp = jax.vjp(function, params, x)
            return y, vjp(cotangent)

        return run

    inputs = (params, x, cotangent)
    functions = {"routing, dispatch and combination": route, "dense MLP": apply_mlp}
    programs = {name: jax.jit(both(f)).lower(*inputs).compile() for name, f in functions.items()}
    (ours, peer), other_load = workers.alternate_programs(programs, inputs, args.rounds, False, 1)
    row = common.make_row("sparse_routing/cpu", ours, peer, other_load)
    common.write_rows([row], args.json)


if __name__ == "__main__":
    main()
