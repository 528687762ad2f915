"""The seqio side of `jsonl`: data source, task, mixture, preprocessors and the metric.

Importing this takes the 8 s of `import seqio`; `jsonl` does so in functions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.data.order import ExampleOrder
from pemoe_jax.data.pipelines import READ_SIZE, cached_example_dataset, row_number_blocks
from pemoe_jax.data.providers import SeekableMixture, SeekableTask, StreamOptions
from pemoe_jax.tasks.jsonl.files import FileScan, Rows, scan_file

seqio_import.import_seqio()  # before TensorFlow: it hides GPUs from it, and its log from the user
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_text as tf_text  # noqa: E402

Tokenize = Callable[[str, Any], Any]  # of a feature's name and a text


def _read_rows(rows: Rows, numbers: tf.data.Dataset) -> tf.data.Dataset:
    """Elements `row`, `inputs`, `targets`, `answer_choices`, `num_choices` of them, by number."""
    return _read_blocks(rows, numbers.batch(READ_SIZE)).unbatch()


def _read_blocks(rows: Rows, blocks: tf.data.Dataset) -> tf.data.Dataset:
    """The same of blocks of numbers, not taken apart."""
    kinds = {
        "row": tf.int32,
        "inputs": tf.string,
        "targets": tf.string,
        "answer_choices": tf.string,
        "num_choices": tf.int32,
    }

    @tf.autograph.experimental.do_not_convert
    def read(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
        tensors = tf.numpy_function(rows.read, [numbers], list(kinds.values()))
        for key, tensor in zip(kinds, tensors, strict=True):
            tensor.set_shape([None, None] if key == "answer_choices" else [None])
        return dict(zip(kinds, tensors, strict=True))

    return blocks.map(read)


def _row_numbers(start: int, rows: int, shuffle: bool, seed: int | None, shard: Any) -> Any:
    """A dataset of a file's row numbers (a shard of them), shuffled as a whole, anew each epoch."""
    first, step = (shard.index, shard.num_shards) if shard else (0, 1)
    if shuffle:
        first %= rows  # no training shard may be empty: a task of one row would end the mixture
    numbers = tf.data.Dataset.range(start + first, start + rows, step)
    return numbers.shuffle(rows, seed=seed) if shuffle else numbers


class JsonLinesSource(seqio.DataSource):
    """Files of JSON lines, one a split, read by the row: memory holds the rows' offsets."""

    def __init__(self, paths: Mapping[str, str], eval_examples: int | None):
        super().__init__(splits=paths.keys())
        self.paths = dict(paths)
        self._eval_examples = eval_examples

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Any number of shards can be cut from the rows."""
        return True

    def list_shards(self, split: str) -> list[str]:
        """The file."""
        return [self.paths[split]]

    def scan(self, split: str) -> FileScan:
        """What is in the file of a split."""
        return scan_file(self.paths[split], None if split == "train" else self._eval_examples)

    def num_input_examples(self, split: str) -> int:
        """Number of rows; reads the file, the first time."""
        return self.scan(split).rows

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: Any = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Elements `row`, `inputs`, `targets`, `answer_choices`, `num_choices` of them."""
        scan = self.scan(split)
        rows = Rows([self.paths[split]], [scan])
        return _read_rows(rows, _row_numbers(0, scan.rows, shuffle, seed, shard_info))


class JsonLinesTask(SeekableTask, seqio.Task):
    """A task whose source shuffles: no buffer of encoded examples, no copy of the rows."""

    def get_dataset(self, *args: Any, use_cached: bool = False, **kwargs: Any) -> tf.data.Dataset:
        """See seqio.Task; name the arguments beyond `sequence_length` and `split`."""
        if not use_cached:
            kwargs.update(shuffle_buffer_size=1, try_in_mem_cache=False)
        return super().get_dataset(*args, use_cached=use_cached, **kwargs)

    def examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset:
        """See JsonLinesMixture.examples_from, of this task alone."""
        return _examples([self], [1.0], sequence_length, split, options)

    def cached_examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset | None:
        """See JsonLinesMixture.cached_examples_from, of this task alone."""
        return cached_example_dataset([self], [1.0], sequence_length, split, options)


class JsonLinesTwin(JsonLinesTask):
    """A task whose examples are the answer choices of its rows."""


