"""Random access to the rows of a seqio cache's tfrecord files.

For each split, a cache contains `<split>.tfrecord-00000-of-00001`, `info.<split>.json` (number of
shards, features) and `stats.<split>.json` (number of rows). `COMPLETED` is written last.

A tfrecord file has no index. To read a row, the file is scanned frame by frame up to the row. The
offset of every frame is kept in memory (8 bytes each).
"""

from __future__ import annotations

import array
import functools
import os
import pathlib
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import google_crc32c
import numpy as np

from pemoe_jax.core.errors import InputError, first_line, plural
from pemoe_jax.data import seqio_import
from pemoe_jax.data.row_checks import TEXT_FEATURES, check_token_ids
from pemoe_jax.data.row_reader import READ_SIZE, Row, RowReader, parse, read_parts
from pemoe_jax.runtime import file_io

_BLOCK = 1 << 22  # bytes scanned at a time

# A frame: length of the data (8 bytes), checksum of the length (4), data, checksum of the data (4).
_HEADER = 12  # bytes before the data
_FRAME = 16  # bytes around the data
_LENGTH = struct.Struct("<Q")
_LFS_POINTER = b"version https://git-lfs"


def masked_checksum(data: bytes) -> int:
    """Returns the CRC-32C of the data as tfrecords store it: rotated, plus a constant."""
    # The format masks checksums because the CRC of data that contains CRCs is weak.
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class TFRecordFile:
    """A tfrecord file; may be used by several threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts = array.array("q")  # offset of each frame that is known so far
        self._scanned = 0  # offset up to which the file has been scanned
        self._lock = threading.Lock()

    @functools.cached_property
    def size(self) -> int:
        """The number of bytes."""
        return os.path.getsize(self.path)

    def check_first_record(self) -> None:
        """Raises InputError unless the file is empty or begins with a record."""
        with self._lock, open(self.path, "rb") as file:
            if self.size and not self._starts:
                # A header, and enough to recognize a Git LFS pointer.
                self._scan_block(file.read(_HEADER + len(_LFS_POINTER)))

    def count(self) -> int:
        """Returns the number of rows; the first call scans the whole file."""
        with self._lock:
            self._scan()
            return len(self._starts)

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns the records of the rows with these numbers, in the order of `numbers`.

        Raises:
          InputError: the file has too few rows, or a checksum is wrong.
        """
        with self._lock:
            self._scan(num_rows=int(max(numbers)) + 1)
        records = []
        with open(self.path, "rb") as file:
            for number in numbers:
                if number >= len(self._starts):
                    raise InputError(
                        f"{self.path}: damaged: expected at least {plural(number + 1, 'row')}, got"
                        f" {len(self._starts):,}"
                    )
                file.seek(self._starts[number])
                length = _LENGTH.unpack(file.read(_HEADER)[: _LENGTH.size])[0]
                record = file.read(length)
                if file.read(4) != masked_checksum(record).to_bytes(4, "little"):
                    raise InputError(
                        f"{self.path}: damaged at byte {self._starts[number]:,}: the checksum of"
                        f" row {number + 1:,} is wrong"
                    )
                records.append(record)
        return records

    def check_at(self, offset: int) -> None:
        """Raises InputError if the row whose frame or data begins at a byte offset is damaged.

        TensorFlow names the offset of the frame or, if the checksum of the data is wrong, of the
        data.
        """
        with self._lock:
            self._scan(end=offset + 1)
        number = int(np.searchsorted(self._starts, offset, side="right")) - 1
        if number >= 0 and offset - self._starts[number] in (0, _HEADER):
            self.read([number])

    def _scan(self, num_rows: int | None = None, end: int | None = None) -> None:
        """Continues the scan until `num_rows` frames are known or offset `end` is reached.

        Without these arguments, scans to the end of the file.
        """
        end = self.size if end is None else min(self.size, end)
        with open(self.path, "rb") as file:
            while self._scanned < end and (num_rows is None or len(self._starts) < num_rows):
                file.seek(self._scanned)
                self._scan_block(file.read(_BLOCK))

    def _scan_block(self, block: bytes) -> None:
        """Adds the frames whose headers are in a block that begins where the scan stopped."""
        begin, size = self._scanned, self.size
        at, last_header = 0, len(block) - _HEADER  # offsets in the block
        if last_header < 0:
            raise self._damaged(begin, block)
        # Bound methods as locals: this loop runs once for each row of the cache.
        append, unpack = self._starts.append, _LENGTH.unpack_from
        while at <= last_header:
            after = at + _FRAME + unpack(block, at)[0]
            if begin + after > size:
                raise self._damaged(begin + at, block[at:])
            append(begin + at)
            at = after
        self._scanned = begin + at

    def _damaged(self, offset: int, content: bytes) -> InputError:
        if content.startswith(_LFS_POINTER):
            return InputError(f"{self.path}: a Git LFS pointer, not the file: run `git lfs pull`")
        return InputError(f"{self.path}: damaged at byte {offset:,}: no complete record")


