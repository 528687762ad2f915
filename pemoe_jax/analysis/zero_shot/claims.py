"""Compares claims of papers with results: differences of experiments, intervals and verdicts.

A claim compares two experiments of a sweep, or two differences of experiments. The measured
difference is in percentage points of accuracy, averaged over the examples of a prompt, then over
the prompts of a dataset, then over the datasets. Two intervals of 95 % cover two sources of
randomness, each interval with the other source fixed:

- seeds: the paired t-interval over the differences of single seeds. It covers other initial
  adapters and another order of the data, on these prompts.
- prompts: a bootstrap over the differences averaged over seeds. In each dataset, it draws prompts
  and examples independently of each other and with replacement. It covers other prompts and
  examples of these datasets. A drawn example counts under all drawn prompts, see `bootstrap`.

`VERDICT_RULE` was fixed before any result was seen. Intervals are those of single claims; they are
not corrected for the number of claims.
"""

from __future__ import annotations

import fnmatch
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pemoe_jax.analysis.zero_shot import bootstrap
from pemoe_jax.analysis.zero_shot.results import PREDICTIONS, JsonObject, load_predictions
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided"
NOT_MEASURED = "not measured"
VERDICT_RULE = (
    "Reproduced: both intervals lie above the bound. Not reproduced: both lie below it. Undecided:"
    " all other cases. The bound is 0 for 'better', and minus the margin for 'not worse'."
)
EXPECTATIONS = ("better", "not worse")
_DRAWS = 4000  # 100 draws are beyond each end of an interval
_TEXTS = ("id", "claim", "paper", "source", "expect")  # fields of `Claim` that must be text


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
      id: a short name.
      claim: the paper's statement, paraphrased.
      paper: the paper's figure, or 'figure unknown'.
      source: the file of this repository that has the figure and names where it is quoted from.
      plus, minus: names of experiments, equally many. The difference is the sum of the accuracies
        of `plus` minus the sum of those of `minus`.
      expect: one of `EXPECTATIONS`.
      margin: percentage points by which `plus` may be worse if `expect` is 'not worse'.
      datasets: shell-style patterns of the datasets that the difference is averaged over.
    """

    id: str
    claim: str
    paper: str
    source: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    expect: str = "better"
    margin: float = 0.0
    datasets: tuple[str, ...] = ("*",)

    @property
    def bound(self) -> float:
        """Percentage points that both intervals must exceed, see `VERDICT_RULE`."""
        return 0.0 if self.expect == "better" else -self.margin


class Result(TypedDict):
    """The measurement of a claim, in percentage points; intervals are None if unknown."""

    seeds: list[int]  # the seeds that all experiments of the claim have
    differences: list[float]  # the difference of each seed
    difference: float | None
    seed_interval: list[float] | None
    prompt_interval: list[float] | None
    prompts: int  # number over all datasets
    examples: int  # number over all prompts
    agree: int  # number of seeds whose difference is above the bound
    verdict: str


def load_claims(file: Path) -> list[Claim]:
    """Loads a JSON file {"claims": [{"id": …, …}, …]} with the fields of `Claim`.

    Raises:
      InputError: the file is missing or not of this form.
    """
    try:
        entries = file_io.parse_json(file.read_text(encoding="utf-8"))["claims"]
        claims = [_parse_claim(entry) for entry in entries]
    except OSError as error:
        raise InputError(f"{file}: expected a file of claims, got {error.strerror}") from None
    except KeyError as error:
        raise InputError(f'{file}: expected {{"claims": […]}}, got no {error}') from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f'{file}: expected {{"claims": […]}}, got {error}') from None
    ids = [claim.id for claim in claims]
    if len(set(ids)) < len(ids) or not ids:
        raise InputError(f"{file}: expected claims with different ids, got {ids}")
    return claims


def _parse_claim(entry: Mapping[str, Any]) -> Claim:
    """Returns the claim of an entry; raises ValueError or TypeError if it is malformed."""
    lists = {key: tuple(entry[key]) for key in ("plus", "minus", "datasets") if key in entry}
    claim = Claim(**{**entry, **lists})
    if not all(isinstance(getattr(claim, name), str) for name in _TEXTS):
        raise ValueError(f"a claim whose {', '.join(_TEXTS)} are not all text: {entry}")
    if claim.expect not in EXPECTATIONS or not claim.plus or len(claim.plus) != len(claim.minus):
        raise ValueError(
            f"{claim.id}, whose 'expect' must be one of {EXPECTATIONS} and whose 'plus' and 'minus'"
            " must list equally many experiments"
        )
    return claim


def measure(
    claim: Claim, runs: Mapping[str, Mapping[int, JsonObject]], draws: int = _DRAWS
) -> Result:
    """Compares the experiments of a claim, over the seeds that all of them have.

    Args:
      claim: the claim.
      runs: experiment -> seed -> run, as `results.load_results` loads it.
      draws: number of bootstrap draws.

    Raises:
      InputError: experiments were evaluated on different tasks, or predictions are missing.
    """
    experiments = [*claim.plus, *claim.minus]
    by_seed = [runs.get(name, {}) for name in experiments]
    seeds = sorted(set.intersection(*(set(members) for members in by_seed)))
    if not seeds:
        return Result(
            seeds=[],
            differences=[],
            difference=None,
            seed_interval=None,
            prompt_interval=None,
            prompts=0,
            examples=0,
            agree=0,
            verdict=NOT_MEASURED,
        )
    signs = [1] * len(claim.plus) + [-1] * len(claim.minus)
    # For each seed: dataset -> contrasts [prompts, examples]
    per_seed = [_contrasts(claim, [members[seed] for members in by_seed], signs) for seed in seeds]
    differences = [100 * _mean_over_datasets(contrasts) for contrasts in per_seed]
    seed_interval = _t_interval(differences)
    mean_contrasts = {
        name: np.mean([contrasts[name] for contrasts in per_seed], axis=0) for name in per_seed[0]
    }
    resampled = [_draw(name, values, draws) for name, values in mean_contrasts.items()]
    # The mean over datasets is taken draw by draw. Datasets are drawn independently and have equal
    # weights.
    prompt_interval = [100 * end for end in bootstrap.interval(np.mean(resampled, axis=0))]
    return Result(
        seeds=seeds,
        differences=differences,
        difference=statistics.fmean(differences),
        seed_interval=seed_interval,
        prompt_interval=prompt_interval,
        prompts=sum(len(values) for values in mean_contrasts.values()),
        examples=sum(int(np.isfinite(values).sum()) for values in mean_contrasts.values()),
        agree=sum(difference > claim.bound for difference in differences),
        verdict=_verdict(claim.bound, seed_interval, prompt_interval),
    )


def _mean_over_datasets(contrasts: Mapping[str, np.ndarray]) -> float:
    """Averages contrasts over the examples of a prompt, then over prompts, then over datasets."""
    return statistics.fmean(
        float(np.nanmean(values, axis=1).mean()) for values in contrasts.values()
    )


def _verdict(
    bound: float, seed_interval: Sequence[float] | None, prompt_interval: Sequence[float]
) -> str:
    """Applies `VERDICT_RULE`. With a single seed, which has no interval, a claim is undecided."""
    intervals = [seed_interval, prompt_interval]
    if all(ends is not None and ends[0] > bound for ends in intervals):
        return REPRODUCED
    if all(ends is not None and ends[1] < bound for ends in intervals):
        return NOT_REPRODUCED
    return UNDECIDED


def _t_interval(values: Sequence[float]) -> list[float] | None:
    """Returns the 95 % interval of the mean of a few values; None for a single one."""
    if len(values) < 2:
        return None
    from scipy import stats

    # Two-sided: half of the 5 % outside the interval is above its upper end.
    quantile = float(stats.t.ppf((1 + bootstrap.LEVEL) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return [mean - half, mean + half]


def _contrasts(
    claim: Claim, runs: Sequence[JsonObject], signs: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns dataset -> contrasts [prompts, examples].

    A contrast is the sum over runs of sign · correctness (0 or 1). It is NaN for an example that a
    prompt does not have.
    """
    tasks = {
        name: task["dataset"]
        for name, task in runs[0]["tasks"].items()
        if any(fnmatch.fnmatch(task["dataset"], pattern) for pattern in claim.datasets)
    }
    if not tasks:
        raise InputError(f"claim {claim.id}: no scored dataset matches {list(claim.datasets)}")
    # dataset -> task, that is, prompt -> index of the example -> contrast
    sums: dict[str, dict[str, dict[int, float]]] = {}
    for run, sign in zip(runs, signs, strict=True):
        for name, dataset in tasks.items():
            answers = _load_answers(run, name, claim)
            task_sums = sums.setdefault(dataset, {}).setdefault(name, dict.fromkeys(answers, 0.0))
            if answers.keys() != task_sums.keys():
                raise InputError(
                    f"claim {claim.id}: expected the same examples of {name} in all runs, got"
                    f" others in {run['name']}"
                )
            for index, correct in answers.items():
                task_sums[index] += sign * correct
    return {dataset: _matrix(list(by_task.values())) for dataset, by_task in sums.items()}


