"""The tables that `pemoe evaluate` writes to results.md and prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from pemoe_jax.analysis.tables import MISSING, Table, format_share, markdown_table, print_tables
from pemoe_jax.analysis.zero_shot.results import JsonObject

Number = TypeVar("Number", int, float)


def results_markdown(results: JsonObject) -> str:
    """Returns the tables of datasets, prompts and checkpoints, each followed by its notes."""
    runs = results["runs"]
    parts = []
    for table in [*_dataset_tables(runs), _prompt_table(runs), checkpoint_table(runs)]:
        parts += [f"## {table.title}", markdown_table(table), *table.notes]
    return "\n\n".join(parts) + "\n"


def print_results(results: JsonObject) -> None:
    """Prints the tables of datasets."""
    print_tables(_dataset_tables(results["runs"]))


def run_labels(runs: Sequence[JsonObject]) -> list[str]:
    """Returns the names of the runs, with step or checkpoint where names are equal."""
    labels = [run["name"] for run in runs]
    # Checkpoints are long: they distinguish only the runs that name and step do not.
    for key in ("step", "checkpoint"):
        counts = Counter(labels)
        labels = [
            f"{label} ({key} {run.get(key)})" if counts[label] > 1 else label
            for label, run in zip(labels, runs, strict=True)
        ]
    return labels


def checkpoint_table(runs: Sequence[JsonObject]) -> Table:
    """Returns the table of each run's checkpoint, its base, and the dtypes of the computation."""
    rows = []
    for label, run in zip(run_labels(runs), runs, strict=True):
        frozen = f" (frozen {run['frozen']})" if run.get("frozen") else ""
        rows.append(
            [
                label,
                str(run.get("checkpoint") or MISSING),
                _integer(run.get("step")),
                str(run.get("base") or MISSING),
                (run.get("dtype") or MISSING) + frozen,
            ]
        )
    return Table("Checkpoints", ["run", "checkpoint", "step", "base", "activations"], rows)


def format_range(values: Sequence[Number | None], format_value: Callable[[Number], str]) -> str:
    """Returns the least and the greatest of the known values, or the value if they are equal."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return MISSING
    return "–".join(dict.fromkeys([format_value(known[0]), format_value(known[-1])]))


def _dataset_tables(runs: Sequence[JsonObject]) -> list[Table]:
    """Returns the tables of medians and of means over the prompts of a dataset."""
    labels = run_labels(runs)
    datasets = list(dict.fromkeys(name for run in runs for name in run["datasets"]))
    is_partial = [not set(datasets) <= set(run["datasets"]) for run in runs]

    def accuracies(run: JsonObject, measure: str, partial: bool) -> list[str]:
        cells = [_percent(run["datasets"].get(name, {}).get(measure)) for name in datasets]
        return [*cells, _percent(run["average"].get(measure)) + (" †" if partial else "")]

    def ranges(key: str, format_value: Callable[[float], str]) -> list[str]:
        return [
            format_range([run["datasets"].get(name, {}).get(key) for run in runs], format_value)
            for name in datasets
        ]

    # Chance of a partial average belongs to other datasets.
    chances = [
        run["average"].get("chance")
        for run, partial in zip(runs, is_partial, strict=True)
        if not partial
    ]
    rows = list(zip(labels, runs, is_partial, strict=True))
    medians = Table(
        "Accuracy in %: median over the prompts of a dataset",
        ["run", "method", "trainable", *datasets, "average"],
        [
            [label, str(run.get("method") or MISSING), _trainable_share(run)]
            + accuracies(run, "median", partial)
            for label, run, partial in rows
        ],
        footer=[
            ["chance", "", "", *ranges("chance", _percent), format_range(chances, _percent)],
            ["prompts", "", "", *ranges("prompts", _integer), ""],
            ["examples", "", "", *ranges("examples", _integer), ""],
        ],
    )
    if any(is_partial):
        medians.notes.append("† Average over the datasets that the run was evaluated on.")
    means = Table(
        "Accuracy in %: mean over the prompts of a dataset",
        ["run", *datasets, "average"],
        [[label, *accuracies(run, "mean", partial)] for label, run, partial in rows],
    )
    return [medians, means]


def _prompt_table(runs: Sequence[JsonObject]) -> Table:
    """Returns the table with a row for each prompt, a column for each run, and odd examples."""
    tasks: dict[str, JsonObject] = {}
    odd: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, task in run.get("tasks", {}).items():
            tasks.setdefault(name, task)
            counts = {kind: count for kind, count in (task.get("odd") or {}).items() if count}
            if counts:
                odd[name] = counts
    datasets = list(dict.fromkeys(task["dataset"] for task in tasks.values()))
    names = sorted(tasks, key=lambda name: (datasets.index(tasks[name]["dataset"]), name))
    rows = []
    for name in names:
        by_run = [run.get("tasks", {}).get(name, {}) for run in runs]
        rows.append(
            [
                tasks[name]["dataset"],
                name,
                tasks[name].get("split", MISSING),
                format_range([task.get("examples") for task in by_run], _integer),
                _percent(tasks[name].get("chance")),
                *(_percent(task.get("accuracy")) for task in by_run),
            ]
        )
    columns = ["dataset", "prompt", "split", "examples", "chance", *run_labels(runs)]
    table = Table("Accuracy in %: prompt by prompt", columns, rows)
    if odd:
        lines = []
        for name in sorted(odd, key=names.index):
            kinds = [f"{kind.replace('_', ' ')} {count:,}" for kind, count in odd[name].items()]
            lines.append(f"- {name}: {', '.join(kinds)}")
        listing = "\n".join(lines)
        table.notes.append(f"Odd examples (counted, and scored like the others):\n\n{listing}")
    return table


def _trainable_share(run: JsonObject) -> str:
    if run.get("trainable") is None or not run.get("total"):
        return MISSING
    return format_share(run["trainable"], run["total"])


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f}"


def _integer(count: float | None) -> str:
    return MISSING if count is None else f"{count:,}"
