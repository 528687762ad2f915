"""Writes a table of sentence embeddings for routers: `pemoe embed --help`."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.runtime import gin_flags, options, run_file
from pemoe_jax.tools.encoders import EncoderInput, resolve_encoder

# Imported under its own name to be public here: gin files refer to it as `@embed.mean_pooled()`.
from pemoe_jax.tools.encoders import mean_pooled as mean_pooled

if TYPE_CHECKING:
    import tensorflow as tf

    from pemoe_jax.data.sentence_table import EncoderInfo
    from pemoe_jax.runtime import progress
    from pemoe_jax.runtime.file_io import AnyPath
    from pemoe_jax.tools.encoders import Encoder

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
_BLOCK = 256  # examples converted from TensorFlow to numpy at a time
_CHUNK = 8192  # inputs that are sorted by length and encoded at a time


class _SplitToRead(NamedTuple):
    task: str
    split: str
    is_evaluation: bool
    num_examples: int  # 1 if it is unknown, as the progress bar needs a positive number


def embed(
    output: str,
    data: options.Data,
    encoder: object,
    splits: str | Sequence[str] = _SPLITS,
    dtype: str = "float16",
) -> None:
    """Writes a table of sentence embeddings, or adds the inputs that an existing one lacks.

    Args:
      output: folder of the table; an existing table is extended.
      data: the tasks and mixtures whose inputs are embedded. A run looks up its inputs after
        truncation, so TASK_FEATURE_LENGTHS must be those of the run.
      encoder: @embed.mean_pooled(), the mean over tokens of the base model's own encoder, or the
        dotted name of a function from a list of texts to an array with a vector for each text.
      splits: 'train', 'evaluation' or both.
      dtype: dtype of the vectors on disk, 'float16' or 'float32'.

    Raises:
      InputError: a setting or a file is wrong. Vectors that have been written are kept.
    """
    from pemoe_jax.data import sentence_table, sentences, seqio_tasks
    from pemoe_jax.runtime import progress
    from pemoe_jax.tasks.task_roles import run_register

    names, use_cached = data.names, data.use_cached_tasks
    splits = [splits] if isinstance(splits, str) else splits
    if not splits or not set(splits) <= set(_SPLITS):
        raise InputError(f"EMBED_SPLITS must be some of {_SPLITS}, got {splits!r}")
    lengths = seqio_tasks.validate_lengths(data.task_feature_lengths)
    resolved = resolve_encoder(encoder)
    run_register(data.register).print_summary()
    splits_to_read = _find_splits(names, splits, use_cached)
    vocabularies = {sentences.vocabulary_fingerprint(name) for name in names}
    if len(vocabularies) > 1:
        raise InputError(
            f"MIXTURE_OR_TASK_NAME must name tasks of one vocabulary, got several in {names}"
        )
    info = resolved.describe()
    writer = sentence_table.TableWriter(output, info, dtype, vocabularies.pop(), lengths["inputs"])
    _begin_run_file(writer.path, resolved, info, data)
    num_before = len(writer.known_keys)
    if num_before:
        print(f"{writer.path} has {num_before:,} inputs already", flush=True)
    bar = progress.Progress("reading", sum(s.num_examples for s in splits_to_read), note="examples")
    read = functools.partial(
        _read_inputs, lengths=lengths, use_cached=use_cached, with_text=resolved.reads_text
    )
    try:
        for inputs in _new_inputs(splits_to_read, read, writer.known_keys, bar):
            writer.add(list(inputs), resolved.encode(list(inputs.values()), data.batch_size))
        total = writer.finish()
    finally:
        bar.close()
    print(
        f"{writer.path}: {total:,} inputs, {total - num_before:,} of them new,"
        f" by {sentence_table.format_encoder(info)}"
    )


def _begin_run_file(
    folder: "AnyPath", encoder: "Encoder", info: "EncoderInfo", data: options.Data
) -> None:
    from pemoe_jax.checkpoints import records

    devices = None
    # A function of texts may use a GPU through another library. `jax.devices()` would start JAX,
    # which takes most of the GPU's memory.
    if not encoder.reads_text:
        import jax

        from pemoe_jax.runtime import step_times

        devices = step_times.describe_devices(jax.devices())
    run_file.begin(
        folder,
        versions=records.package_versions(),
        devices=devices,
        encoder=dict(info),
        data={
            "tasks": data.mixture_or_task_name,
            "TASK_FEATURE_LENGTHS": dict(data.task_feature_lengths),
        },
    )


def _new_inputs(
    splits: Sequence[_SplitToRead],
    read: Callable[[_SplitToRead], Iterator[EncoderInput]],
    known_keys: Set[bytes],
    bar: "progress.Progress",
) -> Iterator[dict[bytes, EncoderInput]]:
    """Yields the inputs whose keys are not known yet as {key: input}, `_CHUNK` at a time.

    Args:
      splits: the splits to read, in order.
      read: reads the inputs of a split.
      known_keys: keys of the inputs in the table. The caller adds the keys of each yielded dict
        before it asks for the next one.
      bar: the progress bar, over examples.
    """
    from pemoe_jax.data import sentence_table
    from pemoe_jax.runtime import progress

    inputs: dict[bytes, EncoderInput] = {}
    num_before, num_read = len(known_keys), 0

    def note() -> str:
        num_new = len(known_keys) + len(inputs) - num_before
        return f"{progress.format_count(num_new)} new inputs"

    for split in splits:
        for number, item in enumerate(read(split), 1):
            key = sentence_table.input_key(item.ids)
            # If several texts have the same ids after truncation, the first one is embedded.
            if key not in known_keys:
                inputs.setdefault(key, item)
            if len(inputs) >= _CHUNK:
                yield inputs
                inputs = {}
            if number % _BLOCK == 0:
                bar.report_if_slow(num_read + min(number, split.num_examples), note())
        num_read += split.num_examples
        bar.report_if_slow(num_read, note())
    if inputs:
        yield inputs


def _find_splits(
    names: Sequence[str], splits: Sequence[str], use_cached: bool
) -> list[_SplitToRead]:
    """Returns the splits to read; prints which tasks have no data."""
    from pemoe_jax.data import seqio_tasks

    subtasks = (task for name in names for task in seqio_tasks.subtask_names(name, use_cached))
    tasks = list(dict.fromkeys(subtasks))
    # P3's mixtures contain tasks that a folder may lack; runs skip these.
    missing = [task for task in tasks if not seqio_tasks.has_data(task, use_cached)]
    if missing:
        more = f", … {len(missing) - 3} more" if len(missing) > 3 else ""
        print(
            f"skipped {plural(len(missing), 'task')} without data: {', '.join(missing[:3])}{more}"
        )
    to_read = []
    for name in tasks:
        task = seqio_tasks.get_mixture_or_task(name)
        for kind, split in (("train", "train"), ("evaluation", seqio_tasks.eval_split(name))):
            if split and kind in splits and split in task.splits and name not in missing:
                # seqio counts the examples of the source, not those of a cache.
                num_examples = 1 if use_cached else task.num_input_examples(split) or 1
                to_read.append(_SplitToRead(name, split, kind == "evaluation", num_examples))
    if not to_read:
        raise InputError(
            f"MIXTURE_OR_TASK_NAME {', '.join(names)}: expected a split of EMBED_SPLITS"
            f" {', '.join(splits)}, got none in {len(tasks)} tasks"
        )
    return to_read


def _read_inputs(
    split: _SplitToRead, lengths: Mapping[str, int], use_cached: bool, with_text: bool
) -> Iterator[EncoderInput]:
    """Yields the inputs of a split as runs read them, one for each row.

    Rows of a `_score_eval` task repeat an input for each of its answer choices.

    Args:
      split: the split.
      lengths: maximum number of tokens of 'inputs' and 'targets'.
      use_cached: whether to read seqio's offline caches.
      with_text: whether the encoder reads texts.
    """
    import numpy as np

    from pemoe_jax.data import choices, row_checks, seekable_tasks, seqio_tasks

    def select(example: "Mapping[str, tf.Tensor]") -> "tuple[tf.Tensor, tf.Tensor | str]":
        return example["inputs"], example.get("inputs_pretokenized", "") if with_text else ""

    task = seqio_tasks.get_mixture_or_task(split.task)
    features = task.output_features
    vocabulary, length = features["inputs"].vocabulary, lengths["inputs"]
    # A long input may be truncated to two different sequences of ids, which need a vector each.
    # Training and its evaluation loss read `length` tokens. Scoring and decoding read one more, and
    # then truncate, but keep an EOS at the end. A `SeekableProvider` truncates in this way for
    # training too, so one pass is enough. Evaluation splits of other tasks are read in both ways.
    extra_tokens = [0]
    if split.is_evaluation:
        extra_tokens = [1] if isinstance(task, seekable_tasks.SeekableProvider) else [0, 1]
    for extra in extra_tokens:
        longer = {key: value + extra for key, value in lengths.items()}
        with seqio_tasks.translate_read_errors(split.task, split.split, use_cached):
            ds = seqio_tasks.get_dataset(split.task, longer, split.split, use_cached)
        blocks = ds.map(select).ragged_batch(_BLOCK).prefetch(2)
        flat = blocks.map(lambda ids, text: (ids.values, ids.row_splits, text))
        has_text = "inputs_pretokenized" in ds.element_spec
        arrays = seqio_tasks.numpy_iterator(flat, split.task, split.split, use_cached)
        count = 0
        for values, ends, texts in arrays:
            row_checks.check_block_ids(
                values, ends, split.task, "inputs", vocabulary.vocab_size, count
            )
            count += len(texts)
            sequences = np.split(values.astype(np.int32), ends[1:-1])
            for ids, encoded in zip(sequences, texts, strict=True):
                row = {"inputs": ids, "inputs_pretokenized": encoded if has_text else None}
                text = choices.feature_text(features, row, "inputs") if with_text else None
                if extra:
                    ids, _ = choices.truncate(ids, length, vocabulary.eos_id)
                yield EncoderInput(ids, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return gin_flags.run_configured(FLAGS, embed, argv)
