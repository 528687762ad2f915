"""Products with a short side against plain ones, and how XLA orders their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core.kernels import thin_matmul


def draw(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(function, *args):
    """Gradients of Σ function(*args) · w with random w, so that no two elements have the same."""
    out, pullback = jax.vjp(function, *args)
    rng = np.random.default_rng(1)
    return out, *pullback(
        jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), out)
    )


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


# float32: sums in another order. bfloat16: one rounding to 8 bits of mantissa, 2⁻⁸, at the end.
PRECISION = [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)]


@pytest.mark.parametrize("dtype, tolerance", PRECISION)
@pytest.mark.parametrize("rows", [(3, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("inner, outer", [(33, 5), (5, 33), (7, 7), (9, 1), (1, 9)])
def test_thin_matmul_is_matmul(inner, outer, rows, dtype, tolerance):
    x, w = draw((*rows, inner), (inner, outer), dtype=dtype)
    actual = value_and_gradients(jax.jit(thin_matmul.thin_matmul), x, w)
    assert_close(actual, value_and_gradients(jnp.matmul, x, w), tolerance)


def test_joint_matmul_is_two_products():
    x, kernel, lora_a = draw((2, 5, 7), (7, 3), (7, 5))

    def plain(x, kernel, lora_a):
        return jnp.matmul(x, kernel), jnp.matmul(x, lora_a)

    args = x, kernel, lora_a
    (logits, low_rank), *grads = value_and_gradients(jax.jit(thin_matmul.joint_matmul), *args)
    (expected_logits, expected_low_rank), *expected_grads = value_and_gradients(plain, *args)
    expected = (expected_logits, expected_low_rank, *expected_grads)
    assert_close((logits, low_rank, *grads), expected, 1e-5)


@pytest.mark.parametrize("experts", [1, 30])
def test_mix_vectors_is_the_sum_over_experts(experts):
    probs, vectors = draw((2, 5, 3, experts), (3, experts, 7))

    def plain(probs, vectors):
        return jnp.einsum("blhe,hek->blhk", probs, vectors)

    actual = value_and_gradients(jax.jit(thin_matmul.mix_vectors), probs, vectors)
    assert_close(actual, value_and_gradients(plain, probs, vectors), 1e-5)


@pytest.mark.parametrize("inner, outer", [(64, 5), (5, 64)])
def test_the_short_factor_stays_left(inner, outer):
    """The compiled gradient of w is a product [short, long], whichever side of w is short."""
    x, w = draw((2, 16, inner), (inner, outer))

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.sin(thin_matmul.thin_matmul(x, w))))(w)

    lines = jax.jit(gradient).lower(x, w).compile().as_text().splitlines()
    actual = [line for line in lines if " dot(" in line]
    assert any("= f32[5,64]" in line for line in actual), actual
    assert not any("= f32[64,5]" in line for line in actual), actual
