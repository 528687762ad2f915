"""Looks up seqio's tasks and mixtures and reads them as numpy, with errors of one line."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError, check_integer, first_line, plural
from pemoe_jax.data import seqio_import, tfrecords
from pemoe_jax.data.row_checks import TEXT_FEATURES, check_token_ids
from pemoe_jax.data.seekable_tasks import SeekableMixture, SeekableTask

if TYPE_CHECKING:
    import tensorflow as tf

# The first of these that a task has is its evaluation split.
EVAL_SPLITS = ("validation", "val", "test")

# Feature [S] of tasks that come with sentence embeddings, for routers that read them.
SENTENCE_FEATURE = "sentence_embedding"

# A row of a task as numpy arrays and bytes, by feature.
Row = Mapping[str, Any]

# Name that users may expect but that could not be registered -> the reason.
unavailable: dict[str, str] = {}


@functools.cache
def warn_once(message: str) -> None:
    """Prints a line to stderr, once, because several pipelines may meet the same problem."""
    print(message, file=sys.stderr, flush=True)


def get_mixture_or_task(name: str) -> Any:
    """Returns the `seqio.Task` or `seqio.Mixture` of this name.

    Raises:
      InputError: the name is not registered.
    """
    seqio = seqio_import.import_seqio()
    # Mixtures first, as in seqio.get_mixture_or_task.
    for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
        if name in registry.names():
            return registry.get(name)
    if name in unavailable:
        raise InputError(f"{name!r} is not registered: {unavailable[name]}")
    names = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"; close: {', '.join(close)}" if close else ""
    raise InputError(f"unknown task or mixture {name!r} ({len(names)} are registered{hint})")


def subtask_names(name: str, use_cached: bool = False) -> list[str]:
    """Returns the names of a mixture's tasks, sorted, or of the task itself.

    Args:
      name: name of the task or mixture.
      use_cached: whether tasks are read from seqio's offline caches. Tasks without a cache are then
        left out with a warning if the mixture's `skips_missing_tasks` is set.

    Raises:
      InputError: with `use_cached`, a task that supports caching has no cache and is not left out,
        or no task has one.
    """
    provider, seqio = get_mixture_or_task(name), seqio_import.import_seqio()
    tasks = seqio.get_subtasks(provider)
    names = [task.name for task in tasks]
    if not use_cached:
        return names
    missing = [task.name for task in tasks if task.supports_caching and not task.cache_dir]
    if not missing:
        return names
    count = f"{len(missing)} of {len(tasks)} tasks, " if len(tasks) > 1 else ""
    skips = isinstance(provider, SeekableMixture) and provider.skips_missing_tasks
    if len(missing) == len(tasks) or not skips:
        raise InputError(
            f"USE_CACHED_TASKS: no cache of {count}{'such as ' if count else ''}{missing[0]!r}:"
            f" expected {missing[0]}/COMPLETED in one of --seqio_additional_cache_dirs, got"
            f" {', '.join(seqio.utils.get_global_cache_dirs()) or 'none'}"
        )
    more = ", …" if len(missing) > 3 else ""
    warn_once(f"{name}: no cache of {count}{', '.join(missing[:3])}{more}")
    return [task for task in names if task not in missing]


def has_data(name: str, use_cached: bool) -> bool:
    """Returns whether a task's data seems to be present; reads none of it."""
    task = get_mixture_or_task(name)
    if use_cached:
        return not task.supports_caching or bool(task.cache_dir)
    return not isinstance(task, SeekableTask) or task.has_data()


def describe_examples(name: str, split: str, use_cached: bool) -> str:
    """Describes how many tasks of a mixture have rows in a split: '3 tasks, 1,200 examples'."""
    counts: list[int | None] = []
    for task in map(get_mixture_or_task, subtask_names(name)):
        if not has_data(task.name, use_cached) or split not in task.splits:
            continue
        try:
            if use_cached and task.supports_caching:
                counts.append(task.get_cached_stats(split)["examples"])
            else:
                counts.append(task.num_input_examples(split))
        except InputError:  # a task without a usable row, which the mixture leaves out
            continue
        except ValueError:  # a cache without statistics
            counts.append(None)
    num_tasks = len(counts) - counts.count(0)
    known = [count for count in counts if count is not None]
    unknown = len(counts) - len(known)
    more = f" and those of {plural(unknown, 'task')} without statistics" if unknown else ""
    return f"{plural(num_tasks, 'task')}, {plural(sum(known), 'example')}{more}"


