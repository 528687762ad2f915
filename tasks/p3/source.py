"""The seqio side of P3: data source, tasks and mixtures over the readers of a folder.

Importing this takes the 8 s of `import seqio`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.data.pipelines import READ_SIZE, example_dataset, local_cache_dir, read_blocks
from pemoe_jax.data.providers import StreamOptions
from pemoe_jax.data.rows import TEXT_FEATURES, Encode, RowReader
from pemoe_jax.data.warnings import warn_once
from pemoe_jax.tasks.jsonl import source
from pemoe_jax.tasks.jsonl.files import few
from pemoe_jax.tasks.p3 import published
from pemoe_jax.tasks.p3.folder import Folder, Found, cached_splits
from pemoe_jax.tasks.p3.published import SCORE_EVAL

seqio_import.import_seqio()  # before TensorFlow: it hides GPUs from it, and its log from the user
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402


@dataclasses.dataclass
class Settings:
    """What all tasks share, and what `p3.register` changes."""

    vocabulary: Any  # seqio's; loaded when it is first needed
    p3_dir: str | None = None
    eval_examples: int | None = None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without EOS."""
        found: list[list[int]] = self.vocabulary.tokenizer.encode(list(texts)) if texts else []
        return found

    @property
    def folder(self) -> Folder:
        """The folder P3_DIR.

        Raises:
          InputError: it is not set, or not there.
        """
        if self.p3_dir is None:
            raise InputError(
                "P3_DIR is not set: expected a folder of P3, by --gin.P3_DIR or in the"
                " environment's PEMOE_P3_DIR (or seqio's caches, by USE_CACHED_TASKS)"
            )
        return _folder(self.p3_dir)


@functools.cache
def _folder(path: str) -> Folder:
    if "://" in path:
        raise InputError(
            f"P3_DIR {path} is not a local folder: set USE_CACHED_TASKS=True to read tfrecords"
            " there, or copy it"
        )
    return Folder(path)


class P3Source(seqio.DataSource):
    """The rows of a published task or twin, of whatever form the folder P3_DIR holds."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._name, self.settings = name, settings
        self._published = published.tasks()[name.removesuffix(SCORE_EVAL)].splits
        super().__init__(splits=self._published)

    @property
    def found(self) -> Found | None:
        """What the folder has of it; None where there is nothing, or no folder."""
        return self.settings.folder.find(self._name) if self.settings.p3_dir else None

    @property
    def splits(self) -> Sequence[str]:
        """Those in the folder; those published where the folder does not have the task."""
        local = self.settings.p3_dir is not None and "://" not in self.settings.p3_dir
        found = self.found if local else None
        return tuple(self._published if found is None else found.splits)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Any number of shards can be cut from the rows."""
        return True

    def list_shards(self, split: str) -> list[str]:
        """Where the rows are."""
        return [self.reader(split).location]

    def reader(self, split: str) -> RowReader:
        """The rows of a split; InputError where it is not there."""
        return self.settings.folder.reader(self._name, split, self._encode)

    @property
    def _encode(self) -> Encode:
        return self.settings.encode

    def num_input_examples(self, split: str) -> int:
        """Rows in the folder; as published where the folder does not have the task."""
        if self.settings.p3_dir is None or self.found is None:
            return self._published[split]
        return self.reader(split).num_rows

    def most(self, split: str) -> int | None:
        """The most examples that are used of a split, None: all."""
        return None if split == "train" else self.settings.eval_examples

    def in_order(self, split: str) -> np.ndarray:
        """Numbers of the rows used of a split, a twin's example after example: int64."""
        reader, most = self.reader(split), self.most(split)
        if self._name.endswith(SCORE_EVAL):
            return reader.order_by_example(most)
        return np.arange(reader.num_rows if most is None else min(most, reader.num_rows))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: Any = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """The rows' features, as a cache holds them."""
        numbers = self.in_order(split)
        if shuffle:
            numbers = np.random.default_rng(seed).permutation(numbers)
        if shard_info:
            numbers = numbers[shard_info.index :: shard_info.num_shards]
        blocks = tf.data.Dataset.from_tensor_slices(numbers).batch(READ_SIZE)
        records = read_blocks([self.reader(split)], blocks).unbatch()
        return records.map(_parser(self._name), num_parallel_calls=tf.data.AUTOTUNE)