class TFRecordReader(RowReader):
    """A split of a task's offline cache in `folder`.

    `read_rows` and `row_blocks` check that token ids are below `vocab_size()`. `read_records` does
    not, because pipelines check the ids of a whole block at once.
    """

    def __init__(self, folder: pathlib.Path, split: str, vocab_size: Callable[[], int]) -> None:
        self.location = str(folder / f"{split}.tfrecord")
        self._folder, self._split, self._vocab_size = folder, split, vocab_size

    @functools.cached_property
    def files(self) -> list[TFRecordFile]:
        """The shards, in order.

        Raises:
          InputError: a shard is missing, or does not begin with a record.
        """
        info_path = self._folder / f"info.{self._split}.json"
        num_shards = file_io.read_json(info_path).get("num_shards")
        if not isinstance(num_shards, int) or num_shards < 1:
            raise InputError(
                f"{info_path}: 'num_shards' must be a positive integer, got {num_shards!r}"
            )
        files = []
        for number in range(num_shards):
            path = self._folder / f"{self._split}.tfrecord-{number:05d}-of-{num_shards:05d}"
            if not path.is_file():
                raise InputError(
                    f"{path}: no such file, but {info_path.name} says 'num_shards': {num_shards}"
                )
            files.append(TFRecordFile(str(path)))
            files[-1].check_first_record()
        return files

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows, from stats.<split>.json or, without that file, from a scan."""
        files = self.files
        stats = self._folder / f"stats.{self._split}.json"
        if not stats.exists():
            return sum(file.count() for file in files)
        examples = file_io.read_json(stats).get("examples")
        most = sum(file.size for file in files) // _FRAME  # if all rows were empty
        if not isinstance(examples, int) or not 0 <= examples <= most:
            raise InputError(
                f"{stats}: 'examples' must be a number of rows up to {most:,}, the most that files"
                f" of this size can hold, got {examples!r:.80}"
            )
        return examples

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        """Number of the first row of each shard: int64 [shards]."""
        # The last shard is left out, because counting its rows would scan the whole file.
        return np.cumsum([0, *(file.count() for file in self.files[:-1])])

    def read_records(self, numbers: Sequence[int]) -> list[bytes]:
        """See RowReader."""
        return read_parts(
            self._first_rows, numbers, lambda shard, rows: self.files[shard].read(rows)
        )

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """See RowReader."""
        return self._parse(self.read_records(numbers), numbers)

    def row_blocks(self) -> Iterator[list[Row]]:
        """See RowReader; verifies every checksum.

        Raises:
          InputError: a file is damaged, or stats.<split>.json states another number of rows.
        """
        import tensorflow as tf

        num_read = 0
        for file in self.files:
            records = tf.data.TFRecordDataset(file.path).batch(READ_SIZE)
            records = seqio_import.disable_autotune(records)
            try:
                for batch in records.as_numpy_iterator():
                    yield self._parse(batch, range(num_read, num_read + len(batch)))
                    num_read += len(batch)
            except tf.errors.DataLossError as error:
                # Scanning the file gives a better message for truncated files and LFS pointers.
                file.count()
                reason = first_line(error.message).split(" [Op:")[0]
                raise InputError(f"{file.path}: damaged: {reason}") from None
        if num_read != self.num_rows:
            raise InputError(
                f"{self.location}: damaged: expected {self.num_rows:,} rows, as"
                f" stats.{self._split}.json states, got {num_read:,}"
            )

    def _parse(self, records: Sequence[bytes], numbers: Sequence[int]) -> list[Row]:
        rows = []
        for number, record in zip(numbers, records, strict=True):
            where = f"{self.location}: row {number + 1}"
            try:
                rows.append(parse(record))
            except ValueError as error:
                raise InputError(f"{where}: damaged: {error}") from None
            for key in TEXT_FEATURES:
                check_token_ids(rows[-1][key], where, key, self._vocab_size())
        return rows
