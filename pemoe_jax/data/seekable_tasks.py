"""Interfaces of seqio tasks and mixtures whose examples can be read from any position on.

A seqio pipeline can only be read from its beginning, and a seqio mixture builds one pipeline for
each of its tasks. A task that can start anywhere subclasses `SeekableTask` in addition to seqio's
class. A mixture that reads all of its tasks in one pipeline subclasses `SeekableMixture`. `data`
checks for these classes with `isinstance`, and reads all others through seqio's `get_dataset`.
This module imports no seqio, and has no implementation.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Order and extent of a stream of training examples.

    Attributes:
      seed: seed of the order.
      start: index of the first example, counted within the shard.
      shuffle: whether every epoch has its own order; otherwise each task's rows stay in order.
      num_epochs: the stream ends when a task that has been read this many times is drawn again;
        None: never.
      shard: (index, count): takes every count-th example of the order, from `index` on.
      include_text: whether elements also have `inputs_pretokenized` and `targets_pretokenized`.
    """

    seed: int
    start: int = 0
    shuffle: bool = True
    num_epochs: int | None = None
    shard: tuple[int, int] = (0, 1)
    include_text: bool = False


class SeekableProvider(abc.ABC):
    """A task or mixture whose training stream can start at any example.

    Sequences end in EOS even if they were truncated to `sequence_length`.
    """

    @abc.abstractmethod
    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        """Returns the stream: elements `inputs` and `targets`, int32 [L].

        Tasks of a mixture that do not have the split are left out.
        """

    @abc.abstractmethod
    def cached_examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset | None:
        """Returns the stream from seqio's offline caches; None unless all tasks have local ones."""


class SeekableTask(SeekableProvider):
    """A seqio task that is a `SeekableProvider`."""

    def has_data(self) -> bool:
        """Returns whether the task's data is present, as far as can be seen without reading it."""
        return True


class SeekableMixture(SeekableProvider):
    """A seqio mixture that is a `SeekableProvider` and reads its tasks in one pipeline.

    Attributes:
      skips_missing_tasks: whether tasks without data are left out; if not, they are an error.
    """

    # P3's mixtures set it: they name hundreds of tasks, and a folder may have only a few.
    skips_missing_tasks: ClassVar[bool] = False

    @abc.abstractmethod
    def eval_examples(
        self, sequence_length: Mapping[str, int], interleave: bool
    ) -> tuple[tf.data.Dataset, list[tuple[str, int]]]:
        """Returns every example of the tasks' evaluation splits once.

        Args:
          sequence_length: length that each feature is truncated to.
          interleave: whether tasks take turns; otherwise they follow one another.

        Returns:
          The examples, and the name of each task with the number of its first example in `idx`.
        """