def vocab_size(name: str) -> int:
    """Returns the number of token ids of a task or mixture, including sentinels.

    If inputs and targets have different vocabularies, the larger one counts.
    """
    features = get_mixture_or_task(name).output_features
    return max(int(features[key].vocabulary.vocab_size) for key in TEXT_FEATURES if key in features)


def check_vocab_size(name: str, model_vocab_size: int) -> None:
    """Raises InputError if a task or mixture has token ids without a row in the model's embedding.

    The embedding may have more rows: T5's is padded to a size that TPUs multiply faster.
    """
    size = vocab_size(name)
    if size > model_vocab_size:
        raise InputError(
            f"T5Config.vocab_size must be at least {size}, the size of the vocabulary of {name!r}"
            f" with sentinels, got {model_vocab_size}"
        )


def fingerprint_vocabulary(vocabulary: Any) -> str | None:
    """Returns a hash of a vocabulary's pieces and their scores, 16 hexadecimal digits.

    Sentinels do not count, so that T5's files with and without them have the same hash. None for a
    tokenizer of transformers that has no such pieces.

    Args:
      vocabulary: a `seqio.Vocabulary`, a tokenizer of `tasks.tokenizer`, or the name of a task or
        mixture, whose targets' vocabulary is hashed.
    """
    if isinstance(vocabulary, str):
        vocabulary = get_mixture_or_task(vocabulary).output_features["targets"].vocabulary
    # Tokenizers of `tasks.tokenizer` name the class of the seqio vocabulary that they stand for.
    kind = getattr(vocabulary, "fingerprint_kind", type(vocabulary).__name__)
    if kind is None:
        return None
    digest = hashlib.sha256(kind.encode())
    tokenizer = getattr(vocabulary, "tokenizer", None)
    if tokenizer is None:
        digest.update(str(vocabulary.vocab_size).encode())
    else:
        for number in range(tokenizer.get_piece_size()):
            piece = tokenizer.id_to_piece(number)
            if "<extra_id_" not in piece:
                digest.update(f"{piece} {tokenizer.get_score(number):.6g}\n".encode())
    return digest.hexdigest()[:16]


def check_vocabulary(
    path: str, trained_with: str | None, vocabulary: Any, setting: str = "VOCAB_PATH"
) -> None:
    """Raises InputError if a checkpoint was trained with another vocabulary.

    Args:
      path: the checkpoint.
      trained_with: `fingerprint_vocabulary` of the vocabulary of its training; None: unknown.
      vocabulary: the current one, see `fingerprint_vocabulary`.
      setting: name of the setting that selects the current one, for the error.
    """
    if trained_with is not None:
        current = fingerprint_vocabulary(vocabulary)
        if current not in (None, trained_with):
            raise InputError(
                f"{setting} must be the vocabulary that {path} was trained with (fingerprint"
                f" {trained_with}), got one with the fingerprint {current}"
            )


def check_ids(
    features: Mapping[str, Any], row: Row, where: str, keys: Sequence[str] = TEXT_FEATURES
) -> None:
    """Raises InputError if a token id of a row is not in its feature's vocabulary.

    Args:
      features: `output_features` of the task.
      row: the row.
      where: the row's location, for the error.
      keys: the features to check.
    """
    for key in keys:
        check_token_ids(row[key], where, key, features[key].vocabulary.vocab_size)


def eval_split(name: str) -> str | None:
    """Returns a task's evaluation split: the first of `EVAL_SPLITS` that it has, or None."""
    return first_eval_split(get_mixture_or_task(name).splits)


def first_eval_split(splits: Collection[str]) -> str | None:
    """Returns the first of `EVAL_SPLITS` that is among `splits`, or None."""
    return next((split for split in EVAL_SPLITS if split in splits), None)


