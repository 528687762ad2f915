"""P3's rows made on the fly: promptsource's templates applied to a data set's own examples."""

from __future__ import annotations

import array
import functools
from collections.abc import Iterator, Sequence

from pemoe_jax.data.rows import READ_SIZE, Encode, Row, RowReader
from pemoe_jax.data.warnings import warn_once
from pemoe_jax.tasks.p3.row_files import Example, Table, every
from pemoe_jax.tasks.p3.rows import add_ids
from pemoe_jax.tasks.p3.templates import Prompt, Template, TemplateError


class OnTheFly(RowReader):
    """Examples that a template makes a prompt of; the others are left out, and counted."""

    def __init__(self, table: Table, template: Template, name: str, encode: Encode) -> None:
        self.location = f"{table.location} with template {template.name!r}"
        self._table, self._template, self._name, self._encode = table, template, name, encode

    @functools.cached_property
    def _kept(self) -> Sequence[int]:
        """The numbers of the examples that give a row; renders all of them."""
        kept = array.array("q")
        for start, examples in every(self._table, READ_SIZE):
            for number, example in enumerate(examples, start):
                if self._apply(example, number) is not None:
                    kept.append(number)
        self._tell()
        return kept

    @property
    def num_rows(self) -> int:
        """See RowReader."""
        return len(self._kept)

    def read_rows(self, numbers: Sequence[int]) -> list[Row]:
        """See RowReader."""
        raw = [self._kept[number] for number in numbers]
        return self._made(zip(raw, self._table.take(raw), strict=True))

    def row_blocks(self) -> Iterator[list[Row]]:
        """See Reader; in one pass."""
        for start, examples in every(self._table, READ_SIZE):
            yield self._made(enumerate(examples, start))
        self._tell()

    def _made(self, numbered: Iterator[tuple[int, Example]] | enumerate[Example]) -> list[Row]:
        prompts = [self._apply(example, number) for number, example in numbered]
        return add_ids([_row(prompt) for prompt in prompts if prompt is not None], self._encode)

    @functools.cached_property
    def left_out(self) -> dict[int, str]:
        """Examples without a row: number -> why ('' where the template gives none)."""
        return {}

    def _apply(self, example: Example, number: int) -> Prompt | None:
        try:
            prompt = self._template.apply(example, number)
        except TemplateError as error:
            self.left_out[number] = str(error)
            return None
        if prompt is None:
            self.left_out[number] = ""
        return prompt

    def _tell(self) -> None:
        """Of templates that fail; that one gives no prompt for some examples is as it should be."""
        failed = {number: why for number, why in self.left_out.items() if why}
        if failed:
            number, why = next(iter(failed.items()))
            warn_once(
                f"{self._name}: {len(failed):,} of {self._table.num_rows:,} examples of"
                f" {self._table.location} left out, the template fails on them"
                f" (number {number + 1}:"
                f" {why})"
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
