"""Formats of the paper's zero-shot table: terminal, Markdown, CSV, JSON and a bar chart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from pemoe_jax.analysis import published_numbers, tables
from pemoe_jax.analysis.planning.flops import NOTE_ON_TOKENS
from pemoe_jax.analysis.tables import MISSING, Table, format_scaled
from pemoe_jax.analysis.zero_shot import bar_chart
from pemoe_jax.analysis.zero_shot.paper_table import (
    AVERAGE,
    MEASURES,
    RUN_KEYS,
    PaperTable,
    Row,
    Score,
)
from pemoe_jax.analysis.zero_shot.result_tables import format_range
from pemoe_jax.analysis.zero_shot.results import JsonObject
from pemoe_jax.runtime import atomic_write

_SCORE_FIELDS = ("median", "mean", "chance", "prompts", "examples", "trained")
_NOTE_ON_AVERAGE = "average: over the paper's datasets, without those in the columns after it."
_NOTE_ON_ANLI = "ANLI: over the prompts of its three rounds together, with equal weights."
_NOTE_ON_PARTIAL = (
    "† Average over the datasets that the run was evaluated on; not comparable with the others."
)
_NOTE_ON_SEEDS = (
    "±: mean and standard deviation (n - 1) over runs that differ only in the seed; intervals are"
    " those of the mean, under other examples and the same seeds."
)
_NOTE_ON_TRAINED = "* The run was trained on the dataset, or on one of the average: not zero-shot."


def print_paper_table(table: PaperTable, format: str) -> None:
    """Prints the table to stdout as 'table', 'markdown', 'csv' or 'json'."""
    if format in ("table", "markdown"):
        tables.print_tables(to_tables(table), as_markdown=format == "markdown")
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
    """Returns tables of medians, means and intervals, and if they differ of seeds and counts.

    Last is a table of sizes, if a run has parameters that not every token uses.
    """
    result = []
    for measure in MEASURES:
        result.append(_accuracy_table(table, measure))
        if any(map(_has_any_interval, table.rows)):
            result.append(_interval_table(table, measure))
    if _has_seeds(table):
        result.append(_seed_table(table))
    counts = _count_table(table)
    if any(len({*cells} - {MISSING}) > 1 for cells in list(zip(*counts.rows, strict=True))[1:]):
        result.append(counts)
    if any(row.run["used"] not in (None, row.run["total"]) for row in _runs(table)):
        result.append(_size_table(table))
    result[0].notes += _notes(table)
    return result


def to_csv(table: PaperTable) -> str:
    """Returns the table as CSV: the medians, then everything known about each dataset.

    Columns `<dataset>_mean`, `_chance`, `_prompts`, `_examples`, `_trained`; `_median_low`,
    `_median_high`, `_mean_low`, `_mean_high` of the intervals; over seeds `_median_sd`,
    `_median_least`, `_median_greatest` and the same of the mean. Accuracies and parameters are in
    %; unknown values are empty.
    """
    records = [_csv_record(row, [*table.columns, AVERAGE]) for row in table.rows]
    if _has_shots(table):
        for row, record in zip(table.rows, records, strict=True):
            record.append(("shots", row.shots))
    text = io.StringIO()
    # The csv module ends lines in \r\n by default.
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(name for name, _ in records[0])
    for record in records:
        # Without int(), True would be written as text; None is written as an empty cell.
        writer.writerow(int(v) if isinstance(v, bool) else _rounded(v) for _, v in record)
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
            **row.run,
            **({"source": row.source} if row.source else {"complete": row.complete}),
            **({"seeds": list(row.seeds)} if row.seeds else {}),
            **({"shots": row.shots} if row.shots else {}),
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
    """Draws the medians as bars, one panel per dataset; omits rows without any median."""
    rows = [row for row in table.rows if any(s.median is not None for s in _all_scores(row))]
    panels = []
    for key in table.keys:
        chances = [chance for chance in _values(table, key, "chance") if chance is not None]
        chance = sum(chances) / len(chances) if chances else None
        panels.append(bar_chart.Panel(key, [_bar(row, key) for row in rows], chance))
    # Runs are often named after their method, which is not repeated then.
    labels = [
        row.name
        if row.method in row.name or row.method in (MISSING, "none")
        else f"{row.name} · {row.method}"
        for row in rows
    ]
    title = f"{_accuracy_title(table)}: median over prompts"
    return bar_chart.draw(panels, labels, png, title=title)


def _csv_record(row: Row, keys: Sequence[str]) -> list[tuple[str, object]]:
    """Returns (column, value) of a line of CSV."""
    record: list[tuple[str, object]] = [("run", row.name), ("method", row.method)]
    record += [("parameters", row.percent), *((key, _score(row, key).median) for key in keys)]
    for key in keys:
        score = _score(row, key)
        record += [(f"{key}_{name}", getattr(score, name)) for name in _SCORE_FIELDS[1:]]
        for measure in MEASURES:
            low, high = score.intervals.get(measure, (None, None))
            record += [(f"{key}_{measure}_low", low), (f"{key}_{measure}_high", high)]
        for measure in MEASURES:
            values = score.seeds.get(measure, ())
            record.append((f"{key}_{measure}_sd", score.deviation(measure)))
            record.append((f"{key}_{measure}_least", min(values, default=None)))
            record.append((f"{key}_{measure}_greatest", max(values, default=None)))
    record += [(name, row.run.get(name)) for name in RUN_KEYS]
    # Published rows have only the paper's columns, so "complete" would say nothing.
    record += [("complete", None if row.source else row.complete), ("source", row.source)]
    return [*record, ("seeds", " ".join(map(str, row.seeds)))]


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
        mark=_partial_mark(row, key),
    )


def _accuracy_table(table: PaperTable, measure: str) -> Table:
    has_seeds, has_shots = _has_seeds(table), _has_shots(table)
    opening = ["run", "method", "parameters", *(["seeds"] if has_seeds else [])]
    opening += ["shots"] if has_shots else []
    rows = []
    for row in table.rows:
        if all(getattr(score, measure) is None for score in _all_scores(row)):
            continue
        seed_count = "" if row.source else str(len(row.seeds) or 1)
        cells = [row.name, row.method, row.share, *([seed_count] if has_seeds else [])]
        cells += [str(row.shots)] if has_shots else []
        rows.append([*cells, *(_accuracy(row, key, measure) for key in table.keys)])
    footer = []
    if measure == "median":
        blank = [""] * (len(opening) - 1)
        footer = [
            ["chance", *blank, *_ranges(table, "chance", "{:.1f}")],
            ["prompts", *blank, *_ranges(table, "prompts", "{:,}")],
            ["examples", *blank, *_ranges(table, "examples", "{:,}")],
        ]
    title = f"{_accuracy_title(table)}: {measure} over the prompts of a dataset"
    return Table(title, [*opening, *table.keys], rows, footer=footer, num_text=2)


def _interval_table(table: PaperTable, measure: str) -> Table:
    def interval(score: Score) -> str:
        ends = score.intervals.get(measure)
        return f"{ends[0]:.1f}–{ends[1]:.1f}" if ends else MISSING

    rows = [[row.name, *(interval(_score(row, key)) for key in table.keys)] for row in _runs(table)]
    return Table(f"95 % interval of the {measure}", ["run", *table.keys], rows)


def _seed_table(table: PaperTable) -> Table:
    """Returns the table of each seed's average of the medians."""
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


