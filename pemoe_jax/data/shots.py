"""Shots: solved examples that are put in front of an input, for few-shot evaluation.

A few-shot input is `[header] [shot] … [shot] [input]`. A shot is an input, its target and a blank
line. It ends in no EOS, so that the encoder reads one sequence with the input's EOS alone.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# What follows the input and the target of a shot. SentencePiece drops them, as its pieces begin
# with a space anyway; byte vocabularies keep them.
_AFTER_INPUT, _AFTER_TARGET = " ", "\n\n"


@dataclasses.dataclass(frozen=True, eq=False)
class SolvedExample:
    """An input and its target.

    Attributes:
      inputs, targets: token ids, with or without EOS.
      input_text, target_text: the text that was tokenized.
    """

    inputs: Sequence[int] | np.ndarray
    targets: Sequence[int] | np.ndarray
    input_text: str = ""
    target_text: str = ""


class TaskWithShots(abc.ABC):
    """A seqio task that brings its solved examples; `train` splits are those of other tasks."""

    @abc.abstractmethod
    def solved_examples(self) -> Sequence[SolvedExample]:
        """Returns the examples. The first of them are used, in this order."""

    def shots_header(self) -> Sequence[int]:
        """Returns token ids, without EOS, that come before the first shot."""
        return ()


def draw(examples: Iterable[T], count: int, seed: int, task: str) -> list[T]:
    """Returns `count` of the examples (all, if there are fewer), drawn by seed and task.

    Only the drawn examples stay in memory.
    """
    random = np.random.default_rng(draw_seed(seed, task))
    # The number breaks ties, as examples cannot be compared.
    keyed = ((random.random(), number, example) for number, example in enumerate(examples))
    return [example for *_, example in heapq.nsmallest(count, keyed, key=lambda item: item[:2])]


def draw_seed(seed: int, task: str) -> int:
    """Returns the seed of a task's shots, int31: equal in all processes and versions of Python."""
    digest = hashlib.blake2b(f"{seed} {task}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


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


def prepend_shots(
    shots: Sequence[np.ndarray],
    inputs: np.ndarray,
    limit: int,
    header: Sequence[int] | np.ndarray = (),
) -> tuple[np.ndarray, int]:
    """Puts shots in front of an input, as far as they fit.

    Shots are left out whole, from the front. The header is left out if it does not fit with the
    input alone. The input itself is never changed.

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
    left_out = len(shots)
    while left_out and len(shots[left_out - 1]) <= room:
        left_out -= 1
        room -= len(shots[left_out])
    parts = [header, *shots[left_out:], inputs]
    return np.concatenate([np.asarray(part, np.int32) for part in parts]), left_out
