"""Batches for scoring, decoding and encoding, in few shapes because each shape is compiled.

Shapes: `B` batch, `L` length (`Li` of inputs, `Lt` of targets), `C` answer choices, `S` sentence
embedding size, `N` different shapes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data.choices import ChoiceGroup
from pemoe_jax.data.packing import Batch

Shape = tuple[int, int, int]  # Li, C, Lt: the shape of a batch without its number of rows

# A target token costs as much time as this many input tokens, because of its logits. Measured: 1.7
# in T5 Small and 1.1 in XL.
_TARGET_COST = 2

_LEAST_SIZES = (32, 1, 4)  # of Li, C and Lt

# From this length on, batches of `encoder_batches` have `batch_size` rows; shorter ones have more.
_FULL_LENGTH = 512


def _divide_up(dividend: Any, divisor: Any) -> Any:
    """Returns the quotient of two integers or integer arrays, rounded up."""
    return -(-dividend // divisor)


def _round_up(n: int, least: int, steps: int) -> int:
    """Returns the smallest allowed size >= n.

    The allowed sizes are `least` times a power of two, and `steps` - 1 evenly spaced sizes between
    each of these and the next.
    """
    power = least
    while 2 * power < n:
        power *= 2
    sizes = (power + power * i // steps for i in range(steps + 1))
    return next(size for size in sizes if size >= n)


def _group_by_shape(sizes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Returns, for each rounded shape, the indices of the sizes that it stands for."""
    indices: dict[Shape, list[int]] = {}
    # `_merge_shapes` takes quadratic memory: if there are more than 256 shapes, sizes are rounded
    # more coarsely.
    for steps in (4, 2, 1):
        indices = collections.defaultdict(list)
        for index, size in enumerate(sizes):
            inputs, choices, targets = map(_round_up, size, _LEAST_SIZES, (steps,) * 3)
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

    Greedy: merges the pair of shapes whose merging saves most, until every merge would add to the
    cost and there are at most `max_programs` shapes.

    Args:
      counts: number of examples of each shape.
      rows_of: function of shapes [..., 3] and their numbers of examples [...]; returns the number
        of rows of their batches [...].
      program_cost, max_programs: see `score_batches`.
    """
    shapes = np.array(list(counts), np.int64).reshape(-1, 3)
    num_examples = np.array(list(counts.values()), np.int64)
    members = [[shape] for shape in counts]

    def cost(padded: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """Returns the tokens that shapes compute, padding included, plus the cost of compiling."""
        rows = rows_of(padded, examples)
        return program_cost + _divide_up(examples, rows) * rows * _row_cost(padded)

    while len(members) > 1:
        # All pairs at once in numpy: a Python loop would visit up to 32,640 pairs in every round.
        separate = cost(shapes, num_examples)  # [N]
        merged = np.maximum(shapes[:, None], shapes[None])  # [N, N, 3]
        together = cost(merged, num_examples[:, None] + num_examples[None])  # [N, N]
        saved = separate[:, None] + separate[None] - together
        np.fill_diagonal(saved, np.iinfo(np.int64).min)  # no shape is merged with itself
        first, second = sorted(map(int, np.unravel_index(saved.argmax(), saved.shape)))
        if saved[first, second] < 0 and len(members) <= max_programs:
            break
        shapes[first] = merged[first, second]
        num_examples[first] += num_examples[second]
        members[first] += members.pop(second)
        shapes, num_examples = np.delete(shapes, second, 0), np.delete(num_examples, second)
    return {
        shape: (int(padded[0]), int(padded[1]), int(padded[2]))
        for padded, originals in zip(shapes, members, strict=True)
        for shape in originals
    }


def _row_cost(shapes: np.ndarray) -> np.ndarray:
    """Returns the cost of a row of each shape [..., 3] in input tokens: [...]."""
    return shapes[..., 0] + _TARGET_COST * shapes[..., 1] * shapes[..., 2]


def _plan_batches(
    sizes: Sequence[Shape],
    batch_size: int,
    multiple_of: int,
    max_target_tokens: int,
    program_cost: int,
    max_programs: int,
) -> Iterator[tuple[Shape, int, list[int]]]:
    """Yields the shape, number of rows and indices of each batch, largest shape first.

    See `score_batches`; `sizes` are the shapes of the examples, without padding.
    """
    check_integer("BATCH_SIZE", batch_size)
    if batch_size % multiple_of:
        raise InputError(
            f"BATCH_SIZE must be a multiple of the data-parallel size, {multiple_of}, got"
            f" {batch_size}"
        )

    def rows_of(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        affordable = max_target_tokens // (shapes[..., 1] * shapes[..., 2])
        most = np.clip(affordable // multiple_of * multiple_of, multiple_of, batch_size)
        # Examples are spread evenly: otherwise the last batch could be mostly padding.
        num_batches = _divide_up(counts, most)
        even = _divide_up(counts, num_batches)
        return _divide_up(even, multiple_of) * multiple_of

    by_shape = _group_by_shape(sizes)
    counts = {shape: len(indices) for shape, indices in by_shape.items()}
    buckets: dict[Shape, list[int]] = collections.defaultdict(list)
    for shape, padded in _merge_shapes(counts, rows_of, program_cost, max_programs).items():
        buckets[padded] += by_shape[shape]
    for shape in sorted(buckets, key=lambda s: int(_row_cost(np.array(s))), reverse=True):
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
    [B, C, Lt], int32, and sentence_embeddings [B, S] if all groups have one. The remaining rows,
    and choices beyond those of a group, are zeros. Groups of similar size share a shape. The
    largest shape comes first, so that a batch that does not fit into memory fails at once.

    Args:
      groups: the examples.
      batch_size: largest number of rows.
      multiple_of: number of devices that share a batch (`partitioning.data_parallelism`); must
        divide `batch_size`, and divides B.
      max_target_tokens: limit of B * C * Lt: shapes with many or long choices have fewer rows.
      program_cost: cost of compiling a shape, in tokens of padding. On two CPU cores, compiling
        takes as long as scoring 5,000 (T5 Small) to 30,000 tokens (Tiny); on accelerators, as long
        as scoring many more.
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
    """Returns a batch of examples, padded to a shape, as `score_batches` yields it."""
    input_length, num_choices, target_length = shape
    targets = np.zeros((rows, num_choices, target_length), np.int32)
    for target, group in zip(targets, members, strict=False):
        target[:] = _pad(group.choices, num_choices, target_length)
    # Each choice starts from token 0, as in training. The scores of padding are meaningless: the
    # caller drops them, as it knows how many choices each group has.
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
    """Yields batches as `score_batches` does, and the indices of the groups in their first rows.

    All calls together use few shapes (`_bucket`), so they share compiled programs. For arguments
    see `score_batches`.
    """
    sizes = [_size(group) for group in groups]
    for shape, rows, indices in _bucket(sizes, batch_size, max_target_tokens):
        yield _pad_groups([groups[index] for index in indices], shape, rows), indices


def bucketed_input_batches(
    inputs: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields batches as `input_batches` does, in the shapes of `_bucket`."""
    sizes, max_target_tokens = _sizes_of_inputs(inputs, batch_size)
    for shape, rows, indices in _bucket(sizes, batch_size, max_target_tokens):
        yield _pad_inputs(inputs, indices, rows, shape[0]), indices


