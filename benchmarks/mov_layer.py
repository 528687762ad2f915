"""The MoV layer, forward and backward, against copies of its tensor: one read and one write each.

    python benchmarks/mov_layer.py [--experts 30] [--rounds 15] [--gpu] [--plain_mov] [--json FILE]

The layers of T5 v1.1 Large: `gate` [B, L, 2816] and `key` [B, L, 16, 64], on a GPU 16 rows of 1024
in bfloat16, on two CPU threads 8 rows of 128 in float32. Forward cannot take less than a read and a
write: one copy. Backward reads the tensor and the gradient of what came of it and writes its own:
one copy and a half. So the two together are measured against two and a half copies, timed in turn
with them. Gradients are those of the tensor, the vectors and the router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common

FEATURES = {"gate": (2816,), "key": (16, 64)}
COPIES = {"forward": 1.0, "both": 2.5}


def main() -> None:
    """Measures as the flags say."""
    parser = common.parser(__doc__, rounds=15, gpu=True)
    parser.add_argument("--experts", default=30, type=int)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--plain_mov", action="store_true", help="by XLA, not in our kernels")
    args = parser.parse_args()
    if not args.gpu:
        common.pin()
    import floors
    import jax
    import jax.numpy as jnp

    rates = floors.rates("bfloat16" if args.gpu else "float32")
    rows = []
    for site, features in FEATURES.items():
        length, dtype = (1024, jnp.bfloat16) if args.gpu else (128, jnp.float32)
        batch = args.rows or (16 if args.gpu else 8)
        y, wanted = (
            jax.random.normal(jax.random.key(i), (batch, length, *features), dtype)
            for i in range(2)
        )
        many = 50 if args.gpu else 1
        ways, temporaries = prepared(args.experts, not args.plain_mov, y, wanted, many)
        sides, others = common.in_turn(ways, args.rounds)
        for side in sides:
            side.times = [(clock / many, cpu / many) for clock, cpu in side.times]
        copy = sides[0]
        copy.name = "copies of the tensor"
        for side in sides[1:]:
            part = side.name
            side.name = f"MoV-{args.experts} at {site}, {part}"
            side.told["temporaries"] = temporaries[part]
            side.told["versions"] = common.versions("jax", "jaxlib", "flax")
            if args.gpu:
                side.told["device"] = jax.devices()[0].device_kind
            times = [(COPIES[part] * a, COPIES[part] * b) for a, b in copy.times]
            copies = common.Side(f"{COPIES[part]:g} copies of the tensor", "", {}, times=times)
            where = "gpu" if args.gpu else "cpu"
            floor = {
                "bytes": 2 * COPIES[part] * y.nbytes,
                # the router's product and the mix, and of both the two of the gradients
                "flops": 4 * y.size * args.experts * (1 if part == "forward" else 3),
            }
            one = common.row(
                f"mov_layer/{where} {site} {part}",
                side,
                copies,
                others,
                floors.together(floor, rates),
            )
            rows.append(one)
    common.write(rows, args.json)


def prepared(
    experts: int, fused: bool, y: Any, wanted: Any, many: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Compiled ways, each of `many` runs over the number of runs, and their temporaries."""
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import adapters, routing

    layer = adapters.VectorExperts(num_experts=experts, router=routing.Router, fused=fused)
    x = jnp.zeros((*y.shape[:2], 1), y.dtype)  # which MoV's own routers do not read
    params = layer.init(jax.random.key(0), x, y)["params"]

    def forward(params: Any, y: Any, wanted: Any) -> Any:
        return layer.apply({"params": params}, x, y)

    def both(params: Any, y: Any, wanted: Any) -> Any:
        made, pull = jax.vjp(lambda params, y: forward(params, y, None), params, y)
        return made, pull(wanted)

    functions = {"copy": lambda params, y, wanted: y * 2, "forward": forward, "both": both}
    ways, temporaries = {}, {}
    for name, function in functions.items():
        compiled = jax.jit(function).lower(params, y, wanted).compile()
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes

        def way(compiled: Any = compiled) -> None:
            for _ in range(many):
                made = compiled(params, y, wanted)
            jax.block_until_ready(made)

        way()
        ways[name] = way
    return ways, temporaries


if __name__ == "__main__":
    main()
