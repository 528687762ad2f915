"""The seqio side of P3: data source, tasks and mixtures over the readers of a folder.

Importing this module imports seqio, which takes about 5 s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.data.row_checks import TEXT_FEATURES
from pemoe_jax.data.row_reader import RowReader
from pemoe_jax.data.seekable_datasets import (
    READ_SIZE,
    example_dataset,
    local_cache_dir,
    read_records,
)
from pemoe_jax.data.seekable_tasks import StreamOptions
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.folder_tasks import FolderMixture, FolderTask, shard_of
from pemoe_jax.tasks.p3 import published
from pemoe_jax.tasks.p3.folder import Folder, TaskFiles, cached_splits
from pemoe_jax.tasks.p3.readers import NoRowsError
from pemoe_jax.tasks.task_roles import abbreviate

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and filters its log
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402


@dataclasses.dataclass(eq=False)  # hashed by identity, as the key of cached readers
class Settings:
    """Settings that all tasks share and `p3.register` changes. It is also the readers' tokenizer.

    Attributes:
      vocabulary: a vocabulary whose file is read at its first use.
      p3_dir: P3_DIR. If it is a URL, it can only be read as seqio's cache.
      eval_examples: maximum number of examples of every split but `train`, counted from its start;
        None: all.
    """

    vocabulary: seqio.Vocabulary
    p3_dir: str | None = None
    eval_examples: int | None = None

    def read_from(self, p3_dir: str | None, eval_examples: int | None) -> None:
        """Sets the folder and the number of examples; forgets the files of the former folder."""
        self.p3_dir, self.eval_examples = p3_dir, eval_examples
        self.__dict__.pop("folder", None)  # the value of the cached property

    @property
    def has_local_folder(self) -> bool:
        """Whether P3_DIR is set to a local folder."""
        return self.p3_dir is not None and "://" not in self.p3_dir

    @functools.cached_property
    def folder(self) -> Folder:
        """The folder P3_DIR.

        Raises:
          InputError: P3_DIR is not set, is remote, or does not exist.
        """
        if self.p3_dir is None:
            raise InputError(
                "P3_DIR is not set: pass --gin.P3_DIR=… or set the environment's PEMOE_P3_DIR to a"
                " folder of P3 (or read seqio's caches by USE_CACHED_TASKS)"
            )
        if not self.has_local_folder:
            raise InputError(
                f"P3_DIR {self.p3_dir} is not a local folder: copy it, or set"
                " USE_CACHED_TASKS=True to read tfrecords from there"
            )
        return Folder(self.p3_dir)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of texts, without EOS."""
        if isinstance(self.vocabulary, seqio.ByteVocabulary):
            return [self.vocabulary.encode(text) for text in texts]
        ids: list[list[int]] = self.vocabulary.tokenizer.encode(list(texts)) if texts else []
        return ids

    def vocab_size(self) -> int:
        """Returns the number of token ids, sentinels included."""
        return int(self.vocabulary.vocab_size)


class P3Source(seqio.DataSource):
    """The rows of a published task, from whatever form the folder P3_DIR holds."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._name, self.settings = name, settings
        self._published_splits = published.task_of(name).splits
        super().__init__(splits=self._published_splits)

    @property
    def files(self) -> TaskFiles | None:
        """The task's files in the folder; None if the folder has none or is not set."""
        return self.settings.folder.find(self._name) if self.settings.p3_dir else None

    @property
    def splits(self) -> Sequence[str]:
        """Splits in the folder, or the published ones if the folder does not have the task."""
        files = self.files if self.settings.has_local_folder else None
        return tuple(self._published_splits if files is None else files.splits)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [self.reader(split).location]

    def reader(self, split: str) -> RowReader:
        """Returns the reader of a split; InputError if the folder does not have it."""
        return self.settings.folder.reader(self._name, split, self.settings)

    def num_input_examples(self, split: str) -> int:
        """Returns the number of rows in the folder, or the published one if it lacks the task."""
        if self.files is None:
            return self._published_splits[split]
        return self.reader(split).num_rows

    def row_indices(self, split: str) -> np.ndarray:
        """Returns the indices of those rows of a split that are used: int64.

        Rows of a `_score_eval` task are in the order of examples and choices.
        """
        reader = self.reader(split)
        limit = None if split == "train" else self.settings.eval_examples
        if score_eval.is_score_eval(self._name):
            return reader.order_by_example(limit)
        return np.arange(reader.num_rows if limit is None else min(limit, reader.num_rows))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns the rows, with the features of the published caches."""
        indices = self.row_indices(split)
        # All indices are shuffled (8 bytes a row), as a shuffle buffer would mix only neighbors.
        if shuffle:
            indices = np.random.default_rng(seed).permutation(indices)
        first, step = shard_of(shard_info)
        blocks = tf.data.Dataset.from_tensor_slices(indices[first::step]).batch(READ_SIZE)
        records = read_records([self.reader(split)], blocks, self.settings.vocab_size())
        return records.map(_make_parser(self._name), num_parallel_calls=tf.data.AUTOTUNE)


def _make_parser(name: str) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the function from a tf.train.Example to the features of a task."""
    features: dict[str, tf.io.FixedLenFeature | tf.io.FixedLenSequenceFeature] = {}
    for key in TEXT_FEATURES:
        features[key] = tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)
        # Old caches have `_plaintext` instead of `_pretokenized`.
        for text_key in (f"{key}_pretokenized", f"{key}_plaintext"):
            features[text_key] = tf.io.FixedLenFeature([], tf.string, "")
    scored = score_eval.is_score_eval(name)
    if published.task_of(name).has_choices:
        features["answer_choices"] = tf.io.FixedLenSequenceFeature(
            [], tf.string, allow_missing=True
        )
    if scored:
        features["idx"] = tf.io.FixedLenFeature([2], tf.int64)
        features["is_correct"] = tf.io.FixedLenFeature([], tf.int64)
        features["weight"] = tf.io.FixedLenFeature([], tf.float32, 1.0)

    @tf.autograph.experimental.do_not_convert
    def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
        row = tf.io.parse_single_example(record, features)
        for key in TEXT_FEATURES:
            row[key] = tf.cast(row[key], tf.int32)
            row[f"{key}_pretokenized"] += row.pop(f"{key}_plaintext")  # one of them is empty
        if scored:
            row["idx"] = tf.cast(row["idx"], tf.int32)
            row["is_correct"] = tf.cast(row["is_correct"], tf.bool)
        return row

    return parse


