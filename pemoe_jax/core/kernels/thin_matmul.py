"""Matrix products in which one side of a matrix is short: experts, or ranks of low-rank pairs.

XLA turns the gradient of such a matrix [in, out] into one product of that shape, whichever way
round it was written. On CPUs the product transposes its left factor, and where that is the
activation it costs many times the product itself: `x[1024, 1024]ᵀ @ g[1024, 30]` took 3.8 ms on one
thread where `(gᵀ @ x)ᵀ` takes 0.65 ms. So the gradients are written out here, the short factor
left, behind a barrier that keeps XLA from turning them round. Values are those of plain products.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def thin_matmul(x: Array, w: Array) -> Array:
    """`x @ w`, for w of which either side is short; reverse mode only.

    Args:
      x: [..., in]. w: [in, out], of x's dtype.
    """
    return jnp.matmul(x, w)


def _thin_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, w), (x, w)


def _thin_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    rows = tuple(range(x.ndim - 1))
    turned = x.shape[-1] > g.shape[-1]
    left, right = (g, x) if turned else (x, g)
    product = jax.lax.dot_general(left, right, ((rows, rows), ((), ())))
    product = jax.lax.optimization_barrier(product)
    return jnp.matmul(g, w.T), product.T if turned else product


thin_matmul.defvjp(_thin_forward, _thin_backward)


@jax.custom_vjp
def mix_vectors(probs: Array, vectors: Array) -> Array:
    """`Σ_e p_e l_e` head by head; reverse mode only.

    Args:
      probs: [B, L, H, E]. vectors: [H, E, K], of probs' dtype.

    Returns:
      [B, L, H, K].
    """
    return _heads_last(jnp.matmul(_heads_first(probs), vectors), probs.shape[:2])


def _heads_first(x: Array) -> Array:
    """[B, L, H, …] -> [H, B·L, …]: XLA's products want their batch, here the heads, first."""
    return jnp.swapaxes(x.reshape(-1, *x.shape[2:]), 0, 1)


def _heads_last(x: Array, rows: tuple[int, ...]) -> Array:
    """[H, B·L, …] -> [B, L, H, …]."""
    return jnp.swapaxes(x, 0, 1).reshape(*rows, x.shape[0], x.shape[2])


def _mix_forward(probs: Array, vectors: Array) -> tuple[Array, tuple[Array, Array]]:
    return mix_vectors(probs, vectors), (probs, vectors)


def _mix_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    probs, vectors = saved
    left, right = _heads_first(probs), _heads_first(g)
    to_probs = jnp.matmul(right, jnp.swapaxes(vectors, 1, 2))  # [H, B·L, E]
    to_vectors = jax.lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))  # [H, E, K]
    return _heads_last(to_probs, probs.shape[:2]), jax.lax.optimization_barrier(to_vectors)


mix_vectors.defvjp(_mix_forward, _mix_backward)
