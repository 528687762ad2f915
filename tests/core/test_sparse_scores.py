"""Scores and decoding of sparse models: an input's results are its own, in any batch and bucket."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import example_batch, pack, random_params_of, rows, shift_right
from sparse_models import ROUTINGS, sparse_model

from pemoe_jax.core import steps

LARGEST = 1e-5
every_routing = pytest.mark.parametrize("name", ROUTINGS)


@functools.cache
def sparse(name: str):
    """Returns a model whose one layer in each stack is sparse, and its parameters."""
    settings = dataclasses.replace(ROUTINGS[name], sparse_step=1)
    transformer = sparse_model(settings, num_encoder_layers=1, num_decoder_layers=1)
    return transformer, random_params_of(transformer)


@functools.cache
def score(name: str):
    return jax.jit(functools.partial(steps.score_choices, sparse(name)[0]))


def batch_of(
    inputs: list[np.ndarray], targets: list[list[np.ndarray]], widths: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Returns inputs and their choices padded to `widths`; choices that are missing are zeros."""
    choices = np.zeros((len(inputs), max(map(len, targets)), widths[1]), np.int32)
    for i, row in enumerate(targets):
        for j, target in enumerate(row):
            choices[i, j, : len(target)] = target
    return {
        "encoder_input_tokens": np.stack([np.pad(x, (0, widths[0] - len(x))) for x in inputs]),
        "decoder_input_tokens": shift_right(choices),
        "decoder_target_tokens": choices,
    }


def texts(lengths: list[int], seed: int) -> list[np.ndarray]:
    array = rows(np.random.default_rng(seed), lengths, max(lengths))
    return [row[:length] for row, length in zip(array, lengths, strict=True)]


# The last input is longest: its tokens would fill places in a group of the whole batch. Repeated
# tokens are routed alike.
INPUTS = [*texts([7, 4, 2], seed=1), np.array([9] * 11 + [1], np.int32)]
TARGETS = [texts([5, 3], seed=i) for i in range(3)] + [[np.array([9] * 5 + [1], np.int32)] * 2]


@every_routing
def test_scores_of_an_input_are_its_own(name):
    """The same in a batch as alone, in a wider bucket, and beside another choice."""
    weights = sparse(name)[1]
    together = np.asarray(score(name)(weights, batch_of(INPUTS, TARGETS, (12, 6))))
    assert np.ptp(together) > 1  # nats
    other = np.array([9, 9, 1], np.int32)
    for i, (x, targets) in enumerate(zip(INPUTS, TARGETS, strict=True)):
        alone = score(name)(weights, batch_of([x], [[other, *targets]], (20, 9)))
        np.testing.assert_allclose(alone[0, 1:], together[i], rtol=0, atol=LARGEST)


def test_packed_rows_equal_unpacked_ones():
    """Without a limit, tokens of other examples in a row change nothing, nor does padding."""
    transformer, weights = sparse("gshard")
    batch = example_batch()

    @jax.jit
    def logits(batch):
        return steps.apply_model(transformer, weights, batch, None)

    packed = pack(batch)
    apart, together = (
        np.asarray(logits(rows))[rows["decoder_target_tokens"] > 0] for rows in (batch, packed)
    )
    np.testing.assert_allclose(together, apart, rtol=0, atol=LARGEST)


@every_routing
def test_decoding_step_by_step_equals_teacher_forcing(name):
    """The logits of every step are those of all targets at once."""
    transformer, weights = sparse(name)
    inputs = batch_of(INPUTS, TARGETS, (12, 6))["encoder_input_tokens"]
    tokens = rows(np.random.default_rng(5), [8, 8, 8, 8], 8)
    teacher_inputs = shift_right(tokens)

    @jax.jit
    def run(weights, inputs, teacher_inputs, tokens):
        apply = functools.partial(transformer.apply, enable_dropout=False)
        encoded = apply({"params": weights}, inputs, method=transformer.encode)
        decode = functools.partial(apply, method=transformer.decode)
        whole = decode({"params": weights}, encoded, inputs, teacher_inputs, tokens)
        stepwise = functools.partial(decode, decode=True, max_decode_length=tokens.shape[1])
        _, caches = stepwise(
            {"params": weights}, encoded, inputs, tokens, tokens, mutable=["cache", "cross_cache"]
        )

        def step(cache, token):
            variables = {"params": weights, **caches, "cache": cache}
            logits, updated = stepwise(
                variables, encoded, inputs, token[:, None], token[:, None], mutable=["cache"]
            )
            return updated["cache"], logits[:, 0]

        _, logits = jax.lax.scan(step, caches["cache"], jnp.swapaxes(teacher_inputs, 0, 1))
        return whole, jnp.swapaxes(logits, 0, 1)

    whole, by_step = run(weights, inputs, teacher_inputs, tokens)
    np.testing.assert_allclose(by_step, whole, rtol=0, atol=LARGEST)
