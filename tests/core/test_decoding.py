"""Greedy decoding: how rows end. test_methods.py compares it with full decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from methods import example_batch, model, random_params

from pemoe_jax.core import decoding, params

INPUTS = example_batch()["encoder_input_tokens"]


@functools.cache
def decode(max_decode_length: int):
    """Returns a jitted (params, inputs, eos_id) -> tokens of MoV."""
    greedy = functools.partial(
        decoding.greedy_decode, model("mov"), max_decode_length=max_decode_length
    )
    return jax.jit(lambda p, x, eos: greedy(p, encoder_input_tokens=x, eos_id=eos))


def test_rows_end_at_eos_independently():
    """With a decoded token as eos, exactly the rows that contain it end there."""
    weights = random_params("mov")
    endless = np.asarray(decode(8)(weights, INPUTS, 999))  # no such token, so no row ends
    assert endless.shape == (4, 8) and endless.dtype == np.int32
    eos = int(endless[0, 2])
    ends = [row.tolist().index(eos) if eos in row else None for row in endless]
    assert ends[0] is not None and len(set(ends)) > 1, "rows should end at different positions"
    decoded = np.asarray(decode(8)(weights, INPUTS, eos))
    for row, full, end in zip(decoded, endless, ends, strict=True):
        expected = full.copy()
        if end is not None:
            expected[end + 1 :] = 0
        np.testing.assert_array_equal(row, expected)


def test_rows_do_not_depend_on_each_other():
    weights = random_params("mov")
    together = np.asarray(decode(8)(weights, INPUTS, 999))
    copies = np.repeat(INPUTS[2:3], 4, axis=0)
    np.testing.assert_array_equal(
        np.asarray(decode(8)(weights, copies, 999)), np.repeat(together[2:3], 4, axis=0)
    )


def test_tokens_do_not_depend_on_max_decode_length():
    """The tokens with a short limit are the first tokens with a long one."""
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


def test_logits_that_are_not_finite_end_a_row():
    """A NaN would be the argmax's token 0, padding: an empty text."""
    flat = params.flatten(random_params("mov"))
    flat["decoder/decoder_norm/scale"] = jnp.full(16, jnp.nan)
    tokens = np.asarray(decode(8)(params.unflatten(flat), INPUTS, 1))
    np.testing.assert_array_equal(tokens, [[decoding.NOT_FINITE] + [0] * 7] * 4)
