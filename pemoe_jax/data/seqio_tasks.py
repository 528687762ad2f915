"""seqio's tasks looked up and read as numpy: answer choices grouped, to be ranked.

Everything here works for any registered seqio task or mixture; `feed` has batches to train on,
`buckets` batches of choices. TensorFlow does the reading and never sees a GPU.
"""

from __future__ import annotations

import atexit
import bisect
import collections
import contextlib
import dataclasses
import difflib
import functools
import gc
import itertools
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from pemoe_jax.core.errors import InputError, first_line

Batch = dict[str, np.ndarray]
T = TypeVar("T")

EVAL_SPLITS = ("validation", "val", "test")  # the first that exists is a task's evaluation split

SENTENCE = "sentence_embedding"  # a feature [S] that a task may have, for routers that read it

# Names that a user may well ask for and that could not be registered, with the reason.
unregistered: dict[str, str] = {}

# Folders of seqio's offline caches, made known to it when it is imported.
added_cache_dirs: list[str] = []


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

    if added_cache_dirs:
        seqio.add_global_cache_dirs(added_cache_dirs)
    return seqio


def add_cache_dirs(folders: Iterable[str]) -> None:
    """Makes folders known to seqio in which tasks' offline caches are; does not import it.

    Raises:
      InputError: one of them is not there.
    """
    found = [f if "://" in f else os.path.abspath(os.path.expanduser(f)) for f in folders]
    for folder in found:
        if "://" not in folder and not os.path.isdir(folder):
            what = "a file" if os.path.exists(folder) else "nothing there"
            raise InputError(
                f"--seqio_additional_cache_dirs: {folder} must be a folder, found {what}"
            )
    added_cache_dirs.extend(folder for folder in found if folder not in added_cache_dirs)
    if import_seqio.cache_info().currsize:
        import_seqio().add_global_cache_dirs(added_cache_dirs)


def cache_dirs() -> list[str]:
    """The folders of offline caches that seqio knows; imports it where there can be any."""
    return list(import_seqio().utils.get_global_cache_dirs())


def check_task(name: str) -> Any:
    """The seqio task or mixture of this name; InputError with close matches where there is none."""
    seqio = import_seqio()
    for registry in (
        seqio.MixtureRegistry,
        seqio.TaskRegistry,
    ):  # mixtures first, as seqio looks them up
        if name in registry.names():
            return registry.get(name)
    if name in unregistered:
        raise InputError(f"{name!r} is not registered: {unregistered[name]}")
    names = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"; close: {', '.join(close)}" if close else ""
    raise InputError(f"unknown task or mixture {name!r} ({len(names)} are registered{hint})")


def subtasks(name: str) -> list[str]:
    """The names of a mixture's tasks, sorted, or the task itself."""
    seqio = import_seqio()
    return [task.name for task in seqio.get_subtasks(check_task(name))]


def vocab_size(name: str) -> int:
    """Number of target ids of a task or mixture, sentinels included."""
    return int(check_task(name).output_features["targets"].vocabulary.vocab_size)


def check_vocabulary(name: str, model_vocab_size: int) -> None:
    """InputError where a task or mixture can give ids that the model's embedding has no row for."""
    size = vocab_size(name)
    if size > model_vocab_size:
        raise InputError(
            f"the vocabulary of {name!r} has {size} ids, sentinels included,"
            f" but the model's T5Config.vocab_size is {model_vocab_size}"
        )


def eval_split(name: str) -> str | None:
    """A task's evaluation split: the first of validation, val and test that it has, or None."""
    splits = check_task(name).splits
    return next((split for split in EVAL_SPLITS if split in splits), None)


