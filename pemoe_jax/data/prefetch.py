"""Prefetching: a thread prepares items, or the device computes results, ahead of the caller.

The library `grain` prefetches its own datasets only. `prefetch` takes any iterable, and reports the
position after the item that was returned last, not after the items that were prepared ahead.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar, overload

from pemoe_jax.data import seqio_import

S = TypeVar("S")
T = TypeVar("T")
Position = dict[str, int]

# An entry of the queue: an item and the position after it, an exception to raise, or None at the
# end.
_Entry = tuple[T, Position | None] | BaseException | None


class PrefetchIterator(Iterator[T], Generic[T]):
    """Iterator that `prefetch` returns.

    Attributes:
      position: `source.position` as of the item returned last; None if the source has none.
    """

    def __init__(self, source: Iterable[S], size: int, transform: Callable[[S], T]) -> None:
        self._queue: queue.Queue[_Entry[T]] = queue.Queue(max(1, size))
        # Closed at exit, because Python can hang there while a thread is inside TensorFlow.
        self._items = seqio_import.close_at_exit(_read_in_thread(source, self._queue, transform))
        self.position: Position | None = getattr(source, "position", None)

    @property
    def is_ready(self) -> bool:
        """Whether `next` would return or raise without waiting."""
        return not self._queue.empty()

    def __next__(self) -> T:
        item, self.position = next(self._items)
        return item

    def close(self) -> None:
        """Ends the thread; prepared items are dropped."""
        self._items.close()


@overload
def prefetch(source: Iterable[T], size: int = 4) -> PrefetchIterator[T]: ...


@overload
def prefetch(
    source: Iterable[S], size: int = 4, *, transform: Callable[[S], T]
) -> PrefetchIterator[T]: ...


def prefetch(
    source: Iterable[S], size: int = 4, *, transform: Callable[[S], Any] | None = None
) -> PrefetchIterator[Any]:
    """Returns the items of an iterable, prepared by a thread.

    Exceptions of the source and of `transform` are raised by the iterator. Closing the iterator, or
    dropping the last reference to it, ends the thread.

    Args:
      source: the items; it may have a `position` (`packing.BatchIterator`).
      size: number of items to prepare ahead.
      transform: applied to each item in the thread; None: items are returned as they are.
    """
    return PrefetchIterator(source, size, transform or (lambda item: item))


def _read_in_thread(
    source: Iterable[S], entries: queue.Queue[_Entry[T]], transform: Callable[[S], T]
) -> Generator[tuple[T, Position | None], None, None]:
    """Yields transformed items, each with the position of the source after it."""
    stop = threading.Event()

    def put(entry: _Entry[T]) -> None:
        # A blocking put would keep the thread alive when nobody reads the queue any more.
        while not stop.is_set():
            try:
                entries.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put((transform(item), getattr(source, "position", None)))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where the items are read
            put(error)

    # `work` is not a method: the thread must hold no reference to the PrefetchIterator, which would
    # then never be collected, so that the thread would never stop.
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (entry := entries.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        stop.set()
        # A thread that is inside of a long read may take longer. It is a daemon, so it ends with
        # the process.
        thread.join(timeout=5)


def keep_in_flight(results: Iterable[T], count: int = 2) -> Iterator[T]:
    """Yields the items of a lazy iterable, each after the `count` items behind it are requested.

    jax returns arrays before they are computed. Reading a result only after the next calls are
    dispatched keeps the device busy, and limiting the number of these calls keeps memory small.
    """
    pending: collections.deque[T] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) > count:
            yield pending.popleft()
    yield from pending
