"""Rows that are had by number, in an order that can be entered anywhere, as TensorFlow pipelines.

Importing this takes the 8 s of `import seqio`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.data import seqio_import
from pemoe_jax.data.order import ExampleOrder
from pemoe_jax.data.providers import StreamOptions
from pemoe_jax.data.rows import TEXT_FEATURES, RowReader
from pemoe_jax.data.tfrecords import TFRecordReader

seqio_import.import_seqio()  # before TensorFlow: it hides GPUs from it, and its log from the user
import tensorflow as tf  # noqa: E402

READ_SIZE = 128  # rows read at a time


def row_number_blocks(order: ExampleOrder, start: int, shard: tuple[int, int]) -> tf.data.Dataset:
    """Row numbers of an order (a shard of it) from example `start` on: blocks, int64 [N], N > 0."""

    @tf.autograph.experimental.do_not_convert
    def block(first: tf.Tensor) -> tf.Tensor:
        numbers = tf.numpy_function(
            lambda first: order.row_numbers(int(first), int(first) + READ_SIZE, shard),
            [first],
            tf.int64,
        )
        return tf.ensure_shape(numbers, [None])

    firsts = tf.data.Dataset.range(start, np.iinfo(np.int64).max - READ_SIZE, READ_SIZE)
    return firsts.map(block).take_while(lambda numbers: tf.size(numbers) > 0)


def read_blocks(readers: Sequence[RowReader], blocks: tf.data.Dataset) -> tf.data.Dataset:
    """Blocks of row numbers, all readers' rows laid end to end -> blocks of tf.train.Examples."""
    starts = np.cumsum([0, *(reader.num_rows for reader in readers[:-1])])

    def read_numbers(numbers: np.ndarray) -> np.ndarray:
        which = np.searchsorted(starts, numbers, side="right") - 1
        records = np.full(len(numbers), b"", object)
        for owner in np.unique(which):
            places = np.flatnonzero(which == owner)
            records[places] = readers[owner].read((numbers[places] - starts[owner]).tolist())
        return records

    @tf.autograph.experimental.do_not_convert
    def read(numbers: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(read_numbers, [numbers], tf.string), [None])

    return blocks.map(read)


def example_dataset(
    readers: Sequence[RowReader],
    rates: Sequence[float],
    task: Any,
    sequence_length: Mapping[str, int] | None,
    options: StreamOptions,
) -> tf.data.Dataset:
    """Elements `inputs` and `targets`, int32 [L], of some readers mixed, from any example on.

    Args:
      readers: of each task's rows, with ids.
      rates: of each.
      task: what is left to do to an example, this seqio task does (its postcache preprocessors).
      sequence_length: what the features are cut to.
      options: order and extent.
    """
    order = ExampleOrder(
        [reader.num_rows for reader in readers],
        rates,
        options.seed,
        options.shuffle,
        options.num_epochs,
    )
    blocks = read_blocks(readers, row_number_blocks(order, options.start, options.shard))
    kinds: dict[str, Any] = {key: tf.io.RaggedFeature(tf.int64) for key in TEXT_FEATURES}
    names = [f"{key}_{kind}" for key in TEXT_FEATURES for kind in ("pretokenized", "plaintext")]
    kinds |= {
        name: tf.io.FixedLenFeature([], tf.string, "") for name in names if options.include_text
    }

    @tf.autograph.experimental.do_not_convert
    def parse(records: tf.Tensor) -> dict[str, Any]:
        rows = tf.io.parse_example(records, kinds)
        found = {}
        for key in TEXT_FEATURES:
            # with a 0 before, until they are taken apart: TensorFlow 2.21 crashes where a row of no
            # elements is unbatched
            ids = tf.cast(rows[key], tf.int32)
            found[key] = tf.concat([tf.fill([tf.size(records), 1], 0), ids], axis=1)
            if options.include_text:
                found[f"{key}_pretokenized"] = (
                    rows[f"{key}_pretokenized"] + rows[f"{key}_plaintext"]
                )
        return found

    @tf.autograph.experimental.do_not_convert
    def dense(example: dict[str, Any]) -> dict[str, tf.Tensor]:
        return example | {key: tf.convert_to_tensor(example[key])[1:] for key in TEXT_FEATURES}

    ds = blocks.map(parse).unbatch().map(dense)
    ds = task.preprocess_postcache(ds, sequence_length=sequence_length, seed=0)
    return ds.prefetch(READ_SIZE)


def local_cache_dir(task: Any) -> pathlib.Path | None:
    """The folder of a seqio task's offline cache, None where there is none or it is not local."""
    folder = task.cache_dir
    return None if folder is None or "://" in folder else pathlib.Path(folder)


def cached_example_dataset(
    tasks: Sequence[Any],
    rates: Sequence[float],
    sequence_length: Mapping[str, int] | None,
    split: str,
    options: StreamOptions,
) -> tf.data.Dataset | None:
    """`examples` of tasks' offline caches; None where not all have one that is local."""
    folders = [local_cache_dir(task) for task in tasks]
    readers = [TFRecordReader(folder, split) for folder in folders if folder is not None]
    if len(readers) < len(tasks) or not tasks:
        return None
    return example_dataset(readers, rates, tasks[0], sequence_length, options)
