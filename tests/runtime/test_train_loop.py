"""The training loop: what it says about a loss that is not finite, or does not fall."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_models import model

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import options
from pemoe_jax.runtime.train_loop import (
    LossTrend,
    TrainLoop,
    _Damage,
    _Window,
    summarize_trend,
)


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


# First losses of runs on real prompts, with batches of 4 short rows: MoV on a random base with
# AdamW at 3e-2 and with Adafactor at 3e-4, and MoLORA on the quickstart's base with the latter.
MOV_ADAMW = numbers("""
    11.2 10.7 10.9 11 11.1 10.7 10.7 10.9 10.5 10.6 10.3 10.6 10.6 10.7 11.1 10.5 10.5
    10.4 10.5 10.5 9.8 10.7 10.5 10.6 9.6 10.2 10.4 10.5 10.3 10.5 9.7 10.5 10.5 9.4
    10 10.3 9.8 10.2 9.6 9.9 9.9 9.1 9.2 8.5 10 10.2 9.1 9.3 9.7 9.6
""")
MOV_ADAFACTOR = numbers("""
    11.2 10.7 10.9 11 11.1 10.7 10.8 10.9 10.6 10.6 10.3 10.6 10.6 10.8 11.1 10.7 10.6
    10.7 10.7 10.7 10.4 10.8 10.7 10.9 10.4 10.4 10.9 11 10.7 11.2 10.6 11.3 10.7 10.9
    10.9 10.7 10.8 10.6 10.8 10.8 10.6 10.4 10.2 10.7 10.8 11 11 10.7 11 10.5
""")
MOLORA_ADAFACTOR = numbers("""
    8.1 10.4 8.9 7.8 10.5 10.7 9.6 8.8 9.2 8.7 7.5 9.3 9 8.1 10.9 9.1 12.3
    8.6 9.8 10.5 11.5 8.4 10.4 7.7 11.7 10 11.1 9 9.4 9.3 10.8 9.7 9.1 9.5
    7.9 7.9 9.3 8.7 6.7 7.8 8.6 9.4 10 9.9 9.8 9.5 10.4 8.9 8.3 9.9
