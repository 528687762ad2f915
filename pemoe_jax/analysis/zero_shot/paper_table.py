"""The paper's zero-shot table (arXiv 2309.05444): a row for each run, a column for each dataset.

`build_paper_table` computes the table from results, `paper_table_formats` prints it. A cell holds
the median over the prompts of a dataset, which is the paper's main figure, and the mean, in %. As
in the paper, ANLI is one column: median and mean are over the prompts of its three rounds, 45 in
P3.

Datasets that are not in the paper come after the average, which excludes them; if no dataset is in
the paper, the average is over all. MMLU's subjects, which are datasets, share one column.

Runs that differ only in the seed share a row, which holds means over seeds. Few-shot results of the
same runs, with k solved examples in each input (`SHOTS`), are further columns of this row, after
the zero-shot ones.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from pemoe_jax.analysis import published_numbers
from pemoe_jax.analysis.tables import MISSING, Table
from pemoe_jax.analysis.zero_shot import bootstrap, result_tables, seed_groups
from pemoe_jax.analysis.zero_shot.results import (
    NO_SHOTS,
    PREDICTIONS,
    JsonObject,
    Shots,
    load_predictions,
    shots_of,
)
from pemoe_jax.tasks import mmlu

AVERAGE = "average"
MEASURES = ("median", "mean")
# Values of a run that its row keeps; `evaluate.describe_run` explains them.
RUN_KEYS = ("step", "checkpoint", "trainable", "total", "used", "flops", "flops_with_places")

# Dataset of a task -> its column; other datasets are columns of the same name. In P3, ANLI's rounds
# are splits of one dataset; other sources have a dataset for each round.
_COLUMNS = {
    **dict.fromkeys(("anli", "anli_r1", "anli_r2", "anli_r3"), "ANLI"),
    "cb": "CB",
    "rte": "RTE",
    "wsc.fixed": "WSC",
    "wic": "WiC",
    "copa": "COPA",
    "winogrande_winogrande_xl": "WNG",
    "hellaswag": "HS",
    **dict.fromkeys(mmlu.DATASETS.values(), "MMLU"),
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
      shots_left_out: number of shots that did not fit, over all examples; None without shots.
      trained: whether the run was trained on the dataset, or on any dataset of the average; None
        if unknown.
      seeds: measure -> value of each seed, if the row is a mean over seeds.
    """

    median: float | None = None
    mean: float | None = None
    chance: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prompts: int | None = None
    examples: int | None = None
    shots_left_out: int | None = None
    trained: bool | None = None
    seeds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def deviation(self, measure: str) -> float | None:
        """Returns the standard deviation over seeds (n - 1); None for a single run."""
        values = self.seeds.get(measure, ())
        return statistics.stdev(values) if len(values) > 1 else None


