"""Autoregressive decoding with a cache of keys and values: the decoding step, and greedy decoding.

`sampling` and `beam_search` use the same decoding step.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp

from pemoe_jax.core.params import Params, PyTree

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

Array = jax.Array
NOT_FINITE = -1  # replaces a token whose largest logit is infinite or NaN; no token has this id
# (tokens [N], cache) -> (logits [N, V] of the next tokens, cache), for N = B · copies sequences
Step: TypeAlias = Callable[[Array, PyTree], tuple[Array, PyTree]]
# (position, tokens [B, T], last token [B], finished [B], cache)
_Carry: TypeAlias = tuple[Array, Array, Array, Array, PyTree]


def start(
    model: "Transformer",
    params: Params,
    inputs: Array,
    max_decode_length: int,
    sentence_embeddings: Array | None,
    copies: int = 1,
) -> tuple[Step, PyTree]:
    """Encodes the inputs and prepares the decoding of outputs.

    Args:
      model: the network.
      params: its parameters.
      inputs: int32 [B, L], padded with 0.
      max_decode_length: T, the length of the cache.
      sentence_embeddings: [B, S], for routers that read them.
      copies: C, the number of sequences to decode from each input, for example beams. Rows b·C to
        b·C + C - 1 of a step belong to input b. The encoder's output for an input is projected to
        keys and values once for all C sequences.

    Returns:
      The function that computes a decoding step, and the cache before the first step.
    """
    apply = functools.partial(
        model.apply, enable_dropout=False, sentence_embeddings=sentence_embeddings
    )
    encoded = apply({"params": params}, inputs, method=model.encode)
    decode = functools.partial(
        apply, method=model.decode, decode=True, max_decode_length=max_decode_length
    )
    blank = jnp.zeros((inputs.shape[0] * copies, max_decode_length), jnp.int32)
    # This first call creates the caches: `cache` for the decoder's own keys and values, which each
    # step extends, and `cross_cache` for those of the encoder's output, which all steps read.
    _, caches = decode(
        {"params": params}, encoded, inputs, blank, blank, mutable=["cache", "cross_cache"]
    )

    def step(tokens: Array, cache: PyTree) -> tuple[Array, PyTree]:
        variables = {"params": params, **caches, "cache": cache}
        token = tokens[:, None]
        logits, updated = decode(variables, encoded, inputs, token, token, mutable=["cache"])
        return logits[:, -1], updated["cache"]

    return step, caches["cache"]


def decode_rows(
    step: Step,
    cache: PyTree,
    batch: int,
    max_decode_length: int,
    eos_id: int | Array,
    choose: Callable[[Array, Array], Array],
) -> Array:
    """Decodes one sequence for each row, until all rows have ended or have T tokens.

    Args:
      step, cache: the results of `start`.
      batch: B, the number of rows.
      max_decode_length: T, the largest number of tokens to decode.
      eos_id: the token that ends a row.
      choose: function from (logits [B, V], position []) to the next tokens [B].

    Returns:
      int32 [B, T]. A row includes its end token if it reached one, and is 0 after it. If a logit is
      NaN or the largest logit is infinite, the row ends in `NOT_FINITE`.
    """

    def is_unfinished(carry: _Carry) -> Array:
        position, _, _, finished, _ = carry
        return (position < max_decode_length) & ~jnp.all(finished)

    def advance(carry: _Carry) -> _Carry:
        position, tokens, last, finished, cache = carry
        logits, cache = step(last, cache)
        chosen = choose(logits, position).astype(jnp.int32)
        # The maximum is NaN if any of the row's logits is NaN. The check is needed, since argmax
        # returns the position of the first NaN as if it were a token.
        chosen = jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), chosen, NOT_FINITE)
        chosen = jnp.where(finished, 0, chosen)
        tokens = tokens.at[:, position].set(chosen)
        finished |= (chosen == eos_id) | (chosen == NOT_FINITE)
        return position + 1, tokens, chosen, finished, cache

    first = jnp.zeros((batch,), jnp.int32)  # T5's decoder starts from the padding token, 0
    blank = jnp.zeros((batch, max_decode_length), jnp.int32)
    carry = (jnp.array(0), blank, first, jnp.zeros((batch,), bool), cache)
    return jax.lax.while_loop(is_unfinished, advance, carry)[1]


@functools.partial(jax.jit, static_argnames=("model", "max_decode_length"))
def greedy_decode(
    model: "Transformer",
    params: Params,
    encoder_input_tokens: Array,
    max_decode_length: int,
    eos_id: int | Array = 1,
    sentence_embeddings: Array | None = None,
) -> Array:
    """Decodes the most likely token at each step, until all rows have ended or have T tokens.

    Args:
      model: the network.
      params: its parameters.
      encoder_input_tokens: int [B, L], padded with 0.
      max_decode_length: T, the largest number of tokens to decode.
      eos_id: the token that ends a row.
      sentence_embeddings: [B, S], for routers that read them.

    Returns:
      int32 [B, T]; see `decode_rows`.
    """
    inputs = jnp.asarray(encoder_input_tokens, jnp.int32)
    step, cache = start(model, params, inputs, max_decode_length, sentence_embeddings)

    def choose(logits: Array, position: Array) -> Array:
        return jnp.argmax(logits, axis=-1)

    return decode_rows(step, cache, inputs.shape[0], max_decode_length, eos_id, choose)