""")


def noisy(levels, deviation):
    """Losses around `levels`, with normal noise of the batches."""
    return np.asarray(levels) + np.random.default_rng(0).normal(0, deviation, len(levels))


FALLEN = {
    "MoV, AdamW": MOV_ADAMW,
    "slowly": np.linspace(10.8, 10.4, 20),
    "after a warm-up": noisy([9.3] * 8 + list(np.linspace(9.2, 6.5, 12)), 0.3),
    "amid noise": noisy(np.linspace(2.0, 1.6, 100), 0.25),
    "with one bad batch": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 99.0] + [2.0] * 11,
    "to zero": np.linspace(1.0, 0.0, 50),
}
NOT_FALLEN = {
    "MoV, Adafactor": MOV_ADAFACTOR,
    "MoLORA, Adafactor": MOLORA_ADAFACTOR,
    "constant": [10.8] * 20,
    "rounding": np.linspace(9.5552, 9.5547, 20),
    "less than 1 %": np.linspace(10.80, 10.72, 60),
    "noise alone": noisy([9.55] * 20, 0.3),
    "noise of a long tenth": noisy([2.0] * 1000, 0.5),
    "rises": np.linspace(2.0, 2.5, 20),
    "one good batch": [5.0] * 19 + [1.0],
}


@pytest.mark.parametrize("losses", FALLEN.values(), ids=FALLEN.keys())
def test_loss_has_fallen(losses):
    assert summarize_trend(losses)[2]


@pytest.mark.parametrize("losses", NOT_FALLEN.values(), ids=NOT_FALLEN.keys())
def test_loss_has_not_fallen(losses):
    assert not summarize_trend(losses)[2]


def test_trend_by_hand():
    # Medians of (9, 7, 8) and (4, 2, 3).
    assert summarize_trend([9, 7, 8, 5, 5, 5, 4, 2, 3])[:2] == (8.0, 3.0)


def test_warning_is_given_once_after_the_first_tenth():
    trend = LossTrend(0, total_steps=900)
    assert trend.update(1, [9.5]) is None
    assert trend.update(80, [9.5] * 79) is None
    warning = trend.update(120, [9.4999] * 40)  # the first report after step 90
    assert warning is not None
    assert warning.startswith(
        "step 120  the loss has not fallen since the start (9.5000 to 9.4999)"
    )
    assert trend.update(160, [9.5] * 40) is None


def test_no_warning_while_the_loss_falls_and_in_short_or_resumed_runs():
    assert LossTrend(0, 200).update(50, MOV_ADAMW) is None
    assert LossTrend(0, 49).update(49, [9.5] * 49) is None  # too few steps to tell
    assert LossTrend(5, 300).update(55, [9.5] * 50) is None
    assert LossTrend(0, 50).update(50, [9.5, 9.5]) is None  # the other steps were skipped
    assert LossTrend(0, 50).update(50, MOV_ADAFACTOR) is not None


@pytest.mark.parametrize(
    ("is_first", "advice"),
    [(True, "starts from damaged"), (False, "lower LEARNING_RATE and resume from checkpoint_2")],
)
def test_the_loss_before_any_update_does_not_depend_on_the_learning_rate(is_first, advice):
    loop = TrainLoop.__new__(TrainLoop)
    loop.schedule, loop.numerics = lambda step: 0.1, options.Numerics()
    loop._last_saved = 2
    scalars = {"loss": math.nan, "accuracy": 0.0, "wait_share": 0.0, "tokens_per_second": 1.0}
    scalars["step_seconds"] = 1.0
    damaged = _Damage(4, "the loss", math.nan)
    summary = dict(scalars), None, [math.nan], damaged
    window = types.SimpleNamespace(summarize=lambda: summary, texts={})
    writer = types.SimpleNamespace(write=lambda *_: None)
    bar = types.SimpleNamespace(report=lambda *_: None)
    with pytest.raises(InputError, match=rf"the loss is nan at step 4 .*{advice}"):
        loop._report(5, window, writer, bar, is_first)


@pytest.mark.parametrize(("first_bad_rows", "stack"), [([0], "decoder"), ([0, 1], "encoder")])
def test_a_loss_of_nan_names_the_first_router_with_logits_of_nan(first_bad_rows, stack):
    """The rows are those of the first bad step; later ones have NaN everywhere."""
    loop = TrainLoop.__new__(TrainLoop)
    loop.schedule, loop.logging = lambda step: 0.1, options.Logging(router_metrics="sites")
    loop.numerics, loop._last_saved = options.Numerics(), 0
    loop.model = model("switch")  # decoder/layers_1 and encoder/layers_1
    window = _Window()
    for step, bad_rows in enumerate(([], first_bad_rows, [0, 1]), 3):
        routers = np.zeros((2, 6))
        routers[bad_rows] = math.nan
        metrics = {"loss": math.nan if bad_rows else 1.0, "cross_ent_loss": 1.0, "accuracy": 0.0}
        dispatch = np.full((2, 3), 0.25)
        arrays = jax.tree.map(jnp.asarray, {**metrics, "routers": routers, "dispatch": dispatch})
        window.append(step, arrays, 10, dispatch_time=0.0)
    written, lines = {}, []
    writer = types.SimpleNamespace(write=lambda _, values, texts: written.update(values))
    bar = types.SimpleNamespace(report=lambda _, line: lines.append(line))
    with pytest.raises(InputError, match=rf"at step 4 .* the router at {stack}/layers_1/mlp/ex"):
        loop._report(5, window, writer, bar, is_first=False)
    assert written["router/encoder/mlp/experts/dropped"] == written["router/without_expert"] == 0.25
    assert "dropped 25.0% of assignments, 25.0% of tokens" in lines[0]


def test_a_loss_is_looked_at_when_its_step_has_ended():
    """Not the last step's, which may be running."""
    window = _Window()
    assert not window.has_failed_before_last()
    for step, loss in enumerate((1.0, math.inf), 1):
        window.append(step, {"loss": jnp.asarray(loss)}, 1, 0.0)
        assert not window.has_failed_before_last()
    window.append(3, {"loss": jnp.asarray(1.0)}, 1, 0.0)
    assert window.has_failed_before_last()


def losses_of_a_window(window: _Window, first: int, losses: list[float]) -> None:
    for step, loss in enumerate(losses, first):
        metrics = {"loss": loss, "grad_norm": loss, "cross_ent_loss": loss}
        window.append(step, jax.tree.map(jnp.asarray, metrics), 1, 0.0)


def test_skipped_steps_are_counted_in_a_row_across_reports():
    window = _Window(max_skipped=2)
    losses_of_a_window(window, 1, [3.0, math.nan, math.nan, 1.0, math.nan])
    assert not window.has_failed_before_last()
    scalars, _, losses, damaged = window.summarize()
    assert (scalars["loss"], scalars["skipped"], losses, damaged) == (2.0, 3.0, [3.0, 1.0], None)
    losses_of_a_window(window, 6, [math.inf, math.inf])
    assert not window.has_failed_before_last()
    losses_of_a_window(window, 8, [math.nan])
    assert window.has_failed_before_last()
    assert window.summarize()[3] == _Damage(7, "the loss", math.inf)


def test_a_gradient_that_is_not_finite_ends_a_run_with_a_finite_loss():
    window = _Window()
    for step, norm in ((1, 1.0), (2, math.inf)):
        metrics = {"loss": 1.0, "grad_norm": norm, "cross_ent_loss": 1.0}
        window.append(step, jax.tree.map(jnp.asarray, metrics), 1, 0.0)
    assert window.summarize()[3] == _Damage(2, "the gradient norm", math.inf)
