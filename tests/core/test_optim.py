"""Optimizers against numpy and numbers by hand; schedules by hand."""

import json

import archives
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pemoe_jax.core import optim
from pemoe_jax.core.errors import InputError


def run(optimizer, start: np.ndarray, grads: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the parameter after each step."""
    params = jnp.asarray(start, jnp.float32)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    path = []
    for grad in grads:
        updates, state = update(jnp.asarray(grad, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    return path


# --- Adafactor ---


def test_adafactor_first_step_by_hand():
    """Step 1: the decay is 1 - 1^-0.8 = 0, so v = g² and u = g / sqrt(v) = sign(g).

    rms(3, 4) = sqrt((9 + 16) / 2) = 3.5355; at rate 0.01 each entry moves by 0.035355 against g.
    """
    (after,) = run(optim.adafactor(lambda _: 0.01), np.array([3.0, 4.0]), [np.array([0.2, -7.0])])
    np.testing.assert_allclose(after, [3 - 0.035355, 4 + 0.035355], rtol=1e-6)


def test_adafactor_changes_a_parameter_at_zero():
    """LoRA's B: rms 0 counts as 1e-3, so each entry moves by 0.01 * 1e-3 = 1e-5."""
    (after,) = run(optim.adafactor(lambda _: 0.01), np.zeros(2), [np.array([0.2, -7.0])])
    np.testing.assert_allclose(after, [-1e-5, 1e-5], rtol=1e-5)


def test_adafactor_without_parameter_scale_by_hand():
    """A step is the learning rate, 0.01."""
    optimizer = optim.adafactor(lambda _: 0.01, multiply_by_parameter_scale=False)
    (after,) = run(optimizer, np.array([3.0, 4.0]), [np.array([0.2, -7.0])])
    np.testing.assert_allclose(after, [2.99, 4.01], rtol=1e-6)


def adafactor_numpy(start, grads, rate, factored, clip=1.0, decay_rate=0.8):
    """arXiv 1804.04235, algorithms 4 and 5, with no momentum, in float64.

    Factored, the second moment of entry (i, j) is R_i C_j / mean(R), R and C the decayed means of
    g² over columns and over rows. The update is clipped to a root mean square of `clip` and scaled
    by that of the parameter, at least 1e-3.
    """

    def rms(a):
        return np.sqrt(np.mean(a**2))

    params = np.array(start, np.float64)
    row, column, full = 0.0, 0.0, 0.0
    path = []
    for step, grad in enumerate(grads, start=1):
        decay = 1 - step**-decay_rate
        square = np.asarray(grad, np.float64) ** 2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1) if factored else 0.0
        column = decay * column + (1 - decay) * square.mean(0) if factored else 0.0
        full = decay * full + (1 - decay) * square
        second = np.outer(row, column) / np.mean(row) if factored else full
        update = grad / np.sqrt(second)
        update = update / max(1.0, rms(update) / clip)
        params = params - rate * max(rms(params), 1e-3) * update
        path.append(params)
    return path


