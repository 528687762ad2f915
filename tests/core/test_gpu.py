"""The GPU kernels against the plain forms: `python -m pytest tests/core/test_gpu.py`.

Needs an NVIDIA GPU, jax, flax and optax; add `--noconftest` if nothing else is installed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_mov
import pytest

from pemoe_jax.core import adapters, attention, network, params, routing, steps
from pemoe_jax.core.kernels import mov

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

EXACT = jax.default_matmul_precision("highest")


def relative(actual, expected):
    """Returns the largest difference relative to the largest value."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def segment_ids(rows, queries, keys):
    """Returns segment ids of queries and keys: some packed examples, then padding."""
    rng = np.random.default_rng(0)
    query_ids, key_ids = (np.sort(rng.integers(1, 4, (rows, n)), axis=1) for n in (queries, keys))
    query_ids[:, -3:] = key_ids[:, -3:] = 0
    return jnp.asarray(query_ids, jnp.int32), jnp.asarray(key_ids, jnp.int32)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "causal", "biased"),
    [
        (64, 64, 4, False, True),
        (1024, 1024, 2, False, True),
        (300, 300, 3, True, True),
        (33, 98, 2, False, False),
        (256, 1024, 2, False, False),
    ],
)
def test_fused_attention(queries, keys, heads, causal, biased):
    """bfloat16 against the plain form in float32: within 2 % of the largest value."""
    q, k, v, g = (
        jax.random.normal(jax.random.key(i), (3, n, heads, 64)).astype(jnp.bfloat16)
        for i, n in enumerate((queries, keys, keys, queries))
    )
    q /= 8
    segments = attention.SegmentMask(*segment_ids(3, queries, keys), causal)
    has_key = jnp.any(segments.to_bool(), axis=(1, 3))[:, :, None, None]
    g = jnp.where(has_key, g, 0)  # queries without a key are padding, which has no gradient
    bias = None
    if biased:
        bias = jax.random.normal(jax.random.key(9), (1, heads, queries, keys)).astype(jnp.bfloat16)

    def run(implementation, *inputs):
        def attend(*inputs):
            mask_and_bias = attention.prepare_mask_and_bias(implementation, segments, bias)
            return attention.dot_product_attention(*inputs, *mask_and_bias, None, implementation)

        out, pullback = jax.vjp(attend, *inputs)
        return jnp.where(has_key, out, 0), *pullback(g.astype(out.dtype))

    with EXACT:
        f32 = [x.astype(jnp.float32) for x in (q, k, v)]
        expected = jax.jit(functools.partial(run, "plain"))(*f32)
    actual = jax.jit(functools.partial(run, "fused"))(q, k, v)
    again = jax.jit(functools.partial(run, "fused"))(q, k, v)
    for a, b, same in zip(actual, expected, again, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative(a, b) < 0.02
        assert (a == same).all()


@pytest.mark.parametrize("features", [(96,), (2816,), (16, 64)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "experts"),
    [("float32", 2), ("float32", 30), ("bfloat16", 10), ("bfloat16", 60)],
)
def test_fused_mov(features, dtype, experts):
    """float32 within 1e-5 of the plain form; bfloat16 within 1 % of it in float32.

    There are enough tokens that programs sum over several tiles of rows, some over fewer.
    """
    shape = (5, 777, *features)
    y, g = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2))
    kernel = jax.random.normal(jax.random.key(2), (features[-1], experts)) / features[-1] ** 0.5
    vectors = jax.random.normal(jax.random.key(3), (*features[:-1], experts, features[-1]))
    weights = (jax.random.uniform(jax.random.key(4), shape[:2]) < 0.7).astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, g, *args):
        out, pullback, sums = jax.vjp(lambda *args: function(*args, weights), *args, has_aux=True)
        return sums, out, *pullback(g)

    f32 = (y.astype(jnp.float32), kernel, vectors)
    with EXACT:
        expected = run(plain_mov.route_and_scale, g.astype(jnp.float32), *f32)
    actual = run(mov.route_and_scale, g, y, kernel, vectors)
    bound = 1e-5 if dtype == "float32" else 0.01
    assert relative(actual[0], expected[0]) < 1e-3
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert relative(a, b) < bound


@pytest.mark.parametrize("scan", [False, True])
def test_whole_step(scan):
    """A packed bfloat16 step of MoV: the kernels' loss and gradients match the plain forms'."""
    config = network.T5Config(
        vocab_size=512,
        emb_dim=128,
        num_heads=2,
        mlp_dim=256,
        dtype="bfloat16",
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 512, (4, 64)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (4, 64)), axis=1).astype(np.int32)
    batch = {
        name: tokens
        for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    }
    batch |= {f"{side}_segment_ids": segments for side in ("encoder", "decoder")}

    def run(fused=False, **settings):
        factory = functools.partial(
            adapters.VectorExperts, num_experts=10, router=routing.Router, fused=fused
        )
        sites = adapters.Adapters(**dict.fromkeys(("key", "value", "gate"), factory))
        model = network.Transformer(dataclasses.replace(config, **settings), sites)
        all_params = network.init_params(model, 0, lambda path: True)
        trainable, frozen = params.split(all_params, [params.ADAPTER_PATTERN])
        keys = iter(jax.random.split(jax.random.key(1), 99))
        trainable = jax.tree.map(
            lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), trainable
        )
        frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
        step = jax.jit(functools.partial(steps.grads_and_metrics, model, steps.Loss()))
        grads, metrics = step(trainable, frozen, batch)
        return float(metrics["loss"]), params.flatten(grads)

    loss, grads = run(attention="fused", fused=True, scan_layers=scan)
    plain_loss, plain_grads = run()
    assert loss == pytest.approx(plain_loss, rel=5e-3)
    for path, expected in plain_grads.items():
        error = np.linalg.norm(grads[path] - expected)
        assert error < 0.1 * np.linalg.norm(expected), path