def _bucket(
    sizes: Sequence[Shape], batch_size: int, max_target_tokens: int
) -> Iterator[tuple[Shape, int, list[int]]]:
    """Yields the shape, number of rows and indices of each batch, longest inputs first.

    Lengths of inputs are 32, 48, 64, 96, 128, …, lengths of targets 4, 6, 8, 12, …, and numbers of
    choices 1, 2, 3, 4, 5, 6, 7, 8, 10, …. The number of rows is a power of two, or the most that
    `batch_size` and `max_target_tokens` allow.
    """
    check_integer("batch_size", batch_size)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True)
    while order:
        largest = np.max([sizes[index] for index in order[:batch_size]], axis=0).tolist()
        inputs, choices, targets = map(_round_up, largest, _LEAST_SIZES, (2, 4, 2))
        most = max(1, min(batch_size, max_target_tokens // (choices * targets)))
        indices, order = order[:most], order[most:]
        power_of_two = 1 << (len(indices) - 1).bit_length()
        rows = min(most, power_of_two)
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

    A batch is int32 [B, Li]. The remaining rows repeat the last input, so that they stop decoding
    when it does. The defaults allow fewer shapes than those of `score_batches`, because a decoding
    loop takes longer to compile. For other arguments and errors see `score_batches`.

    Args:
      inputs: token ids [Li] of each input.
    """
    sizes, max_target_tokens = _sizes_of_inputs(inputs, batch_size)
    limits = (multiple_of, max_target_tokens, program_cost, max_programs)
    for shape, rows, indices in _plan_batches(sizes, batch_size, *limits):
        yield _pad_inputs(inputs, indices, rows, shape[0]), indices


def _sizes_of_inputs(inputs: Sequence[np.ndarray], batch_size: int) -> tuple[list[Shape], int]:
    """Returns a size for each input, with one target token, and `max_target_tokens` for them.

    The limit reduces no batch: it allows for targets of the least length, to which a target of one
    token is rounded up.
    """
    return [(len(ids), 1, 1) for ids in inputs], _LEAST_SIZES[2] * batch_size


def _pad_inputs(
    inputs: Sequence[np.ndarray], indices: Sequence[int], rows: int, length: int
) -> np.ndarray:
    """Returns a batch of the inputs at `indices`, as `input_batches` yields it."""
    repeated = [inputs[indices[-1]]] * (rows - len(indices))
    return _pad([inputs[index] for index in indices] + repeated, rows, length)


def encoder_batches(
    inputs: Sequence[np.ndarray], batch_size: int, multiple_of: int = 1
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields batches of inputs to encode, and the indices of the inputs in their first rows.

    A batch is int32 [B, L], the longest inputs first; the remaining rows are zeros. L is one of few
    lengths and B depends on L alone, so that repeated calls share compiled programs.

    Args:
      inputs: token ids [Li] of each input.
      batch_size: B for inputs of 512 tokens and more; shorter ones have up to 8 times as many rows.
      multiple_of: number of devices that share a batch; B is rounded up to a multiple of it.
    """
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]))
    while order:
        length = _round_up(len(inputs[order[0]]), _LEAST_SIZES[0], 2)  # 32, 48, 64, 96, 128, …
        rows = max(batch_size, min(8 * batch_size, batch_size * _FULL_LENGTH // length))
        rows = _divide_up(rows, multiple_of) * multiple_of
        indices, order = order[:rows], order[rows:]
        yield _pad([inputs[index] for index in indices], rows, length), indices