@pytest.mark.parametrize("factored", [False, True], ids=["full", "factored"])
def test_adafactor_equals_the_paper(factored):
    """Five steps with gradients of very different sizes, so that clipping and decay take part."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, 6))
    grads = [
        rng.standard_normal((4, 6)) * np.exp(rng.standard_normal((4, 6))) * size
        for size in (1, 1, 30, 0.1, 5)
    ]
    optimizer = optim.adafactor(lambda _: 0.05, min_dim_size_to_factor=4 if factored else 5)
    expected = adafactor_numpy(start, grads, 0.05, factored)
    for ours, theirs in zip(run(optimizer, start, grads), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_adafactor_factors_from_size_128():
    """The state of a [128, 256] matrix has 128 + 256 numbers, that of [127, 256] 127 * 256."""
    optimizer = optim.adafactor(lambda _: 0.01)

    def numbers(shape):
        state = jax.eval_shape(optimizer.init, jnp.zeros(shape))
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert numbers((128, 256)) < 128 + 256 + 10
    assert numbers((127, 256)) >= 127 * 256


def test_adafactor_with_a_step_offset_by_hand():
    """As in T5X after 3 steps of a base model: step n decays by 1 - (n + 3)^-0.8.

    Step 1: decay 1 - 4^-0.8 = 0.670123, so v = 0.329877 for g = 1 and u = 1.741101, not clipped.
    Step 2: decay 1 - 5^-0.8 = 0.724054; v = 0.724054 * 0.329877 + 0.275946 * 4 = 1.342633 for
    g = 2, and u = 2 / 1.158720 = 1.726042.
    """
    settings = {"multiply_by_parameter_scale": False, "clipping_threshold": None}
    optimizer = optim.adafactor(lambda _: 0.01, step_offset=-3, **settings)
    path = run(optimizer, np.zeros(1), [np.ones(1), np.full(1, 2.0)])
    np.testing.assert_allclose(np.ravel(path), [-0.01741101, -0.01741101 - 0.01726042], rtol=1e-5)


def test_adafactor_follows_the_schedule():
    """Step n uses rate(n - 1): rates 0, 1, 2 hundredths."""
    path = run(
        optim.adafactor(lambda step: 0.01 * step, multiply_by_parameter_scale=False),
        np.zeros(1),
        [np.ones(1)] * 3,
    )
    np.testing.assert_allclose(np.ravel(path), [0, -0.01, -0.03], rtol=1e-5)


# --- AdamW ---


def test_adamw_by_hand():
    """Step 1: m / (1 - b1) = g and v / (1 - b2) = g², so the move is rate * sign(g) = 0.1.

    Step 2, g = (1, 0) after (1, 1), second entry: m = 0.9 * 0.1 = 0.09, over 1 - 0.81: 0.473684;
    v = 0.999 * 0.001 = 0.000999, over 1 - 0.998001 = 0.001999: 0.499750, root 0.706930;
    0.473684 / 0.706930 = 0.670058, so it moves by 0.0670058; the first by 0.1 again.
    """
    path = run(
        optim.adamw(lambda _: 0.1), np.array([3.0, 4]), [np.array([1.0, 1]), np.array([1.0, 0])]
    )
    np.testing.assert_allclose(path[0], [2.9, 3.9], rtol=1e-6)
    np.testing.assert_allclose(path[1], [2.8, 3.9 - 0.0670058], rtol=1e-6)


def test_adamw_decays_weights_independently_of_the_gradient():
    """With a zero gradient only the decay is left: 4 - 0.1 * 0.5 * 4 = 3.8."""
    (after,) = run(optim.adamw(lambda _: 0.1, weight_decay=0.5), np.array([4.0]), [np.zeros(1)])
    np.testing.assert_allclose(after, [3.8], rtol=1e-6)


def test_clip_norm_by_hand():
    """With eps = 1 Adam's first step depends on the gradient's size: rate g / (|g| + 1).

    (3, 4) has norm 5, clipped to 1 it is (0.6, 0.8): 0.1 * 0.6 / 1.6 = 0.0375, 0.1 * 0.8 / 1.8.
    """
    optimizer = optim.adamw(lambda _: 0.1, eps=1.0, clip_norm=1.0)
    (after,) = run(optimizer, np.zeros(2), [np.array([3.0, 4.0])])
    np.testing.assert_allclose(after, [-0.0375, -0.0444444], rtol=1e-5)


# --- schedules ---


@pytest.mark.parametrize(
    "factors, warmup, total, expected",
    [
        # without a warm-up its factor is 1 from the first step
        ("constant * linear_warmup", 0, None, {0: 0.5, 1: 0.5}),
        # without a warm-up 1 / sqrt(max(step, 1))
        ("constant * rsqrt_decay", 0, None, {0: 0.5, 1: 0.5, 4: 0.25}),
        # from step 10 (1) to step 50 (0): at 20 three quarters are left
        ("constant * linear_to_zero", 10, 50, {5: 0.5, 10: 0.5, 20: 0.375, 50: 0, 60: 0}),
        # half a cosine: a third of the way (1 + cos 60°) / 2 = 3/4, halfway 1/2
        ("constant * cosine_to_zero", 0, 30, {0: 0.5, 10: 0.375, 15: 0.25, 30: 0, 40: 0}),
    ],
)
def test_schedule_by_hand(factors, warmup, total, expected):
    schedule = optim.create_learning_rate_scheduler(factors, 0.5, warmup, total)
    rates = {step: float(schedule(jnp.array(step))) for step in expected}
    # As in T5X, a rate is at least 1e-8.
    assert rates == pytest.approx({k: max(v, 1e-8) for k, v in expected.items()}, rel=1e-6, abs=0)


with (archives.GOLDENS / "t5x_schedules.json").open() as file:
    T5X_SCHEDULES = json.load(file)


@pytest.mark.parametrize(("settings", "rates"), T5X_SCHEDULES["schedules"])
def test_schedules_equal_those_of_t5x(settings, rates):
    """Goldens of T5X (goldens/make_t5x_schedules.py): all its factors, offset and lower bound."""
    schedule = optim.create_learning_rate_scheduler(**settings)
    steps = jnp.array(T5X_SCHEDULES["steps"])
    np.testing.assert_allclose(schedule(steps), rates, rtol=1e-6)


@pytest.mark.parametrize(
    "factors, message",
    [
        (
            "constant * linear_warmpu",
            "SCHEDULE must be a product of .*linear_warmup.*, got factor 'linear_warmpu'",
        ),
        ("constant * cosine_to_zero", "'cosine_to_zero' needs total_steps, got None"),
        ("rsqrt_normalized_decay", "WARMUP_STEPS must be at least 1 .*, got 0"),
    ],
)
def test_wrong_schedule(factors, message):
    with pytest.raises(InputError, match=message):
        optim.create_learning_rate_scheduler(factors)
