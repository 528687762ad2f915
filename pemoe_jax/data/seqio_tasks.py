"""seqio's tasks looked up and read as numpy: answer choices grouped, to be ranked.

Everything here works for any registered seqio task or mixture; `feed` has batches to train on,
`buckets` batches of choices. TensorFlow does the reading and never sees a GPU.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.data import seqio_import
from pemoe_jax.data.providers import SeekableMixture, SeekableTask
from pemoe_jax.data.warnings import warn_once

EVAL_SPLITS = ("validation", "val", "test")  # the first that exists is a task's evaluation split

SENTENCE_FEATURE = (
    "sentence_embedding"  # a feature [S] that a task may have, for routers that read it
)

# Names that a user may well ask for and that could not be registered, with the reason.
unavailable: dict[str, str] = {}


def get_mixture_or_task(name: str) -> Any:
    """The seqio task or mixture of this name; InputError with close matches where there is none."""
    seqio = seqio_import.import_seqio()
    for registry in (
        seqio.MixtureRegistry,
        seqio.TaskRegistry,
    ):  # mixtures first, as seqio looks them up
        if name in registry.names():
            return registry.get(name)
    if name in unavailable:
        raise InputError(f"{name!r} is not registered: {unavailable[name]}")
    names = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"; close: {', '.join(close)}" if close else ""
    raise InputError(f"unknown task or mixture {name!r} ({len(names)} are registered{hint})")


def subtask_names(name: str) -> list[str]:
    """The names of a mixture's tasks, sorted, or the task itself."""
    seqio = seqio_import.import_seqio()
    return [task.name for task in seqio.get_subtasks(get_mixture_or_task(name))]


def vocab_size(name: str) -> int:
    """Number of target ids of a task or mixture, sentinels included."""
    return int(get_mixture_or_task(name).output_features["targets"].vocabulary.vocab_size)


def check_vocab_size(name: str, model_vocab_size: int) -> None:
    """InputError where a task or mixture can give ids that the model's embedding has no row for."""
    size = vocab_size(name)
    if size > model_vocab_size:
        raise InputError(
            f"the vocabulary of {name!r} has {size} ids, sentinels included,"
            f" but the model's T5Config.vocab_size is {model_vocab_size}"
        )


def eval_split(name: str) -> str | None:
    """A task's evaluation split: the first of validation, val and test that it has, or None."""
    splits = get_mixture_or_task(name).splits
    return next((split for split in EVAL_SPLITS if split in splits), None)


