"""Writes a table of sentence embeddings for routers: `pemoe embed --help`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, options

# gin files name it `@embed.mean_pooled()`.
from pemoe_jax.tools.encoders import Encoder, EncoderInput, resolve_encoder
from pemoe_jax.tools.encoders import mean_pooled as mean_pooled

if TYPE_CHECKING:
    import numpy as np
    import tensorflow as tf

    from pemoe_jax.data.sentence_table import TableWriter
    from pemoe_jax.runtime import progress

FLAGS = gin_flags.make_parser(
    "embed",
    "Writes a vector for each distinct input of some tasks to the folder SENTENCE_EMBEDDINGS;\n"
    "train, evaluate and infer pass them to routers that read sentences (routing/sentence.gin).\n"
    "The same command resumes where it stopped; with other tasks it adds their inputs.",
    example="""\
  pemoe embed --gin_file=models/t5_1_1_large.gin --gin_file=runs/embed.gin \\
    --gin.SENTENCE_EMBEDDINGS=/tmp/sentences --gin.INITIAL_CHECKPOINT_PATH=base.safetensors \\
    --gin.JSONL_DIR=my_prompts --gin.VOCAB_PATH=spiece.model \\
    --gin.MIXTURE_OR_TASK_NAME="['jsonl_train', 'jsonl_score_eval']"
