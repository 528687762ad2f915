"""Dot-product attention as in T5, `softmax(q·k + bias) v`, in three implementations."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from pemoe_jax.core.errors import InputError
from pemoe_jax.core.kernels import attention as attention_kernels
from pemoe_jax.core.kernels import cpu_attention

Array = jax.Array

IMPLEMENTATIONS = ("plain", "chunked", "fused")
QUERY_CHUNK = 256  # queries per chunk of 'chunked'
# The logit of a masked key. It is finite, so that the output of a query whose keys are all masked,
# such as padding, is the mean of all values and not NaN.
NEG_INF = -1e10


def check_implementation(implementation: str, dtype: str) -> None:
    """Raises InputError if an implementation is unknown or does not support the dtype."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"ATTENTION must be one of {[*IMPLEMENTATIONS]}, got {implementation!r}")
    if implementation == "fused" and jnp.dtype(dtype) != jnp.bfloat16:
        raise InputError(f"ATTENTION 'fused' needs DTYPE 'bfloat16', got {dtype!r}")


@flax.struct.dataclass
class SegmentMask:
    """An attention mask by segments: queries attend to keys of the same segment.

    Attributes:
      query_segment_ids: int32 [B, Lq]; None: every query attends to all keys but padding.
      key_segment_ids: int32 [B, Lk], 0 at padding, which no query attends to.
      causal: whether keys to the right of a query are masked (Lq = Lk).
    """

    query_segment_ids: Array | None
    key_segment_ids: Array
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def to_bool(self) -> Array:
        """Returns a mask, bool [B, 1, Lq or 1, Lk], True at keys to attend to."""
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
    """Converts mask and bias once for all layers of a stack, which share them.

    Raises:
      InputError: the bias is trainable, and the implementation has no gradient for it.
    """
    # The fused kernels read segment ids. The other implementations need a bool mask
    # [B, 1, Lq, Lk], which every layer would otherwise compute again.
    if implementation == "fused":
        return mask, None if bias is None else _without_gradient(bias)
    if isinstance(mask, SegmentMask):
        mask = mask.to_bool()
    return mask, bias


# The identity. It raises an error at trace time if the bias is differentiated (JAX then sets
# `perturbed`), because the fused kernels would silently return a gradient of zero.
@jax.custom_vjp
def _without_gradient(bias: Array) -> Array:
    return bias


def _raise_if_perturbed(bias: CustomVJPPrimal) -> tuple[Array, None]:
    if bias.perturbed:
        raise InputError(
            "ATTENTION 'fused' needs frozen relative position biases, got trainable ones: only"
            " 'plain' and 'chunked' have gradients for them"
        )
    return bias.value, None


_without_gradient.defvjp(_raise_if_perturbed, lambda _, grad: (None,), symbolic_zeros=True)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    bias: Array | None,
    dropout_mask: Array | None,
    implementation: str = "plain",
) -> Array:
    """Returns `softmax(query · key + bias) value`, [B, Lq, H, K], in value's dtype.

    As in T5, logits are not divided by √K. Logits and softmax are float32.

    Args:
      query: [B, Lq, H, K].
      key, value: [B, Lk, H, K].
      mask: a `SegmentMask`, or bool that broadcasts to [B, H, Lq, Lk], True at keys to attend to.
      bias: added to the logits; broadcasts to [B, H, Lq, Lk].
      dropout_mask: float32 [B, H, 1, Lk], multiplies the probabilities.
      implementation: 'plain' holds all logits [B, H, Lq, Lk] at once. 'chunked' holds the logits of
        `QUERY_CHUNK` queries, and computes them again in the backward pass. 'fused' never writes
        logits to memory (`kernels.attention`, bfloat16 on GPUs); where the kernels do not run,
        'chunked' takes its place.
    """
    length = query.shape[1]
    if isinstance(mask, SegmentMask):
        # Not for a single query, as in a decoding step: it would leave most of a tile empty.
        if implementation == "fused" and length > 1 and attention_kernels.supports(query):
            return _fused_attention(query, key, value, mask, bias, dropout_mask)
        mask = mask.to_bool()
    if implementation == "plain" or length <= QUERY_CHUNK:
        return _plain_attention(query, key, value, mask, bias, dropout_mask)
    return _chunked_attention(query, key, value, mask, bias, dropout_mask)


def _plain_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    dropout_mask: Array | None,
) -> Array:
    # float32 even from bfloat16 inputs: the softmax of large logits is sensitive to rounding.
    logits = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, NEG_INF)
    # `softmax_matmul` computes the denominators together with the product. So it cannot apply a
    # dropout mask, which must change the product but not the denominators.
    if dropout_mask is None and value.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return cpu_attention.softmax_matmul(logits, value)
    probs = jax.nn.softmax(logits, axis=-1)
    if dropout_mask is not None:
        probs *= dropout_mask
    return jnp.einsum("bhqm,bmhk->bqhk", probs.astype(value.dtype), value)


def _chunked_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    dropout_mask: Array | None,
) -> Array:
    # Without rematerialization, the loop would save the logits of all chunks for the gradient.
    @functools.partial(jax.checkpoint, static_argnums=(1,))
    def attend(start: Array | int, count: int) -> Array:
        def slice_queries(x: Array | None) -> Array | None:  # [B, H, Lq or 1, Lk]
            if x is None or x.shape[2] == 1:
                return x
            return jax.lax.dynamic_slice_in_dim(x, start, count, 2)

        queries = jax.lax.dynamic_slice_in_dim(query, start, count, 1)
        return _plain_attention(
            queries, key, value, slice_queries(mask), slice_queries(bias), dropout_mask
        )

    chunks, rest = divmod(query.shape[1], QUERY_CHUNK)
    starts = jnp.arange(chunks) * QUERY_CHUNK
    # `lax.map` needs chunks of one size, so the queries that are left over are computed separately.
    out = jax.lax.map(lambda start: attend(start, QUERY_CHUNK), starts)
    # [chunks, B, QUERY_CHUNK, H, K] -> [B, chunks · QUERY_CHUNK, H, K]
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *value.shape[2:])
    if not rest:
        return out
    return jnp.concatenate([out, attend(chunks * QUERY_CHUNK, rest)], axis=1)


def _fused_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: SegmentMask,
    bias: Array | None,
    dropout_mask: Array | None,
) -> Array:
    if dropout_mask is not None:
        # All queries share the dropout mask, so it can multiply the values: a dropped key
        # contributes nothing to the output, but still counts in the softmax's denominator.
        value = (value * jnp.moveaxis(dropout_mask, (2, 3), (3, 1))).astype(value.dtype)
    query_ids, key_ids = mask.query_segment_ids, mask.key_segment_ids
    if query_ids is None:  # one segment, with all keys that are not padding
        query_ids, key_ids = jnp.ones(query.shape[:2], jnp.int32), jnp.minimum(key_ids, 1)
    return attention_kernels.fused_attention_on_mesh(
        query, key, value, query_ids, key_ids, bias, causal=mask.causal
    )
