"""The paper's zero-shot table (arXiv 2309.05444): a row for each run, a column for each dataset.

`build_paper_table` computes it from results, `paper_table_formats` prints it. Cells hold the median
over the prompts of a dataset, the paper's main figure, and the mean, in %. As in the paper, ANLI is
one column: median and mean are over the prompts of its three rounds, 45 in P3. Datasets that the
paper does not have come after the average, which excludes them; without any of the paper's, the
average is over all.

Runs that differ only in the seed are one row: the mean over seeds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pemoe_jax.analysis import published_numbers
from pemoe_jax.analysis.tables import MISSING
from pemoe_jax.analysis.zero_shot import bootstrap, result_tables, seed_groups
from pemoe_jax.analysis.zero_shot.results import PREDICTIONS, JsonObject, load_predictions

AVERAGE = "average"
MEASURES = ("median", "mean")
# What a row keeps of a run's results: see `evaluate.describe_run`.
RUN_KEYS = ("step", "checkpoint", "trainable", "total", "used", "flops", "flops_with_places")

# Dataset of a task -> column of the paper. In P3, ANLI's rounds are splits of one dataset; other
# sources have a dataset for each round.
_PAPER_COLUMNS = {
    **dict.fromkeys(("anli", "anli_r1", "anli_r2", "anli_r3"), "ANLI"),
    "cb": "CB",
    "rte": "RTE",
    "wsc.fixed": "WSC",
    "wic": "WiC",
    "copa": "COPA",
    "winogrande_winogrande_xl": "WNG",
    "hellaswag": "HS",
}


@dataclass(frozen=True)
class Score:
    """Accuracy on a dataset, or averaged over datasets.

    Attributes:
      median, mean: median and mean accuracy over the prompts, in %; None if unknown.
      chance: accuracy of guessing, in %.
      intervals: measure -> ends of the 95 % bootstrap interval.
      prompts: number of prompts.
      examples: number of examples, summed over prompts.
      trained: whether the run was trained on the dataset, or any of them; None if unknown.
      seeds: measure -> value of each seed, if the row is a mean over seeds.
    """

    median: float | None = None
    mean: float | None = None
    chance: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prompts: int | None = None
    examples: int | None = None
    trained: bool | None = None
    seeds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def deviation(self, measure: str) -> float | None:
        """Returns the standard deviation over seeds (n - 1); None for a single run."""
        values = self.seeds.get(measure, ())
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Row:
    """A run, several runs that differ only in the seed, or a published model.

    Attributes:
      name: name that is unique among the runs.
      method: method, with experts and rank if they are known.
      percent: trainable parameters, in %.
      share: `percent` as text.
      scores: column -> score.
      average: average over those of `PaperTable.averaged` that a run has, or as published.
      complete: whether a run has all of `PaperTable.averaged`; True for a published row.
      source: source of a published row; '' for a run.
      run: the `RUN_KEYS` of a run.
      seeds: seeds of the runs, if there are several.
      shots: number of solved examples in front of each input.
    """

    name: str
    method: str
    percent: float | None
    share: str
    scores: Mapping[str, Score]
    average: Score
    complete: bool = True
    source: str = ""
    run: JsonObject = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    shots: int = 0


@dataclass(frozen=True)
class PaperTable:
    """The zero-shot table.

    Attributes:
      columns: the paper's columns, in its order, then other datasets. Columns without results
        are left out, except the paper's if there are published rows.
      averaged: the columns that averages are over, a prefix of `columns`.
      rows: runs, then published rows.
      draws: number of bootstrap draws.
      seed: seed of the draws.
    """

    columns: list[str]
    averaged: list[str]
    rows: list[Row]
    draws: int
    seed: int

    @property
    def keys(self) -> list[str]:
        """The columns, with `AVERAGE` after the averaged ones."""
        index = len(self.averaged)
        return [*self.columns[:index], AVERAGE, *self.columns[index:]]


# column -> [2, draws]: median and mean accuracy over prompts in %, for each resampling of examples
_Resampled = dict[str, np.ndarray]


def build_paper_table(
    runs: Sequence[JsonObject],
    draws: int = 1000,
    seed: int = 0,
    with_paper: bool = False,
    seeds_apart: bool = False,
) -> PaperTable:
    """Builds the table.

    Args:
      runs: runs as `results.load_results` loads them.
      draws, seed: number and seed of the bootstrap draws; 0 draws omit the intervals.
      with_paper: whether to add `published_numbers.ROWS`.
      seeds_apart: whether runs that differ only in the seed have a row each.

    Raises:
      InputError: predictions do not match the results.
    """
    existing = {column for run in runs for column in _tasks_by_column(run)}
    paper_columns = [name for name in published_numbers.COLUMNS if name in existing or with_paper]
    columns = paper_columns + sorted(existing - set(paper_columns))
    averaged = paper_columns or columns
    groups = [[run] for run in runs] if seeds_apart else seed_groups.group_by_seed(runs)
    # Labels are made unique after grouping, since the seeds of one row may share a name.
    names = result_tables.run_labels(list(map(seed_groups.representative, groups)))
    rows = []
    for name, group in zip(names, groups, strict=True):
        resampled = [_resample(run, draws, seed) for run in group]
        members = [
            _row(name, run, averaged, accuracies)
            for run, accuracies in zip(group, resampled, strict=True)
        ]
        if len(group) > 1:
            seeds = tuple(run["seed"] for run in group)
            members = [_mean_over_seeds(members, seeds, averaged, resampled)]
        rows += members
    if with_paper:
        rows += map(_published_row, published_numbers.ROWS)
    return PaperTable(columns, averaged, rows, draws, seed)


def _column(dataset: str) -> str:
    return _PAPER_COLUMNS.get(dataset, dataset)


def _tasks_by_column(run: JsonObject) -> dict[str, dict[str, JsonObject]]:
    """Returns column -> task -> result."""
    grouped: dict[str, dict[str, JsonObject]] = {}
    for name, task in run["tasks"].items():
        grouped.setdefault(_column(task["dataset"]), {})[name] = task
    return grouped


def _resample(run: JsonObject, draws: int, seed: int) -> _Resampled:
    """Returns the resampled accuracies of the columns whose tasks all have predictions."""
    resampled: _Resampled = {}
    for column, tasks in _tasks_by_column(run).items() if draws else ():
        predictions = (
            load_predictions(run[PREDICTIONS], name, task) for name, task in tasks.items()
        )
        prompts = [prompt for prompt in predictions if prompt is not None]
        if len(prompts) == len(tasks):
            resampled[column] = 100 * bootstrap.resampled_accuracies(prompts, draws, seed, column)
    return resampled


def _row(name: str, run: JsonObject, averaged: Sequence[str], resampled: _Resampled) -> Row:
    datasets = run.get("trained_datasets")
    trained = None if datasets is None else {_column(dataset) for dataset in datasets}
    scores = {
        column: _score(tasks, resampled.get(column), None if trained is None else column in trained)
        for column, tasks in _tasks_by_column(run).items()
    }
    share = result_tables.trainable_share(run)
    return Row(
        name=name,
        method=str(run.get("variant") or run.get("method") or MISSING),
        percent=None if share == MISSING else round(100 * run["trainable"] / run["total"], 6),
        share=share,
        scores=scores,
        average=_average(scores, resampled, [column for column in averaged if column in scores]),
        complete=set(averaged) <= set(scores),
        run={key: run.get(key) for key in RUN_KEYS},
        shots=run.get("shots", 0),
    )


def _score(
    tasks: Mapping[str, JsonObject], resampled: np.ndarray | None, trained: bool | None
) -> Score:
    accuracies = [100 * task["accuracy"] for task in tasks.values()]
    return Score(
        median=statistics.median(accuracies),
        mean=statistics.fmean(accuracies),
        chance=100 * statistics.fmean(task["chance"] for task in tasks.values()),
        intervals=_intervals(resampled),
        prompts=len(tasks),
        examples=sum(task["examples"] for task in tasks.values()),
        trained=trained,
    )


def _average(scores: Mapping[str, Score], resampled: _Resampled, columns: Sequence[str]) -> Score:
    """Averages datasets with equal weights."""
    if not columns:
        return Score()
    members = [scores[column] for column in columns]
    return Score(
        median=statistics.fmean(score.median for score in members if score.median is not None),
        mean=statistics.fmean(score.mean for score in members if score.mean is not None),
        chance=statistics.fmean(score.chance for score in members if score.chance is not None),
        intervals=_intervals(_average_resampled(resampled, columns)),
        prompts=sum(score.prompts or 0 for score in members),
        examples=sum(score.examples or 0 for score in members),
        trained=None if members[0].trained is None else any(score.trained for score in members),
    )


def _mean_over_seeds(
    members: Sequence[Row],
    seeds: tuple[int, ...],
    averaged: Sequence[str],
    resampled_by_seed: Sequence[_Resampled],
) -> Row:
    """Merges the rows of several seeds: means over seeds, and the intervals of these means."""
    first = members[0]
    # All seeds share the draws of a dataset: draw i of each is the accuracy on the same examples.
    resampled = {
        column: np.mean([accuracies[column] for accuracies in resampled_by_seed], axis=0)
        for column in first.scores
        if all(column in accuracies for accuracies in resampled_by_seed)
    }
    columns = [column for column in averaged if column in first.scores]
    checkpoints = "; ".join(str(row.run["checkpoint"]) for row in members)
    return dataclasses.replace(
        first,
        scores={
            column: _mean_score([row.scores[column] for row in members], resampled.get(column))
            for column in first.scores
        },
        average=_mean_score(
            [row.average for row in members], _average_resampled(resampled, columns)
        ),
        run={**first.run, "checkpoint": checkpoints},
        seeds=seeds,
    )


def _mean_score(members: Sequence[Score], resampled: np.ndarray | None) -> Score:
    values = {
        measure: tuple(v for score in members if (v := getattr(score, measure)) is not None)
        for measure in MEASURES
    }
    means = {measure: statistics.fmean(known) for measure, known in values.items() if known}
    trained = [score.trained for score in members]
    return dataclasses.replace(
        members[0],
        median=means.get("median"),
        mean=means.get("mean"),
        intervals=_intervals(resampled),
        trained=None if None in trained else any(trained),
        seeds=values,
    )


def _average_resampled(resampled: _Resampled, columns: Sequence[str]) -> np.ndarray | None:
    """Averages columns draw by draw; None if one of them is not resampled."""
    if not columns or not all(column in resampled for column in columns):
        return None
    # Each dataset has its own draws, so the average treats datasets as independent.
    return np.mean([resampled[column] for column in columns], axis=0)


def _intervals(resampled: np.ndarray | None) -> dict[str, tuple[float, float]]:
    if resampled is None:
        return {}
    return {measure: bootstrap.interval(resampled[i]) for i, measure in enumerate(MEASURES)}


def _published_row(row: published_numbers.PublishedRow) -> Row:
    def score(value: float | None) -> Score:
        return Score(median=value) if row.measure == "median" else Score(mean=value)

    return Row(
        name=row.name,
        method=row.method,
        percent=float(row.share),
        share=f"{row.share} %",
        scores={column: score(value) for column, value in row.accuracies.items()},
        average=score(row.average),
        source=row.source,
    )
