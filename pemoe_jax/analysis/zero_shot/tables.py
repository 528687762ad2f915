"""A zero-shot report as tables, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.analysis import paper
from pemoe_jax.analysis.tables import NONE, Table
from pemoe_jax.analysis.zero_shot import bars
from pemoe_jax.analysis.zero_shot.report import AVERAGE, MEASURES, Report, Row, Score

_CELL = ("median", "mean", "chance", "prompts", "examples", "trained")
_NOTE_ON_ANLI = "ANLI: over the prompts of its three rounds together, each counting alike."
_NOTE_ON_PARTIAL = (
    "† Average over those data sets alone on which the run was scored, so not to be compared."
)
_NOTE_ON_SEEDS = (
    "±: of runs that differ by their seed only, the mean over seeds and the standard deviation"
    " (n - 1); the intervals are those of the mean, under other examples and the same seeds."
)
_NOTE_ON_TRAINED = "* The run was trained on this data set, or on one of an average: not zero-shot."


def to_tables(report: Report) -> list[Table]:
    """Medians and means with their intervals; counts by run where runs differ in them."""
    found = []
    for measure in MEASURES:
        found.append(_accuracies(report, measure))
        if any(row.average.intervals or _has_intervals(row) for row in report.rows):
            found.append(_interval_table(report, measure))
    if _seeded(report):
        found.append(_by_seed(report))
    if _counts_differ(report):
        found.append(_counts(report))
    found[0].notes += _notes(report)
    return found


def to_csv(report: Report) -> str:
    """A line a row of the table: the medians, then by data set all that is known.

    Columns `<data set>_mean`, `_chance`, `_prompts`, `_examples`, `_trained`, and `_median_low`,
    `_median_high`, `_mean_low`, `_mean_high` of the intervals; `_median_sd`, `_median_least`,
    `_median_greatest` and the same of the mean over seeds, where a row has several. All in per
    cent, `parameters` too; what is not known is empty.
    """
    keys = [*report.columns, AVERAGE]
    known = [key for key in _CELL if key != "median"]
    ends = [f"{measure}_{end}" for measure in MEASURES for end in ("low", "high")]
    ends += [f"{measure}_{end}" for measure in MEASURES for end in ("sd", "least", "greatest")]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["run", "method", "parameters", *keys]
        + [f"{key}_{name}" for key in keys for name in [*known, *ends]]
        + ["step", "checkpoint", "trainable", "total", "complete", "source", "seeds"]
    )
    for row in report.rows:
        scores = [_of(row, key) for key in keys]
        about = [row.about.get(key) for key in ("step", "checkpoint", "trainable", "total")]
        lines.writerow(
            [row.name, row.method, _plain(row.percent)]
            + [_plain(score.median) for score in scores]
            + [
                _plain(value)
                for score in scores
                for value in [
                    *(getattr(score, name) for name in known),
                    *_ends(score),
                    *_spread(score),
                ]
            ]
            + [*map(_plain, about), "" if row.source else _plain(row.complete), row.source]
            + [" ".join(map(str, row.seeds))]
        )
    return text.getvalue()


def to_json(report: Report) -> str:
    """All of it, in per cent."""

    def score(one: Score) -> dict[str, Any]:
        cell = {name: _rounded(getattr(one, name)) for name in _CELL}
        cell = {name: value for name, value in cell.items() if value is not None}
        cell |= {
            f"{measure}_interval": [_rounded(end) for end in one.intervals[measure]]
            for measure in one.intervals
        }
        for measure in one.seeds:
            cell[f"{measure}_seeds"] = [_rounded(value) for value in one.seeds[measure]]
            cell[f"{measure}_sd"] = _rounded(one.deviation(measure))
        return cell

    rows = [
        {
            "run": row.name,
            "method": row.method,
            "parameters": row.percent,
            **row.about,
            **({"source": row.source} if row.source else {"complete": row.complete}),
            **({"seeds": list(row.seeds)} if row.seeds else {}),
            "scores": {key: score(row.scores[key]) for key in report.columns if key in row.scores},
            AVERAGE: score(row.average),
        }
        for row in report.rows
    ]
    whole = {
        "unit": "per cent",
        "columns": report.columns,
        "averaged": report.averaged,
        "bootstrap": {"draws": report.draws, "seed": report.seed},
        "rows": rows,
        "notes": _notes(report),
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def draw(report: Report, png: str | Path) -> Path:
    """The medians as bars, a panel a data set; of published rows those that have any."""
    rows = [_bar_label(row) for row in report.rows]
    panels = []
    for key in [*report.averaged, AVERAGE, *report.columns[len(report.averaged) :]]:
        drawn = [_bar(row, key) for row in report.rows]
        chances = [_of(row, key).chance for row in report.rows if row.complete or key != AVERAGE]
        known = [chance for chance in chances if chance is not None]
        panels.append(bars.Panel(key, drawn, sum(known) / len(known) if known else None))
    shown = [i for i in range(len(rows)) if any(panel.bars[i] for panel in panels)]
    panels = [bars.Panel(p.title, [p.bars[i] for i in shown], p.chance) for p in panels]
    title = "Zero-shot accuracy in %: median over prompts"
    return bars.draw(panels, [rows[i] for i in shown], png, title=title)


def _bar_label(row: Row) -> str:
    said = row.method in row.name or row.method in (NONE, "none")
    return row.name if said else f"{row.name} · {row.method}"


def _bar(row: Row, key: str) -> bars.Bar | None:
    score = _of(row, key)
    if score.median is None:
        return None
    return bars.Bar(
        score.median,
        score.intervals.get("median"),
        seeds=score.seeds.get("median", ()),
        hatched=bool(score.trained),
        pale=bool(row.source),
        mark="†" if key == AVERAGE and not row.complete else "",
    )


def _accuracies(report: Report, measure: str) -> Table:
    def cells(row: Row) -> list[str]:
        average = _marked(row.average, measure)
        average += "" if row.complete or average == NONE else " †"
        return _around(report, [_marked(_of(row, key), measure) for key in report.columns], average)

    below = []
    if measure == "median":
        below = [
            _below(report, "chance", lambda value: f"{value:.1f}"),
            _below(report, "prompts", lambda value: f"{value:,}"),
            _below(report, "examples", lambda value: f"{value:,}"),
        ]
    return Table(
        f"Zero-shot accuracy in %: {measure} over the prompts of a data set",
        [*_opening(report), *_around(report, report.columns, AVERAGE)],
        [
            [*_opening(report, row), *cells(row)]
            for row in report.rows
            if any(getattr(score, measure) is not None for score in _scores(row))
        ],
        below=below,
    )


def _opening(report: Report, row: Row | None = None) -> list[str]:
    """The first cells of a row, or their columns; of seeds only where there are several."""
    if row is None:
        cells = ["run", "method", "parameters", "seeds"]
    else:
        number = "" if row.source else str(len(row.seeds) or 1)
        cells = [row.name, row.method, row.share, number]
    return cells if _seeded(report) else cells[:-1]


def _by_seed(report: Report) -> Table:
    """What the average of the medians is, run by run."""
    numbers = sorted({number for row in report.rows for number in row.seeds})

    def cells(row: Row) -> list[str]:
        known = dict(zip(row.seeds, row.average.seeds.get("median", ()), strict=False))
        return [f"{known[number]:.1f}" if number in known else NONE for number in numbers]

    return Table(
        "Average of the medians, seed by seed",
        ["run", *(f"seed {number}" for number in numbers)],
        [[row.name, *cells(row)] for row in report.rows if row.seeds],
    )


def _seeded(report: Report) -> bool:
    return any(row.seeds for row in report.rows)


def _interval_table(report: Report, measure: str) -> Table:
    def cells(row: Row) -> list[str]:
        found = [_interval(_of(row, key), measure) for key in report.columns]
        return [row.name, *_around(report, found, _interval(row.average, measure))]

    return Table(
        f"95 % interval of the {measure}",
        ["run", *_around(report, report.columns, AVERAGE)],
        [cells(row) for row in report.rows if not row.source],
    )


def _counts(report: Report) -> Table:
    return Table(
        "Prompts / examples of each run",
        ["run", *report.columns],
        [
            [row.name]
            + [
                f"{score.prompts} / {score.examples:,}" if score.prompts else NONE
                for score in (_of(row, key) for key in report.columns)
            ]
            for row in report.rows
            if not row.source
        ],
    )


def _notes(report: Report) -> list[str]:
    ours = [row for row in report.rows if not row.source]
    others = len(report.columns) > len(report.averaged)
    notes = []
    if others:
        notes.append("average: over the paper's data sets; those behind it are not in it.")
    if "ANLI" in report.columns:
        notes.append(_NOTE_ON_ANLI)
    if any(not row.complete for row in ours):
        notes.append(_NOTE_ON_PARTIAL)
    if _seeded(report):
        notes.append(_NOTE_ON_SEEDS)
    if any(score.trained for row in ours for score in _scores(row)):
        notes.append(_NOTE_ON_TRAINED)
    if any(_has_intervals(row) for row in ours):
        notes.append(
            f"Intervals: the middle 95 % of {report.draws:,} bootstrap draws of examples, the same"
            " for all prompts of a data set; prompts stay as they are."
        )
    without = [row.name for row in ours if report.draws and not _all_intervals(row)]
    if without:
        notes.append(f"Without all intervals, as predictions are missing: {', '.join(without)}.")
    if len(ours) < len(report.rows):
        notes.append(paper.NOTE)
    return notes


def _scores(row: Row) -> list[Score]:
    return [*row.scores.values(), row.average]


def _of(row: Row, key: str) -> Score:
    return row.average if key == AVERAGE else row.scores.get(key, Score())


def _has_intervals(row: Row) -> bool:
    return any(score.intervals for score in row.scores.values())


def _all_intervals(row: Row) -> bool:
    return all(score.intervals for score in row.scores.values())


def _around(report: Report, cells: Sequence[str], average: str) -> list[str]:
    """The average stands behind the columns that it is over."""
    at = len(report.averaged)
    return [*cells[:at], average, *cells[at:]]


def _marked(score: Score, measure: str) -> str:
    value = getattr(score, measure)
    if value is None:
        return NONE
    deviation = score.deviation(measure)
    spread = "" if deviation is None else f" ±{deviation:.1f}"
    return f"{value:.1f}{spread}" + (" *" if score.trained else "")


def _interval(score: Score, measure: str) -> str:
    if measure not in score.intervals:
        return NONE
    low, high = score.intervals[measure]
    return f"{low:.1f}–{high:.1f}"


def _below(report: Report, name: str, show: Callable[[Any], str]) -> list[str]:
    """The value of each column; where runs differ, the least and the greatest."""
    ours = [row for row in report.rows if not row.source]

    def span(values: list[Any]) -> str:
        known = sorted(value for value in values if value is not None)
        return "–".join(dict.fromkeys([show(known[0]), show(known[-1])])) if known else NONE

    found = [span([getattr(_of(row, key), name) for row in ours]) for key in report.columns]
    averages = [getattr(row.average, name) for row in ours if row.complete]
    blank = [""] * (len(_opening(report)) - 1)
    return [name, *blank, *_around(report, found, span(averages) if name == "chance" else "")]


def _counts_differ(report: Report) -> bool:
    ours = [row for row in report.rows if not row.source]
    return any(
        len(
            {
                (row.scores[key].prompts, row.scores[key].examples)
                for row in ours
                if key in row.scores
            }
        )
        > 1
        for key in report.columns
    )


def _ends(score: Score) -> list[float | None]:
    return [end for measure in MEASURES for end in score.intervals.get(measure, (None, None))]


def _spread(score: Score) -> list[float | None]:
    """Of each measure over seeds: standard deviation, the least and the greatest."""
    found: list[float | None] = []
    for measure in MEASURES:
        values = score.seeds.get(measure, ())
        found += [score.deviation(measure), min(values, default=None), max(values, default=None)]
    return found


def _rounded(value: Any) -> Any:
    """Without the noise of floating point: 4 digits behind the point are enough in per cent."""
    return round(value, 4) if isinstance(value, float) else value


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(_rounded(value))
