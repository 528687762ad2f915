"""tf.data pipelines that can start at any example, over rows with random access.

Importing this module imports seqio, which takes 8 s.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pemoe_jax.data import seqio_import
from pemoe_jax.data.order import ExampleOrder
from pemoe_jax.data.row_reader import TEXT_FEATURES, RowReader, read_parts
from pemoe_jax.data.seekable_tasks import StreamOptions
from pemoe_jax.data.tfrecords import TFRecordReader

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and silences its log
import tensorflow as tf  # noqa: E402

if TYPE_CHECKING:
    import seqio

READ_SIZE = 128  # rows read at a time


def row_number_blocks(order: ExampleOrder, start: int, shard: tuple[int, int]) -> tf.data.Dataset:
    """Returns the row numbers of an order in blocks, int64 [N], from example `start` of a shard."""

    # No autograph here and below: the functions do not need it, and it is slow.
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
    """Returns blocks of serialized tf.train.Examples for blocks of row numbers, int64 [N].

    Rows are numbered consecutively, one reader after the other.
    """
    first_rows = np.cumsum([0, *(reader.num_rows for reader in readers[:-1])])

    def read_numbers(numbers: np.ndarray) -> np.ndarray:
        records = read_parts(first_rows, numbers, lambda n, rows: readers[n].read_records(rows))
        return np.array(records, object)

    @tf.autograph.experimental.do_not_convert
    def read(numbers: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(read_numbers, [numbers], tf.string), [None])

    return blocks.map(read)


def example_dataset(
    readers: Sequence[RowReader],
    rates: Sequence[float],
    task: seqio.Task,
    sequence_length: Mapping[str, int] | None,
    options: StreamOptions,
) -> tf.data.Dataset:
    """Returns a mixture of tasks as a stream: elements `inputs` and `targets`, int32 [L].

    Args:
      readers: rows of each task, with token ids.
      rates: mixing rate of each task.
      task: seqio task whose postcache preprocessors are applied to the examples of all tasks.
      sequence_length: length that each feature is truncated to.
      options: order and extent.
    """
    sizes = [reader.num_rows for reader in readers]
    order = ExampleOrder(sizes, rates, options.seed, options.shuffle, options.num_epochs)
    blocks = read_blocks(readers, row_number_blocks(order, options.start, options.shard))
    features = {key: tf.io.RaggedFeature(tf.int64) for key in TEXT_FEATURES}
    if options.include_text:
        # Caches have one of the two, old ones _plaintext; the other is then empty.
        kinds = ("pretokenized", "plaintext")
        text_keys = [f"{key}_{kind}" for key in TEXT_FEATURES for kind in kinds]
        features |= {key: tf.io.FixedLenFeature([], tf.string, "") for key in text_keys}

    @tf.autograph.experimental.do_not_convert
    def parse(records: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.io.parse_example(records, features)
        block = {}
        for key in TEXT_FEATURES:
            # TensorFlow 2.21 crashes when it unbatches a row without elements: each row gets a 0 in
            # front, which `drop_first` removes.
            ids = tf.cast(rows[key], tf.int32)
            block[key] = tf.concat([tf.fill([tf.size(records), 1], 0), ids], axis=1)
            if options.include_text:
                text_key = f"{key}_pretokenized"
                block[text_key] = rows[text_key] + rows[f"{key}_plaintext"]
        return block

    @tf.autograph.experimental.do_not_convert
    def drop_first(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return example | {key: tf.convert_to_tensor(example[key])[1:] for key in TEXT_FEATURES}

    ds = blocks.map(parse).unbatch().map(drop_first)
    ds = task.preprocess_postcache(ds, sequence_length=sequence_length, seed=0)
    return ds.prefetch(READ_SIZE)


def local_cache_dir(task: seqio.Task) -> pathlib.Path | None:
    """Returns the folder of a task's offline cache; None if it has none or a remote one."""
    folder = task.cache_dir
    return None if folder is None or "://" in folder else pathlib.Path(folder)


def cached_example_dataset(
    tasks: Sequence[seqio.Task],
    rates: Sequence[float],
    sequence_length: Mapping[str, int] | None,
    split: str,
    options: StreamOptions,
) -> tf.data.Dataset | None:
    """Returns `example_dataset` of the tasks' offline caches; None unless all have a local one."""
    folders = [local_cache_dir(task) for task in tasks]
    readers = [TFRecordReader(folder, split) for folder in folders if folder is not None]
    if len(readers) < len(tasks) or not tasks:
        return None
    return example_dataset(readers, rates, tasks[0], sequence_length, options)
