"""Means of benchmarks: their entries in results.json, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pemoe_jax.analysis.tables import MISSING, Table
from pemoe_jax.tasks.benchmarks import Benchmark
from pemoe_jax.tasks.task_roles import abbreviate

_NAMED = 20  # missing tasks that a note names


def summarize_benchmarks(
    benchmarks: Iterable[Benchmark], metrics: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any]:
    """Returns a run's `benchmarks` in results.json: name -> `Benchmark.summarize`.

    Args:
      benchmarks: those that the tasks may belong to.
      metrics: task -> metric -> score; None is undefined.
    """
    summaries = {}
    for benchmark in benchmarks:
        scores = {
            task: score
            for task, values in metrics.items()
            if (score := values.get(benchmark.metric)) is not None
        }
        if (summary := benchmark.summarize(scores)) is not None:
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
    columns = [*first["areas"].values(), first]
    table = Table(
        f"{name}: accuracy in %, mean over {noun}s",
        ["run", "method", *first["areas"], "mean"],
        [
            [label, str(run.get("method") or MISSING)]
            + [_percent(column["mean"], scale) for column in [*summary["areas"].values(), summary]]
            for label, (run, summary) in by_label.items()
        ],
        footer=[[f"{noun}s", "", *(f"{mean['members']} of {mean['of']}" for mean in columns)]],
        num_text=2,
    )
    if missing := first["missing"]:
        table.notes.append(
            f"Without scores, and so not in the means over {noun}s: {abbreviate(missing, _NAMED)}"
        )
    return table


def _percent(mean: float | None, scale: float) -> str:
    return MISSING if mean is None else f"{scale * mean:.1f}"
