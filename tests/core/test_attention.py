"""Implementations of attention: equal values and gradients, and memory."""

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
    """Returns query, key, value, mask, bias and dropout mask; the first query has no key."""
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
    """Attention in float64, one head and one query at a time."""
    out = np.zeros(query.shape)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    for b, h, i in np.ndindex(B, H, query.shape[1]):
        logits = k[b, :, h] @ q[b, i, h]
        if bias is not None:
            logits = logits + np.asarray(bias)[0, h, i]
        if mask is not None:
            row = np.asarray(mask)[b, 0, i if mask.shape[2] > 1 else 0]
            logits = np.where(row, logits, -1e10)
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        if dropout_mask is not None:
            probs = probs * np.asarray(dropout_mask)[b, h, 0]
        out[b, i, h] = probs @ v[b, :, h]
    return out


def run(implementation, query, key, value, mask, bias, dropout_mask):
    """Returns the output, and a sum of squares' gradients to query, key, value and the bias."""

    def total(query, key, value, bias):
        out = attention.dot_product_attention(
            query, key, value, mask, bias, dropout_mask, implementation
        )
        return jnp.sum(jnp.square(out.astype(jnp.float32))), out

    step = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)
    (_, out), grads = jax.jit(step)(query, key, value, bias)
    return out, jax.tree.leaves(grads)


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize("queries", [8, 11, 3])
@pytest.mark.parametrize("without", [(), (3,), (4, 5)], ids=["all", "no mask", "no bias, dropout"])
def test_equals_the_definition(monkeypatch, implementation, queries, without):
    """Chunks of 4 queries: lengths that it divides, that it does not, and below one chunk."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    inputs = [None if i in without else x for i, x in enumerate(arrays(queries, 5))]
    out, grads = run(implementation, *inputs)
    expected = by_definition(*inputs)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    inference = functools.partial(attention.dot_product_attention, implementation=implementation)
    np.testing.assert_allclose(jax.jit(inference)(*inputs), expected, rtol=1e-5, atol=1e-5)
    if implementation != "plain":
        for a, b in zip(grads, run("plain", *inputs)[1], strict=True):
            assert largest_difference(a, b) < 1e-5


def test_a_mask_of_keys_alone(monkeypatch):
    """[B, 1, 1, Lk], as in cross-attention of rows that are not packed."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    query, key, value, mask, _, _ = arrays(10, 5)
    inputs = (query, key, value, mask[:, :, 1:2], None, None)
    out, _ = run("chunked", *inputs)
    np.testing.assert_allclose(out, by_definition(*inputs), rtol=1e-5, atol=1e-5)


def test_segment_mask_by_hand():
    """Two segments and padding; causal: no key to the right."""
    ids = jnp.array([[1, 2, 2, 0]])
    same = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    mask = attention.SegmentMask(ids, ids).to_bool()
    np.testing.assert_array_equal(mask, np.array([[same]], bool))
    causal = attention.SegmentMask(ids, ids, causal=True).to_bool()
    np.testing.assert_array_equal(causal, np.tril(np.array([[same]], bool)))
    all_keys = attention.SegmentMask(None, ids).to_bool()
    np.testing.assert_array_equal(all_keys, [[[[True, True, True, False]]]])


def test_bfloat16(monkeypatch):
    """Values equal those of 'plain'; gradients of keys and values are sums of rounded terms."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    inputs = arrays(11, 5, jnp.bfloat16)
    (out, grads), (expected, expected_grads) = run("chunked", *inputs), run("plain", *inputs)
    assert out.dtype == jnp.bfloat16
    assert largest_difference(out, expected) < 2**-8
    for a, b in zip(grads, expected_grads, strict=True):
        assert largest_difference(a, b) < 0.02


def test_chunks_take_less_memory():
    """1024 queries and keys: the logits [1, 8, 1024, 1024] in float32 are 34 MB, a chunk's 8 MB."""
    shape = jax.ShapeDtypeStruct((1, 1024, 8, 64), jnp.float32)

    def temporaries(implementation):
        def total(*inputs):
            return jnp.sum(
                attention.dot_product_attention(*inputs, None, None, None, implementation)
            )

        lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape, shape, shape)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    plain, chunked = temporaries("plain"), temporaries("chunked")
    assert plain > 2 * 33.5e6 and chunked < 0.6 * plain


@pytest.mark.parametrize("loop", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whole_network(monkeypatch, loop):
    """Packed rows with dropout: the same dropout masks, loss and gradients, also in a loop."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", 5)
    batch, rng = pack(example_batch()), jax.random.key(0)
    trainable, frozen = params.split(random_params("ia3"), METHODS["ia3"].trainable)
    execution = {"scan_layers": True, "remat_policy": "minimal"} if loop else {}

    def run_step(implementation):
        config = dataclasses.replace(
            CONFIG, dropout_rate=0.2, attention=implementation, **execution
        )
        model = network.Transformer(config, METHODS["ia3"].adapters())
        step = jax.jit(functools.partial(steps.grads_and_metrics, model, steps.Loss()))
        grads, metrics = step(trainable, frozen, batch, rng)
        return float(metrics["loss"]), params.flatten(grads)

    (expected_loss, expected), (loss, grads) = run_step("plain"), run_step("chunked")
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for path, gradient in expected.items():
        assert largest_difference(grads[path], gradient) < 1e-5, path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash"}, "ATTENTION must be one of .*'chunked', 'fused'.*, got 'flash'"),
        ({"attention": "fused"}, "ATTENTION 'fused' needs DTYPE 'bfloat16', got 'float32'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_fused_has_no_gradient_of_the_bias():
    """Trainable biases are an error; frozen ones are not, even if other arrays have gradients."""
    mask, bias = jnp.ones((1, 1, 4, 4), bool), jnp.zeros((1, 2, 4, 4))

    def total(bias, other):
        _, prepared = attention.prepare_mask_and_bias("fused", mask, bias)
        return jnp.sum(prepared.astype(jnp.float32) * other)

    assert jax.grad(total, argnums=1)(bias, 2.0) == 0
    with pytest.raises(InputError, match="ATTENTION 'fused' needs frozen relative position biases"):
        jax.grad(total)(bias, 2.0)
