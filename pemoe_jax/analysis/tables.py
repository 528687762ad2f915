"""Tables of text: printed on a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table as RichTable

MISSING = "–"
# Heading of the number of shots (solved examples in front of an input) that did not fit.
SHOTS_LEFT_OUT = "shots left out"


@dataclass
class Table:
    """A table of text.

    Attributes:
      title: the heading.
      columns: the columns' headings.
      rows: the cells.
      footer: rows below a rule.
      notes: sentences about the table; a note that several tables have is printed once.
      num_text: number of leading columns that are aligned to the left; the others hold numbers.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    footer: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_text: int = 1


def to_csv(lines: Iterable[Iterable[object]]) -> str:
    """Returns lines of cells as CSV.

    An apostrophe is put in front of text that a spreadsheet would run as a formula: names of runs
    and tasks may come from files of other people.
    """
    text = io.StringIO()
    # csv ends lines with \r\n by default, which shell tools take for a part of the last field.
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(map(_escape_formula, line) for line in lines)
    return text.getvalue()


def _escape_formula(cell: object) -> object:
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)  # a formatted number, such as "-1.50", is no formula
    except ValueError:
        return f"'{cell}"
    return cell


def to_markdown(tables: Sequence[Table]) -> str:
    """Returns the tables as Markdown, followed by their notes, each note once."""
    parts = [f"## {table.title}\n\n{markdown_table(table)}" for table in tables]
    return "\n\n".join([*parts, *_distinct_notes(tables)]) + "\n"


def markdown_table(table: Table) -> str:
    """Returns a table as Markdown without its title and notes, with aligned columns."""
    rows = [table.columns, *table.rows, *table.footer]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    is_text = [i < table.num_text for i in range(len(table.columns))]
    # Some Markdown dialects need at least three characters in the line below the header.
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    # The colon marks the side that a column is aligned to.
    rule = [
        ":".ljust(width, "-") if left else ":".rjust(width, "-")
        for width, left in zip(widths, is_text, strict=True)
    ]
    return "\n".join(
        "| "
        + " | ".join(
            f"{cell:<{width}}" if left else f"{cell:>{width}}"
            for cell, width, left in zip(line, widths, is_text, strict=True)
        )
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def print_tables(tables: Sequence[Table], as_markdown: bool = False) -> None:
    """Prints tables and their notes; splits a table that is wider than the terminal by columns."""
    if as_markdown:
        print(to_markdown(tables), end="")
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables:
        # With markup, rich would interpret "[seed/0]" in a name as a style.
        console.print(table.title, style="bold", markup=False)
        for columns in _split_columns(table, console.width):
            console.print(_rich_table(table, columns))
            console.print()
    for note in _distinct_notes(tables):
        console.print(note, style="dim", markup=False)


def format_share(part: int, whole: int) -> str:
    """Returns `part / whole` in %, with more decimals for small shares: 0.019 %, 0.32 %, 12.3 %."""
    if part == 0 or whole == 0:
        return "0 %"
    if part == whole:
        return "100 %"  # other shares have decimals, also those that round to 100.0 %
    percent = 100 * part / whole
    digits = 4 if percent < 0.01 else 3 if percent < 0.1 else 2 if percent < 10 else 1
    return f"{percent:.{digits}f} %"


def format_scaled(number: float, units: Sequence[str] = ("", "k", "M", "G", "T", "P", "E")) -> str:
    """Returns a number with three digits and a decimal unit: 1,234,567 -> '1.23 M'."""
    unit = 0
    # The limits are those that round up: 999.5 to 1.00 k, 99.5 to 100, 9.95 to 10.0.
    while number >= 999.5 and unit < len(units) - 1:
        number, unit = number / 1000, unit + 1
    digits = 0 if number >= 99.5 or unit == 0 else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f} {units[unit]}".rstrip()


def format_bytes(number: float) -> str:
    """Returns a number of bytes with three digits and a decimal unit: 1,234,567 -> '1.23 MB'."""
    return format_scaled(number, ("B", "kB", "MB", "GB", "TB"))


def _distinct_notes(tables: Iterable[Table]) -> list[str]:
    return list(dict.fromkeys(note for table in tables for note in table.notes))


def _split_columns(table: Table, width: int) -> list[list[int]]:
    """Splits columns into the fewest groups that fit `width`; each group has the first column."""
    lines = [table.columns, *table.rows, *table.footer]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    others = range(1, len(widths))
    groups = [[0]]  # of a table with one column
    # If even single columns do not fit, the loop ends with one per group, and rich folds the cells.
    for group_count in range(1, len(widths)):
        size = -(-len(others) // group_count)  # rounded up
        groups = [[0, *others[i : i + size]] for i in range(0, len(others), size)]
        # rich puts two spaces between columns.
        if all(sum(widths[i] + 2 for i in group) - 2 <= width for group in groups):
            break
    return groups


def _rich_table(table: Table, columns: Sequence[int]) -> RichTable:
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    rich_table = RichTable(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    # "fold" wraps a long cell; by default rich truncates it with an ellipsis.
    for i in columns:
        justify: JustifyMethod = "left" if i < table.num_text else "right"
        rich_table.add_column(escape(table.columns[i]), justify=justify, overflow="fold")
    for number, row in enumerate([*table.rows, *table.footer], 1):
        rule_follows = bool(table.footer) and number == len(table.rows)
        rich_table.add_row(*(escape(row[i]) for i in columns), end_section=rule_follows)
    return rich_table
