"""The router: hand-derived probabilities, precision, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core.routing import Router


def test_hand_derived_probabilities():
    """Logits are x @ kernel; with logarithms in the kernel the softmax is a ratio of whole numbers.

    kernel = [[ln 2, 0, 0], [0, ln 3 / 2, ln 2]]
    x = (1, 0): exp(logits) = (2, 1, 1)                    -> (1/2, 1/4, 1/4)
    x = (0, 2): exp(logits) = (1, 3, 4)                    -> (1/8, 3/8, 4/8)
    x = (1, 2): exp(logits) = (2, 3, 4)                    -> (2/9, 3/9, 4/9)
    x = (0, 0): all logits are 0                           -> (1/3, 1/3, 1/3)
    """
    kernel = jnp.array([[np.log(2), 0, 0], [0, np.log(3) / 2, np.log(2)]], jnp.float32)
    x = jnp.array([[[1.0, 0], [0, 2], [1, 2], [0, 0]]])
    probs, _ = Router(num_experts=3).apply({"params": {"kernel": kernel}}, x)
    expected = [[[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 8, 4 / 8], [2 / 9, 3 / 9, 4 / 9], [1 / 3] * 3]]
    np.testing.assert_allclose(probs, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5)], ids=["features", "heads"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probabilities_are_float32_and_sum_to_one(shape, dtype):
    """One kernel [features, E] whether or not there are heads; bfloat16 in, float32 out."""
    x = jax.random.normal(jax.random.PRNGKey(0), shape).astype(dtype) * 10
    router = Router(num_experts=7)
    (probs, _), variables = router.init_with_output(jax.random.PRNGKey(1), x)
    assert variables["params"]["kernel"].shape == (5, 7)
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert probs.shape == (*shape[:-1], 7) and probs.dtype == jnp.float32
    assert (np.asarray(probs) >= 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)


def test_bfloat16_input_is_routed_in_float32():
    """A kernel that bfloat16 cannot hold (1 + 2^-10) still counts.

    Logit difference 64 * 2^-10 = 1/16, so p = 1 / (1 + exp(-1/16)) = 0.51562; in bfloat16 both
    entries of the kernel round to 1 and p would be 0.5.
    """
    kernel = jnp.array([[1 + 2**-10, 1.0]], jnp.float32)
    x = jnp.full((1, 1, 1), 64, jnp.bfloat16)
    probs, _ = Router(num_experts=2).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(probs[0, 0], [0.51562, 0.48438], atol=1e-5)


def test_large_logits_do_not_overflow():
    """exp(1e4) overflows float32, so the softmax must subtract the maximum first."""
    probs, _ = Router(num_experts=2).apply(
        {"params": {"kernel": jnp.array([[1e4, 0.0]])}}, jnp.ones((1, 1, 1))
    )
    np.testing.assert_array_equal(probs, [[[1.0, 0.0]]])


def test_start_is_nearly_uniform():
    """Kernel ~ N(0, 0.02), 20,000 draws: a deviation within 3 % is 6 standard errors wide."""
    x = jnp.ones((1, 1, 2000))
    variables = Router(num_experts=10).init(jax.random.PRNGKey(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    assert abs(kernel.std() - 0.02) < 0.0006
    assert abs(kernel.mean()) < 0.0006


def test_gradient_by_hand():
    """d p_0 / d logit_0 = p_0 (1 - p_0), d p_0 / d logit_1 = -p_0 p_1, times x.

    x = 2, kernel 0: p = (1/2, 1/2) -> dp_0/dkernel = 2 * (1/4, -1/4) = (1/2, -1/2).
    """
    x = jnp.full((1, 1, 1), 2.0)
    grad = jax.grad(
        lambda k: Router(num_experts=2).apply({"params": {"kernel": k}}, x)[0][0, 0, 0]
    )(jnp.zeros((1, 2)))
    np.testing.assert_allclose(grad, [[0.5, -0.5]], rtol=1e-6)
