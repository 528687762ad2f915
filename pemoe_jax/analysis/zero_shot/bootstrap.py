"""Bootstrap intervals of a dataset's accuracy, by resampling its examples.

Each draw takes as many examples as the dataset has, with replacement, and the interval is the
middle 95 % of the accuracies of all draws. Prompts stay fixed. All prompts of a dataset ask about
the same examples, so an example is drawn for all of its prompts at once: resampling each prompt by
itself would treat CB's 56 examples under fifteen prompts as 840 independent ones. The interval does
not cover other prompts or other training runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
_MAX_DRAWN = 4_000_000  # example indices in memory at a time, 32 MB


def resampled_accuracies(
    prompts: Sequence[tuple[np.ndarray, np.ndarray]], draws: int, seed: int, dataset: str
) -> np.ndarray:
    """Returns a dataset's accuracies under resampled examples.

    All runs with the same examples of a dataset get the same draws.

    Args:
      prompts: for each prompt, the indices of its examples in the dataset, and whether each answer
        is correct, both [N]. The indices of ANLI's three rounds all start at 0, so one index can
        stand for an example of each round. The three are drawn together, which does no harm,
        because answers to different examples are independent anyway.
      draws: number of draws.
      seed: seed of the draws, combined with the dataset's name.
      dataset: name of the dataset.

    Returns:
      float64 [2, draws]: median and mean over the prompts.
    """
    indices, columns = np.unique(
        np.concatenate([index for index, _ in prompts]), return_inverse=True
    )  # [N of the dataset], [N of all prompts together]
    rows = np.repeat(np.arange(len(prompts)), [len(index) for index, _ in prompts])
    correct = np.zeros((len(prompts), len(indices)))
    count = np.zeros_like(correct)
    np.add.at(correct, (rows, columns), np.concatenate([answers for _, answers in prompts]))
    np.add.at(count, (rows, columns), 1)

    # Not `hash`, which differs between processes.
    rng = np.random.default_rng([seed, zlib.crc32(dataset.encode())])
    chunk = max(1, _MAX_DRAWN // len(indices))
    sizes = [min(chunk, draws - start) for start in range(0, draws, chunk)]
    return np.concatenate([_median_and_mean(correct, count, rng, size) for size in sizes], axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the ends of the interval with the middle `LEVEL` of resampled values [draws]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _median_and_mean(
    correct: np.ndarray, count: np.ndarray, rng: np.random.Generator, draws: int
) -> np.ndarray:
    """Returns median and mean over prompts [2, draws]; `correct` and `count` are [prompts, N]."""
    size = correct.shape[1]
    drawn = rng.integers(0, size, (draws, size))
    # A different offset for each draw lets a single bincount count the examples of all draws.
    drawn += size * np.arange(draws)[:, None]
    weights = np.bincount(drawn.reshape(-1), minlength=draws * size)
    weights = weights.reshape(draws, size).astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN for a prompt of which no example was drawn
        accuracies = (weights @ correct.T) / (weights @ count.T)  # [draws, prompts]
    # The NaN functions are several times slower and rarely needed.
    has_nan = np.isnan(accuracies).any()
    functions = (np.nanmedian, np.nanmean) if has_nan else (np.median, np.mean)
    return np.stack([function(accuracies, axis=1) for function in functions])
