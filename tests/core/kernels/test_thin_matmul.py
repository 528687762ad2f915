"""Products with a short side: values and gradients of the plain ones, and how XLA orders them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core.kernels import thin_matmul


def draw(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(function, *args):
    """Of Σ function(*args) · w for some w, so that each element has a gradient of its own."""
    out, backward = jax.vjp(function, *args)
    w = np.random.default_rng(1).standard_normal(out.shape)
    return out, *backward(jnp.asarray(w, out.dtype))


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
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
    found = value_and_gradients(jax.jit(thin_matmul.thin_matmul), x, w)
    assert_close(found, value_and_gradients(jnp.matmul, x, w), tolerance)


@pytest.mark.parametrize("experts", [1, 3, 10, 30])
def test_mix_is_the_sum_over_experts(experts):
    probs, vectors = draw((2, 5, 3, experts), (3, experts, 7))

    def plain(probs, vectors):
        return jnp.einsum("blhe,hek->blhk", probs, vectors)

    found = value_and_gradients(jax.jit(thin_matmul.mix_vectors), probs, vectors)
    assert_close(found, value_and_gradients(plain, probs, vectors), 1e-5)


@pytest.mark.parametrize("inner, outer", [(64, 5), (5, 64)])
def test_the_short_factor_stays_left(inner, outer):
    """XLA must not make one product [in, out] of the gradient of a long and narrow matrix."""
    x, w = draw((2, 16, inner), (inner, outer))

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sum(jnp.sin(thin_matmul.thin_matmul(x, w))))(w)

    lines = jax.jit(gradient).lower(x, w).compile().as_text().splitlines()
    found = [line for line in lines if " dot(" in line]
    assert any("= f32[5,64]" in line for line in found), found
    assert not any("= f32[64,5]" in line for line in found), found
