"""Bootstrap intervals against the binomial distribution."""

import numpy as np
import pytest

from pemoe_jax.analysis.zero_shot import bootstrap


def test_examples_are_drawn_with_all_their_prompts():
    """Fifteen equal prompts have the interval of a single prompt."""
    correct = np.array([1.0] * 30 + [0.0] * 20)
    prompt = (np.arange(50), correct)
    single = bootstrap.resampled_accuracies([prompt], 4000, 0, "cb")
    many = bootstrap.resampled_accuracies([prompt] * 15, 4000, 0, "cb")
    np.testing.assert_allclose(single, many)
    # Binomial: sqrt(0.6 * 0.4 / 50) = 0.06928; the deviation of 4000 draws is within 5 %
    assert single[0].std() == pytest.approx(0.06928, rel=0.05)
    assert single[0].mean() == pytest.approx(0.6, abs=0.005)
    low, high = bootstrap.interval(single[0])
    # 1.96 deviations to each side, in steps of 1/50
    assert low == pytest.approx(0.6 - 1.96 * 0.06928, abs=0.021)
    assert high == pytest.approx(0.6 + 1.96 * 0.06928, abs=0.021)


def test_equal_indices_of_different_examples():
    """Independent prompts that share indices (ANLI's rounds) have half the variance."""
    rng = np.random.default_rng(1)
    prompts = [(np.arange(1000), (rng.random(1000) < 0.5).astype(float)) for _ in range(2)]
    deviation = bootstrap.resampled_accuracies(prompts, 2000, 0, "anli")[1].std()
    assert deviation == pytest.approx((0.25 / 2000) ** 0.5, rel=0.08)  # 0.01118


def test_prompts_with_different_examples():
    """A prompt with example 7 alone is correct or not drawn; the other prompt is always wrong."""
    accuracies = bootstrap.resampled_accuracies(
        [(np.array([7]), np.ones(1)), (np.array([3, 7]), np.zeros(2))], 500, 0, "a"
    )
    assert set(np.unique(accuracies)) == {0.0, 0.5}
    assert accuracies.shape == (2, 500)


def test_draws_are_seeded_and_independent_of_the_chunk_size(monkeypatch):
    prompt = (np.arange(20), np.tile([0.0, 1.0, 1.0, 1.0], 5))
    whole = bootstrap.resampled_accuracies([prompt], 64, 3, "a")
    np.testing.assert_array_equal(whole, bootstrap.resampled_accuracies([prompt], 64, 3, "a"))
    assert not np.array_equal(whole, bootstrap.resampled_accuracies([prompt], 64, 4, "a"))
    assert not np.array_equal(whole, bootstrap.resampled_accuracies([prompt], 64, 3, "b"))
    monkeypatch.setattr(bootstrap, "_MAX_DRAWN", 100)  # 5 draws at a time
    np.testing.assert_array_equal(whole, bootstrap.resampled_accuracies([prompt], 64, 3, "a"))
