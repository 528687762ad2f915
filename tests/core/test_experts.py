"""Sparse MLPs: flaxformer's layer, paths of execution, and settings."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core import dispatch, errors, experts, params
from pemoe_jax.core.routing import STATISTICS, TokenInfo
from pemoe_jax.core.sparse import Sparse

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / "goldens/flaxformer_moe.npz")
CASES = sorted({name.partition("/")[0] for name in GOLDENS.files})


def arrays_under(prefix):
    return {
        name.removeprefix(prefix): GOLDENS[name]
        for name in GOLDENS.files
        if name.startswith(prefix)
    }


def layer_of(case):
    """Returns our layer with the settings of flaxformer's."""
    padding = case.get("padding", False)
    sparse = Sparse(
        num_experts=case["shape"][2],
        routing="experts" if case.get("kind") == "experts" else "tokens",
        top_k=case["k"],
        priority="probability" if case.get("bpr") else "position",
        eval_capacity_factor=case["factor"],
        min_capacity=case["minimum"],
        group=case["group"],
        count_padding=not padding,
        balance_loss=1.0,
    )
    activations = tuple(case.get("activations", ("relu",)))
    return experts.SparseMlpBlock(sparse, mlp_dim=10, activations=activations)


@pytest.mark.parametrize("name", CASES)
def test_layer_is_flaxformers(name):
    case = json.loads(str(GOLDENS[f"{name}/settings"]))
    layer, x = layer_of(case), jnp.asarray(GOLDENS[f"{name}/x"])
    tokens = TokenInfo(valid=jnp.any(x != 0, -1)) if case.get("padding") else TokenInfo()
    flat = arrays_under(f"{name}/params/")

    @jax.jit
    def apply(flat, x):
        variables = {"params": params.unflatten(flat)}
        y, sown = layer.apply(variables, x, tokens, mutable=["routers"])
        return jnp.sum(y * GOLDENS[f"{name}/weights"]), (y, sown["routers"])

    grad = jax.jit(jax.grad(apply, argnums=(0, 1), has_aux=True))
    (grads, grad_x), (y, sown) = grad(flat, x)
    # A token without an expert is exactly zero in both: the assignments are the same.
    np.testing.assert_array_equal(y == 0, GOLDENS[f"{name}/y"] == 0)
    expected = arrays_under(f"{name}/grad/") | {"y": GOLDENS[f"{name}/y"]}
    values = {**grads, "x": grad_x, "y": y}
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = (1e-5 if key == "y" else 2e-5) * np.abs(value).max()
        np.testing.assert_allclose(values[key], value, rtol=0, atol=tolerance, err_msg=key)
    if case.get("padding") or case.get("kind") == "experts":
        return  # flaxformer counts padding in its losses; experts that choose have none
    statistics = dict(zip(STATISTICS, np.asarray(sown["statistics"][0]), strict=True))
    # Ours is 1 for even routing at any k.
    balance_loss = GOLDENS[f"{name}/auxiliary_loss"] / case["k"]
    np.testing.assert_allclose(statistics["balance_loss"], balance_loss, atol=1e-6)
    np.testing.assert_allclose(statistics["aux_loss"], balance_loss, atol=1e-6)
    np.testing.assert_allclose(statistics["z_loss"], GOLDENS[f"{name}/router_z_loss"], atol=2e-6)


BATCH, LENGTH, FEATURES = 3, 12, 8


def make_layer(**settings):
    return experts.SparseMlpBlock(Sparse(**{"num_experts": 4, **settings}), mlp_dim=16)


