"""Expert modules: numbers by hand, degenerate cases, sizes of intermediate arrays."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core import adapters
from pemoe_jax.core.adapters import Adapters, LoRAExperts, VectorExperts
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router


def apply(module, params, x, y):
    return module.apply({"params": params}, jnp.asarray(x), jnp.asarray(y))


# --- numbers by hand ---


def test_ia3_by_hand():
    """y * l: (1, 2, 3) * (2, 0.5, -1) = (2, 1, -3)."""
    y = jnp.array([[[1.0, 2, 3]]])
    out = apply(VectorExperts(), {"vectors": jnp.array([[2.0, 0.5, -1]])}, y, y)
    np.testing.assert_allclose(out, [[[2, 1, -3]]])


def test_ia3_scales_each_head_by_its_own_vector():
    """Heads (1, 2) and (3, 4), vectors (1, 10) and (2, 0.5): (1, 20) and (6, 2)."""
    y = jnp.array([[[[1.0, 2], [3, 4]]]])  # [B, L, H, K] = [1, 1, 2, 2]
    vectors = jnp.array([[[1.0, 10]], [[2, 0.5]]])  # [H, E, K] = [2, 1, 2]
    out = apply(VectorExperts(), {"vectors": vectors}, jnp.zeros((1, 1, 5)), y)
    np.testing.assert_allclose(out, [[[[1, 20], [6, 2]]]])


def test_mov_by_hand():
    """The router reads y = (1, 2), kernel [[ln 3, 0], [0, 0]]: exp(logits) = (3, 1), p = (3, 1)/4.

    l = (2, 4) and (6, 0): mixed = (3/4 * 2 + 1/4 * 6, 3/4 * 4) = (3, 3); y * mixed = (3, 6).
    """
    params = {
        "vectors": jnp.array([[2.0, 4], [6, 0]]),
        "router": {"kernel": jnp.array([[np.log(3), 0], [0, 0]], jnp.float32)},
    }
    module = VectorExperts(num_experts=2, router=Router)
    # x differs from y, so that a router that reads x fails
    out = apply(module, params, jnp.full((1, 1, 2), 99.0), jnp.array([[[1.0, 2]]]))
    np.testing.assert_allclose(out, [[[3, 6]]], rtol=1e-6)


def test_mov_routes_each_head_separately():
    """One kernel [K, E] for all heads, probabilities per head.

    kernel [[ln 3, 0]] (K = 1, E = 2); heads y = 1 and y = -1: p = (3/4, 1/4) and (1/4, 3/4).
    vectors of head 0: 1 and 5 -> 3/4 + 5/4 = 2, times 1 = 2;
    vectors of head 1: 2 and 4 -> 1/4 * 2 + 3/4 * 4 = 7/2, times -1 = -7/2.
    """
    params = {
        "vectors": jnp.array([[[1.0], [5]], [[2], [4]]]),  # [H, E, K] = [2, 2, 1]
        "router": {"kernel": jnp.array([[np.log(3), 0]], jnp.float32)},
    }
    module = VectorExperts(num_experts=2, router=Router)
    out = apply(module, params, jnp.zeros((1, 1, 3)), jnp.array([[[[1.0], [-1]]]]))
    np.testing.assert_allclose(out, [[[[2], [-3.5]]]], rtol=1e-6)


def test_lora_by_hand():
    """y + (α/R) x A B with R = 2, α = 3: x = (1, 2), A = [[1, 0], [1, 1]] -> x A = (3, 2);

    B = [[1, 0, 2], [0, 1, 1]] -> (3, 2, 8); times 3/2 = (4.5, 3, 12); y = (1, 1, 1) -> (5.5, 4, 13)
    """
    params = {
        "lora_a": jnp.array([[[1.0, 0]], [[1, 1]]]),  # [Din, E, R] = [2, 1, 2]
        "lora_b": jnp.array([[[1.0, 0, 2], [0, 1, 1]]]),  # [E, R, Dout] = [1, 2, 3]
    }
    out = apply(LoRAExperts(rank=2, alpha=3.0), params, [[[1.0, 2]]], jnp.ones((1, 1, 3)))
    np.testing.assert_allclose(out, [[[5.5, 4, 13]]], rtol=1e-6)


def test_molora_by_hand():
    """The router reads x: x = (1, 2), kernel [[0, 0], [ln 2, 0]] -> exp = (4, 1), p = (4/5, 1/5).

    R = 1, α = 5: expert 0: x A = 1 + 2 = 3, B = 1 -> 3; expert 1: x A = 2 * 2 = 4, B = 10 -> 40.
    mixed = 4/5 * 3 + 1/5 * 40 = 10.4; times 5/1 = 52; y = 1 -> 53.
    """
    params = {
        "lora_a": jnp.array([[[1.0], [0]], [[1], [2]]]),  # [Din, E, R] = [2, 2, 1]
        "lora_b": jnp.array([[[1.0]], [[10]]]),  # [E, R, Dout] = [2, 1, 1]
        "router": {"kernel": jnp.array([[0, 0], [np.log(2), 0]], jnp.float32)},
    }
    module = LoRAExperts(num_experts=2, rank=1, alpha=5.0, router=Router)
    out = apply(module, params, [[[1.0, 2]]], jnp.ones((1, 1, 1)))
    np.testing.assert_allclose(out, [[[53.0]]], rtol=1e-5)


# --- against the formula, expert by expert, in numpy float64 ---

MODULES = {
    "ia3": functools.partial(VectorExperts),
    "mov": functools.partial(VectorExperts, num_experts=4, router=Router),
    "lora": functools.partial(LoRAExperts),
    "molora": functools.partial(LoRAExperts, num_experts=4, router=Router),
}
SHAPES = {  # x, y
    "heads": ((2, 3, 5), (2, 3, 2, 7)),
    "features": ((2, 3, 5), (2, 3, 7)),
}


@functools.cache
def sample(method: str, shape: str):
    """(module, random params, x, y)."""
    x_shape, y_shape = SHAPES[shape]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(x_shape).astype(np.float32)
    y = rng.standard_normal(y_shape).astype(np.float32)
    axes = ("heads", "kv") if shape == "heads" else ("mlp",)
    module = MODULES[method](x_axis="embed", y_axes=axes)
    variables = jax.eval_shape(module.init, jax.random.PRNGKey(0), x, y)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(np.float32), variables["params"]
    )
    return module, params, x, y


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", MODULES)
def test_equals_the_sum_over_experts(method, shape):
    module, params, x, y = sample(method, shape)
    p64 = jax.tree.map(lambda a: a.astype(np.float64), params)
    experts = module.num_experts
    routed = y if method in ("ia3", "mov") else x
    probs = np.ones((*routed.shape[:-1], 1))
    if "router" in p64:
        probs = softmax(routed @ p64["router"]["kernel"])
    if method in ("ia3", "mov"):
        scale = sum(probs[..., e, None] * p64["vectors"][..., e, :] for e in range(experts))
        expected = y * scale
    else:
        delta = sum(
            probs[..., e, None] * (x @ p64["lora_a"][:, e] @ p64["lora_b"][e])
            for e in range(experts)
        )
        expected = y + 16 / 4 * delta.reshape(y.shape)
    np.testing.assert_allclose(apply(module, params, x, y), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", MODULES)
def test_parameters_and_axes(method, shape):
    """Shapes follow from x and y, and every axis of every parameter has a name."""
    module, _, x, y = sample(method, shape)
    variables = jax.eval_shape(module.init, jax.random.PRNGKey(0), x, y)
    shapes = jax.tree.map(lambda a: a.shape, variables["params"])
    experts, heads = module.num_experts, y.shape[2:-1]
    if method in ("ia3", "mov"):
        expected = {"vectors": (*heads, experts, 7)}
        read = 7
    else:
        expected = {"lora_a": (5, experts, 4), "lora_b": (experts, 4, math.prod(heads) * 7)}
        read = 5
    if method in ("mov", "molora"):
        expected["router"] = {"kernel": (read, experts)}
    assert shapes == expected
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables["params"]))
    names = jax.tree.map(
        lambda a: a.names, variables["params_axes"], is_leaf=lambda a: hasattr(a, "names")
    )
    flat = dict(jax.tree_util.tree_leaves_with_path(names, is_leaf=lambda a: isinstance(a, tuple)))
    for path, shape_ in jax.tree_util.tree_leaves_with_path(
        shapes, is_leaf=lambda a: isinstance(a, tuple)
    ):
        *prefix, last = path
        axes = flat[(*prefix, jax.tree_util.DictKey(f"{last.key}_axes"))]
        assert len(axes) == len(shape_), (path, axes, shape_)


@pytest.mark.parametrize("method", MODULES)
def test_initial_adapters_do_not_change_y(method):
    """Vectors start at one and B at zero, so y is unchanged bit for bit.

    MoV changes it by rounding: in float32, probabilities sum to one only approximately.
    """
    module, _, x, y = sample(method, "heads")
    out, variables = jax.jit(module.init_with_output)(jax.random.PRNGKey(0), x, y)
    if method == "mov":
        np.testing.assert_allclose(out, y, rtol=1e-6)
    else:
        np.testing.assert_array_equal(out, y)
    params = variables["params"]
    if "vectors" in params:
        assert (params["vectors"] == 1).all()
    else:
        assert (params["lora_b"] == 0).all()
        assert 0.01 < float(params["lora_a"].std()) < 0.03  # N(0, 0.02), 20 or 80 draws


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routed, plain", [("mov", "ia3"), ("molora", "lora")])
def test_a_single_expert_is_the_method_without_router(routed, plain, shape):
    """A softmax over one expert is exactly 1, so the outputs are equal bit for bit."""
    module, params, x, y = sample(plain, shape)
    read = y if routed == "mov" else x
    with_router = {**params, "router": {"kernel": np.ones((read.shape[-1], 1), np.float32)}}
    single = MODULES[routed](num_experts=1, y_axes=module.y_axes)
    np.testing.assert_array_equal(apply(single, with_router, x, y), apply(module, params, x, y))


@pytest.mark.parametrize("routed, plain", [("mov", "ia3"), ("molora", "lora")])
def test_equal_experts_act_as_a_single_expert(routed, plain):
    """The mixture of E copies is the copy, whatever the probabilities are."""
    _, params, x, y = sample(plain, "heads")
    module, routed_params, _, _ = sample(routed, "heads")
    axis = {"vectors": -2, "lora_a": 1, "lora_b": 0}
    copies = {name: np.repeat(a, 4, axis=axis[name]) for name, a in params.items()}
    out = apply(module, {**copies, "router": routed_params["router"]}, x, y)
    expected = apply(MODULES[plain](y_axes=("heads", "kv")), params, x, y)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", MODULES)
def test_bfloat16_stays_near_float32(method):
    """8 bits of mantissa: a few roundings with relative errors of 2^-8 = 0.4 %."""
    module, params, x, y = sample(method, "heads")
    out = apply(module, params, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(apply(module, params, x, y))
    assert np.abs(np.asarray(out, np.float32) - exact).max() < 0.03 * np.abs(exact).max()


# --- intermediate arrays ---


def largest_intermediate(function, *args) -> int:
    """Returns the size of the largest output of an equation in the jaxpr, inner jaxprs included."""

    def walk(jaxpr) -> int:
        largest = 0
        for equation in jaxpr.eqns:
            for out in equation.outvars:
                largest = max(largest, math.prod(getattr(out.aval, "shape", ())))
            for value in equation.params.values():
                for inner in value if isinstance(value, (list, tuple)) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        largest = max(largest, walk(inner))
        return largest

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


B, L, D, E, R = 2, 16, 32, 6, 4  # E * R = 24 < D, and D * E * R, a parameter's size, < B * L * D


@pytest.mark.parametrize("y_shape", [(B, L, D), (B, L, 4, 8)], ids=["features", "heads"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_molora_never_materializes_expert_outputs(y_shape, backward):
    """No array is larger than [B, L, D], forward or backward; expert outputs are E times that."""
    module = LoRAExperts(num_experts=E, rank=R, router=Router)
    x, y = jnp.ones((B, L, D)), jnp.ones(y_shape)
    params = module.init(jax.random.PRNGKey(0), x, y)["params"]

    def loss(params, x, y):
        return jnp.sum(module.apply({"params": params}, x, y) ** 2)

    function = jax.grad(loss, argnums=(0, 1, 2)) if backward else loss
    assert largest_intermediate(function, params, x, y) <= B * L * max(E * R, D)


def test_largest_intermediate_sees_expert_outputs():
    """The naive formula has an array of B * L * E * D elements."""

    def naive(x, a, b, p):
        return jnp.einsum("bled,ble->bld", jnp.einsum("bld,der,ero->bleo", x, a, b), p)

    args = jnp.ones((B, L, D)), jnp.ones((D, E, R)), jnp.ones((E, R, D)), jnp.ones((B, L, E))
    assert largest_intermediate(jax.jit(naive), *args) == B * L * E * D


# --- adapters by site ---


def test_experts_without_a_router_are_an_error():
    y = jnp.ones((1, 1, 2))
    for module in (VectorExperts(num_experts=2), LoRAExperts(num_experts=2)):
        with pytest.raises(InputError, match="num_experts must be 1 without a router, got 2"):
            module.init(jax.random.PRNGKey(0), y, y)


@pytest.mark.parametrize(
    "module, message",
    [
        (VectorExperts(num_experts=0), "VectorExperts.num_experts must be at least 1, got 0"),
        (LoRAExperts(rank=0), "LoRAExperts.rank must be at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_errors(module, message):
    y = jnp.ones((1, 1, 2))
    with pytest.raises(InputError, match=message):
        module.init(jax.random.PRNGKey(0), y, y)


def test_an_instance_is_not_a_factory():
    """Two layers would silently share an instance's parameters."""
    with pytest.raises(InputError, match="Adapters.key must be a factory"):
        Adapters(key=VectorExperts())


