"""Greedy decoding over a cache of keys and values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("model", "max_decode_length"))
def greedy_decode(
    model: Any,
    params: Any,
    encoder_input_tokens: Array,
    max_decode_length: int,
    eos_id: int | Array = 1,
    sentence_embeddings: Array | None = None,
) -> Array:
    """The most likely next token, again and again, until every row has ended.

    Args:
      model: a `Transformer`.
      params: its parameters.
      encoder_input_tokens: int [B, L], padded with 0.
      max_decode_length: most tokens a row gets, T.
      eos_id: the token that ends a row.
      sentence_embeddings: [B, S], for routers that read them.

    Returns:
      int32 [B, T]; the end token is kept, what follows it is 0.
    """
    inputs = jnp.asarray(encoder_input_tokens, jnp.int32)
    batch = inputs.shape[0]
    variables = {"params": params}
    given = {"enable_dropout": False, "sentence_embeddings": sentence_embeddings}
    encoded = model.apply(variables, inputs, method=model.encode, **given)
    blank = jnp.zeros((batch, max_decode_length), jnp.int32)
    # makes the caches; the encoder's keys and values are projected here, once
    _, caches = model.apply(
        variables,
        encoded,
        inputs,
        blank,
        blank,
        **given,
        decode=True,
        max_decode_length=max_decode_length,
        mutable=["cache", "cross_cache"],
        method=model.decode,
    )
    cross = {"cross_cache": caches["cross_cache"]}

    def unfinished(carry: Any) -> Array:
        position, _, _, done, _ = carry
        return (position < max_decode_length) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        position, tokens, last, done, cache = carry
        logits, updated = model.apply(
            {**variables, **cross, "cache": cache},
            encoded,
            inputs,
            last[:, None],
            last[:, None],
            **given,
            decode=True,
            max_decode_length=max_decode_length,
            mutable=["cache"],
            method=model.decode,
        )
        best = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        best = jnp.where(done, 0, best)
        tokens = tokens.at[:, position].set(best)
        return position + 1, tokens, best, done | (best == eos_id), updated["cache"]

    start = jnp.zeros((batch,), jnp.int32)  # the decoder starts with padding
    carry = (jnp.array(0), blank, start, jnp.zeros((batch,), bool), caches["cache"])
    return jax.lax.while_loop(unfinished, step, carry)[1]
