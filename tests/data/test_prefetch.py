"""Prefetching by a thread."""

import itertools
import threading
import time

import pytest

from pemoe_jax.data import prefetch


def test_prefetch_keeps_order_and_raises_errors_of_the_source():
    assert list(prefetch.prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch.prefetch(range(100), transform=lambda i: -i)) == [-i for i in range(100)]

    def failing():
        yield 1
        raise KeyError("gone")

    items = prefetch.prefetch(failing(), 2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_dropping_the_iterator_ends_its_thread():
    items = prefetch.prefetch(itertools.count(), 2)
    assert next(items) == 0
    del items
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_closing_the_iterator_ends_its_thread():
    items = prefetch.prefetch(itertools.count(), 2)
    assert next(items) == 0
    items.close()
    deadline = time.time() + 5
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.time() < deadline
        time.sleep(0.02)
