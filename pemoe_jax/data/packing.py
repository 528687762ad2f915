"""Packs examples into rows, and rows into batches.

Packing is next-fit: an example that does not fit begins the next row. A row therefore depends only
on the examples in it, and the number of examples consumed is all that a run needs to resume. seqio
also packs next-fit, but within blocks of examples. `grain` packs first-fit or best-fit, which fills
rows better, but makes a row depend on many examples around it.

Shapes: `B` batch, `L` length, `S` sentence embedding size, `N` examples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Batch = dict[str, np.ndarray]

# Token ids of inputs and targets, [Li] and [Lt], and optionally a sentence embedding [S].
Example = tuple[np.ndarray, ...]


@dataclasses.dataclass
class ExampleCounts:
    """Numbers of examples read so far, prefetched ones included, and of odd ones among them."""

    examples: int = 0
    cut_inputs: int = 0
    cut_targets: int = 0
    empty_inputs: int = 0
    empty_targets: int = 0

    def describe(self) -> list[str]:
        """Returns a line for each kind of odd examples that was read."""
        lines = []
        for inputs, targets, kind in (
            (self.cut_inputs, self.cut_targets, "longer than TASK_FEATURE_LENGTHS and truncated"),
            (self.empty_inputs, self.empty_targets, "empty"),
        ):
            if inputs or targets:
                lines.append(
                    f"{inputs:,} inputs and {targets:,} targets of {self.examples:,} examples were"
                    f" {kind}"
                )
        return lines


class BatchIterator(Iterator[Batch]):
    """Batches of examples, and their position in the data.

    Args:
      examples: the examples, from index `start` on.
      lengths: lengths of 'inputs' and 'targets'; longer examples are truncated.
      batch_size: number of rows, B.
      pack: whether a row holds several examples.
      start: number of examples before the first one.
      pad_last: whether an incomplete last batch is padded with rows of zeros rather than dropped.
      counts: statistics that the source of `examples` keeps.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        lengths: Mapping[str, int],
        batch_size: int,
        pack: bool,
        start: int = 0,
        pad_last: bool = False,
        counts: ExampleCounts | None = None,
    ) -> None:
        self._lengths = lengths["inputs"], lengths["targets"]
        self._batch_size, self._pack = batch_size, pack
        self._rows = _fill_rows(examples, self._lengths, pack)
        self._consumed, self._pad_last = start, pad_last
        self.counts = counts or ExampleCounts()

    @property
    def position(self) -> dict[str, int]:
        """Position of the next batch, as `feed.train_batches` takes it."""
        return {"examples": self._consumed}

    def __next__(self) -> Batch:
        """Returns T5X's features, int32 [B, L], and `sentence_embeddings`, float32 [B, S], if any.

        Rows of zeros have loss weight 0.
        """
        rows = list(itertools.islice(self._rows, self._batch_size))
        if len(rows) < self._batch_size and not (rows and self._pad_last):
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
            # Each packed target starts from 0, not from the last token of the target before it.
            batch["decoder_input_tokens"] = np.where(targets["positions"] > 0, shifted, 0)
            for side, features in (("encoder", inputs), ("decoder", targets)):
                batch[f"{side}_segment_ids"] = features["segment_ids"]
                batch[f"{side}_positions"] = features["positions"]
        elif len(rows[0][0]) > 2:
            batch["sentence_embeddings"] = np.stack([row[0][2] for row in rows], dtype=np.float32)
        missing = self._batch_size - len(rows)
        return {key: np.pad(value, ((0, missing), (0, 0))) for key, value in batch.items()}


def _fill_rows(
    examples: Iterable[Example], lengths: tuple[int, int], pack: bool
) -> Iterator[list[Example]]:
    """Yields the examples of each row."""
    row: list[Example] = []
    free_inputs, free_targets = lengths
    for example in examples:
        inputs, targets = example[0][: lengths[0]], example[1][: lengths[1]]
        fits = len(inputs) <= free_inputs and len(targets) <= free_targets
        if row and not (fits and pack):
            yield row
            row, (free_inputs, free_targets) = [], lengths
        row.append((inputs, targets, *example[2:]))
        free_inputs, free_targets = free_inputs - len(inputs), free_targets - len(targets)
    if row:
        yield row


def _lay_out(rows: Sequence[Sequence[np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Returns `tokens`, `segment_ids` from 1 on, and `positions` within them: int32 [B, L]."""
    # One scatter for the whole batch, because a loop over its sequences would be slow.
    sequences = [sequence for row in rows for sequence in row]
    counts = np.array([len(row) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)  # [N]
    first = np.cumsum(counts) - counts  # [B], first sequence of each row
    sizes = np.array([len(sequence) for sequence in sequences])
    begins = np.cumsum(sizes) - sizes
    begins_in_row = begins - begins[first][row_of]  # [N]
    positions = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    offsets = np.repeat(row_of * length + begins_in_row, sizes) + positions
    values = {
        "tokens": np.concatenate(sequences),
        "segment_ids": np.repeat(np.arange(len(sequences)) - first[row_of] + 1, sizes),
        "positions": positions,
    }
    features = {name: np.zeros((len(rows), length), np.int32) for name in values}
    for name, value in values.items():
        features[name].reshape(-1)[offsets] = value
    return features
