"""tf.data pipelines that can start at any example, over rows with random access.

Importing this module imports seqio, which takes about 5 s.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import
from pemoe_jax.data.order import ExampleOrder
from pemoe_jax.data.row_checks import TEXT_FEATURES, check_token_ids
from pemoe_jax.data.row_reader import RowReader, read_parts
from pemoe_jax.data.seekable_tasks import StreamOptions
from pemoe_jax.data.tfrecords import TFRecordReader

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and silences its log
import tensorflow as tf  # noqa: E402

if TYPE_CHECKING:
    import seqio

READ_SIZE = 128  # rows read at a time; `row_reader.READ_SIZE` is for reading all rows in order

# Features that are parsed: token ids, of any number.
_IDS = {key: tf.io.RaggedFeature(tf.int64) for key in TEXT_FEATURES}


def numpy_function(function: Callable[..., Any], inputs: Sequence[tf.Tensor], dtypes: Any) -> Any:
    """Calls `tf.numpy_function` with a function that does not outlive its dataset.

    TensorFlow keeps the function that is passed to it, and with it the readers of the dataset,
    until Python ends. So it is passed one that has only a weak reference to `function`.

    Args:
      function: function of arrays. To keep it alive as long as the dataset, the function that is
        passed to the dataset's `map` must refer to it or, if it is a method, to its object.
      inputs: the function's arguments.
      dtypes: dtypes of the function's results.
    """
    is_method = inspect.ismethod(function)
    reference: Callable[[], Any] = (weakref.WeakMethod if is_method else weakref.ref)(function)
    return tf.numpy_function(lambda *arrays: reference()(*arrays), inputs, dtypes)


def row_number_blocks(order: ExampleOrder, start: int, shard: tuple[int, int]) -> tf.data.Dataset:
    """Returns the row numbers of an order, from an example on, in blocks of int64 [N].

    Args:
      order: the order.
      start: index of the first example, counted within the shard.
      shard: (index, count), see `ExampleOrder.row_numbers`.
    """

    def row_numbers(first: np.ndarray) -> np.ndarray:
        return order.row_numbers(int(first), int(first) + READ_SIZE, shard)

    # No autograph here and below: the functions do not need it, and it is slow.
    @tf.autograph.experimental.do_not_convert
    def block(first: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(numpy_function(row_numbers, [first], tf.int64), [None])

    firsts = tf.data.Dataset.range(start, np.iinfo(np.int64).max - READ_SIZE, READ_SIZE)
    return firsts.map(block).take_while(lambda numbers: tf.size(numbers) > 0)


def read_blocks(readers: Sequence[RowReader], blocks: tf.data.Dataset) -> tf.data.Dataset:
    """Reads blocks of rows by number.

    Args:
      readers: readers of the rows, which are numbered consecutively, one reader after the other.
      blocks: row numbers, int64 [N].

    Returns:
      A dataset of pairs: row numbers [N] and serialized tf.train.Examples [N].
    """
    first_rows = _first_rows(readers)

    def read_numbers(numbers: np.ndarray) -> np.ndarray:
        records = read_parts(first_rows, numbers, lambda n, rows: readers[n].read_records(rows))
        return np.array(records, object)

    @tf.autograph.experimental.do_not_convert
    def read(numbers: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        records = numpy_function(read_numbers, [numbers], tf.string)
        return numbers, tf.ensure_shape(records, [None])

    return blocks.map(read)


def _first_rows(readers: Sequence[RowReader]) -> np.ndarray:
    """Returns the number of each reader's first row: int64 [readers]."""
    return np.cumsum([0, *(reader.num_rows for reader in readers[:-1])])


def read_records(
    readers: Sequence[RowReader], blocks: tf.data.Dataset, vocab_size: int
) -> tf.data.Dataset:
    """Returns the records of `read_blocks` one by one, with their token ids checked."""
    check = _id_check(readers, vocab_size)

    @tf.autograph.experimental.do_not_convert
    def check_block(numbers: tf.Tensor, records: tf.Tensor) -> tf.Tensor:
        check(numbers, tf.io.parse_example(records, _IDS))
        return records

    return read_blocks(readers, blocks).map(check_block).unbatch()


