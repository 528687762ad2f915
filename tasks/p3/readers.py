"""Readers of P3's rows: from prompted rows, from templates, and from answer choices."""

from __future__ import annotations

import array
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import row_checks
from pemoe_jax.data.row_checks import TEXT_FEATURES
from pemoe_jax.data.row_reader import EOS, READ_SIZE, Row, RowReader, Tokenizer
from pemoe_jax.data.seqio_tasks import warn_once
from pemoe_jax.tasks.p3.tables import Example, ParquetTable, Table
from pemoe_jax.tasks.p3.templates import (
    NO_LABEL,
    Prompt,
    Template,
    TemplateError,
    UnlabeledError,
)


class NoRowsError(InputError):
    """All examples of a split are left out, because their template fails or they have no label."""


def add_ids(rows: list[Row], tokenizer: Tokenizer) -> list[Row]:
    """Adds token ids, which end in EOS, to rows that have only the text of a feature."""
    for key in TEXT_FEATURES:
        without_ids = [row for row in rows if key not in row]
        texts = [row[f"{key}_pretokenized"].decode() for row in without_ids]
        for row, ids in zip(without_ids, tokenizer.encode(texts), strict=True):
            row[key] = [*ids, EOS]
    return rows


class PromptedReader(RowReader):
    """Reads a table of prompted examples, as the Hugging Face hub serves P3.

    Columns are `inputs` and `targets` (ids, or text as in JSON lines), `inputs_pretokenized` and
    `targets_pretokenized` (text), `answer_choices`, and for `_score_eval` tasks `idx`,
    `is_correct` and `weight`. Either the ids or the text may be missing.

    Args:
      table: the examples.
      tokenizer: encodes text without ids.
      scored: whether the task is a `_score_eval` task.
    """

    def __init__(self, table: Table, tokenizer: Tokenizer, scored: bool) -> None:
        self.location, self._table = table.location, table
        self._tokenizer, self._scored = tokenizer, scored
        if isinstance(table, ParquetTable) and table.num_rows:
            self._check_columns(table.columns)

    def _check_columns(self, columns: Sequence[str]) -> None:
        for key in TEXT_FEATURES:
            if key not in columns and f"{key}_pretokenized" not in columns:
                raise self._column_error(f"a column {key!r} or '{key}_pretokenized'", columns)
        for key in ("idx", "is_correct") if self._scored else ():
            if key not in columns:
                raise self._column_error(f"a column {key!r}", columns)

    def _column_error(self, expected: str, columns: Sequence[str]) -> InputError:
        return InputError(f"{self.location}: expected {expected}, got {', '.join(columns)}")

    @property
    def num_rows(self) -> int:
        return self._table.num_rows

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        examples = self._table.take(numbers)
        rows = [
            self._row(example, number) for example, number in zip(examples, numbers, strict=True)
        ]
        return add_ids(rows, self._tokenizer)

    def _row(self, example: Example, number: int) -> Row:
        where = f"{self.location}: row {number + 1}"
        texts, ids, choices = row_checks.check_row(example, where, self._tokenizer.vocab_size)
        row: Row = {**ids, **{f"{key}_pretokenized": text.encode() for key, text in texts.items()}}
        if choices:
            row["answer_choices"] = [choice.encode() for choice in choices]
        return row | (row_checks.check_choice_fields(example, where) if self._scored else {})


