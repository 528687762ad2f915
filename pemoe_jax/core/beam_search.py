"""Beam search: continues the K most likely sequences at each step.

    score(y) = log p(y | x) / |y|^α

for a finished sequence y of |y| tokens, including its end token if it has one, and the length
penalty α. A sequence finishes without an end token when it reaches the maximum length T. Shapes:
`B` batch, `K` beams, `T` length, `V` vocabulary.
"""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pemoe_jax.core import decoding
from pemoe_jax.core.params import Params, PyTree

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

Array = jax.Array


class _State(NamedTuple):
    """The running and the finished sequences.

    Attributes:
      position: number of tokens decoded so far.
      running: int32 [B, K, T], sequences to continue, best first.
      log_probs: [B, K], log-probabilities of the running sequences.
      finished: int32 [B, K, T], the best finished sequences, best first.
      scores: [B, K], scores of the finished sequences; -inf in place of a missing sequence.
      is_done: [B], whether the search of a row has ended.
      is_finite: [B], whether the largest logit of a row was finite at every step. It is NaN if any
        logit is NaN.
      cache: keys and values of the running sequences, with B·K rows.
    """

    position: Array
    running: Array
    log_probs: Array
    finished: Array
    scores: Array
    is_done: Array
    is_finite: Array
    cache: PyTree


def _select(array: Array, indices: Array) -> Array:
    """Returns the entries of an array [B, N, …] at the indices [B, M], as an array [B, M, …]."""
    indices = indices.reshape(*indices.shape, *[1] * (array.ndim - 2))
    return jnp.take_along_axis(array, indices, axis=1)


@functools.partial(jax.jit, static_argnames=("model", "max_decode_length", "num_beams"))
def beam_search_decode(
    model: "Transformer",
    params: Params,
    encoder_input_tokens: Array,
    max_decode_length: int,
    num_beams: int,
    length_penalty: float | Array = 1.0,
    early_stopping: bool | Array = False,
    eos_id: int | Array = 1,
) -> Array:
    """Returns the sequence with the highest score, for each row.

    With `early_stopping`, a row ends as soon as it has K finished sequences. Without it, the row
    then continues while its best running sequence, if it ended now, would score higher than the
    worst of these K. The settings and their defaults are those of Hugging Face's `generate`.

    Args:
      model: the network.
      params: its parameters.
      encoder_input_tokens: int [B, L], padded with 0.
      max_decode_length: T, the largest number of tokens to decode.
      num_beams: K.
      length_penalty: α; positive values favor longer sequences.
      early_stopping: whether a row ends as soon as it has K finished sequences.
      eos_id: the token that ends a sequence.

    Returns:
      int32 [B, T]; a row is 0 after its end token; it has none if it reached T tokens first. A row
      whose logits are not finite begins with `decoding.NOT_FINITE`.
    """
    inputs = jnp.asarray(encoder_input_tokens, jnp.int32)
    batch, beams = inputs.shape[0], num_beams
    # Only the Python API uses beam search, and it has no sentence embeddings (for routers that read
    # them).
    decode_step, cache = decoding.start(
        model, params, inputs, max_decode_length, sentence_embeddings=None, copies=beams
    )

    def is_unfinished(state: _State) -> Array:
        return (state.position < max_decode_length) & ~jnp.all(state.is_done)

    def advance(state: _State) -> _State:
        position, length = state.position, state.position + 1
        # The first step reads T5's start token, which is the padding token 0.
        last = jnp.where(position > 0, state.running[:, :, position - 1], 0)
        logits, cache = decode_step(last.reshape(-1), state.cache)
        # The largest logit is NaN if any logit is NaN, see `decoding.decode_rows`.
        is_finite = state.is_finite & jnp.isfinite(jnp.max(logits.reshape(batch, -1), axis=-1))
        next_log_probs = jax.nn.log_softmax(logits).reshape(batch, beams, -1)
        next_log_probs += state.log_probs[:, :, None]
        vocab_size = next_log_probs.shape[-1]
        # 2·K candidates: at most K of them end with EOS, one for each beam, so K can be continued.
        flat_log_probs = next_log_probs.reshape(batch, -1)  # [B, K·V]
        log_probs, indices = jax.lax.top_k(flat_log_probs, 2 * beams)  # [B, 2K]
        parents, tokens = indices // vocab_size, indices % vocab_size
        candidates = _select(state.running, parents).at[:, :, position].set(tokens)
        ends = (tokens == eos_id) | (length == max_decode_length)

        # As in Hugging Face, a candidate finishes only if it is among the K best of all candidates.
        is_best = jnp.arange(2 * beams) < beams
        finishes = ends & is_best & ~state.is_done[:, None]
        penalty = length.astype(jnp.float32) ** length_penalty
        new_scores = jnp.where(finishes, log_probs / penalty, -jnp.inf)
        scores, order = jax.lax.top_k(jnp.concatenate([state.scores, new_scores], 1), beams)
        finished = _select(jnp.concatenate([state.finished, candidates], 1), order)

        running_log_probs, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), beams)
        cache_rows = jnp.arange(batch)[:, None] * beams + _select(parents, order)  # [B, K]
        has_k_finished = jnp.isfinite(scores[:, -1])
        can_improve = running_log_probs[:, 0] / penalty > scores[:, -1]
        stops = has_k_finished & (early_stopping | ~can_improve)
        is_done = state.is_done | stops | ~is_finite
        return _State(
            position=length,
            running=_select(candidates, order),
            log_probs=running_log_probs,
            finished=finished,
            scores=scores,
            is_done=is_done,
            is_finite=is_finite,
            # The index of the cache, a scalar, is the same for all sequences.
            cache=jax.tree.map(lambda a: a[cache_rows.reshape(-1)] if a.ndim else a, cache),
        )

    blank = jnp.zeros((batch, beams, max_decode_length), jnp.int32)
    # All beams start as the same empty sequence. Only the first one is continued, because otherwise
    # the K beams would stay equal.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    state = _State(
        position=jnp.array(0),
        running=blank,
        log_probs=jnp.broadcast_to(first, (batch, beams)),
        finished=blank,
        scores=jnp.full((batch, beams), -jnp.inf),
        is_done=jnp.zeros((batch,), bool),
        is_finite=jnp.ones((batch,), bool),
        cache=cache,
    )
    state = jax.lax.while_loop(is_unfinished, advance, state)
    best = state.finished[:, 0]
    return best.at[:, 0].set(jnp.where(state.is_finite, best[:, 0], decoding.NOT_FINITE))
