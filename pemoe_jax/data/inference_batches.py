"""Batches for scoring, decoding and encoding, of few shapes because every shape is compiled.

Shapes: `B` batch, `L` length (`Li` of inputs, `Lt` of targets), `C` answer choices.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data.choices import ChoiceGroup
from pemoe_jax.data.packing import Batch

Shape = tuple[int, int, int]  # Li, C, Lt: the shape of a batch without its number of rows

# Cost of a target token in input tokens: measured 1.7 in T5 Small and 1.1 in XL, for its logits.
_TARGET_COST = 2


def _round_up(n: int, least: int, steps: int) -> int:
    """Returns the smallest allowed size >= n.

    Allowed are `least` times powers of two, and `steps` - 1 evenly spaced sizes between two powers.
    """
    power = least
    while 2 * power < n:
        power *= 2
    sizes = (power + power * i // steps for i in range(steps + 1))
    return next(size for size in sizes if size >= n)


def _group_by_shape(sizes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Returns the indices of the sizes by rounded shape, sorted by shape."""
    indices: dict[Shape, list[int]] = {}
    # Merging takes quadratic memory: beyond 256 shapes, sizes are rounded more coarsely.
    for steps in (4, 2, 1):
        indices = collections.defaultdict(list)
        for index, size in enumerate(sizes):
            inputs, choices, targets = map(_round_up, size, (32, 1, 4), (steps,) * 3)
            indices[inputs, choices, targets].append(index)
        if len(indices) <= 256:
            break
    return dict(sorted(indices.items()))


