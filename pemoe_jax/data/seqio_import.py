"""Imports seqio without its noise, and closes its pipelines before Python ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from pemoe_jax.runtime import seqio_caches

T = TypeVar("T")


# What TensorFlow says of itself before its log level counts: oneDNN is on, there is no CUDA.
_CHATTER = re.compile(rb"WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} \d\d:")


_stderr_lock = threading.Lock()


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Withholds what is written to file descriptor 2 and then writes it, less the chatter.

    Where the block raises, all of it is written. Descriptor 2 is the process's: what other threads
    write comes late, but it comes.
    """
    with _stderr_lock, tempfile.TemporaryFile() as withheld:
        stderr = os.dup(2)
        os.dup2(withheld.fileno(), 2)
        chatter = None
        try:
            yield
            chatter = _CHATTER
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(stderr, 2)
            withheld.seek(0)
            for line in withheld:
                if chatter is None or not chatter.match(line):
                    os.write(stderr, line)
            os.close(stderr)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is looked for: TensorFlow's import makes a million objects that stay.

    To look them through takes a fifth of the import, and where Python ends 1.5 s more.
    """
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def import_seqio() -> Any:
    """seqio (8 s at the first call), with GPUs hidden from the TensorFlow that comes with it.

    Environment: TF_CPP_MIN_LOG_LEVEL=0 shows all that TensorFlow writes to stderr, as it comes.
    """
    # Below 3, cuInit's failure is printed on every CPU machine.
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _uncollected(), contextlib.nullcontext() if level == "0" else _without_chatter():
        import tensorflow as tf

        # Where the caller has started TensorFlow already, what it may see is the caller's business.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
        import seqio

    if seqio_caches.additional_cache_dirs:
        seqio.add_global_cache_dirs(seqio_caches.additional_cache_dirs)
    return seqio


def global_cache_dirs() -> list[str]:
    """The folders of offline caches that seqio knows; imports it where there can be any."""
    return list(import_seqio().utils.get_global_cache_dirs())


_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def close_at_exit(generator: Generator[T, None, None]) -> Generator[T, None, None]:
    """A generator that is closed before Python ends, if it is still there then.

    Where Python is ending TensorFlow may wait for ever for what a pipeline has under way: Python
    functions, which cannot run any more.
    """
    _open.add(generator)
    return generator


@atexit.register
def _close_all() -> None:
    for _ in range(2):  # one that a thread is in can be closed when that thread has ended
        for generator in list(_open):
            with contextlib.suppress(ValueError):
                generator.close()
