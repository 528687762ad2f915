"""Files of examples, Parquet or JSON lines, whose rows are had by number, and P3's rows of them.

Parquet is read by the row group, of which the last used are kept: read it in order, or a little of
it in any order. To train on much of it, write it as tfrecords first (pemoe_jax.tools.cache_tasks).
"""

from __future__ import annotations

import array
import collections
import functools
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data.rows import TEXT_FEATURES, Encode, Row, RowReader
from pemoe_jax.tasks.p3.rows import add_ids

_KEPT_BYTES = 1 << 30  # of row groups, over all tables
Example = dict[str, Any]


class Table(Protocol):
    """Examples by number."""

    location: str

    @property
    def num_rows(self) -> int:
        """How many there are."""

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """The examples of these numbers, in this order."""


def take_by_part(
    firsts: np.ndarray, numbers: Sequence[int], take: Callable[[int, list[int]], Sequence[Example]]
) -> list[Example]:
    """Rows of a table in parts, each part asked once.

    Args:
      firsts: [parts + 1], where each part begins and the last one ends.
      numbers: of rows, in any order.
      take: (part, numbers in it) -> its rows.
    """
    which = np.searchsorted(firsts, np.asarray(numbers), side="right") - 1
    found: list[Example] = [{}] * len(which)
    order = np.argsort(which, kind="stable")
    for part, members in itertools.groupby(order, key=lambda place: int(which[place])):
        places = list(members)
        inside = [int(numbers[place] - firsts[part]) for place in places]
        for place, example in zip(places, take(part, inside), strict=True):
            found[place] = example
    return found


class JsonLinesTable:
    """A file with a JSON object a line; blank lines are left out."""

    def __init__(self, path: pathlib.Path) -> None:
        self.location = str(path)

    @functools.cached_property
    def _offsets(self) -> Sequence[int]:
        offsets, at = array.array("q"), 0
        with open(self.location, "rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(at)
                at += len(line)
        return offsets

    @property
    def num_rows(self) -> int:
        """See Table."""
        return len(self._offsets)

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """See Table."""
        found = []
        with open(self.location, "rb") as file:
            for number in numbers:
                file.seek(self._offsets[number])
                found.append(self._parsed(file.readline(), number))
        return found

    def _parsed(self, line: bytes, number: int) -> Example:
        try:
            example = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{self.location}: row {number + 1}: not JSON: {error}") from None
        if not isinstance(example, dict):
            raise InputError(f"{self.location}: row {number + 1}: expected an object")
        return example


class _RowGroups:
    """Row groups of Parquet files, the last used of them."""

    def __init__(self, most_bytes: int) -> None:
        self._kept: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._bytes, self._most, self._lock = 0, most_bytes, threading.Lock()

    def get(self, path: str, group: int, file: Any) -> Any:
        """A row group as a pyarrow table."""
        with self._lock:
            key = path, group
            if key not in self._kept:
                self._kept[key] = file.read_row_group(group)
                self._bytes += self._kept[key].nbytes
                while self._bytes > self._most and len(self._kept) > 1:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end(key)
            return self._kept[key]


_row_groups = _RowGroups(_KEPT_BYTES)


class ParquetTable:
    """Parquet files, one after the other."""

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.location = str(paths[0])
        self._paths = [str(path) for path in paths]

    @functools.cached_property
    def _groups(self) -> list[tuple[str, int, Any, int]]:
        """(path, row group, file, rows) of each."""
        from pyarrow import parquet

        groups = []
        for path in self._paths:
            try:
                file = parquet.ParquetFile(path)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(f"{path}: not a Parquet file: {reason}") from None
            for group in range(file.num_row_groups):
                groups.append((path, group, file, file.metadata.row_group(group).num_rows))
        return groups

    @functools.cached_property
    def columns(self) -> list[str]:
        """Of the first file."""
        from pyarrow import parquet

        return list(parquet.read_schema(self._paths[0]).names) if self._groups else []

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(rows for *_, rows in self._groups)])

    @property
    def num_rows(self) -> int:
        """See Table."""
        return int(self._firsts[-1])

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """See Table."""
        return take_by_part(self._firsts, numbers, self._take_of)

    def _take_of(self, group: int, inside: list[int]) -> Sequence[Example]:
        path, number, file, _ = self._groups[group]
        try:
            table = _row_groups.get(path, number, file)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged: {str(error).splitlines()[0]}") from None
        return table.take(inside).to_pylist()


