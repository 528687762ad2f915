"""MoV's fused kernels in Pallas's interpret mode, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_mov
import pytest

from pemoe_jax.core import routing
from pemoe_jax.core.adapters import VectorExperts
from pemoe_jax.core.kernels import mov
from pemoe_jax.core.routing import Router


def fused(y, kernel, vectors):
    """Returns the kernels' product."""
    return mov.route_and_scale(y, kernel, vectors, jnp.ones(y.shape[:2]), True)[0]


def plain(y, kernel, vectors):
    return plain_mov.route_and_scale(y, kernel, vectors, jnp.ones(y.shape[:2]))[0]


def draw(shape, experts, dtype=jnp.float32):
    """y, the router's kernel, vectors, and a cotangent of y."""
    rng = np.random.default_rng(0)
    *heads, features = shape[2:]
    shapes = shape, (features, experts), (*heads, experts, features), shape
    y, kernel, vectors, g = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
    return y.astype(dtype), 0.3 * kernel, vectors, g.astype(dtype)


def value_and_gradients(function, y, kernel, vectors, g):
    out, pullback = jax.vjp(function, y, kernel, vectors)
    return out, *pullback(g)


def assert_close(actual, expected, tolerance):
    """Asserts equal shapes and dtypes, and values within a fraction of the largest one."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max() + 1e-6


# One tile of features (as at key and value) and several (as at gate); no size is a power of two.
@pytest.mark.parametrize(
    ("shape", "experts"),
    [
        ((2, 37, 3, 24), 1),
        ((2, 37, 3, 24), 10),
        ((1, 70, 2, 200), 30),
        ((1, 5, 300), 1),
        ((1, 5, 300), 30),
    ],
    ids=str,
)
def test_equals_the_plain_form(shape, experts):
    args = draw(shape, experts)
    actual = jax.jit(functools.partial(value_and_gradients, fused))(*args)
    assert_close(actual, value_and_gradients(plain, *args), 1e-5)


@pytest.mark.parametrize("shape", [(2, 37, 3, 24), (2, 37, 300)], ids=["heads", "features"])
def test_bfloat16(shape):
    """Within 2⁻⁶ of the largest value of the plain form, which has as many roundings; within 2⁻⁷ of
    the exact result, since gradients are rounded to 8 bits twice.
    """
    args = draw(shape, 10, jnp.bfloat16)
    actual = jax.jit(functools.partial(value_and_gradients, fused))(*args)
    assert_close(actual, value_and_gradients(plain, *args), 2**-6)
    exact = [a.astype(jnp.float32) for a in args]
    for a, b in zip(actual, value_and_gradients(plain, *exact), strict=True):
        assert np.abs(np.asarray(a, np.float32) - b).max() <= 2**-7 * np.abs(b).max()


def test_sums_over_rows_in_parts(monkeypatch):
    """9 tiles of rows: each program sums over 3 or 5, the last one over the rest."""
    monkeypatch.setattr(mov, "_MAX_PROGRAMS", 6)
    for shape in ((3, 180, 2, 8), (3, 180, 260)):
        args = draw(shape, 3)
        actual = jax.jit(functools.partial(value_and_gradients, fused))(*args)
        assert_close(actual, value_and_gradients(plain, *args), 1e-5)


@pytest.mark.parametrize("shape", [(2, 137, 3, 24), (2, 37, 300)], ids=["heads", "features"])
def test_sums(shape):
    """Sums span several tiles of rows, ignore tokens of weight 0 and have no gradient."""
    y, kernel, vectors, g = draw(shape, 10)
    weights = jnp.asarray(np.random.default_rng(1).random(shape[:2]) < 0.7, jnp.float32)

    def run(y, kernel, vectors):
        return mov.route_and_scale(y, kernel, vectors, weights, True)

    (_, sums), pullback = jax.vjp(run, y, kernel, vectors)
    _, expected = plain_mov.route_and_scale(y, kernel, vectors, weights)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(pullback((g, sums)), pullback((g, jnp.zeros_like(sums))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("around", ["grad", "scan", "remat"])
def test_under_transformations(around):
    """Gradients with respect to y, kernel and vectors, through three layers in sequence."""

    def loss(function, y, kernel, vectors):
        if around == "remat":
            function = jax.checkpoint(function)
        if around == "scan":
            y, _ = jax.lax.scan(
                lambda y, _: (function(y, kernel, vectors), None), y, None, length=3
            )
        else:
            for _ in range(3):
                y = function(y, kernel, vectors)
        return jnp.sum(jnp.sin(y))

    *args, _ = draw((2, 5, 2, 8), 3)
    gradients = [
        jax.jit(jax.grad(functools.partial(loss, function), argnums=(0, 1, 2)))(*args)
        for function in (fused, plain)
    ]
    assert_close(*gradients, 1e-5)


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(10, jnp.bfloat16), (30, jnp.float32), (60, jnp.bfloat16), (60, jnp.float32)],
)
@pytest.mark.parametrize("features", [(16, 64), (64, 64), (2816,), (5120,), (10240,)], ids=str)
def test_lowers_for_a_gpu(features, experts, dtype):
    """T5 v1.1's layers, Large to XXL, become Triton kernels: one forward and one backward, or two.

    With this number of tokens, some programs have fewer tiles than others. Where tiles divide
    the sizes, y is not copied into a padded array.
    """
    y = jax.ShapeDtypeStruct((7, 1024, *features), dtype)
    kernel = jax.ShapeDtypeStruct((features[-1], experts), jnp.float32)
    vectors = jax.ShapeDtypeStruct((*features[:-1], experts, features[-1]), jnp.float32)

    def product(y, kernel, vectors):
        return mov.route_and_scale(y, kernel, vectors, jnp.ones(y.shape[:2]))[0]

    traced = jax.jit(functools.partial(value_and_gradients, product)).trace(y, kernel, vectors, y)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == (2 if len(features) == 2 else 4)
    padded = [line for line in text.splitlines() if "stablehlo.pad" in line]
    assert not [line for line in padded if "tensor<7168x" in line.split("->")[-1]]


# --- the module that uses them ---


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Uses the kernels, interpreted, as on a GPU; returns the list of their calls."""
    calls = []
    function = functools.partial(mov.route_and_scale, interpret=True)

    def record_call(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(mov, "is_supported", lambda: True)
    monkeypatch.setattr(mov, "route_and_scale", record_call)
    return calls


def layer(shape, **settings):
    axes = ("heads", "kv") if len(shape) == 4 else ("mlp",)
    return VectorExperts(
        num_experts=4, router=functools.partial(Router, **settings), fused=True, y_axes=axes
    )


def outcome(module, shape, mutable=("routers",)):
    """Returns the module's output, statistics and other collections, and its gradients."""
    rng = np.random.default_rng(0)
    x, y = jnp.ones((2, 3, 5)), jnp.asarray(rng.standard_normal(shape), jnp.float32)
    tokens = routing.TokenInfo(valid=jnp.asarray([[1, 1, 0], [1, 0, 0]]))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, y)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)

    def loss(params, y):
        out, actual = module.apply({"params": params}, x, y, tokens, mutable=mutable)
        (statistics,) = actual["routers"]["statistics"]
        return jnp.sum(jnp.sin(out)) + statistics[-1], (out, statistics, actual)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, y)


