"""The order in which a mixture's examples come, as a function: any part of it can be had at once.

A run that stopped goes on at example n, so what the n-th example is must not depend on anything
that happened before. Two things decide it, both functions of the seed and a counter alone:

- the task that the n-th example is of: the n-th draw of a counter-based generator (Philox: Salmon
  et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), by the rates;
- the row: a task's k-th draw is row k mod size of its pass k // size, in an order that is a
  keyed permutation, computed row by row and never stored (a Feistel network over a x b >= size with
  cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

So what is kept is the number of draws of each task, and what a far start costs is counting the
draws before it: some 12 ns each. A mixture of one task costs nothing to start anywhere.
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Sequence

import numpy as np

from pemoe_jax.core.errors import InputError

_CHUNK = 1 << 13  # draws made at a time: more of them would leave the processor's cache
_SNAPSHOT = 1 << 20  # draws between the counts that are kept, to start from
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class ExampleOrder:
    """The order of the examples of some tasks, whose rows are numbered task after task.

    Each task is gone through again and again, every row once in each pass. Objects are cheap to
    make; `row_numbers` is quickest where one call goes on where the last one ended.

    Args:
      sizes: rows of each task, at least 1.
      rates: how often each is drawn, to any scale.
      seed: any integer.
      shuffle: each pass in an order of its own; otherwise in the rows' own order (which task comes
        next is drawn all the same, and single tasks come as they are).
      num_epochs: the order ends when the first task has no row left after this many epochs, as a
        seqio mixture does; None: never.

    Raises:
      InputError: a size below 1, a negative rate, or no rate above 0.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rates: Sequence[float],
        seed: int,
        shuffle: bool = True,
        num_epochs: int | None = None,
    ) -> None:
        _check(sizes, rates)
        self._sizes = np.array(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes[:-1])])
        # the keys of the draws (Philox has two words of it) and of the permutations
        *draws, rows = np.random.SeedSequence(seed % (1 << 64)).generate_state(3, np.uint64)
        self._draw_key = np.array(draws, np.uint64)
        self._permutations = _Permutations(self._sizes, rows) if shuffle else None
        self._most = None if num_epochs is None else self._sizes * num_epochs
        self._choice = _Choice(rates)
        self._snapshots = [np.zeros(len(self._sizes), np.int64)]
        self._last = 0, self._snapshots[0]

    def row_numbers(self, start: int, stop: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
        """The rows of the examples start..stop-1: int64 [stop - start], fewer where it ends.

        Of a shard (index, count) the examples are those n of the order with n mod count = index,
        and counted by themselves.
        """
        index, count = shard
        if count > 1:
            return self.row_numbers(index + count * start, index + count * stop)[::count]
        seen = self._counts(start)
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            self._keep(start, seen)
            tasks = self._tasks(start, min(stop, _chunk_end(start)))
            nth = seen[tasks] + _occurrences(tasks)
            if self._most is not None:
                beyond = np.flatnonzero(nth >= self._most[tasks])
                if len(beyond):
                    tasks, nth, stop = tasks[: beyond[0]], nth[: beyond[0]], start
            seen = seen + np.bincount(tasks, minlength=len(self._sizes))
            start += len(tasks)
            epochs, rows = np.divmod(nth, self._sizes[tasks])
            if self._permutations is not None:
                rows = self._permutations(tasks, epochs, rows)
            parts.append(self._starts[tasks] + rows)
        self._last = start, seen
        return np.concatenate(parts)

    def _tasks(self, start: int, stop: int) -> np.ndarray:
        """The tasks of the examples start..stop-1: int64."""
        if len(self._sizes) == 1:
            return np.zeros(stop - start, np.int64)
        block = start // 4  # the generator's counter counts blocks of four words
        draws = np.random.Philox(key=self._draw_key, counter=block).random_raw(stop - 4 * block)
        return self._choice(draws[start - 4 * block :])

    def _counts(self, start: int) -> np.ndarray:
        """How often each task is drawn before `start`: int64 [tasks]."""
        if len(self._sizes) == 1:
            return np.array([start])
        at, counts = self._last
        known = min(start // _SNAPSHOT, len(self._snapshots) - 1)
        if at > start or at < known * _SNAPSHOT:
            at, counts = known * _SNAPSHOT, self._snapshots[known]
        while at < start:
            self._keep(at, counts)
            stop = min(start, _chunk_end(at))
            counts = counts + np.bincount(self._tasks(at, stop), minlength=len(self._sizes))
            at = stop
        return counts

    def _keep(self, at: int, counts: np.ndarray) -> None:
        if at == len(self._snapshots) * _SNAPSHOT:
            self._snapshots.append(counts)


def _chunk_end(at: int) -> int:
    return at + _CHUNK - at % _CHUNK


def _check(sizes: Sequence[int], rates: Sequence[float]) -> None:
    if len(sizes) != len(rates) or not len(sizes):
        raise InputError(f"expected a rate for each task, found {len(sizes)} and {len(rates)}")
    for task, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
        if size < 1:
            raise InputError(f"task {task}: expected at least 1 row, found {size}")
        if not (rate >= 0 and math.isfinite(rate)):
            raise InputError(f"task {task}: expected a rate of at least 0, found {rate}")
    if not any(rates):
        raise InputError("expected a task with a rate above 0, found none")


def _occurrences(tasks: np.ndarray) -> np.ndarray:
    """For each element how many equal ones stand before it: [3, 5, 3] -> [0, 0, 1]."""
    order = np.argsort(tasks, kind="stable")
    ordered = tasks[order]
    firsts = np.searchsorted(ordered, ordered)
    occurrences = np.empty_like(tasks)
    occurrences[order] = np.arange(len(tasks)) - firsts
    return occurrences


class _Choice:
    """Words of 64 random bits -> tasks, by the rates (Walker's alias method, in exact integers)."""

    def __init__(self, rates: Sequence[float]) -> None:
        bits = max(1, (len(rates) - 1).bit_length())
        self._shift, columns = np.uint64(64 - bits), 1 << bits
        width = 1 << (64 - bits)  # all columns together: the 2^64 words there are
        total = sum(fractions.Fraction(rate) for rate in rates)
        weights = [int(fractions.Fraction(rate) * (1 << 64) / total) for rate in rates]
        weights[weights.index(max(weights))] += (1 << 64) - sum(weights)  # what rounding left over
        weights += [0] * (columns - len(weights))
        own, other = [width] * columns, list(range(columns))
        small = [task for task, weight in enumerate(weights) if weight < width]
        large = [task for task, weight in enumerate(weights) if weight > width]
        while small:
            task, giver = small.pop(), large[-1]
            own[task], other[task] = weights[task], giver
            weights[giver] -= width - weights[task]
            if weights[giver] <= width:
                large.pop()
            if weights[giver] < width:
                small.append(giver)
        self._own, self._other = np.array(own, np.uint64), np.array(other)

    def __call__(self, words: np.ndarray) -> np.ndarray:
        columns = (words >> self._shift).astype(np.int64)
        within = words & ((np.uint64(1) << self._shift) - np.uint64(1))
        return np.where(within < self._own[columns], columns, self._other[columns])


def _mixed(words: np.ndarray) -> np.ndarray:
    """Each word scrambled (the finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class _Permutations:
    """A permutation of range(size) for each task and epoch, computed element by element."""

    def __init__(self, sizes: np.ndarray, key: np.uint64) -> None:
        self._key = key
        self._sizes = sizes.astype(np.uint64)
        # a row is a pair (row // b, row % b) with a * b - size < a: few pairs are no row
        highs = [math.isqrt(int(size) - 1) + 1 for size in sizes]
        self._a = np.array(highs, np.uint64)
        self._b = np.array(
            [-(-int(size) // a) for size, a in zip(sizes, highs, strict=True)], np.uint64
        )

    def __call__(self, tasks: np.ndarray, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        key = _mixed(self._key + (tasks + 1).astype(np.uint64) * _GOLDEN)
        key = _mixed(key + (epochs + 1).astype(np.uint64) * _GOLDEN)
        rows, sizes = rows.astype(np.uint64), self._sizes[tasks]
        walking = np.arange(len(rows))
        while len(walking):  # a pair that is no row is put in again: it comes to one at last
            rows[walking] = self._pairs(tasks[walking], key[walking], rows[walking])
            walking = walking[rows[walking] >= sizes[walking]]
        return rows.astype(np.int64)

    def _pairs(self, tasks: np.ndarray, key: np.ndarray, rows: np.ndarray) -> np.ndarray:
        a, b = self._a[tasks], self._b[tasks]
        high, low = np.divmod(rows, b)
        for _ in range(_ROUNDS // 2):
            key = key + _GOLDEN
            high = (high + _mixed(key ^ low) % a) % a
            key = key + _GOLDEN
            low = (low + _mixed(key ^ high) % b) % b
        return high * b + low
