"""Limits for untrusted templates: steps, seconds, and sizes of values and texts."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

_MAX_SIZE = 1_000_000  # characters and items of a value
_MAX_PRINTED = 10_000_000  # characters
_MAX_STEPS = 100_000  # of loops and macros
_MAX_SECONDS = 60.0
_MAX_BITS = 10_000  # of an integer
_WIDE_FORMAT = re.compile(r"\d{4,}|[*{].*[*{]", re.DOTALL)


class TemplateError(Exception):
    """A template cannot be rendered with an example."""


class Budget:
    """Steps, characters and seconds that are left for the rendering of an example.

    There is one for all templates (`budget`): one thread renders at a time.
    """

    def reset(self) -> None:
        """Starts the rendering of an example."""
        self.steps, self.characters = _MAX_STEPS, _MAX_PRINTED
        self.deadline = time.monotonic() + _MAX_SECONDS

    def count_step(self) -> None:
        """Counts a step of a loop or macro; raises TemplateError if none or no time is left."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError(f"its loops take more than {_MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"it takes more than {_MAX_SECONDS:.0f} s")

    def count_printed(self, size: int) -> None:
        """Counts printed characters; raises TemplateError if there are too many."""
        self.characters -= size
        if self.characters < 0:
            raise TemplateError(f"it prints more than {_MAX_PRINTED:,} characters")


budget = Budget()
budget.reset()


def check_size(size: int) -> None:
    """Raises TemplateError if a value has too many characters or items."""
    if size > _MAX_SIZE:
        raise TemplateError(f"a value has more than {_MAX_SIZE:,} characters or items")


def text_size(value: object) -> int:
    """Returns about the number of characters of `str(value)`, which is not computed.

    Raises:
      TemplateError: the value is too large, such as lists of lists that repeat one list.
    """
    size, rest = 0, [value]
    while rest:
        item = rest.pop()
        size += len(item) if isinstance(item, str) else 1
        if isinstance(item, list | tuple):
            rest += item
        elif isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        check_size(size + len(rest))
    return size


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises TemplateError if the result of `+`, `*`, `**` or `%` would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = {
            "**": left.bit_length() * max(right, 0),
            "*": left.bit_length() + right.bit_length(),
        }
        if bits.get(operator, 0) > _MAX_BITS:
            raise TemplateError(f"a number has more than {_MAX_BITS:,} bits")
    elif operator == "%" and isinstance(left, str):
        check_format(left, (right,))
    elif operator == "*":
        for items, count in ((left, right), (right, left)):
            if isinstance(items, str | list | tuple) and isinstance(count, int):
                check_size(len(items) * max(count, 0))
    elif operator == "+" and isinstance(left, str | list | tuple):
        check_size(len(left) + (len(right) if isinstance(right, str | list | tuple) else 0))


def check_format(text: object, values: Iterable[object]) -> None:
    """Raises TemplateError for widths of four digits, or that are fields themselves."""
    text = str(text)
    if any(_WIDE_FORMAT.search(match) for match in re.findall(r"%[^a-zA-Z%]*|{[^}]*", text)):
        raise TemplateError(f"expected a format with widths below 1,000, got {text!r:.80}")
    check_size(len(text) + sum(map(text_size, values)) * (text.count("%") + text.count("{")))