class P3Task(FolderTask):
    """A published task."""

    def has_data(self) -> bool:
        return not self.source.settings.has_local_folder or self.source.files is not None

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        return example_dataset([self.source.reader(split)], [1.0], self, sequence_length, options)

    @property
    def splits(self) -> Sequence[str]:
        """Splits in the folder P3_DIR, or else in the task's cache, or else as published."""
        if self.source.settings.p3_dir is None:
            cache = local_cache_dir(self)
            if cache is not None:
                return cached_splits(cache)
        return tuple(self.source.splits)

    @property
    def eval_split(self) -> str | None:
        """The task's evaluation split, None without one."""
        return seqio_tasks.first_eval_split(self.splits)


class P3Mixture(FolderMixture):
    """A mixture of published tasks.

    Tasks that the folder does not have, or that have no rows, are left out with a warning.
    """

    skips_missing_tasks = True

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        """See SeekableProvider; InputError if the folder has none of the tasks."""
        tasks = self._tasks_with_rows(split)
        readers = [task.source.reader(split) for task in tasks]
        return example_dataset(readers, self.rates(tasks), tasks[0], sequence_length, options)

    def eval_examples(
        self, sequence_length: Mapping[str, int], interleave: bool
    ) -> tuple[tf.data.Dataset, list[tuple[str, int]]]:
        """See SeekableMixture; either all tasks or none must be `_score_eval` tasks."""
        tasks = self._tasks_with_rows(None)
        readers = [task.source.reader(task.eval_split) for task in tasks]
        indices = [task.source.row_indices(task.eval_split) for task in tasks]
        first_rows = np.cumsum([0, *(reader.num_rows for reader in readers[:-1])])
        scored = score_eval.is_score_eval(tasks[0].name)
        first_examples = first_rows
        if scored:
            # `idx` may have gaps, so a task's numbers begin after the largest of the task before.
            counts = [1 + reader.idx[:, 0].max() for reader in readers[:-1]]
            first_examples = np.cumsum([0, *counts])
        # Over all tasks: the number of each row to read, and what to add to its example's number.
        rows = np.concatenate(
            [first + part for first, part in zip(first_rows, indices, strict=True)]
        )
        offsets = np.repeat(first_examples, [len(part) for part in indices])
        if interleave:
            # The first rows of all tasks, then the second rows, and so on.
            turns = np.concatenate([np.arange(len(part)) for part in indices])
            order = np.argsort(turns, kind="stable")
            rows, offsets = rows[order], offsets[order]
        blocks = tf.data.Dataset.from_tensor_slices(rows).batch(READ_SIZE)
        records = read_records(readers, blocks, tasks[0].source.settings.vocab_size())
        parse = _make_parser(tasks[0].name)

        @tf.autograph.experimental.do_not_convert
        def parse_and_number(record: tf.Tensor, offset: tf.Tensor) -> dict[str, tf.Tensor]:
            row = parse(record)
            row.pop("answer_choices", None)  # elements must not differ, and not all tasks have it
            if scored:
                row["idx"] += tf.stack([tf.cast(offset, tf.int32), 0])
            return row

        ds = tf.data.Dataset.zip((records, tf.data.Dataset.from_tensor_slices(offsets)))
        ds = ds.map(parse_and_number, num_parallel_calls=tf.data.AUTOTUNE)
        ds = tasks[0].preprocess_postcache(ds, sequence_length=sequence_length, seed=0)
        starts = [
            (task.name, int(start)) for task, start in zip(tasks, first_examples, strict=True)
        ]
        return ds.prefetch(READ_SIZE), starts

    def _tasks_with_rows(self, split: str | None) -> list[P3Task]:
        """Returns the tasks with rows of a split (None: their evaluation split) in the folder."""
        tasks, left_out = [], []
        reason = ""
        # `ExampleOrder` needs at least one row of each task.
        for task in self.tasks:
            task_split = split or task.eval_split
            has_rows = False
            if task.source.files is not None and task_split in task.splits:
                try:
                    has_rows = task.source.reader(task_split).num_rows > 0
                except NoRowsError as error:
                    reason = reason or f"; {error}"
            if has_rows:
                tasks.append(task)
            else:
                left_out.append(task.name)
        kind = repr(split) if split else "evaluation"
        if not tasks:
            # If P3_DIR is not set, the property `folder` raises an error that says so.
            raise InputError(
                f"P3_DIR {self.tasks[0].source.settings.folder.path}: none of {len(left_out)} tasks"
                f" of {self.name!r} has rows in its {kind} split{reason}"
            )
        if left_out:
            seqio_tasks.warn_once(
                f"{self.name}: no rows in the {kind} split of {len(left_out)} of"
                f" {len(self.tasks)} tasks in P3_DIR: {abbreviate(left_out, 3)}{reason}"
            )
        return tasks
