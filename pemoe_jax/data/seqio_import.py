"""Imports seqio quietly and without GPUs, and closes its pipelines before Python ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.abc
import importlib.machinery
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from pemoe_jax.runtime import seqio_cache_dirs

if TYPE_CHECKING:
    import tensorflow as tf

T = TypeVar("T")

_stderr_lock = threading.Lock()

# TensorFlow's C++ code logs that oneDNN is on and that there is no CUDA driver before its log level
# takes effect. TF_CPP_MIN_LOG_LEVEL, ABSL_MIN_LOG_LEVEL and absl's Python settings do not help.
_IMPORT_NOISE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|[IWE]\d{4} \d\d:"
)


@contextlib.contextmanager
def _filter_stderr() -> Iterator[None]:
    """Captures stderr in the block, and then writes it without the lines of `_IMPORT_NOISE`.

    If the block raises, all lines are written. File descriptor 2 belongs to the whole process, so
    the output of other threads is delayed too, but not lost.
    """
    with _stderr_lock, tempfile.TemporaryFile() as captured:
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(stderr, 2)
            captured.seek(0)
            for line in captured:
                if not (succeeded and _IMPORT_NOISE.match(line)):
                    os.write(stderr, line)
            os.close(stderr)


@contextlib.contextmanager
def _pause_gc() -> Iterator[None]:
    # TensorFlow's import creates a million objects that live as long as the process. To look for
    # garbage among them takes a fifth of the import, and at exit 1.5 s unless they are frozen.
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Unavailable(importlib.abc.Loader):
    """A loader of a module that can be found but not imported."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        # TensorFlow catches this error.
        raise ImportError(f"{spec.name} is imported later")

    def exec_module(self, module: ModuleType) -> None:
        raise AssertionError  # unreachable: `create_module` raises


class _Deferred(importlib.abc.Loader):
    """A loader that runs a module when one of its attributes is first read.

    Special names such as `__file__` do not count: `inspect` and tf.data's AutoGraph read `__file__`
    of every module, and would so make `importlib.util.LazyLoader` load it.
    """

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def load(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            vars(module).pop("__getattr__", None)
            self.loader.exec_module(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = load  # Python calls it for names that the module lacks


class _KerasFinder(importlib.abc.MetaPathFinder):
    """Lets TensorFlow locate Keras, but makes its import of Keras fail.

    The layers of TensorFlow Text, which derive from Keras's, are imported at their first use.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ("keras", "tensorflow_text.python.keras"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            is_keras = name == "keras"
            spec.loader = _Unavailable() if is_keras else _Deferred(spec.loader)
        return spec


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    # Keras takes a third of the time of TensorFlow's import, and seqio does not use it. After this
    # block `tf.keras` and `import keras` work as usual.
    finder = _KerasFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@functools.cache
def import_seqio() -> ModuleType:
    """Returns the module seqio; the first call takes about 5 s.

    Call it before TensorFlow is imported elsewhere: it hides GPUs from TensorFlow, which would
    otherwise reserve their memory. TF_CPP_MIN_LOG_LEVEL=0 in the environment shows all of
    TensorFlow's log.
    """
    # Below level 3, TensorFlow logs on every machine without a GPU that cuInit failed.
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    quiet = contextlib.nullcontext() if level == "0" else _filter_stderr()
    with _pause_gc(), quiet, _without_keras():
        import tensorflow as tf

        # RuntimeError: the caller has initialized TensorFlow already, and its devices stay visible.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
        import seqio

    if seqio_cache_dirs.additional_cache_dirs:
        seqio.add_global_cache_dirs(seqio_cache_dirs.additional_cache_dirs)
    module: ModuleType = seqio
    return module


def disable_autotune(ds: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a dataset whose iterators do not tune their parallelism and buffers.

    The destructor of a tuned iterator waits for the tuning thread, 3 to 70 s on one core. Without
    tuning, `tf.data.AUTOTUNE` is the number of cores, at most 16.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return ds.with_options(options)


_open_generators: weakref.WeakSet[Generator[object, None, None]] = weakref.WeakSet()


def close_at_exit(generator: Generator[T, None, None]) -> Generator[T, None, None]:
    """Registers a generator to be closed before Python ends, if it still exists then; returns it.

    A tf.data pipeline may be inside a Python function (`tf.numpy_function`) when Python ends. The
    function could not run any more, and TensorFlow would wait for it forever.
    """
    _open_generators.add(generator)
    return generator


@atexit.register
def _close_generators() -> None:
    # Twice: `close` raises ValueError for a generator that a prefetch thread is executing. Once the
    # generator of the PrefetchIterator is closed, the thread has ended, and `close` works.
    for _ in range(2):
        for generator in list(_open_generators):
            with contextlib.suppress(ValueError):
                generator.close()
