"""The seqio side of `jsonl`: data source, tasks, mixture and preprocessors.

Importing this module imports seqio, which takes about 5 s; `jsonl` does so inside functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import
from pemoe_jax.data.order import ExampleOrder
from pemoe_jax.data.seekable_datasets import READ_SIZE, numpy_function, row_number_blocks
from pemoe_jax.data.seekable_tasks import StreamOptions
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.folder_tasks import FolderMixture, FolderTask, shard_of, trim_and_append_eos
from pemoe_jax.tasks.jsonl.files import FileScan, Rows, scan_file

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and filters its log
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_text as tf_text  # noqa: E402

Features = Mapping[str, seqio.Feature]
TensorDict = dict[str, tf.Tensor]
Tokenize = Callable[[str, tf.Tensor], tf.Tensor]  # (feature, text) -> ids


def _read_blocks(rows: Rows, blocks: tf.data.Dataset) -> tf.data.Dataset:
    """Maps blocks of row indices, int64 [N], to blocks of rows.

    An element has `row`, `inputs`, `targets` and `num_choices` [N], and `answer_choices` [N, C],
    padded.
    """
    dtypes = {
        "row": tf.int32,
        "inputs": tf.string,
        "targets": tf.string,
        "answer_choices": tf.string,
        "num_choices": tf.int32,
    }

    @tf.autograph.experimental.do_not_convert
    def read(indices: tf.Tensor) -> TensorDict:
        tensors = numpy_function(rows.read, [indices], list(dtypes.values()))
        for key, tensor in zip(dtypes, tensors, strict=True):
            tensor.set_shape([None, None] if key == "answer_choices" else [None])
        return dict(zip(dtypes, tensors, strict=True))

    return blocks.map(read)


def _read_rows(rows: Rows, indices: tf.data.Dataset) -> tf.data.Dataset:
    """Maps row indices to rows, which have the features of `_read_blocks`."""
    return _read_blocks(rows, indices.batch(READ_SIZE)).unbatch()


class JsonLinesSource(seqio.DataSource):
    """Files of JSON lines, one for each split; only the offsets of their rows stay in memory."""

    def __init__(
        self, paths: Mapping[str, str], eval_examples: int | None, needs_targets: bool = True
    ) -> None:
        super().__init__(splits=paths.keys())
        self.paths = dict(paths)
        self._eval_examples, self._needs_targets = eval_examples, needs_targets

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [self.paths[split]]

    def scan(self, split: str) -> FileScan:
        """Reads and checks the file of a split, once."""
        if split == "train":
            return scan_file(self.paths[split])
        return scan_file(self.paths[split], self._eval_examples, self._needs_targets)

    def num_input_examples(self, split: str) -> int:
        return self.scan(split).num_rows

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns the rows with the features of `_read_blocks`, reshuffled every epoch."""
        num_rows = self.scan(split).num_rows
        first, step = shard_of(shard_info)
        if shuffle:
            # A training mixture ends when its first task does, so no shard of a task may be empty.
            # If there are fewer rows than shards, some shards read the same rows.
            first %= num_rows
        indices = tf.data.Dataset.range(first, num_rows, step)
        if shuffle:
            indices = indices.shuffle(num_rows, seed=seed)
        return _read_rows(_join_files([self], split), indices)


def _join_files(sources: Sequence[JsonLinesSource], split: str) -> Rows:
    """Returns the rows of a split of all sources, numbered file after file."""
    paths = [source.paths[split] for source in sources]
    return Rows(paths, [source.scan(split) for source in sources])


class JsonLinesTask(FolderTask):
    """A task of a folder of JSON lines."""

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        return _stream_examples([self], [1.0], sequence_length, split, options)


class JsonLinesScoreTask(JsonLinesTask):
    """A `_score_eval` task: its examples are the answer choices of its rows."""


