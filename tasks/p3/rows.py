"""Rows of P3 completed: token ids for text that has none, and a row for each answer choice."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from pemoe_jax.data.rows import EOS, TEXT_FEATURES, Encode, Row, RowReader
from pemoe_jax.data.warnings import warn_once


def add_ids(rows: Sequence[Row], encode: Encode) -> list[Row]:
    """The rows, with ids where there was text only: inputs and targets end in EOS."""
    for key in TEXT_FEATURES:
        lacking = [row for row in rows if key not in row]
        texts = [row[f"{key}_pretokenized"].decode("utf-8", "replace") for row in lacking]
        for row, ids in zip(lacking, encode(texts), strict=True):
            row[key] = [*ids, EOS]
    return list(rows)


def choice_rows(row: Row, example: int, encode: Encode) -> list[Row]:
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


class ChoiceReader(RowReader):
    """A twin made of the rows of its task; rows without choices are left out, and counted."""

    def __init__(self, plain: RowReader, encode: Encode) -> None:
        self.location, self._plain, self._encode = plain.location, plain, encode

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Twin's rows up to and with each row of the task: int64 [rows of the task]."""
        counts = [
            len(row.get("answer_choices", [])) for rows in self._plain.row_blocks() for row in rows
        ]
        without = counts.count(0)
        if without:
            warn_once(
                f"{self.location}: {without:,} of {len(counts):,} rows have no answer choices"
            )
        return np.cumsum(np.array(counts, np.int64))

    @property
    def num_rows(self) -> int:
        """See Reader."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """See Reader."""
        owners = np.searchsorted(self._ends, np.asarray(numbers), side="right")
        distinct = sorted({int(owner) for owner in owners})
        plain = dict(zip(distinct, self._plain.read_rows(distinct), strict=True))
        made = {number: choice_rows(row, number, self._encode) for number, row in plain.items()}
        first = np.concatenate([[0], self._ends])
        return [
            made[int(owner)][int(number - first[owner])]
            for number, owner in zip(numbers, owners, strict=True)
        ]

    def row_blocks(self) -> Iterator[list[Row]]:
        """See Reader; in one pass."""
        number = 0
        for rows in self._plain.row_blocks():
            made = []
            for row in rows:
                made += choice_rows(row, number, self._encode)
                number += 1
            yield made
