"""Reading results of the device behind their dispatch."""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def keep_in_flight(results: Iterable[T], count: int = 2) -> Iterator[T]:
    """Yields the items of a lazy iterable with `count` further items already requested.

    jax returns arrays before they are computed. Reading a result only after the next calls are
    dispatched keeps the device busy; a bound on their number keeps their memory small.
    """
    pending: collections.deque[T] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) > count:
            yield pending.popleft()
    yield from pending
