"""Rows of P3: what a row holds, and readers that give any of them by number.

Every source of P3 becomes a `Reader` of one split of one task, whose rows are those of the
published seqio cache: ids and text of inputs and targets, answer choices where there are any, and
of `_score_eval` tasks a row a choice with `idx`, `is_correct` and `weight`.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError

# inputs, targets: list of ids; inputs_pretokenized, targets_pretokenized: bytes; answer_choices:
# list of bytes or absent; of a twin also idx: [example, choice], is_correct: bool, weight: float.
Row = dict[str, Any]
Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> ids without EOS

EOS = 1
READ_SIZE = 512  # rows read at a time
TEXT_FEATURES = ("inputs", "targets")


def serialize(row: Row) -> bytes:
    """A row as a tf.train.Example, as a seqio cache holds it."""
    import tensorflow as tf

    feature: dict[str, Any] = {}
    for key, value in row.items():
        if key in ("inputs", "targets", "idx"):
            feature[key] = tf.train.Feature(int64_list=tf.train.Int64List(value=value))
        elif key == "is_correct":
            feature[key] = tf.train.Feature(int64_list=tf.train.Int64List(value=[int(value)]))
        elif key == "weight":
            feature[key] = tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        else:
            texts = value if isinstance(value, list) else [value]
            feature[key] = tf.train.Feature(bytes_list=tf.train.BytesList(value=texts))
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return bytes(example.SerializeToString())


def parse(record: bytes) -> Row:
    """The row of a tf.train.Example; features that are not P3's are left out.

    Raises:
      ValueError: it is no tf.train.Example.
    """
    import tensorflow as tf

    try:
        feature = tf.train.Example.FromString(record).features.feature
    except Exception as error:  # protobuf's own kind
        raise ValueError("not a tf.train.Example") from error
    row: Row = {}
    for key in (*TEXT_FEATURES, "idx"):
        if key in feature:
            row[key] = list(feature[key].int64_list.value)
    for key in TEXT_FEATURES:
        for name in (f"{key}_pretokenized", f"{key}_plaintext"):  # the latter of old caches
            if name in feature:
                row[f"{key}_pretokenized"] = b"".join(feature[name].bytes_list.value)
                break
    if "answer_choices" in feature:
        row["answer_choices"] = list(feature["answer_choices"].bytes_list.value)
    if "is_correct" in feature:
        row["is_correct"] = bool(sum(feature["is_correct"].int64_list.value))
    if "weight" in feature:
        row["weight"] = float(sum(feature["weight"].float_list.value))
    return row


class RowReader(abc.ABC):
    """Rows of a split of a task."""

    location: str  # the file or folder, for messages

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order."""

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """The same as tf.train.Examples."""
        return [serialize(row) for row in self.read_rows(numbers)]

    def row_blocks(self) -> Iterator[list[Row]]:
        """Every row once, in lists."""
        for start in range(0, self.num_rows, READ_SIZE):
            yield self.read_rows(range(start, min(self.num_rows, start + READ_SIZE)))

    @functools.cached_property
    def idx(self) -> np.ndarray:
        """[example, choice] of every row of a twin: int64 [rows, 2]; reads through it.

        Raises:
          InputError: a row has none, or two rows have the same.
        """
        found = [row.get("idx") for rows in self.row_blocks() for row in rows]
        if not all(found) or any(len(pair) != 2 for pair in found if pair):
            raise InputError(
                f"{self.location}: a row without 'idx', expected [example, choice] in all"
            )
        idx = np.array(found, np.int64).reshape(-1, 2)
        if len(np.unique(idx, axis=0)) < len(idx):
            raise InputError(
                f"{self.location}: two rows with the same 'idx', expected one a choice"
            )
        return idx

    def order_by_example(self, most: int | None = None) -> np.ndarray:
        """Row numbers of a twin, example after example and choice after choice: int64.

        A cache may have been shuffled when it was written.
        """
        order = np.lexsort((self.idx[:, 1], self.idx[:, 0]))
        if most is not None:
            examples = np.unique(self.idx[:, 0])[:most]
            order = order[np.isin(self.idx[order, 0], examples)]
        return order
