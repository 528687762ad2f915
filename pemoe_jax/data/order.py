"""The order of a mixture's training examples, as a function of seed and example index.

A run that stopped resumes at example n, so the n-th example must not depend on anything that
happened before. Two functions of the seed and a counter decide it:

- the task of the n-th example is the n-th draw of a counter-based generator (Philox: Salmon et al.,
  "Parallel random numbers: as easy as 1, 2, 3", SC 2011), by the mixing rates;
- the k-th draw of a task is element k mod size of the task's epoch k // size. An epoch is a keyed
  permutation of the task's rows, computed row by row and never stored (a Feistel network over
  a x b >= size with cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains",
  CT-RSA 2002).

So the only state is the number of draws of each task. To start at a distant example, the draws
before it must be counted, which takes some 12 ns each. A single task starts anywhere at no cost.

The library `grain` has both parts, but it shuffles 32-bit indices, and interleaves tasks in a fixed
pattern of integer proportions where seqio draws them at random. It would change the order in which
saved runs resume, and only T5X's dependencies include it.
"""

from __future__ import annotations

import fractions
import math
from collections.abc import Sequence

import numpy as np

from pemoe_jax.core.errors import InputError

_CHUNK = 1 << 13  # draws computed at a time; more would not fit into the processor's cache
_SNAPSHOT = 1 << 20  # draws between two snapshots of the counts; a multiple of _CHUNK
_ROUNDS = 8  # of the Feistel network; saved runs depend on this number
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: SplitMix64's increment


class ExampleOrder:
    """The order of a mixture's examples. Rows are numbered consecutively, task after task.

    Each epoch of a task has each of its rows once. Objects are cheap to create; `row_numbers` is
    fastest if a call continues where the last one ended.

    Args:
      sizes: number of rows of each task, at least 1.
      rates: mixing rate of each task; they need not sum to 1.
      seed: any integer.
      shuffle: whether each epoch of a task has an order of its own. Otherwise the rows of a task
        stay in order, but the tasks of a mixture are still drawn at random.
      num_epochs: the order ends when a task that has completed this many epochs is drawn again, as
        in a seqio mixture; None: never.

    Raises:
      InputError: there is no task, `rates` has another length than `sizes`, a size is below 1, a
        rate is negative or not finite, or no rate is above 0.
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
        self._first_rows = np.concatenate([[0], np.cumsum(self._sizes[:-1])])
        # Philox takes a key of two words. The modulus is for negative seeds, which SeedSequence
        # rejects.
        *draw_key, row_key = np.random.SeedSequence(seed % (1 << 64)).generate_state(3, np.uint64)
        self._draw_key = np.array(draw_key, np.uint64)
        self._permutations = _Permutations(self._sizes, row_key) if shuffle else None
        self._max_draws = None if num_epochs is None else self._sizes * num_epochs
        self._sampler = _TaskSampler(rates)
        # Numbers of draws of each task before every _SNAPSHOT-th example, and before the example
        # where the last call ended. Counting starts from the latest of these examples that does not
        # come after the first one wanted.
        self._snapshots = [np.zeros(len(self._sizes), np.int64)]
        self._last = 0, self._snapshots[0]  # the example, and the draws before it

    def row_numbers(self, start: int, stop: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
        """Returns the row numbers of examples `start` to `stop` - 1: int64 [stop - start].

        There are fewer if the order ends before `stop`.

        Args:
          start, stop: examples, counted within the shard.
          shard: (index, count): the examples n of the order with n mod count = index.
        """
        index, count = shard
        if count > 1:
            return self.row_numbers(index + count * start, index + count * stop)[::count]
        counts = self._count_draws(start)
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            tasks = self._draw_chunk(start, stop, counts)
            draws = counts[tasks] + _occurrences(tasks)
            if self._max_draws is not None:
                exhausted = np.flatnonzero(draws >= self._max_draws[tasks])
                if len(exhausted):
                    end = exhausted[0]
                    tasks, draws = tasks[:end], draws[:end]
                    stop = start  # ends the loop
            counts = counts + np.bincount(tasks, minlength=len(self._sizes))
            start += len(tasks)
            epochs, rows = np.divmod(draws, self._sizes[tasks])
            if self._permutations is not None:
                rows = self._permutations(tasks, epochs, rows)
            parts.append(self._first_rows[tasks] + rows)
        self._last = start, counts
        return np.concatenate(parts)

    def _draw_chunk(self, start: int, stop: int, counts: np.ndarray) -> np.ndarray:
        """Returns the tasks of the examples from `start` to `stop`, or to the end of a chunk.

        Args:
          start, stop: examples.
          counts: draws of each task before `start`; kept if a snapshot is due there.
        """
        if start == len(self._snapshots) * _SNAPSHOT:
            self._snapshots.append(counts)
        return self._draw_tasks(start, min(stop, start + _CHUNK - start % _CHUNK))

    def _draw_tasks(self, start: int, stop: int) -> np.ndarray:
        """Returns the tasks of examples start to stop - 1: int64 [stop - start]."""
        if len(self._sizes) == 1:
            return np.zeros(stop - start, np.int64)
        block = start // 4  # Philox's counter counts blocks of four words
        words = np.random.Philox(key=self._draw_key, counter=block).random_raw(stop - 4 * block)
        return self._sampler(words[start - 4 * block :])

    def _count_draws(self, start: int) -> np.ndarray:
        """Returns how often each task is drawn before example `start`: int64 [tasks]."""
        if len(self._sizes) == 1:
            return np.array([start])
        counted, counts = self._last
        snapshot = min(start // _SNAPSHOT, len(self._snapshots) - 1)
        if counted > start or counted < snapshot * _SNAPSHOT:
            counted, counts = snapshot * _SNAPSHOT, self._snapshots[snapshot]
        while counted < start:
            tasks = self._draw_chunk(counted, start, counts)
            counts = counts + np.bincount(tasks, minlength=len(self._sizes))
            counted += len(tasks)
        return counts


def _check(sizes: Sequence[int], rates: Sequence[float]) -> None:
    if not len(sizes):
        raise InputError("expected at least one task, got none")
    if len(sizes) != len(rates):
        raise InputError(
            f"expected one rate for each task, got {len(rates)} for {len(sizes)} tasks"
        )
    for task, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
        if size < 1:
            raise InputError(f"task {task}: size must be at least 1, got {size}")
        if not (rate >= 0 and math.isfinite(rate)):
            raise InputError(f"task {task}: rate must be finite and at least 0, got {rate}")
    if not any(rates):
        raise InputError("expected a task with a rate above 0, got none")


def _occurrences(tasks: np.ndarray) -> np.ndarray:
    """Returns for each element how many equal ones precede it: [3, 5, 3] -> [0, 0, 1]."""
    # Equal elements become neighbors, in their order: the position within such a run is the count.
    order = np.argsort(tasks, kind="stable")
    ordered = tasks[order]
    firsts = np.searchsorted(ordered, ordered)
    occurrences = np.empty_like(tasks)
    occurrences[order] = np.arange(len(tasks)) - firsts
    return occurrences


class _TaskSampler:
    """Maps words of 64 random bits to tasks by their rates.

    Walker's alias method: the 2^64 words are divided into columns of equal width, one for each
    task (and some for no task, to make their number a power of two). A column holds words of its
    own task and of at most one other, the donor. Integers make the shares exact.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        # At least two columns, as the width of one, 2^64, would not fit into uint64.
        bits = max(1, (len(rates) - 1).bit_length())
        self._shift, num_columns = np.uint64(64 - bits), 1 << bits
        width = 1 << (64 - bits)
        total = sum(fractions.Fraction(rate) for rate in rates)
        weights = [int(fractions.Fraction(rate) * (1 << 64) / total) for rate in rates]
        # The task with the highest rate gets the words that rounding down left over.
        weights[weights.index(max(weights))] += (1 << 64) - sum(weights)
        weights += [0] * (num_columns - len(weights))
        own_words, donors = [width] * num_columns, list(range(num_columns))
        # A task with too few words for its column takes the rest from a task with too many.
        small = [task for task, weight in enumerate(weights) if weight < width]
        large = [task for task, weight in enumerate(weights) if weight > width]
        while small:
            task, donor = small.pop(), large[-1]
            own_words[task], donors[task] = weights[task], donor
            weights[donor] -= width - weights[task]
            if weights[donor] <= width:
                large.pop()
            if weights[donor] < width:
                small.append(donor)
        self._own_words, self._donors = np.array(own_words, np.uint64), np.array(donors)

    def __call__(self, words: np.ndarray) -> np.ndarray:
        columns = (words >> self._shift).astype(np.int64)
        in_column = words & ((np.uint64(1) << self._shift) - np.uint64(1))
        return np.where(in_column < self._own_words[columns], columns, self._donors[columns])


