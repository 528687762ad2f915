"""Packs examples into rows and rows into batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

Batch = dict[str, np.ndarray]

# ids of inputs and targets, [Li] and [Lt], and where routers read it a sentence embedding, [S]
Example = tuple[np.ndarray, ...]


@dataclasses.dataclass
class Truncations:
    """Of the examples that were read, some of which may lie ready, those cut to their length."""

    examples: int = 0
    inputs: int = 0
    targets: int = 0

    def __str__(self) -> str:
        return (
            f"{self.inputs:,} inputs and {self.targets:,} targets of {self.examples:,} examples"
            " read were longer than TASK_FEATURE_LENGTHS, and cut"
        )


class BatchIterator(Iterator[Batch]):
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
      truncations: counted by who makes `examples`.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        lengths: Mapping[str, int],
        batch_size: int,
        pack: bool,
        start: int = 0,
        fill: bool = False,
        truncations: Truncations | None = None,
    ) -> None:
        self._lengths = lengths["inputs"], lengths["targets"]
        self._batch_size, self._pack = batch_size, pack
        self._rows = _filled_rows(examples, self._lengths, pack)
        self._consumed, self._fill = start, fill
        self.truncations = truncations or Truncations()

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
        return pad_batch(batch, self._batch_size)


def pad_batch(batch: Batch, batch_size: int) -> Batch:
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
