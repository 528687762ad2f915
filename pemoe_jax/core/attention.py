"""What attention does between its projections, `softmax(q·k + bias) v`, in three ways."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pemoe_jax.core.errors import InputError
from pemoe_jax.core.kernels import attention

Array = jax.Array

IMPLEMENTATIONS = ("plain", "chunked", "fused")
QUERY_CHUNK = 256  # queries at a time
NEG_INF = -1e10  # finite, so that a row with nothing to attend to gives a mean and not NaN


def check_implementation(implementation: str, dtype: str) -> None:
    """Raises InputError for an unknown implementation, or a dtype it does not support."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"ATTENTION: expected one of {[*IMPLEMENTATIONS]}, found {implementation!r}"
        )
    if implementation == "fused" and jnp.dtype(dtype) != jnp.bfloat16:
        raise InputError(f"ATTENTION 'fused' is for DTYPE 'bfloat16', found {dtype!r}")


@flax.struct.dataclass
class SegmentMask:
    """Which keys a query may read: those of its own number, of a batch's rows.

    Attributes:
      query_segment_ids: int32 [B, Lq]; None: every query reads every key whose number is not 0.
      key_segment_ids: int32 [B, Lk]; keys of number 0, padding, are read by none.
      causal: whether no query reads a key to its right.
    """

    query_segment_ids: Array | None
    key_segment_ids: Array
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def to_bool(self) -> Array:
        """Bool [B, 1, Lq or 1, Lk], True may be read."""
        keys = self.key_segment_ids[:, None, None, :]
        mask = keys > 0
        if self.query_segment_ids is not None:
            mask &= self.query_segment_ids[:, None, :, None] == keys
        if self.causal:
            mask &= jnp.tril(jnp.ones((self.key_segment_ids.shape[1],) * 2, bool))
        return mask


Mask = Array | SegmentMask


def prepare_mask_and_bias(
    implementation: str, mask: Mask | None, bias: Array | None
) -> tuple[Mask | None, Array | None]:
    """Mask and bias as `attend` is best given them by all layers of a stack that share them.

    What a implementation makes of them is made here once, and not by every layer.

    Raises:
      InputError: where a gradient of the bias is wanted and the implementation has none.
    """
    if implementation == "fused":
        return mask, None if bias is None else _without_gradient(bias)
    if isinstance(mask, SegmentMask):
        mask = mask.to_bool()
    return mask, bias


@jax.custom_vjp
def _without_gradient(bias: Array) -> Array:
    return bias


def _refused(bias: Any) -> tuple[Array, None]:
    if bias.perturbed:
        raise InputError(
            "ATTENTION 'fused' has no gradient of the relative position biases: expected them"
            " frozen, found that they train; 'chunked' has one"
        )
    return bias.value, None


_without_gradient.defvjp(_refused, lambda _, g: (None,), symbolic_zeros=True)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    bias: Array | None,
    dropout_mask: Array | None,
    implementation: str = "plain",
) -> Array:
    """-> [B, Lq, H, K], of value's type; logits are not scaled, and float32 as their softmax is.

    'plain' makes all of [B, H, Lq, Lk] at once. 'chunked' makes it for `CHUNK` queries at a time,
    and again in the backward pass, so that it is never whole. 'fused' never writes it to memory:
    see `fused_attention`, for bfloat16 on GPUs; 'chunked' stands in for it elsewhere.

    Args:
      query: [B, Lq, H, K]. key, value: [B, Lk, H, K].
      mask: bool that broadcasts to [B, H, Lq, Lk], True may be read, or what `prepare` gave.
      bias: added to the logits; broadcasts to [B, H, Lq, Lk].
      dropout_mask: float32 [B, H, 1, Lk], what probabilities are multiplied by, for dropout.
      implementation: one of `WAYS`.
    """
    length = query.shape[1]
    if isinstance(mask, SegmentMask):
        # a single query, a step of decoding, is no work for a matrix unit
        if implementation == "fused" and length > 1 and attention.supports(query):
            return _fused(query, key, value, mask, bias, dropout_mask)
        mask = mask.to_bool()
    if implementation == "plain" or length <= QUERY_CHUNK:
        return _of_queries(query, key, value, mask, bias, dropout_mask)

    @functools.partial(jax.checkpoint, static_argnums=(1,))
    def of_rows(start: Array | int, count: int) -> Array:
        def rows(x: Array | None, axis: int) -> Array | None:
            if x is None or x.shape[axis] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis)

        some = rows(query, 1)
        assert some is not None
        return _of_queries(some, key, value, rows(mask, 2), rows(bias, 2), dropout_mask)

    whole, rest = divmod(length, QUERY_CHUNK)
    starts = jnp.arange(whole) * QUERY_CHUNK
    # [chunks, B, CHUNK, H, K] -> [B, chunks · CHUNK, H, K]
    found = jnp.moveaxis(jax.lax.map(lambda start: of_rows(start, QUERY_CHUNK), starts), 0, 1)
    found = found.reshape(query.shape[0], whole * QUERY_CHUNK, *value.shape[2:])
    if not rest:
        return found
    return jnp.concatenate([found, of_rows(whole * QUERY_CHUNK, rest)], axis=1)