def _load_answers(run: JsonObject, name: str, claim: Claim) -> dict[int, float]:
    """Returns, for one task, the index of each example -> 1.0 if the run's answer is correct."""
    task = run["tasks"].get(name)
    predictions = None if task is None else load_predictions(task[PREDICTIONS], name, task)
    if predictions is None:
        raise InputError(f"claim {claim.id}: expected predictions of {name} by {run['name']}")
    indices, correct = predictions
    return dict(zip(indices.tolist(), correct.tolist(), strict=True))


def _matrix(prompts: Sequence[Mapping[int, float]]) -> np.ndarray:
    """Returns {index of the example: value} of each prompt as an array [prompts, examples]."""
    indices = sorted(set().union(*prompts))
    return np.array([[prompt.get(index, np.nan) for index in indices] for prompt in prompts])


def _draw(dataset: str, values: np.ndarray, draws: int) -> np.ndarray:
    """Resamples prompts and examples, and returns the mean over both for each draw, [draws].

    Args:
      dataset: name of the dataset. It seeds the draws, so all claims draw the dataset alike.
      values: [prompts, examples], NaN for missing ones.
      draws: number of resamplings.
    """
    num_prompts, num_examples = values.shape
    rng = np.random.default_rng(zlib.crc32(dataset.encode()))
    # How often each prompt and each example is drawn, [draws, prompts] and [draws, examples].
    prompts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), draws)
    examples = rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), draws)
    is_known = np.isfinite(values)
    # The mean of a prompt is over its own examples; if none of them is drawn, it counts as 0.
    counts = np.maximum(examples @ is_known.T, 1)
    means = examples @ np.where(is_known, values, 0.0).T / counts  # [draws, prompts]
    return (prompts * means).sum(axis=1) / num_prompts
