"""The tables that `pemoe evaluate` writes to results.md and prints."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from pemoe_jax.analysis import benchmark_table
from pemoe_jax.analysis.tables import (
    MISSING,
    SHOTS_LEFT_OUT,
    Table,
    format_share,
    markdown_table,
    print_tables,
)
from pemoe_jax.analysis.zero_shot.results import NORMALIZED, SHOTS_KEYS, JsonObject
from pemoe_jax.tasks.task_roles import abbreviate

Number = TypeVar("Number", int, float)


def results_markdown(results: JsonObject) -> str:
    """Returns the text of results.md: tables of means, prompts and checkpoints, with notes."""
    runs = results["runs"]
    parts = []
    tables = [*_mean_tables(runs), *normalized_tables(runs), _prompt_table(runs)]
    for table in [*tables, checkpoint_table(runs)]:
        parts += [f"## {table.title}", markdown_table(table), *table.notes]
    return "\n\n".join(parts) + "\n"


def print_results(results: JsonObject) -> None:
    """Prints the tables of means."""
    print_tables([*_mean_tables(results["runs"]), *normalized_tables(results["runs"])])


def any_shots(runs: Sequence[JsonObject]) -> bool:
    """Returns whether any run has shots in front of its inputs."""
    return any(run.get("shots") for run in runs)


def run_labels(runs: Sequence[JsonObject]) -> list[str]:
    """Returns the names of the runs, with shots, step or checkpoint added to equal ones."""
    labels = [run["name"] for run in runs]
    runs = [dict.fromkeys(SHOTS_KEYS, 0) | run for run in runs]
    differing = [key for key in SHOTS_KEYS if len({run[key] for run in runs}) > 1]
    # The step comes before the checkpoint, as it is shorter.
    for key in (*differing, "step", "checkpoint"):
        counts = Counter(labels)
        labels = [
            f"{label} ({key.replace('_', ' ')} {run.get(key)})" if counts[label] > 1 else label
            for label, run in zip(labels, runs, strict=True)
        ]
    return labels


def checkpoint_table(runs: Sequence[JsonObject]) -> Table:
    """Returns a table with the checkpoint, base, dtypes and step of each run."""
    rows = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        keys = ("checkpoint", "base", "dtype")
        checkpoint, base, dtype = (str(run.get(key) or MISSING) for key in keys)
        frozen = f" (frozen {run['frozen']})" if run.get("frozen") else ""
        rows.append([label, checkpoint, base, dtype + frozen, _integer(run.get("step"))])
    columns = ["run", "checkpoint", "base", "activations", "step"]
    return Table("Checkpoints", columns, rows, num_text=4)


def normalized_tables(
    runs: Sequence[JsonObject], column_of: Callable[[str], str] = lambda dataset: dataset
) -> list[Table]:
    """Returns the table of accuracies by log-likelihood per length, or no table if no run has them.

    Args:
      runs: runs as in results.json; those without these accuracies have no rows.
      column_of: function from a dataset to its column.
    """
    # (label of the run, measure) -> column -> accuracies of the prompts
    by_row: dict[tuple[str, str], dict[str, list[float]]] = {}
    for label, run in zip(run_labels(runs), runs, strict=True):
        for task in run.get("tasks", {}).values():
            for name, unit in NORMALIZED.items():
                if name in task:
                    by_column = by_row.setdefault((label, f"per {unit} ({name})"), {})
                    by_column.setdefault(column_of(task["dataset"]), []).append(task[name])
    if not by_row:
        return []
    columns = list(dict.fromkeys(column for values in by_row.values() for column in values))
    rows = []
    for (label, measure), values in by_row.items():
        medians = {column: statistics.median(members) for column, members in values.items()}
        cells = [_percent(medians.get(column)) for column in columns]
        # As in the other tables, an average over fewer datasets is marked.
        partial = " †" if len(medians) < len(columns) else ""
        rows.append(
            [label, measure, *cells, _percent(statistics.fmean(medians.values())) + partial]
        )
    title = "Accuracy by log-likelihood per length, in %: median over the prompts of a dataset"
    return [Table(title, ["run", "log-likelihood", *columns, "average"], rows, num_text=2)]


def format_range(values: Sequence[Number | None], format_value: Callable[[Number], str]) -> str:
    """Returns 'least–greatest' of the known values, or only one if both are formatted alike."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return MISSING
    return "–".join(dict.fromkeys([format_value(known[0]), format_value(known[-1])]))


def trainable_share(run: JsonObject) -> str:
    """Returns a run's trainable parameters in %; `MISSING` if they are unknown."""
    if run.get("trainable") is None or not run.get("total"):
        return MISSING
    return format_share(run["trainable"], run["total"])


def _mean_tables(runs: Sequence[JsonObject]) -> list[Table]:
    """Returns the tables of benchmarks, or those of datasets if no run has a benchmark."""
    # A benchmark may have more datasets than a table can have columns.
    benchmarks = benchmark_table.benchmark_tables(runs, run_labels(runs), scale=100)
    tables = benchmarks or _dataset_tables(runs)
    # Notes about the runs follow the first table only.
    tables[0].notes += _same_answer_notes(runs)
    return tables


