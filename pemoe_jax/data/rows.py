"""Rows of P3: what a row holds, and readers that give any of them by number.

Every source of P3 becomes a `Reader` of one split of one task, whose rows are those of the
published seqio cache: ids and text of inputs and targets, answer choices where there are any, and
of `_score_eval` tasks a row a choice with `idx`, `is_correct` and `weight`.
"""

from __future__ import annotations

import abc
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError

# inputs, targets: list of ids; inputs_pretokenized, targets_pretokenized: bytes; answer_choices:
# list of bytes or absent; of a twin also idx: [example, choice], is_correct: bool, weight: float.
Row = dict[str, Any]
Encode = Callable[[Sequence[str]], list[list[int]]]  # texts -> ids without EOS

EOS = 1
CHUNK = 512  # rows read at a time
TEXTS = ("inputs", "targets")


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
    for key in (*TEXTS, "idx"):
        if key in feature:
            row[key] = list(feature[key].int64_list.value)
    for key in TEXTS:
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


def with_ids(rows: Sequence[Row], encode: Encode) -> list[Row]:
    """The rows, with ids where there was text only: inputs and targets end in EOS."""
    for key in TEXTS:
        lacking = [row for row in rows if key not in row]
        texts = [row[f"{key}_pretokenized"].decode("utf-8", "replace") for row in lacking]
        for row, ids in zip(lacking, encode(texts), strict=True):
            row[key] = [*ids, EOS]
    return list(rows)


class Reader(abc.ABC):
    """Rows of a split of a task."""

    where: str  # the file or folder, for messages

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def rows_at(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of these numbers, in this order."""

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """The same as tf.train.Examples."""
        return [serialize(row) for row in self.rows_at(numbers)]

    def all_rows(self) -> Iterator[list[Row]]:
        """Every row once, in lists."""
        for start in range(0, self.rows, CHUNK):
            yield self.rows_at(range(start, min(self.rows, start + CHUNK)))

    @functools.cached_property
    def idx(self) -> np.ndarray:
        """[example, choice] of every row of a twin: int64 [rows, 2]; reads through it.

        Raises:
          InputError: a row has none, or two rows have the same.
        """
        found = [row.get("idx") for rows in self.all_rows() for row in rows]
        if not all(found) or any(len(pair) != 2 for pair in found if pair):
            raise InputError(
                f"{self.where}: a row without 'idx', expected [example, choice] in all"
            )
        idx = np.array(found, np.int64).reshape(-1, 2)
        if len(np.unique(idx, axis=0)) < len(idx):
            raise InputError(f"{self.where}: two rows with the same 'idx', expected one a choice")
        return idx

    def by_example(self, most: int | None = None) -> np.ndarray:
        """Row numbers of a twin, example after example and choice after choice: int64.

        A cache may have been shuffled when it was written.
        """
        order = np.lexsort((self.idx[:, 1], self.idx[:, 0]))
        if most is not None:
            examples = np.unique(self.idx[:, 0])[:most]
            order = order[np.isin(self.idx[order, 0], examples)]
        return order


def of_choices(row: Row, example: int, encode: Encode) -> list[Row]:
    """A twin's rows of a row with answer choices: one a choice, correct where it is the target."""
    target = row["targets_pretokenized"].strip()
    choices = row.get("answer_choices", [])
    ids = encode([choice.decode("utf-8", "replace") for choice in choices])
    return [
        {
            "inputs": row["inputs"],
            "inputs_pretokenized": row["inputs_pretokenized"],
            "targets": [*ids[number], EOS],
            "targets_pretokenized": choice,
            "answer_choices": choices,
            "idx": [example, number],
            "is_correct": choice.strip() == target,
            "weight": 1.0,
        }
        for number, choice in enumerate(choices)
    ]


class Choices(Reader):
    """A twin made of the rows of its task; rows without choices are left out, and counted."""

    def __init__(self, plain: Reader, encode: Encode) -> None:
        self.where, self._plain, self._encode = plain.where, plain, encode

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Twin's rows up to and with each row of the task: int64 [rows of the task]."""
        counts = [
            len(row.get("answer_choices", [])) for rows in self._plain.all_rows() for row in rows
        ]
        without = counts.count(0)
        if without:
            told(f"{self.where}: {without:,} of {len(counts):,} rows have no answer choices")
        return np.cumsum(np.array(counts, np.int64))

    @property
    def rows(self) -> int:
        """See Reader."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows_at(self, numbers: Sequence[int]) -> list[Row]:
        """See Reader."""
        owners = np.searchsorted(self._ends, np.asarray(numbers), side="right")
        distinct = sorted({int(owner) for owner in owners})
        plain = dict(zip(distinct, self._plain.rows_at(distinct), strict=True))
        made = {number: of_choices(row, number, self._encode) for number, row in plain.items()}
        first = np.concatenate([[0], self._ends])
        return [
            made[int(owner)][int(number - first[owner])]
            for number, owner in zip(numbers, owners, strict=True)
        ]

    def all_rows(self) -> Iterator[list[Row]]:
        """See Reader; in one pass."""
        number = 0
        for rows in self._plain.all_rows():
            made = []
            for row in rows:
                made += of_choices(row, number, self._encode)
                number += 1
            yield made


_said: set[str] = set()


def told(line: str) -> None:
    """Says once what was odd in the data, on stderr."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)
