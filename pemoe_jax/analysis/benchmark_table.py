"""Means of the benchmarks MMLU and BBH: their entries in results.json and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pemoe_jax.analysis.tables import MISSING, SHOTS_LEFT_OUT, Table
from pemoe_jax.tasks.benchmarks import Benchmark
from pemoe_jax.tasks.task_roles import abbreviate

_MAX_NAMED = 20  # a note names at most this many of the missing tasks


def summarize_benchmarks(
    benchmarks: Iterable[Benchmark], tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the entry `benchmarks` of a run in results.json: name -> its `Benchmark.summarize`.

    In few-shot evaluation, each benchmark also has `shots_left_out`, the number of shots (solved
    examples in front of an input) that did not fit. Benchmarks without scores are left out.

    Args:
      benchmarks: the benchmarks to look for among the tasks.
      tasks: the run's `tasks` in results.json.
    """
    summaries = {}
    for benchmark in benchmarks:
        results = {name: tasks[name] for name in benchmark.tasks if name in tasks}
        scores = {
            name: score
            for name, result in results.items()
            # In results of `pemoe infer`, a task has an object of metrics, in which null is an
            # undefined metric. In results of `pemoe evaluate`, the task itself has the score.
            if (score := result.get("metrics", result).get(benchmark.metric)) is not None
        }
        summary = benchmark.summarize(scores)
        if summary is None:
            continue
        left_out = [
            n for result in results.values() if (n := result.get("shots_left_out")) is not None
        ]
        if left_out:
            summary["shots_left_out"] = sum(left_out)
        summaries[benchmark.name] = summary
    return summaries


def benchmark_tables(
    runs: Sequence[Mapping[str, Any]], labels: Sequence[str], scale: float
) -> list[Table]:
    """Returns the table of each benchmark: a row for each run, a column for each area and the mean.

    Args:
      runs: entries of `runs` in results.json.
      labels: a name for each run.
      scale: factor from the scores to %.
    """
    names = dict.fromkeys(name for run in runs for name in run.get("benchmarks", {}))
    return [_table(name, runs, labels, scale) for name in names]


def _table(
    name: str, runs: Sequence[Mapping[str, Any]], labels: Sequence[str], scale: float
) -> Table:
    by_label = {
        label: (run, run["benchmarks"][name])
        for label, run in zip(labels, runs, strict=True)
        if name in run.get("benchmarks", {})
    }
    # All runs of a folder have the same tasks.
    first = next(summary for _, summary in by_label.values())
    noun = first["noun"]
    means = [*first["areas"].values(), first]
    has_shots = "shots_left_out" in first
    blank = [""] * (1 + has_shots)  # below the columns "method" and "shots"
    footer = [[f"{noun}s", *blank, *(f"{mean['members']} of {mean['of']}" for mean in means)]]
    if has_shots:
        # Shots left out are known for the whole benchmark only: one number, below the mean.
        blank += [""] * len(first["areas"])
        footer.append([SHOTS_LEFT_OUT, *blank, f"{first['shots_left_out']:,}"])
    table = Table(
        f"{name}: accuracy in %, mean over {noun}s",
        ["run", "method", *(["shots"] if has_shots else []), *first["areas"], "mean"],
        [
            [label, str(run.get("method") or MISSING)]
            + ([str(run.get("shots", 0))] if has_shots else [])
            + [_percent(mean["mean"], scale) for mean in [*summary["areas"].values(), summary]]
            for label, (run, summary) in by_label.items()
        ],
        footer=footer,
        num_text=2,
    )
    if missing := first["missing"]:
        table.notes.append(
            f"Without scores, and so not in the means over {noun}s:"
            f" {abbreviate(missing, _MAX_NAMED)}"
        )
    return table


def _percent(mean: float | None, scale: float) -> str:
    return MISSING if mean is None else f"{scale * mean:.1f}"