def _dataset_tables(runs: Sequence[JsonObject]) -> list[Table]:
    """Returns the tables of medians and of means over the prompts of a dataset."""
    datasets = list(dict.fromkeys(name for run in runs for name in run["datasets"]))
    has_shots = any_shots(runs)
    is_partial = [not set(datasets) <= set(run["datasets"]) for run in runs]
    rows = list(zip(run_labels(runs), runs, is_partial, strict=True))

    def accuracies(run: JsonObject, measure: str, partial: bool) -> list[str]:
        cells = [_percent(run["datasets"].get(name, {}).get(measure)) for name in datasets]
        return [*cells, _percent(run["average"].get(measure)) + (" †" if partial else "")]

    def ranges(key: str, format_value: Callable[[float], str]) -> list[str]:
        return [
            format_range([run["datasets"].get(name, {}).get(key) for run in runs], format_value)
            for name in datasets
        ]

    # A partial average is over fewer datasets, and so is its chance.
    chances = [run["average"].get("chance") for _, run, partial in rows if not partial]
    blank = [""] * (2 + has_shots)  # below the columns "method", "trainable" and "shots"
    medians = Table(
        "Accuracy in %: median over the prompts of a dataset",
        ["run", "method", "trainable", *(["shots"] if has_shots else []), *datasets, "average"],
        [
            [label, str(run.get("method") or MISSING), trainable_share(run)]
            + ([str(run.get("shots", 0))] if has_shots else [])
            + accuracies(run, "median", partial)
            for label, run, partial in rows
        ],
        footer=[
            ["chance", *blank, *ranges("chance", _percent), format_range(chances, _percent)],
            ["prompts", *blank, *ranges("prompts", _integer), ""],
            ["examples", *blank, *ranges("examples", _integer), ""],
            *(
                [[SHOTS_LEFT_OUT, *blank, *ranges("shots_left_out", _integer), ""]]
                if has_shots
                else []
            ),
        ],
        num_text=2,
    )
    if any(is_partial):
        medians.notes.append("† Average over the datasets that the run was evaluated on.")
    means = Table(
        "Accuracy in %: mean over the prompts of a dataset",
        ["run", *datasets, "average"],
        [[label, *accuracies(run, "mean", partial)] for label, run, partial in rows],
    )
    return [medians, means]


def _same_answer_notes(runs: Sequence[JsonObject]) -> list[str]:
    """Returns a note for each run that gives one answer to all examples of some prompts."""
    notes = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        tasks = run.get("tasks", {})
        prompts = [
            f"{name} ({task['same_answer']})"
            for name, task in tasks.items()
            if "same_answer" in task
        ]
        if prompts:
            notes.append(
                f"{label} gives the same answer to every example of {len(prompts)} of {len(tasks)}"
                f" prompts: {abbreviate(prompts, 3)}"
            )
    return notes


def _prompt_table(runs: Sequence[JsonObject]) -> Table:
    """Returns the table of prompts, with a column for each run and a note about odd examples."""
    tasks: dict[str, JsonObject] = {}
    odd: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, task in run.get("tasks", {}).items():
            tasks.setdefault(name, task)
            # Odd rows are the same in all runs; tied scores are those of the last run that has any.
            if any((task.get("odd") or {}).values()):
                odd[name] = task["odd"]
    datasets = list(dict.fromkeys(task["dataset"] for task in tasks.values()))
    has_shots = any_shots(runs)
    names = sorted(tasks, key=lambda name: (datasets.index(tasks[name]["dataset"]), name))
    rows = []
    for name in names:
        first, by_run = tasks[name], [run.get("tasks", {}).get(name, {}) for run in runs]
        examples = format_range([task.get("examples") for task in by_run], _integer)
        fractions = [first.get("chance"), *(task.get("accuracy") for task in by_run)]
        cells = [first["dataset"], name, first.get("split", MISSING), examples]
        if has_shots:
            left_out = [task["shots_left_out"] for task in by_run if "shots_left_out" in task]
            cells.append(format_range(left_out, _integer))
        rows.append([*cells, *map(_percent, fractions)])
    columns = ["dataset", "prompt", "split", "examples", *([SHOTS_LEFT_OUT] if has_shots else [])]
    columns += ["chance", *run_labels(runs)]
    table = Table("Accuracy in %: prompt by prompt", columns, rows, num_text=3)
    lines = []
    for name in sorted(odd, key=names.index):
        kinds = [f"{kind.replace('_', ' ')} {n:,}" for kind, n in odd[name].items() if n]
        lines.append(f"- {name}: {', '.join(kinds)}")
    if lines:
        title = "Odd examples (counted, and scored like the others):"
        table.notes.append("\n".join([title, "", *lines]))
    return table


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f}"


def _integer(count: float | None) -> str:
    return MISSING if count is None else f"{count:,}"