def validate_lengths(task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns the lengths of 'inputs' and 'targets'.

    Raises:
      InputError: one is missing or not a positive integer.
    """
    for key in TEXT_FEATURES:
        check_integer(f"TASK_FEATURE_LENGTHS[{key!r}]", task_feature_lengths.get(key))
    return {key: task_feature_lengths[key] for key in TEXT_FEATURES}


def check_source_files(tasks: Iterable[str], split: str | None) -> None:
    """Raises InputError if the files of tasks with this split are malformed."""
    # A source of this package checks its files when it counts its rows. Without this check the
    # error would come from within seqio, which logs a long traceback first.
    for task in map(get_mixture_or_task, tasks):
        if split in task.splits:
            task.num_input_examples(split)


def get_dataset(
    task: str, task_feature_lengths: Mapping[str, int], split: str | None, use_cached: bool
) -> tf.data.Dataset:
    """Returns the examples of a task's split once, in order."""
    return get_mixture_or_task(task).get_dataset(
        task_feature_lengths,
        split=split,
        use_cached=use_cached,
        shuffle=False,
        seed=0,
        num_epochs=1,
    )


def keep_rows(ds: tf.data.Dataset, is_kept: Sequence[bool]) -> tf.data.Dataset:
    """Returns the rows of a dataset whose entry in `is_kept` is true."""
    import tensorflow as tf

    pairs = tf.data.Dataset.zip((ds, tf.data.Dataset.from_tensor_slices(list(is_kept))))
    return pairs.filter(lambda _, is_row_kept: is_row_kept).map(lambda row, _: row)


def numpy_iterator(
    ds: tf.data.Dataset, name: str, split: str | None = None, use_cached: bool = False
) -> Generator[Any, None, None]:
    """Yields the elements of a dataset as numpy; the generator is closed before Python ends.

    For `name`, `split`, `use_cached` and errors see `translate_read_errors`.
    """

    def iterate() -> Generator[Any, None, None]:
        with translate_read_errors(name, split, use_cached):
            yield from seqio_import.disable_autotune(ds).as_numpy_iterator()

    return seqio_import.close_at_exit(iterate())


@contextlib.contextmanager
def translate_read_errors(
    name: str, split: str | None = None, use_cached: bool = False
) -> Iterator[None]:
    """Turns TensorFlow's errors about a task's or mixture's files into InputErrors.

    Other exceptions of Python functions in the pipeline are bugs and are not translated.

    Args:
      name: the task or mixture.
      split: split of its tasks; None: their evaluation splits.
      use_cached: whether seqio's offline caches are read.

    Raises:
      InputError: the pipeline raised an InputError (its message is repeated), a tfrecord file is
        damaged (the message has its path), or TensorFlow failed otherwise (the message is the first
        line of its own).
    """
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        # TensorFlow passes on exceptions of Python functions, and the offset of a damaged record,
        # only in its message.
        message = str(error.message)
        if input_error := re.search(r"\bInputError: (.+)", message):
            raise InputError(input_error[1]) from error
        if "Traceback (most recent call last)" in message:
            raise
        offset = re.search(r"(?:corrupted|truncated) record at (\d+)", message)
        damaged = _describe_damage(name, split, use_cached, int(offset[1])) if offset else ""
        raise InputError(damaged or f"reading {name!r}: {_reason(message)}") from error
    except UnicodeDecodeError as error:  # TensorFlow's message quotes data that is not UTF-8
        message = error.object.decode("ascii", "replace")
        raise InputError(f"reading {name!r}: {_reason(message)}") from error


def _reason(message: str) -> str:
    """Returns the first line of a TensorFlow error without names of ops, cut to 200 characters."""
    ops = r"^\{\{.*?\}\} |Error in user-defined .* with iterator: \S+ | \[Op:.*$"
    return re.sub(ops, "", first_line(message))[:200]


def _describe_damage(name: str, split: str | None, use_cached: bool, offset: int) -> str:
    """Returns the error of the tfrecord file that is damaged at an offset; '' if there is none."""
    seqio = seqio_import.import_seqio()
    for task in map(get_mixture_or_task, subtask_names(name, use_cached)):
        task_split = split or first_eval_split(task.splits)
        if task_split not in task.splits:
            continue
        cached = use_cached and task.supports_caching
        source = task._get_cached_source(task_split) if cached else task.source
        if not isinstance(source, seqio.FileDataSource):
            continue
        for path in filter(os.path.isfile, source.list_shards(task_split)):
            try:
                tfrecords.TFRecordFile(path).check_at(offset)
            except InputError as error:
                return str(error)
    return ""
