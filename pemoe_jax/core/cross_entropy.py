"""Cross-entropy over a vocabulary, in chunks, so that the full logits are never materialized.

    loss = -Σ_v q_v log softmax(x W)_v - entropy(q) + z_loss · log(Z)²

q is the target distribution after label smoothing, and Z is the softmax's denominator, as in T5X.
The forward pass
computes the gradients of x and W together with each chunk's logits, so the backward pass needs no
logits: none are saved, and none are computed twice (as in arXiv 2410.10989).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

Array = jax.Array

# Bytes of a chunk's logits on each device. That is little memory next to a model, and a chunk still
# has enough rows to hide the time to read the matrix [D, V] again.
CHUNK_BYTES = 128 * 2**20


TokenValues = dict[str, Array]  # 'nll', 'z' and 'correct' of each token
Gradients = tuple[Array | None, Array | None]  # of x and of the kernel; None for one not needed


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    x: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, TokenValues]:
    """Returns the weighted sum of the tokens' losses, and values of each token.

    The logits are `x @ kernel`. Only the sum has gradients, and only with respect to x and kernel.

    Args:
      x: [B, L, D], float32.
      kernel: [D, V], float32.
      targets: int [B, L].
      weights: [B, L].
      label_smoothing, z_loss: see `steps.Loss`. As in T5X, the entropy of the smoothed target is
        subtracted, so that a perfect prediction has cross-entropy 0.

    Returns:
      The sum Σ weights · (nll + z), and float32 arrays [B, L] by name: the cross-entropy 'nll' in
      nats, the z-loss 'z', and 'correct', which is 1 if no logit is above the target's, else 0.
    """
    needs_grad = (False, False)
    return _sum_over_chunks(x, kernel, targets, weights, label_smoothing, z_loss, needs_grad)[:2]


def _vjp_forward(
    x: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    label_smoothing: float,
    z_loss: float,
) -> tuple[tuple[Array, TokenValues], Gradients]:
    # `perturbed` says whether an argument is differentiated. The kernel is frozen in most runs; its
    # gradient [D, V] is then never computed.
    needs_grad = (x.perturbed, kernel.perturbed)
    values = (x.value, kernel.value, targets.value, weights.value)
    total, token_values, grads = _sum_over_chunks(*values, label_smoothing, z_loss, needs_grad)
    return (total, token_values), grads


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
) -> tuple[Array, TokenValues, Gradients]:
    """Returns the results of `chunked_cross_entropy`, and the sum's gradients.

    `needs_grad` says whether to compute the gradients with respect to x and to the kernel; a
    gradient that is not needed is None.
    """
    length = x.shape[1]
    compute = functools.partial(
        _compute_chunk,
        kernel=kernel,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        needs_grad=needs_grad,
    )
    count = num_chunks(x.shape[0], length, kernel.shape[1])
    if count == 1:
        return compute(x, targets, weights)

    # Chunks are cut along the length, so that each device keeps its rows.
    size = -(-length // count)
    pieces = [_split(array, count, size) for array in (x, targets, weights)]

    def add(
        sums: tuple[Array, Array | None], piece: Sequence[Array]
    ) -> tuple[tuple[Array, Array | None], tuple[TokenValues, Array | None]]:
        total, token_values, (grad_x, grad_kernel) = compute(*piece)
        return jax.tree.map(jnp.add, sums, (total, grad_kernel)), (token_values, grad_x)

    start = (jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32) if needs_grad[1] else None)
    (total, grad_kernel), outputs = jax.lax.scan(add, start, pieces)
    token_values, grad_x = jax.tree.map(lambda array: _join(array, length), outputs)
    return total, token_values, (grad_x, grad_kernel)


def num_chunks(rows: int, length: int, vocab: int) -> int:
    """Returns the number of chunks to divide logits [rows, length, vocab] into.

    It depends on the number of devices of the context's mesh.
    """
    # Rows are spread over the mesh's batch axes and the vocabulary over `model`.
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    bytes_per_device = 4 * rows * length * vocab / devices  # float32
    return min(length, max(1, math.ceil(bytes_per_device / CHUNK_BYTES)))


def _split(a: Array, count: int, size: int) -> Array:
    """Splits the length: [B, L, …] -> [count, B, size, …], padded with zeros."""
    padding = count * size - a.shape[1]
    a = jnp.pad(a, [(0, 0), (0, padding), *[(0, 0)] * (a.ndim - 2)])
    return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)


def _join(a: Array, length: int) -> Array:
    """Joins the pieces of `_split` and drops the padding: [count, B, size, …] -> [B, L, …]."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]


def _compute_chunk(
    x: Array,
    targets: Array,
    weights: Array,
    kernel: Array,
    label_smoothing: float,
    z_loss: float,
    needs_grad: tuple[bool, bool],
) -> tuple[Array, TokenValues, Gradients]:
    """Returns the results of `_sum_over_chunks` for one chunk of l positions."""
    logits = jnp.matmul(x, kernel)  # [B, l, V]
    vocab = logits.shape[-1]
    largest = jnp.max(logits, axis=-1)
    log_z = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    # A sum and not a gather: XLA fuses it, and V may be sharded.
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    # The smoothed target q: `confidence` at the target, `low` at each other token.
    confidence, low = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
    nll = log_z - target_logit
    if label_smoothing:
        # -Σ q log softmax, minus q's entropy. As in T5X, 1e-20 avoids the logarithm of 0.
        expected = (confidence - low) * target_logit + low * jnp.sum(logits, axis=-1)
        entropy = -(confidence * jnp.log(confidence) + (vocab - 1) * low * jnp.log(low + 1e-20))
        nll = log_z - expected - entropy
    z = z_loss * jnp.square(log_z)
    total = jnp.sum((nll + z) * weights)
    # A comparison with the maximum, since argmax takes as long on a CPU as all the rest. So a tie
    # counts as correct.
    token_values = {"nll": nll, "z": z, "correct": (target_logit >= largest).astype(jnp.float32)}
    if not any(needs_grad):
        return total, token_values, (None, None)

    # d loss / d logits = softmax · (1 + 2 z_loss log Z) - q
    scale = weights * (1.0 + 2.0 * z_loss * log_z)
    grad_logits = jnp.exp(logits - log_z[..., None]) * scale[..., None]
    grad_logits -= jnp.where(is_target, confidence, low) * weights[..., None]
    # An einsum, since a sharded kernel would be gathered twice for `grad_logits @ kernel.T`.
    grad_x = jnp.einsum("blv,dv->bld", grad_logits, kernel) if needs_grad[0] else None
    grad_kernel = jnp.einsum("bld,blv->dv", x, grad_logits) if needs_grad[1] else None
    return total, token_values, (grad_x, grad_kernel)