def _id_check(
    readers: Sequence[RowReader], vocab_size: int
) -> Callable[[tf.Tensor, Mapping[str, tf.RaggedTensor]], None]:
    """Returns a function of row numbers [N] and their rows that checks the rows' token ids.

    It is called when a pipeline is built. While the pipeline runs, a wrong id raises an InputError
    that names the row.
    """
    first_rows = _first_rows(readers)

    def raise_error(
        numbers: np.ndarray, key: bytes, ids: np.ndarray, row_splits: np.ndarray
    ) -> bool:
        for number, row in zip(numbers, np.split(ids, row_splits[1:-1]), strict=True):
            reader = int(np.searchsorted(first_rows, number, side="right")) - 1
            where = f"{readers[reader].location}: row {number - first_rows[reader] + 1}"
            check_token_ids(row, where, key.decode(), vocab_size)
        return False  # as the other branch of tf.cond, which needs a result

    def check(numbers: tf.Tensor, rows: Mapping[str, tf.RaggedTensor]) -> None:
        for key in TEXT_FEATURES:
            ids = rows[key].values
            arguments = (numbers, key, ids, rows[key].row_splits)
            # One comparison for a whole block; Python is called only if it fails.
            tf.cond(
                tf.reduce_any((ids < 0) | (ids >= vocab_size)),
                functools.partial(numpy_function, raise_error, arguments, tf.bool),
                lambda: False,
            )

    return check


def example_dataset(
    readers: Sequence[RowReader],
    rates: Sequence[float],
    task: seqio.Task,
    sequence_length: Mapping[str, int] | None,
    options: StreamOptions,
) -> tf.data.Dataset:
    """Returns a mixture of tasks as a stream: elements `inputs` and `targets`, int32 [L].

    With `options.include_text`, elements also have the texts.

    Args:
      readers: rows of each task, with token ids.
      rates: mixing rate of each task.
      task: seqio task whose postcache preprocessors are applied to the examples of all tasks.
      sequence_length: length that each feature is truncated to.
      options: order and extent of the stream.

    Raises:
      InputError: a reader has no rows.
    """
    sizes = [reader.num_rows for reader in readers]
    for reader, size in zip(readers, sizes, strict=True):
        if not size:
            raise InputError(f"{reader.location}: expected at least one row, got none")
    order = ExampleOrder(sizes, rates, options.seed, options.shuffle, options.num_epochs)
    blocks = read_blocks(readers, row_number_blocks(order, options.start, options.shard))
    check_ids = _id_check(readers, task.output_features["inputs"].vocabulary.vocab_size)
    features = dict(_IDS)
    if options.include_text:
        # A cache has one of the two features: old caches have _plaintext, newer ones _pretokenized.
        # The other one is read as an empty text.
        kinds = ("pretokenized", "plaintext")
        text_keys = [f"{key}_{kind}" for key in TEXT_FEATURES for kind in kinds]
        features |= {key: tf.io.FixedLenFeature([], tf.string, "") for key in text_keys}

    @tf.autograph.experimental.do_not_convert
    def parse(numbers: tf.Tensor, records: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.io.parse_example(records, features)
        check_ids(numbers, rows)
        block = {}
        for key in TEXT_FEATURES:
            # TensorFlow 2.21 crashes when it unbatches a row without elements, so each row gets a 0
            # in front, which `drop_first` removes.
            ids = tf.cast(rows[key], tf.int32)
            block[key] = tf.concat([tf.fill([tf.size(records), 1], 0), ids], axis=1)
            if options.include_text:
                text_key = f"{key}_pretokenized"
                # One of the two texts is empty.
                block[text_key] = rows[text_key] + rows[f"{key}_plaintext"]
        return block

    @tf.autograph.experimental.do_not_convert
    def drop_first(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return example | {key: tf.convert_to_tensor(example[key])[1:] for key in TEXT_FEATURES}

    ds = blocks.map(parse).unbatch().map(drop_first)
    # Any seed will do: after the cache, tasks of this package only truncate and add EOS.
    ds = task.preprocess_postcache(ds, sequence_length=sequence_length, seed=0)
    return ds.prefetch(READ_SIZE)


def local_cache_dir(task: seqio.Task) -> pathlib.Path | None:
    """Returns the folder of a task's offline cache; None if there is no cache or it is remote."""
    folder = task.cache_dir
    return None if folder is None or "://" in folder else pathlib.Path(folder)


def cached_example_dataset(
    tasks: Sequence[seqio.Task],
    rates: Sequence[float],
    sequence_length: Mapping[str, int] | None,
    split: str,
    options: StreamOptions,
) -> tf.data.Dataset | None:
    """Returns `example_dataset` of the tasks' offline caches.

    Returns None if there are no tasks, or if one of them has no local cache.
    """
    folders = [local_cache_dir(task) for task in tasks]
    if not tasks or None in folders:
        return None
    vocabulary = tasks[0].output_features["inputs"].vocabulary
    readers = [
        TFRecordReader(folder, split, lambda: vocabulary.vocab_size)
        for folder in folders
        if folder is not None
    ]
    return example_dataset(readers, rates, tasks[0], sequence_length, options)
