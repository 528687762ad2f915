"""Greedy decoding with a cache of keys and values."""

import functools
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp

from pemoe_jax.core.params import Params, PyTree

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

Array = jax.Array
NOT_FINITE = -1  # in place of a token where the logits are not finite
# (position, tokens [B, T], last token [B], finished [B], cache)
_Carry: TypeAlias = tuple[Array, Array, Array, Array, PyTree]


@functools.partial(jax.jit, static_argnames=("model", "max_decode_length"))
def greedy_decode(
    model: "Transformer",
    params: Params,
    encoder_input_tokens: Array,
    max_decode_length: int,
    eos_id: int | Array = 1,
    sentence_embeddings: Array | None = None,
) -> Array:
    """Decodes the most likely token at each step until every row has ended.

    Args:
      model: the network.
      params: its parameters.
      encoder_input_tokens: int [B, L], padded with 0.
      max_decode_length: T, the number of tokens to decode at most.
      eos_id: the token that ends a row.
      sentence_embeddings: [B, S], for routers that read them.

    Returns:
      int32 [B, T]; a row holds its end token, and 0 after it. A row whose logits are not finite
      ends in `NOT_FINITE`.
    """
    inputs = jnp.asarray(encoder_input_tokens, jnp.int32)
    batch = inputs.shape[0]
    apply = functools.partial(
        model.apply, enable_dropout=False, sentence_embeddings=sentence_embeddings
    )
    encoded = apply({"params": params}, inputs, method=model.encode)
    decode = functools.partial(
        apply, method=model.decode, decode=True, max_decode_length=max_decode_length
    )
    blank = jnp.zeros((batch, max_decode_length), jnp.int32)
    # The first call creates the caches, and projects the encoder's keys and values for all steps.
    _, caches = decode(
        {"params": params}, encoded, inputs, blank, blank, mutable=["cache", "cross_cache"]
    )

    def is_unfinished(carry: _Carry) -> Array:
        position, _, _, finished, _ = carry
        return (position < max_decode_length) & ~jnp.all(finished)

    def step(carry: _Carry) -> _Carry:
        position, tokens, last, finished, cache = carry
        variables = {"params": params, **caches, "cache": cache}
        token = last[:, None]
        logits, updated = decode(variables, encoded, inputs, token, token, mutable=["cache"])
        best = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        # The maximum is NaN if any logit is; argmax would return the first NaN as a token.
        best = jnp.where(jnp.isfinite(jnp.max(logits[:, -1], axis=-1)), best, NOT_FINITE)
        best = jnp.where(finished, 0, best)
        tokens = tokens.at[:, position].set(best)
        finished |= (best == eos_id) | (best == NOT_FINITE)
        return position + 1, tokens, best, finished, updated["cache"]

    start = jnp.zeros((batch,), jnp.int32)  # the decoder's start token is padding
    carry = (jnp.array(0), blank, start, jnp.zeros((batch,), bool), caches["cache"])
    return jax.lax.while_loop(is_unfinished, step, carry)[1]
