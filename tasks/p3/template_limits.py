"""Limits for untrusted templates: steps, seconds, and sizes of values and texts.

Without them, a template of a few characters, such as `{{ 9**9**9 }}` or nested loops, could take
all of the memory or run for hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

# Limits of one rendering.
_MAX_PRINTED = 10_000_000  # characters
_MAX_STEPS = 100_000  # of loops and macros
_MAX_SECONDS = 60.0
# Limits of one value.
_MAX_SIZE = 1_000_000  # characters and items
_MAX_BITS = 10_000  # of an integer
# In a format field: a width of four digits, or a width that is a value itself.
_WIDE_FORMAT = re.compile(r"\d{4,}|[*{].*[*{]", re.DOTALL)


class TemplateError(Exception):
    """A template cannot be rendered with an example."""


class Budget:
    """Steps, characters and seconds that are left for the rendering of an example.

    All templates share one object (`budget`), because only one thread renders at a time.
    """

    def reset(self) -> None:
        """Starts the rendering of an example."""
        self.steps, self.characters = _MAX_STEPS, _MAX_PRINTED
        self.deadline = time.monotonic() + _MAX_SECONDS

    def count_step(self) -> None:
        """Counts a step of a loop or macro; raises TemplateError if no steps or time are left."""
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
    """Estimates the number of characters of `str(value)` without computing it.

    Raises:
      TemplateError: the value is too large. A list counts each time that it occurs, so that lists
        of lists that repeat one list are too large, too.
    """
    # A stack instead of recursion, because values may be nested to any depth.
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
    # Of integers: upper bounds of the bits of the result. A sum has at most one bit more.
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
    """Raises TemplateError if a text formatted with `values` could be too large.

    Widths must have fewer than four digits and must not be values themselves.
    """
    text = str(text)
    if any(_WIDE_FORMAT.search(match) for match in re.findall(r"%[^a-zA-Z%]*|{[^}]*", text)):
        raise TemplateError(f"expected a format with widths below 1,000, got {text!r:.80}")
    # An upper bound: each field prints all values.
    check_size(len(text) + sum(map(text_size, values)) * (text.count("%") + text.count("{")))
