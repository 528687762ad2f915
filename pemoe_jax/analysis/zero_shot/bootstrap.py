"""How far a data set's accuracy would move with other examples: a bootstrap over examples.

An interval holds the middle 95 % of what the figure comes to when the examples of the data set are
drawn anew, with replacement, as many as there were. Its prompts stay as they are. All prompts of a
data set ask about the same examples, so a draw is of examples, each with every prompt that it has:
drawn for each prompt by itself, fifteen prompts over CB's 56 examples would look like 840
examples. The interval says nothing of other prompts, or of another training run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
_AT_ONCE = 4_000_000  # numbers drawn at a time, 32 MB


def draws(
    prompts: Sequence[tuple[np.ndarray, np.ndarray]], number: int, seed: int, name: str
) -> np.ndarray:
    """Accuracies of a data set under redrawn examples.

    Runs with the same examples get the same draws, whatever else they were scored on.

    Args:
      prompts: of each prompt the examples' numbers in the data set and whether the answer is
        right, both [N]. Numbers that stand for different examples (ANLI's rounds count each from
        0) do no harm: what is independent stays so under shared weights.
      number: of draws.
      seed: of the draws, with the data set's name.
      name: of the data set.

    Returns:
      float64 [2, number]: median and mean over the prompts.
    """
    numbers, places = np.unique(
        np.concatenate([idx for idx, _ in prompts]), return_inverse=True
    )  # [N of the data set], [N of all prompts together]
    row = np.repeat(np.arange(len(prompts)), [len(idx) for idx, _ in prompts])
    right = np.zeros((len(prompts), len(numbers)))
    there = np.zeros_like(right)
    np.add.at(right, (row, places), np.concatenate([correct for _, correct in prompts]))
    np.add.at(there, (row, places), 1)

    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    step = max(1, _AT_ONCE // len(numbers))
    found = [
        _over_prompts(right, there, rng, min(step, number - start))
        for start in range(0, number, step)
    ]
    return np.concatenate(found, axis=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle `LEVEL` of some draws [number]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _over_prompts(
    right: np.ndarray, there: np.ndarray, rng: np.random.Generator, number: int
) -> np.ndarray:
    """[2, number] median and mean over prompts, of `number` draws."""
    examples = right.shape[1]
    chosen = rng.integers(0, examples, (number, examples))
    chosen += examples * np.arange(number)[:, None]
    weights = np.bincount(chosen.reshape(-1), minlength=number * examples)
    weights = weights.reshape(number, examples).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a prompt of which no example was drawn: NaN
        accuracies = (weights @ right.T) / (weights @ there.T)  # [number, prompts]
    if np.isnan(accuracies).any():
        return np.stack([np.nanmedian(accuracies, axis=1), np.nanmean(accuracies, axis=1)])
    return np.stack([np.median(accuracies, axis=1), np.mean(accuracies, axis=1)])
