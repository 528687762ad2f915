"""Tfrecord files of a seqio cache, read by the row.

A cache holds for each split `<split>.tfrecord-00000-of-00001`, `info.<split>.json` (shards and
features), `stats.<split>.json` (how many rows) and, once all is written, `COMPLETED`. Where each
row begins is found by going from frame to frame, as far as it is needed, and is kept in memory: 8
bytes a row.
"""

from __future__ import annotations

import array
import functools
import os
import pathlib
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.data import crc32c
from pemoe_jax.data.rows import READ_SIZE, Row, RowReader, parse
from pemoe_jax.runtime import file_io

_BLOCK = 1 << 22  # bytes looked through at a time
_HEADER = 12  # length of the data, and its checksum
_FRAME = 16  # header, and the checksum of the data behind it
_LFS = b"version https://git-lfs"
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")


class TFRecordFile:
    """One tfrecord file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts = array.array("q")
        self._next = 0  # where the frame after the known ones begins
        self._lock = threading.Lock()

    @functools.cached_property
    def _size(self) -> int:
        return os.path.getsize(self.path)

    def check(self) -> None:
        """Looks at the first record; InputError where there is none in what is not empty."""
        with self._lock, open(self.path, "rb") as file:
            if self._size and not self._starts:
                self._look_at(file.read(_HEADER + len(_LFS)))

    def count(self) -> int:
        """How many rows there are; looks through the whole file, the first time."""
        with self._lock:
            self._look_through(None)
            return len(self._starts)

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """The records of these rows, whose checksums are verified.

        Raises:
          InputError: the file is damaged, or has fewer rows.
        """
        with self._lock:
            self._look_through(int(max(numbers)) + 1)
        records = []
        with open(self.path, "rb") as file:
            for number in numbers:
                if number >= len(self._starts):
                    raise InputError(
                        f"{self.path}: damaged: it has {len(self._starts):,} rows, expected more"
                        " by its stats"
                    )
                file.seek(self._starts[number])
                length = _LENGTH.unpack(file.read(_HEADER)[:8])[0]
                record = file.read(length)
                if file.read(4) != _CHECKSUM.pack(crc32c.masked(record)):
                    raise InputError(
                        f"{self.path}: damaged at byte {self._starts[number]:,}: the checksum of"
                        f" row {number + 1:,} is wrong"
                    )
                records.append(record)
        return records

    def check_at(self, offset: int) -> None:
        """Verifies the row that begins at a byte, or whose data does, if there is one.

        Raises:
          InputError: it is damaged, or what is before it.
        """
        with self._lock:
            self._look_through(None, offset)
        number = int(np.searchsorted(self._starts, offset, side="right")) - 1
        if number >= 0 and offset - self._starts[number] in (0, _HEADER):
            self.read([number])

    def _look_through(self, rows: int | None, offset: int | None = None) -> None:
        """Finds where rows begin, until so many are known, or those up to a byte (None: all)."""
        end = self._size if offset is None else min(self._size, offset + 1)
        with open(self.path, "rb") as file:
            while self._next < end and (rows is None or len(self._starts) < rows):
                file.seek(self._next)
                self._look_at(file.read(_BLOCK))

    def _look_at(self, block: bytes) -> None:
        begin, at, size, last = self._next, 0, self._size, len(block) - _HEADER
        if last < 0:
            raise self._damaged(begin, block)
        append, unpack = self._starts.append, _LENGTH.unpack_from
        while at <= last:
            after = at + _FRAME + unpack(block, at)[0]
            if begin + after > size:
                raise self._damaged(begin + at, block[at:])
            append(begin + at)
            at = after
        self._next = begin + at

    def _damaged(self, offset: int, found: bytes) -> InputError:
        if found.startswith(_LFS):
            return InputError(f"{self.path}: a Git LFS pointer, not the file: run `git lfs pull`")
        return InputError(f"{self.path}: damaged at byte {offset:,}: no whole record there")


class TFRecordReader(RowReader):
    """A split of a cached task."""

    def __init__(self, folder: pathlib.Path, split: str) -> None:
        self.location = str(folder / f"{split}.tfrecord")
        self._folder, self._split = folder, split

    @functools.cached_property
    def files(self) -> list[TFRecordFile]:
        """Its shards, in order.

        Raises:
          InputError: one is missing, or does not begin with a record.
        """
        info = file_io.read_json(self._folder / f"info.{self._split}.json")
        shards = info.get("num_shards")
        if not isinstance(shards, int) or shards < 1:
            raise InputError(
                f"{self._folder / f'info.{self._split}.json'}: 'num_shards' must be a positive"
                f" integer, found {shards!r}"
            )
        paths = [
            self._folder / f"{self._split}.tfrecord-{number:05d}-of-{shards:05d}"
            for number in range(shards)
        ]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: no such file, expected {shards} by info")
        files = [TFRecordFile(str(path)) for path in paths]
        for file in files:
            file.check()
        return files

    @functools.cached_property
    def num_rows(self) -> int:
        """See Reader; what stats.<split>.json says, or else what the files hold."""
        files = self.files
        stats = self._folder / f"stats.{self._split}.json"
        if stats.exists():
            examples = file_io.read_json(stats).get("examples")
            if isinstance(examples, int) and examples >= 0:
                return examples
            raise InputError(f"{stats}: 'examples' must be a number of rows, found {examples!r}")
        return sum(file.count() for file in files)

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        counts = [file.count() for file in self.files[:-1]]
        return np.cumsum([0, *counts])

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """See RowReader."""
        if len(self.files) == 1:
            return self.files[0].read(numbers)
        wanted = np.asarray(numbers)
        which = np.searchsorted(self._first_rows, wanted, side="right") - 1
        records = [b""] * len(which)
        for shard in np.unique(which):
            places = np.flatnonzero(which == shard)
            inside = [int(number) for number in wanted[places] - self._first_rows[shard]]
            for place, record in zip(places, self.files[shard].read(inside), strict=True):
                records[place] = record
        return records

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """See RowReader."""
        return self._parsed(self.read(numbers))

    def row_blocks(self) -> Iterator[list[Row]]:
        """See Reader; every checksum is verified.

        Raises:
          InputError: a file is damaged, or the rows are not as many as stats say.
        """
        import tensorflow as tf

        seen = 0  # rows
        for file in self.files:
            records = tf.data.TFRecordDataset(file.path).batch(READ_SIZE)
            try:
                for batch in records.as_numpy_iterator():
                    seen += len(batch)
                    yield self._parsed(batch)
            except tf.errors.DataLossError as error:
                file.count()  # may know better what it is
                raise InputError(f"{file.path}: damaged: {_reason(error)}") from None
        if seen != self.num_rows:
            raise InputError(
                f"{self.location}: damaged: {seen:,} rows, expected {self.num_rows:,} by stats"
            )

    def _parsed(self, records: Sequence[bytes]) -> list[Row]:
        try:
            return [parse(record) for record in records]
        except ValueError as error:
            raise InputError(f"{self.location}: damaged: {error}") from None


def _reason(error: Any) -> str:
    return first_line(error.message).split(" [Op:")[0]
