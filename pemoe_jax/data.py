"""seqio's tasks looked up and read as numpy: answer choices grouped and batched to be ranked.

Everything here works for any registered seqio task or mixture; `feed` has batches to train on.
TensorFlow does the reading and never sees a GPU. Shapes: `B` batch, `L` length, `C` answer choices.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from pemoe_jax.core.errors import InputError

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
    from pemoe_jax.tasks import p3_rows

    p3_rows.told(f"{name}: no cache of {of}{', '.join(missing[:3])}{', …' * (len(missing) > 3)}")
    return [task.name for task in tasks if task.name not in missing]


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
        raise InputError(damaged or f"reading {name!r}: {_first_line(message)}") from error
    except UnicodeDecodeError as error:  # TensorFlow quotes data that it cannot parse
        quoted = error.object.decode("ascii", "replace")
        raise InputError(f"reading {name!r}: {_first_line(quoted)}") from error


def _first_line(message: str) -> str:
    """Of what TensorFlow says, less where in its graph it was."""
    line = message.strip().splitlines()[0]
    where = r"^\{\{.*?\}\} |Error in user-defined .* with iterator: \S+ | \[Op:.*$"
    return re.sub(where, "", line)[:200]


def _damaged_file(name: str, split: str | None, use_cached: bool, offset: int) -> str:
    """What is wrong with the tfrecord that is damaged at a byte; '' where none is found."""
    seqio = import_seqio()
    from pemoe_jax.tasks import p3_records

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
                p3_records.RecordFile(path).check_at(offset)
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


Shape = tuple[int, int, int]  # of a scoring program, less its rows: Li, C, Lt

# What a target token costs beside an input token, for its logits: 1.7 in T5 Small, 1.1 in XL.
_TARGET_COST = 2


def _rung(n: int, least: int, steps: int) -> int:
    """The least number >= n of `least`, its doubles, and `steps` - 1 even steps between those."""
    start = least
    while 2 * start < n:
        start *= 2
    ladder = (start + start * i // steps for i in range(steps + 1))
    return next(rung for rung in ladder if rung >= n)


def _by_shape(sizes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Numbers of sizes by the size rounded up, to no more shapes than are quick to plan with."""
    found: dict[Shape, list[int]] = {}
    for steps in (4, 2, 1):
        found = collections.defaultdict(list)
        for number, (inputs, choices, targets) in enumerate(sizes):
            shape = _rung(inputs, 32, steps), _rung(choices, 1, steps), _rung(targets, 4, steps)
            found[shape].append(number)
        if len(found) <= 256:
            break
    return dict(sorted(found.items()))


