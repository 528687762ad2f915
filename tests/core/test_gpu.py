"""The kernels that only a GPU runs, against the plain forms.

Run `python -m pytest tests/core/test_gpu.py`.

It needs an NVIDIA GPU, jax, flax and optax; `--noconftest` where nothing else is installed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core import adapters, attention, network, params, routing, steps
from pemoe_jax.core.kernels import mov

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")

EXACT = jax.default_matmul_precision("highest")


def relative(found, wanted):
    """The largest difference over the largest value."""
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    return np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))


def numbers(rows, queries, keys):
    """Of some examples a row, and padding at the end, for `attention.SegmentMask`."""
    rng = np.random.default_rng(0)
    of_queries, of_keys = (np.sort(rng.integers(1, 4, (rows, n)), axis=1) for n in (queries, keys))
    of_queries[:, -3:] = of_keys[:, -3:] = 0
    return jnp.asarray(of_queries, jnp.int32), jnp.asarray(of_keys, jnp.int32)


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
    readable = attention.SegmentMask(*numbers(3, queries, keys), causal)
    has = jnp.any(readable.to_bool(), axis=(1, 3))[:, :, None, None]
    g = jnp.where(has, g, 0)  # rows without a key have no gradient in a network either
    bias = None
    if biased:
        bias = jax.random.normal(jax.random.key(9), (1, heads, queries, keys)).astype(jnp.bfloat16)

    def run(way, *of):
        mask, added = attention.prepare_mask_and_bias(way, readable, bias)
        out, pull = jax.vjp(
            lambda *of: attention.dot_product_attention(*of, mask, added, None, way), *of
        )
        return jnp.where(has, out, 0), *pull(g.astype(out.dtype))

    with EXACT:
        f32 = [x.astype(jnp.float32) for x in (q, k, v)]
        wanted = jax.jit(functools.partial(run, "plain"))(*f32)
    found = jax.jit(functools.partial(run, "fused"))(q, k, v)
    again = jax.jit(functools.partial(run, "fused"))(q, k, v)
    for one, other, same in zip(found, wanted, again, strict=True):
        assert one.dtype == jnp.bfloat16
        assert relative(one, other) < 0.02
        assert (one == same).all()


@pytest.mark.parametrize("features", [(96,), (2816,), (16, 64)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "experts"),
    [("float32", 2), ("float32", 30), ("bfloat16", 10), ("bfloat16", 60)],
)
def test_fused_mov(features, dtype, experts):
    """float32 within 1e-5 of the plain form; bfloat16 within 1 % of it in float32.

    Of so many tokens that programs sum over several tiles of rows, and some over fewer.
    """
    shape = (5, 777, *features)
    y, g = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2))
    kernel = jax.random.normal(jax.random.key(2), (features[-1], experts)) / features[-1] ** 0.5
    vectors = jax.random.normal(jax.random.key(3), (*features[:-1], experts, features[-1]))
    weights = (jax.random.uniform(jax.random.key(4), shape[:2]) < 0.7).astype(jnp.float32)
    total = jnp.sum(weights)[None] * (features[0] if len(features) == 2 else 1)

    def plain(y, kernel, vectors):
        logits = y @ kernel
        probs = jax.nn.softmax(logits)
        names = "blhe,hek->blhk" if len(features) == 2 else "ble,ek->blk"
        counts = jnp.broadcast_to(jnp.expand_dims(weights, range(2, y.ndim)), (*y.shape[:-1], 1))
        told = routing.compute_statistics(logits, probs, probs, counts)
        return y * jnp.einsum(names, probs, vectors), told

    def fused(y, kernel, vectors):
        out, (soft, chosen, entropy, z) = mov.route_and_scale(y, kernel, vectors, weights)
        return out, routing.statistics_from_sums(
            routing.StatisticSums(soft, chosen, soft, entropy, z, total)
        )

    def run(way, g, *of):
        out, pull, told = jax.vjp(way, *of, has_aux=True)
        return told, out, *pull(g)

    f32 = (y.astype(jnp.float32), kernel, vectors)
    with EXACT:
        wanted = jax.jit(functools.partial(run, plain))(g.astype(jnp.float32), *f32)
    found = jax.jit(functools.partial(run, fused))(g, y, kernel, vectors)
    bound = 1e-5 if dtype == "float32" else 0.01
    assert np.max(np.abs(found[0] - wanted[0])) < 1e-3  # statistics
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert relative(one, other) < bound


@pytest.mark.parametrize("scan", [False, True])
def test_whole_step(scan):
    """A step of MoV, packed, bfloat16: loss and gradients of the kernels are those of plain."""
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

    def run(**how):
        fused = how.pop("fused", False)
        factory = functools.partial(
            adapters.VectorExperts, num_experts=10, router=routing.Router, fused=fused
        )
        sites = adapters.Adapters(**dict.fromkeys(("key", "value", "gate"), factory))
        model = network.Transformer(dataclasses.replace(config, **how), sites)
        both = network.init_params(model, 0, lambda path: True)
        trains, frozen = params.split(both, [params.ADAPTER_PATTERN])
        keys = iter(jax.random.split(jax.random.key(1), 99))
        trains = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), trains)
        frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
        step = jax.jit(functools.partial(steps.loss_and_grads, model, steps.Loss()))
        grads, metrics = step(trains, frozen, batch)
        return float(metrics["loss"]), params.flatten(grads)

    loss, grads = run(attention="fused", fused=True, scan_layers=scan)
    plain_loss, plain_grads = run()
    assert loss == pytest.approx(plain_loss, rel=5e-3)
    for path, wanted in plain_grads.items():
        assert np.linalg.norm(grads[path] - wanted) < 0.1 * np.linalg.norm(wanted), path