""",
    macros=["runs/embed.gin"],
)

_SPLITS = ("train", "evaluation")
_BLOCK = 256  # examples that TensorFlow hands over at a time
_CHUNK = 8192  # inputs that are sorted by length and encoded at a time


@dataclasses.dataclass(frozen=True)
class _SplitToRead:
    """A split of a task.

    Attributes:
      task, split: their names.
      is_evaluation: whether it is the task's evaluation split.
      num_examples: number of examples, or 1 if it is unknown.
    """

    task: str
    split: str
    is_evaluation: bool
    num_examples: int


def embed(
    output: str,
    data: options.Data,
    encoder: object,
    splits: str | Sequence[str] = _SPLITS,
    dtype: str = "float16",
) -> None:
    """Writes a table of sentence embeddings, or adds the inputs that it lacks.

    Args:
      output: folder of the table.
      data: the tasks and mixtures whose inputs are embedded. Inputs are truncated to their length
        before they are looked up, so it must be that of the run that reads the table.
      encoder: @embed.mean_pooled(), the mean over tokens of the base model's own encoder, or the
        dotted name of a function from a list of texts to an array [N, S].
      splits: 'train', 'evaluation' or both.
      dtype: dtype of the vectors on disk, 'float16' or 'float32'.

    Raises:
      InputError: a setting or a file is wrong. What was written before stays.
    """
    from pemoe_jax.data import sentence_table, sentences, seqio_tasks
    from pemoe_jax.runtime import progress
    from pemoe_jax.tasks.registered import run_register

    names = data.names
    splits = [splits] if isinstance(splits, str) else splits
    if not splits or not set(splits) <= set(_SPLITS):
        raise InputError(f"EMBED_SPLITS must be some of {_SPLITS}, got {splits!r}")
    lengths = seqio_tasks.validate_lengths(data.task_feature_lengths)
    resolved = resolve_encoder(encoder)
    run_register(data.register).print_summary()
    parts = _find_splits(names, splits, data.use_cached_tasks)
    vocabularies = {sentences.vocabulary_fingerprint(name) for name in names}
    if len(vocabularies) > 1:
        raise InputError(
            f"MIXTURE_OR_TASK_NAME must name tasks of one vocabulary, got several in {names}"
        )
    info = resolved.describe()
    writer = sentence_table.TableWriter(output, info, dtype, vocabularies.pop(), lengths["inputs"])
    num_before = len(writer.known_keys)
    if num_before:
        print(f"{writer.path} has {num_before:,} inputs already", flush=True)
    bar = progress.Progress("reading", sum(part.num_examples for part in parts), note="examples")

    def read(part: _SplitToRead) -> Iterator[EncoderInput]:
        return _read_inputs(part, lengths, data.use_cached_tasks, resolved.reads_text)

    try:
        _add_missing(parts, read, resolved, writer, data.batch_size, bar)
        total = writer.finish()
    finally:
        bar.close()
        writer.close()
    print(
        f"{writer.path}: {total:,} inputs, {total - num_before:,} of them new,"
        f" by {sentence_table.format_encoder(info)}"
    )


def _add_missing(
    parts: Sequence[_SplitToRead],
    read: Callable[[_SplitToRead], Iterator[EncoderInput]],
    encoder: Encoder,
    writer: "TableWriter",
    batch_size: int,
    bar: "progress.Progress",
) -> None:
    """Encodes the inputs that the table lacks and adds them."""
    from pemoe_jax.data import sentence_table
    from pemoe_jax.runtime import progress

    pending: dict[bytes, EncoderInput] = {}
    num_before, num_read = len(writer.known_keys), 0

    def encode() -> None:
        if pending:
            writer.add(list(pending), encoder.encode(list(pending.values()), batch_size))
            pending.clear()

    def note() -> str:
        num_new = len(writer.known_keys) + len(pending) - num_before
        return f"{progress.format_count(num_new)} new inputs"

    for part in parts:
        for number, item in enumerate(read(part), 1):
            key = sentence_table.input_key(item.ids)
            # Of several texts that are truncated to the same ids, the first is embedded.
            if key not in writer.known_keys:
                pending.setdefault(key, item)
            if len(pending) >= _CHUNK:
                encode()
            if number % _BLOCK == 0:
                bar.report_if_slow(num_read + min(number, part.num_examples), note())
        num_read += part.num_examples
        bar.report_if_slow(num_read, note())
    encode()


def _find_splits(
    names: Sequence[str], splits: Sequence[str], use_cached: bool
) -> list[_SplitToRead]:
    """Returns the splits to read; reports tasks without data."""
    from pemoe_jax.data import seqio_tasks

    subtask_names = seqio_tasks.cached_subtask_names if use_cached else seqio_tasks.subtask_names
    tasks = list(dict.fromkeys(task for name in names for task in subtask_names(name)))
    # P3's mixtures name tasks that a folder may lack, and are read without them.
    missing = [task for task in tasks if not seqio_tasks.has_data(task, use_cached)]
    if missing:
        more = f", … {len(missing) - 3} more" if len(missing) > 3 else ""
        print(f"no data, so left out: {len(missing)} tasks ({', '.join(missing[:3])}{more})")
    parts = []
    for name in tasks:
        task = seqio_tasks.get_mixture_or_task(name)
        eval_split = seqio_tasks.eval_split(name)
        requested = {"train": "train" in splits, eval_split: "evaluation" in splits}
        for split, is_requested in requested.items():
            if split is None or name in missing:
                continue
            if is_requested and split in task.splits:
                num_examples = 1 if use_cached else task.num_input_examples(split) or 1
                parts.append(_SplitToRead(name, split, split == eval_split, num_examples))
    if not parts:
        raise InputError(
            f"MIXTURE_OR_TASK_NAME {', '.join(names)}: expected a split of EMBED_SPLITS"
            f" {', '.join(splits)}, got none in {len(tasks)} tasks"
        )
    return parts


def _read_inputs(
    part: _SplitToRead, lengths: Mapping[str, int], use_cached: bool, with_text: bool
) -> Iterator[EncoderInput]:
    """Yields the inputs of a split as runs read them, repeated for each answer choice."""
    from pemoe_jax.data import choices, providers, seqio_tasks

    task = seqio_tasks.get_mixture_or_task(part.task)
    feature = task.output_features["inputs"]
    eos_id, length = feature.vocabulary.eos_id, lengths["inputs"]
    # Training and its evaluation loss read `length` tokens; scoring and decoding read one more and
    # truncate before the EOS. A `SeekableProvider` truncates in the same way, so one pass suffices.
    # Tasks of seqio itself may not: their evaluation splits are read in both ways.
    extra_tokens = [0]
    if part.is_evaluation:
        extra_tokens = [1] if isinstance(task, providers.SeekableProvider) else [0, 1]
    for extra in extra_tokens:
        longer = {key: value + extra for key, value in lengths.items()}
        with seqio_tasks.translate_read_errors(part.task, part.split, use_cached):
            ds = seqio_tasks.get_dataset(part.task, longer, part.split, use_cached)
        for ids, encoded_text in _read_rows(ds, part, use_cached, with_text):
            row = {"inputs": ids, "inputs_pretokenized": encoded_text}
            text = choices.feature_text({"inputs": feature}, row, "inputs") if with_text else None
            yield EncoderInput(choices.truncate(ids, length, eos_id)[0] if extra else ids, text)


def _read_rows(
    ds: "tf.data.Dataset", part: _SplitToRead, use_cached: bool, with_text: bool
) -> "Iterator[tuple[np.ndarray, bytes | None]]":
    """Yields the token ids of inputs, int32 [Li], and their text if they have one."""
    import numpy as np
    import tensorflow as tf

    from pemoe_jax.data import seqio_tasks

    has_text = with_text and "inputs_pretokenized" in ds.element_spec

    def select(example: "Mapping[str, tf.Tensor]") -> "tuple[tf.Tensor, tf.Tensor | str]":
        text = example["inputs_pretokenized"] if has_text else ""
        return tf.cast(example["inputs"], tf.int32), text

    blocks = ds.map(select).ragged_batch(_BLOCK).prefetch(2)
    flat = blocks.map(lambda ids, text: (ids.values, ids.row_splits, text))
    for values, ends, texts in seqio_tasks.numpy_iterator(flat, part.task, part.split, use_cached):
        for ids, text in zip(np.split(values, ends[1:-1]), texts, strict=True):
            yield ids, text if has_text else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return gin_flags.run_configured(FLAGS, embed, argv)