class JsonLinesMixture(FolderMixture):
    """A mixture of tasks of a folder of JSON lines."""

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        tasks = [task for task in self.tasks if split in task.splits]
        if not tasks:
            raise InputError(f"no task of {self.name!r} has a split {split!r}")
        return _stream_examples(tasks, self.rates(tasks), sequence_length, split, options)

    def eval_examples(
        self, sequence_length: Mapping[str, int], interleave: bool
    ) -> tuple[tf.data.Dataset, list[tuple[str, int]]]:
        tasks = [task for task in self.tasks if "validation" in task.splits]
        rows = _join_files([task.source for task in tasks], "validation")
        # Interleaved: the first rows of all tasks, then the second rows, and so on.
        turns = np.concatenate([np.arange(scan.num_rows) for scan in rows.scans])
        indices = np.argsort(turns, kind="stable") if interleave else np.arange(len(turns))
        ds = _read_rows(rows, tf.data.Dataset.from_tensor_slices(indices))
        starts = [(task.name, int(start)) for task, start in zip(tasks, rows.starts, strict=True)]
        return _preprocess(ds, tasks[0], sequence_length), starts


def _stream_examples(
    tasks: Sequence[JsonLinesTask],
    rates: Sequence[float],
    sequence_length: Mapping[str, int],
    split: str,
    options: StreamOptions,
) -> tf.data.Dataset:
    """Returns a stream of training examples of several tasks, mixed at `rates`."""
    rows = _join_files([task.source for task in tasks], split)
    sizes = [scan.num_rows for scan in rows.scans]
    order = ExampleOrder(sizes, rates, options.seed, options.shuffle, options.num_epochs)
    if any(isinstance(task, JsonLinesScoreTask) for task in tasks):
        # A row is several examples, so the n-th example is known only after reading all before it.
        blocks = _read_blocks(rows, row_number_blocks(order, 0, options.shard))
        ds = _preprocess(blocks.unbatch(), tasks[0], sequence_length).skip(options.start)
    else:
        blocks = _read_blocks(rows, row_number_blocks(order, options.start, options.shard))
        ds = _encode_blocks(blocks, tasks[0].output_features, sequence_length).unbatch()
    names = {"inputs", "targets"}
    if options.include_text:
        names |= {f"{key}_pretokenized" for key in names}
    return ds.map(lambda example: {key: tf.convert_to_tensor(example[key]) for key in names})


def _preprocess(
    ds: tf.data.Dataset, task: JsonLinesTask, lengths: Mapping[str, int]
) -> tf.data.Dataset:
    # All tasks of a mixture have the same preprocessors, so those of any task will do.
    ds = task.preprocess_precache(ds, seed=0)
    ds = task.preprocess_postcache(ds, sequence_length=lengths, seed=0)
    return ds.prefetch(tf.data.AUTOTUNE)


def _encode_blocks(
    blocks: tf.data.Dataset, features: Features, lengths: Mapping[str, int]
) -> tf.data.Dataset:
    # Has the same result as the task's preprocessors, but works on blocks of rows, which is twice
    # as fast.
    @tf.autograph.experimental.do_not_convert
    def encode(block: TensorDict) -> TensorDict:
        encoded = {}
        for key, feature in features.items():
            ids = _make_tokenizer(feature.vocabulary)(block[key])
            length = lengths.get(key)
            ids = ids if length is None else ids[:, : length - 1]  # leaves room for EOS
            eos = tf.fill([tf.size(block[key]), 1], feature.vocabulary.eos_id)
            encoded[key] = tf.concat([ids, eos], axis=1)
            encoded[f"{key}_pretokenized"] = block[key]
        return encoded

    return blocks.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


