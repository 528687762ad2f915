"""Decoding by sampling: temperature, top-k (arXiv 1805.04833) and top-p (arXiv 1904.09751)."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pemoe_jax.core import decoding
from pemoe_jax.core.params import Params

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

Array = jax.Array


def truncate_logits(logits: Array, top_k: int | Array, top_p: float | Array) -> Array:
    """Sets the logits of unlikely tokens to -inf, by top-k and then by top-p.

    Tokens that tie with the least likely of the kept tokens are kept too.

    Args:
      logits: [B, V], already divided by the temperature.
      top_k: number of most likely tokens to keep.
      top_p: the fewest most likely tokens are kept whose probabilities add up to this value. The
        probabilities are those of the `top_k` tokens, renormalized.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    vocab_size = logits.shape[-1]
    ordered = jnp.where(jnp.arange(vocab_size) < top_k, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    # A token stays if the sum of the more likely ones does not reach top_p. The first token always
    # stays.
    sum_before = jnp.cumsum(probs, axis=-1) - probs
    stays = (sum_before < top_p) & (probs > 0)
    threshold = jnp.min(jnp.where(stays.at[:, 0].set(True), ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("model", "max_decode_length", "truncate"))
def sample_decode(
    model: "Transformer",
    params: Params,
    encoder_input_tokens: Array,
    max_decode_length: int,
    seed: int | Array,
    row_ids: Array,
    temperature: float | Array,
    top_k: int | Array,
    top_p: float | Array,
    eos_id: int | Array = 1,
    truncate: bool = True,
) -> Array:
    """Samples a token at each step, until all rows have ended or have T tokens.

    Args:
      model: the network.
      params: its parameters.
      encoder_input_tokens: int [B, L], padded with 0.
      max_decode_length: T, the largest number of tokens to decode.
      seed: seed of the samples.
      row_ids: int [B], a number for each row. A row's samples depend on its number and the seed,
        not on the other rows of the batch.
      temperature: divisor of the logits.
      top_k, top_p: see `truncate_logits`.
      eos_id: the token that ends a row.
      truncate: whether to apply `top_k` and `top_p`; they need a sort of the vocabulary at each
        step.

    Returns:
      int32 [B, T]; see `decoding.decode_rows`.
    """
    inputs = jnp.asarray(encoder_input_tokens, jnp.int32)
    # Only the Python API samples, and it has no sentence embeddings (for routers that read them).
    step, cache = decoding.start(model, params, inputs, max_decode_length, sentence_embeddings=None)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(row_ids)

    def choose(logits: Array, position: Array) -> Array:
        logits = logits / temperature
        if truncate:
            logits = truncate_logits(logits, top_k, top_p)
        # A key for each row and position, so that samples do not depend on the batch.
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return jax.vmap(jax.random.categorical)(step_keys, logits)

    return decoding.decode_rows(step, cache, inputs.shape[0], max_decode_length, eos_id, choose)
