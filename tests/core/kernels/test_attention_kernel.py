"""The fused attention kernels in Pallas's interpret mode, and lowered for a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import CONFIG, METHODS, example_batch, largest_difference, pack

from pemoe_jax.core import attention, network, params, partitioning, steps
from pemoe_jax.core.kernels import attention as attention_kernels


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernels in interpret mode; returns the shape of the queries of each call."""
    calls, kernels = [], attention_kernels.fused_attention

    def fused_attention(*args, causal):
        calls.append(args[0].shape)
        return kernels(*args, causal, True)

    monkeypatch.setattr(attention_kernels, "fused_attention", fused_attention)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return calls


def arrays(queries, keys, heads=2, size=16, packed=True):
    """Returns (query, key, value), cotangent, bias, and segment ids of examples and padding."""
    rng = np.random.default_rng(queries + keys)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    def segment_ids(length):
        ids = np.sort(rng.integers(1, 4 if packed else 2, (2, length)), axis=1)
        ids[:, length - length // 10 :] = 0
        return jnp.asarray(ids, jnp.int32)

    query_ids = segment_ids(queries)
    key_ids = query_ids if queries == keys else segment_ids(keys)
    inputs = draw(2, queries, heads, size) / 4, *(draw(2, keys, heads, size) for _ in range(2))
    bias = draw(1, heads, queries, keys)
    return inputs, draw(2, queries, heads, size), bias, (query_ids, key_ids)


def value_and_gradients(attend, segments, cotangent, *inputs):
    """Returns output and gradients of queries that have a key; those of padding are undefined."""
    has_key = jnp.any(segments.to_bool(), axis=(1, 3))[:, :, None, None]
    out, pullback = jax.vjp(attend, *inputs)
    cotangent = jnp.where(has_key, cotangent, 0).astype(out.dtype)
    return jnp.where(has_key, out, 0), *pullback(cotangent)


def assert_equals_plain(segments, bias, dropout_mask, cotangent, inputs):
    """bfloat16 against 'plain' in float32: within 1 % of the largest value."""

    def run(implementation, inputs):
        def attend(*inputs):
            prepared = attention.prepare_mask_and_bias(implementation, segments, bias)
            return attention.dot_product_attention(*inputs, *prepared, dropout_mask, implementation)

        return value_and_gradients(attend, segments, cotangent, *inputs)

    expected = run("plain", [x.astype(jnp.float32) for x in inputs])
    for a, b in zip(run("fused", inputs), expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert largest_difference(a, b) < 0.01 * jnp.max(jnp.abs(b))


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "biased", "packed"),
    [
        (64, 64, False, True, True),
        (130, 130, True, True, True),
        (130, 130, True, True, False),
        (33, 150, False, False, True),
        (150, 20, False, True, False),
        (7, 7, True, False, True),
    ],
)
def test_equals_plain(interpreted, queries, keys, causal, biased, packed):
    """One or several tiles, full or partial."""
    inputs, cotangent, bias, ids = arrays(queries, keys, packed=packed)
    segments = attention.SegmentMask(*ids, causal)
    assert_equals_plain(segments, bias if biased else None, None, cotangent, inputs)
    assert len(interpreted) == 1


def test_unpacked_cross_attention_with_dropout(interpreted):
    """All queries attend to all keys but padding; a dropped key still counts in the softmax."""
    inputs, cotangent, _, (_, key_ids) = arrays(40, 90)
    rng = np.random.default_rng(0)
    dropout_mask = jnp.asarray(rng.random((2, 2, 1, 90)) < 0.7, jnp.float32) / 0.7
    segments = attention.SegmentMask(None, key_ids)
    assert_equals_plain(segments, None, dropout_mask, cotangent, inputs)
    assert len(interpreted) == 1


@pytest.mark.parametrize(("model_parallelism", "shard"), [(1, (1, 2)), (2, (2, 1))])
def test_two_devices(interpreted, model_parallelism, shard):
    """Each device has its own rows or heads; equal to one device except for the last bit."""
    inputs, cotangent, bias, ids = arrays(70, 70)
    segments = attention.SegmentMask(*ids, True)

    def attend(*inputs):
        return attention.dot_product_attention(*inputs, segments, bias, None, "fused")

    def run(*inputs):
        return value_and_gradients(attend, segments, cotangent, *inputs)

    expected = jax.jit(run)(*inputs)
    mesh = partitioning.make_mesh(model_parallelism, jax.devices()[:2])
    with jax.set_mesh(mesh):
        actual = jax.jit(run)(*inputs)
    (rows, _, heads, _) = interpreted[-1]
    assert (rows, heads) == shard
    for a, b in zip(actual, expected, strict=True):
        assert largest_difference(a, b) < 2**-8 * jnp.max(jnp.abs(b))


