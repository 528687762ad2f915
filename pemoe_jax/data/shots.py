"""Shots: solved examples that are put in front of an input, for few-shot evaluation.

A few-shot input is `[header] [shot] … [shot] [input]`. A shot is an input, its target and a blank
line. It has no EOS, because the encoder reads one sequence, which ends in the EOS of the input.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data import choices, seqio_import, seqio_tasks
from pemoe_jax.data.choices import ChoiceGroup
from pemoe_jax.data.seekable_tasks import SeekableTask, StreamOptions
from pemoe_jax.runtime import options, progress

_SPLIT = "train"
# Solved examples are truncated to this many tokens, or to limit + 1 if that is more. So long inputs
# with a common beginning stay distinct, and a truncated example never fits in front of an input.
_MIN_READ_LENGTH = 1 << 16
# Separators after the input and the target of a shot. SentencePiece drops them, as its pieces begin
# with a space anyway; byte vocabularies keep them.
_AFTER_INPUT, _AFTER_TARGET = " ", "\n\n"


@dataclasses.dataclass(frozen=True, eq=False)
class SolvedExample:
    """An input and its target.

    Attributes:
      inputs, targets: token ids, with or without EOS.
      input_text, target_text: the texts of these ids.
    """

    inputs: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray
    input_text: str = ""
    target_text: str = ""


class TaskWithShots(abc.ABC):
    """A seqio task that prescribes the solved examples for its shots, as benchmarks do.

    An input that is itself one of its shots gets the next example instead, or one shot fewer if
    there is no next one.
    """

    @abc.abstractmethod
    def solved_examples(self) -> Sequence[SolvedExample]:
        """Returns the examples; the first SHOTS of them are the shots, in this order."""

    def shots_header(self) -> Sequence[int]:
        """Returns the token ids, without EOS, in front of the first shot."""
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class TaskShots:
    """The shots of a task.

    Attributes:
      task: name of the task.
      count: number of shots in front of an input.
      examples: solved examples with distinct inputs, in order: `count` + 1, or `count` if the task
        has no more. The last one replaces a shot that is the evaluated input itself.
      vocabulary: the seqio vocabulary of inputs.
      header: token ids in front of the first shot.
      is_prescribed: whether the examples are those of a `TaskWithShots`.
    """

    task: str
    count: int
    examples: Sequence[SolvedExample]
    vocabulary: Any
    header: Sequence[int] = ()
    is_prescribed: bool = False

    def prepend_to(self, inputs: np.ndarray, limit: int) -> tuple[np.ndarray, int]:
        """Puts the first shots in front of an input, skipping a shot with the same input.

        Args:
          inputs, limit: see `prepend_shots`.

        Returns:
          The token ids, int32, and the number of shots among them.

        Raises:
          InputError: too few shots remain without the skipped one, and the examples are not
            prescribed.
        """
        own_key = input_key(inputs, self.vocabulary.eos_id)
        keys = (input_key(example.inputs, self.vocabulary.eos_id) for example in self.examples)
        others = [shot for key, shot in zip(keys, self.tokens, strict=True) if key != own_key]
        if len(others) < self.count and not self.is_prescribed:
            raise InputError(
                f"SHOTS must be at most {len(others)} for {self.task!r}, as one of its"
                f" {len(self.examples)} solved examples is also evaluated, got {self.count}"
            )
        shots = others[: self.count]
        tokens, num_left_out = prepend_shots(shots, inputs, limit, self.header)
        return tokens, len(shots) - num_left_out

    @functools.cached_property
    def tokens(self) -> list[np.ndarray]:
        """Token ids of each shot."""
        return [shot_tokens(example, self.vocabulary) for example in self.examples]


# --- reading ---


def load_shots(
    names: Sequence[str], few_shot: options.FewShot, limit: int, use_cached: bool = False
) -> dict[str, TaskShots]:
    """Returns the shots of each task.

    A `TaskWithShots` prescribes its shots. Those of other tasks are drawn from the train split, by
    seed and name: a task `<name>_score_eval` and its task `<name>` have the same shots.

    Args:
      names: the tasks.
      few_shot: number and seed of the shots.
      limit: largest number of tokens of an input with its shots.
      use_cached: whether to read seqio's offline caches.

    Raises:
      InputError: a task has neither shots of its own nor a train split, has too few examples, or
        cannot be read.
    """
    check_integer("SHOTS", few_shot.shots, minimum=0)
    sources = {name: _find_source(name, use_cached) for name in names}
    missing = [name for name, source in sources.items() if source is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"SHOTS must be 0 for tasks without a {_SPLIT!r} split, got {few_shot.shots}:"
            f" {', '.join(missing[:3])}{more}"
        )
    shots: dict[str, TaskShots] = {}
    # With a bar: TensorFlow takes 0.3 s of CPU time to build the pipeline of each task.
    bar = progress.Progress("reading shots", len(sources), note="tasks")
    try:
        for name, source in sources.items():
            assert source is not None
            shots[name] = _load_task_shots(name, source, few_shot, limit, use_cached)
            bar.report_if_slow(len(shots), "tasks")
    finally:
        bar.close()
    return shots


def _find_source(name: str, use_cached: bool) -> str | None:
    """Returns the name of the task that provides the shots of a task; None if there is none."""
    if isinstance(seqio_tasks.get_mixture_or_task(name), TaskWithShots):
        return name
    registered = seqio_import.import_seqio().TaskRegistry.names()
    # The plain task comes first: a `_score_eval` task has a row for each choice, which takes longer
    # to read, and all of them must be read for a random sample.
    for candidate in dict.fromkeys([_plain_name(name), name]):
        if (
            candidate in registered
            and seqio_tasks.has_data(candidate, use_cached)
            and _SPLIT in seqio_tasks.get_mixture_or_task(candidate).splits
        ):
            return candidate
    return None


def _plain_name(name: str) -> str:
    return name.removesuffix("_score_eval")


def _load_task_shots(
    name: str, source: str, few_shot: options.FewShot, limit: int, use_cached: bool
) -> TaskShots:
    task = seqio_tasks.get_mixture_or_task(source)
    vocabulary = task.output_features["inputs"].vocabulary
    header: Sequence[int] = ()
    # One example more than SHOTS, as an evaluated input may be among them.
    num_examples = few_shot.shots + 1
    if isinstance(task, TaskWithShots):
        examples: Iterable[SolvedExample] = task.solved_examples()
        header = task.shots_header()
    else:
        seed = draw_seed(few_shot.seed, _plain_name(name))
        examples = _read_shuffled(source, seed, num_examples, limit, use_cached)
    distinct: dict[bytes, SolvedExample] = {}
    for example in examples:
        # The same example twice would teach nothing and use up tokens.
        distinct.setdefault(input_key(example.inputs, vocabulary.eos_id), example)
        if len(distinct) == num_examples:
            break
    if len(distinct) < few_shot.shots:
        raise InputError(
            f"SHOTS must be at most {len(distinct)} for {name!r}, the number of its solved examples"
            f" with different inputs, got {few_shot.shots}"
        )
    is_prescribed = isinstance(task, TaskWithShots)
    return TaskShots(name, few_shot.shots, [*distinct.values()], vocabulary, header, is_prescribed)


def _read_shuffled(
    source: str, seed: int, min_examples: int, limit: int, use_cached: bool
) -> Iterator[SolvedExample]:
    """Yields solved examples of a train split in an order that a seed determines.

    Yields at least `min_examples`, or all if the split has fewer. Inputs may repeat.
    """
    task = seqio_tasks.get_mixture_or_task(source)
    if not use_cached:
        seqio_tasks.check_source_files([source], _SPLIT)
    length = max(_MIN_READ_LENGTH, limit + 1)
    lengths = {"inputs": length, "targets": length}
    with seqio_tasks.translate_read_errors(source, _SPLIT, use_cached):
        ds = None
        if isinstance(task, SeekableTask) and source == _plain_name(source):
            # Random access, because a train split may have hundreds of thousands of rows.
            stream = StreamOptions(seed, num_epochs=1, include_text=True)
            read = task.cached_examples_from if use_cached else task.examples_from
            ds = read(lengths, _SPLIT, stream)
        is_shuffled = ds is not None
        if ds is None:
            ds = seqio_tasks.get_dataset(source, lengths, _SPLIT, use_cached)
    with contextlib.closing(seqio_tasks.numpy_iterator(ds, source, _SPLIT, use_cached)) as rows:
        examples = _solved_examples(source, rows)
        yield from examples if is_shuffled else draw(examples, min_examples, seed)


def _solved_examples(source: str, rows: Iterable[seqio_tasks.Row]) -> Iterator[SolvedExample]:
    """Yields the examples of rows with a target, except rows of wrong answer choices."""
    features = seqio_tasks.get_mixture_or_task(source).output_features
    vocabulary = features["inputs"].vocabulary
    for number, row in enumerate(rows, 1):
        if not row.get("is_correct", True):
            continue
        seqio_tasks.check_ids(features, row, f"{source}: {_SPLIT} row {number}")
        targets = row["targets"]
        target_text = choices.feature_text(features, row, "targets")
        # A shot's target is part of the encoder's input, so it has the ids of that vocabulary.
        if features["targets"].vocabulary != vocabulary:
            targets = vocabulary.encode(target_text)
        if len(strip_eos(targets, vocabulary.eos_id)):
            input_text = choices.feature_text(features, row, "inputs")
            yield SolvedExample(row["inputs"], targets, input_text, target_text)


# --- drawing ---


def draw(examples: Iterable[SolvedExample], count: int, seed: int) -> list[SolvedExample]:
    """Returns a random sample of `count` examples with distinct inputs, or all if there are fewer.

    The sample has the inputs whose hashes with the seed are smallest. So it does not depend on the
    order of the inputs, and only `count` + 1 examples are held in memory. Of examples with equal
    inputs, the first is taken.
    """
    drawn: dict[bytes, SolvedExample] = {}
    for example in examples:
        content = np.asarray(example.inputs, np.int32).tobytes()
        drawn.setdefault(hashlib.blake2b(content, salt=seed.to_bytes(8, "big")).digest(), example)
        if len(drawn) > count:
            del drawn[max(drawn)]
    return [drawn[key] for key in sorted(drawn)]


def draw_seed(seed: int, task: str) -> int:
    """Returns the seed of a task's shots, 31 bits; `hash` would differ between processes."""
    digest = hashlib.blake2b(f"{seed} {task}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


# --- few-shot inputs ---


def add_shots(
    groups: Sequence[ChoiceGroup], shots: Mapping[str, TaskShots], limit: int
) -> list[ChoiceGroup]:
    """Returns the groups, with the shots of their tasks in front of the inputs.

    Args:
      groups: inputs with their choices.
      shots: task -> shots.
      limit: largest number of tokens of an input.

    Raises:
      InputError: see `TaskShots.prepend_to`.
    """
    groups_with_shots = []
    for group in groups:
        inputs, num_shots = shots[group.task].prepend_to(group.inputs, limit)
        groups_with_shots.append(dataclasses.replace(group, inputs=inputs, num_shots=num_shots))
    return groups_with_shots


def shot_tokens(example: SolvedExample, vocabulary: Any) -> np.ndarray:
    """Returns the token ids of a shot, int32, in a seqio vocabulary."""
    eos_id = vocabulary.eos_id
    parts = [
        strip_eos(example.inputs, eos_id),
        vocabulary.encode(_AFTER_INPUT),
        strip_eos(example.targets, eos_id),
        vocabulary.encode(_AFTER_TARGET),
    ]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def strip_eos(ids: Sequence[int] | np.ndarray, eos_id: int) -> np.ndarray:
    """Returns token ids without an EOS at their end, int32."""
    ids = np.asarray(ids, np.int32)
    return ids[:-1] if len(ids) and ids[-1] == eos_id else ids


def input_key(inputs: Sequence[int] | np.ndarray, eos_id: int) -> bytes:
    """Returns a hashable key of an input's token ids, which ignores an EOS at their end."""
    return strip_eos(inputs, eos_id).tobytes()


def prepend_shots(
    shots: Sequence[np.ndarray],
    inputs: np.ndarray,
    limit: int,
    header: Sequence[int] | np.ndarray = (),
) -> tuple[np.ndarray, int]:
    """Puts the shots that fit in front of an input.

    Shots that do not fit are left out whole, beginning with the first. The header is left out if it
    does not fit even without shots. The input itself is never truncated.

    Args:
      shots: token ids of each shot, in order.
      inputs: token ids of the input.
      limit: largest number of tokens.
      header: token ids in front of the first shot.

    Returns:
      The token ids, int32, and the number of shots that were left out.
    """
    room = limit - len(inputs)
    if len(header) > room:
        header = ()
    room -= len(header)
    # The last shots are added first, so that the first ones are left out.
    num_left_out = len(shots)
    while num_left_out and len(shots[num_left_out - 1]) <= room:
        num_left_out -= 1
        room -= len(shots[num_left_out])
    parts = [header, *shots[num_left_out:], inputs]
    return np.concatenate([np.asarray(part, np.int32) for part in parts]), num_left_out
