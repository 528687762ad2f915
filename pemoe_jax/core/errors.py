"""The one exception that means "the user gave something wrong"."""


class InputError(ValueError):
    """A user's mistake, told in one line: what was wrong, what was expected, what was found.

    Entry points print the message without a stack trace and exit non-zero.
    """