def _size_table(table: PaperTable) -> Table:
    """Returns the table of parameters, in total and of a token, and of a token's FLOPs."""

    def parameters(number: int | None) -> str:
        return MISSING if number is None else f"{number:,}"

    def flops(number: int | None) -> str:
        return MISSING if number is None else format_scaled(number)

    rows = [
        [row.name, row.method]
        + [parameters(row.run.get(key)) for key in ("trainable", "total", "used")]
        + [flops(row.run.get(key)) for key in ("flops", "flops_with_places")]
        for row in _runs(table)
    ]
    columns = ["run", "method", "trainable", "total", "a token", "FLOPs", "with places"]
    return Table("Parameters and FLOPs", columns, rows, notes=[NOTE_ON_TOKENS], num_text=2)


def _notes(table: PaperTable) -> list[str]:
    runs = _runs(table)
    intervals = (
        f"Intervals: the middle 95 % of {table.draws:,} bootstrap draws of examples, the same for"
        " all prompts of a dataset; prompts are fixed."
    )
    without = [row.name for row in runs if not all(s.intervals for s in row.scores.values())]
    notes = {
        _NOTE_ON_AVERAGE: len(table.columns) > len(table.averaged),
        _NOTE_ON_ANLI: "ANLI" in table.columns,
        _NOTE_ON_PARTIAL: any(not row.complete for row in runs),
        _NOTE_ON_SEEDS: _has_seeds(table),
        _NOTE_ON_TRAINED: any(score.trained for row in runs for score in _all_scores(row)),
        intervals: any(map(_has_any_interval, runs)),
        f"No intervals, as predictions are missing: {', '.join(without)}.": table.draws and without,
        published_numbers.NOTE: len(runs) < len(table.rows),
    }
    return [note for note, applies in notes.items() if applies]


def _runs(table: PaperTable) -> list[Row]:
    """Returns the rows except published ones."""
    return [row for row in table.rows if not row.source]


def _partial_mark(row: Row, key: str) -> str:
    return "†" if key == AVERAGE and not row.complete else ""


def _score(row: Row, key: str) -> Score:
    return row.average if key == AVERAGE else row.scores.get(key, Score())


def _all_scores(row: Row) -> list[Score]:
    return [*row.scores.values(), row.average]


def _has_any_interval(row: Row) -> bool:
    return any(score.intervals for score in row.scores.values())


def _has_seeds(table: PaperTable) -> bool:
    return any(row.seeds for row in table.rows)


def _has_shots(table: PaperTable) -> bool:
    return any(row.shots for row in table.rows)


def _accuracy_title(table: PaperTable) -> str:
    return "Accuracy in %" if _has_shots(table) else "Zero-shot accuracy in %"


def _accuracy(row: Row, key: str, measure: str) -> str:
    score = _score(row, key)
    value = getattr(score, measure)
    if value is None:
        return MISSING
    deviation = score.deviation(measure)
    spread = "" if deviation is None else f" ±{deviation:.1f}"
    marks = ["*" if score.trained else "", _partial_mark(row, key)]
    return " ".join([f"{value:.1f}{spread}", *filter(None, marks)])


def _values(table: PaperTable, key: str, name: str) -> list[float | None]:
    """Returns a field of the runs' scores, without that of partial averages (other datasets)."""
    rows = [row for row in _runs(table) if row.complete or key != AVERAGE]
    return [getattr(_score(row, key), name) for row in rows]


def _ranges(table: PaperTable, name: str, number_format: str) -> list[str]:
    """Returns a field's range over the runs for each column; for the average only of chance."""
    return [
        format_range(_values(table, key, name), number_format.format)
        if key != AVERAGE or name == "chance"
        else ""
        for key in table.keys
    ]


def _rounded(value: object) -> object:
    """Rounds a number in % to four decimals, which removes floating-point noise."""
    return round(value, 4) if isinstance(value, float) else value
