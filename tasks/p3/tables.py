"""Tables of a split's examples in Parquet or JSON lines, read by number.

Parquet is read by row group, and the last used groups stay in memory. So reading in order is fast,
and so is reading a small file in any order. Before training on larger files, write tfrecords with
`pemoe cache_tasks`.
"""

from __future__ import annotations

import abc
import array
import collections
import contextlib
import functools
import itertools
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pemoe_jax.core.errors import InputError, first_line, plural
from pemoe_jax.data.row_checks import parse_object
from pemoe_jax.data.row_reader import read_parts

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

# The name of one of several files of a split, as Hugging Face writes them, sometimes with a hash.
_SHARD = re.compile(r".*-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

_CACHE_BYTES = 1 << 30  # of row groups in memory, over all tables
# A row group may take this many bytes in memory, or this many times the size of its file. Without a
# limit, a file of a megabyte could fill the memory, since repeated values take no space in it.
_MAX_GROUP_BYTES, _MAX_EXPANSION = 1 << 30, 100
_WIDTHS = {"BOOLEAN": 1, "INT64": 8, "DOUBLE": 8, "INT96": 12}  # bytes; other types have 4 or more
Example = dict[str, Any]  # a dataset's fields, of any JSON type
Splits = dict[str, list[pathlib.Path]]  # split -> its files


class Table(abc.ABC):
    """Examples of a split, read by number.

    A table has parts, each of which is read separately: files, row groups or record batches.
    """

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self._paths = paths
        self.location = str(paths[0])  # for messages

    @abc.abstractmethod
    def part_sizes(self) -> list[int]:
        """Returns the number of examples of each part."""

    @abc.abstractmethod
    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        """Reads examples of a part, by their numbers within it."""

    @abc.abstractmethod
    def field_names(self) -> set[str]:
        """Returns the fields of the examples, without reading all of them."""

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        """Number of each part's first example, and the number of all: int64 [parts + 1]."""
        return np.cumsum([0, *self.part_sizes()])

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return int(self._first_rows[-1])

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """Reads examples, in the order of `numbers`."""
        return read_parts(self._first_rows, numbers, self.read_part)

    def chunks(self, size: int) -> Iterator[tuple[int, list[Example]]]:
        """Yields all examples in lists of `size`, each with the number of its first example."""
        for start in range(0, self.num_rows, size):
            yield start, self.take(range(start, min(self.num_rows, start + size)))


class JsonLinesTable(Table):
    """A file with a JSON object per line; blank lines are skipped."""

    @functools.cached_property
    def _offsets(self) -> Sequence[int]:
        offsets, end = array.array("q"), 0
        with open(self.location, "rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(end)
                end += len(line)
        return offsets

    def field_names(self) -> set[str]:
        # Rows may leave out fields that are null, so one row is not enough.
        with open(self.location, "rb") as file:
            lines = itertools.islice(filter(bytes.strip, file), 100)
            rows = [
                parse_object(line, f"{self.location}: row {number}")
                for number, line in enumerate(lines, 1)
            ]
        return set().union(*rows)

    def part_sizes(self) -> list[int]:
        return [len(self._offsets)]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        examples = []
        with open(self.location, "rb") as file:
            for number in numbers:
                file.seek(self._offsets[number])
                where = f"{self.location}: row {number + 1}"
                examples.append(parse_object(file.readline(), where))
        return examples


class _RowGroupCache:
    """Keeps the last used row groups of Parquet files in memory.

    Reading a row decodes its whole row group, so rows in random order are slow without a cache.

    Args:
      max_bytes: size of all groups together; a single larger group is kept too.
    """

    def __init__(self, max_bytes: int) -> None:
        self._groups: collections.OrderedDict[tuple[str, int], pyarrow.Table]
        self._groups = collections.OrderedDict()
        # TensorFlow reads several pipelines at a time, each in its own thread.
        self._bytes, self._max_bytes, self._lock = 0, max_bytes, threading.Lock()

    def get(self, path: str, group: int, file: pyarrow.parquet.ParquetFile) -> pyarrow.Table:
        """Returns a row group."""
        with self._lock:
            key = path, group
            if key not in self._groups:
                self._groups[key] = _read_row_group(path, group, file)
                self._bytes += self._groups[key].nbytes
                while self._bytes > self._max_bytes and len(self._groups) > 1:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups.move_to_end(key)
            return self._groups[key]


def _read_row_group(path: str, group: int, file: pyarrow.parquet.ParquetFile) -> pyarrow.Table:
    """Reads a row group, after checking the size that it will have in memory.

    Raises:
      InputError: the group is too large.
    """
    from pyarrow import parquet

    metadata = file.metadata.row_group(group)
    columns = [metadata.column(number) for number in range(metadata.num_columns)]
    limit = max(_MAX_GROUP_BYTES, _MAX_EXPANSION * os.path.getsize(path))
    # The size without the characters of texts, since no metadata has their lengths. It counts
    # values and not rows, because a list may have any number of values.
    size = sum(column.num_values * _WIDTHS.get(column.physical_type, 4) for column in columns)
    texts = [column for column in columns if column.physical_type == "BYTE_ARRAY"]
    # A column stores each different text at least once, so no text is longer than the column.
    max_text_size = sum(column.num_values * column.total_uncompressed_size for column in texts)
    if size <= limit < size + max_text_size:
        # Read in dictionary form, in which repeated texts take no memory, to sum up their lengths.
        names = [column.path_in_schema for column in texts]
        with parquet.ParquetFile(path, read_dictionary=names, metadata=file.metadata) as encoded:
            for column in encoded.read_row_group(group, columns=names).columns:
                size += sum(map(_count_text_bytes, column.chunks))
    if size > limit:
        raise InputError(
            f"{path}: row group {group + 1} must take at most {limit / 1e9:.1f} GB in memory, got"
            f" {size / 1e9:.1f} GB: its values repeat; write the file with smaller row groups"
        )
    return file.read_row_group(group)


def _count_text_bytes(values: pyarrow.Array) -> int:
    """Returns the bytes that an array's texts take when each is written out."""
    from pyarrow import compute, types

    if types.is_dictionary(values.type):
        lengths = compute.binary_length(values.dictionary)
        return int(compute.sum(compute.take(lengths, values.indices)).as_py() or 0)
    if types.is_nested(values.type):
        parts = values.flatten()  # a list of arrays for a struct, one array for a list
        return sum(map(_count_text_bytes, parts if isinstance(parts, list) else [parts]))
    return int(values.nbytes)


_row_groups = _RowGroupCache(_CACHE_BYTES)


class _RowGroup(NamedTuple):
    path: str
    number: int  # within the file
    file: pyarrow.parquet.ParquetFile
    num_rows: int


class ParquetTable(Table):
    """Parquet files, one after the other."""

    @functools.cached_property
    def _groups(self) -> list[_RowGroup]:
        from pyarrow import parquet

        groups = []
        for path in map(str, self._paths):
            with arrow_errors(f"{path}: not a Parquet file"):
                file = parquet.ParquetFile(path, page_checksum_verification=True)
                check_unique(file.schema_arrow.names, path)
                for number in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(number).num_rows
                    groups.append(_RowGroup(path, number, file, num_rows))
        return groups

    @functools.cached_property
    def columns(self) -> list[str]:
        """Columns of the first file."""
        from pyarrow import parquet

        return list(parquet.read_schema(self._paths[0]).names) if self._groups else []

    def field_names(self) -> set[str]:
        return {*self.columns}

    def part_sizes(self) -> list[int]:
        return [group.num_rows for group in self._groups]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        group = self._groups[part]
        with arrow_errors(f"{group.path}: damaged"):
            table = _row_groups.get(group.path, group.number, group.file)
            return take_examples(table, numbers, group.path)


@contextlib.contextmanager
def arrow_errors(message: str) -> Iterator[None]:
    """Converts pyarrow's errors to an `InputError` that begins with `message`."""
    import pyarrow

    try:
        yield
    except InputError:  # it is a ValueError, too
        raise
    # Files that cannot be read raise an OSError, texts that are not UTF-8 a ValueError.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{message}: {first_line(error)}") from None


def take_examples(table: pyarrow.Table, numbers: list[int], location: str) -> list[Example]:
    """Returns examples of a table in memory as Python values.

    Raises:
      InputError: a column's type has no Python value; `location` begins the message.
    """
    import pyarrow

    try:
        taken = table.take(numbers)
    except NotImplementedError:  # `take` lacks string_view and other types
        taken = pyarrow.concat_tables([table.slice(number, 1) for number in numbers])
    columns: list[list[Any]] = []
    for name, column in zip(taken.column_names, taken.columns, strict=True):
        try:
            columns.append(_in_microseconds(column).to_pylist())
        except (OSError, ValueError, OverflowError, NotImplementedError) as error:
            raise InputError(
                f"{location}: the column {name!r} of {column.type} must have values that Python"
                f" can hold, got {first_line(error)}"
            ) from None
    return [dict(zip(taken.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _in_microseconds(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    """Returns a column of times in microseconds, the resolution of Python's own types.

    If pandas is installed, pyarrow would convert nanoseconds to objects of pandas. Columns of other
    types are returned as they are.

    Raises:
      ValueError: a time is not a whole number of microseconds.
    """
    import pyarrow

    kind = column.type
    if pyarrow.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pyarrow.timestamp("us", kind.tz))
    if pyarrow.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pyarrow.duration("us"))
    if pyarrow.types.is_time64(kind) and kind.unit == "ns":
        return column.cast(pyarrow.time64("us"))
    return column


def check_unique(columns: Sequence[str], location: str) -> None:
    """Raises InputError if two columns have the same name: the last one would win silently."""
    repeated = [name for name, count in collections.Counter(columns).items() if count > 1]
    if repeated:
        raise InputError(f"{location}: expected unique columns, got several {repeated[0]!r}")


def open_table(paths: Sequence[pathlib.Path]) -> Table:
    """Returns the table of a split's files.

    Raises:
      InputError: files of the split are missing, or there are too many.
    """
    if paths[0].suffix == ".parquet":
        _check_shards(paths)
        return ParquetTable(sorted(paths))
    return JsonLinesTable(paths)


def _check_shards(paths: Sequence[pathlib.Path]) -> None:
    """Raises InputError unless there are as many files as their names say."""
    shards = list(filter(None, (_SHARD.fullmatch(path.name) for path in paths)))
    if not shards:
        return
    counts = {shard["count"] for shard in shards}
    count = int(shards[0]["count"])
    if len(counts) > 1 or len(shards) != len(paths) or len(paths) != count:
        names = ", ".join(path.name for path in paths[:3]) + (", …" if len(paths) > 3 else "")
        raise InputError(
            f"{paths[0].parent}: expected {plural(count, 'Parquet file')}, as the name of"
            f" {shards[0][0]} says, got {names}"
        )


def find_splits(folder: pathlib.Path) -> Splits:
    """Lists `<split>*.parquet`, `<split>/*.parquet` and `<split>.jsonl` by split.

    Raises:
      InputError: a split has only compressed files.
    """
    splits: Splits = {}
    compressed: Splits = {}
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
        elif path.suffix in _COMPRESSED and path.stem.endswith((".jsonl", ".parquet")):
            compressed.setdefault(re.split(r"[-.]", path.name)[0], []).append(path)
    for split in compressed.keys() - splits:
        raise InputError(f"{compressed[split][0]}: expected a file that is not compressed")
    # If a split has files in both formats, only those of its first file's format are used.
    return {
        split: [path for path in paths if path.suffix == paths[0].suffix]
        for split, paths in splits.items()
    }
