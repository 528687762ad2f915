"""Batches for training and for the evaluation loss, of any seqio task or mixture.

Shapes: `B` batch, `L` length, `S` sentence embedding size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data import choices, seqio_import, seqio_tasks
from pemoe_jax.data.packing import Batch, BatchIterator, Example, ExampleCounts
from pemoe_jax.data.row_checks import TEXT_FEATURES, check_block_ids
from pemoe_jax.data.seekable_tasks import SeekableMixture, SeekableProvider, StreamOptions
from pemoe_jax.data.seqio_tasks import SENTENCE_FEATURE

if TYPE_CHECKING:
    import tensorflow as tf

    from pemoe_jax.data.sentences import SentenceSource

# Number of examples converted from TensorFlow to numpy at a time: converting them one by one takes
# several times longer.
_BLOCK = 256


def train_batches(
    name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    *,
    split: str = "train",
    seed: int = 0,
    pack: bool = True,
    shuffle: bool = True,
    start: Mapping[str, int] | None = None,
    num_epochs: int | None = None,
    use_cached: bool = False,
    shard: tuple[int, int] = (0, 1),
    sentences: SentenceSource | None = None,
) -> BatchIterator:
    """Returns training batches, which depend on the arguments alone.

    Args:
      name: a seqio task or mixture.
      task_feature_lengths: lengths of 'inputs' and 'targets'.
      batch_size: number of rows, B.
      split: split of the tasks.
      seed: seed of the order of examples.
      pack: whether rows hold several examples.
      shuffle: whether each task's examples are shuffled.
      start: `position` of an earlier iterator, to resume there. A `SeekableProvider` starts at that
        example; for other providers the examples before it are read and dropped.
      num_epochs: the stream ends when a task that has been read this many times is drawn again;
        None: never.
      use_cached: whether to read seqio's offline caches.
      shard: (index, count): reads every count-th example, from `index` on; `start` counts these.
      sentences: source of the inputs' sentence embeddings; requires `pack=False`.

    Raises:
      InputError: an argument is wrong or the data cannot be read. As much as possible is checked
        here rather than with the first batch.
    """
    seqio_import.import_seqio()
    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    check_integer("BATCH_SIZE", batch_size)
    begin = 0 if start is None else start.get("examples")
    check_integer("start['examples']", begin, minimum=0)
    begin = int(begin or 0)
    splits = seqio_tasks.get_mixture_or_task(name).splits
    if split not in splits:
        raise InputError(f"{name!r} has no split {split!r} (it has: {', '.join(sorted(splits))})")
    options = StreamOptions(seed, begin, shuffle, num_epochs, shard)
    with seqio_tasks.translate_read_errors(name, split, use_cached):
        ds = _example_dataset(name, lengths, split, use_cached, options)
    counts = ExampleCounts()
    examples = _read_examples(ds, name, lengths, split, use_cached, sentences, counts, begin)
    return BatchIterator(examples, lengths, batch_size, pack, begin, counts=counts)


def eval_batches(
    name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    max_batches: int | None = None,
    *,
    pack: bool = True,
    use_cached: bool = False,
    sentences: SentenceSource | None = None,
) -> Iterator[Batch]:
    """Returns the examples of the evaluation splits, once each, in at most `max_batches` batches.

    Tasks take turns, so that the first batches cover all of them; tasks without an evaluation split
    are left out. Building the pipeline takes some milliseconds for each task: to use the batches
    again, keep them in a list.

    Args:
      name, task_feature_lengths, use_cached: see `train_batches`.
      batch_size: number of rows; the last batch is padded with rows of loss weight 0.
      max_batches: largest number of batches; None: all.
      pack: whether rows hold several examples; with `sentences` they never do.
      sentences: source of the inputs' sentence embeddings.

    Raises:
      InputError: an argument is wrong, or no task has an evaluation split with rows.
    """
    seqio_import.import_seqio()
    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    check_integer("BATCH_SIZE", batch_size)
    if max_batches is not None:
        check_integer("EVAL_BATCHES", max_batches)
    ds = _eval_dataset(name, lengths, use_cached, _feature_names(sentences))
    examples = _read_examples(ds, name, lengths, None, use_cached, sentences, ExampleCounts())
    pack = pack and sentences is None
    # The first batch is read here, so that a split without rows is an error of this call.
    batches = BatchIterator(examples, lengths, batch_size, pack, pad_last=True)
    first = next(batches, None)
    if first is None:
        raise InputError(f"the evaluation splits of {name!r} have no rows")
    return itertools.islice(itertools.chain([first], batches), max_batches)


def _feature_names(sentences: SentenceSource | None) -> Sequence[str]:
    """Returns the names of the features that are read of each example."""
    reads_feature = sentences is not None and sentences.table is None
    return (*TEXT_FEATURES, SENTENCE_FEATURE) if reads_feature else TEXT_FEATURES


def _example_dataset(
    name: str,
    lengths: Mapping[str, int],
    split: str,
    use_cached: bool,
    options: StreamOptions,
) -> tf.data.Dataset:
    """Returns the stream of training examples of a task or mixture."""
    seqio = seqio_import.import_seqio()
    provider = seqio_tasks.get_mixture_or_task(name)
    missing = [key for key in lengths if key not in provider.output_features]
    if missing:
        features = ", ".join(sorted(provider.output_features))
        raise InputError(f"{name!r} has no feature {missing[0]!r} to train on (it has: {features})")
    tasks = seqio_tasks.subtask_names(name, use_cached)
    if not use_cached:
        seqio_tasks.check_source_files(tasks, split)
    if isinstance(provider, SeekableProvider):
        # One token longer, so that `_read_examples` can detect the examples that it truncates.
        # Other providers get the exact lengths, which their preprocessors may depend on.
        longer = {key: length + 1 for key, length in lengths.items()}
        read = provider.cached_examples_from if use_cached else provider.examples_from
        ds = read(longer, split, options)
        if ds is not None:  # None: a cache is not a local folder, so seqio reads all of them
            return ds
    index, count = options.shard
    ds = provider.get_dataset(
        lengths,
        split=split,
        use_cached=use_cached,
        shard_info=seqio.ShardInfo(index, count) if count > 1 else None,
        seed=options.seed,
        shuffle=options.shuffle,
        num_epochs=options.num_epochs,
    )
    return ds.skip(options.start)


def _eval_dataset(
    name: str, lengths: Mapping[str, int], use_cached: bool, features: Sequence[str]
) -> tf.data.Dataset:
    """Returns `features` of the examples of the evaluation splits; tasks take turns."""
    import tensorflow as tf

    tasks = seqio_tasks.subtask_names(name, use_cached)
    splits = {task: seqio_tasks.eval_split(task) for task in tasks}
    if not any(splits.values()):
        raise InputError(
            f"no task of {name!r} has an evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"
        )
    provider = seqio_tasks.get_mixture_or_task(name)
    if isinstance(provider, SeekableMixture) and not use_cached:
        # One pipeline instead of one for each task.
        return provider.eval_examples(lengths, interleave=True)[0]

    def select(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # Datasets can only be interleaved if they have the same features.
        return {key: example[key] for key in features}

    with seqio_tasks.translate_read_errors(name, use_cached=use_cached):
        datasets = [
            seqio_tasks.get_dataset(task, lengths, split, use_cached).map(select)
            for task, split in splits.items()
            if split is not None
        ]
    turns = tf.data.Dataset.range(len(datasets)).repeat()
    return tf.data.Dataset.choose_from_datasets(datasets, turns, stop_on_empty_dataset=False)


def _read_examples(
    ds: tf.data.Dataset,
    name: str,
    lengths: Mapping[str, int],
    split: str | None,
    use_cached: bool,
    sentences: SentenceSource | None,
    counts: ExampleCounts,
    start: int = 0,
) -> Iterator[Example]:
    """Yields the examples of a dataset, with their sentence embeddings if there is a source.

    Sequences are truncated (`choices.truncate`), and `counts` is updated. `start` is the index of
    the first example, for errors, which number examples from 1.

    Raises:
      InputError: a token id is outside the vocabulary, or a sentence embedding is missing or not
        finite.
    """
    import tensorflow as tf

    names = _feature_names(sentences)
    features = seqio_tasks.get_mixture_or_task(name).output_features
    vocabularies = {key: features[key].vocabulary for key in TEXT_FEATURES}

    def select(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        selected = {key: example[key] for key in names}
        if sentences is not None and SENTENCE_FEATURE in selected:
            embedding = selected[SENTENCE_FEATURE]
            selected[SENTENCE_FEATURE] = tf.ensure_shape(embedding, [sentences.dim])
        return selected

    def flatten(block: Mapping[str, tf.Tensor]) -> tuple[object, ...]:
        # TensorFlow converts a ragged tensor to numpy row by row, but its two parts at once.
        ids = {key: (block[key].values, block[key].row_splits) for key in TEXT_FEATURES}
        return ids, block.get(SENTENCE_FEATURE, ())

    blocks = ds.map(select).ragged_batch(_BLOCK).map(flatten).prefetch(2)
    for ids, embeddings in seqio_tasks.numpy_iterator(blocks, name, split, use_cached):
        first = start + counts.examples
        for key, (values, row_splits) in ids.items():
            check_block_ids(values, row_splits, name, key, vocabularies[key].vocab_size, first)
        inputs, targets = (
            [
                choices.truncate(sequence, lengths[key], vocabularies[key].eos_id)
                for sequence in np.split(values, row_splits[1:-1])
            ]
            for key, (values, row_splits) in ids.items()
        )
        counts.examples += len(inputs)
        counts.cut_inputs += sum(truncated for _, truncated in inputs)
        counts.cut_targets += sum(truncated for _, truncated in targets)
        empty = {
            key: _count_empty(values, row_splits, vocabularies[key].eos_id)
            for key, (values, row_splits) in ids.items()
        }
        counts.empty_inputs += empty["inputs"]
        counts.empty_targets += empty["targets"]
        columns = [[tokens for tokens, _ in column] for column in (inputs, targets)]
        if sentences is not None:
            # `embeddings` is empty if they are in a table and not a feature of the tasks.
            vectors = list(embeddings) or sentences.vectors(columns[0], name)
            if not np.isfinite(vectors).all():
                raise InputError(f"{name}: expected finite sentence embeddings, got inf or nan")
            columns.append(vectors)
        yield from zip(*columns, strict=True)


def _count_empty(ids: np.ndarray, row_splits: np.ndarray, eos_id: int) -> int:
    """Returns how many sequences of a block are empty or only an EOS."""
    sizes = np.diff(row_splits)
    single = ids[row_splits[:-1][sizes == 1]]
    return int((sizes == 0).sum() + (single == eos_id).sum())