def validate_lengths(task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Of inputs and targets; InputError where one is missing or not a positive integer."""
    lengths = {}
    for key in ("inputs", "targets"):
        length = task_feature_lengths.get(key)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise InputError(
                f"TASK_FEATURE_LENGTHS must give {key!r} a positive integer, found {length!r}"
            )
        lengths[key] = length
    return lengths


def check_source_files(tasks: Iterable[str], split: str | None) -> None:
    """Lets sources that count their rows find what is wrong before seqio logs it at length."""
    for task in map(get_mixture_or_task, tasks):
        if split in task.splits:
            task.num_input_examples(split)


def cached_subtask_names(name: str) -> list[str]:
    """The names of a mixture's tasks, sorted, or the task itself: those that caches are read of.

    A mixture that `skips_missing_tasks` is read without those that have no cache, with a warning.

    Raises:
      InputError: a task that could be cached has no cache in any folder.
    """
    provider = get_mixture_or_task(name)
    tasks = seqio_import.import_seqio().get_subtasks(provider)
    missing = [task.name for task in tasks if task.supports_caching and not task.cache_dir]
    if not missing:
        return [task.name for task in tasks]
    of = f"{len(missing)} of {len(tasks)} tasks, " if len(tasks) > 1 else ""
    skips = isinstance(provider, SeekableMixture) and provider.skips_missing_tasks
    if len(missing) == len(tasks) or not skips:
        folders = ", ".join(seqio_import.global_cache_dirs())
        raise InputError(
            f"USE_CACHED_TASKS: no cache of {of}{missing[0]!r}: expected {missing[0]}/COMPLETED in"
            f" one of --seqio_additional_cache_dirs, found {folders or 'none'}"
        )
    warn_once(f"{name}: no cache of {of}{', '.join(missing[:3])}{', …' * (len(missing) > 3)}")
    return [task.name for task in tasks if task.name not in missing]


def has_data(name: str, use_cached: bool) -> bool:
    """False of tasks without a cache, and of P3's published ones that a folder P3_DIR has not."""
    task = get_mixture_or_task(name)
    if use_cached:
        return not task.supports_caching or bool(task.cache_dir)
    return not isinstance(task, SeekableTask) or task.has_data()


def check_integer(what: str, value: Any, least: int) -> None:
    """InputError where a setting is no integer of at least so much."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise InputError(f"{what} must be an integer of at least {least}, found {value!r}")


def numpy_iterator(
    ds: Any, name: str, split: str | None = None, use_cached: bool = False
) -> Generator[Any, None, None]:
    """The elements of a pipeline as numpy; it is closed before Python ends.

    Args:
      ds: the pipeline.
      name, split, use_cached: what it reads, as of `reading`.

    Raises:
      InputError: see `reading`.
    """

    def pulled() -> Generator[Any, None, None]:
        with translate_read_errors(name, split, use_cached):
            yield from ds.as_numpy_iterator()

    return seqio_import.close_at_exit(pulled())


_OURS = re.compile(r"\bInputError: (.+)")
_OFFSET = re.compile(r"(?:corrupted|truncated) record at (\d+)")


@contextlib.contextmanager
def translate_read_errors(
    name: str, split: str | None = None, use_cached: bool = False
) -> Iterator[None]:
    """Makes one line of it where TensorFlow fails to read a task's or mixture's files.

    What a source's own Python function raised passes, unless it is an InputError: it is a bug.

    Args:
      name: of the task or mixture.
      split: of its tasks; None: their evaluation splits.
      use_cached: whether seqio's offline caches are read.

    Raises:
      InputError: what a source of ours raised in the pipeline; else what TensorFlow says, with the
        damaged tfrecord where that can be found.
    """
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        message = str(error.message)
        ours = _OURS.search(message)
        if ours:
            raise InputError(ours[1]) from error
        if "Traceback (most recent call last)" in message:
            raise
        at = _OFFSET.search(message)
        damaged = _damaged_file(name, split, use_cached, int(at[1])) if at else ""
        raise InputError(damaged or f"reading {name!r}: {_tensorflow_message(message)}") from error
    except UnicodeDecodeError as error:  # TensorFlow quotes data that it cannot parse
        quoted = error.object.decode("ascii", "replace")
        raise InputError(f"reading {name!r}: {_tensorflow_message(quoted)}") from error


def _tensorflow_message(message: str) -> str:
    """Returns the first line of TensorFlow's message without the place in its graph."""
    where = r"^\{\{.*?\}\} |Error in user-defined .* with iterator: \S+ | \[Op:.*$"
    return re.sub(where, "", first_line(message))[:200]


def _damaged_file(name: str, split: str | None, use_cached: bool, offset: int) -> str:
    """What is wrong with the tfrecord that is damaged at a byte; '' where none is found."""
    seqio = seqio_import.import_seqio()
    from pemoe_jax.data import tfrecords

    for task in map(
        get_mixture_or_task, cached_subtask_names(name) if use_cached else subtask_names(name)
    ):
        wanted = split or eval_split(task.name)
        if wanted is None or wanted not in task.splits:
            continue
        cached = use_cached and task.supports_caching
        source = task._get_cached_source(wanted) if cached else task.source
        if not isinstance(source, seqio.FileDataSource):
            continue
        for path in filter(os.path.isfile, source.list_shards(wanted)):
            try:
                tfrecords.TFRecordFile(path).check_at(offset)
            except InputError as error:
                return str(error)
    return ""
