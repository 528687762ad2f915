"""What attention does between its projections, `softmax(q·k + bias) v`, in three ways."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pemoe_jax.core.errors import InputError

Array = jax.Array

WAYS = ("plain", "chunked", "cudnn")
CHUNK = 256  # queries at a time
NEG_INF = -1e10  # finite, so that a row with nothing to attend to gives a mean and not NaN


def check(way: str, dtype: str) -> None:
    """Raises InputError where there is no such way, or it does not know the activations' type."""
    if way not in WAYS:
        raise InputError(f"ATTENTION: expected one of {[*WAYS]}, found {way!r}")
    if way == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        raise InputError(f"ATTENTION 'cudnn' is for DTYPE 'bfloat16', found {dtype!r}")


def prepare(way: str, mask: Array | None, bias: Array | None) -> tuple[Array | None, Array | None]:
    """Mask and bias as `attend` is best given them by all layers of a stack that share them.

    'cudnn' reads one array that has both: made here it is made once, and not by every layer.

    Raises:
      InputError: where a gradient of the bias is wanted and 'cudnn' has none.
    """
    if way != "cudnn":
        return mask, bias
    if bias is not None:
        bias = _without_gradient(bias.astype(jnp.bfloat16))
    if mask is None:
        return None, bias
    low = jnp.asarray(NEG_INF, jnp.bfloat16)
    return None, jnp.where(mask, jnp.zeros((), jnp.bfloat16) if bias is None else bias, low)


@jax.custom_vjp
def _without_gradient(bias: Array) -> Array:
    return bias


def _refused(bias: Any) -> tuple[Array, None]:
    if bias.perturbed:
        raise InputError(
            "ATTENTION 'cudnn' has no gradient of the relative position biases: expected them"
            " frozen, found that they train; 'chunked' has one"
        )
    return bias.value, None


_without_gradient.defvjp(_refused, lambda _, g: (None,), symbolic_zeros=True)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    kept: Array | None,
    way: str = "plain",
) -> Array:
    """-> [B, Lq, H, K], of value's type; logits are not scaled, and float32 as their softmax is.

    'plain' makes all of [B, H, Lq, Lk] at once. 'chunked' makes it for `CHUNK` queries at a time,
    and again in the backward pass, so that it is never whole. 'cudnn' never writes it to memory: a
    kernel of NVIDIA's library, of bfloat16 on GPUs alone; under dropout, and of an odd number of
    queries or keys, which it does not take, 'chunked' stands in for it.

    Args:
      query: [B, Lq, H, K]. key, value: [B, Lk, H, K].
      mask: bool, True may be read; broadcasts to [B, H, Lq, Lk].
      bias: added to the logits; broadcasts to [B, H, Lq, Lk]. Of 'cudnn' mask and bias are those
        that `prepare` gave.
      kept: float32 [B, H, 1, Lk], what probabilities are multiplied by, for dropout.
      way: one of `WAYS`.

    Raises:
      InputError: 'cudnn' where there is no GPU.
    """
    length, of_keys = query.shape[1], key.shape[1]
    if way == "cudnn" and jax.default_backend() != "gpu":
        raise InputError(
            "ATTENTION 'cudnn' needs an NVIDIA GPU, found"
            f" {jax.default_backend()}: 'chunked' runs everywhere"
        )
    if way == "cudnn" and kept is None and length % 2 == of_keys % 2 == 0:
        # it does not broadcast to the lengths
        if bias is not None:
            bias = jnp.broadcast_to(bias, (*bias.shape[:2], length, of_keys)).astype(query.dtype)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, of_keys))
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=1.0, implementation="cudnn"
        )
    if way == "plain" or length <= CHUNK:
        return _of_queries(query, key, value, mask, bias, kept)

    @functools.partial(jax.checkpoint, static_argnums=(1,))
    def of_rows(start: Array | int, count: int) -> Array:
        def rows(x: Array | None, axis: int) -> Array | None:
            if x is None or x.shape[axis] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis)

        some = rows(query, 1)
        assert some is not None
        return _of_queries(some, key, value, rows(mask, 2), rows(bias, 2), kept)

    whole, rest = divmod(length, CHUNK)
    starts = jnp.arange(whole) * CHUNK
    # [chunks, B, CHUNK, H, K] -> [B, chunks · CHUNK, H, K]
    found = jnp.moveaxis(jax.lax.map(lambda start: of_rows(start, CHUNK), starts), 0, 1)
    found = found.reshape(query.shape[0], whole * CHUNK, *value.shape[2:])
    if not rest:
        return found
    return jnp.concatenate([found, of_rows(whole * CHUNK, rest)], axis=1)


def _of_queries(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    kept: Array | None,
) -> Array:
    logits = jnp.einsum(
        "bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32
    )  # [B, H, Lq, Lk]
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, NEG_INF)
    probs = jax.nn.softmax(logits, axis=-1)
    if kept is not None:
        probs *= kept
    return jnp.einsum("bhqm,bmhk->bqhk", probs.astype(value.dtype), value)