def _parser(name: str) -> Any:
    """tf.train.Example -> the features of a task or twin."""
    kinds: dict[str, Any] = {}
    for key in TEXT_FEATURES:
        kinds[key] = tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True)
        for old_and_new in (f"{key}_pretokenized", f"{key}_plaintext"):
            kinds[old_and_new] = tf.io.FixedLenFeature([], tf.string, "")
    twin = name.endswith(SCORE_EVAL)
    if published.tasks()[name.removesuffix(SCORE_EVAL)].has_choices:
        kinds["answer_choices"] = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
    if twin:
        kinds["idx"] = tf.io.FixedLenFeature([2], tf.int64)
        kinds["is_correct"] = tf.io.FixedLenFeature([], tf.int64)
        kinds["weight"] = tf.io.FixedLenFeature([], tf.float32, 1.0)

    @tf.autograph.experimental.do_not_convert
    def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
        row = tf.io.parse_single_example(record, kinds)
        for key in TEXT_FEATURES:
            row[key] = tf.cast(row[key], tf.int32)
            row[f"{key}_pretokenized"] += row.pop(f"{key}_plaintext")  # one of them is empty
        if twin:
            row["idx"] = tf.cast(row["idx"], tf.int32)
            row["is_correct"] = tf.cast(row["is_correct"], tf.bool)
        return row

    return parse


def end_in_eos(
    ds: Any, output_features: Mapping[str, Any], sequence_length: Mapping[str, int] | None = None
) -> Any:
    """A preprocessor: cut to the length, with one EOS at the end, or none by the feature.

    A cache may have been written with EOS on inputs or without, and seqio cuts it off with what is
    too long. Here both end in it (inputs where the feature says so), as in JSON lines' tasks.
    """

    @tf.autograph.experimental.do_not_convert
    def end(example: dict[str, Any]) -> dict[str, Any]:
        ended = {}
        for key, feature in output_features.items():
            ids, eos = example[key], feature.vocabulary.eos_id
            keep = tf.size(ids) - tf.cast(tf.reduce_any(ids[-1:] == eos), tf.int32)
            length = (sequence_length or {}).get(key)
            if length is not None:
                keep = tf.minimum(keep, length - int(feature.add_eos))
            ended[key] = tf.concat([ids[:keep], [eos] * int(feature.add_eos)], axis=0)
        return example | ended

    return ds.map(end, num_parallel_calls=tf.data.AUTOTUNE)


def _seed(seed: int | None, shuffle: bool) -> int:
    if seed is not None:
        return seed
    return int.from_bytes(os.urandom(8), "big") if shuffle else 0


class P3Task(source.JsonLinesTask):
    """A published task: its source shuffles, and it can be read from any example on."""

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        """See P3Mixture.examples_from, of this task alone."""
        return example_dataset([self.source.reader(split)], [1.0], self, sequence_length, options)

    def has_data(self) -> bool:
        """See SeekableTask; True without a local P3_DIR, where nothing can be looked up."""
        folder = self.source.settings.p3_dir
        return folder is None or "://" in folder or self.source.found is not None

    @property
    def splits(self) -> Sequence[str]:
        """Those in the folder P3_DIR, or else in the task's cache; as published without either."""
        if self.source.settings.p3_dir is None:
            folder = local_cache_dir(self)
            if folder is not None:
                return cached_splits(folder)
        return tuple(self.source.splits)


