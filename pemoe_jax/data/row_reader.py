"""The row format of P3's seqio caches, and readers with random access to rows of this format.

Only the format is P3's: no source of data is imported here. A row holds token ids and text of its
inputs and targets, and the answer choices if it has any. In a `_score_eval` task there is one row
for each answer choice of an example, with `idx`, `is_correct` and `weight`.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data.row_checks import TEXT_FEATURES

T = TypeVar("T")

# inputs, targets: list of token ids; inputs_pretokenized, targets_pretokenized: bytes, missing in
# rows without text; answer_choices (optional): list of bytes. Rows of _score_eval tasks also have
# idx: [example, choice], is_correct: bool, weight: float.
Row = dict[str, Any]

EOS = 1  # the id of </s> in T5's vocabularies
READ_SIZE = 512  # rows read at a time when all rows are read in order

# Feature -> the kind of list that holds it in a tf.train.Example.
_KINDS = {
    "inputs": "int64_list",
    "targets": "int64_list",
    "inputs_pretokenized": "bytes_list",
    "targets_pretokenized": "bytes_list",
    "inputs_plaintext": "bytes_list",  # old caches have _plaintext instead of _pretokenized
    "targets_plaintext": "bytes_list",
    "answer_choices": "bytes_list",
    "idx": "int64_list",
    "is_correct": "int64_list",
    "weight": "float_list",
}


class Tokenizer(Hashable, Protocol):
    """What readers of rows need of a vocabulary.

    Hashable, because readers may be cached by it. (`tasks.tokenizer` has another protocol of this
    name, for the Python API.)
    """

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts, without EOS."""
        ...

    def vocab_size(self) -> int:
        """Returns the number of token ids."""
        ...


def serialize(row: Row) -> bytes:
    """Returns a row as a serialized tf.train.Example, as in a seqio cache."""
    import tensorflow as tf

    train = tf.train
    features = {}
    for key, value in row.items():
        if key in ("inputs", "targets", "idx"):
            features[key] = train.Feature(int64_list=train.Int64List(value=value))
        elif key == "is_correct":
            features[key] = train.Feature(int64_list=train.Int64List(value=[int(value)]))
        elif key == "weight":
            features[key] = train.Feature(float_list=train.FloatList(value=[value]))
        else:
            texts = value if isinstance(value, list) else [value]
            features[key] = train.Feature(bytes_list=train.BytesList(value=texts))
    return bytes(train.Example(features=train.Features(feature=features)).SerializeToString())


def parse(record: bytes) -> Row:
    """Parses a serialized tf.train.Example; features that are not in `Row` are ignored.

    Raises:
      ValueError: the record is not a tf.train.Example, or a feature is missing or has a wrong type.
    """
    import tensorflow as tf

    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception as error:  # protobuf's DecodeError, whose module depends on its version
        raise ValueError("not a tf.train.Example") from error
    for key, kind in _KINDS.items():
        # protobuf returns an empty list for another kind than the one that is set.
        if key in features and features[key].WhichOneof("kind") not in (kind, None):
            raise ValueError(f"{key!r} must be {kind}, got {features[key].WhichOneof('kind')}")
    row: Row = {}
    for key in TEXT_FEATURES:
        if key not in features:
            raise ValueError(f"no feature {key!r}")
    for key in (*TEXT_FEATURES, "idx"):
        if key in features:
            row[key] = list(features[key].int64_list.value)
    for key in TEXT_FEATURES:
        for name in (f"{key}_pretokenized", f"{key}_plaintext"):
            if name in features:
                row[f"{key}_pretokenized"] = b"".join(features[name].bytes_list.value)
                break
    if "answer_choices" in features:
        row["answer_choices"] = list(features["answer_choices"].bytes_list.value)
    if "is_correct" in features:
        values = list(features["is_correct"].int64_list.value)
        if values not in ([0], [1]):
            raise ValueError(f"'is_correct' must be [0] or [1], got {values}")
        row["is_correct"] = bool(values[0])
    if "weight" in features:
        # The list has one number; the sum reads an empty list as 0.
        row["weight"] = float(sum(features["weight"].float_list.value))
    return row


def read_parts(
    first_rows: np.ndarray,
    numbers: Sequence[int] | np.ndarray,
    read: Callable[[int, list[int]], Sequence[T]],
) -> list[T]:
    """Reads rows that are spread over parts, such as files; calls `read` once for each part.

    Args:
      first_rows: number of each part's first row: int64 [parts].
      numbers: numbers of the rows to read, in any order.
      read: (part, row numbers within it) -> rows.
    """
    rows = np.asarray(numbers)
    part_of_row = np.searchsorted(first_rows, rows, side="right") - 1
    results: dict[int, T] = {}
    for part in np.unique(part_of_row).tolist():
        positions = np.flatnonzero(part_of_row == part)
        numbers_in_part = (rows[positions] - first_rows[part]).tolist()
        results |= zip(positions.tolist(), read(part, numbers_in_part), strict=True)
    return [results[position] for position in range(len(rows))]


class RowReader(abc.ABC):
    """Random access to the rows of a split of a task.

    Attributes:
      location: file or folder of the rows, for messages.
    """

    location: str

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """Number of rows."""

    @abc.abstractmethod
    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """Returns the rows with these numbers, in the order of `numbers`."""

    def read_records(self, numbers: Sequence[int]) -> list[bytes]:
        """Returns rows as `read_rows` does, but as serialized tf.train.Examples."""
        return [serialize(row) for row in self.read_rows(numbers)]

    def row_blocks(self) -> Iterator[list[Row]]:
        """Yields all rows in order, several at a time."""
        for start in range(0, self.num_rows, READ_SIZE):
            yield self.read_rows(range(start, min(self.num_rows, start + READ_SIZE)))

    @functools.cached_property
    def idx(self) -> np.ndarray:
        """[example, choice] of every row of a `_score_eval` task: int64 [rows, 2].

        The first access reads all rows.

        Raises:
          InputError: a row has no valid `idx`, or two rows have the same.
        """
        pairs = [row.get("idx") for rows in self.row_blocks() for row in rows]
        for number, pair in enumerate(pairs, 1):
            if pair is None or len(pair) != 2:
                raise InputError(
                    f"{self.location}: expected 'idx' [example, choice] in every row, got"
                    f" {'none' if pair is None else pair} in row {number}"
                )
        idx = np.array(pairs, np.int64).reshape(-1, 2)
        if len(np.unique(idx, axis=0)) < len(idx):
            raise InputError(
                f"{self.location}: expected unique 'idx', got two rows with the same 'idx'"
            )
        return idx

    def order_by_example(self, max_examples: int | None = None) -> np.ndarray:
        """Returns row numbers sorted by example and choice: int64 [rows].

        Args:
          max_examples: number of examples to return rows of, the first by number; None: all.
        """
        # Sorted, because a cache may have been shuffled when it was written.
        order = np.lexsort((self.idx[:, 1], self.idx[:, 0]))
        if max_examples is not None:
            examples = np.unique(self.idx[:, 0])[:max_examples]
            order = order[np.isin(self.idx[order, 0], examples)]
        return order
