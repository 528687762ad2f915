"""The fused attention kernels in Pallas's interpret mode, and lowered for a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import CONFIG, METHODS, example_batch, largest_difference, pack

from pemoe_jax.core import attention, network, params, partitioning, steps
from pemoe_jax.core.kernels import attention as attention_lib


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run here, and tell how often."""
    ran, kernels = [], attention_lib.fused_attention

    def attend(*args):
        ran.append(args[0].shape)
        return kernels(*args, True)

    monkeypatch.setattr(attention_lib, "fused_attention", attend)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    return ran


def arrays(queries, keys, heads=2, size=16, packed=True):
    """query, key, value, cotangent, bias, and who may read whom: some examples, then padding."""
    rng = np.random.default_rng(queries + keys)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    def numbers(length):
        found = np.sort(rng.integers(1, 4 if packed else 2, (2, length)), axis=1)
        found[:, length - length // 10 :] = 0
        return jnp.asarray(found, jnp.int32)

    of_queries = numbers(queries)
    of_keys = of_queries if queries == keys else numbers(keys)
    of = draw(2, queries, heads, size) / 4, *(draw(2, keys, heads, size) for _ in range(2))
    return of, draw(2, queries, heads, size), draw(1, heads, queries, keys), (of_queries, of_keys)


def run(attend, readable, g, *of):
    """Values and gradients of queries that have a key to read; the others have neither."""
    has = jnp.any(readable.to_bool(), axis=(1, 3))[:, :, None, None]
    out, pull = jax.vjp(attend, *of)
    return jnp.where(has, out, 0), *pull(jnp.where(has, g, 0).astype(out.dtype))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "biased"),
    [
        (64, 64, False, True),
        (130, 130, True, True),
        (200, 200, False, True),
        (33, 150, False, False),
        (150, 20, False, True),
        (7, 7, True, False),
    ],
)
def test_equals_plain(interpreted, queries, keys, causal, biased, packed):
    """bfloat16 against plain in float32: within 1 % of the largest value, one tile or several."""
    of, g, bias, numbers = arrays(queries, keys, packed=packed)
    readable, bias = attention.SegmentMask(*numbers, causal), bias if biased else None

    def attend(implementation, *of):
        return attention.dot_product_attention(
            *of,
            *attention.prepare_mask_and_bias(implementation, readable, bias),
            None,
            implementation,
        )

    f32 = [x.astype(jnp.float32) for x in of]
    wanted = run(functools.partial(attend, "plain"), readable, g, *f32)
    found = run(functools.partial(attend, "fused"), readable, g, *of)
    assert len(interpreted) == 1
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        assert largest_difference(one, other) < 0.01 * jnp.max(jnp.abs(other))


def test_keys_that_all_may_read_and_dropout(interpreted):
    """Cross-attention of rows that are not packed; what is dropped still takes its share."""
    of, g, _, (_, keys) = arrays(40, 90)
    readable = attention.SegmentMask(None, keys)
    rng = np.random.default_rng(0)
    dropout_mask = jnp.asarray(rng.random((2, 2, 1, 90)) < 0.7, jnp.float32) / 0.7

    def attend(implementation, *of):
        return attention.dot_product_attention(*of, readable, None, dropout_mask, implementation)

    f32 = [x.astype(jnp.float32) for x in of]
    wanted = run(functools.partial(attend, "plain"), readable, g, *f32)
    found = run(functools.partial(attend, "fused"), readable, g, *of)
    assert len(interpreted) == 1
    for one, other in zip(found, wanted, strict=True):
        assert largest_difference(one, other) < 0.01 * jnp.max(jnp.abs(other))


