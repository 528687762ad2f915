"""Prefetching: a thread prepares the next items while the caller works on the last."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar, overload

from pemoe_jax.data import seqio_import

S = TypeVar("S")
T = TypeVar("T")
Position = dict[str, int]


class PrefetchIterator(Iterator[T], Generic[T]):
    """Iterator that `prefetch` returns.

    Attributes:
      position: `source.position` as of the item returned last; None if the source has none.
    """

    def __init__(
        self, source: Iterable[Any], size: int, transform: Callable[[Any], T] | None
    ) -> None:
        self._queue: queue.Queue[tuple[str, Any, Position | None]] = queue.Queue(max(1, size))
        # A thread that is inside TensorFlow when Python ends can make it hang.
        self._items = seqio_import.close_at_exit(_read_in_thread(source, self._queue, transform))
        self.position = _position(source)

    @property
    def is_ready(self) -> bool:
        """Whether the next item is prepared already."""
        return not self._queue.empty()

    def __next__(self) -> T:
        item, self.position = next(self._items)
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._items.close()


@overload
def prefetch(source: Iterable[T], size: int = 4) -> PrefetchIterator[T]: ...


@overload
def prefetch(
    source: Iterable[S], size: int = 4, *, transform: Callable[[S], T]
) -> PrefetchIterator[T]: ...


def prefetch(
    source: Iterable[Any], size: int = 4, *, transform: Callable[[Any], Any] | None = None
) -> PrefetchIterator[Any]:
    """Returns the items of an iterable, prepared by a thread.

    Exceptions of the source and of `transform` are raised by the iterator. Closing the iterator, or
    dropping the last reference to it, ends the thread.

    Args:
      source: the items; it may have a `position` (`packing.BatchIterator`).
      size: number of items to prepare ahead.
      transform: applied to each item in the thread; None: items are returned as they are.
    """
    return PrefetchIterator(source, size, transform)


def _position(source: Any) -> Position | None:
    position: Position | None = getattr(source, "position", None)
    return position


def _read_in_thread(
    source: Iterable[Any],
    items: queue.Queue[tuple[str, Any, Position | None]],
    transform: Callable[[Any], T] | None,
) -> Generator[tuple[T, Position | None], None, None]:
    stop = threading.Event()

    def put(kind: str, value: Any = None, position: Position | None = None) -> bool:
        # A blocking put would keep the thread alive when nobody reads the queue any more.
        while not stop.is_set():
            try:
                items.put((kind, value, position), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                value = item if transform is None else transform(item)
                if not put("item", value, _position(source)):
                    return
            put("end")
        except BaseException as error:  # raised again where the items are read
            put("error", error)

    # A module-level generator, not a method: the thread must hold no reference to the iterator, or
    # the iterator would never be collected and the thread never stop.
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value, position = items.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value, position
    finally:
        stop.set()
        thread.join(timeout=5)
