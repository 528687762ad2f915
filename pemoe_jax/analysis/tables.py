"""Tables of parameters and of results, as text, Markdown, or in the terminal's colours.

Results are dicts of the form that `evaluate` writes to `results.json`: {"runs": [run, ...]}, each
run with its "datasets" (over prompts: "median", "mean", "chance"; "prompts", "examples"), their
"average", and its "tasks" (one per prompt). Accuracies are fractions there and per cent here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError

Results = dict[str, Any]

NONE = "–"
# To the left; figures stand to the right.
TEXT_COLUMNS = {"run", "method", "data set", "prompt", "split", "site", "seen", "tokens by share"}
TEXT_COLUMNS |= {"held-out task", "nearest trained on", "on each device", "part"}
TEXT_COLUMNS |= {"checkpoint", "base", "activations"}
ADAPTER = re.compile(r"(?:^|/)(\w+)_adapter/(router/)?")


def merge(results: Iterable[Results]) -> Results:
    """Several results as one. Of runs with equal name, checkpoint and step the last one counts."""
    runs: dict[tuple, dict] = {}
    for one in results:
        for run in _runs(one):
            runs[run["name"], run.get("checkpoint"), run.get("step")] = run
    return {"runs": list(runs.values())}


def to_markdown(results: Results) -> str:
    """The result tables as Markdown: medians, means, prompts one by one, and what was odd.

    At the end what each run is.
    """
    parts = []
    for table in [*_tables(results), origins(_runs(results))]:
        parts.append(f"## {table.title}")
        parts.append(markdown_table(table))
        parts += table.notes
    return "\n\n".join(parts) + "\n"


def print_table(results: Results, console: Any = None) -> None:
    """Prints the tables over data sets (not the prompts) to a rich console, or to stdout."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    for table in _tables(results)[:2]:
        rows = [table.columns, *table.rows, *table.below]
        width = 2 + sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True))
        turned = width > console.width  # then one column a run, one row a data set
        if turned:
            rows = [list(column) for column in zip(*rows, strict=True)]
        shown = Table(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(rows[0]):
            shown.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
        for i, row in enumerate(rows[1:], 1):
            below = not turned and i > len(table.rows)
            shown.add_row(
                *map(escape, row),
                style="dim" if below else None,
                end_section=not turned and i == len(table.rows),
            )
        console.print(shown)
        for note in table.notes:
            console.print(note, style="dim", markup=False)


def share(part: int, whole: int) -> str:
    """`part` of `whole` in per cent, with digits enough for a small one: 0.019 %, 0.32 %, 100 %."""
    if part == 0 or whole == 0:
        return "0 %"
    if part == whole:
        return "100 %"
    percent = 100 * part / whole
    digits = 4 if percent < 0.01 else 3 if percent < 0.1 else 2 if percent < 10 else 1
    return f"{percent:.{digits}f} %"


def parameter_summary(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    *,
    base: str,
    method: str,
    extra: Mapping[str, str] | None = None,
) -> str:
    """The opening lines of a run: the base, the method, and what trains, site by site.

    `trainable` and `frozen` map paths (`encoder/layers_0/mlp/gate_adapter/vectors`) to anything
    with a shape. `extra` adds lines, name to text.
    """
    by_site: Counter[str] = Counter()
    for path, leaf in trainable.items():
        found = ADAPTER.search(path)
        if found:
            by_site["routers" if found.group(2) else found.group(1)] += _size(leaf)
    count, rest = sum(map(_size, trainable.values())), sum(map(_size, frozen.values()))
    total = count + rest
    lines = {
        "base": base,
        "method": method,
        "trainable": f"{count:,} of {total:,} parameters ({share(count, total)}), "
        f"{len(trainable):,} of {len(trainable) + len(frozen):,} arrays",
    }
    if by_site:
        routers = by_site.pop("routers", None)
        sites = [f"{site} {n:,}" for site, n in by_site.items()]
        lines["sites"] = " · ".join(sites + ([f"routers {routers:,}"] if routers else []))
    lines |= extra or {}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


@dataclass
class Table:
    """Cells as text, and what is said below them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    below: list[list[str]] = field(default_factory=list)  # set apart from the rows
    notes: list[str] = field(default_factory=list)


def _tables(results: Results) -> list[Table]:
    """Medians and means over prompts by data set, then the prompts."""
    runs = _runs(results)
    labels = run_labels(runs)
    datasets = list(dict.fromkeys(name for run in runs for name in run["datasets"]))

    def rows(measure: str, extra: Callable[[dict], list[str]]) -> list[list[str]]:
        return [
            [label, *extra(run)]
            + [_percent(run["datasets"].get(name, {}).get(measure)) for name in datasets]
            + [_percent(run["average"].get(measure)) + _partial(run, datasets)]
            for label, run in zip(labels, runs, strict=True)
        ]

    def over_runs(measure: str, show: Callable[[Any], str]) -> list[str]:
        return [
            _span([run["datasets"].get(name, {}).get(measure) for run in runs], show)
            for name in datasets
        ]

    chances = [run["average"].get("chance") for run in runs if not _partial(run, datasets)]
    medians = Table(
        "Accuracy in %: median over the prompts of a data set",
        ["run", "method", "trainable", *datasets, "average"],
        rows("median", lambda run: [str(run.get("method") or NONE), _trainable(run)]),
        below=[
            ["chance", "", "", *over_runs("chance", _percent), _span(chances, _percent)],
            ["prompts", "", "", *over_runs("prompts", _integer), ""],
            ["examples", "", "", *over_runs("examples", _integer), ""],
        ],
    )
    if any(_partial(run, datasets) for run in runs):
        medians.notes.append("† Average over those data sets alone on which the run was scored.")
    means = Table(
        "Accuracy in %: mean over the prompts of a data set",
        ["run", *datasets, "average"],
        rows("mean", lambda run: []),
    )
    return [medians, means, _prompts(runs, labels)]


def origins(runs: list[dict]) -> Table:
    """Of each run its checkpoint, the base that this is an adapter of, and how it was computed."""
    return Table(
        "Checkpoints",
        ["run", "checkpoint", "step", "base", "activations"],
        [
            [
                label,
                str(run.get("checkpoint") or NONE),
                _integer(run.get("step")),
                str(run.get("base") or NONE),
                " ".join([run.get("dtype") or NONE, *_frozen(run)]),
            ]
            for label, run in zip(run_labels(runs), runs, strict=True)
        ],
    )


def _frozen(run: dict) -> list[str]:
    return [f"(frozen {run['frozen']})"] if run.get("frozen") else []


def _prompts(runs: list[dict], labels: list[str]) -> Table:
    """One row a prompt, one column a run; below it what was odd in the examples."""
    tasks: dict[str, dict] = {}
    odd: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, task in run.get("tasks", {}).items():
            tasks.setdefault(name, task)
            counts = {kind: n for kind, n in (task.get("odd") or {}).items() if n}
            if counts:
                odd[name] = counts
    order = {name: i for i, name in enumerate(dict.fromkeys(t["dataset"] for t in tasks.values()))}
    names = sorted(tasks, key=lambda name: (order[tasks[name]["dataset"]], name))
    over_runs = {
        name: [r["tasks"][name] for r in runs if name in r.get("tasks", {})] for name in tasks
    }
    table = Table(
        "Accuracy in %: prompt by prompt",
        ["data set", "prompt", "split", "examples", "chance", *labels],
        [
            [
                tasks[name]["dataset"],
                name,
                tasks[name].get("split", NONE),
                _span([task.get("examples") for task in over_runs[name]], _integer),
                _percent(tasks[name].get("chance")),
                *(_percent(run.get("tasks", {}).get(name, {}).get("accuracy")) for run in runs),
            ]
            for name in names
        ],
    )
    if odd:
        listed = "\n".join(
            f"- {name}: "
            + ", ".join(f"{kind.replace('_', ' ')} {n:,}" for kind, n in kinds.items())
            for name, kinds in sorted(odd.items(), key=lambda item: names.index(item[0]))
        )
        table.notes.append(f"Odd examples (counted, and scored as they are):\n\n{listed}")
    return table


def _runs(results: Results) -> list[dict]:
    runs = results.get("runs") if isinstance(results, dict) else None
    if not isinstance(runs, list) or not runs:
        raise InputError('results: expected {"runs": [...]} with at least one run, found none')
    for run in runs:
        missing = [key for key in ("name", "datasets", "average") if key not in run]
        if missing:
            raise InputError(f"results, run {run.get('name')!r}: expected {missing}, found none")
    return runs


def run_labels(runs: list[dict]) -> list[str]:
    """The names; runs that share one are told apart by their step, or else their checkpoint."""
    labels = [run["name"] for run in runs]
    for key in ("step", "checkpoint"):
        twice = {label for label, n in Counter(labels).items() if n > 1}
        labels = [
            f"{label} ({key} {run.get(key)})" if label in twice else label
            for label, run in zip(labels, runs, strict=True)
        ]
    return labels


def _partial(run: dict, datasets: list[str]) -> str:
    return "" if set(datasets) <= set(run["datasets"]) else " †"


def _trainable(run: dict) -> str:
    if run.get("trainable") is None or not run.get("total"):
        return NONE
    return share(run["trainable"], run["total"])


def _percent(fraction: float | None) -> str:
    return NONE if fraction is None else f"{100 * fraction:.1f}"


def _integer(count: int | None) -> str:
    return NONE if count is None else f"{count:,}"


def _span(values: list, show: Callable[[Any], str]) -> str:
    """The value; where runs differ, the least and the greatest."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return NONE
    return "–".join(dict.fromkeys([show(known[0]), show(known[-1])]))


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))


def markdown_table(table: Table) -> str:
    """A table without its title and notes; padded, so that it reads as well unrendered."""
    rows = [[_escape(cell) for cell in row] for row in [table.columns, *table.rows, *table.below]]
    left = [name in TEXT_COLUMNS for name in table.columns]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]
    rule = [
        ":".ljust(w, "-") if at else ":".rjust(w, "-") for w, at in zip(widths, left, strict=True)
    ]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            f"{cell:<{w}}" if at else f"{cell:>{w}}"
            for cell, w, at in zip(line, widths, left, strict=True)
        )
        + " |"
        for line in lines
    )


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
