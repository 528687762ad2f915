"""Prints the paper's zero-shot table: terminal, Markdown, CSV, JSON, and a bar chart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pemoe_jax.analysis import published_figures, tables
from pemoe_jax.analysis.tables import MISSING, Table
from pemoe_jax.analysis.zero_shot import bar_chart
from pemoe_jax.analysis.zero_shot.paper_table import AVERAGE, MEASURES, PaperTable, Row, Score
from pemoe_jax.analysis.zero_shot.result_tables import format_range
from pemoe_jax.analysis.zero_shot.results import JsonObject
from pemoe_jax.runtime import atomic_write

_SCORE_FIELDS = ("median", "mean", "chance", "prompts", "examples", "trained")
_NOTE_ON_ANLI = "ANLI: over the prompts of its three rounds together, with equal weights."
_NOTE_ON_PARTIAL = (
    "† Average over the datasets that the run was evaluated on, not comparable with the others."
)
_NOTE_ON_SEEDS = (
    "±: of runs that differ in the seed only, the mean over seeds and the standard deviation"
    " (n - 1); the intervals are those of the mean, under other examples and the same seeds."
)
_NOTE_ON_TRAINED = "* The run was trained on this dataset, or on one of an average: not zero-shot."

T = TypeVar("T")


def print_paper_table(table: PaperTable, format: str) -> None:
    """Prints the table to stdout as 'table', 'markdown', 'csv' or 'json'."""
    if format == "table":
        tables.print_tables(to_tables(table))
    elif format == "markdown":
        print(tables.to_markdown(to_tables(table)), end="")
    else:
        print(to_csv(table) if format == "csv" else to_json(table), end="")


def write_paper_table(table: PaperTable, folder: Path) -> None:
    """Writes report.md, report.csv, report.json and report.png."""
    markdown = tables.to_markdown(to_tables(table))
    draw_bars(table, folder / "report.png")
    image = "![Median over prompts by dataset](report.png)"
    atomic_write.write_text(folder / "report.md", f"{markdown}\n{image}\n")
    atomic_write.write_text(folder / "report.csv", to_csv(table))
    atomic_write.write_text(folder / "report.json", to_json(table))


def to_tables(table: PaperTable) -> list[Table]:
    """Returns medians, means and their intervals; seeds and counts where runs have several."""
    result = []
    for measure in MEASURES:
        result.append(_accuracy_table(table, measure))
        if any(row.average.intervals or _has_any_interval(row) for row in table.rows):
            result.append(_interval_table(table, measure))
    if _has_seeds(table):
        result.append(_seed_table(table))
    counts = _count_table(table)
    if any(len({*cells} - {MISSING}) > 1 for cells in list(zip(*counts.rows, strict=True))[1:]):
        result.append(counts)  # only if runs have different prompts or examples
    result[0].notes += _notes(table)
    return result


def to_csv(table: PaperTable) -> str:
    """Returns the table as CSV: the medians, then everything known about each dataset.

    Columns `<dataset>_mean`, `_chance`, `_prompts`, `_examples`, `_trained`; `_median_low`,
    `_median_high`, `_mean_low`, `_mean_high` of the intervals; over seeds `_median_sd`,
    `_median_least`, `_median_greatest` and the same of the mean. Accuracies and parameters are in
    %; unknown values are empty.
    """
    keys = [*table.columns, AVERAGE]
    fields = [key for key in _SCORE_FIELDS if key != "median"]
    ends = [f"{measure}_{end}" for measure in MEASURES for end in ("low", "high")]
    ends += [f"{measure}_{end}" for measure in MEASURES for end in ("sd", "least", "greatest")]
    text = io.StringIO()
    # The csv module ends lines in \r\n by default.
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "method", "parameters", *keys]
        + [f"{key}_{name}" for key in keys for name in [*fields, *ends]]
        + ["step", "checkpoint", "trainable", "total", "complete", "source", "seeds"]
    )
    for row in table.rows:
        scores = [_score(row, key) for key in keys]
        cells: list[object] = [row.name, row.method, row.percent]
        cells += [score.median for score in scores]
        for score in scores:
            cells += [getattr(score, name) for name in fields]
            cells += [
                end for measure in MEASURES for end in score.intervals.get(measure, (None, None))
            ]
            for measure in MEASURES:
                values = score.seeds.get(measure, ())
                cells += [score.deviation(measure)]
                cells += [min(values, default=None), max(values, default=None)]
        cells += [row.about.get(key) for key in ("step", "checkpoint", "trainable", "total")]
        # Published rows have only the paper's columns, so "complete" would say nothing.
        cells += ["" if row.source else row.complete, row.source, " ".join(map(str, row.seeds))]
        writer.writerow(map(_csv_cell, cells))
    return text.getvalue()


def to_json(table: PaperTable) -> str:
    """Returns the whole table as JSON, in %."""

    def score_object(score: Score) -> JsonObject:
        result: JsonObject = {name: _rounded(getattr(score, name)) for name in _SCORE_FIELDS}
        result = {name: value for name, value in result.items() if value is not None}
        for measure, ends in score.intervals.items():
            result[f"{measure}_interval"] = [_rounded(end) for end in ends]
        for measure, values in score.seeds.items():
            result[f"{measure}_seeds"] = [_rounded(value) for value in values]
            result[f"{measure}_sd"] = _rounded(score.deviation(measure))
        return result

    rows = [
        {
            "run": row.name,
            "method": row.method,
            "parameters": row.percent,
            **row.about,
            **({"source": row.source} if row.source else {"complete": row.complete}),
            **({"seeds": list(row.seeds)} if row.seeds else {}),
            "scores": {
                key: score_object(row.scores[key]) for key in table.columns if key in row.scores
            },
            AVERAGE: score_object(row.average),
        }
        for row in table.rows
    ]
    contents = {
        "unit": "per cent",
        "columns": table.columns,
        "averaged": table.averaged,
        "bootstrap": {"draws": table.draws, "seed": table.seed},
        "rows": rows,
        "notes": _notes(table),
    }
    return json.dumps(contents, indent=1, ensure_ascii=False) + "\n"


def draw_bars(table: PaperTable, png: str | Path) -> Path:
    """Draws the medians as bars, one panel per dataset; leaves out rows without any median."""
    keys = [*table.averaged, AVERAGE, *table.columns[len(table.averaged) :]]
    rows = [row for row in table.rows if any(_score(row, key).median is not None for key in keys)]
    panels = []
    for key in keys:
        # Chance of a partial average belongs to other datasets.
        chances = [_score(row, key).chance for row in table.rows if row.complete or key != AVERAGE]
        known = [chance for chance in chances if chance is not None]
        chance = sum(known) / len(known) if known else None
        panels.append(bar_chart.Panel(key, [_bar(row, key) for row in rows], chance))
    # Runs are often named after their method: do not repeat it.
    labels = [
        row.name
        if row.method in row.name or row.method in (MISSING, "none")
        else f"{row.name} · {row.method}"
        for row in rows
    ]
    title = "Zero-shot accuracy in %: median over prompts"
    return bar_chart.draw(panels, labels, png, title=title)


def _bar(row: Row, key: str) -> bar_chart.Bar | None:
    score = _score(row, key)
    if score.median is None:
        return None
    return bar_chart.Bar(
        score.median,
        score.intervals.get("median"),
        seeds=score.seeds.get("median", ()),
        hatched=bool(score.trained),
        pale=bool(row.source),
        mark="†" if key == AVERAGE and not row.complete else "",
    )


def _accuracy_table(table: PaperTable, measure: str) -> Table:
    has_seeds = _has_seeds(table)

    def cells(row: Row) -> list[str]:
        seed_count = "" if row.source else str(len(row.seeds) or 1)
        average = _accuracy(row.average, measure)
        average += "" if row.complete or average == MISSING else " †"
        accuracies = [_accuracy(_score(row, column), measure) for column in table.columns]
        return [
            *(row.name, row.method, row.share),
            *([seed_count] if has_seeds else []),
            *_insert_average(table, accuracies, average),
        ]

    opening = ["run", "method", "parameters", *(["seeds"] if has_seeds else [])]
    footer = []
    if measure == "median":
        blank = [""] * (len(opening) - 1)
        footer = [
            ["chance", *blank, *_ranges(table, lambda score: score.chance, "{:.1f}", True)],
            ["prompts", *blank, *_ranges(table, lambda score: score.prompts, "{:,}")],
            ["examples", *blank, *_ranges(table, lambda score: score.examples, "{:,}")],
        ]
    return Table(
        f"Zero-shot accuracy in %: {measure} over the prompts of a dataset",
        [*opening, *_insert_average(table, table.columns, AVERAGE)],
        [
            cells(row)
            for row in table.rows
            if any(getattr(score, measure) is not None for score in _all_scores(row))
        ],
        footer=footer,
    )


def _interval_table(table: PaperTable, measure: str) -> Table:
    def interval(score: Score) -> str:
        if measure not in score.intervals:
            return MISSING
        low, high = score.intervals[measure]
        return f"{low:.1f}–{high:.1f}"

    rows = []
    for row in _runs(table):
        intervals = [interval(_score(row, column)) for column in table.columns]
        rows.append([row.name, *_insert_average(table, intervals, interval(row.average))])
    columns = ["run", *_insert_average(table, table.columns, AVERAGE)]
    return Table(f"95 % interval of the {measure}", columns, rows)


def _seed_table(table: PaperTable) -> Table:
    """Returns the average of the medians of every seed."""
    seeds = sorted({seed for row in table.rows for seed in row.seeds})

    def cells(row: Row) -> list[str]:
        averages = dict(zip(row.seeds, row.average.seeds.get("median", ()), strict=False))
        return [f"{averages[seed]:.1f}" if seed in averages else MISSING for seed in seeds]

    return Table(
        "Average of the medians, seed by seed",
        ["run", *(f"seed {seed}" for seed in seeds)],
        [[row.name, *cells(row)] for row in table.rows if row.seeds],
    )


def _count_table(table: PaperTable) -> Table:
    def cell(score: Score) -> str:
        return f"{score.prompts} / {score.examples:,}" if score.prompts else MISSING

    rows = [
        [row.name, *(cell(_score(row, column)) for column in table.columns)] for row in _runs(table)
    ]
    return Table("Prompts / examples of each run", ["run", *table.columns], rows)


def _notes(table: PaperTable) -> list[str]:
    runs = _runs(table)
    notes = []
    if len(table.columns) > len(table.averaged):
        notes.append("average: over the paper's datasets; the columns after it are not included.")
    if "ANLI" in table.columns:
        notes.append(_NOTE_ON_ANLI)
    if any(not row.complete for row in runs):
        notes.append(_NOTE_ON_PARTIAL)
    if _has_seeds(table):
        notes.append(_NOTE_ON_SEEDS)
    if any(score.trained for row in runs for score in _all_scores(row)):
        notes.append(_NOTE_ON_TRAINED)
    if any(map(_has_any_interval, runs)):
        notes.append(
            f"Intervals: the middle 95 % of {table.draws:,} bootstrap draws of examples, the same"
            " for all prompts of a dataset; prompts are fixed."
        )
    incomplete = [
        row.name
        for row in runs
        if table.draws and not all(score.intervals for score in row.scores.values())
    ]
    if incomplete:
        notes.append(f"Intervals left out, as predictions are missing: {', '.join(incomplete)}.")
    if len(runs) < len(table.rows):
        notes.append(published_figures.NOTE)
    return notes


def _runs(table: PaperTable) -> list[Row]:
    """Returns the rows that are not published ones."""
    return [row for row in table.rows if not row.source]


def _score(row: Row, key: str) -> Score:
    return row.average if key == AVERAGE else row.scores.get(key, Score())


def _all_scores(row: Row) -> list[Score]:
    return [*row.scores.values(), row.average]


def _has_any_interval(row: Row) -> bool:
    return any(score.intervals for score in row.scores.values())


def _has_seeds(table: PaperTable) -> bool:
    return any(row.seeds for row in table.rows)


def _insert_average(table: PaperTable, cells: Sequence[str], average: str) -> list[str]:
    """Inserts the average after the columns that it is over."""
    index = len(table.averaged)
    return [*cells[:index], average, *cells[index:]]


def _accuracy(score: Score, measure: str) -> str:
    value = getattr(score, measure)
    if value is None:
        return MISSING
    deviation = score.deviation(measure)
    spread = "" if deviation is None else f" ±{deviation:.1f}"
    return f"{value:.1f}{spread}" + (" *" if score.trained else "")


def _ranges(
    table: PaperTable,
    value: Callable[[Score], float | None],
    number_format: str,
    with_average: bool = False,
) -> list[str]:
    """Returns the value of each column; the least and the greatest if runs differ in it."""
    runs = _runs(table)
    cells = [
        format_range([value(_score(row, column)) for row in runs], number_format.format)
        for column in table.columns
    ]
    average = ""
    if with_average:
        # A partial average has the chance of other datasets.
        averages = [value(row.average) for row in runs if row.complete]
        average = format_range(averages, number_format.format)
    return _insert_average(table, cells, average)


def _rounded(value: T) -> T | float:
    """Rounds a number in % to four decimals, which drops the noise of floating point."""
    return round(value, 4) if isinstance(value, float) else value


def _csv_cell(value: object) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(_rounded(value))
