"""Writes flaxformer_moe.npz: outputs, gradients and losses of flaxformer's sparse layer.

Each case has its settings as JSON under `<case>/settings`, the arrays of the layer, its input `x`
[B, L, D] and its output `y`; gradients are those of sum(y * weights). The tests read the data only.
To recreate it, in the environment of make_t5x.py with google/flaxformer at 399ea3a and `aqtp`:

    PYTHONPATH=<clone of google/flaxformer> python tests/goldens/make_flaxformer_moe.py
"""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flaxformer.architectures.moe import moe_layers, routing
from flaxformer.components import dense

D, F = 6, 10

# batch, length, experts, k, capacity factor, minimal capacity, largest group; what differs.
CASES = {
    "switch": dict(shape=(4, 8, 4), k=1, factor=1.25, minimum=1, group=8),
    "switch_scatter": dict(shape=(4, 8, 4), k=1, factor=1.25, minimum=1, group=8, kind="scatter"),
    "all_fit": dict(shape=(2, 8, 4), k=2, factor=8.0, minimum=4, group=16),
    "top_2": dict(shape=(4, 16, 4), k=2, factor=1.0, minimum=2, group=16),
    "top_2_by_probability": dict(shape=(4, 16, 4), k=2, factor=1.0, minimum=1, group=16, bpr=True),
    "top_2_padded": dict(
        shape=(4, 16, 4), k=2, factor=1.0, minimum=1, group=16, padding=True, bpr=True
    ),
    "top_3_of_3": dict(shape=(3, 8, 3), k=3, factor=0.5, minimum=1, group=8, kind="scatter"),
    "odd_tokens": dict(shape=(3, 7, 4), k=2, factor=1.0, minimum=1, group=6),
    "odd_rows": dict(shape=(5, 3, 8), k=1, factor=1.0, minimum=1, group=64),
    "experts_exceed_tokens": dict(shape=(1, 3, 8), k=1, factor=1.0, minimum=4, group=64),
    "minimum": dict(shape=(2, 16, 8), k=1, factor=0.1, minimum=2, group=32),
    "ties": dict(shape=(2, 8, 4), k=2, factor=1.0, minimum=1, group=8, ties=True),
    "one_expert_for_all": dict(shape=(4, 8, 4), k=1, factor=1.25, minimum=1, group=8, same=True),
    "gated": dict(
        shape=(4, 8, 4), k=2, factor=1.25, minimum=1, group=8, activations=("gelu", "linear")
    ),
    "experts_choose": dict(shape=(4, 8, 4), k=2, factor=1.0, minimum=1, group=8, kind="experts"),
    "experts_choose_2": dict(
        shape=(4, 12, 3), k=2, factor=2.0, minimum=1, group=16, kind="experts"
    ),
    "experts_choose_ties": dict(
        shape=(2, 8, 2), k=2, factor=1.0, minimum=1, group=8, kind="experts", ties=True
    ),
}  # fmt: skip


def make_layer(case: dict) -> moe_layers.MoeLayer:
    """Returns flaxformer's layer."""
    weights = routing.RouterWeights(use_bias=False, dtype=jnp.float32, name="router_weights")
    common = dict(
        router_weights=weights, jitter_noise=0.0, dtype=jnp.float32,
        ignore_padding_tokens=case.get("padding", False),
    )  # fmt: skip
    kind = case.get("kind", "masked")
    if kind == "experts":
        router = routing.ExpertsChooseMaskedRouter(**common)
    else:
        routers = {
            "masked": routing.TokensChooseMaskedRouter,
            "scatter": routing.TokensChooseScatterRouter,
        }
        router = routers[kind](
            num_selected_experts=case["k"],
            batch_prioritized_routing=case.get("bpr", False),
            **common,
        )
    expert = dense.MlpBlock(
        use_bias=False, intermediate_dim=F, activations=case.get("activations", ("relu",)),
        intermediate_dropout_rate=0.0, final_dropout_rate=0.0, dtype=jnp.float32,
    )  # fmt: skip
    experts = case["shape"][2]
    return moe_layers.MoeLayer(
        num_experts=experts, num_expert_partitions=1, num_model_partitions=1,
        max_group_size=case["group"], train_capacity_factor=case["factor"],
        eval_capacity_factor=case["factor"], min_expert_capacity=case["minimum"], router=router,
        expert=expert, dropout_rate=0.0, dtype=jnp.float32,
    )  # fmt: skip


def make_input(case: dict, rng: np.random.Generator) -> np.ndarray:
    """Returns x [B, L, D]."""
    batch, length, _ = case["shape"]
    x = rng.normal(size=(batch, length, D)).astype(np.float32)
    if case.get("padding"):
        x[0, 11:] = 0
        x[2, :] = 0
    if case.get("ties"):
        x[:, 2:6] = 0  # equal probabilities
    if case.get("same"):
        x[:] = x[0, 0]
    return x


def main() -> None:
    arrays = {}
    for name, case in CASES.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        layer, x = make_layer(case), make_input(case, rng)
        params = layer.init({"params": jax.random.key(0)}, jnp.asarray(x), enable_dropout=False)
        flat = traverse_util.flatten_dict(params["params"], sep="/")
        flat = {k: rng.normal(size=v.shape).astype(np.float32) * 0.5 for k, v in flat.items()}
        weights = rng.normal(size=x.shape).astype(np.float32)

        def apply(flat: dict, x: jax.Array, layer=layer) -> tuple[jax.Array, dict]:
            tree = traverse_util.unflatten_dict(flat, sep="/")
            y, sown = layer.apply(
                {"params": tree}, x, enable_dropout=False, mutable=["intermediates"]
            )
            return y, sown["intermediates"]

        def loss(flat: dict, x: jax.Array, weights=weights, apply=apply) -> jax.Array:
            return jnp.sum(apply(flat, x)[0] * weights)

        y, sown = apply(flat, jnp.asarray(x))
        grads, grad_x = jax.grad(loss, argnums=(0, 1))(flat, jnp.asarray(x))
        arrays[f"{name}/settings"] = json.dumps(case)
        arrays |= {f"{name}/x": x, f"{name}/y": y, f"{name}/weights": weights}
        arrays[f"{name}/grad/x"] = grad_x
        arrays |= {f"{name}/params/{key}": value for key, value in flat.items()}
        arrays |= {f"{name}/grad/{key}": value for key, value in grads.items()}
        for metric in ("auxiliary_loss", "router_z_loss"):
            arrays[f"{name}/{metric}"] = np.asarray(jax.tree.leaves(sown[metric])[0])
    path = pathlib.Path(__file__).with_name("flaxformer_moe.npz")
    np.savez_compressed(path, **{key: np.asarray(value) for key, value in arrays.items()})
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
