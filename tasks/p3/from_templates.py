"""P3's rows generated from promptsource's templates and a dataset's own examples."""

from __future__ import annotations

import array
import functools
from collections.abc import Iterable, Iterator, Sequence

from pemoe_jax.data.rows import READ_SIZE, Encode, Row, RowReader
from pemoe_jax.data.warnings import warn_once
from pemoe_jax.tasks.p3.row_files import Example, Table, iterate_chunks
from pemoe_jax.tasks.p3.rows import add_ids
from pemoe_jax.tasks.p3.templates import Prompt, Template, TemplateError


class TemplateReader(RowReader):
    """The examples that a template has a prompt for; failures are counted in a warning."""

    def __init__(self, table: Table, template: Template, name: str, encode: Encode) -> None:
        self.location = f"{table.location} with template {template.name!r}"
        self._table, self._template, self._name, self._encode = table, template, name, encode
        self._failures: dict[int, str] = {}  # index of an example -> why its template failed

    @functools.cached_property
    def _indices(self) -> Sequence[int]:
        # Only rendering an example shows whether it has a prompt, so all are rendered once.
        indices = array.array("q")
        for start, examples in iterate_chunks(self._table, READ_SIZE):
            for index, example in enumerate(examples, start):
                if self._render(example, index) is not None:
                    indices.append(index)
        self._warn()
        return indices

    @property
    def num_rows(self) -> int:
        return len(self._indices)

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        indices = [self._indices[number] for number in numbers]
        return self._rows(zip(indices, self._table.take(indices), strict=True))

    def row_blocks(self) -> Iterator[list[Row]]:
        # in one pass, without the one that `_indices` takes
        for start, examples in iterate_chunks(self._table, READ_SIZE):
            yield self._rows(enumerate(examples, start))
        self._warn()

    def _rows(self, examples: Iterable[tuple[int, Example]]) -> list[Row]:
        prompts = [self._render(example, index) for index, example in examples]
        return add_ids([_row(prompt) for prompt in prompts if prompt is not None], self._encode)

    def _render(self, example: Example, index: int) -> Prompt | None:
        try:
            return self._template.apply(example, index)
        except TemplateError as error:
            self._failures[index] = str(error)
            return None

    def _warn(self) -> None:
        # A template without a prompt for some examples is as published; one that fails is not.
        if self._failures:
            index, reason = next(iter(self._failures.items()))
            warn_once(
                f"{self._name}: {len(self._failures):,} of {self._table.num_rows:,} examples of"
                f" {self._table.location} left out, because the template fails (number {index + 1}:"
                f" {reason})"
            )


def _row(prompt: Prompt) -> Row:
    row: Row = {
        "inputs_pretokenized": prompt.inputs.encode("utf-8", "replace"),
        "targets_pretokenized": prompt.targets.encode("utf-8", "replace"),
    }
    if prompt.answer_choices:
        row["answer_choices"] = [
            choice.encode("utf-8", "replace") for choice in prompt.answer_choices
        ]
    return row
