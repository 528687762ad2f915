"""Cross-entropy over a vocabulary, also from what the logits' matrix reads, a chunk at a time.

Of a batch's logits, [B, L, V] in float32, no more than a chunk is ever held: a chunk's gradient is
taken where its logits are, in the forward pass, so nothing of V is kept and nothing is computed
twice (as arXiv 2410.10989 does). Source of the losses: T5X.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Array = jax.Array

# Of the logits of a chunk, on each device: so few that they are no memory to speak of beside a
# model, and so many that reading the matrix again for each chunk costs nothing.
CHUNK_BYTES = 128 * 2**20


def token_losses(
    logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Cross-entropy and z-loss of each token.

    Args:
      logits: [..., V]. targets: int [...].
      label_smoothing, z_loss: see `steps.Loss`. As in T5X, the entropy of the smoothed target is
        taken off, so that a perfect prediction costs nothing.

    Returns:
      (cross-entropy [...], z-loss [...]), float32, in nats.
    """
    logits = logits.astype(jnp.float32)
    log_z, picked, _ = _parts(logits, targets)
    return _losses(logits, log_z, picked, label_smoothing, z_loss)


def _parts(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Of logits [..., V]: log of their normaliser, the target's logit, the largest; each [...]."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_z = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    # a sum and no gather: it is fused, its gradient is no scatter, and V may be spread over devices
    picked = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return log_z, picked, largest


def _is_target(logits: Array, targets: Array) -> Array:
    token = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return token == targets[..., None]


def _losses(
    logits: Array, log_z: Array, picked: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    if label_smoothing == 0.0:
        nll = log_z - picked
    else:
        vocab = logits.shape[-1]
        confidence, low = _smoothed(label_smoothing, vocab)
        entropy = -(confidence * jnp.log(confidence) + (vocab - 1) * low * jnp.log(low + 1e-20))
        expected = (confidence - low) * picked + low * jnp.sum(logits, axis=-1)
        nll = log_z - expected - entropy
    return nll, z_loss * jnp.square(log_z)


def _smoothed(label_smoothing: float, vocab: int) -> tuple[float, float]:
    """The target's share, and that of every other token."""
    return 1.0 - label_smoothing, label_smoothing / (vocab - 1)


def chunked_cross_entropy(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of `token_losses` of the logits `x @ kernel`, and what they were.

    Gradients flow through the sum alone, to x and, where it trains, to the kernel.

    Args:
      x: [B, L, D], float32. kernel: [D, V], float32. targets: int [B, L]. weights: [B, L].
      label_smoothing, z_loss: as of `token_losses`.

    Returns:
      (Σ weights · (cross-entropy + z-loss), {'nll', 'z', 'correct'}: [B, L] each, `correct` being
      1 where no logit is above the target's), float32.
    """
    return _chunked_cross_entropy(x, kernel, targets, weights, label_smoothing, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked_cross_entropy(
    x: Array, kernel: Array, targets: Array, weights: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, dict[str, Array]]:
    return _in_chunks(x, kernel, targets, weights, label_smoothing, z_loss, (False, False))[:2]


def _forward(
    x: Any, kernel: Any, targets: Any, weights: Any, label_smoothing: float, z_loss: float
) -> Any:
    wanted = (x.perturbed, kernel.perturbed)
    values = (x.value, kernel.value, targets.value, weights.value)
    total, told, gradients = _in_chunks(*values, label_smoothing, z_loss, wanted)
    return (total, told), gradients


def _backward(label_smoothing: float, z_loss: float, gradients: Any, given: Any) -> Any:
    of_total, _ = given
    if isinstance(of_total, SymbolicZero):
        return None, None, None, None
    of_x, of_kernel = (None if g is None else g * of_total for g in gradients)
    return of_x, of_kernel, None, None


_chunked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _in_chunks(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool],
) -> tuple[Array, dict[str, Array], tuple[Array | None, Array | None]]:
    """(sum, what the tokens' losses are, the sum's gradients to x and kernel where wanted)."""
    length = x.shape[1]
    chunk = functools.partial(
        _chunk, kernel=kernel, label_smoothing=label_smoothing, z_loss=z_loss, wanted=wanted
    )
    count = num_chunks(x.shape[0], length, kernel.shape[1])
    if count == 1:
        return chunk(x, targets, weights)

    # Along the length, so that each device keeps the rows it holds
    size = -(-length // count)
    pieces = jax.tree.map(lambda a: _cut(a, count, size), (x, targets, weights))

    def add(sums: Any, piece: Any) -> Any:
        total, told, (of_x, of_kernel) = chunk(*piece)
        return jax.tree.map(jnp.add, sums, (total, of_kernel)), (told, of_x)

    start = (jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32) if wanted[1] else None)
    (total, of_kernel), rest = jax.lax.scan(add, start, pieces)
    told, of_x = jax.tree.map(lambda a: _joined(a, length), rest)
    return total, told, (of_x, of_kernel)


def num_chunks(rows: int, length: int, vocab: int) -> int:
    """In how many pieces logits [rows, length, vocab] are computed, on the mesh in scope."""
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    size = 4 * rows * length * vocab / devices
    return min(length, max(1, math.ceil(size / CHUNK_BYTES)))


def _cut(a: Array, count: int, size: int) -> Array:
    """[B, L, …] -> [count, B, size, …], padded with zeros."""
    short = count * size - a.shape[1]
    a = jnp.pad(a, [(0, 0), (0, short), *[(0, 0)] * (a.ndim - 2)])
    return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)


def _joined(a: Array, length: int) -> Array:
    """The inverse of `_cut`."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]


def _chunk(
    x: Array,
    targets: Array,
    weights: Array,
    kernel: Array,
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool],
) -> tuple[Array, dict[str, Array], tuple[Array | None, Array | None]]:
    logits = jnp.matmul(x, kernel)  # [B, l, V]
    log_z, picked, largest = _parts(logits, targets)
    nll, z = _losses(logits, log_z, picked, label_smoothing, z_loss)
    # an argmax takes as long as all the rest on a CPU; so ties with the target count for it
    told = {"nll": nll, "z": z, "correct": (picked >= largest).astype(jnp.float32)}
    of_x = of_kernel = None
    if any(wanted):
        # d loss / d logit = softmax · (1 + 2 z_loss log Z) - the smoothed target's share
        confidence, low = _smoothed(label_smoothing, logits.shape[-1])
        scale = weights * (1.0 + 2.0 * z_loss * log_z)
        share = jnp.where(_is_target(logits, targets), confidence, low)
        of_logits = jnp.exp(logits - log_z[..., None]) * scale[..., None]
        of_logits -= share * weights[..., None]
        if wanted[0]:
            of_x = jnp.einsum("blv,dv->bld", of_logits, kernel)  # spread, it is gathered once
        if wanted[1]:
            of_kernel = jnp.einsum("bld,blv->dv", x, of_logits)
    return jnp.sum((nll + z) * weights), told, (of_x, of_kernel)