SOFT = [{}, {"temperature": 0.5}, {"reads": "y"}, {"top_k": 4}]


@pytest.mark.parametrize("settings", SOFT, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 2, 7), (2, 3, 7)], ids=["heads", "features"])
def test_soft_routers_use_the_kernels(shape, settings, on_a_gpu):
    """Output, gradients and statistics are those of the plain layer."""
    actual = outcome(layer(shape, **settings), shape)
    assert on_a_gpu
    expected = outcome(layer(shape, **settings).clone(fused=False), shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
    )


OTHERS = [{"top_k": 2}, {"reads": "x"}, {"balance_loss": 0.1}, {"z_loss": 0.1}]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_other_routers_do_not(settings, on_a_gpu):
    outcome(layer((2, 3, 2, 7), **settings), (2, 3, 2, 7))
    assert not on_a_gpu


def test_probabilities_are_computed_without_the_kernels(on_a_gpu):
    _, actual = outcome(layer((2, 3, 2, 7)), (2, 3, 2, 7), mutable=("routers", "intermediates"))[0]
    (probs,) = actual[-1]["intermediates"]["probs"]
    assert probs.shape == (2, 3, 2, 4) and not on_a_gpu


def test_the_kernels_replace_the_router(on_a_gpu):
    """The layer has no softmax and no product outside of the kernels."""
    module, shape = layer((2, 3, 7)), (2, 3, 7)
    x, y = jnp.ones((2, 3, 5)), jnp.ones(shape)
    params = jax.eval_shape(module.init, jax.random.key(0), x, y)["params"]

    def run(params, y):
        return module.apply({"params": params}, x, y, mutable=["routers"])

    primitives = [equation.primitive.name for equation in jax.make_jaxpr(run)(params, y).eqns]
    assert on_a_gpu and "exp" not in primitives and "dot_general" not in primitives


def test_jitter_is_noise_only_in_training():
    router = Router(num_experts=4, jitter_noise=0.1)
    assert router.is_soft(None) and router.is_soft(routing.TokenInfo())
    assert not router.is_soft(routing.TokenInfo(deterministic=False))


def test_fused_falls_back_without_a_gpu():
    assert not mov.is_supported()
    actual, expected = (
        outcome(layer((2, 3, 7)).clone(fused=fused), (2, 3, 7)) for fused in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
