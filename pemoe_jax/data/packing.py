"""Packs examples into rows, and rows into batches.

Packing is next-fit: an example that does not fit begins the next row. So a row depends only on the
examples in it, and to resume, a run needs only the number of examples that it has consumed. seqio
also packs next-fit, but within blocks of examples. The library `grain` packs first-fit or best-fit,
which fills rows better, but makes a row depend on many examples around it.

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
    """Numbers of examples read so far, and of truncated and empty sequences in them.

    Prefetched examples count as read.

    Attributes:
      examples: number of examples.
      cut_inputs, cut_targets: number of inputs and targets that were truncated.
      empty_inputs, empty_targets: number of inputs and targets without a token other than EOS.
    """

    examples: int = 0
    cut_inputs: int = 0
    cut_targets: int = 0
    empty_inputs: int = 0
    empty_targets: int = 0

    def describe(self) -> list[str]:
        """Returns a line on truncated and one on empty sequences, each only if there are some."""
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
    """An iterator over batches that knows its position in the data.

    Args:
      examples: the examples, from index `start` on.
      lengths: lengths of 'inputs' and 'targets'; longer examples are truncated.
      batch_size: number of rows, B.
      pack: whether a row holds several examples.
      start: number of examples before the first one.
      pad_last: whether an incomplete last batch is padded with rows of zeros rather than dropped.
      counts: counts that the source of `examples` updates.
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
        """Position of the next batch, the argument `start` of `feed.train_batches`."""
        return {"examples": self._consumed}

    def __next__(self) -> Batch:
        """Returns a batch with T5X's features, int32 [B, L].

        Rows of zeros have loss weight 0. If the examples have sentence embeddings and are not
        packed, the batch also has `sentence_embeddings`, float32 [B, S].
        """
        rows = list(itertools.islice(self._rows, self._batch_size))
        if len(rows) < self._batch_size and not (rows and self._pad_last):
            raise StopIteration
        self._consumed += sum(map(len, rows))
        inputs, targets = (
            _lay_out([[example[side] for example in row] for row in rows], self._lengths[side])
            for side in (0, 1)
        )
        # Teacher forcing: the decoder reads the targets shifted by one, from token 0 on.
        shifted = np.pad(targets["tokens"][:, :-1], ((0, 0), (1, 0)))
        batch = {
            "encoder_input_tokens": inputs["tokens"],
            "decoder_target_tokens": targets["tokens"],
            "decoder_input_tokens": shifted,
            "decoder_loss_weights": (targets["tokens"] > 0).astype(np.int32),
        }
        if self._pack:
            # The decoder input of each packed target starts with 0, as that of an unpacked one, and
            # not with the last token of the target before it.
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
    """Lays out sequences in rows, one after the other.

    Args:
      rows: the sequences of each row; N in all.
      length: L.

    Returns:
      `tokens`, `segment_ids` (a sequence's number in its row, from 1 on) and `positions` (a
      token's index in its sequence): int32 [B, L], padded with zeros.
    """
    # One scatter for the whole batch, because a loop over its sequences would be slow.
    sequences = [sequence for row in rows for sequence in row]
    counts = np.array([len(row) for row in rows])
    row_of_sequence = np.repeat(np.arange(len(rows)), counts)  # [N]
    first_sequence = np.cumsum(counts) - counts  # [B]
    sizes = np.array([len(sequence) for sequence in sequences])
    starts = np.cumsum(sizes) - sizes  # [N], among the tokens of all sequences
    starts_in_row = starts - starts[first_sequence][row_of_sequence]  # [N]
    positions = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    offsets = np.repeat(row_of_sequence * length + starts_in_row, sizes) + positions
    segments = np.arange(len(sequences)) - first_sequence[row_of_sequence] + 1  # [N]
    values = {
        "tokens": np.concatenate(sequences),
        "segment_ids": np.repeat(segments, sizes),
        "positions": positions,
    }
    features = {name: np.zeros((len(rows), length), np.int32) for name in values}
    for name, value in values.items():
        features[name].reshape(-1)[offsets] = value
    return features
