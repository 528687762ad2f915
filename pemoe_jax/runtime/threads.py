"""Threads that read and sum the bytes of large arrays."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import TypeVar

SPAN_BYTES = 1 << 24  # processed by one thread, in order

_Result = TypeVar("_Result")


def make_pool() -> concurrent.futures.ThreadPoolExecutor:
    """Returns a pool with a thread for each core, at most 8.

    A pool must not outlive the function that makes it: its threads would be missing after a fork.
    """
    return concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def map_spans(function: Callable[[int, int], _Result], size: int) -> list[_Result]:
    """Splits `size` bytes into spans of `SPAN_BYTES`, and calls `function(start, stop)` for each.

    Returns the results in the order of the spans. Threads process several spans at a time.
    """
    bounds = [(start, min(start + SPAN_BYTES, size)) for start in range(0, size, SPAN_BYTES)]
    if len(bounds) < 2:
        return [function(*pair) for pair in bounds]
    with make_pool() as pool:
        return list(pool.map(lambda pair: function(*pair), bounds))
