"""The MoV layer, forward and backward, against copies of its tensor.

    python benchmarks/mov_layer.py [--experts 30] [--rounds 15] [--gpu] [--plain_mov] [--json FILE]

The layers of T5 v1.1 Large, `gate` [B, L, 2816] and `key` [B, L, 16, 64]: on a GPU 16 rows of 1024
in bfloat16, on two CPU threads 8 rows of 128 in float32. The forward pass takes at least a read and
a write, that is one copy. The backward pass reads the tensor and the output's gradient and writes
its own gradient, one and a half copies. So both together are compared with two and a half copies,
which are measured in turn with them. Gradients are those of the tensor, the vectors and the router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import floors
import machine
import workers

FEATURES = {"gate": (2816,), "key": (16, 64)}
COPIES = {"forward": 1.0, "both": 2.5}


def main() -> None:
    """Runs the benchmark."""
    parser = common.make_parser(__doc__, rounds=15, gpu=True)
    parser.add_argument("--experts", default=30, type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--plain_mov", action="store_true", help="in XLA, not in our kernels")
    args = parser.parse_args()
    if not args.gpu:
        machine.pin()
    import jax
    import jax.numpy as jnp

    rates = floors.device_rates("bfloat16" if args.gpu else "float32")
    rows = []
    for site, features in FEATURES.items():
        length, dtype = (1024, jnp.bfloat16) if args.gpu else (128, jnp.float32)
        batch = args.rows or (16 if args.gpu else 8)
        y, cotangent = (
            jax.random.normal(jax.random.key(i), (batch, length, *features), dtype)
            for i in range(2)
        )
        calls = 50 if args.gpu else 1  # one call on a GPU is too short to time
        functions, temporaries = compile_functions(
            args.experts, not args.plain_mov, y, cotangent, calls
        )
        sides, other_load = workers.alternate_functions(functions, args.rounds)
        for side in sides:
            side.times = [(clock / calls, cpu / calls) for clock, cpu in side.times]
        copy = sides[0]
        copy.name = "copies of the tensor"
        for side in sides[1:]:
            part = side.name  # forward or both
            side.name = f"MoV-{args.experts} at {site}, {part}"
            side.info["temporaries"] = temporaries[part]
            side.info["versions"] = machine.versions("jax", "jaxlib", "flax")
            if args.gpu:
                side.info["device"] = jax.devices()[0].device_kind
            times = [(COPIES[part] * a, COPIES[part] * b) for a, b in copy.times]
            copies = workers.Side(f"{COPIES[part]:g} copies of the tensor", times=times)
            device = "gpu" if args.gpu else "cpu"
            floor = {
                "bytes": 2 * COPIES[part] * y.nbytes,
                # the router's product and the mixture, and two gradients of each
                "flops": 4 * y.size * args.experts * (1 if part == "forward" else 3),
            }
            name = f"mov_layer/{device} {site} {part}"
            floor_time = floors.floor_time(floor, rates)
            rows.append(common.make_row(name, side, copies, other_load, floor_time))
    common.write_rows(rows, args.json)


def compile_functions(
    experts: int, fused: bool, y: Any, cotangent: Any, calls: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Returns functions that run a program `calls` times, and the programs' temporaries."""
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import adapters, routing

    layer = adapters.VectorExperts(num_experts=experts, router=routing.Router, fused=fused)
    x = jnp.zeros((*y.shape[:2], 1), y.dtype)  # MoV's default routers read y
    params = layer.init(jax.random.key(0), x, y)["params"]

    def forward(params: Any, y: Any, cotangent: Any) -> Any:
        return layer.apply({"params": params}, x, y)

    def both(params: Any, y: Any, cotangent: Any) -> Any:
        output, vjp = jax.vjp(lambda params, y: forward(params, y, None), params, y)
        return output, vjp(cotangent)

    programs = {"copy": lambda params, y, cotangent: y * 2, "forward": forward, "both": both}
    functions, temporaries = {}, {}
    for name, program in programs.items():
        compiled = jax.jit(program).lower(params, y, cotangent).compile()
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes

        def run(compiled: Any = compiled) -> None:
            for _ in range(calls):
                output = compiled(params, y, cotangent)
            jax.block_until_ready(output)

        run()
        functions[name] = run
    return functions, temporaries


if __name__ == "__main__":
    main()