def open_table(paths: Sequence[pathlib.Path]) -> Table:
    """The table of a split's files."""
    if paths[0].suffix == ".parquet":
        return ParquetTable(sorted(paths))
    return JsonLinesTable(paths[0])


def table_splits(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Split -> its files: `<split>*.parquet`, `<split>/*.parquet` or `<split>.jsonl`."""
    found: dict[str, list[pathlib.Path]] = {}
    if not folder.is_dir():
        return found
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = pathlib.Path(entry.path)
        if entry.is_dir():
            files = sorted(path.glob("*.parquet"))
            if files:
                found.setdefault(entry.name, []).extend(files)
        elif path.suffix == ".parquet":
            found.setdefault(path.stem.split("-")[0], []).append(path)
        elif path.suffix == ".jsonl":
            found.setdefault(path.stem, []).append(path)
    return {
        split: [path for path in paths if path.suffix == paths[0].suffix]
        for split, paths in found.items()
    }


class Prompted(RowReader):
    """A table of prompted examples, as the hub serves P3.

    Columns: `inputs` and `targets` (ids, or text as in JSON lines), `inputs_pretokenized`,
    `targets_pretokenized` (text), `answer_choices` where there are any; of twins `idx`,
    `is_correct`, `weight`. Ids may lack where there is text, and text where there are ids.
    """

    def __init__(self, table: Table, encode: Encode, twin: bool) -> None:
        self.location, self._table, self._encode, self._twin = table.location, table, encode, twin
        if isinstance(table, ParquetTable) and table.num_rows:
            self._check(table.columns)

    def _check(self, columns: Sequence[str]) -> None:
        for key in TEXT_FEATURES:
            if key not in columns and f"{key}_pretokenized" not in columns:
                raise self._lacks(f"no column {key!r} or '{key}_pretokenized'", columns)
        for key in ("idx", "is_correct") if self._twin else ():
            if key not in columns:
                raise self._lacks(f"no column {key!r}", columns)

    def _lacks(self, what: str, columns: Sequence[str]) -> InputError:
        return InputError(f"{self.location}: {what} (found: {', '.join(columns) or 'none'})")

    @property
    def num_rows(self) -> int:
        """See RowReader."""
        return self._table.num_rows

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """See RowReader."""
        examples = self._table.take(numbers)
        rows = [
            self._row(example, number) for example, number in zip(examples, numbers, strict=True)
        ]
        return add_ids(rows, self._encode)

    def _row(self, example: Example, number: int) -> Row:
        row: Row = {}
        for key in TEXT_FEATURES:
            ids, text = example.get(key), example.get(f"{key}_pretokenized")
            if isinstance(ids, str):
                ids, text = None, ids
            if ids is None and text is None:
                raise self._lacks(f"row {number + 1}: no {key!r}", [*example])
            if ids is not None:
                row[key] = ids
            row[f"{key}_pretokenized"] = b"" if text is None else _bytes(text)
        choices = example.get("answer_choices")
        if choices:
            row["answer_choices"] = [_bytes(choice) for choice in choices]
        if self._twin:
            if example.get("idx") is None or example.get("is_correct") is None:
                raise self._lacks(f"row {number + 1}: no 'idx' or 'is_correct'", [*example])
            row["idx"] = [int(i) for i in example["idx"]]
            row["is_correct"] = bool(example["is_correct"])
            weight = example.get("weight")
            row["weight"] = 1.0 if weight is None else float(weight)
        return row


def _bytes(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "replace")


def every(table: Table, chunk: int) -> Iterator[tuple[int, list[Example]]]:
    """The number of the first, and examples, of all of a table."""
    for start in range(0, table.num_rows, chunk):
        yield start, table.take(range(start, min(table.num_rows, start + chunk)))
