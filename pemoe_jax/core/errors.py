"""The exception for users' mistakes, checks of settings, and helpers for messages."""

from collections.abc import Sequence


class InputError(ValueError):
    """A user's mistake, in one line: the setting or file, the expected value, and the actual one.

    Commands print the message without a stack trace and exit with a non-zero code.
    """


def first_line(error: BaseException | str) -> str:
    """Returns an error's first line that is not blank, or else the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def plural(count: int, noun: str) -> str:
    """Returns a count with its noun, such as '1 task' or '1,200 tasks'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def check_integer(name: str, value: object, minimum: int = 1) -> None:
    """Raises InputError unless a setting is an integer of at least `minimum`."""
    # bool is a subclass of int, and True would pass for 1.
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        expected = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        raise InputError(f"{name} must be {expected}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises InputError unless a setting is one of `choices`."""
    if value not in choices:
        expected = ", ".join(map(repr, choices))
        raise InputError(f"{name} must be one of {expected}, got {value!r}")
