"""The training feed: examples of a seqio task or mixture, packed, in an order that can be entered.

Everything here works for any registered task or mixture. Shapes: `B` batch, `L` length.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.data.seqio_tasks import Batch

if TYPE_CHECKING:
    from pemoe_jax.data.sentences import Source

# ids of inputs and targets, [Li] and [Lt], and where routers read it a sentence embedding, [S]
Example = tuple[np.ndarray, ...]
# of several: ids of inputs, of targets, and the embeddings where the tasks themselves give them
Block = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]


@dataclasses.dataclass
class Cuts:
    """Of the examples that were read, some of which may lie ready, those cut to their length."""

    examples: int = 0
    inputs: int = 0
    targets: int = 0

    def __str__(self) -> str:
        return (
            f"{self.inputs:,} inputs and {self.targets:,} targets of {self.examples:,} examples"
            " read were longer than TASK_FEATURE_LENGTHS, and cut"
        )


class Feed(Iterator[Batch]):
    """Batches to train on, and how far into the data they have come.

    Examples fill rows in the order in which they come: one that does not fit begins the next row.
    So the rows from any example on that began one depend on nothing before it, and going on at
    `position` gives what would have come.

    Args:
      examples: from the one that `start` stands for on.
      lengths: of rows of 'inputs' and 'targets'; longer examples are cut.
      batch_size: rows.
      pack: several examples in a row.
      start: examples consumed before.
      fill: a part of a batch at the end is filled up with zeros, and not dropped.
      cuts: counted by who makes `examples`.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        lengths: Mapping[str, int],
        batch_size: int,
        pack: bool,
        start: int = 0,
        fill: bool = False,
        cuts: Cuts | None = None,
    ) -> None:
        self._lengths = lengths["inputs"], lengths["targets"]
        self._batch_size, self._pack = batch_size, pack
        self._rows = _filled_rows(examples, self._lengths, pack)
        self._consumed, self._fill = start, fill
        self.cuts = cuts or Cuts()

    @property
    def position(self) -> dict[str, int]:
        """For `train_batches`: where the next batch begins."""
        return {"examples": self._consumed}

    def __next__(self) -> Batch:
        """A batch, int32 [B, L] in T5X's names, and where examples have them float32 [B, S]."""
        rows = list(itertools.islice(self._rows, self._batch_size))
        if len(rows) < self._batch_size and not (rows and self._fill):
            raise StopIteration
        self._consumed += sum(map(len, rows))
        inputs, targets = (
            _lay_out([[example[side] for example in row] for row in rows], self._lengths[side])
            for side in (0, 1)
        )
        shifted = np.pad(targets["tokens"][:, :-1], ((0, 0), (1, 0)))
        batch = {
            "encoder_input_tokens": inputs["tokens"],
            "decoder_target_tokens": targets["tokens"],
            "decoder_input_tokens": shifted,
            "decoder_loss_weights": (targets["tokens"] > 0).astype(np.int32),
        }
        if self._pack:
            batch["decoder_input_tokens"] = np.where(targets["positions"] > 0, shifted, 0)
            for side, found in (("encoder", inputs), ("decoder", targets)):
                batch[f"{side}_segment_ids"] = found["segment_ids"]
                batch[f"{side}_positions"] = found["positions"]
        elif len(rows[0][0]) > 2:
            batch["sentence_embeddings"] = np.stack([row[0][2] for row in rows], dtype=np.float32)
        return _filled(batch, self._batch_size)


def _filled(batch: Batch, batch_size: int) -> Batch:
    """With rows of zeros behind, which weigh nothing."""
    missing = batch_size - len(batch["decoder_target_tokens"])
    if not missing:
        return batch
    return {key: np.pad(value, ((0, missing), (0, 0))) for key, value in batch.items()}


def _filled_rows(
    examples: Iterable[Example], lengths: tuple[int, int], pack: bool
) -> Iterator[list[Example]]:
    row: list[Example] = []
    room_inputs, room_targets = lengths
    for whole in examples:
        inputs, targets = whole[0][: lengths[0]], whole[1][: lengths[1]]
        fits = len(inputs) <= room_inputs and len(targets) <= room_targets
        if row and not (fits and pack):
            yield row
            row, (room_inputs, room_targets) = [], lengths
        row.append((inputs, targets, *whole[2:]))
        room_inputs, room_targets = room_inputs - len(inputs), room_targets - len(targets)
    if row:
        yield row