class TemplateReader(RowReader):
    """Renders the examples of a table with a template.

    Examples for which the template has no prompt are left out, as in the published P3. Examples for
    which the template fails, and examples without a label, are left out too, and a warning gives
    their number.

    Raises:
      NoRowsError: while reading, if no example is left.
    """

    def __init__(self, table: Table, template: Template, name: str, tokenizer: Tokenizer) -> None:
        self.location = f"{table.location} with template {template.name!r}"
        self._table, self._template, self._name = table, template, name
        self._tokenizer = tokenizer
        # Index of an example -> why its template failed, or why it has no target.
        self._failures: dict[int, str] = {}
        self._unlabeled: dict[int, str] = {}

    @functools.cached_property
    def _indices(self) -> Sequence[int]:
        # Only rendering an example shows whether it has a prompt, so all are rendered once. The
        # prompts are not kept: `read_rows` renders them again.
        indices = array.array("q")
        for start, examples in self._table.chunks(READ_SIZE):
            for index, example in enumerate(examples, start):
                if self._render(example, index) is not None:
                    indices.append(index)
        self._report_left_out(len(indices))
        return indices

    @property
    def num_rows(self) -> int:
        return len(self._indices)

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        indices = [self._indices[number] for number in numbers]
        return self._rows(zip(indices, self._table.take(indices), strict=True))

    def row_blocks(self) -> Iterator[list[Row]]:
        # Renders each example once; `num_rows` and `read_rows` together would render it twice.
        num_rows = 0
        for start, examples in self._table.chunks(READ_SIZE):
            rows = self._rows(enumerate(examples, start))
            num_rows += len(rows)
            yield rows
        self._report_left_out(num_rows)

    def _rows(self, examples: Iterable[tuple[int, Example]]) -> list[Row]:
        rows: list[Row] = []
        for index, example in examples:
            prompt = self._render(example, index)
            if prompt is None:
                continue
            where = f"{self.location}: example {index + 1}"
            texts, _, choices = row_checks.check_row(vars(prompt), where)
            rows.append({f"{key}_pretokenized": text.encode() for key, text in texts.items()})
            if choices:
                rows[-1]["answer_choices"] = [choice.encode() for choice in choices]
        return add_ids(rows, self._tokenizer)

    def _render(self, example: Example, index: int) -> Prompt | None:
        """Returns the example's prompt, or None to leave it out; records why a template fails."""
        try:
            prompt = self._template.apply(example, index)
        except UnlabeledError as error:
            self._unlabeled[index] = str(error)
        except TemplateError as error:
            self._failures[index] = str(error)
        else:
            # None: the template has no prompt for this example, which is no failure to record.
            if prompt is None or prompt.targets != NO_LABEL:
                return prompt
            self._unlabeled[index] = "its target is empty"
        return None

    def _report_left_out(self, num_rows: int) -> None:
        """Warns of examples that were left out; raises NoRowsError if these were all."""
        lines = []
        for left_out, problem in (
            (self._failures, "because the template fails"),
            (self._unlabeled, "because they have no label"),
        ):
            if left_out:
                index, reason = next(iter(left_out.items()))
                lines.append(
                    f"{self._name}: {len(left_out):,} of {self._table.num_rows:,} examples of"
                    f" {self._table.location} left out, {problem} (number {index + 1}: {reason})"
                )
        if lines and not num_rows:
            raise NoRowsError(lines[0])
        for line in lines:
            warn_once(line)


def choice_rows(row: Row, example: int, tokenizer: Tokenizer) -> list[Row]:
    """Returns the rows of a `_score_eval` task for an example: one for each answer choice.

    A choice is correct if its text equals the target's text or, if the target has no text, if its
    ids equal the target's.

    Args:
      row: the example's row in the task without `_score_eval`.
      example: number of the row, for `idx`.
      tokenizer: encodes the choices.
    """
    target = row.get("targets_pretokenized", b"").strip()
    target_ids = [i for i in row["targets"] if i != EOS]
    choices = row.get("answer_choices", [])
    ids = tokenizer.encode([choice.decode("utf-8", "replace") for choice in choices])
    return [
        {
            **{key: row[key] for key in ("inputs", "inputs_pretokenized") if key in row},
            "targets": [*ids[number], EOS],
            "targets_pretokenized": choice,
            "answer_choices": choices,
            "idx": [example, number],
            "is_correct": choice.strip() == target if target else ids[number] == target_ids,
            "weight": 1.0,
        }
        for number, choice in enumerate(choices)
    ]


class ChoiceReader(RowReader):
    """The rows of a task `<task>_score_eval`, derived from the answer choices of `<task>`.

    Rows of `<task>` (`plain`) without choices are left out, with a warning.
    """

    def __init__(self, plain: RowReader, tokenizer: Tokenizer) -> None:
        self.location, self._plain, self._tokenizer = plain.location, plain, tokenizer

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Index of the first choice of each row, and the number of all choices: int [rows + 1]."""
        counts = [
            len(row.get("answer_choices", [])) for rows in self._plain.row_blocks() for row in rows
        ]
        without = counts.count(0)
        # If no row has choices, the commands report that there is nothing to score.
        if 0 < without < len(counts):
            place = "no_choices", f"{self.location}: row {counts.index(0) + 1}"
            warn_once(row_checks.describe_odd_rows([place], {"no_choices": without})[0])
        return np.cumsum([0, *counts])

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        # The row that each choice belongs to.
        owners = np.searchsorted(self._starts, np.asarray(numbers), side="right") - 1
        # Each row is read and tokenized once for all of its choices.
        distinct = np.unique(owners).tolist()
        plain = zip(distinct, self._plain.read_rows(distinct), strict=True)
        rows = {owner: choice_rows(row, owner, self._tokenizer) for owner, row in plain}
        choices = np.asarray(numbers) - self._starts[owners]
        return [
            rows[owner][choice]
            for owner, choice in zip(owners.tolist(), choices.tolist(), strict=True)
        ]

    def row_blocks(self) -> Iterator[list[Row]]:
        # Reads each row once; `num_rows` and `read_rows` together would read it twice.
        example = 0
        for rows in self._plain.row_blocks():
            block = []
            for row in rows:
                block += choice_rows(row, example, self._tokenizer)
                example += 1
            yield block