@functools.cache
def example():
    """Returns parameters, x and which tokens are real; the last row is padding alone."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32)
    valid = np.arange(LENGTH) < np.array([[12], [7], [0]])
    flat = {
        "router/router_weights/w/kernel": rng.normal(size=(FEATURES, 4)),
        "expert/wi_0/kernel": rng.normal(size=(4, FEATURES, 16)),
        "expert/wi_1/kernel": rng.normal(size=(4, FEATURES, 16)),
        "expert/wo/kernel": rng.normal(size=(4, 16, FEATURES)),
    }
    flat = {path: (0.5 * value).astype(np.float32) for path, value in flat.items()}
    return params.unflatten(flat), x, valid


@functools.partial(jax.jit, static_argnames=("layer", "deterministic"))
def apply(layer, x, valid=None, deterministic=True):
    """Returns y and what the layer sows; without dropout unless asked."""
    tokens = TokenInfo(valid, deterministic=deterministic)
    rngs = {"dropout": jax.random.key(0)}
    y, sown = layer.apply({"params": example()[0]}, x, tokens, mutable=["routers"], rngs=rngs)
    return y, sown["routers"]


def grads_of(layer):
    """Returns the output and all gradients, of parameters and x, by path."""
    tree, x, valid = example()
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def grad(tree, x):
        y = layer.apply({"params": tree}, x, TokenInfo(valid=valid))
        return jnp.sum(y * weights), y

    (grads, grad_x), y = grad(tree, x)
    return {"y": y, "x": grad_x, **params.flatten(grads)}


@pytest.mark.parametrize("top_k, combine", [(1, "probability"), (2, "straight")])
def test_capacity_with_room_is_no_limit(top_k, combine):
    # 11 places: a token more than any expert gets, and fewer than a row has.
    limited = make_layer(top_k=top_k, combine=combine, capacity=11, priority="probability")
    expected = grads_of(make_layer(top_k=top_k, combine=combine))
    values = grads_of(limited)
    for path, value in expected.items():
        tolerance = 1e-6 * max(1.0, np.abs(value).max())
        np.testing.assert_allclose(values[path], value, rtol=0, atol=tolerance, err_msg=path)
    assert np.abs(expected["router/router_weights/w/kernel"]).max() > 1e-3


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_limit_is_a_loop(top_k):
    tree, x, valid = example()
    y, _ = apply(make_layer(top_k=top_k, combine="probability"), x, valid)
    flat = params.flatten(tree)
    probs = np.asarray(jax.nn.softmax(x @ flat["router/router_weights/w/kernel"]))
    outputs = []
    for e in range(4):
        gate = jax.nn.gelu(x @ flat["expert/wi_0/kernel"][e])
        hidden = gate * (x @ flat["expert/wi_1/kernel"][e])
        outputs.append(np.asarray(hidden @ flat["expert/wo/kernel"][e]))
    expected = np.zeros_like(x)
    for b, t in zip(*np.nonzero(valid), strict=True):
        for e in np.argsort(-probs[b, t])[:top_k]:
            expected[b, t] += probs[b, t, e] * outputs[e][b, t]
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 2, "eval_capacity_factor": 1.0},
        {"routing": "experts", "capacity_factor": 1.5},
        {"eval_capacity_factor": 0.5, "top_k": 2, "priority": "probability"},
    ],
    ids=["no_limit", "capacity", "experts", "priority"],
)
def test_a_row_depends_on_itself_alone(settings):
    layer = make_layer(min_capacity=1, **settings)
    _, x, valid = example()
    y, _ = apply(layer, x, valid)
    alone, _ = apply(layer, x[1:2], valid[1:2])
    np.testing.assert_allclose(y[1:2], alone, atol=1e-6)
    other = x + 3 * (~valid)[..., None].astype(np.float32)  # what padding holds does not matter
    np.testing.assert_allclose(apply(layer, other, valid)[0], y, atol=1e-6)
    assert not np.asarray(y)[~valid].any()  # padding has no expert
    if settings.get("routing") == "experts":  # a row's capacity is that of its real tokens
        short, _ = apply(layer, x[1:2, :7], valid[1:2, :7])
        np.testing.assert_allclose(y[1:2, :7], short, atol=1e-6)


def test_experts_that_choose_are_full():
    layer = make_layer(routing="experts", capacity_factor=1.0, min_capacity=1)
    _, sown = apply(layer, example()[1])
    dropped, without_expert, used = np.asarray(sown["dispatch"][0])
    assert used == 1.0
    assert 0 < without_expert < 1
    assert dropped == 0


def test_a_decoders_tokens_choose_from_left_to_right():
    # One choice: second choices take the places that all first ones, also later tokens', leave.
    settings = {"routing": "experts", "top_k": 1, "priority": "probability"}
    settings |= {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 1}
    encoder = make_layer(**settings)
    decoder = encoder.clone(is_causal=True)
    _, x, _ = example()
    changed = x * np.where(np.arange(LENGTH) < 6, 1, -1)[:, None].astype(np.float32)
    before, after = (apply(decoder, each)[0][:, :6] for each in (x, changed))
    np.testing.assert_allclose(after, before, atol=1e-6)
    before, after = (apply(encoder, each)[0][:, :6] for each in (x, changed))
    assert np.abs(after - before).max() > 1e-2


def test_dispatch_statistics():
    # All tokens go to one expert, which has 2 places in each row.
    _, x, valid = example()
    y, sown = apply(make_layer(capacity=2), np.broadcast_to(x[:1, :1], x.shape), valid)
    dropped, without_expert, used = np.asarray(sown["dispatch"][0])
    np.testing.assert_allclose([dropped, without_expert], 1 - 4 / 19, rtol=1e-6)
    np.testing.assert_allclose(used, 4 / (3 * 4 * 2))
    np.testing.assert_array_equal(np.any(np.asarray(y), -1).sum(1), [2, 2, 0])
    statistics = dict(zip(STATISTICS, np.asarray(sown["statistics"][0]), strict=True))
    assert statistics["load"] == 4.0
    assert statistics["dead"] == 0.75


def test_jitter_reaches_the_router_alone():
    layer = make_layer(jitter=0.5, combine="straight", top_k=1)
    _, x, valid = example()
    y, sown = apply(layer, x, valid, deterministic=False)
    expected, expected_sown = apply(layer, x, valid)
    # The weight of the only expert is 1, so tokens that kept their expert have the same output.
    is_same = np.isclose(y, expected, atol=1e-6).all(-1) & valid
    assert is_same.sum() > valid.sum() / 2
    entropies = [each["statistics"][0][0] for each in (sown, expected_sown)]
    assert abs(entropies[0] - entropies[1]) > 1e-3


def test_dropout_is_shared_by_the_positions_of_a_row():
    _, x, valid = example()
    same = np.broadcast_to(x[:1, :1], x.shape)  # all go to one expert
    limited, unlimited = (
        np.asarray(apply(make_layer(expert_dropout_rate=0.5, **each), same, valid, False)[0])
        for each in ({"capacity": 11}, {"capacity_factor": None})
    )
    np.testing.assert_allclose(limited[:, :11], unlimited[:, :11], atol=1e-6)
    np.testing.assert_allclose(limited[0, :11], np.tile(limited[0, :1], (11, 1)), atol=1e-6)
    assert np.abs(limited[0, 0] - limited[1, 0]).max() > 1e-3
    plain, _ = apply(make_layer(capacity=11), same, valid)
    assert np.abs(limited - plain).max() > 1e-3


def test_no_array_of_all_experts_for_all_tokens():
    tokens, num_experts, mlp_dim = 106, 7, 53
    for settings in ({"capacity_factor": 1.25}, {"capacity_factor": None, "top_k": 2}):
        sparse = Sparse(num_experts=num_experts, **settings)
        layer = experts.SparseMlpBlock(sparse, mlp_dim)
        x = jax.ShapeDtypeStruct((1, tokens, 11), jnp.float32)
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        info = TokenInfo(deterministic=False)

        def loss(variables, x, layer=layer, info=info):
            return jnp.sum(layer.apply(variables, x, info, mutable=["routers"])[0])

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = grad.lower({"params": variables["params"]}, x).compile()
        largest = max_size(compiled.as_text())
        capacity = sparse.group_capacity(tokens, False) or tokens
        assert largest < tokens * num_experts * min(capacity, mlp_dim), settings


def test_no_limit_multiplies_each_token_with_its_experts_alone():
    """`jax.lax.ragged_dot` would multiply it with all, on a CPU."""
    tokens, features, mlp_dim = 1024, 16, 32
    layer = experts.SparseMlpBlock(Sparse(num_experts=8, capacity_factor=None), mlp_dim)
    x = jax.ShapeDtypeStruct((1, tokens, features), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    compiled = jax.jit(layer.apply).lower(variables, x).compile()
    chosen = 3 * 2 * tokens * features * mlp_dim  # wi_0, wi_1 and wo of one expert
    router = 2 * tokens * features * 8
    assert compiled.cost_analysis()["flops"] < 1.5 * chosen + router
    # XLA counts a loop's body once; here are the rows of its blocks.
    probs = jax.random.uniform(jax.random.key(0), (1, tokens, 8))
    chosen_experts, _ = dispatch.choose_experts(probs, 1)
    needs_slot = jnp.ones(chosen_experts.shape, bool)
    routing = dispatch.assign_places(chosen_experts, needs_slot, 8)
    size = dispatch.block_size(tokens, 8)
    blocks = dispatch.slots_in_blocks(chosen_experts, *routing, needs_slot, size)
    assert tokens <= blocks.used * size <= 1.5 * tokens


def max_size(hlo):
    """Returns the largest number of values of an array in a compiled program."""
    shapes = re.findall(r"\b(?:f32|s32|u32|pred|bf16|f64)\[([\d,]+)\]", hlo)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_experts": 1}, "NUM_EXPERTS must be an integer of at least 2, got 1"),
        ({"num_experts": 8.0}, "NUM_EXPERTS must be an integer of at least 2, got 8.0"),
        ({"top_k": 0}, "TOP_K must be a positive integer, got 0"),
        ({"top_k": 9}, r"TOP_K must be at most NUM_EXPERTS \(8\), got 9"),
        ({"sparse_step": 0}, "SPARSE_STEP must be a positive integer, got 0"),
        ({"capacity_factor": 0}, "CAPACITY_FACTOR must be None or a positive number, got 0"),
        ({"capacity_factor": float("nan")}, "CAPACITY_FACTOR must be .* got nan"),
        ({"eval_capacity_factor": "2"}, "EVAL_CAPACITY_FACTOR must be .* got '2'"),
        ({"group": "batch"}, "GROUP must be 'row' or a positive integer, got 'batch'"),
        ({"routing": "both"}, "ROUTING must be one of 'tokens', 'experts', got 'both'"),
        ({"combine": "sum"}, "COMBINE must be one of .* got 'sum'"),
        ({"combine": "normalized"}, "COMBINE='normalized' with TOP_K=1"),
        ({"routing": "experts", "capacity_factor": None}, "CAPACITY_FACTOR must be a number"),
        ({"jitter": 1.0}, r"JITTER must be in \[0, 1\), got 1.0"),
        ({"balance_loss": -1}, "BALANCE_LOSS must be a number of at least 0, got -1"),
        ({"extra_mlp": 1}, "EXTRA_MLP must be True or False, got 1"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(errors.InputError, match=message):
        Sparse(**settings)
