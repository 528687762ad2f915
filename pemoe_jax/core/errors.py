"""The one exception that means "the user gave something wrong"."""


class InputError(ValueError):
    """A user's mistake, told in one line: what was wrong, what was expected, what was found.

    Entry points print the message without a stack trace and exit non-zero.
    """


def first_line(error: BaseException | str) -> str:
    """Returns the first line of a message that is not blank; without one, the error's class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