def _plan(
    counts: Mapping[Shape, int],
    rows_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    program_cost: int,
    max_programs: int,
) -> dict[Shape, Shape]:
    """Which shape each shape is padded to: the pair that saves most is merged, again and again.

    Args:
      counts: shape -> how many are of it.
      rows_of: (shapes [..., 3], how many are of each [...]) -> rows of a batch [...].
      program_cost, max_programs: as of `score_batches`.
    """
    shapes = np.array(list(counts), np.int64).reshape(-1, 3)
    sizes = np.array(list(counts.values()), np.int64)
    members = [[shape] for shape in counts]

    def cost(shapes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        rows = rows_of(shapes, sizes)
        row = shapes[..., 0] + _TARGET_COST * shapes[..., 1] * shapes[..., 2]
        return program_cost + -(-sizes // rows) * rows * row

    while len(members) > 1:
        alone = cost(shapes, sizes)
        merged = np.maximum(shapes[:, None], shapes[None])  # [N, N, 3]
        together = cost(merged, sizes[:, None] + sizes[None])
        saved = alone[:, None] + alone[None] - together
        np.fill_diagonal(saved, np.iinfo(np.int64).min)
        one, other = sorted(map(int, np.unravel_index(saved.argmax(), saved.shape)))
        if saved[one, other] < 0 and len(members) <= max_programs:
            break
        shapes[one], sizes[one] = merged[one, other], sizes[one] + sizes[other]
        members[one] += members.pop(other)
        shapes, sizes = np.delete(shapes, other, 0), np.delete(sizes, other)
    return {
        shape: (int(to[0]), int(to[1]), int(to[2]))
        for to, joined in zip(shapes, members, strict=True)
        for shape in joined
    }


def _buckets(
    sizes: Sequence[Shape],
    batch_size: int,
    multiple_of: int,
    max_target_tokens: int,
    program_cost: int,
    max_programs: int,
) -> Iterator[tuple[Shape, int, list[int]]]:
    """Of each batch its shape, its rows, and the numbers of the sizes in it; the largest first."""
    check_count("BATCH_SIZE", batch_size, 1)
    if batch_size % multiple_of:
        raise InputError(
            f"BATCH_SIZE {batch_size} is not a multiple of the number of devices, {multiple_of}"
        )

    def rows_of(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        affordable = max_target_tokens // (shapes[..., 1] * shapes[..., 2])
        most = np.clip(affordable // multiple_of * multiple_of, multiple_of, batch_size)
        even = -(-counts // -(-counts // most))  # no batch much smaller than the others
        return -(-even // multiple_of) * multiple_of

    of_shape = _by_shape(sizes)
    counts = {shape: len(numbers) for shape, numbers in of_shape.items()}
    buckets: dict[Shape, list[int]] = collections.defaultdict(list)
    for shape, padded in _plan(counts, rows_of, program_cost, max_programs).items():
        buckets[padded] += of_shape[shape]
    for shape in sorted(buckets, key=lambda s: s[0] + _TARGET_COST * s[1] * s[2], reverse=True):
        numbers = buckets[shape]
        rows = int(rows_of(np.array(shape), np.array(len(numbers))))
        for start in range(0, len(numbers), rows):
            yield shape, rows, numbers[start : start + rows]


def score_batches(
    groups: Sequence[ChoiceGroup],
    batch_size: int,
    *,
    multiple_of: int = 1,
    max_target_tokens: int = 16384,
    program_cost: int = 16384,
    max_programs: int = 16,
) -> Iterator[tuple[Batch, list[ChoiceGroup]]]:
    """Batches encoder_input_tokens [B, Li], decoder_input_tokens, decoder_target_tokens [B, C, Lt].

    The first rows are the returned groups, in order; the others, and the choices beyond a group's
    own, are zeros. Groups of like size share a shape, the largest first: what does not fit in
    memory fails at once.

    Args:
      groups: what is scored.
      batch_size: most rows.
      multiple_of: B is a multiple of it (devices); it must divide `batch_size`.
      max_target_tokens: a shape of many or long choices has fewer rows, so that B * C * Lt stays
        within this.
      program_cost: what compiling a shape is worth in tokens of padding. On two cores it takes as
        long as scoring 5,000 (T5 Small) to 30,000 (Tiny); on accelerators as many more.
      max_programs: most shapes, whatever they save.

    Raises:
      InputError: `batch_size` is not a positive multiple of `multiple_of`.
    """
    sizes = [
        (len(group.inputs), len(group.choices), max(map(len, group.choices))) for group in groups
    ]
    limits = (multiple_of, max_target_tokens, program_cost, max_programs)
    for shape, rows, numbers in _buckets(sizes, batch_size, *limits):
        part = [groups[number] for number in numbers]
        yield _filled(part, rows, shape), part


def _filled(groups: Sequence[ChoiceGroup], rows: int, shape: Shape) -> Batch:
    """The groups and rows of zeros, in T5X's names; sentence embeddings where all have one."""
    input_length, num_choices, target_length = shape
    targets = np.zeros((rows, num_choices, target_length), np.int32)
    for i, group in enumerate(groups):
        for j, ids in enumerate(group.choices):
            targets[i, j, : len(ids)] = ids
    batch = {
        "encoder_input_tokens": _padded([group.inputs for group in groups], rows, input_length),
        "decoder_input_tokens": np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }
    sentences = [group.sentence for group in groups if group.sentence is not None]
    if len(sentences) == len(groups):
        missing = ((0, rows - len(groups)), (0, 0))
        batch["sentence_embeddings"] = np.pad(np.stack(sentences, dtype=np.float32), missing)
    return batch


def _padded(sequences: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """Token ids -> int32 [rows, length], with zeros behind and below."""
    result = np.zeros((rows, length), np.int32)
    for row, ids in zip(result, sequences, strict=False):
        row[: len(ids)] = ids
    return result


def input_batches(
    inputs: Sequence[np.ndarray],
    batch_size: int,
    *,
    multiple_of: int = 1,
    program_cost: int = 1 << 16,
    max_programs: int = 6,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Batches encoder_input_tokens int32 [B, Li] to decode from, and whose rows they are.

    The numbers are places in `inputs`; rows beyond them repeat the last, and so end with it. A
    decoder has more to compile than `score_batches` reckons with, so shapes are fewer.

    Args:
      inputs: token ids of each, of any length.
      batch_size, multiple_of, program_cost, max_programs: as of `score_batches`.

    Raises:
      InputError: `batch_size` is not a positive multiple of `multiple_of`.
    """
    sizes = [(len(ids), 1, 1) for ids in inputs]
    limits = (multiple_of, 4 * batch_size, program_cost, max_programs)
    for shape, rows, numbers in _buckets(sizes, batch_size, *limits):
        last = [inputs[numbers[-1]]] * (rows - len(numbers))
        yield _padded([inputs[number] for number in numbers] + last, rows, shape[0]), numbers
