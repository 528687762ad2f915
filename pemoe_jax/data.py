"""seqio tasks as numpy batches: packed ones to train on, answer choices grouped to be ranked.

Everything here works for any registered seqio task or mixture. TensorFlow does the reading and
never sees a GPU. Shapes: `B` batch, `L` length, `C` answer choices.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import difflib
import functools
import itertools
import os
import queue
import re
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from pemoe_jax.core.errors import InputError

Batch = dict[str, np.ndarray]
T = TypeVar("T")

EVAL_SPLITS = ("validation", "val", "test")  # the first that exists is a task's evaluation split

# Names that a user may well ask for and that could not be registered, with the reason.
unregistered: dict[str, str] = {}


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


@functools.cache
def import_seqio() -> Any:
    """seqio (8 s at the first call), with GPUs hidden from the TensorFlow that comes with it.

    Environment: TF_CPP_MIN_LOG_LEVEL=0 shows all that TensorFlow writes to stderr, as it comes.
    """
    # Below 3, cuInit's failure is printed on every CPU machine.
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.nullcontext() if level == "0" else _without_chatter():
        import tensorflow as tf

        # Where the caller has started TensorFlow already, what it may see is the caller's business.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
        import seqio

    return seqio


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


def _lengths(task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    lengths = {}
    for key in ("inputs", "targets"):
        length = task_feature_lengths.get(key)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise InputError(
                f"TASK_FEATURE_LENGTHS must give {key!r} a positive integer, found {length!r}"
            )
        lengths[key] = length
    return lengths


def _check_files(tasks: Iterable[str], split: str | None) -> None:
    """Lets sources that count their rows find what is wrong before seqio logs it at length."""
    for task in map(check_task, tasks):
        if split in task.splits:
            task.num_input_examples(split)


def _check_count(what: str, value: Any, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise InputError(f"{what} must be an integer of at least {least}, found {value!r}")


def train_batches(
    name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    split: str = "train",
    seed: int = 0,
    pack: bool = True,
    shuffle: bool = True,
    skip: int = 0,
    num_epochs: int | None = None,
    use_cached: bool = False,
) -> Iterator[Batch]:
    """Batches of int32 [B, L] in T5X's names, the same for the same seed; a part of one is dropped.

    `skip` leaves out that many batches (a resumed run goes on where it stopped; they are read and
    thrown away). `num_epochs` None repeats for ever; for a mixture, seqio ends at the first task
    that is used up. Input errors are raised by the call, not by the first `next`.
    """
    seqio = import_seqio()
    lengths = _lengths(task_feature_lengths)
    _check_count("BATCH_SIZE", batch_size, 1)
    _check_count("skip", skip, 0)
    splits = check_task(name).splits
    if split not in splits:
        raise InputError(f"{name!r} has no split {split!r} (it has: {', '.join(sorted(splits))})")
    if not use_cached:
        _check_files(subtasks(name), split)
    ds = seqio.get_dataset(
        name,
        lengths,
        seqio.EncDecFeatureConverter(pack=pack),
        dataset_split=split,
        use_cached=use_cached,
        shuffle=shuffle,
        num_epochs=num_epochs,
        seed=seed,
        verbose=False,
    )
    ds = ds.batch(batch_size, drop_remainder=True).skip(skip).prefetch(2)
    return _as_int32(ds)


def eval_batches(
    name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    max_batches: int | None = None,
    *,
    pack: bool = True,
    use_cached: bool = False,
) -> Iterator[Batch]:
    """Every example of the evaluation splits once; tasks take turns, so the first batches show all.

    Tasks without an evaluation split are left out (InputError where none has one). The last batch
    is filled up with zeros, which weigh nothing. Building it costs some milliseconds a task: keep
    the list for repeated use.
    """
    seqio = import_seqio()
    import tensorflow as tf

    lengths = _lengths(task_feature_lengths)
    _check_count("BATCH_SIZE", batch_size, 1)
    splits = {task: eval_split(task) for task in subtasks(name)}
    splits = {task: split for task, split in splits.items() if split is not None}
    if not splits:
        raise InputError(f"no task of {name!r} has an evaluation split ({', '.join(EVAL_SPLITS)})")

    def only(example: Mapping[str, Any]) -> dict[str, Any]:
        return {key: example[key] for key in ("inputs", "targets")}

    provider = check_task(name)
    if hasattr(provider, "every_example") and not use_cached:
        ds, _ = provider.every_example(lengths, in_turns=True)  # one pipeline instead of one a task
        ds = ds.map(only)
    else:
        datasets = [
            check_task(task)
            .get_dataset(
                lengths, split=split, use_cached=use_cached, shuffle=False, seed=0, num_epochs=1
            )
            .map(only)
            for task, split in splits.items()
        ]
        turns = tf.data.Dataset.range(len(datasets)).repeat()
        ds = tf.data.Dataset.choose_from_datasets(datasets, turns, stop_on_empty_dataset=False)
    ds = seqio.EncDecFeatureConverter(pack=pack)(ds, task_feature_lengths=lengths).batch(batch_size)
    if max_batches is not None:
        _check_count("max_batches", max_batches, 1)
        ds = ds.take(max_batches)

    def fill(batch: Batch) -> Batch:
        missing = batch_size - len(batch["decoder_target_tokens"])
        return {key: np.pad(value, ((0, missing), (0, 0))) for key, value in batch.items()}

    return map(fill, _as_int32(ds))


def _as_int32(ds: Any) -> Iterator[Batch]:
    for batch in ds.as_numpy_iterator():
        yield {key: np.asarray(value, np.int32) for key, value in batch.items()}


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
    lengths = _lengths(task_feature_lengths)
    if max_examples is not None:
        _check_count("max_examples", max_examples, 1)
    # One token more than allowed: so one that has to be cut can be told from one that just fits.
    longer = {key: length + 1 for key, length in lengths.items()}
    provider = check_task(name)
    if not isinstance(provider, seqio.Mixture):
        found = split or eval_split(name)
        if found not in provider.splits:
            wanted = repr(split) if split else "evaluation"
            raise InputError(
                f"{name!r} has no {wanted} split (it has: {', '.join(sorted(provider.splits))})"
            )
        if not use_cached:
            _check_files([name], found)
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
        return [group for task in subtasks(name) for group in of_task(task, lengths)]
    missing = [key for key in ("idx", "is_correct") if key not in ds.element_spec]
    if missing:
        twin = f"{name}_score_eval"
        hint = f"; did you mean {twin!r}?" if twin in seqio.TaskRegistry.names() else ""
        raise InputError(
            f"{name!r} has no answer choices to score (no feature {missing[0]!r}){hint}"
        )
    features = provider.output_features

    def cut(key: str, ids: np.ndarray) -> tuple[np.ndarray, bool]:
        length = lengths[key]
        ids = np.asarray(ids, np.int32)
        if len(ids) <= length:
            return ids, False
        eos = ids[-1] == features[key].vocabulary.eos_id
        return (np.append(ids[: length - 1], ids[-1]) if eos else ids[:length]), True

    groups = []
    counts: collections.Counter[str] = collections.Counter()
    first_rows = [start for _, start in starts]
    for number, members in itertools.groupby(
        ds.as_numpy_iterator(), key=lambda row: int(row["idx"][0])
    ):
        task, start = starts[bisect.bisect_right(first_rows, number) - 1]
        counts[task] += 1
        if max_examples is not None and counts[task] > max_examples:
            if task == starts[-1][0]:
                break
            continue
        rows = list(members)
        inputs, cut_input = cut("inputs", rows[0]["inputs"])
        targets = [cut("targets", row["targets"]) for row in rows]
        groups.append(
            ChoiceGroup(
                task=task,
                idx=number - start,
                inputs=inputs,
                choices=tuple(ids for ids, _ in targets),
                is_correct=tuple(bool(row["is_correct"]) for row in rows),
                input_text=_text(features, rows[0], "inputs"),
                choice_texts=tuple(_text(features, row, "targets") for row in rows),
                cut_input=cut_input,
                cut_target=any(was_cut for _, was_cut in targets),
            )
        )
    return groups


def _text(features: Any, row: Mapping[str, Any], key: str) -> str:
    text = row.get(f"{key}_pretokenized")
    if text is None:  # a cache may have been written without the text
        return features[key].vocabulary.decode([int(i) for i in row[key]])
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _rung(n: int, start: int, fine_from: int) -> int:
    """The least rung >= n of a ladder of doublings, with half steps from `fine_from` on."""
    rung = start
    while rung < n:
        if rung >= fine_from and rung * 3 // 2 >= n:
            return rung * 3 // 2
        rung *= 2
    return rung


def score_batches(
    groups: Sequence[ChoiceGroup],
    batch_size: int,
    *,
    multiple_of: int = 1,
    max_target_tokens: int = 16384,
) -> Iterator[tuple[Batch, list[ChoiceGroup]]]:
    """Batches encoder_input_tokens [B, Li], decoder_input_tokens, decoder_target_tokens [B, C, Lt].

    The first rows are the returned groups, in order; the others, and the choices beyond a group's
    own, are zeros. Groups are sorted by size and lengths rounded up to few values, so that little
    is padding and few shapes are compiled. A bucket of many or long choices has fewer rows, so that
    B * C * Lt stays within `max_target_tokens`; B is always a multiple of `multiple_of` (devices),
    which must divide `batch_size`.
    """
    _check_count("BATCH_SIZE", batch_size, 1)
    if batch_size % multiple_of:
        raise InputError(
            f"BATCH_SIZE {batch_size} is not a multiple of the number of devices, {multiple_of}"
        )
    buckets: dict[tuple[int, int], list[ChoiceGroup]] = collections.defaultdict(list)
    for group in groups:
        num_choices = _rung(len(group.choices), 2, 2)
        target_length = _rung(max(len(ids) for ids in group.choices), 4, 1 << 30)
        buckets[num_choices, target_length].append(group)
    for (num_choices, target_length), members in sorted(buckets.items(), reverse=True):
        members.sort(
            key=lambda group: -len(group.inputs)
        )  # the largest first: what does not fit fails at once
        affordable = max_target_tokens // (num_choices * target_length)
        rows = max(multiple_of, min(batch_size, affordable // multiple_of * multiple_of))
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            input_length = _rung(len(part[0].inputs), 32, 128)
            inputs = np.zeros((rows, input_length), np.int32)
            targets = np.zeros((rows, num_choices, target_length), np.int32)
            for i, group in enumerate(part):
                inputs[i, : len(group.inputs)] = group.inputs
                for j, ids in enumerate(group.choices):
                    targets[i, j, : len(ids)] = ids
            shifted = np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0)))
            batch = {
                "encoder_input_tokens": inputs,
                "decoder_input_tokens": shifted,
                "decoder_target_tokens": targets,
            }
            yield batch, part


def prefetch(iterator: Iterable[T], size: int = 2) -> Generator[T, None, None]:
    """The same items, made up to `size` ahead by a thread; its exceptions are raised here.

    Closing the returned generator ends the thread.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue(max(1, size))
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                items.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in iterator:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # whatever it is belongs to the reader of the items
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join(timeout=5)