def test_a_mesh_that_does_not_divide_the_heads_falls_back(interpreted):
    inputs, _, _, ids = arrays(20, 20, heads=3)
    mesh = partitioning.make_mesh(2, jax.devices()[:2])
    with jax.set_mesh(mesh):
        segments = attention.SegmentMask(*ids)
        attention.dot_product_attention(*inputs, segments, None, None, "fused")
    assert not interpreted


def test_tiles_without_a_common_segment_are_skipped():
    """Two examples of 128 tokens and 64 of padding: tiles of 64 visit those of their example."""
    ids = jnp.repeat(jnp.asarray([1, 1, 2, 2, 0]), 64)[None]
    x = jnp.zeros((1, 320, 1, 16), jnp.bfloat16)
    call = attention_kernels._Call(x, x, False, True)
    first, end = call._visited_tiles(ids, ids, "queries")
    assert (end - first).tolist() == [[2, 2, 2, 2, 0]] and first.tolist()[0][:4] == [0, 0, 2, 2]
    causal = attention_kernels._Call(x, x, True, True)
    first, end = causal._visited_tiles(ids, ids, "keys")
    assert first.tolist()[0][:4] == [0, 1, 2, 3] and (end - first).tolist() == [[2, 1, 2, 1, 0]]


def whole_step(**settings):
    """Returns loss and gradients of packed rows with dropout."""
    batch, adapters = pack(example_batch()), METHODS["ia3"].adapters()
    config = dataclasses.replace(CONFIG, dropout_rate=0.2, head_dim=16)
    all_params = network.init_params(network.Transformer(config, adapters), 1, lambda path: True)
    keys = iter(jax.random.split(jax.random.key(1), 999))
    all_params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), all_params
    )
    trainable, frozen = params.split(all_params, METHODS["ia3"].trainable)
    model = network.Transformer(dataclasses.replace(config, **settings), adapters)
    step = jax.jit(functools.partial(steps.grads_and_metrics, model, steps.Loss()))
    grads, metrics = step(trainable, frozen, batch, jax.random.key(0))
    return metrics["loss"], params.flatten(grads)


@pytest.mark.parametrize(
    "execution", [{}, {"scan_layers": True, "remat_policy": "minimal"}], ids=["unrolled", "loop"]
)
def test_whole_network(interpreted, execution):
    """Loss and gradients are about as close to float32 as those of 'plain' in bfloat16."""
    # A loop draws other dropout masks than unrolled layers, so each has plain steps of its own.
    exact_loss, exact_grads = whole_step(**execution)
    plain_loss, plain_grads = whole_step(dtype="bfloat16", **execution)
    fused_loss, fused_grads = whole_step(dtype="bfloat16", attention="fused", **execution)
    assert interpreted
    assert abs(fused_loss - exact_loss) < 2 * abs(plain_loss - exact_loss) + 0.01
    for path, exact in exact_grads.items():
        plain_error = np.linalg.norm(plain_grads[path] - exact)
        fused_error = np.linalg.norm(fused_grads[path] - exact)
        assert fused_error < 1.5 * plain_error + 0.01 * np.linalg.norm(exact), path


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "heads", "causal", "biased"),
    [
        (16, 1024, 1024, 32, False, True),
        (16, 256, 256, 16, True, True),
        (8, 256, 1024, 64, False, False),
        (2, 33, 98, 2, False, True),
    ],
)
def test_lowers_for_a_gpu(rows, queries, keys, heads, causal, biased):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def run(query, key, value, cotangent, query_ids, key_ids, bias):
        def attend(query, key, value):
            return attention_kernels.fused_attention(
                query, key, value, query_ids, key_ids, bias, causal
            )

        out, pullback = jax.vjp(attend, query, key, value)
        return out, pullback(cotangent)

    inputs = [shape(rows, n, heads, 64) for n in (queries, keys, keys, queries)]
    inputs += [shape(rows, n, dtype=jnp.int32) for n in (queries, keys)]
    inputs.append(shape(1, heads, queries, keys) if biased else None)
    text = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