def _make_tokenizer(vocabulary: seqio.Vocabulary) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from a text, or a tensor of texts, to ids without EOS."""
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return _tokenize_bytes
    return _sentencepiece_tokenizer(vocabulary.sp_model).tokenize


@functools.cache
def _sentencepiece_tokenizer(model: bytes) -> tf_text.SentencepieceTokenizer:
    # All tasks share one. seqio creates one for each feature of each task, which takes 32 ms and a
    # copy of the model each time.
    with tf.init_scope():
        return tf_text.SentencepieceTokenizer(model=model)


def _tokenize_bytes(text: tf.Tensor) -> tf.Tensor:
    # seqio's ByteVocabulary encodes a single text, not a tensor of texts.
    def to_ids(characters: tf.Tensor) -> tf.Tensor:
        numbers = tf.reshape(tf.io.decode_raw(characters, tf.uint8), [-1])
        return tf.cast(numbers, tf.int32) + 3  # after pad, eos and unk

    return tf.ragged.map_flat_values(to_ids, tf.strings.bytes_split(text))


Preprocessor = Callable[[tf.data.Dataset, Features], tf.data.Dataset]


def _make_preprocessor(function: Callable[[TensorDict, Tokenize], TensorDict]) -> Preprocessor:
    """Turns a function of an example into a seqio preprocessor.

    The function must have no control flow on tensors: autograph, which is slow, is left out.
    """

    def preprocess(ds: tf.data.Dataset, output_features: Features) -> tf.data.Dataset:
        tokenizers = {
            key: _make_tokenizer(value.vocabulary) for key, value in output_features.items()
        }

        @tf.autograph.experimental.do_not_convert
        def call(example: TensorDict) -> TensorDict:
            return function(example, lambda key, text: tokenizers[key](text))

        return ds.map(call, num_parallel_calls=tf.data.AUTOTUNE)

    return preprocess


def _encode(example: TensorDict, tokenize: Tokenize) -> TensorDict:
    texts = {key: example[key] for key in ("inputs", "targets")}
    encoded = {key: tokenize(key, text) for key, text in texts.items()}
    return encoded | {f"{key}_pretokenized": text for key, text in texts.items()}


def _encode_with_choices(example: TensorDict, tokenize: Tokenize) -> TensorDict:
    choices = example["answer_choices"][: example["num_choices"]]
    return _encode(example, tokenize) | {"answer_choices": choices}


def _repeat_per_choice(example: TensorDict, tokenize: Tokenize) -> TensorDict:
    """Returns an example's `_score_eval` rows, stacked; choices equal to the target are correct."""
    count = example["num_choices"]
    choices = example["answer_choices"][:count]
    text = example["inputs"]
    shared = {
        # The input is tokenized once for all choices. TensorFlow 2.21 crashes when it unbatches
        # rows without elements, such as the ids of an empty input, so each row gets a 0 in front,
        # which `_encode_choice` drops.
        "inputs": tf.pad(tokenize("inputs", text), [[1, 0]]),
        "inputs_pretokenized": text,
        "answer_choices": choices,
    }
    row = tf.fill([count], example["row"])
    return {key: tf.repeat(value[None], count, axis=0) for key, value in shared.items()} | {
        "targets": choices,
        "idx": tf.stack([row, tf.range(count)], axis=1),
        "is_correct": tf.strings.strip(choices) == tf.strings.strip(example["targets"]),
        "weight": tf.ones([count], tf.float32),
    }


def _encode_choice(example: TensorDict, tokenize: Tokenize) -> TensorDict:
    text = example["targets"]
    return example | {
        "inputs": example["inputs"][1:],
        "targets": tokenize("targets", text),
        "targets_pretokenized": text,
    }


def add_tasks(
    task: str,
    has_choices: bool,
    paths: Mapping[str, str],
    vocabulary: seqio.Vocabulary,
    eval_examples: int | None,
    needs_targets: bool = True,
) -> None:
    """Adds a task to seqio's registry, and its `_score_eval` task if it has answer choices.

    Args:
      task: the task's name.
      has_choices: whether the rows have answer choices.
      paths: split -> file.
      vocabulary: vocabulary of inputs and targets.
      eval_examples: maximum number of rows of every split but `train`, counted from its start;
        None: all.
      needs_targets: whether rows of every split but `train` must have `targets`; those of `train`
        always must.
    """
    common = {
        "source": JsonLinesSource(paths, eval_examples, needs_targets),
        "output_features": {
            key: seqio.Feature(vocabulary, add_eos=True) for key in ("inputs", "targets")
        },
    }
    last = (seqio.CacheDatasetPlaceholder(), trim_and_append_eos)
    encode = _encode_with_choices if has_choices else _encode
    seqio.TaskRegistry.add(
        task, preprocessors=(_make_preprocessor(encode), *last), task_cls=JsonLinesTask, **common
    )
    if has_choices:
        expand = (
            # TensorFlow 2.21 crashes when it unbatches zero choices.
            lambda ds: ds.filter(lambda example: example["num_choices"] > 0),
            _make_preprocessor(_repeat_per_choice),
            lambda ds: ds.unbatch(),
            _make_preprocessor(_encode_choice),
        )
        seqio.TaskRegistry.add(
            task + score_eval.SUFFIX,
            preprocessors=(*expand, *last),
            postprocess_fn=score_eval.target_of_row,
            metric_fns=[score_eval.rank_accuracy],
            task_cls=JsonLinesScoreTask,
            **common,
        )