class P3Mixture(source.JsonLinesMixture):
    """A mixture of published tasks, read in one pipeline where the folder P3_DIR is read.

    Tasks that the folder does not have, or that have no rows, are left out, which is said once.
    Their order is `order.Order`'s, and can be entered anywhere.
    """

    skips_missing_tasks = True

    def get_dataset(
        self,
        sequence_length: Mapping[str, int] | None = None,
        split: str = "train",
        use_cached: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: Any = None,
        num_epochs: int | None = None,
        **kwargs: Any,
    ) -> tf.data.Dataset:
        """See seqio.Mixture."""
        if use_cached or kwargs.get("passthrough_features"):
            return super().get_dataset(
                sequence_length, split, use_cached, shuffle, seed, shard_info, num_epochs, **kwargs
            )
        return self.examples_from(
            sequence_length or {},
            split,
            StreamOptions(
                seed=_seed(seed, shuffle),
                shuffle=shuffle,
                num_epochs=num_epochs,
                shard=(shard_info.index, shard_info.num_shards) if shard_info else (0, 1),
                include_text=bool(kwargs.get("copy_pretokenized")),
            ),
        )

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        """Elements `inputs` and `targets`, int32 [L], from any example on.

        Args:
          sequence_length: what the features are cut to.
          split: of the tasks that have it.
          options: order and extent.

        Raises:
          InputError: the folder has none of the tasks.
        """
        tasks = self._there(split)
        rates = [self.get_rate(task) for task in tasks]
        readers = [task.source.reader(split) for task in tasks]
        return example_dataset(readers, rates, tasks[0], sequence_length, options)

    def eval_examples(
        self, sequence_length: Mapping[str, int], interleave: bool
    ) -> tuple[tf.data.Dataset, list[tuple[str, int]]]:
        """Each example of the evaluation splits once, tasks in turns or one after the other.

        With it each task's name and the number that its examples are counted from (in the twins'
        `idx`, of which a mixture must have all or none).
        """
        tasks = self._there(None)
        readers = [task.source.reader(_eval_split(task)) for task in tasks]
        numbers = [task.source.in_order(_eval_split(task)) for task in tasks]
        firsts = np.cumsum([0, *(reader.num_rows for reader in readers)])
        of_all = np.concatenate(
            [first + part for first, part in zip(firsts, numbers, strict=False)]
        )
        twins = tasks[0].name.endswith(SCORE_EVAL)
        starts = firsts[:-1]
        if twins:
            starts = np.cumsum([0, *(1 + reader.idx[:, 0].max() for reader in readers[:-1])])
        added = np.repeat(starts, [len(part) for part in numbers])
        if interleave:
            turns = np.argsort(np.concatenate([np.arange(len(p)) for p in numbers]), kind="stable")
            of_all, added = of_all[turns], added[turns]
        blocks = tf.data.Dataset.from_tensor_slices(of_all).batch(READ_SIZE)
        records = read_blocks(readers, blocks).unbatch()
        parse = _parser(tasks[0].name)

        @tf.autograph.experimental.do_not_convert
        def parse_and_count(record: tf.Tensor, first: tf.Tensor) -> dict[str, tf.Tensor]:
            row = parse(record)
            row.pop("answer_choices", None)  # tasks with and without may be mixed
            if twins:
                row["idx"] += tf.stack([tf.cast(first, tf.int32), 0])
            return row

        ds = tf.data.Dataset.zip((records, tf.data.Dataset.from_tensor_slices(added)))
        ds = ds.map(parse_and_count, num_parallel_calls=tf.data.AUTOTUNE)
        ds = tasks[0].preprocess_postcache(ds, sequence_length=sequence_length, seed=0)
        names = [(task.name, int(start)) for task, start in zip(tasks, starts, strict=True)]
        return ds.prefetch(READ_SIZE), names

    def _there(self, split: str | None) -> list[P3Task]:
        """The tasks that have rows of this split (None: an evaluation split) in the folder."""
        there, left_out = [], []
        for task in self.tasks:
            wanted = split or _eval_split(task)
            has = task.source.found is not None and wanted in task.splits
            if has and task.source.reader(wanted).rows:
                there.append(task)
            else:
                left_out.append(task.name)
        what = f"{split!r}" if split else "evaluation"
        if not there:
            folder = self.tasks[0].source.settings.folder.path  # raises where it is not set
            raise InputError(
                f"P3_DIR {folder} has a {what} split of none of {len(left_out)} tasks of"
                f" {self.name!r}"
            )
        if left_out:
            warn_once(
                f"{self.name}: no {what} split in P3_DIR of {len(left_out)} of"
                f" {len(self.tasks)} tasks: {few(left_out, 3)}"
            )
        return there


def _eval_split(task: Any) -> str:
    """The task's evaluation split, '' where it has none."""
    return next((split for split in seqio_tasks.EVAL_SPLITS if split in task.splits), "")