def _lay_out(rows: Sequence[Sequence[np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Rows of pieces -> their `tokens`, `segment_ids` from 1 on and `positions`: int32 [B, L]."""
    pieces = [piece for row in rows for piece in row]
    counts = np.array([len(row) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)  # [N], of each piece
    first = np.cumsum(counts) - counts  # [B], each row's first piece
    sizes = np.array([len(piece) for piece in pieces])
    begins = np.cumsum(sizes) - sizes
    in_row = begins - begins[first][row_of]  # [N], where each piece begins in its row
    positions = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    at = np.repeat(row_of * length + in_row, sizes) + positions
    values = {
        "tokens": np.concatenate(pieces),
        "segment_ids": np.repeat(np.arange(len(pieces)) - first[row_of] + 1, sizes),
        "positions": positions,
    }
    found = {}
    for name, value in values.items():
        found[name] = np.zeros((len(rows), length), np.int32)
        found[name].reshape(-1)[at] = value
    return found


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
    sentences: Source | None = None,
) -> Feed:
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
    seqio_tasks.import_seqio()
    lengths = seqio_tasks.checked_lengths(task_feature_lengths)
    seqio_tasks.check_count("BATCH_SIZE", batch_size, 1)
    begin = 0 if start is None else start.get("examples")
    seqio_tasks.check_count("start['examples']", begin, 0)
    splits = seqio_tasks.check_task(name).splits
    if split not in splits:
        raise InputError(f"{name!r} has no split {split!r} (it has: {', '.join(sorted(splits))})")
    settings = {"seed": seed, "shuffle": shuffle, "num_epochs": num_epochs}
    with seqio_tasks.reading(name, split, use_cached):
        ds = _unpacked(name, lengths, split, int(begin or 0), use_cached, shard, settings)
    cuts = Cuts()
    blocks = _cut_blocks(_blocks_of(ds, name, split, use_cached, sentences), name, lengths, cuts)
    examples = _examples_of(blocks, name, sentences)
    return Feed(examples, lengths, batch_size, pack, int(begin or 0), cuts=cuts)


def _unpacked(
    name: str,
    lengths: Mapping[str, int],
    split: str,
    start: int,
    use_cached: bool,
    shard: tuple[int, int],
    settings: Mapping[str, Any],
) -> Any:
    """A dataset of a shard's single examples, from the start-th on.

    Those of our own sources are cut to one token more than `lengths`, so that one that has to be
    cut can be told from one that just fits. What another's preprocessors make of the lengths is not
    known, so its are given as they are.
    """
    seqio = seqio_tasks.import_seqio()
    provider = seqio_tasks.check_task(name)
    missing = [key for key in lengths if key not in provider.output_features]
    if missing:
        found = ", ".join(sorted(provider.output_features))
        raise InputError(f"{name!r} has no feature {missing[0]!r} to train on (it has: {found})")
    if use_cached:
        seqio_tasks.cached_subtasks(name)
    else:
        seqio_tasks.check_files(seqio_tasks.subtasks(name), split)
    method = "cached_examples_from" if use_cached else "examples_from"
    if hasattr(provider, method):
        longer = {key: length + 1 for key, length in lengths.items()}
        ds = getattr(provider, method)(longer, split, start=start, shard=shard, **settings)
        if ds is not None:
            return ds
    info = seqio.ShardInfo(*shard) if shard[1] > 1 else None
    ds = provider.get_dataset(
        lengths, split=split, use_cached=use_cached, shard_info=info, **settings
    )
    return ds.skip(start)


_BLOCK = 256  # examples that TensorFlow hands over at a time: one by one takes several times longer


def _blocks_of(
    ds: Any, name: str, split: str | None, use_cached: bool, sentences: Source | None
) -> Iterator[Block]:
    import tensorflow as tf

    given = sentences is not None and sentences.table is None  # by the tasks themselves

    def flat(block: Mapping[str, Any]) -> tuple[Any, ...]:
        ids = tuple(
            (tf.cast(block[key].values, tf.int32), block[key].row_splits)
            for key in ("inputs", "targets")
        )
        return ids, block[seqio_tasks.SENTENCE] if given else ()

    def kept(example: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: example[key] for key in ("inputs", "targets")}
        if sentences is not None and given:
            found[seqio_tasks.SENTENCE] = tf.ensure_shape(
                example[seqio_tasks.SENTENCE], [sentences.dim]
            )
        return found

    blocks = ds.map(kept).ragged_batch(_BLOCK).map(flat).prefetch(2)
    for ids, vectors in seqio_tasks.arrays(blocks, name, split, use_cached):
        inputs, targets = (np.split(column, ends[1:-1]) for column, ends in ids)
        yield inputs, targets, list(vectors)


def _cut_blocks(
    blocks: Iterable[Block], name: str, lengths: Mapping[str, int], cuts: Cuts
) -> Iterator[Block]:
    """Each sequence at most its length, an EOS at its end kept; counts those that were cut."""
    features = seqio_tasks.check_task(name).output_features
    eos_ids = {key: features[key].vocabulary.eos_id for key in lengths}
    for inputs, targets, vectors in blocks:
        kept = []
        for key, column in (("inputs", inputs), ("targets", targets)):
            found = [seqio_tasks.cut(ids, lengths[key], eos_ids[key]) for ids in column]
            kept.append([ids for ids, _ in found])
            setattr(cuts, key, getattr(cuts, key) + sum(was_cut for _, was_cut in found))
        cuts.examples += len(inputs)
        yield kept[0], kept[1], vectors


def _examples_of(blocks: Iterable[Block], name: str, sentences: Source | None) -> Iterator[Example]:
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
    sentences: Source | None = None,
) -> Iterator[Batch]:
    """Every example of the evaluation splits once; tasks take turns, so the first batches show all.

    Tasks without an evaluation split are left out (InputError where none has one). The last batch
    is filled up with zeros, which weigh nothing. Building it costs some milliseconds a task: keep
    the list for repeated use. With `sentences`, embeddings of inputs, rows are not packed.
    """
    seqio = seqio_tasks.import_seqio()
    import tensorflow as tf

    lengths = seqio_tasks.checked_lengths(task_feature_lengths)
    seqio_tasks.check_count("BATCH_SIZE", batch_size, 1)
    names = seqio_tasks.cached_subtasks(name) if use_cached else seqio_tasks.subtasks(name)
    splits = {task: seqio_tasks.eval_split(task) for task in names}
    splits = {task: split for task, split in splits.items() if split is not None}
    if not splits:
        raise InputError(
            f"no task of {name!r} has an evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"
        )

    kept = ["inputs", "targets"]
    if sentences is not None and sentences.table is None:
        kept.append(seqio_tasks.SENTENCE)

    def only(example: Mapping[str, Any]) -> dict[str, Any]:
        return {key: example[key] for key in kept}

    provider = seqio_tasks.check_task(name)
    if hasattr(provider, "every_example") and not use_cached:
        ds, _ = provider.every_example(lengths, in_turns=True)  # one pipeline instead of one a task
        ds = ds.map(only)
    else:
        order = {"shuffle": False, "seed": 0, "num_epochs": 1}
        with seqio_tasks.reading(name, use_cached=use_cached):
            datasets = [
                seqio_tasks.check_task(task)
                .get_dataset(lengths, split=split, use_cached=use_cached, **order)
                .map(only)
                for task, split in splits.items()
            ]
        turns = tf.data.Dataset.range(len(datasets)).repeat()
        ds = tf.data.Dataset.choose_from_datasets(datasets, turns, stop_on_empty_dataset=False)
    if max_batches is not None:
        seqio_tasks.check_count("max_batches", max_batches, 1)
    if sentences is not None:  # seqio's converter leaves away what it does not know
        blocks = _blocks_of(ds, name, None, use_cached, sentences)
        examples = _examples_of(blocks, name, sentences)
        return itertools.islice(Feed(examples, lengths, batch_size, False, fill=True), max_batches)
    ds = seqio.EncDecFeatureConverter(pack=pack)(ds, task_feature_lengths=lengths).batch(batch_size)
    if max_batches is not None:
        ds = ds.take(max_batches)
    return (_filled(batch, batch_size) for batch in _as_int32(ds, name, use_cached))


def _as_int32(ds: Any, name: str, use_cached: bool) -> Iterator[Batch]:
    for batch in seqio_tasks.arrays(ds, name, use_cached=use_cached):
        yield {key: np.asarray(value, np.int32) for key, value in batch.items()}


class Prefetched(Iterator[Any]):
    """What `prefetch` returns: the items, and the position that belongs to the last of them."""

    def __init__(self, source: Iterable[Any], size: int, made: Callable[[Any], Any]) -> None:
        self._queue: queue.Queue[tuple[str, Any, Any]] = queue.Queue(max(1, size))
        self._items = seqio_tasks.closed_at_exit(_from_thread(source, self._queue, made))
        self.position: Any = getattr(source, "position", None)

    @property
    def ready(self) -> bool:
        """Whether the next item is made already."""
        return not self._queue.empty()

    def __next__(self) -> Any:
        item, self.position = next(self._items)
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._items.close()


def prefetch(
    source: Iterable[Any], size: int = 4, made: Callable[[Any], Any] = lambda item: item
) -> Prefetched:
    """What is `made` of each item, up to `size` ahead by a thread; its exceptions are raised here.

    Where the source has a `position` (`Feed`), the result has that of the item it gave last, not of
    those that lie ready. Closing it, or forgetting it, ends the thread.
    """
    return Prefetched(source, size, made)


def _from_thread(
    source: Iterable[Any], items: queue.Queue[tuple[str, Any, Any]], made: Callable[[Any], Any]
) -> Generator[tuple[Any, Any], None, None]:
    stop = threading.Event()

    def put(*entry: Any) -> bool:
        while not stop.is_set():
            try:
                items.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put("item", made(item), getattr(source, "position", None)):
                    return
            put("end", None, None)
        except BaseException as error:  # whatever it is belongs to the reader of the items
            put("error", error, None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value, position = items.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value, position
    finally:
        stop.set()
        thread.join(timeout=5)
