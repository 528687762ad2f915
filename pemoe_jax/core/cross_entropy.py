"""Cross-entropy over a vocabulary, also in chunks that never hold all logits [B, L, V].

In chunks, each chunk's gradient is computed with its logits, in the forward pass, so that nothing
of size V is kept and nothing is computed twice (as in arXiv 2410.10989). The losses are T5X's.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

Array = jax.Array

# Bytes of a chunk's logits on each device: little memory beside a model, and still so many rows
# that reading the matrix [D, V] again for each chunk costs nothing.
CHUNK_BYTES = 128 * 2**20


def token_losses(
    logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Returns the cross-entropy and the z-loss of each token.

    Args:
      logits: [..., V].
      targets: int [...].
      label_smoothing, z_loss: see `steps.Loss`. As in T5X, the entropy of the smoothed target is
        subtracted, so that a perfect prediction has loss 0.

    Returns:
      (cross-entropy [...], z-loss [...]), float32, in nats.
    """
    parts = _logit_parts(logits.astype(jnp.float32), targets)
    return _losses(parts, logits.shape[-1], label_smoothing, z_loss)


class _LogitParts(NamedTuple):
    """What the losses need of logits [..., V]; each [...].

    Attributes:
      log_z: log of the softmax's denominator.
      target: the target's logit.
      largest: the largest logit.
      total: the sum of the logits.
    """

    log_z: Array
    target: Array
    largest: Array
    total: Array


def _logit_parts(logits: Array, targets: Array) -> _LogitParts:
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_z = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    # A sum and not a gather: XLA fuses it, its gradient is no scatter, and V may be sharded.
    target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return _LogitParts(log_z, target, largest, jnp.sum(logits, axis=-1))


def _is_target(logits: Array, targets: Array) -> Array:
    token = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return token == targets[..., None]


def _losses(
    parts: _LogitParts, vocab: int, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    nll = parts.log_z - parts.target
    if label_smoothing:
        confidence, low = _smoothed_target(label_smoothing, vocab)
        expected = (confidence - low) * parts.target + low * parts.total
        entropy = -(confidence * jnp.log(confidence) + (vocab - 1) * low * jnp.log(low + 1e-20))
        nll = parts.log_z - expected - entropy
    return nll, z_loss * jnp.square(parts.log_z)


def _smoothed_target(label_smoothing: float, vocab: int) -> tuple[float, float]:
    """Returns the probability of the target, and that of every other token."""
    return 1.0 - label_smoothing, label_smoothing / (vocab - 1)


Tokens = dict[str, Array]
Gradients = tuple[Array | None, Array | None]  # of x and kernel, None where they do not train


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Tokens]:
    """Returns the weighted sum of the `token_losses` of the logits `x @ kernel`, and each token's.

    Only the sum has gradients, to x and the kernel.

    Args:
      x: [B, L, D], float32.
      kernel: [D, V], float32.
      targets: int [B, L].
      weights: [B, L].
      label_smoothing, z_loss: as of `token_losses`.

    Returns:
      (Σ weights · (cross-entropy + z-loss), {'nll', 'z', 'correct'}: [B, L] each), float32.
      `correct` is 1 if no logit is above the target's.
    """
    settings = label_smoothing, z_loss
    return _sum_over_chunks(x, kernel, targets, weights, *settings, (False, False))[:2]


def _vjp_forward(
    x: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    label_smoothing: float,
    z_loss: float,
) -> tuple[tuple[Array, Tokens], Gradients]:
    # The kernel is frozen in most runs: its gradient [D, V] is then never computed.
    needs_grad = (x.perturbed, kernel.perturbed)
    values = (x.value, kernel.value, targets.value, weights.value)
    total, tokens, grads = _sum_over_chunks(*values, label_smoothing, z_loss, needs_grad)
    return (total, tokens), grads