class Column(NamedTuple):
    """A column of the table, for one number of shots: a dataset, or `AVERAGE`.

    `name` is one of `published_numbers.COLUMNS`, the name of another dataset, or `AVERAGE`.
    """

    name: str
    shots: Shots = NO_SHOTS

    @property
    def label(self) -> str:
        """The name, followed by '5-shot' if there are shots, and by their seed unless it is 0."""
        number, seed = self.shots
        words = [self.name, f"{number}-shot" if number else "", f"seed {seed}" if seed else ""]
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class StepTime:
    """Time of a training step on one kind of device with one size of batches.

    Attributes:
      device, batch: descriptions of the devices and of the batch.
      seconds: for each seed, the time of the median step.
      memory: largest peak memory of all seeds, in bytes; None if unknown.
    """

    device: str
    batch: str
    seconds: tuple[float, ...]
    memory: int | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.seconds)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for a single run."""
        return statistics.stdev(self.seconds) if len(self.seconds) > 1 else None


@dataclass(frozen=True)
class Row:
    """A run, several runs that differ only in the seed, or a published model.

    Attributes:
      name: name that is unique among the runs.
      method: method, with experts and rank if they are known.
      percent: trainable parameters, in %.
      share: `percent` as text.
      scores: column -> score. An average is over the columns of `PaperTable.averaged` that the run
        has; the average of a published model is as published.
      partial: those shots for which the run lacks columns of `PaperTable.averaged`.
      source: source of a published row; '' for a run.
      run: the `RUN_KEYS` of a run, and its `evaluation_seconds` if known, the mean over seeds.
      step_times: one entry for each kind of device and batch; empty if unknown.
      seeds: shots -> seeds of the runs, for shots with several runs.
    """

    name: str
    method: str
    percent: float | None
    share: str
    scores: Mapping[Column, Score]
    partial: frozenset[Shots] = frozenset()
    source: str = ""
    run: JsonObject = field(default_factory=dict)
    step_times: Sequence[StepTime] = ()
    seeds: Mapping[Shots, tuple[int, ...]] = field(default_factory=dict)

    def average(self, shots: Shots = NO_SHOTS) -> Score:
        """Returns the average over datasets; an empty score if the run has none."""
        return self.scores.get(Column(AVERAGE, shots), Score())


@dataclass(frozen=True)
class PaperTable:
    """The zero-shot table.

    Attributes:
      columns: columns of datasets, zero-shot ones first. For each number of shots, the paper's
        columns come first, in its order. Columns without results are left out, except the paper's
        if there are published rows.
      averaged: the columns that averages are over.
      rows: runs, then published rows.
      draws: number of bootstrap draws.
      seed: seed of the draws.
      normalized: `result_tables.normalized_tables` of the runs.
    """

    columns: list[Column]
    averaged: list[Column]
    rows: list[Row]
    draws: int
    seed: int
    normalized: Sequence[Table] = ()

    @property
    def shots(self) -> list[Shots]:
        """The shots of the columns in ascending order."""
        return list(dict.fromkeys(column.shots for column in self.columns))

    @property
    def keys(self) -> list[Column]:
        """The columns, with an `AVERAGE` after the averaged ones of the same shots."""
        keys = []
        for shots in self.shots:
            columns = [column for column in self.columns if column.shots == shots]
            averaged = [column for column in columns if column in self.averaged]
            keys += [*averaged, Column(AVERAGE, shots), *columns[len(averaged) :]]
        return keys


# column -> [2, draws]: median and mean accuracy over prompts in %, for each resampling of examples
_Resampled = dict[str, np.ndarray]


def build_paper_table(
    runs: Sequence[JsonObject],
    draws: int = 1000,
    seed: int = 0,
    with_paper: bool = False,
    seeds_apart: bool = False,
) -> PaperTable:
    """Builds the table of runs, and of published models if wanted.

    Args:
      runs: runs as `results.load_results` loads them.
      draws, seed: number and seed of the bootstrap draws; 0 draws omit the intervals.
      with_paper: whether to add `published_numbers.ROWS`.
      seeds_apart: whether runs that differ only in the seed have a row each.

    Raises:
      InputError: predictions do not match the results.
    """
    columns: list[Column] = []
    averaged: list[Column] = []
    all_shots = {shots_of(run) for run in runs} | ({NO_SHOTS} if with_paper else set())
    for shots in sorted(all_shots):
        members = [run for run in runs if shots_of(run) == shots]
        existing = {column for run in members for column in _tasks_by_column(run)}
        # Published rows need all of the paper's columns.
        all_in_paper = with_paper and shots == NO_SHOTS
        in_paper = [name for name in published_numbers.COLUMNS if name in existing or all_in_paper]
        names = in_paper + sorted(existing - set(in_paper))
        columns += [Column(name, shots) for name in names]
        averaged += [Column(name, shots) for name in in_paper or names]
    groups = _group_rows(runs, seeds_apart)
    # Labels are made unique after grouping, since the seeds of one row may share a name.
    names = result_tables.run_labels(
        [seed_groups.first_run_without_seed(_largest_part(group)) for group in groups]
    )
    rows = [
        _row(name, group, averaged, draws, seed) for name, group in zip(names, groups, strict=True)
    ]
    if with_paper:
        rows += map(_published_row, published_numbers.ROWS)
    normalized = result_tables.normalized_tables(runs, _column)
    return PaperTable(columns, averaged, rows, draws, seed, normalized)


# The runs of one row: shots -> the runs of all seeds.
_Group: TypeAlias = dict[Shots, list[JsonObject]]


def _group_rows(runs: Sequence[JsonObject], seeds_apart: bool) -> list[_Group]:
    """Groups runs into rows: runs that differ only in the seed, and the same runs with other shots.

    With `seeds_apart`, runs of different seeds are in different rows.
    """
    groups: list[_Group] = []
    index_of: dict[tuple, int] = {}  # identity of a run -> index of its group
    for shots in sorted({shots_of(run) for run in runs}):
        members = [run for run in runs if shots_of(run) == shots]
        by_seed = [[run] for run in members] if seeds_apart else seed_groups.group_by_seed(members)
        for group in by_seed:
            identities = [(run["name"], run.get("checkpoint"), run.get("step")) for run in group]
            # Groups that have these runs with fewer shots. If there are several, because the seeds
            # were not evaluated alike, this mean over seeds belongs to none, and is another row.
            indices = {index_of[i] for i in identities if i in index_of}
            index = indices.pop() if len(indices) == 1 else None
            if index is None or shots in groups[index]:
                index = len(groups)
                groups.append({})
            groups[index][shots] = group
            for identity in identities:
                index_of.setdefault(identity, index)
    return groups


def _largest_part(group: _Group) -> list[JsonObject]:
    """Returns the runs for the shots with the most seeds, which stand for the whole row."""
    return max(group.values(), key=len)


def _column(dataset: str) -> str:
    return _COLUMNS.get(dataset, dataset)


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
            load_predictions(task[PREDICTIONS], name, task) for name, task in tasks.items()
        )
        prompts = [prompt for prompt in predictions if prompt is not None]
        if len(prompts) == len(tasks):
            resampled[column] = 100 * bootstrap.resampled_accuracies(prompts, draws, seed, column)
    return resampled


def _row(name: str, group: _Group, averaged: Sequence[Column], draws: int, seed: int) -> Row:
    main_runs = _largest_part(group)
    first = main_runs[0]
    scores: dict[Column, Score] = {}
    partial = set()
    for shots, runs in group.items():
        names = [column.name for column in averaged if column.shots == shots]
        resampled = [_resample(run, draws, seed) for run in runs]
        members = [_scores(run, names, r) for run, r in zip(runs, resampled, strict=True)]
        by_name = members[0] if len(runs) == 1 else _mean_over_seeds(members, names, resampled)
        scores |= {Column(name, shots): score for name, score in by_name.items()}
        if not set(names) <= set(by_name):
            partial.add(shots)
    share = result_tables.trainable_share(first)
    run_values = {key: first.get(key) for key in RUN_KEYS}
    evaluations = [run["evaluation_seconds"] for run in main_runs if "evaluation_seconds" in run]
    if evaluations:
        run_values["evaluation_seconds"] = statistics.fmean(evaluations)
    if len(main_runs) > 1:
        run_values["checkpoint"] = "; ".join(str(run.get("checkpoint")) for run in main_runs)
    return Row(
        name=name,
        method=str(first.get("variant") or first.get("method") or MISSING),
        percent=None if share == MISSING else round(100 * first["trainable"] / first["total"], 6),
        share=share,
        scores=scores,
        partial=frozenset(partial),
        run=run_values,
        step_times=_step_times(main_runs),
        seeds={
            shots: tuple(run["seed"] for run in runs)
            for shots, runs in group.items()
            if len(runs) > 1
        },
    )


def _step_times(runs: Sequence[JsonObject]) -> list[StepTime]:
    """Returns the step times of runs that differ in the seed, by device and batch."""
    entries: dict[tuple[str, str], list[JsonObject]] = {}
    for run in runs:
        for entry in run.get("step_times", []):
            entries.setdefault((entry["device"], entry["batch"]), []).append(entry)
    return [
        StepTime(
            *key,
            seconds=tuple(entry["seconds"] for entry in members),
            memory=max((e["memory"] for e in members if "memory" in e), default=None),
        )
        for key, members in entries.items()
    ]


def _scores(run: JsonObject, averaged: Sequence[str], resampled: _Resampled) -> dict[str, Score]:
    """Returns column -> score of a run, with an `AVERAGE` over the columns in `averaged`."""
    datasets = run.get("trained_datasets")
    trained = None if datasets is None else {_column(dataset) for dataset in datasets}
    scores = {
        column: _score(tasks, resampled.get(column), None if trained is None else column in trained)
        for column, tasks in _tasks_by_column(run).items()
    }
    columns = [column for column in averaged if column in scores]
    return scores | {AVERAGE: _average(scores, resampled, columns)}


def _score(
    tasks: Mapping[str, JsonObject], resampled: np.ndarray | None, trained: bool | None
) -> Score:
    """Returns the score of a column from the results of its tasks, which are prompts."""
    accuracies = [100 * task["accuracy"] for task in tasks.values()]
    return Score(
        median=statistics.median(accuracies),
        mean=statistics.fmean(accuracies),
        chance=100 * statistics.fmean(task["chance"] for task in tasks.values()),
        intervals=_intervals(resampled),
        prompts=len(tasks),
        examples=sum(task["examples"] for task in tasks.values()),
        shots_left_out=_sum_known(task.get("shots_left_out") for task in tasks.values()),
        trained=trained,
    )


def _sum_known(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _average(scores: Mapping[str, Score], resampled: _Resampled, columns: Sequence[str]) -> Score:
    """Averages the scores of datasets with equal weights; an empty score without datasets."""
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
        shots_left_out=_sum_known(score.shots_left_out for score in members),
        trained=None if members[0].trained is None else any(score.trained for score in members),
    )


def _mean_over_seeds(
    members: Sequence[Mapping[str, Score]],
    averaged: Sequence[str],
    resampled_by_seed: Sequence[_Resampled],
) -> dict[str, Score]:
    """Returns the means of scores over seeds, with the intervals of these means."""
    first = members[0]
    # Draw i of a dataset takes the same examples for every seed, so the seeds' mean of draw i is
    # draw i of the mean.
    resampled = {
        column: np.mean([accuracies[column] for accuracies in resampled_by_seed], axis=0)
        for column in first
        if all(column in accuracies for accuracies in resampled_by_seed)
    }
    average = _average_resampled(resampled, [column for column in averaged if column in first])
    return {
        column: _mean_score(
            [scores[column] for scores in members],
            average if column == AVERAGE else resampled.get(column),
        )
        for column in first
    }


def _mean_score(members: Sequence[Score], resampled: np.ndarray | None) -> Score:
    """Returns the mean accuracies over seeds; counts and chance are those of the first seed."""
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
    """Averages columns draw by draw; None if there are none, or one of them is not resampled."""
    if not columns or not all(column in resampled for column in columns):
        return None
    # Each dataset is drawn separately, so datasets count as independent.
    return np.mean([resampled[column] for column in columns], axis=0)


def _intervals(resampled: np.ndarray | None) -> dict[str, tuple[float, float]]:
    """Returns measure -> ends of its interval, from resampled accuracies [2, draws] if any."""
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
        scores={Column(column): score(value) for column, value in row.accuracies.items()}
        | {Column(AVERAGE): score(row.average)},
        source=row.source,
    )