def _merge_shapes(
    counts: Mapping[Shape, int],
    rows_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    program_cost: int,
    max_programs: int,
) -> dict[Shape, Shape]:
    """Returns the shape that each shape is padded to.

    Greedy: merges the pair of shapes that saves most, until no pair saves anything and there are at
    most `max_programs` shapes. `rows_of` returns the rows of a batch [...] for shapes [..., 3] and
    their numbers of examples [...].
    """
    shapes = np.array(list(counts), np.int64).reshape(-1, 3)
    sizes = np.array(list(counts.values()), np.int64)
    members = [[shape] for shape in counts]

    def cost(shapes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Returns the tokens that shapes compute, padding included, plus the cost of compiling."""
        rows = rows_of(shapes, sizes)
        row = shapes[..., 0] + _TARGET_COST * shapes[..., 1] * shapes[..., 2]
        return program_cost + -(-sizes // rows) * rows * row

    while len(members) > 1:
        # All pairs in numpy: a Python loop would visit up to 32,640 of them in every round.
        separate = cost(shapes, sizes)  # [N]
        merged = np.maximum(shapes[:, None], shapes[None])  # [N, N, 3]
        together = cost(merged, sizes[:, None] + sizes[None])  # [N, N]
        saved = separate[:, None] + separate[None] - together
        np.fill_diagonal(saved, np.iinfo(np.int64).min)
        first, second = sorted(map(int, np.unravel_index(saved.argmax(), saved.shape)))
        if saved[first, second] < 0 and len(members) <= max_programs:
            break
        shapes[first] = merged[first, second]
        sizes[first] += sizes[second]
        members[first] += members.pop(second)
        shapes, sizes = np.delete(shapes, second, 0), np.delete(sizes, second)
    return {
        shape: (int(padded[0]), int(padded[1]), int(padded[2]))
        for padded, joined in zip(shapes, members, strict=True)
        for shape in joined
    }


def _plan_batches(
    sizes: Sequence[Shape],
    batch_size: int,
    multiple_of: int,
    max_target_tokens: int,
    program_cost: int,
    max_programs: int,
) -> Iterator[tuple[Shape, int, list[int]]]:
    """Yields the shape, number of rows and indices of each batch, largest shape first."""
    check_integer("BATCH_SIZE", batch_size)
    if batch_size % multiple_of:
        raise InputError(
            f"BATCH_SIZE must be a multiple of the number of devices, {multiple_of}, got"
            f" {batch_size}"
        )

    def rows_of(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        affordable = max_target_tokens // (shapes[..., 1] * shapes[..., 2])
        most = np.clip(affordable // multiple_of * multiple_of, multiple_of, batch_size)
        # Examples are spread evenly: otherwise the last batch could be mostly padding.
        even = -(-counts // -(-counts // most))
        return -(-even // multiple_of) * multiple_of

    by_shape = _group_by_shape(sizes)
    counts = {shape: len(indices) for shape, indices in by_shape.items()}
    buckets: dict[Shape, list[int]] = collections.defaultdict(list)
    for shape, padded in _merge_shapes(counts, rows_of, program_cost, max_programs).items():
        buckets[padded] += by_shape[shape]
    for shape in sorted(buckets, key=lambda s: s[0] + _TARGET_COST * s[1] * s[2], reverse=True):
        indices = buckets[shape]
        rows = int(rows_of(np.array(shape), np.array(len(indices))))
        for start in range(0, len(indices), rows):
            yield shape, rows, indices[start : start + rows]


def score_batches(
    groups: Sequence[ChoiceGroup],
    batch_size: int,
    *,
    multiple_of: int = 1,
    max_target_tokens: int = 16384,
    program_cost: int = 16384,
    max_programs: int = 16,
) -> Iterator[tuple[Batch, list[ChoiceGroup]]]:
    """Yields batches of examples with answer choices, and the examples in their first rows.

    A batch has encoder_input_tokens [B, Li], decoder_input_tokens and decoder_target_tokens
    [B, C, Lt], int32, and sentence_embeddings [B, S] if all groups have one. Further rows, and
    choices beyond those of a group, are zeros. Groups of similar size share a shape. The largest
    shape comes first, so that a batch that does not fit into memory fails at once.

    Args:
      batch_size: largest number of rows.
      multiple_of: number of devices, which must divide B and `batch_size`.
      max_target_tokens: limit of B * C * Lt: shapes with many or long choices have fewer rows.
      program_cost: cost of compiling a shape, in tokens of padding. On two CPU cores it takes as
        long as scoring 5,000 (T5 Small) to 30,000 tokens (Tiny); many more on accelerators.
      max_programs: largest number of shapes.

    Raises:
      InputError: `batch_size` is not a positive multiple of `multiple_of`.
    """
    sizes = [_size(group) for group in groups]
    limits = (multiple_of, max_target_tokens, program_cost, max_programs)
    for shape, rows, indices in _plan_batches(sizes, batch_size, *limits):
        members = [groups[index] for index in indices]
        yield _pad_groups(members, shape, rows), members


def _size(group: ChoiceGroup) -> Shape:
    return len(group.inputs), len(group.choices), max(map(len, group.choices))


def _pad_groups(members: Sequence[ChoiceGroup], shape: Shape, rows: int) -> Batch:
    """Returns the batch of `score_batches` of examples that fit into a shape."""
    input_length, num_choices, target_length = shape
    targets = np.zeros((rows, num_choices, target_length), np.int32)
    for target, group in zip(targets, members, strict=False):
        target[:] = _pad(group.choices, num_choices, target_length)
    # Choices start from token 0, as in training. The scores of padded choices are meaningless:
    # the caller drops them, knowing how many choices each group has.
    batch = {
        "encoder_input_tokens": _pad([group.inputs for group in members], rows, input_length),
        "decoder_input_tokens": np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }
    embeddings = [g.sentence_embedding for g in members if g.sentence_embedding is not None]
    if len(embeddings) == len(members):
        missing = ((0, rows - len(members)), (0, 0))
        batch["sentence_embeddings"] = np.pad(np.stack(embeddings, dtype=np.float32), missing)
    return batch


def bucketed_score_batches(
    groups: Sequence[ChoiceGroup], batch_size: int, max_target_tokens: int = 16384
) -> Iterator[tuple[Batch, list[int]]]:
    """Yields batches as `score_batches`, and the indices of the groups in their first rows.

    Their shapes are few whatever the groups are, so that calls share compiled programs: see
    `_bucket`. Arguments are those of `score_batches`.
    """
    sizes = [_size(group) for group in groups]
    for shape, rows, indices in _bucket(sizes, batch_size, max_target_tokens):
        yield _pad_groups([groups[index] for index in indices], shape, rows), indices


def bucketed_input_batches(
    inputs: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields batches as `input_batches`, in the shapes of `_bucket`."""
    sizes = [(len(ids), 1, 1) for ids in inputs]
    for shape, rows, indices in _bucket(sizes, batch_size, 4 * batch_size):
        repeated = [inputs[indices[-1]]] * (rows - len(indices))
        yield _pad([inputs[index] for index in indices] + repeated, rows, shape[0]), indices


def _bucket(
    sizes: Sequence[Shape], batch_size: int, max_target_tokens: int
) -> Iterator[tuple[Shape, int, list[int]]]:
    """Yields the shape, number of rows and indices of each batch, longest inputs first.

    Lengths are 32, 48, 64, 96, 128, … of inputs and 4, 6, 8, 12, … of targets, choices 1, 2, 3, 4,
    5, 6, 7, 8, 10, …, and rows powers of two.
    """
    check_integer("batch_size", batch_size)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True)
    while order:
        largest = np.max([sizes[index] for index in order[:batch_size]], axis=0).tolist()
        inputs, choices, targets = map(_round_up, largest, (32, 1, 4), (2, 4, 2))
        affordable = max(1, min(batch_size, max_target_tokens // (choices * targets)))
        indices, order = order[:affordable], order[affordable:]
        rows = min(affordable, 1 << (len(indices) - 1).bit_length())
        yield (inputs, choices, targets), rows, indices


def _pad(sequences: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """Returns token ids as int32 [rows, length], padded with zeros."""
    tokens = np.zeros((rows, length), np.int32)
    for row, ids in zip(tokens, sequences, strict=False):
        row[: len(ids)] = ids
    return tokens


def input_batches(
    inputs: Sequence[np.ndarray],
    batch_size: int,
    *,
    multiple_of: int = 1,
    program_cost: int = 1 << 16,
    max_programs: int = 6,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields batches of inputs to decode from, and the indices of the inputs in their first rows.

    A batch is int32 [B, Li]. Further rows repeat the last input, so that they stop decoding when it
    does. There are fewer shapes than in `score_batches`, because a decoder takes longer to compile.
    Other arguments and errors are those of `score_batches`.

    Args:
      inputs: token ids [Li] of each input.
    """
    sizes = [(len(ids), 1, 1) for ids in inputs]
    # The target of one token is rounded up to 4: this limit of target tokens reduces no batch.
    limits = (multiple_of, 4 * batch_size, program_cost, max_programs)
    for shape, rows, indices in _plan_batches(sizes, batch_size, *limits):
        repeated = [inputs[indices[-1]]] * (rows - len(indices))
        yield _pad([inputs[index] for index in indices] + repeated, rows, shape[0]), indices


def encoder_batches(
    inputs: Sequence[np.ndarray], batch_size: int, multiple_of: int = 1
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields batches of inputs to encode, and the indices of the inputs in their first rows.

    A batch is int32 [B, L], the longest inputs first; further rows are zeros. L is one of few
    lengths and B depends on L alone, so that repeated calls share their programs.

    Args:
      inputs: token ids [Li] of each input.
      batch_size: B at 512 tokens and more; up to 8 times as many rows of shorter inputs.
      multiple_of: number of devices; B is a multiple of it.
    """
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    while order:
        length = _round_up(len(inputs[order[0]]), 32, 2)  # 32, 48, 64, 96, 128, …
        rows = max(batch_size, min(8 * batch_size, batch_size * 512 // length))
        rows = -(-rows // multiple_of) * multiple_of
        indices, order = order[:rows], order[rows:]
        yield _pad([inputs[index] for index in indices], rows, length), indices
