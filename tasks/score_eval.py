"""Names and metric of `_score_eval` tasks, which have a row for each answer choice of an example.

P3 introduced this form of task. A row has `idx` (int32 [example, choice]), `is_correct` and
`weight`, and its targets are the choice. A model scores every row, and the choice with the highest
score is the model's answer to the example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from pemoe_jax.core.errors import InputError

# The suffix is T0's. Users name these tasks by it, and tables show it.
SUFFIX = "_score_eval"
Output = TypeVar("Output")
Target = tuple[tuple[int, ...], bool]  # `idx` and `is_correct` of a row


def is_score_eval(name: str) -> bool:
    """Returns whether a task's rows are answer choices."""
    return name.endswith(SUFFIX)


def plain_name(name: str) -> str:
    """Returns the name of the task whose answer choices a `_score_eval` task scores."""
    return name.removesuffix(SUFFIX)


def target_of_row(
    output: Output, example: Mapping[str, np.ndarray] | None = None, is_target: bool = False
) -> Output | Target:
    """Returns `idx` and `is_correct` of a row, which `rank_accuracy` takes as its target.

    A seqio postprocessor. Model outputs are returned as they are.
    """
    if not is_target or example is None:
        return output
    return tuple(int(i) for i in example["idx"]), bool(example["is_correct"])


def rank_accuracy(
    targets: Sequence[Target], scores: Sequence[float] | tuple[Sequence[float], object]
) -> dict[str, float]:
    """Returns `accuracy`: the share (0 to 1) of examples whose best choice is correct.

    Args:
      targets: `target_of_row` of each row.
      scores: log-likelihood of each row, or a pair of these and the model's other outputs.

    Raises:
      InputError: a score is not finite.
    """
    # T5X returns a pair if the model has other outputs.
    log_likelihoods = scores[0] if isinstance(scores, tuple) else scores
    # Example -> score, negative number and correctness of its best choice so far.
    best: dict[int, tuple[float, int, bool]] = {}
    for ((example, choice), is_correct), score in zip(targets, log_likelihoods, strict=True):
        if not np.isfinite(score):
            raise InputError(
                f"expected finite scores, got {score} for choice {choice + 1} of example"
                f" {example + 1}"
            )
        # Of equal scores the first choice wins, as in `pemoe evaluate`: its negative number is the
        # largest.
        best[example] = max(
            best.get(example, (-np.inf, 0, False)), (float(score), -choice, is_correct)
        )
    return {"accuracy": float(np.mean([is_correct for *_, is_correct in best.values()]))}