class JsonLinesMixture(SeekableMixture, seqio.Mixture):
    """A mixture of tasks made here: it mixes row numbers and reads them in one pipeline.

    The examples and rates are those of seqio's Mixture, which builds a pipeline for each task
    (0.1 s each); their order is `order.Order`'s, and can be entered anywhere.
    """

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
        tasks = [task for task in self.tasks if split in task.splits]
        if use_cached or kwargs.get("passthrough_features") or not tasks:
            return super().get_dataset(
                sequence_length,
                split,
                use_cached,
                shuffle,
                seed,
                shard_info,
                num_epochs,
                **kwargs,
            )
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "big") if shuffle else 0
        return _examples(
            tasks,
            [self.get_rate(task) for task in tasks],
            sequence_length,
            split,
            StreamOptions(
                seed=seed,
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
        """
        tasks = [task for task in self.tasks if split in task.splits]
        rates = [self.get_rate(task) for task in tasks]
        return _examples(tasks, rates, sequence_length, split, options)

    def cached_examples_from(
        self, sequence_length: Mapping[str, int], split: str, options: StreamOptions
    ) -> tf.data.Dataset | None:
        """The same of the tasks' offline caches; None where one of them is not on this machine."""
        names = seqio_tasks.cached_subtask_names(self.name)
        tasks = [task for task in self.tasks if task.name in names and split in task.splits]
        rates = [self.get_rate(task) for task in tasks]
        return cached_example_dataset(tasks, rates, sequence_length, split, options)

    def eval_examples(
        self, sequence_length: Mapping[str, int], interleave: bool
    ) -> tuple[tf.data.Dataset, list[tuple[str, int]]]:
        """Each example of the evaluation splits once, tasks in turns or one after the other.

        With it each task's name and the number that its rows are counted from (in the twins'
        `idx`).
        """
        tasks = [task for task in self.tasks if "validation" in task.splits]
        rows = _rows(tasks, "validation")
        turn = np.concatenate([np.arange(scan.rows) for scan in rows.scans])
        numbers = np.argsort(turn, kind="stable") if interleave else np.arange(len(turn))
        ds = _read_rows(rows, tf.data.Dataset.from_tensor_slices(numbers))
        starts = [(task.name, int(start)) for task, start in zip(tasks, rows.starts, strict=True)]
        return _finish(ds, tasks[0], sequence_length), starts


def _examples(
    tasks: Sequence[Any],
    rates: Sequence[float],
    sequence_length: Mapping[str, int] | None,
    split: str,
    options: StreamOptions,
) -> tf.data.Dataset:
    """See JsonLinesMixture.examples_from."""
    rows = _rows(tasks, split)
    sizes = [scan.rows for scan in rows.scans]
    order = ExampleOrder(sizes, rates, options.seed, options.shuffle, options.num_epochs)
    if any(isinstance(task, JsonLinesTwin) for task in tasks):
        # rows are several examples each: which one is the n-th only reading them can tell
        blocks = _read_blocks(rows, row_number_blocks(order, 0, options.shard))
        ds = _finish(blocks.unbatch(), tasks[0], sequence_length).skip(options.start)
    else:
        blocks = _read_blocks(rows, row_number_blocks(order, options.start, options.shard))
        ds = _encode_blocks(blocks, tasks[0].output_features, sequence_length).unbatch()
    keep = {"inputs", "targets"}
    keep |= {f"{key}_pretokenized" for key in keep} if options.include_text else set()
    return ds.map(lambda example: {key: tf.convert_to_tensor(example[key]) for key in keep})


def _rows(tasks: Sequence[Any], split: str) -> Rows:
    sources = [task.source for task in tasks]
    return Rows(
        [source.paths[split] for source in sources],
        [source.scan(split) for source in sources],
    )


def _finish(ds: Any, task: Any, lengths: Any) -> Any:
    # What all tasks of a mixture have in common, their first does for all of them.
    ds = task.preprocess_precache(ds, seed=0)
    ds = task.preprocess_postcache(ds, sequence_length=lengths, seed=0)
    return ds.prefetch(tf.data.AUTOTUNE)


def _encode_blocks(blocks: Any, features: Mapping[str, Any], lengths: Any) -> Any:
    """What a task's preprocessors do to a row, done to blocks of them: twice as fast."""
    models = {key: feature.vocabulary.sp_model for key, feature in features.items()}

    @tf.autograph.experimental.do_not_convert
    def encode(block: dict[str, Any]) -> dict[str, Any]:
        encoded = {}
        for key, feature in features.items():
            ids = _tf_tokenizer(models[key]).tokenize(block[key])
            length = (lengths or {}).get(key)
            ids = ids if length is None else ids[:, : length - 1]
            ends = tf.fill([tf.size(block[key]), 1], feature.vocabulary.eos_id)
            encoded[key] = tf.concat([ids, ends], axis=1)
            encoded[f"{key}_pretokenized"] = block[key]
        return encoded

    return blocks.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


@functools.cache
def _tf_tokenizer(model: bytes) -> Any:
    # seqio makes a tokenizer (32 ms, a copy of the model) for each feature of each task.
    with tf.init_scope():
        return tf_text.SentencepieceTokenizer(model=model)


def _each(function: Callable[[dict[str, Any], Tokenize], dict[str, Any]]) -> Callable[..., Any]:
    """Makes a preprocessor of a function of one example, without autograph (slow to build)."""

    def preprocess(ds: Any, output_features: Mapping[str, Any]) -> Any:
        models = {key: feature.vocabulary.sp_model for key, feature in output_features.items()}

        @tf.autograph.experimental.do_not_convert
        def call(example: dict[str, Any]) -> dict[str, Any]:
            return function(example, lambda key, text: _tf_tokenizer(models[key]).tokenize(text))

        return ds.map(call, num_parallel_calls=tf.data.AUTOTUNE)

    return preprocess


def _encode(example: dict[str, Any], tokenize: Tokenize) -> dict[str, Any]:
    texts = {key: example[key] for key in ("inputs", "targets")}
    encoded = {key: tokenize(key, text) for key, text in texts.items()}
    return encoded | {f"{key}_pretokenized": text for key, text in texts.items()}


def _encode_with_choices(example: dict[str, Any], tokenize: Tokenize) -> dict[str, Any]:
    choices = example["answer_choices"][: example["num_choices"]]
    return _encode(example, tokenize) | {"answer_choices": choices}


def _repeat_per_choice(example: dict[str, Any], tokenize: Tokenize) -> dict[str, Any]:
    """P3's form, still stacked; a choice is correct where it reads as the target does."""
    number = example["num_choices"]
    choices = example["answer_choices"][:number]
    text = example["inputs"]
    same = {
        # Tokenised once for all choices. TensorFlow 2.21 crashes where rows of no elements are
        # unbatched, as an empty input's would be: a 0 goes before, until _encode_choice.
        "inputs": tf.pad(tokenize("inputs", text), [[1, 0]]),
        "inputs_pretokenized": text,
        "answer_choices": choices,
    }
    row = tf.fill([number], example["row"])
    return {key: tf.repeat(value[None], number, axis=0) for key, value in same.items()} | {
        "targets": choices,
        "idx": tf.stack([row, tf.range(number)], axis=1),
        "is_correct": tf.strings.strip(choices) == tf.strings.strip(example["targets"]),
        "weight": tf.ones([number], tf.float32),
    }


def _encode_choice(example: dict[str, Any], tokenize: Tokenize) -> dict[str, Any]:
    text = example["targets"]
    return example | {
        "inputs": example["inputs"][1:],
        "targets": tokenize("targets", text),
        "targets_pretokenized": text,
    }


def _with_choices(ds: Any) -> Any:
    return ds.filter(lambda example: example["num_choices"] > 0)  # unbatching none of them crashes


def _unbatch(ds: Any) -> Any:
    return ds.unbatch()


def _append_eos(
    ds: Any, output_features: Mapping[str, Any], sequence_length: Mapping[str, int] | None = None
) -> Any:
    """seqio's append_eos_after_trim, without autograph (slow to build)."""

    @tf.autograph.experimental.do_not_convert
    def append(example: dict[str, Any]) -> dict[str, Any]:
        ended = {}
        for key, feature in output_features.items():
            length = (sequence_length or {}).get(key)
            ids = example[key] if length is None else example[key][: length - 1]
            ended[key] = tf.concat([ids, [feature.vocabulary.eos_id]], axis=0)
        return example | ended

    return ds.map(append, num_parallel_calls=tf.data.AUTOTUNE)


def _score_target(
    output: Any, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> Any:
    """The postprocessor of a twin: what `rank_accuracy` needs of a row."""
    if not is_target or example is None:
        return output
    return tuple(int(i) for i in example["idx"]), bool(example["is_correct"])


def rank_accuracy(targets: Sequence[tuple[tuple[int, int], bool]], scores: Any) -> dict[str, float]:
    """Share (0 to 1) of the examples whose best-scored choice is correct, as `accuracy`."""
    scores = scores[0] if isinstance(scores, tuple) else scores
    best: dict[int, tuple[float, bool]] = {}
    for ((example, _), is_correct), score in zip(targets, scores, strict=True):
        if example not in best or score > best[example][0]:
            best[example] = float(score), is_correct
    return {"accuracy": float(np.mean([is_correct for _, is_correct in best.values()]))}


# --- registering


def add_task(
    task: str,
    twin: str | None,
    paths: Mapping[str, str],
    vocabulary: seqio.Vocabulary,
    eval_examples: int | None,
) -> None:
    """Registers a task, and under the name `twin` its choices to be scored, if it has choices.

    Args:
      task: the task's name.
      twin: the twin's; None: a task without choices.
      paths: split -> file.
      vocabulary: of inputs and targets.
      eval_examples: rows used of every split but `train`; None: all.
    """
    features = {key: seqio.Feature(vocabulary, add_eos=True) for key in ("inputs", "targets")}
    common = {
        "source": JsonLinesSource(paths, eval_examples),
        "output_features": features,
        "task_cls": JsonLinesTask,
    }
    last = (seqio.CacheDatasetPlaceholder(), _append_eos)
    encode = _encode_with_choices if twin else _encode
    seqio.TaskRegistry.add(task, preprocessors=(_each(encode), *last), **common)
    if twin:
        to_choices = (_with_choices, _each(_repeat_per_choice), _unbatch, _each(_encode_choice))
        seqio.TaskRegistry.add(
            twin,
            preprocessors=(*to_choices, *last),
            postprocess_fn=_score_target,
            metric_fns=[rank_accuracy],
            **{**common, "task_cls": JsonLinesTwin},
        )
