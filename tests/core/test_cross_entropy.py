"""The chunked loss against the losses of the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core import cross_entropy

SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)]


def inputs(rows=3, length=7, features=5, vocab=11):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, length, features)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((features, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (rows, length)))
    weights = jnp.asarray(rng.random((rows, length)) * (rng.random((rows, length)) > 0.3))
    return x, kernel, targets, weights.astype(jnp.float32)


def plain(x, kernel, targets, weights, smoothing, z_loss):
    """KL(smoothed target ‖ softmax) and z_loss · log(Z)², of all logits at once."""
    logits, vocab = x @ kernel, kernel.shape[1]
    q = jnp.where(jax.nn.one_hot(targets, vocab) > 0, 1 - smoothing, smoothing / (vocab - 1))
    nll = jnp.sum(jax.scipy.special.xlogy(q, q) - q * jax.nn.log_softmax(logits), axis=-1)
    z = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((nll + z) * weights), (nll, z)


@pytest.mark.parametrize("count", [1, 3, 7])  # chunks of 7, 3 and 1 of 7 tokens
@pytest.mark.parametrize(("smoothing", "z_loss"), SETTINGS)
def test_equals_the_plain_form(monkeypatch, count, smoothing, z_loss):
    monkeypatch.setattr(cross_entropy, "num_chunks", lambda *_: count)
    x, kernel, targets, weights = inputs()
    arguments = (0, 1)
    (expected, (nll, z)), expected_grads = jax.value_and_grad(plain, arguments, has_aux=True)(
        x, kernel, targets, weights, smoothing, z_loss
    )

    @jax.jit
    def scaled(x, kernel):  # the factor must reach the gradients, computed in the forward pass
        total, tokens = cross_entropy.chunked_cross_entropy(
            x, kernel, targets, weights, smoothing, z_loss
        )
        return 3.0 * total, tokens

    (total, tokens), grads = jax.value_and_grad(scaled, arguments, has_aux=True)(x, kernel)
    np.testing.assert_allclose(total, 3.0 * expected, rtol=1e-6)
    np.testing.assert_allclose(tokens["nll"], nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tokens["z"], z, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, 3.0 * expected_grad, rtol=1e-5, atol=1e-5)
    # with a frozen kernel, and without gradients, the values are the same
    np.testing.assert_allclose(jax.grad(lambda x: scaled(x, kernel)[0])(x), grads[0], rtol=1e-6)
    np.testing.assert_allclose(scaled(x, kernel)[0], total, rtol=1e-6)


def test_correct_by_hand():
    """Logits are the rows of the kernel: 1 is largest in the first, 0 and 2 tie in the second."""
    kernel = jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]])
    x = jnp.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    targets = jnp.array([[1, 2, 2, 1]])
    _, tokens = cross_entropy.chunked_cross_entropy(x, kernel, targets, jnp.ones((1, 4)))
    assert tokens["correct"].tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_no_residual_has_the_size_of_the_vocabulary():
    """The backward pass saves the gradient of x, [2, 4, 3], and no logits of 50 tokens."""
    x, kernel, targets, weights = inputs(2, 4, 3, 50)
    _, pullback = jax.vjp(
        lambda x: cross_entropy.chunked_cross_entropy(x, kernel, targets, weights)[0], x
    )
    residuals = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert (2, 4, 3) in residuals
    assert not [shape for shape in residuals if 50 in shape]


def test_chunks_by_hand():
    """16 × 256 tokens of 32,128 logits in float32 are 526 MB: four chunks of at most 134 MB."""
    assert cross_entropy.num_chunks(16, 256, 32_128) == 4
    assert cross_entropy.num_chunks(8, 32, 32_128) == 1
    assert cross_entropy.num_chunks(1_000_000, 5, 32_128) == 5
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    with jax.set_mesh(mesh):
        assert cross_entropy.num_chunks(16, 256, 32_128) == 4
