"""The MoV layer, forward and backward, against copies of its tensor.

    python benchmarks/mov_layer.py [--experts 30] [--rounds 15] [--gpu] [--plain_mov] [--json FILE]

The layers of T5 v1.1 Large, `gate` [B, L, 2816] and `key` [B, L, 16, 64]: on a GPU 16 rows of 1024
in bfloat16, on two CPU threads 8 rows of 128 in float32. The forward pass must read and write the
tensor, which is one copy. The backward pass reads the tensor and the output's gradient and writes
the tensor's gradient, which is one and a half copies. So both together are compared with two and a
half times the time of a copy; copies and passes are measured in turn. Gradients are those of the
tensor, the vectors and the router.
"""

from __future__ import annotations

from typing import Any

import common
import floors
import machine
import workers

FEATURES = {"gate": (2816,), "key": (16, 64)}
COPIES = {"forward": 1.0, "both": 2.5}  # that each part takes at least


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=15, gpu=True)
    parser.add_argument("--experts", default=30, type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--plain_mov", action="store_true", help="without fused kernels")
    args = parser.parse_args()
    if not args.gpu:
        machine.pin()
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import adapters, routing

    layer = adapters.VectorExperts(
        num_experts=args.experts, router=routing.Router, fused=not args.plain_mov
    )
    batch, length, dtype, device = 8, 128, jnp.float32, "cpu"
    if args.gpu:
        batch, length, dtype, device = 16, 1024, jnp.bfloat16, "gpu"
    rates = floors.device_rates(jnp.dtype(dtype).name)
    rows = []
    for site, features in FEATURES.items():
        shape = (args.rows or batch, length, *features)
        y, cotangent = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
        x = jnp.zeros((*shape[:2], 1), dtype)  # MoV's default routers read y
        params = layer.init(jax.random.key(0), x, y)["params"]

        # All programs have the same inputs. Variables of the loop are bound as defaults.
        def forward(params: Any, y: Any, cotangent: Any, x: Any = x) -> Any:
            return layer.apply({"params": params}, x, y)

        def both(params: Any, y: Any, cotangent: Any, forward: Any = forward) -> Any:
            output, vjp = jax.vjp(lambda params, y: forward(params, y, None), params, y)
            return output, vjp(cotangent)

        inputs = (params, y, cotangent)
        functions = {"copy": lambda params, y, cotangent: y * 2, "forward": forward, "both": both}
        programs = {name: jax.jit(f).lower(*inputs).compile() for name, f in functions.items()}
        calls = 50 if args.gpu else 1
        (copy, *sides), other_load = workers.alternate_programs(
            programs, inputs, args.rounds, args.gpu, calls
        )
        for side in sides:
            part, side.name = side.name, f"MoV-{args.experts} at {site}, {side.name}"
            times = [(COPIES[part] * a, COPIES[part] * b) for a, b in copy.times]
            copies = workers.Side(f"{COPIES[part]:g} copies of the tensor", times=times)
            floor = {
                "bytes": 2 * COPIES[part] * y.nbytes,
                # The router's product and the mixture take two operations per number and expert
                # each. The backward pass takes twice as many, for two gradients of each.
                "flops": 4 * y.size * args.experts * (1 if part == "forward" else 3),
            }
            name = f"mov_layer/{device} {site} {part}"
            floor_time = floors.floor_time(floor, rates)
            rows.append(common.make_row(name, side, copies, other_load, floor_time))
    common.write_rows(rows, args.json)


if __name__ == "__main__":
    main()
