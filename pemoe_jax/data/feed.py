"""The training feed: examples of a seqio task or mixture, packed, in an order that can be entered.

Everything here works for any registered task or mixture. Shapes: `B` batch, `L` length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_import, seqio_tasks
from pemoe_jax.data.packing import Batch, BatchIterator, Example, Truncations, pad_batch
from pemoe_jax.data.providers import SeekableMixture, SeekableProvider, StreamOptions

if TYPE_CHECKING:
    from pemoe_jax.data.sentences import SentenceSource

# of several: ids of inputs, of targets, and the embeddings where the tasks themselves give them
Block = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]


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
    """Batches of int32 [B, L] in T5X's names, the same for the same seed.

    Args:
      name: of a seqio task or mixture.
      task_feature_lengths: of rows of 'inputs' and 'targets'.
      batch_size: rows.
      split: of the tasks.
      seed: of the order.
      pack: several examples in a row.
      shuffle: of each task's examples.
      start: an earlier feed's `position`, to go on there. A provider that has a method
        `examples_from`, or for offline caches `cached_examples_from` (see
        `tasks.jsonl_source.JsonLinesMixture`), begins there; of any other the examples before are
        read and thrown away.
      num_epochs: None: for ever; a mixture ends at the first task that is used up.
      use_cached: seqio's offline caches.
      shard: (index, count): every count-th example; `start` counts these.
      sentences: of each input, float32 [B, S]; rows must not be packed.

    Raises:
      InputError: for whatever is wrong, by the call and not by the first `next`.
    """
    seqio_import.import_seqio()
    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    seqio_tasks.check_integer("BATCH_SIZE", batch_size, 1)
    begin = 0 if start is None else start.get("examples")
    seqio_tasks.check_integer("start['examples']", begin, 0)
    splits = seqio_tasks.get_mixture_or_task(name).splits
    if split not in splits:
        raise InputError(f"{name!r} has no split {split!r} (it has: {', '.join(sorted(splits))})")
    options = StreamOptions(seed, int(begin or 0), shuffle, num_epochs, shard)
    with seqio_tasks.translate_read_errors(name, split, use_cached):
        ds = _unpacked(name, lengths, split, use_cached, options)
    truncations = Truncations()
    blocks = _cut_blocks(
        _blocks_of(ds, name, split, use_cached, sentences), name, lengths, truncations
    )
    examples = _examples_of(blocks, name, sentences)
    return BatchIterator(
        examples, lengths, batch_size, pack, int(begin or 0), truncations=truncations
    )


def _unpacked(
    name: str,
    lengths: Mapping[str, int],
    split: str,
    use_cached: bool,
    options: StreamOptions,
) -> Any:
    """A dataset of a shard's single examples, from the start-th on.

    Those of our own sources are cut to one token more than `lengths`, so that one that has to be
    cut can be told from one that just fits. What another's preprocessors make of the lengths is not
    known, so its are given as they are.
    """
    seqio = seqio_import.import_seqio()
    provider = seqio_tasks.get_mixture_or_task(name)
    missing = [key for key in lengths if key not in provider.output_features]
    if missing:
        found = ", ".join(sorted(provider.output_features))
        raise InputError(f"{name!r} has no feature {missing[0]!r} to train on (it has: {found})")
    if use_cached:
        seqio_tasks.cached_subtask_names(name)
    else:
        seqio_tasks.check_source_files(seqio_tasks.subtask_names(name), split)
    if isinstance(provider, SeekableProvider):
        longer = {key: length + 1 for key, length in lengths.items()}
        read = provider.cached_examples_from if use_cached else provider.examples_from
        ds = read(longer, split, options)
        if ds is not None:
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


_BLOCK = 256  # examples that TensorFlow hands over at a time: one by one takes several times longer


def _blocks_of(
    ds: Any, name: str, split: str | None, use_cached: bool, sentences: SentenceSource | None
) -> Iterator[Block]:
    import tensorflow as tf

    given = sentences is not None and sentences.table is None  # by the tasks themselves

    def flat(block: Mapping[str, Any]) -> tuple[Any, ...]:
        ids = tuple(
            (tf.cast(block[key].values, tf.int32), block[key].row_splits)
            for key in ("inputs", "targets")
        )
        return ids, block[seqio_tasks.SENTENCE_FEATURE] if given else ()

    def kept(example: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: example[key] for key in ("inputs", "targets")}
        if sentences is not None and given:
            found[seqio_tasks.SENTENCE_FEATURE] = tf.ensure_shape(
                example[seqio_tasks.SENTENCE_FEATURE], [sentences.dim]
            )
        return found

    blocks = ds.map(kept).ragged_batch(_BLOCK).map(flat).prefetch(2)
    for ids, vectors in seqio_tasks.numpy_iterator(blocks, name, split, use_cached):
        inputs, targets = (np.split(column, ends[1:-1]) for column, ends in ids)
        yield inputs, targets, list(vectors)


def _cut_blocks(
    blocks: Iterable[Block], name: str, lengths: Mapping[str, int], truncations: Truncations
) -> Iterator[Block]:
    """Each sequence at most its length, an EOS at its end kept; counts those that were cut."""
    features = seqio_tasks.get_mixture_or_task(name).output_features
    eos_ids = {key: features[key].vocabulary.eos_id for key in lengths}
    for inputs, targets, vectors in blocks:
        kept = []
        for key, column in (("inputs", inputs), ("targets", targets)):
            found = [choices.truncate(ids, lengths[key], eos_ids[key]) for ids in column]
            kept.append([ids for ids, _ in found])
            setattr(
                truncations, key, getattr(truncations, key) + sum(was_cut for _, was_cut in found)
            )
        truncations.examples += len(inputs)
        yield kept[0], kept[1], vectors


def _examples_of(
    blocks: Iterable[Block], name: str, sentences: SentenceSource | None
) -> Iterator[Example]:
    for inputs, targets, vectors in blocks:
        columns = [inputs, targets]
        if sentences is not None:
            columns.append(vectors or sentences.vectors(inputs, name))
        yield from zip(*columns, strict=True)


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
    """Every example of the evaluation splits once; tasks take turns, so the first batches show all.

    Tasks without an evaluation split are left out (InputError where none has one). The last batch
    is filled up with zeros, which weigh nothing. Building it costs some milliseconds a task: keep
    the list for repeated use. With `sentences`, embeddings of inputs, rows are not packed.
    """
    seqio = seqio_import.import_seqio()
    import tensorflow as tf

    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    seqio_tasks.check_integer("BATCH_SIZE", batch_size, 1)
    names = (
        seqio_tasks.cached_subtask_names(name) if use_cached else seqio_tasks.subtask_names(name)
    )
    splits = {task: seqio_tasks.eval_split(task) for task in names}
    splits = {task: split for task, split in splits.items() if split is not None}
    if not splits:
        raise InputError(
            f"no task of {name!r} has an evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"
        )

    kept = ["inputs", "targets"]
    if sentences is not None and sentences.table is None:
        kept.append(seqio_tasks.SENTENCE_FEATURE)

    def only(example: Mapping[str, Any]) -> dict[str, Any]:
        return {key: example[key] for key in kept}

    provider = seqio_tasks.get_mixture_or_task(name)
    if isinstance(provider, SeekableMixture) and not use_cached:
        ds, _ = provider.eval_examples(
            lengths, interleave=True
        )  # one pipeline instead of one a task
        ds = ds.map(only)
    else:
        order = {"shuffle": False, "seed": 0, "num_epochs": 1}
        with seqio_tasks.translate_read_errors(name, use_cached=use_cached):
            datasets = [
                seqio_tasks.get_mixture_or_task(task)
                .get_dataset(lengths, split=split, use_cached=use_cached, **order)
                .map(only)
                for task, split in splits.items()
            ]
        turns = tf.data.Dataset.range(len(datasets)).repeat()
        ds = tf.data.Dataset.choose_from_datasets(datasets, turns, stop_on_empty_dataset=False)
    if max_batches is not None:
        seqio_tasks.check_integer("max_batches", max_batches, 1)
    if sentences is not None:  # seqio's converter leaves away what it does not know
        blocks = _blocks_of(ds, name, None, use_cached, sentences)
        examples = _examples_of(blocks, name, sentences)
        return itertools.islice(
            BatchIterator(examples, lengths, batch_size, False, fill=True), max_batches
        )
    ds = seqio.EncDecFeatureConverter(pack=pack)(ds, task_feature_lengths=lengths).batch(batch_size)
    if max_batches is not None:
        ds = ds.take(max_batches)
    return (pad_batch(batch, batch_size) for batch in _as_int32(ds, name, use_cached))


def _as_int32(ds: Any, name: str, use_cached: bool) -> Iterator[Batch]:
    for batch in seqio_tasks.numpy_iterator(ds, name, use_cached=use_cached):
        yield {key: np.asarray(value, np.int32) for key, value in batch.items()}
