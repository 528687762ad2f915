"""Several tables after one another: as Markdown, or in the terminal, where wide ones are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pemoe_jax.analysis import tables


def to_markdown(found: Sequence[tables.Table]) -> str:
    """The tables as Markdown, what is said of them once at the end."""
    parts = [f"## {table.title}\n\n{tables.markdown_table(table)}" for table in found]
    return "\n\n".join([*parts, *_notes(found)]) + "\n"


def print_tables(found: Sequence[tables.Table], console: Any = None) -> None:
    """Prints to a rich console, or to stdout; a table that is too wide is cut into several."""
    from rich.console import Console

    console = console or Console(highlight=False)
    for table in found:
        console.print(table.title, style="bold", markup=False)
        for columns in _cut(table, console.width):
            console.print(_drawn(table, columns))
            console.print()
    for note in _notes(found):
        console.print(note, style="dim", markup=False)


def _notes(found: Iterable[tables.Table]) -> list[str]:
    return list(dict.fromkeys(note for table in found for note in table.notes))


def _cut(table: tables.Table, width: int) -> list[list[int]]:
    """Columns by index for each of the tables that fit `width`; all have the first column."""
    lines = [table.columns, *table.rows, *table.below]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rest = range(1, len(widths))
    for number in range(1, len(widths)):
        each = -(-len(rest) // number)
        parts = [[0, *rest[i : i + each]] for i in range(0, len(rest), each)]
        if all(sum(widths[i] + 2 for i in part) - 2 <= width for part in parts):
            break
    return parts


def _drawn(table: tables.Table, columns: Sequence[int]) -> Any:
    """A rich table of some of the columns, two spaces apart."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i in columns:
        justify: Any = "left" if i == 0 or table.columns[i] == "method" else "right"
        shown.add_column(escape(table.columns[i]), justify=justify, overflow="fold")
    for number, row in enumerate([*table.rows, *table.below], 1):
        last = bool(table.below) and number == len(table.rows)
        shown.add_row(*(escape(row[i]) for i in columns), end_section=last)
    return shown
