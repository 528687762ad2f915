"""Properties that every method must have, with the whole network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import (
    METHODS,
    PEFT_METHODS,
    PLAIN,
    example_batch,
    forward,
    largest_difference,
    model,
    pack,
    random_params,
    rows,
    shift_right,
    start,
)

from pemoe_jax.core import decoding, params, steps

every_method = pytest.mark.parametrize("method", METHODS)


def real_logits(method: str, weights, batch, **kwargs) -> np.ndarray:
    """Logits at target tokens [tokens, V]."""
    logits = np.asarray(forward(method, **kwargs)(weights, batch))
    return logits[batch["decoder_target_tokens"] > 0]


def base_part(tree: dict) -> dict:
    return {k: v for k, v in params.flatten(tree).items() if "_adapter/" not in k}


# --- start of training, and degenerate mixtures ---


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_starts_as_the_base(method):
    """Bit for bit, except MoV, which multiplies by a sum of probabilities: one up to rounding."""
    weights, batch = start(method), example_batch()
    adapted = real_logits(method, weights, batch)
    base = real_logits("full", params.unflatten(base_part(weights)), batch)
    if method == "mov":
        assert largest_difference(adapted, base) < 1e-5
    else:
        np.testing.assert_array_equal(adapted, base)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_adapters_matter(method):
    """The random adapters of these tests change the logits, so that comparisons mean something."""
    weights, batch = random_params(method), example_batch()
    base = real_logits("full", params.unflatten(base_part(weights)), batch)
    assert largest_difference(real_logits(method, weights, batch), base) > 0.05


@pytest.mark.parametrize("method", PLAIN)
def test_one_expert_equals_the_plain_method(method):
    plain, batch = random_params(PLAIN[method]), example_batch()
    routed = params.flatten(random_params(method, num_experts=1))
    routers = {k: v for k, v in routed.items() if "/router/" in k}
    assert routers
    weights = params.unflatten(params.flatten(plain) | routers)
    out = real_logits(method, weights, batch, num_experts=1)
    assert largest_difference(out, real_logits(PLAIN[method], plain, batch)) < 1e-6


@pytest.mark.parametrize("method", PLAIN)
def test_equal_experts_equal_one(method):
    plain, batch = random_params(PLAIN[method]), example_batch()
    single, flat = params.flatten(plain), params.flatten(random_params(method))
    weights = {
        path: leaf if "/router/" in path else jnp.broadcast_to(single[path], leaf.shape)
        for path, leaf in flat.items()
    }
    out = real_logits(method, params.unflatten(weights), batch)
    assert largest_difference(out, real_logits(PLAIN[method], plain, batch)) < 1e-5


# --- training ---


@functools.cache
def trained(method: str, microbatches: int = 1, packed: bool = False):
    """Returns (initial trainable, state after three steps, metrics of each); SGD, no dropout."""
    trainable, frozen = params.split(random_params(method), METHODS[method].trainable)
    before = jax.tree.map(np.array, trainable)
    frozen_before = jax.tree.map(np.array, frozen)
    # A small learning rate: with random LoRA pairs (gradients of norm 12) a larger one multiplies
    # rounding by a hundred in each step.
    optimizer, loss = optax.sgd(0.001), steps.Loss(z_loss=1e-3)
    step = steps.make_train_step(model(method), optimizer, loss, microbatches)
    # A copy, because the step donates its state.
    state = steps.TrainState.create(jax.tree.map(jnp.array, trainable), optimizer)
    batch = pack(example_batch()) if packed else example_batch()
    metrics = []
    for _ in range(3):
        state, values = step(state, frozen, batch, jax.random.PRNGKey(0))
        metrics.append({name: np.asarray(value) for name, value in values.items()})
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(frozen_before), strict=True):
        np.testing.assert_array_equal(a, b)
    return before, jax.tree.map(np.array, state), metrics


def assert_same_training(a, b) -> None:
    """Asserts that two results of `trained` from one start changed every parameter equally."""
    (before, state, metrics), (_, other, other_metrics) = a, b
    for values, other_values in zip(metrics, other_metrics, strict=True):
        for name, value in values.items():
            if name != "routers":  # means over microbatches differ from those of the batch
                np.testing.assert_allclose(value, other_values[name], rtol=2e-5, err_msg=name)
    moved = jax.tree.map(np.subtract, state.params, before)
    also_moved = jax.tree.map(np.subtract, other.params, before)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved))
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(also_moved), strict=True):
        assert np.abs(x - y).max() < 5e-5 * largest


@every_method
def test_training_changes_trainable_parameters_alone(method):
    """The loss falls and every trainable array changes; `trained` asserts that no other does."""
    before, state, metrics = trained(method)
    losses = [m["loss"] for m in metrics]
    assert losses[2] < losses[1] < losses[0]
    assert int(state.step) == 3
    before, after = params.flatten(before), params.flatten(state.params)
    expected = params.flatten(random_params(method))
    if method != "full":
        expected = {k: v for k, v in expected.items() if "_adapter/" in k}
    assert set(after) == set(expected)
    for path, leaf in after.items():
        assert (leaf != before[path]).any(), path


@pytest.mark.parametrize("method", ["full", "molora"])
def test_accumulated_gradients_equal_the_whole_batch(method):
    """Rows have 5, 3, 1 and 4 target tokens, microbatches 6 and 7: a mean of means would differ."""
    assert_same_training(trained(method), trained(method, microbatches=2))


@pytest.mark.parametrize("method", ["full", "molora"])
def test_packed_training_equals_unpacked(method):
    assert_same_training(trained(method), trained(method, packed=True))


def test_no_gradient_of_a_frozen_parameter_is_formed():
    """Gradients have the structure of the trainable tree, so there is no place for others."""
    method = "molora"
    trainable, frozen = params.split(random_params(method), METHODS[method].trainable)
    grads, _ = jax.eval_shape(
        functools.partial(steps.grads_and_metrics, model(method), steps.Loss()),
        trainable, frozen, example_batch(),
    )  # fmt: skip
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)


# --- equivalent computations ---


@every_method
def test_bfloat16_is_close_to_float32(method):
    """8 bits of mantissa through two layers; logits are float32."""
    weights, batch = random_params(method), example_batch()
    out = forward(method, dtype="bfloat16")(weights, batch)
    assert out.dtype == jnp.float32
    real = batch["decoder_target_tokens"] > 0
    exact = real_logits(method, weights, batch)
    assert largest_difference(np.asarray(out)[real], exact) < 0.05
    correlation = np.corrcoef(np.asarray(out)[real].ravel(), exact.ravel())[0, 1]
    assert correlation > 0.999


@every_method
def test_packed_equals_unpacked(method):
    weights, batch = random_params(method), example_batch()
    packed = pack(batch)
    assert packed["encoder_segment_ids"].max() == 4
    expected = real_logits(method, weights, batch)
    out = real_logits(method, weights, packed)  # both in the order of rows
    assert largest_difference(out, expected) < 1e-5


@functools.cache
def _stepwise(method: str):
    """Returns (params, inputs, decoder inputs [B, T]) -> logits [B, T, V], one token at a step."""
    transformer = model(method)

    @jax.jit
    def run(weights, inputs, tokens):
        def decode(cache, step_tokens, mutable):
            return transformer.apply(
                {"params": weights, **cache}, encoded, inputs, step_tokens, step_tokens,
                enable_dropout=False, decode=True, max_decode_length=tokens.shape[1],
                mutable=mutable, method=transformer.decode,
            )  # fmt: skip

        encoded = transformer.apply(
            {"params": weights}, inputs, enable_dropout=False, method=transformer.encode
        )
        _, caches = decode({}, jnp.zeros_like(tokens), ["cache", "cross_cache"])

        def step(cache, token):
            cross = {"cross_cache": caches["cross_cache"]}
            logits, updated = decode({"cache": cache, **cross}, token[:, None], ["cache"])
            return updated["cache"], logits[:, 0]

        _, logits = jax.lax.scan(step, caches["cache"], tokens.T)
        return jnp.swapaxes(logits, 0, 1)

    return run


@every_method
def test_cached_decoding_equals_full_decoding(method):
    """Logits at each step, for inputs of different lengths."""
    weights = random_params(method)
    batch = example_batch(targets=(6, 6, 6, 6))
    stepwise = _stepwise(method)(
        weights, batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    )
    assert largest_difference(stepwise, forward(method)(weights, batch)) < 1e-5


# Logits of cached decoding are tested above; plain methods also in test_hf_parity.py.
@pytest.mark.parametrize("method", PLAIN)
def test_greedy_tokens_are_the_argmax_of_full_decoding(method):
    """With the tokens as its input, the full decoder has them as its argmax; 0 after the end."""
    weights, batch = random_params(method), example_batch()
    tokens = np.asarray(
        jax.jit(functools.partial(decoding.greedy_decode, model(method), max_decode_length=6))(
            weights, encoder_input_tokens=batch["encoder_input_tokens"]
        )
    )
    assert tokens.shape == (4, 6)
    full = batch | {
        "decoder_input_tokens": shift_right(tokens),
        "decoder_target_tokens": np.ones_like(tokens),  # no position is padding
    }
    best = np.asarray(forward(method)(weights, full)).argmax(-1)
    ended = shift_right(np.cumsum(tokens == 1, axis=1)) > 0
    np.testing.assert_array_equal(tokens, np.where(ended, 0, best))


@every_method
def test_scores_equal_a_full_forward_of_each_choice(method):
    """An input is encoded once for all choices; choices that fill rows do not affect the others."""
    weights, batch = random_params(method), example_batch()
    rng = np.random.default_rng(3)
    lengths = [(5, 3, 2), (6, 1, 4), (2, 2, 0), (4, 6, 3)]
    targets = np.stack([np.stack([choice(rng, n) for n in row]) for row in lengths])
    scored = {
        "encoder_input_tokens": batch["encoder_input_tokens"],
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
    }
    scores = np.asarray(
        jax.jit(functools.partial(steps.score_choices, model(method)))(weights, scored)
    )
    assert scores.shape == (4, 3) and scores.dtype == np.float32
    for i in range(3):
        unpacked = batch | {
            "decoder_input_tokens": shift_right(targets[:, i]),
            "decoder_target_tokens": targets[:, i],
        }
        logits = np.asarray(forward(method)(weights, unpacked), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_probs, targets[:, i, :, None], -1)[..., 0]
        expected = (picked * (targets[:, i] > 0)).sum(-1)
        np.testing.assert_allclose(scores[:, i], expected, rtol=2e-5, atol=2e-5)


def choice(rng: np.random.Generator, length: int) -> np.ndarray:
    """An answer of this length, padded to 6; length 0 is a missing choice."""
    return rows(rng, [length], 6)[0] if length else np.zeros(6, np.int32)


def test_scoring_projects_the_input_once():
    """Cross-attention keys and values are [B, Li, ...], never [B * C, Li, ...]."""
    transformer, weights = model("molora"), random_params("molora")
    batch = {
        "encoder_input_tokens": np.ones((2, 37), np.int32),
        "decoder_input_tokens": np.ones((2, 5, 3), np.int32),
        "decoder_target_tokens": np.ones((2, 5, 3), np.int32),
    }
    text = str(jax.make_jaxpr(functools.partial(steps.score_choices, transformer))(weights, batch))
    assert "[2,37,12]" in text  # keys and values, heads joined
    assert "[10,37" not in text