def _fused(
    query: Array,
    key: Array,
    value: Array,
    mask: SegmentMask,
    bias: Array | None,
    dropout_mask: Array | None,
) -> Array:
    if dropout_mask is not None:  # a key that is dropped weighs nothing, and still takes its share
        value = (value * jnp.moveaxis(dropout_mask, (2, 3), (3, 1))).astype(value.dtype)
    of_queries, of_keys = mask.query_segment_ids, mask.key_segment_ids
    if of_queries is None:
        of_queries, of_keys = jnp.ones(query.shape[:2], jnp.int32), jnp.minimum(of_keys, 1)
    of = query, key, value, of_queries, of_keys, bias
    return attention.fused_attention_on_mesh(*of, causal=mask.causal)


@jax.custom_vjp
def _with_bias(logits: Array, bias: Array) -> Array:
    """`logits + bias`; of the bias' gradient rows are summed up by a product.

    XLA's CPU compiler makes the sums of all layers one loop that skips through memory, a thirtieth
    of a step of T5 v1.1 Small.
    """
    return logits + bias


def _with_bias_forward(logits: Array, bias: Array) -> tuple[Array, tuple[int, ...]]:
    return logits + bias, bias.shape


def _with_bias_backward(shape: tuple[int, ...], g: Array) -> tuple[Array, Array]:
    if shape == (1, *g.shape[1:]):
        rows = jnp.ones(g.shape[0], g.dtype)
        return g, jnp.einsum("b,bhqm->hqm", rows, g, precision="highest")[None]
    joined = tuple(axis for axis, size in enumerate(shape) if size < g.shape[axis])
    return g, jnp.sum(g, axis=joined, keepdims=True)


_with_bias.defvjp(_with_bias_forward, _with_bias_backward)


def _of_queries(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    dropout_mask: Array | None,
) -> Array:
    if dropout_mask is None and query.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return _of_queries_on_cpus(query, key, value, mask, bias)
    return _by_softmax(query, key, value, mask, bias, dropout_mask)


def _by_softmax(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    dropout_mask: Array | None,
) -> Array:
    probs = jax.nn.softmax(_logits(query, key, mask, bias), axis=-1)
    if dropout_mask is not None:
        probs *= dropout_mask
    return jnp.einsum("bhqm,bmhk->bqhk", probs.astype(value.dtype), value)


def _logits(query: Array, key: Array, mask: Array | None, bias: Array | None) -> Array:
    """[B, H, Lq, Lk], float32."""
    logits = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = _with_bias(logits, bias.astype(jnp.float32))
    if mask is not None:
        logits = jnp.where(mask, logits, NEG_INF)
    return logits


@jax.custom_vjp
def _of_queries_on_cpus(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
) -> Array:
    """Where no gradient is asked for, the softmax' sums are a column of the product with values.

    That leaves XLA's CPU compiler one pass less over [B, H, Lq, Lk]: scores of answer choices take
    7 % less time. Where gradients are, a step would take 2 % more.
    """
    logits = _logits(query, key, mask, bias)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    mixed = jnp.einsum("bhqm,bmhk->bqhk", weights, jnp.concatenate([value, ones], axis=-1))
    return mixed[..., :-1] / mixed[..., -1:]


def _of_queries_forward(
    query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
) -> tuple[Array, Any]:
    return jax.vjp(lambda q, k, v, b: _by_softmax(q, k, v, mask, b, None), query, key, value, bias)


def _of_queries_backward(backward: Any, g: Array) -> tuple[Array | None, ...]:
    of_query, of_key, of_value, of_bias = backward(g)
    return of_query, of_key, of_value, None, of_bias


_of_queries_on_cpus.defvjp(_of_queries_forward, _of_queries_backward)
