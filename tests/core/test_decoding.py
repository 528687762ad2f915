"""Greedy decoding: how rows end. That it equals full decoding is in test_methods.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from methods import example_batch, model, random_params

from pemoe_jax.core import decoding, params

INPUTS = example_batch()["encoder_input_tokens"]


@functools.cache
def decode(max_decode_length: int):
    """Jitted (params, inputs, eos_id) -> tokens of MoV."""
    greedy = functools.partial(
        decoding.greedy_decode, model("mov"), max_decode_length=max_decode_length
    )
    return jax.jit(lambda p, x, eos: greedy(p, encoder_input_tokens=x, eos_id=eos))


def test_rows_end_at_eos_by_themselves():
    """Declaring a token that came out to be the end cuts just the rows that hold it."""
    weights = random_params("mov")
    free = np.asarray(decode(8)(weights, INPUTS, 999))  # no such token: nothing ends
    assert free.shape == (4, 8) and free.dtype == np.int32
    eos = int(free[0, 2])
    held = [row.tolist().index(eos) if eos in row else None for row in free]
    assert held[0] is not None and len(set(held)) > 1, "rows should end at different places"
    cut = np.asarray(decode(8)(weights, INPUTS, eos))
    for row, full, end in zip(cut, free, held, strict=True):
        expected = full.copy()
        if end is not None:
            expected[end + 1 :] = 0
        np.testing.assert_array_equal(row, expected)


def test_rows_do_not_depend_on_their_neighbours():
    weights = random_params("mov")
    together = np.asarray(decode(8)(weights, INPUTS, 999))
    alike = np.repeat(INPUTS[2:3], 4, axis=0)
    np.testing.assert_array_equal(
        np.asarray(decode(8)(weights, alike, 999)), np.repeat(together[2:3], 4, axis=0)
    )


def test_length_is_a_bound_and_nothing_more():
    """The tokens of a short answer begin a long one: the cache's length has no say in them."""
    weights = random_params("mov")
    np.testing.assert_array_equal(
        np.asarray(decode(3)(weights, INPUTS, 999)),
        np.asarray(decode(8)(weights, INPUTS, 999))[:, :3],
    )


def test_rows_that_end_at_once():
    """With the last norm's scale at zero all logits are equal: the argmax is token 0, the end."""
    flat = params.flatten(random_params("mov"))
    flat["decoder/decoder_norm/scale"] = jnp.zeros(16)
    tokens = np.asarray(decode(8)(params.unflatten(flat), INPUTS, 0))
    np.testing.assert_array_equal(tokens, np.zeros((4, 8)))
