"""The softmax and its product with the values: the form for CPUs against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.core.kernels import cpu_attention


def test_equals_the_plain_form():
    """Values with and without gradients; a query without keys gets the mean of all values."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((2, 3, 5, 7)), jnp.float32)
    logits = jnp.where(rng.random((2, 1, 5, 7)) < 0.6, logits, -1e10).at[0, :, 0].set(-1e10)
    value = jnp.asarray(rng.standard_normal((2, 7, 3, 4)), jnp.float32)
    expected, expected_pullback = jax.vjp(cpu_attention.plain_softmax_matmul, logits, value)
    out, pullback = jax.vjp(cpu_attention.softmax_matmul, logits, value)
    inference = jax.jit(cpu_attention.softmax_matmul)(logits, value)
    np.testing.assert_allclose(inference, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inference[0, 0], jnp.mean(value[0], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(np.testing.assert_array_equal, pullback(out), expected_pullback(out))
