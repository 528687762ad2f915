"""The paper's zero-shot table (arXiv 2309.05444): a row a run, a column a data set.

Accuracies are over the prompts of a data set: their median, the paper's main figure, and their
mean. ANLI's three rounds are one column, as in the paper: median and mean over the prompts of all
rounds together, 45 in P3, each counting alike. Data sets that the paper does not have stand behind
the average and are not in it; where a report has none of the paper's, the average is over all.
Everything is in per cent.

Runs that differ by their seed only, as `evaluate` records it, are one row: the mean over seeds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pemoe_jax.analysis import paper, tables
from pemoe_jax.analysis.zero_shot import bootstrap, results_file, seeds

AVERAGE = "average"
MEASURES = ("median", "mean")

# names of data sets as P3's tasks have them -> columns
_PAPERS = {
    "anli": "ANLI",
    "anli_r1": "ANLI",
    "anli_r2": "ANLI",
    "anli_r3": "ANLI",
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
    """Of a data set, or the average over data sets.

    Attributes:
      median, mean: over the prompts, in %; None: not known.
      chance: of guessing, in %.
      intervals: by measure the least and the greatest of the middle 95 % of the bootstrap.
      prompts, examples: how many; examples are summed over prompts.
      trained: the run was trained on the data set, or on one of them; None: not known.
      seeds: by measure what each run has, where several runs are one row.
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
        """The standard deviation over seeds (n - 1); None where there is one run."""
        values = self.seeds.get(measure, ())
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Row:
    """A run, several that differ by seed only, or a published row.

    Attributes:
      name: unlike those of other runs.
      method: with experts and rank where they are known.
      percent: of parameters trained.
      share: the same as text.
      scores: by column.
      average: over the columns that averages are over.
      complete: it has all of them.
      source: where a published row was read; '' for a run.
      about: step, checkpoint, trainable and total of a run.
      seeds: of the runs, where there are several.
    """

    name: str
    method: str
    percent: float | None
    share: str
    scores: Mapping[str, Score]
    average: Score
    complete: bool = True
    source: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """Rows and what they share.

    Attributes:
      columns: the paper's that are there, in its order, then others.
      averaged: the columns that averages are over, the first ones.
      rows: runs, then published rows.
      draws, seed: of the bootstrap.
    """

    columns: list[str]
    averaged: list[str]
    rows: list[Row]
    draws: int
    seed: int


def column(dataset: str) -> str:
    """The paper's column of a data set, or else the data set's own name."""
    return _PAPERS.get(dataset, dataset)


def report(
    runs: Sequence[dict[str, Any]],
    draws: int = 1000,
    seed: int = 0,
    with_paper: bool = False,
    seeds_apart: bool = False,
) -> Report:
    """Puts runs together.

    Args:
      runs: as `saved.load` gave them.
      draws: of the bootstrap; 0: no intervals.
      seed: of the draws.
      with_paper: published rows too, `paper.ROWS`.
      seeds_apart: a row a run, even where runs differ by seed only.

    Raises:
      InputError: predictions are not those of the results.
    """
    tasks = [_by_column(run) for run in runs]
    found = {name for columns in tasks for name in columns}
    known = [name for name in paper.COLUMNS if name in found or with_paper]
    columns = known + sorted(found - set(known))
    averaged = known or columns
    groups = [[number] for number in range(len(runs))] if seeds_apart else seeds.groups(runs)
    names = tables.run_labels([seeds.named([runs[i] for i in group]) for group in groups])
    rows = []
    for name, group in zip(names, groups, strict=True):
        drawn = [_all_drawn(runs[i], tasks[i], draws, seed) for i in group]
        members = [
            _row(name, runs[i], tasks[i], averaged, one)
            for i, one in zip(group, drawn, strict=True)
        ]
        if len(group) == 1:
            rows.append(members[0])
        else:
            rows.append(_over_seeds(members, [runs[i]["seed"] for i in group], averaged, drawn))
    if with_paper:
        rows += [_published(one) for one in paper.ROWS]
    return Report(columns, averaged, rows, draws, seed)


