"""Warnings about the data that a run prints once, however many pipelines meet their cause."""

import sys

_printed: set[str] = set()


def warn_once(message: str) -> None:
    """Prints a line to stderr, unless it was printed before."""
    if message not in _printed:
        _printed.add(message)
        print(message, file=sys.stderr, flush=True)