def checked_lengths(task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
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


def check_files(tasks: Iterable[str], split: str | None) -> None:
    """Lets sources that count their rows find what is wrong before seqio logs it at length."""
    for task in map(check_task, tasks):
        if split in task.splits:
            task.num_input_examples(split)


def cached_subtasks(name: str) -> list[str]:
    """The names of a mixture's tasks, sorted, or the task itself: those that caches are read of.

    A mixture that `leaves_out` tasks is read without those that have no cache, which is said once.

    Raises:
      InputError: a task that could be cached has no cache in any folder.
    """
    provider = check_task(name)
    tasks = import_seqio().get_subtasks(provider)
    missing = [task.name for task in tasks if task.supports_caching and not task.cache_dir]
    if not missing:
        return [task.name for task in tasks]
    of = f"{len(missing)} of {len(tasks)} tasks, " if len(tasks) > 1 else ""
    if len(missing) == len(tasks) or not getattr(provider, "leaves_out", False):
        raise InputError(
            f"USE_CACHED_TASKS: no cache of {of}{missing[0]!r}: expected {missing[0]}/COMPLETED in"
            f" one of --seqio_additional_cache_dirs, found {', '.join(cache_dirs()) or 'none'}"
        )
    from pemoe_jax.data import rows

    rows.told(f"{name}: no cache of {of}{', '.join(missing[:3])}{', …' * (len(missing) > 3)}")
    return [task.name for task in tasks if task.name not in missing]


def is_there(name: str, use_cached: bool) -> bool:
    """False of tasks without a cache, and of P3's published ones that a folder P3_DIR has not."""
    task = check_task(name)
    if use_cached:
        return not task.supports_caching or bool(task.cache_dir)
    source = getattr(task, "source", None)
    folder = getattr(getattr(source, "settings", None), "p3_dir", None)
    return folder is None or "://" in folder or getattr(source, "found", True) is not None


def check_count(what: str, value: Any, least: int) -> None:
    """InputError where a setting is no integer of at least so much."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise InputError(f"{what} must be an integer of at least {least}, found {value!r}")


_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def closed_at_exit(generator: Generator[T, None, None]) -> Generator[T, None, None]:
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


def arrays(
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
        with reading(name, split, use_cached):
            yield from ds.as_numpy_iterator()

    return closed_at_exit(pulled())


_OURS = re.compile(r"\bInputError: (.+)")
_OFFSET = re.compile(r"(?:corrupted|truncated) record at (\d+)")


@contextlib.contextmanager
def reading(name: str, split: str | None = None, use_cached: bool = False) -> Iterator[None]:
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
    seqio = import_seqio()
    from pemoe_jax.data import tfrecords

    for task in map(check_task, cached_subtasks(name) if use_cached else subtasks(name)):
        wanted = split or eval_split(task.name)
        if wanted is None or wanted not in task.splits:
            continue
        cached = use_cached and task.supports_caching
        source = task._get_cached_source(wanted) if cached else task.source
        if not isinstance(source, seqio.FileDataSource):
            continue
        for path in filter(os.path.isfile, source.list_shards(wanted)):
            try:
                tfrecords.RecordFile(path).check_at(offset)
            except InputError as error:
                return str(error)
    return ""


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceGroup:
    """One input with all its answer choices, as token ids that end in EOS."""

    task: str
    idx: int  # the example's number in its split
    inputs: np.ndarray  # int32 [Li]
    choices: tuple[np.ndarray, ...]  # C times int32 [Lt]
    is_correct: tuple[
        bool, ...
    ]  # several where choices are doubled, none where the target is not among them
    input_text: str
    choice_texts: tuple[str, ...]
    cut_input: bool
    cut_target: bool
    sentence: np.ndarray | None = None  # [S], for routers that read it

    @property
    def odd(self) -> tuple[str, ...]:
        """What is odd about it, in the words of results.json."""
        found = {
            "target_not_in_choices": not any(self.is_correct),
            "doubled_choices": len(set(self.choice_texts)) < len(self.choice_texts),
            "empty_input": not self.input_text.strip(),
            "cut_input": self.cut_input,
            "cut_target": self.cut_target,
        }
        return tuple(kind for kind, is_so in found.items() if is_so)


def choice_groups(
    name: str,
    task_feature_lengths: Mapping[str, int],
    *,
    split: str | None = None,
    max_examples: int | None = None,
    use_cached: bool = False,
) -> list[ChoiceGroup]:
    """The examples of a `_score_eval` task, whose rows are choices with `idx` and `is_correct`.

    Of a mixture, those of its tasks, one after the other: much faster than task by task for the
    mixtures that `tasks.jsonl` makes. Of the evaluation split unless `split` names another; at most
    `max_examples` a task. Sequences beyond the lengths are cut and keep their EOS.
    """
    seqio = import_seqio()
    lengths = checked_lengths(task_feature_lengths)
    if max_examples is not None:
        check_count("max_examples", max_examples, 1)
    # One token more than allowed: so one that has to be cut can be told from one that just fits.
    longer = {key: length + 1 for key, length in lengths.items()}
    provider = check_task(name)
    names = cached_subtasks(name) if use_cached else subtasks(name)
    if not isinstance(provider, seqio.Mixture):
        found = split or eval_split(name)
        if found not in provider.splits:
            wanted = repr(split) if split else "evaluation"
            raise InputError(
                f"{name!r} has no {wanted} split (it has: {', '.join(sorted(provider.splits))})"
            )
        if not use_cached:
            check_files([name], found)
        with reading(name, found, use_cached):
            ds = provider.get_dataset(
                longer, split=found, use_cached=use_cached, shuffle=False, seed=0, num_epochs=1
            )
        starts = [(name, 0)]
    elif hasattr(provider, "every_example") and split is None and not use_cached:
        ds, starts = provider.every_example(longer, in_turns=False)
    else:
        of_task = functools.partial(
            choice_groups, split=split, max_examples=max_examples, use_cached=use_cached
        )
        return [group for task in names for group in of_task(task, lengths)]
    missing = [key for key in ("idx", "is_correct") if key not in ds.element_spec]
    if missing:
        twin = f"{name}_score_eval"
        hint = f"; did you mean {twin!r}?" if twin in seqio.TaskRegistry.names() else ""
        raise InputError(
            f"{name!r} has no answer choices to score (no feature {missing[0]!r}){hint}"
        )
    features = provider.output_features
    eos_ids = {key: features[key].vocabulary.eos_id for key in lengths}

    groups = []
    counts: collections.Counter[str] = collections.Counter()
    first_rows = [start for _, start in starts]
    stream: Iterator[Any] = arrays(ds, name, split, use_cached)
    if use_cached:  # seqio's own caches are shuffled, choices of one example apart
        stream = iter(sorted(stream, key=lambda row: tuple(row["idx"])))
    for number, members in itertools.groupby(stream, key=lambda row: int(row["idx"][0])):
        task, start = starts[bisect.bisect_right(first_rows, number) - 1]
        counts[task] += 1
        if max_examples is not None and counts[task] > max_examples:
            if task == starts[-1][0]:
                break
            continue
        rows = list(members)
        inputs, cut_input = cut(rows[0]["inputs"], lengths["inputs"], eos_ids["inputs"])
        targets = [cut(row["targets"], lengths["targets"], eos_ids["targets"]) for row in rows]
        groups.append(
            ChoiceGroup(
                task=task,
                idx=number - start,
                inputs=inputs,
                choices=tuple(ids for ids, _ in targets),
                is_correct=tuple(bool(row["is_correct"]) for row in rows),
                input_text=text_of(features, rows[0], "inputs"),
                choice_texts=tuple(text_of(features, row, "targets") for row in rows),
                cut_input=cut_input,
                cut_target=any(was_cut for _, was_cut in targets),
                sentence=rows[0].get(SENTENCE),
            )
        )
    return groups


def cut(ids: np.ndarray, length: int, eos_id: int) -> tuple[np.ndarray, bool]:
    """Token ids, at most `length` of them; an EOS at their end stays. -> (int32 ids, was it cut)"""
    ids = np.asarray(ids, np.int32)
    if len(ids) <= length:
        return ids, False
    return (np.append(ids[: length - 1], ids[-1]) if ids[-1] == eos_id else ids[:length]), True


def text_of(features: Any, row: Mapping[str, Any], key: str) -> str:
    """What was tokenised to a row's feature; decoded where the text is not there."""
    text = row.get(f"{key}_pretokenized")
    if text is None:  # a cache may have been written without the text
        return features[key].vocabulary.decode([int(i) for i in row[key]])
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