@pytest.mark.parametrize(("model_parallelism", "ran"), [(1, (1, 2)), (2, (2, 1))])
def test_two_devices(interpreted, model_parallelism, ran):
    """Each has rows, or heads, of its own: as one device, but for a last bit."""
    of, g, bias, numbers = arrays(130, 130)
    readable = attention.SegmentMask(*numbers, True)

    def attend(*of):
        return attention.dot_product_attention(*of, readable, bias, None, "fused")

    step = jax.jit(functools.partial(run, attend, readable, g))
    wanted = step(*of)
    mesh = partitioning.make_mesh(model_parallelism, jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(run, attend, readable, g))(*of)
    (rows, _, heads, _) = interpreted[-1]
    assert (rows, heads) == ran
    for one, other in zip(found, wanted, strict=True):
        assert largest_difference(one, other) < 2**-8 * jnp.max(jnp.abs(other))


def test_what_a_mesh_does_not_share_out_evenly(interpreted):
    of, _, _, numbers = arrays(20, 20, heads=3)
    mesh = partitioning.make_mesh(2, jax.devices()[:2])
    with jax.set_mesh(mesh):
        attention.dot_product_attention(*of, attention.SegmentMask(*numbers), None, None, "fused")
    assert not interpreted


def test_tiles_that_have_nothing_in_common_are_not_visited():
    """Two examples of 128 tokens and 64 of padding: tiles of 64 each meet those of their own."""
    numbers = jnp.repeat(jnp.asarray([1, 1, 2, 2, 0]), 64)[None]
    x = jnp.zeros((1, 320, 1, 16), jnp.bfloat16)
    first, last = attention_lib._Call(x, x, False, True)._visited(numbers, numbers, "queries")
    assert (last - first).tolist() == [[2, 2, 2, 2, 0]] and first.tolist()[0][:4] == [0, 0, 2, 2]
    first, last = attention_lib._Call(x, x, True, True)._visited(numbers, numbers, "keys")
    assert first.tolist()[0][:4] == [0, 1, 2, 3] and (last - first).tolist() == [[2, 1, 2, 1, 0]]


@pytest.mark.parametrize("how", [{}, {"scan_layers": True, "remat_policy": "minimal"}], ids=str)
def test_whole_network(interpreted, how):
    """Packed rows with dropout: loss and gradients as near to float32 as plain's are, or nearly."""
    batch, adapters = pack(example_batch()), METHODS["mov"].adapters()
    plain = dataclasses.replace(CONFIG, dropout_rate=0.2, head_dim=16, **how)
    made = network.init_params(network.Transformer(plain, adapters), 1, lambda path: True)
    keys = iter(jax.random.split(jax.random.key(1), 999))
    made = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), made)
    trainable, frozen = params.split(made, METHODS["mov"].trainable)

    def run_step(**settings):
        model = network.Transformer(dataclasses.replace(plain, **settings), adapters)
        step = jax.jit(functools.partial(steps.loss_and_grads, model, steps.Loss()))
        grads, metrics = step(trainable, frozen, batch, jax.random.key(0))
        return metrics["loss"], params.flatten(grads)

    exact = run_step()
    rounded = run_step(dtype="bfloat16")
    fused = run_step(dtype="bfloat16", attention="fused")
    assert interpreted
    assert abs(fused[0] - exact[0]) < 2 * abs(rounded[0] - exact[0]) + 0.01
    for path, wanted in exact[1].items():
        far = [np.linalg.norm(one[path] - wanted) for one in (fused[1], rounded[1])]
        assert far[0] < 1.5 * far[1] + 0.01 * np.linalg.norm(wanted), path


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

    def both(q, k, v, g, of_queries, of_keys, bias):
        out, pull = jax.vjp(
            lambda *of: attention_lib.fused_attention(*of, of_queries, of_keys, bias, causal),
            q,
            k,
            v,
        )
        return out, pull(g)

    of = [shape(rows, n, heads, 64) for n in (queries, keys, keys, queries)]
    of += [shape(rows, n, dtype=jnp.int32) for n in (queries, keys)]
    of.append(shape(1, heads, queries, keys) if biased else None)
    text = jax.jit(both).trace(*of).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
