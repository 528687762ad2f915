"""Formats of the paper's zero-shot table: terminal, Markdown, CSV, JSON and a bar chart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from pemoe_jax.analysis import published_numbers, tables
from pemoe_jax.analysis.planning.flops import NOTE_ON_FLOPS, NOTE_ON_TOKENS
from pemoe_jax.analysis.tables import MISSING, Table, format_bytes, format_scaled
from pemoe_jax.analysis.zero_shot import bar_chart, result_tables
from pemoe_jax.analysis.zero_shot.paper_table import (
    AVERAGE,
    MEASURES,
    RUN_KEYS,
    Column,
    PaperTable,
    Row,
    Score,
    StepTime,
)
from pemoe_jax.analysis.zero_shot.results import NO_SHOTS, SHOTS_KEYS, JsonObject, Shots
from pemoe_jax.runtime import atomic_write
from pemoe_jax.runtime.file_io import AnyPath

_SCORE_FIELDS = ("median", "mean", "chance", "prompts", "examples", "trained", "shots_left_out")
_NOTE_ON_AVERAGE = "average: over the paper's datasets, without those in the columns after it."
_NOTE_ON_ANLI = "ANLI: over the prompts of its three rounds together, with equal weights."
_NOTE_ON_PARTIAL = (
    "† Average over the datasets that the run was evaluated on; not comparable with the others."
)
_NOTE_ON_SEEDS = (
    "±: mean and standard deviation (n - 1) over runs that differ only in the seed. Intervals of"
    " such rows are those of the mean, for other examples and the same seeds."
)
_NOTE_ON_SHOTS = (
    "k-shot: up to k solved examples in front of each input, fewer if they do not fit. Other"
    " columns are zero-shot."
)
_NOTE_ON_OTHER_AVERAGES = (
    "Averages with different shots are over different datasets; not comparable with each other."
)
_NOTE_ON_STEP_TIME = (
    "Step time: the median step of training, without compilation and waiting for data"
)
_NOTE_ON_FILES = (
    "File: size of the trained parameters in float32, as `pemoe convert adapter` writes them."
)
_NOTE_ON_MEMORY = (
    "Peak memory: in training; on a CPU, of the whole process with its libraries; otherwise, of the"
    " device that used the most."
)
_NOTE_ON_EVALUATION = "Evaluation: time to score all examples, with compilation; mean over seeds."
_NOTE_ON_MACHINES = (
    "Step times of different devices or batches are not comparable, so the table names them."
)
_NOTE_ON_TRAINED = (
    "* Not zero-shot: the run was trained on the dataset, or on one of those in the average."
)


def print_paper_table(table: PaperTable, format: str) -> None:
    """Prints the table to stdout as 'table', 'markdown', 'csv' or 'json'."""
    if format in ("table", "markdown"):
        tables.print_tables(to_tables(table), as_markdown=format == "markdown")
    else:
        print(to_csv(table) if format == "csv" else to_json(table), end="")


def write_paper_table(table: PaperTable, folder: AnyPath) -> None:
    """Writes report.md, report.csv, report.json and report.png."""
    markdown = tables.to_markdown(to_tables(table))
    draw_bars(table, folder / "report.png")
    image = "![Median over prompts by dataset](report.png)"
    atomic_write.write_text(folder / "report.md", f"{markdown}\n{image}\n")
    atomic_write.write_text(folder / "report.csv", to_csv(table))
    atomic_write.write_text(folder / "report.json", to_json(table))


def to_tables(table: PaperTable) -> list[Table]:
    """Returns the tables of medians and means, and further ones if there is something to show.

    A table of intervals follows the medians, and another one the means. Then come accuracies by
    log-likelihood per length, the averages of single seeds, the numbers of prompts and examples if
    runs differ in them, and costs. The first table also has the notes about all tables.
    """
    result = []
    for measure in MEASURES:
        result.append(_accuracy_table(table, measure))
        if any(map(_has_any_interval, table.rows)):
            result.append(_interval_table(table, measure))
    result += table.normalized
    if _has_seeds(table):
        result.append(_seed_table(table))
    counts = _count_table(table)
    count_columns = list(zip(*counts.rows, strict=True))[1:]  # the first has the runs' names
    if any(len({*cells} - {MISSING}) > 1 for cells in count_columns):
        result.append(counts)
    if any(row.run["used"] is not None or row.step_times for row in _runs(table)):
        result.append(_cost_table(table))
    result[0].notes += _notes(table)
    return result


def to_csv(table: PaperTable) -> str:
    """Returns the table as CSV, with a line per row of the table.

    The first columns are the run, its method and parameters, and the median of each dataset. Then
    each dataset has these columns:

    - `<dataset>_mean`, `_chance`, `_prompts`, `_examples`, `_trained`, and `_shots_left_out` if it
      has shots;
    - the ends of the intervals: `_median_low`, `_median_high`, `_mean_low`, `_mean_high`;
    - statistics over seeds: `_median_sd`, `_median_least`, `_median_greatest`, and the same for the
      mean.

    Columns about the run come last. With k shots, `<dataset>` is `<dataset>_<k>_shots`, or
    `<dataset>_<k>_shots_seed_<n>` if their seed n is not 0. Accuracies and parameters are in %.
    Unknown values are empty. Step times of several devices are joined by `; `.
    """
    keys = [key for shots in table.shots for key in _keys_of(table, shots)]
    records = [_csv_record(row, keys) for row in table.rows]
    lines: list[list[object]] = [[name for name, _ in records[0]]]
    for record in records:
        # int() writes True as 1; None is written as an empty cell.
        lines.append([int(v) if isinstance(v, bool) else _rounded(v) for _, v in record])
    return tables.to_csv(lines)


def to_json(table: PaperTable) -> str:
    """Returns the whole table as JSON, in %."""

    def scores_of(row: Row, shots: Shots) -> JsonObject:
        columns = [column for column in table.columns if column.shots == shots]
        return {
            "scores": {
                column.name: _score_object(row.scores[column])
                for column in columns
                if column in row.scores
            },
            AVERAGE: _score_object(row.average(shots)),
        }

    def few_shot(row: Row) -> JsonObject:
        entries = [
            {
                **dict(zip(SHOTS_KEYS, shots, strict=True)),
                "complete": shots not in row.partial,
                **({"seeds": list(row.seeds[shots])} if shots in row.seeds else {}),
                **scores_of(row, shots),
            }
            for shots in table.shots
            if shots != NO_SHOTS and Column(AVERAGE, shots) in row.scores
        ]
        return {"few_shot": entries} if entries else {}

    rows = [
        {
            "run": row.name,
            "method": row.method,
            "parameters": row.percent,
            **row.run,
            **({"step_times": [*map(_step_time_object, row.step_times)]} if row.step_times else {}),
            **({"source": row.source} if row.source else {"complete": NO_SHOTS not in row.partial}),
            **({"seeds": list(row.seeds[NO_SHOTS])} if NO_SHOTS in row.seeds else {}),
            **scores_of(row, NO_SHOTS),
            **few_shot(row),
        }
        for row in table.rows
    ]

    def names(columns: Sequence[Column], shots: Shots = NO_SHOTS) -> list[str]:
        return [column.name for column in columns if column.shots == shots]

    few_shot_columns = [
        {
            **dict(zip(SHOTS_KEYS, shots, strict=True)),
            "columns": names(table.columns, shots),
            "averaged": names(table.averaged, shots),
        }
        for shots in table.shots
        if shots != NO_SHOTS
    ]
    contents = {
        "unit": "per cent",
        "columns": names(table.columns),
        "averaged": names(table.averaged),
        **({"few_shot": few_shot_columns} if few_shot_columns else {}),
        "bootstrap": {"draws": table.draws, "seed": table.seed},
        "rows": rows,
        "notes": _notes(table),
    }
    return json.dumps(contents, indent=1, ensure_ascii=False) + "\n"


def _score_object(score: Score) -> JsonObject:
    """Returns the known fields of a score, its intervals, and its values by seed."""
    result: JsonObject = {name: _rounded(getattr(score, name)) for name in _SCORE_FIELDS}
    result = {name: value for name, value in result.items() if value is not None}
    for measure, ends in score.intervals.items():
        result[f"{measure}_interval"] = [_rounded(end) for end in ends]
    for measure, values in score.seeds.items():
        result[f"{measure}_seeds"] = [_rounded(value) for value in values]
        result[f"{measure}_sd"] = _rounded(score.deviation(measure))
    return result


def _step_time_object(time: StepTime) -> JsonObject:
    """Returns a step time with its deviation and values by seed, if there are several seeds."""
    about = {"device": time.device, "batch": time.batch, "seconds": _seconds(time.mean)}
    if time.memory is not None:
        about["memory"] = time.memory
    if time.deviation is None:
        return about
    return about | {"sd": _seconds(time.deviation), "seeds": [*map(_seconds, time.seconds)]}


def draw_bars(table: PaperTable, png: str | AnyPath) -> AnyPath:
    """Draws the medians as bars, one panel per dataset or average; omits rows without medians."""
    rows = [row for row in table.rows if any(s.median is not None for s in _all_scores(row))]
    panels = []
    for key in table.keys:
        chances = [chance for chance in _values(table, key, "chance") if chance is not None]
        chance = sum(chances) / len(chances) if chances else None
        panels.append(bar_chart.Panel(key.label, [_bar(row, key) for row in rows], chance))
    # A method is left out if the name of the run contains it already, as names often do.
    labels = [
        row.name
        if row.method in row.name or row.method in (MISSING, "none")
        else f"{row.name} · {row.method}"
        for row in rows
    ]
    title = f"{_accuracy_name(table)} in %: median over prompts"
    return bar_chart.draw(panels, labels, png, title=title)


def _csv_record(row: Row, keys: Sequence[Column]) -> list[tuple[str, object]]:
    """Returns the (column, value) pairs of a line of CSV."""

    def name(key: Column) -> str:
        number, seed = key.shots
        words = [key.name, f"{number}_shots" if number else "", f"seed_{seed}" if seed else ""]
        return "_".join(filter(None, words))

    record: list[tuple[str, object]] = [("run", row.name), ("method", row.method)]
    record += [("parameters", row.percent)]
    record += [(name(key), _score(row, key).median) for key in keys]
    for key in keys:
        score = _score(row, key)
        # The median is above, and only columns with shots have shots left out.
        fields = _SCORE_FIELDS[1:] if key.shots != NO_SHOTS else _SCORE_FIELDS[1:-1]
        record += [(f"{name(key)}_{field}", getattr(score, field)) for field in fields]
        for measure in MEASURES:
            low, high = score.intervals.get(measure, (None, None))
            record += [(f"{name(key)}_{measure}_low", low), (f"{name(key)}_{measure}_high", high)]
        for measure in MEASURES:
            values = score.seeds.get(measure, ())
            record.append((f"{name(key)}_{measure}_sd", score.deviation(measure)))
            record.append((f"{name(key)}_{measure}_least", min(values, default=None)))
            record.append((f"{name(key)}_{measure}_greatest", max(values, default=None)))
    record += [(field, row.run.get(field)) for field in RUN_KEYS]
    times = row.step_times
    record += [
        ("step_seconds", _joined(_seconds(time.mean) for time in times)),
        ("step_seconds_sd", _joined(_seconds(time.deviation) for time in times)),
        ("device", _joined(time.device for time in times)),
        ("batch", _joined(time.batch for time in times)),
        ("peak_memory", _joined(time.memory for time in times)),
        ("evaluation_seconds", row.run.get("evaluation_seconds")),
    ]
    # Published rows never have more than the paper's columns, so "complete" does not apply to them.
    record += [("complete", None if row.source else not row.partial), ("source", row.source)]
    return [*record, ("seeds", _seeds_text(row, " "))]


def _joined(values: Iterable[object]) -> str:
    """Joins the values of several devices in one cell of CSV."""
    return "; ".join("" if value is None else str(value) for value in values)


def _seconds(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _seeds_text(row: Row, separator: str) -> str:
    """Returns the seeds of a row; '/' separates those of different shots, unless they are equal."""
    texts = (separator.join(map(str, seeds)) for seeds in row.seeds.values())
    return " / ".join(dict.fromkeys(texts))


def _bar(row: Row, key: Column) -> bar_chart.Bar | None:
    """Returns the bar of a median; None if it is unknown."""
    score = _score(row, key)
    if score.median is None:
        return None
    return bar_chart.Bar(
        score.median,
        score.intervals.get("median"),
        seeds=score.seeds.get("median", ()),
        is_trained=bool(score.trained),
        is_published=bool(row.source),
        mark=_partial_mark(row, key),
    )


def _accuracy_table(table: PaperTable, measure: str) -> Table:
    """Returns the table of medians or of means; only the table of medians has a footer."""
    has_seeds = _has_seeds(table)
    opening = ["run", "method", "parameters", *(["seeds"] if has_seeds else [])]
    rows = []
    for row in table.rows:
        if all(getattr(score, measure) is None for score in _all_scores(row)):
            continue
        seed_count = "" if row.source else _seed_count(row)
        cells = [row.name, row.method, row.share, *([seed_count] if has_seeds else [])]
        rows.append([*cells, *(_accuracy(row, key, measure) for key in table.keys)])
    columns = [*opening, *(key.label for key in table.keys)]
    footer = []
    if measure == "median":
        blank = [""] * (len(opening) - 1)
        footer = [
            ["chance", *blank, *_ranges(table, "chance", "{:.1f}")],
            ["prompts", *blank, *_ranges(table, "prompts", "{:,}")],
            ["examples", *blank, *_ranges(table, "examples", "{:,}")],
        ]
        if _has_shots(table):
            left_out = _ranges(table, "shots_left_out", "{:,}")
            footer.append([tables.SHOTS_LEFT_OUT, *blank, *left_out])
    title = f"{_accuracy_name(table)} in %: {measure} over the prompts of a dataset"
    return Table(title, columns, rows, footer=footer, num_text=2)


def _accuracy_name(table: PaperTable) -> str:
    return "Accuracy" if _has_shots(table) else "Zero-shot accuracy"


def _averages_differ(table: PaperTable) -> bool:
    """Returns whether averages with different shots are over different datasets."""
    names = {
        frozenset(column.name for column in table.averaged if column.shots == shots)
        for shots in table.shots
    }
    return len(names) > 1


def _has_shots(table: PaperTable) -> bool:
    return any(shots != NO_SHOTS for shots in table.shots)


def _seed_count(row: Row) -> str:
    """Returns the number of seeds, or '3 / 2' if different shots have different numbers."""
    all_shots = {key.shots for key in row.scores}
    counts = [str(len(row.seeds.get(shots, ())) or 1) for shots in sorted(all_shots)]
    return " / ".join(counts if len(set(counts)) > 1 else counts[:1])


def _interval_table(table: PaperTable, measure: str) -> Table:
    def interval(score: Score) -> str:
        ends = score.intervals.get(measure)
        return f"{ends[0]:.1f}–{ends[1]:.1f}" if ends else MISSING

    rows = [[row.name, *(interval(_score(row, key)) for key in table.keys)] for row in _runs(table)]
    columns = ["run", *(key.label for key in table.keys)]
    return Table(f"95 % interval of the {measure}", columns, rows)


def _seed_table(table: PaperTable) -> Table:
    """Returns a table of the averages of the medians, with a column for each seed."""
    seeds = sorted(
        {(shots, seed) for row in table.rows for shots, s in row.seeds.items() for seed in s}
    )

    def cells(row: Row) -> list[str]:
        averages = {
            (shots, seed): f"{average:.1f}"
            for shots, row_seeds in row.seeds.items()
            for seed, average in zip(
                row_seeds, row.average(shots).seeds.get("median", ()), strict=False
            )
        }
        return [averages.get(key, MISSING) for key in seeds]

    return Table(
        "Average of the medians, seed by seed",
        ["run", *(Column(f"seed {seed}", shots).label for shots, seed in seeds)],
        [[row.name, *cells(row)] for row in table.rows if row.seeds],
    )


def _count_table(table: PaperTable) -> Table:
    """Returns a table of the numbers of prompts and examples."""

    def cell(score: Score) -> str:
        return f"{score.prompts} / {score.examples:,}" if score.prompts else MISSING

    rows = [
        [row.name, *(cell(_score(row, column)) for column in table.columns)] for row in _runs(table)
    ]
    columns = ["run", *(column.label for column in table.columns)]
    return Table("Prompts / examples of each run", columns, rows)


def _cost_table(table: PaperTable) -> Table:
    """Returns a table of costs (parameters, FLOPs, times, memory) next to the average accuracy."""
    rows = _runs(table)

    def numbers(key: str, format_number: Callable[[int], str]) -> list[str]:
        values = [row.run.get(key) for row in rows]
        return [MISSING if value is None else format_number(value) for value in values]

    columns = {
        "method": [row.method for row in rows],
        **({"seeds": [*map(_seed_count, rows)]} if _has_seeds(table) else {}),
        "trainable": numbers("trainable", "{:,}".format),
        "file": numbers("trainable", lambda number: format_bytes(4 * number)),
        "total": numbers("total", "{:,}".format),
    }
    # A token of a dense model uses all parameters, so it needs no column for them.
    has_sparse = any(row.run["used"] not in (None, row.run["total"]) for row in rows)
    if has_sparse:
        columns["activated"] = numbers("used", "{:,}".format)
    columns["FLOPs"] = numbers("flops", format_scaled)
    if has_sparse:
        columns["with places"] = numbers("flops_with_places", format_scaled)
    notes = [_NOTE_ON_FILES, NOTE_ON_TOKENS if has_sparse else NOTE_ON_FLOPS]
    if times := [time for row in rows for time in row.step_times]:
        columns["step time"] = [_join_cells(map(_step_time, row.step_times)) for row in rows]
        # A device or batch that all rows share is in the note, others are columns.
        shared = []
        for name in ("device", "batch"):
            values = list(dict.fromkeys(getattr(time, name) for time in times))
            if len(values) > 1:
                columns[name] = [
                    _join_cells(getattr(time, name) for time in row.step_times) for row in rows
                ]
            else:
                shared.append(f"{name} {values[0]}")
        notes += [_NOTE_ON_STEP_TIME + "".join(f"; {text}" for text in shared) + "."]
        notes += [_NOTE_ON_MACHINES] if len(shared) < 2 else []
    if any(time.memory is not None for row in rows for time in row.step_times):
        columns["peak memory"] = [
            _join_cells(
                MISSING if time.memory is None else format_bytes(time.memory)
                for time in row.step_times
            )
            for row in rows
        ]
        notes.append(_NOTE_ON_MEMORY)
    if any("evaluation_seconds" in row.run for row in rows):
        columns["evaluation"] = numbers("evaluation_seconds", "{:.1f} s".format)
        notes.append(_NOTE_ON_EVALUATION)
    for shots in table.shots:
        key = Column(AVERAGE, shots)
        columns[key.label] = [_accuracy(row, key, "median") for row in rows]
    cells = zip(*columns.values(), strict=True)
    return Table(
        "Costs, and the average of the medians",
        ["run", *columns],
        [[row.name, *row_cells] for row, row_cells in zip(rows, cells, strict=True)],
        notes=notes,
        num_text=2,
    )


def _step_time(time: StepTime) -> str:
    """Returns a step time with a unit, and its deviation over seeds."""

    def text(seconds: float) -> str:
        return format_scaled(1e6 * seconds, ("µs", "ms", "s"))

    return text(time.mean) + ("" if time.deviation is None else f" ±{text(time.deviation)}")


def _join_cells(texts: Iterable[str]) -> str:
    return " / ".join(texts) or MISSING


def _notes(table: PaperTable) -> list[str]:
    runs = _runs(table)
    intervals = (
        f"Intervals: the middle 95 % of {table.draws:,} bootstrap draws of examples, the same for"
        " all prompts of a dataset; prompts are fixed."
    )
    without_intervals = [
        row.name for row in runs if not all(score.intervals for score in _all_scores(row))
    ]
    no_intervals = f"No intervals, as predictions are missing: {', '.join(without_intervals)}."
    notes = {
        _NOTE_ON_SHOTS: _has_shots(table),
        _NOTE_ON_OTHER_AVERAGES: _averages_differ(table),
        _NOTE_ON_AVERAGE: len(table.columns) > len(table.averaged),
        _NOTE_ON_ANLI: any(column.name == "ANLI" for column in table.columns),
        _NOTE_ON_PARTIAL: any(row.partial for row in runs),
        _NOTE_ON_SEEDS: _has_seeds(table),
        _NOTE_ON_TRAINED: any(score.trained for row in runs for score in _all_scores(row)),
        intervals: any(map(_has_any_interval, runs)),
        no_intervals: table.draws and without_intervals,
        published_numbers.NOTE: len(runs) < len(table.rows),
    }
    return [note for note, applies in notes.items() if applies]


def _runs(table: PaperTable) -> list[Row]:
    """Returns the rows of runs, without those of published models."""
    return [row for row in table.rows if not row.source]


def _keys_of(table: PaperTable, shots: Shots) -> list[Column]:
    """Returns the columns with these shots, followed by the column of their average."""
    return [*(c for c in table.columns if c.shots == shots), Column(AVERAGE, shots)]


def _partial_mark(row: Row, key: Column) -> str:
    return "†" if key.name == AVERAGE and key.shots in row.partial else ""


def _score(row: Row, key: Column) -> Score:
    return row.scores.get(key, Score())


def _all_scores(row: Row) -> list[Score]:
    return [*row.scores.values()]


def _has_any_interval(row: Row) -> bool:
    return any(score.intervals for score in row.scores.values())


def _has_seeds(table: PaperTable) -> bool:
    return any(row.seeds for row in table.rows)


def _accuracy(row: Row, key: Column, measure: str) -> str:
    """Returns a cell: an accuracy, its deviation over seeds, and the marks '*' and '†'."""
    score = _score(row, key)
    value = getattr(score, measure)
    if value is None:
        return MISSING
    deviation = score.deviation(measure)
    spread = "" if deviation is None else f" ±{deviation:.1f}"
    marks = ["*" if score.trained else "", _partial_mark(row, key)]
    return " ".join([f"{value:.1f}{spread}", *filter(None, marks)])


def _values(table: PaperTable, key: Column, name: str) -> list[float | None]:
    """Returns a field of the runs' scores in a column, except of averages over fewer datasets."""
    rows = [row for row in _runs(table) if not _partial_mark(row, key)]
    return [getattr(_score(row, key), name) for row in rows]


def _ranges(table: PaperTable, name: str, number_format: str) -> list[str]:
    """Returns a field's range over the runs for each column; '' for averages, except of chance."""
    return [
        result_tables.format_range(_values(table, key, name), number_format.format)
        if key.name != AVERAGE or name == "chance"
        else ""
        for key in table.keys
    ]


def _rounded(value: object) -> object:
    """Rounds floats, which are in %, to four decimals; this removes floating-point noise."""
    return round(value, 4) if isinstance(value, float) else value
