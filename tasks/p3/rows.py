"""Completes P3's rows: token ids for text that has none, and a row for each answer choice."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from pemoe_jax.data.rows import EOS, TEXT_FEATURES, Encode, Row, RowReader
from pemoe_jax.data.warnings import warn_once


def add_ids(rows: list[Row], encode: Encode) -> list[Row]:
    """Tokenizes inputs and targets of rows that have only their text; ids end in EOS."""
    for key in TEXT_FEATURES:
        without_ids = [row for row in rows if key not in row]
        texts = [row[f"{key}_pretokenized"].decode("utf-8", "replace") for row in without_ids]
        for row, ids in zip(without_ids, encode(texts), strict=True):
            row[key] = [*ids, EOS]
    return rows


def choice_rows(row: Row, example: int, encode: Encode) -> list[Row]:
    """Returns the `_score_eval` rows of a row: one for each answer choice.

    A choice is correct if its text is the target's.
    """
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
    """The rows of a `_score_eval` task, derived from its task's answer choices.

    Rows without choices are left out, with a warning.
    """

    def __init__(self, plain: RowReader, encode: Encode) -> None:
        self.location, self._plain, self._encode = plain.location, plain, encode

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Index of the first choice of each row of the task, and the number of choices."""
        counts = [
            len(row.get("answer_choices", [])) for rows in self._plain.row_blocks() for row in rows
        ]
        without = counts.count(0)
        if without:
            warn_once(
                f"{self.location}: {without:,} of {len(counts):,} rows have no answer choices"
            )
        return np.cumsum([0, *counts])

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        owners = np.searchsorted(self._starts, np.asarray(numbers), side="right") - 1
        # a row is read and tokenized once for all of its choices
        distinct = np.unique(owners).tolist()
        plain = zip(distinct, self._plain.read_rows(distinct), strict=True)
        rows = {owner: choice_rows(row, owner, self._encode) for owner, row in plain}
        choices = np.asarray(numbers) - self._starts[owners]
        return [rows[o][c] for o, c in zip(owners.tolist(), choices.tolist(), strict=True)]

    def row_blocks(self) -> Iterator[list[Row]]:
        # in one pass, without the one that `_starts` takes
        example = 0
        for rows in self._plain.row_blocks():
            block = []
            for row in rows:
                block += choice_rows(row, example, self._encode)
                example += 1
            yield block
