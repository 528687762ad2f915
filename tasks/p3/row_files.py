"""Parquet and JSON lines whose rows are read by index, and P3's rows in them.

Parquet is read by row group, and the last used groups stay in memory: reading in order, or a small
file in any order, is fast. Write tfrecords (pemoe cache_tasks) before training on more.
"""

from __future__ import annotations

import abc
import array
import collections
import functools
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.data.rows import TEXT_FEATURES, Encode, Row, RowReader, read_parts
from pemoe_jax.tasks.p3.rows import add_ids

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_CACHE_BYTES = 1 << 30  # of row groups in memory, over all tables
Example = dict[str, Any]  # a dataset's fields, of any JSON type
Splits = dict[str, list[pathlib.Path]]  # split -> its files


class Table(abc.ABC):
    """Examples of a split in one or several parts, read by number.

    Attributes:
      location: a file, for messages.
    """

    location: str

    @abc.abstractmethod
    def part_sizes(self) -> list[int]:
        """Returns the number of examples of each part."""

    @abc.abstractmethod
    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        """Reads examples of a part."""

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *self.part_sizes()])

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return int(self._first_rows[-1])

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """Reads examples, in the order of `numbers`."""
        return read_parts(self._first_rows, numbers, self.read_part)


class JsonLinesTable(Table):
    """A file with a JSON object per line; blank lines are skipped."""

    def __init__(self, path: pathlib.Path) -> None:
        self.location = str(path)

    @functools.cached_property
    def _offsets(self) -> Sequence[int]:
        offsets, end = array.array("q"), 0
        with open(self.location, "rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(end)
                end += len(line)
        return offsets

    def part_sizes(self) -> list[int]:
        return [len(self._offsets)]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        examples = []
        with open(self.location, "rb") as file:
            for number in numbers:
                file.seek(self._offsets[number])
                examples.append(self._parse(file.readline(), number))
        return examples

    def _parse(self, line: bytes, number: int) -> Example:
        try:
            example = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{self.location}: row {number + 1}: not JSON: {error}") from None
        if not isinstance(example, dict):
            raise InputError(f"{self.location}: row {number + 1}: expected an object")
        return example


# Reading a row decodes its whole row group, so that rows in random order need groups in memory.
class _RowGroupCache:
    """The last used row groups of Parquet files."""

    def __init__(self, max_bytes: int) -> None:
        self._groups: collections.OrderedDict[tuple[str, int], pyarrow.Table]
        self._groups = collections.OrderedDict()
        # TensorFlow reads several pipelines at a time, each in a thread of its own.
        self._bytes, self._max_bytes, self._lock = 0, max_bytes, threading.Lock()

    def get(self, path: str, group: int, file: pyarrow.parquet.ParquetFile) -> pyarrow.Table:
        """Returns a row group."""
        with self._lock:
            key = path, group
            if key not in self._groups:
                self._groups[key] = file.read_row_group(group)
                self._bytes += self._groups[key].nbytes
                while self._bytes > self._max_bytes and len(self._groups) > 1:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups.move_to_end(key)
            return self._groups[key]


_row_groups = _RowGroupCache(_CACHE_BYTES)


class _RowGroup(NamedTuple):
    path: str
    number: int  # within the file
    file: pyarrow.parquet.ParquetFile
    num_rows: int


class ParquetTable(Table):
    """Parquet files, one after the other."""

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.location = str(paths[0])
        self._paths = [str(path) for path in paths]

    @functools.cached_property
    def _groups(self) -> list[_RowGroup]:
        from pyarrow import parquet

        groups = []
        for path in self._paths:
            try:
                file = parquet.ParquetFile(path)
            except (OSError, ValueError) as error:  # base classes of pyarrow's errors
                raise InputError(f"{path}: not a Parquet file: {first_line(error)}") from None
            for number in range(file.num_row_groups):
                num_rows = file.metadata.row_group(number).num_rows
                groups.append(_RowGroup(path, number, file, num_rows))
        return groups

    @functools.cached_property
    def columns(self) -> list[str]:
        """Columns of the first file."""
        from pyarrow import parquet

        return list(parquet.read_schema(self._paths[0]).names) if self._groups else []

    def part_sizes(self) -> list[int]:
        return [group.num_rows for group in self._groups]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        group = self._groups[part]
        try:
            table = _row_groups.get(group.path, group.number, group.file)
        except (OSError, ValueError) as error:
            raise InputError(f"{group.path}: damaged: {first_line(error)}") from None
        return cast(list[Example], table.take(numbers).to_pylist())


def open_table(paths: Sequence[pathlib.Path]) -> Table:
    """Returns the table of a split's files."""
    if paths[0].suffix == ".parquet":
        return ParquetTable(sorted(paths))
    return JsonLinesTable(paths[0])


def find_splits(folder: pathlib.Path) -> Splits:
    """Lists `<split>*.parquet`, `<split>/*.parquet` and `<split>.jsonl` by split."""
    splits: Splits = {}
    if not folder.is_dir():
        return splits
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = pathlib.Path(entry.path)
        if entry.is_dir():
            files = sorted(path.glob("*.parquet"))
            if files:
                splits.setdefault(entry.name, []).extend(files)
        elif path.suffix == ".parquet":
            splits.setdefault(path.stem.split("-")[0], []).append(path)
        elif path.suffix == ".jsonl":
            splits.setdefault(path.stem, []).append(path)
    # Where a split has files in both formats, the first by name decides.
    return {
        split: [path for path in paths if path.suffix == paths[0].suffix]
        for split, paths in splits.items()
    }


class PromptedReader(RowReader):
    """A table of prompted examples, as the Hugging Face hub serves P3.

    Columns are `inputs` and `targets` (ids, or text as in JSON lines), `inputs_pretokenized` and
    `targets_pretokenized` (text), `answer_choices`, and for `_score_eval` tasks `idx`,
    `is_correct` and `weight`. Either ids or text may be missing.
    """

    def __init__(self, table: Table, encode: Encode, scored: bool) -> None:
        self.location, self._table = table.location, table
        self._encode, self._scored = encode, scored
        if isinstance(table, ParquetTable) and table.num_rows:
            self._check_columns(table.columns)

    def _check_columns(self, columns: Sequence[str]) -> None:
        for key in TEXT_FEATURES:
            if key not in columns and f"{key}_pretokenized" not in columns:
                raise self._error(f"a column {key!r} or '{key}_pretokenized'", columns)
        for key in ("idx", "is_correct") if self._scored else ():
            if key not in columns:
                raise self._error(f"a column {key!r}", columns)

    def _error(self, expected: str, fields: Sequence[str], row: int | None = None) -> InputError:
        where = self.location if row is None else f"{self.location}: row {row + 1}"
        return InputError(f"{where}: expected {expected}, got {', '.join(fields) or 'none'}")

    @property
    def num_rows(self) -> int:
        return self._table.num_rows

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        examples = self._table.take(numbers)
        rows = [
            self._row(example, number) for example, number in zip(examples, numbers, strict=True)
        ]
        return add_ids(rows, self._encode)

    def _row(self, example: Mapping[str, Any], number: int) -> Row:
        row: Row = {}
        for key in TEXT_FEATURES:
            ids, text = example.get(key), example.get(f"{key}_pretokenized")
            # the hub has ids in `inputs`, JSON lines have text
            if isinstance(ids, str):
                ids, text = None, ids
            if ids is None and text is None:
                raise self._error(repr(key), [*example], number)
            if ids is not None:
                row[key] = ids
            row[f"{key}_pretokenized"] = b"" if text is None else _to_bytes(text)
        choices = example.get("answer_choices")
        if choices:
            row["answer_choices"] = [_to_bytes(choice) for choice in choices]
        if self._scored:
            if example.get("idx") is None or example.get("is_correct") is None:
                raise self._error("'idx' and 'is_correct'", [*example], number)
            row["idx"] = [int(i) for i in example["idx"]]
            row["is_correct"] = bool(example["is_correct"])
            # all published weights are 1, and other writers leave them out
            weight = example.get("weight")
            row["weight"] = 1.0 if weight is None else float(weight)
        return row


def _to_bytes(text: object) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "replace")


def iterate_chunks(table: Table, size: int) -> Iterator[tuple[int, list[Example]]]:
    """Yields all examples in chunks, each with the index of its first example."""
    for start in range(0, table.num_rows, size):
        yield start, table.take(range(start, min(table.num_rows, start + size)))