def test_description_round_trip():
    """A description in a checkpoint restores the same modules, field by field."""
    record = Adapters(
        key=functools.partial(VectorExperts, num_experts=5, router=Router),
        wo=functools.partial(LoRAExperts, rank=2, alpha=7.0),
    )
    description = adapters.describe(record)
    again = adapters.from_description(description)
    assert again.sites() == record.sites() == ("key", "wo")
    assert adapters.describe(again) == description
    key = again.key()
    assert isinstance(key, VectorExperts) and key.num_experts == 5
    assert isinstance(key.router(num_experts=5), Router)
    wo = again.wo()
    assert (wo.rank, wo.alpha, wo.num_experts, wo.router) == (2, 7.0, 1, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 5.0}, "VectorExperts.num_experts must be a positive integer, got 5.0"),
        ({"num_experts": True}, "VectorExperts.num_experts must be a positive integer, got True"),
        ({"router": {"kind": "Router", "top_k": "2"}}, "Router.top_k must be a positive integer"),
        ({"router": {"kind": "Router", "temperature": True}}, "Router.temperature must be float"),
        (
            {"router": {"kind": "Router", "renormalize": 1}},
            "Router.renormalize must be bool, got 1",
        ),
        ({"router": {"kind": "Router", "reads": 5}}, "Router.reads must be str or None, got 5"),
    ],
)
def test_types_in_a_description(changes, message):
    with pytest.raises(InputError, match=message):
        adapters.from_description({"key": {"kind": "VectorExperts", **changes}})