def _vjp_backward(
    label_smoothing: float,
    z_loss: float,
    grads: Gradients,
    output_grads: tuple[Array | SymbolicZero, dict[str, Array | SymbolicZero]],
) -> tuple[Array | None, Array | None, None, None]:
    grad_total, _ = output_grads
    if isinstance(grad_total, SymbolicZero):
        return None, None, None, None
    grad_x, grad_kernel = (None if grad is None else grad * grad_total for grad in grads)
    return grad_x, grad_kernel, None, None


chunked_cross_entropy.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


def _sum_over_chunks(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    label_smoothing: float,
    z_loss: float,
    needs_grad: tuple[bool, bool],
) -> tuple[Array, Tokens, Gradients]:
    """Returns the sum, the tokens' losses, and the sum's gradients to x and kernel if needed."""
    length = x.shape[1]
    compute = functools.partial(
        _chunk, kernel=kernel, label_smoothing=label_smoothing, z_loss=z_loss, needs_grad=needs_grad
    )
    count = num_chunks(x.shape[0], length, kernel.shape[1])
    if count == 1:
        return compute(x, targets, weights)

    # Chunks are cut along the length, so that each device keeps its rows.
    size = -(-length // count)
    pieces = [_split(array, count, size) for array in (x, targets, weights)]

    def add(
        sums: tuple[Array, Array | None], piece: Sequence[Array]
    ) -> tuple[tuple[Array, Array | None], tuple[Tokens, Array | None]]:
        total, tokens, (grad_x, grad_kernel) = compute(*piece)
        return jax.tree.map(jnp.add, sums, (total, grad_kernel)), (tokens, grad_x)

    start = (jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32) if needs_grad[1] else None)
    (total, grad_kernel), outputs = jax.lax.scan(add, start, pieces)
    tokens, grad_x = jax.tree.map(lambda array: _join(array, length), outputs)
    return total, tokens, (grad_x, grad_kernel)


def num_chunks(rows: int, length: int, vocab: int) -> int:
    """Returns the number of chunks of logits [rows, length, vocab] on the mesh in scope."""
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    size = 4 * rows * length * vocab / devices
    return min(length, max(1, math.ceil(size / CHUNK_BYTES)))


def _split(a: Array, count: int, size: int) -> Array:
    """[B, L, …] -> [count, B, size, …], padded with zeros."""
    padding = count * size - a.shape[1]
    a = jnp.pad(a, [(0, 0), (0, padding), *[(0, 0)] * (a.ndim - 2)])
    return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)


def _join(a: Array, length: int) -> Array:
    """The inverse of `_split`."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]


def _chunk(
    x: Array,
    targets: Array,
    weights: Array,
    kernel: Array,
    label_smoothing: float,
    z_loss: float,
    needs_grad: tuple[bool, bool],
) -> tuple[Array, Tokens, Gradients]:
    logits = jnp.matmul(x, kernel)  # [B, l, V]
    vocab = logits.shape[-1]
    parts = _logit_parts(logits, targets)
    nll, z = _losses(parts, vocab, label_smoothing, z_loss)
    total = jnp.sum((nll + z) * weights)
    # No argmax, which takes as long on a CPU as all the rest; so ties count for the target.
    correct = (parts.target >= parts.largest).astype(jnp.float32)
    tokens = {"nll": nll, "z": z, "correct": correct}
    if not any(needs_grad):
        return total, tokens, (None, None)

    # d loss / d logits = softmax · (1 + 2 z_loss log Z) - smoothed target
    confidence, low = _smoothed_target(label_smoothing, vocab)
    scale = weights * (1.0 + 2.0 * z_loss * parts.log_z)
    smoothed = jnp.where(_is_target(logits, targets), confidence, low)
    grad_logits = jnp.exp(logits - parts.log_z[..., None]) * scale[..., None]
    grad_logits -= smoothed * weights[..., None]
    # einsum: with `grad_logits @ kernel.T`, a sharded kernel would be gathered twice.
    grad_x = jnp.einsum("blv,dv->bld", grad_logits, kernel) if needs_grad[0] else None
    grad_kernel = jnp.einsum("bld,blv->dv", x, grad_logits) if needs_grad[1] else None
    return total, tokens, (grad_x, grad_kernel)