def _mix64(words: np.ndarray) -> np.ndarray:
    """Hashes each word: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class _Permutations:
    """A permutation of range(size) for each task and epoch, computed element by element."""

    def __init__(self, sizes: np.ndarray, key: np.uint64) -> None:
        self._key = key
        self._sizes = sizes.astype(np.uint64)
        # The Feistel network permutes pairs: row r is the pair (r // b, r % b). With
        # a = ceil(sqrt(size)) and b = ceil(size / a), fewer than a of the a * b pairs are no row.
        self._a = np.array([math.isqrt(int(size) - 1) + 1 for size in sizes], np.uint64)
        self._b = (self._sizes + self._a - np.uint64(1)) // self._a

    def __call__(self, tasks: np.ndarray, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        # A key for each task, hashed from the seed's, and from it a key for each epoch.
        key = _mix64(self._key + (tasks + 1).astype(np.uint64) * _GOLDEN)
        key = _mix64(key + (epochs + 1).astype(np.uint64) * _GOLDEN)
        rows, sizes = rows.astype(np.uint64), self._sizes[tasks]
        # Cycle walking: a pair that is no row is permuted again until it is one. This ends because
        # the walk follows a cycle of the permutation, and the cycle contains the row at its start.
        walking = np.arange(len(rows))
        while len(walking):
            rows[walking] = self._permute_pairs(tasks[walking], key[walking], rows[walking])
            walking = walking[rows[walking] >= sizes[walking]]
        return rows.astype(np.int64)

    def _permute_pairs(self, tasks: np.ndarray, key: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Applies the Feistel network to pairs r = high * b + low."""
        a, b = self._a[tasks], self._b[tasks]
        high, low = np.divmod(rows, b)
        # The rounds change the two halves in turn.
        for _ in range(_ROUNDS // 2):
            key = key + _GOLDEN
            high = (high + _mix64(key ^ low) % a) % a
            key = key + _GOLDEN
            low = (low + _mix64(key ^ high) % b) % b
        return high * b + low