def _by_column(run: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """column -> task -> result."""
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for name, task in run["tasks"].items():
        grouped.setdefault(column(task["dataset"]), {})[name] = task
    return grouped


def _all_drawn(
    run: dict[str, Any],
    grouped: Mapping[str, Mapping[str, dict[str, Any]]],
    draws: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """column -> [2, draws], of those that have all their predictions."""
    return {
        key: found
        for key, tasks in grouped.items()
        if draws and (found := _drawn(run, tasks, draws, seed, key)) is not None
    }


def _row(
    name: str,
    run: dict[str, Any],
    grouped: Mapping[str, Mapping[str, dict[str, Any]]],
    averaged: Sequence[str],
    drawn: Mapping[str, np.ndarray],
) -> Row:
    names = run.get("trained_datasets")
    trained = None if names is None else {column(dataset) for dataset in names}
    scores = {
        key: _score(tasks, drawn.get(key), None if trained is None else key in trained)
        for key, tasks in grouped.items()
    }
    percent, share = _share(run.get("trainable"), run.get("total"))
    return Row(
        name=name,
        method=str(run.get("variant") or run.get("method") or tables.NONE),
        percent=percent,
        share=share,
        scores=scores,
        average=_average(scores, drawn, [key for key in averaged if key in scores]),
        complete=set(averaged) <= set(scores),
        about={key: run.get(key) for key in ("step", "checkpoint", "trainable", "total")},
    )


def _over_seeds(
    members: Sequence[Row],
    numbers: Sequence[int],
    averaged: Sequence[str],
    drawn: Sequence[Mapping[str, np.ndarray]],
) -> Row:
    """Runs as one row: means over seeds, and intervals of these means under redrawn examples."""
    first = members[0]
    means = {
        key: np.mean([one[key] for one in drawn], axis=0)
        for key in first.scores
        if all(key in one for one in drawn)
    }
    averages = [means[key] for key in averaged if key in means]
    whole = len(averages) == len([key for key in averaged if key in first.scores])
    checkpoints = [str(row.about["checkpoint"]) for row in members]
    return dataclasses.replace(
        first,
        scores={
            key: _mean_score([row.scores[key] for row in members], means.get(key))
            for key in first.scores
        },
        average=_mean_score(
            [row.average for row in members],
            np.mean(averages, axis=0) if averages and whole else None,
        ),
        about={**first.about, "checkpoint": "; ".join(checkpoints)},
        seeds=tuple(numbers),
    )


def _mean_score(members: Sequence[Score], drawn: np.ndarray | None) -> Score:
    values = {
        measure: tuple(
            getattr(one, measure) for one in members if getattr(one, measure) is not None
        )
        for measure in MEASURES
    }
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    trained = [one.trained for one in members]
    return dataclasses.replace(
        members[0],
        median=means.get("median"),
        mean=means.get("mean"),
        intervals=_intervals(drawn),
        trained=None if None in trained else any(trained),
        seeds=values,
    )


def _share(trainable: int | None, total: int | None) -> tuple[float | None, str]:
    if trainable is None or not total:
        return None, tables.NONE
    return round(100 * trainable / total, 6), tables.share(trainable, total)


def _drawn(
    run: dict[str, Any], tasks: Mapping[str, dict[str, Any]], draws: int, seed: int, name: str
) -> np.ndarray | None:
    """[2, draws] median and mean under redrawn examples; None without all the predictions."""
    prompts = []
    for task, result in tasks.items():
        answers = results_file.answers(run[results_file.PREDICTIONS], task, result)
        if answers is None:
            return None
        prompts.append(answers)
    return 100 * bootstrap.draws(prompts, draws, seed, name)


def _score(
    tasks: Mapping[str, dict[str, Any]], drawn: np.ndarray | None, trained: bool | None
) -> Score:
    accuracies = [100 * task["accuracy"] for task in tasks.values()]
    return Score(
        median=statistics.median(accuracies),
        mean=statistics.fmean(accuracies),
        chance=100 * statistics.fmean(task["chance"] for task in tasks.values()),
        intervals=_intervals(drawn),
        prompts=len(tasks),
        examples=sum(task["examples"] for task in tasks.values()),
        trained=trained,
    )


def _average(
    scores: Mapping[str, Score], drawn: Mapping[str, np.ndarray], over: Sequence[str]
) -> Score:
    """Data sets count alike, and are redrawn independently of one another."""
    if not over:
        return Score()
    members = [scores[key] for key in over]
    all_drawn = all(key in drawn for key in over)
    return Score(
        median=statistics.fmean(one.median for one in members if one.median is not None),
        mean=statistics.fmean(one.mean for one in members if one.mean is not None),
        chance=statistics.fmean(one.chance for one in members if one.chance is not None),
        intervals=_intervals(np.mean([drawn[key] for key in over], axis=0) if all_drawn else None),
        prompts=sum(one.prompts or 0 for one in members),
        examples=sum(one.examples or 0 for one in members),
        trained=None if members[0].trained is None else any(one.trained for one in members),
    )


def _intervals(drawn: np.ndarray | None) -> dict[str, tuple[float, float]]:
    if drawn is None:
        return {}
    return {measure: bootstrap.interval(drawn[i]) for i, measure in enumerate(MEASURES)}


def _published(one: paper.Row) -> Row:
    def score(value: float | None) -> Score:
        return Score(median=value) if one.measure == "median" else Score(mean=value)

    return Row(
        name=one.name,
        method=one.method,
        percent=float(one.share),
        share=f"{one.share} %",
        scores={key: score(value) for key, value in one.cells.items()},
        average=score(one.average),
        source=one.source,
    )
