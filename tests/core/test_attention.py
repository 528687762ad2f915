"""Ways of computing attention: equal values and gradients, and memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import CONFIG, METHODS, example_batch, largest_difference, pack, random_params

from pemoe_jax.core import attention, network, params, steps
from pemoe_jax.core.errors import InputError

B, H, K = 2, 3, 4


def arrays(queries: int, keys: int, dtype=jnp.float32):
    """query, key, value, mask, bias and dropout's factors, the first row masked whole."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    mask = jnp.asarray(rng.random((B, 1, queries, keys)) < 0.7).at[0, 0, 0].set(False)
    dropout_mask = jnp.asarray(rng.random((B, H, 1, keys)) < 0.8, jnp.float32) / 0.8
    return (
        draw(B, queries, H, K), draw(B, keys, H, K), draw(B, keys, H, K), mask,
        draw(1, H, queries, keys), dropout_mask,
    )  # fmt: skip


def by_definition(query, key, value, mask, bias, dropout_mask):
    """float64, a head and a query at a time."""
    found = np.zeros(query.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    for b, h, i in np.ndindex(B, H, query.shape[1]):
        logits = k[b, :, h] @ q[b, i, h]
        logits = logits + (0 if bias is None else np.asarray(bias)[0, h, i])
        if mask is not None:
            row = np.asarray(mask)[b, 0, i if mask.shape[2] > 1 else 0]
            logits = np.where(row, logits, -1e10)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        found[b, i, h] = (
            probs * (1 if dropout_mask is None else np.asarray(dropout_mask)[b, h, 0])
        ) @ v[b, :, h]
    return found


def run(implementation, *of):
    """(values, gradients of query, key, value and bias, where there is one) of a sum of squares."""
    query, key, value, mask, bias, dropout_mask = of

    def total(*some):
        query, key, value, *rest = some
        given = rest[0] if rest else None
        found = attention.dot_product_attention(
            query, key, value, mask, given, dropout_mask, implementation
        )
        return jnp.sum(jnp.square(found.astype(jnp.float32))), found

    given = (query, key, value) if bias is None else (query, key, value, bias)
    step = jax.value_and_grad(total, argnums=tuple(range(len(given))), has_aux=True)
    (_, found), grads = jax.jit(step)(*given)
    return found, grads


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize("queries", [8, 11, 3])
@pytest.mark.parametrize("without", [(), (3,), (4, 5)])
def test_equals_the_definition(monkeypatch, implementation, queries, without):
    """Four queries at a time: lengths that divide, that do not, and less than one chunk."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    of = [None if i in without else x for i, x in enumerate(arrays(queries, 5))]
    found, grads = run(implementation, *of)
    np.testing.assert_allclose(found, by_definition(*of), rtol=1e-5, atol=1e-5)
    alone = jax.jit(
        functools.partial(attention.dot_product_attention, implementation=implementation)
    )(*of)  # no gradient is asked for
    np.testing.assert_allclose(alone, by_definition(*of), rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, run("plain", *of)[1], strict=True):
        assert largest_difference(a, b) < 1e-5


def test_a_mask_of_keys_alone(monkeypatch):
    """[B, 1, 1, Lk], as cross-attention has it of rows that are not packed."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    query, key, value, mask, _, _ = arrays(10, 5)
    of = (query, key, value, mask[:, :, 1:2], None, None)
    np.testing.assert_allclose(run("chunked", *of)[0], by_definition(*of), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 3, 5, 7), (2, 1, 1, 7), (1, 3, 1, 7)])
def test_the_gradient_of_a_bias_is_that_of_a_sum(shape):
    rng = np.random.default_rng(0)
    logits, weights = (jnp.asarray(rng.standard_normal((2, 3, 5, 7)), jnp.float32) for _ in "ab")
    bias = jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def total(add, logits, bias):
        return jnp.sum(weights * jnp.sin(add(logits, bias)))

    one, two = (
        jax.grad(lambda *of, add=add: total(add, *of), argnums=(0, 1))(logits, bias)
        for add in (attention._with_bias, jnp.add)
    )
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-5, atol=1e-6)


def test_bfloat16(monkeypatch):
    """Values are those of plain; gradients of keys and values are sums of rounded parts."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    of = arrays(11, 5, jnp.bfloat16)
    (found, grads), (expected, plain) = run("chunked", *of), run("plain", *of)
    assert found.dtype == jnp.bfloat16
    assert largest_difference(found, expected) < 2**-8
    for a, b in zip(grads, plain, strict=True):
        assert largest_difference(a, b) < 0.02


def test_memory_falls():
    """1024 queries and keys: the logits [1, 8, 1024, 1024] in float32 are 34 MB, a chunk's 8 MB."""
    shape = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.float32)

    def temporaries(implementation):
        def total(*of):
            return jnp.sum(attention.dot_product_attention(*of, None, None, None, implementation))

        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape, shape, shape)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    plain, chunked = temporaries("plain"), temporaries("chunked")
    assert plain > 2 * 33.5e6 and chunked < 0.6 * plain


@pytest.mark.parametrize("loop", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whole_network(monkeypatch, loop):
    """Packed rows with dropout: the same masks, loss and gradients; in a loop with remat too."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 5)
    batch, rng = pack(example_batch()), jax.random.key(0)
    trainable, frozen = params.split(random_params("mov"), METHODS["mov"].trainable)
    how = {"scan_layers": True, "remat_policy": "minimal"} if loop else {}
    grads, losses = [], []
    for implementation in ("plain", "chunked"):
        config = dataclasses.replace(CONFIG, dropout_rate=0.2, attention=implementation, **how)
        model = network.Transformer(config, METHODS["mov"].adapters())
        step = jax.jit(functools.partial(steps.loss_and_grads, model, steps.Loss()))
        found, metrics = step(trainable, frozen, batch, rng)
        grads.append(params.flatten(found))
        losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for path, gradient in grads[0].items():
        assert largest_difference(grads[1][path], gradient) < 1e-5, path


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attention": "flash"}, "ATTENTION: expected one of .*'chunked', 'fused'"),
        ({"attention": "fused"}, "ATTENTION 'fused' is for DTYPE 'bfloat16', found 'float32'"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(CONFIG, **settings)


def test_what_fused_has_no_gradient_of():
    """Biases that train are refused; frozen ones, with a gradient beside them, are not."""
    mask, bias = jnp.ones((1, 1, 4, 4), bool), jnp.zeros((1, 2, 4, 4))

    def total(bias, other):
        return jnp.sum(
            attention.prepare_mask_and_bias("fused", mask, bias)[1].astype(jnp.float32) * other
        )

    assert jax.grad(total, argnums=1)(bias, 2.0) == 0
    with pytest.raises(InputError, match="ATTENTION .fused. has no gradient of the relative pos"):
        jax.grad(total)(bias, 2.0)
