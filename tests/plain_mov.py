"""The plain form of MoV's fused kernels, `core.kernels.mov`."""

import jax
import jax.numpy as jnp


def route_and_scale(y, kernel, vectors, weights):
    """`mov.route_and_scale` in array operations."""
    logits = y.astype(jnp.float32) @ kernel  # [B, L, (H,) E]
    probs = jax.nn.softmax(logits)
    scale = jnp.einsum("bl...e,...ek->bl...k", probs, vectors)
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top_1 = logits >= jnp.max(logits, axis=-1, keepdims=True)
    entropy = log_z - jnp.sum(probs * logits, axis=-1, keepdims=True)
    weights = jnp.expand_dims(weights, range(2, y.ndim))

    def weighted_sum(x):
        x = jnp.broadcast_to(x, logits.shape) * weights
        return jnp.sum(x, axis=tuple(range(x.ndim - 1)))

    sums = jnp.stack([weighted_sum(x) for x in (probs, top_1, entropy, jnp.square(log_z))])
    return y * scale.astype(y.dtype), jax.lax.stop_gradient(sums)
