"""The order of a mixture's examples: every row, drawn by the rates, the same from any start."""

import collections
import itertools
import math

import numpy as np
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import order as order_lib
from pemoe_jax.data.order import ExampleOrder

SIZES = [7, 1, 20, 2, 300]
STARTS = np.cumsum([0, *SIZES[:-1]])


def by_task(numbers):
    """Returns the rows of each task in the order drawn, numbered from 0 in each task."""
    tasks = np.searchsorted(STARTS, numbers, side="right") - 1
    return [numbers[tasks == task] - STARTS[task] for task in range(len(SIZES))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_an_epoch(shuffle):
    drawn = by_task(ExampleOrder(SIZES, SIZES, 0, shuffle).row_numbers(0, 5000))
    for size, rows in zip(SIZES, drawn, strict=True):
        epochs = rows[: len(rows) // size * size].reshape(-1, size)
        assert len(epochs) > 5
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        if not shuffle:
            assert (epochs == np.arange(size)).all()
        elif size > 2:
            assert len(set(map(tuple, epochs.tolist()))) > 1


@pytest.mark.parametrize("rates", [SIZES, [3.5, 0, 1e-3, 1, 2], [0, 0, 0, 1e9, 0]])
def test_tasks_are_drawn_by_rate(rates):
    count = 200_000
    drawn = by_task(ExampleOrder(SIZES, rates, 1).row_numbers(0, count))
    counts = np.array([len(rows) for rows in drawn])
    share = np.array(rates) / sum(rates)
    # Five standard errors of a binomial share, which are 0 for shares of 0 and 1.
    assert (abs(counts / count - share) <= 5 * np.sqrt(share * (1 - share) / count)).all()


def test_task_sampler_is_exact():
    """The number of words that select a task is its share of 2^64, to one word."""
    rates = [0.1, 5, 0.25, 0.25, 3e-7, 0, 1]
    choice = order_lib._TaskSampler(rates)
    width = 1 << 61  # 7 tasks, 8 columns
    words = collections.Counter()
    for column, (own, other) in enumerate(zip(choice._own_words, choice._donors, strict=True)):
        words[column] += int(own)
        words[int(other)] += width - int(own)
        edges = [column * width, column * width + int(own) - 1, (column + 1) * width - 1]
        for word, expected in zip(edges, (column, column, other), strict=True):
            if 0 < own < width:
                assert choice(np.array([word], np.uint64)) == expected
    assert sum(words.values()) == 1 << 64
    for task, rate in enumerate(rates):
        assert words[task] / 2**64 == pytest.approx(rate / sum(rates), rel=1e-12)


@pytest.mark.parametrize("sizes", [SIZES, [9], [2**33, 3]])
def test_order_does_not_depend_on_the_calls(sizes):
    whole = ExampleOrder(sizes, sizes, 5).row_numbers(0, 60_000)
    cuts = [0, 1, 5, 8191, 8192, 8193, 30_001, 59_999, 60_000]
    continued = ExampleOrder(sizes, sizes, 5)
    for start, stop in itertools.pairwise(cuts):
        for order in (continued, ExampleOrder(sizes, sizes, 5)):  # continued, and from the start
            np.testing.assert_array_equal(order.row_numbers(start, stop), whole[start:stop])
    np.testing.assert_array_equal(continued.row_numbers(100, 300), whole[100:300])  # backwards
    assert continued.row_numbers(17, 17).shape == (0,)


def test_distant_starts_use_snapshots(monkeypatch):
    monkeypatch.setattr(order_lib, "_SNAPSHOT", 1 << 14)
    whole = ExampleOrder(SIZES, SIZES, 2).row_numbers(0, 100_000)
    order = ExampleOrder(SIZES, SIZES, 2)
    np.testing.assert_array_equal(order.row_numbers(99_990, 100_000), whole[99_990:])
    drawn = []
    plain = order._draw_tasks
    monkeypatch.setattr(order, "_draw_tasks", lambda *ends: drawn.append(ends) or plain(*ends))
    np.testing.assert_array_equal(order.row_numbers(70_000, 70_010), whole[70_000:70_010])
    assert min(start for start, _ in drawn) >= 65_536


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards_partition_the_order(count):
    order = ExampleOrder(SIZES, SIZES, 9)
    whole = order.row_numbers(0, 24 * count)
    for index in range(count):
        shard = order.row_numbers(0, 24, (index, count))
        np.testing.assert_array_equal(shard, whole[index::count])
        np.testing.assert_array_equal(order.row_numbers(5, 11, (index, count)), shard[5:11])


def test_seeds_and_epochs_differ():
    size = 1000
    rows = ExampleOrder([size], [1], 0).row_numbers(0, 3 * size).reshape(3, size)
    other = ExampleOrder([size], [1], 1).row_numbers(0, size)
    same_task = ExampleOrder([size, size], [1, 1], 0).row_numbers(0, 4 * size)
    first, second = (same_task[same_task // size == task][:size] % size for task in (0, 1))
    for a, b in itertools.combinations([*rows, other, second], 2):
        # Independent permutations of 1,000 agree at 1 position on average.
        assert (a == b).sum() < 8
    np.testing.assert_array_equal(first, rows[0])
    np.testing.assert_array_equal(
        ExampleOrder([size], [1], -1).row_numbers(0, 9),
        ExampleOrder([size], [1], -1).row_numbers(0, 9),
    )
    draws = [ExampleOrder(SIZES, [1] * 5, seed).row_numbers(0, 500) for seed in (0, 1)]
    assert (draws[0] == draws[1]).mean() < 0.2


def test_all_small_permutations_occur():
    """Each of the 24 orders of 4 rows is expected 1,000 times in 24,000, with a deviation of 31.

    The sum of squared deviations over 1,000 is chi-square with 23 degrees of freedom, which exceeds
    50 for one seed in 1,000.
    """
    epochs = ExampleOrder([4], [1], 1).row_numbers(0, 4 * 24_000).reshape(-1, 4)
    counts = collections.Counter(map(tuple, epochs.tolist()))
    assert len(counts) == math.factorial(4)
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 50


def test_rows_move_anywhere_and_neighbors_apart():
    size, epochs = 101, 5000
    rows = ExampleOrder([size], [1], 3).row_numbers(0, size * epochs).reshape(epochs, size)
    expected = epochs / size
    for place in (0, 50, 100):
        counts = np.bincount(rows[:, place], minlength=size)
        # chi-square of 100 degrees of freedom: mean 100, deviation 14
        assert ((counts - expected) ** 2 / expected).sum() < 170
    steps = np.bincount((rows[:, 1:] - rows[:, :-1]).ravel() % size, minlength=size)[1:]
    expected = steps.sum() / (size - 1)
    assert ((steps - expected) ** 2 / expected).sum() < 170


def test_huge_sizes():
    size = 2**33
    rows = ExampleOrder([size, 1], [1, 0], 0).row_numbers(10**6, 10**6 + 50_000)
    assert len(np.unique(rows)) == 50_000 and rows.min() >= 0 and rows.max() < size
    # eighths of the range, each expected 6,250 times with a deviation of 74
    assert abs(np.bincount(rows // (size // 8), minlength=8) - 6250).max() < 370
    assert ExampleOrder([5, size, 3], [0, 0, 1], 0).row_numbers(0, 9).min() >= size + 5


def test_every_row_of_many_tasks():
    """544 tasks, as P3 has."""
    sizes = list(range(1, 545))
    numbers = ExampleOrder(sizes, sizes, 0).row_numbers(0, 600_000)
    total = sum(sizes)
    assert numbers.max() < total
    counts = np.bincount(numbers, minlength=total)
    assert counts.min() >= 1  # four epochs of each task, give or take
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        part = counts[start : start + size]
        assert part.max() - part.min() <= 1


@pytest.mark.parametrize("epochs", [1, 3])
def test_order_ends_with_the_first_exhausted_task(epochs):
    whole = ExampleOrder(SIZES, SIZES, 4).row_numbers(0, 5000)
    ended = ExampleOrder(SIZES, SIZES, 4, num_epochs=epochs)
    numbers = ended.row_numbers(0, 5000)
    np.testing.assert_array_equal(numbers, whole[: len(numbers)])
    counts = [len(rows) for rows in by_task(numbers)]
    assert all(count <= epochs * size for count, size in zip(counts, SIZES, strict=True))
    after = [len(rows) for rows in by_task(whole[: len(numbers) + 1])]
    assert any(count > epochs * size for count, size in zip(after, SIZES, strict=True))
    assert len(ended.row_numbers(len(numbers), 5000)) == len(ended.row_numbers(4000, 5000)) == 0
    again = ExampleOrder(SIZES, SIZES, 4, num_epochs=epochs)
    np.testing.assert_array_equal(again.row_numbers(5, 5000), numbers[5:])
    np.testing.assert_array_equal(
        ExampleOrder([9], [1], 0, False, 1).row_numbers(0, 99), np.arange(9)
    )


@pytest.mark.parametrize(
    ("sizes", "rates", "message"),
    [
        ([3, 0], [1, 1], "task 1: size must be at least 1, got 0"),
        ([3, 2], [1, -1], "task 1: rate must be finite and at least 0, got -1"),
        ([3], [math.nan], "task 0: rate must be finite and at least 0, got nan"),
        ([3], [math.inf], "task 0: rate must be finite and at least 0, got inf"),
        ([3, 2], [0, 0], "expected a task with a rate above 0, got none"),
        ([3, 2], [1], "expected one rate for each task, got 1 for 2"),
        ([], [], "expected at least one task, got none"),
    ],
)
def test_wrong_arguments_raise(sizes, rates, message):
    with pytest.raises(InputError, match=message):
        ExampleOrder(sizes, rates, 0)
