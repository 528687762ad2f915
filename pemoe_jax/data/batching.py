"""Groups of answer choices, and inputs, as batches of few shapes: each costs a compilation.

Shapes: `B` batch, `Li` and `Lt` lengths of inputs and of targets, `C` answer choices.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data.choices import ChoiceGroup
from pemoe_jax.data.packing import Batch

Shape = tuple[int, int, int]  # of a scoring program, less its rows: Li, C, Lt

# What a target token costs beside an input token, for its logits: 1.7 in T5 Small, 1.1 in XL.
_TARGET_COST = 2


def _rung(n: int, least: int, steps: int) -> int:
    """The least number >= n of `least`, its doubles, and `steps` - 1 even steps between those."""
    start = least
    while 2 * start < n:
        start *= 2
    ladder = (start + start * i // steps for i in range(steps + 1))
    return next(rung for rung in ladder if rung >= n)


def _by_shape(sizes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Numbers of sizes by the size rounded up, to no more shapes than are quick to plan with."""
    found: dict[Shape, list[int]] = {}
    for steps in (4, 2, 1):
        found = collections.defaultdict(list)
        for number, (inputs, choices, targets) in enumerate(sizes):
            shape = _rung(inputs, 32, steps), _rung(choices, 1, steps), _rung(targets, 4, steps)
            found[shape].append(number)
        if len(found) <= 256:
            break
    return dict(sorted(found.items()))


def _plan(
    counts: Mapping[Shape, int],
    rows_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    program_cost: int,
    max_programs: int,
) -> dict[Shape, Shape]:
    """Which shape each shape is padded to: the pair that saves most is merged, again and again.

    Args:
      counts: shape -> how many are of it.
      rows_of: (shapes [..., 3], how many are of each [...]) -> rows of a batch [...].
      program_cost, max_programs: as of `score_batches`.
    """
    shapes = np.array(list(counts), np.int64).reshape(-1, 3)
    sizes = np.array(list(counts.values()), np.int64)
    members = [[shape] for shape in counts]

    def cost(shapes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        rows = rows_of(shapes, sizes)
        row = shapes[..., 0] + _TARGET_COST * shapes[..., 1] * shapes[..., 2]
        return program_cost + -(-sizes // rows) * rows * row

    while len(members) > 1:
        alone = cost(shapes, sizes)
        merged = np.maximum(shapes[:, None], shapes[None])  # [N, N, 3]
        together = cost(merged, sizes[:, None] + sizes[None])
        saved = alone[:, None] + alone[None] - together
        np.fill_diagonal(saved, np.iinfo(np.int64).min)
        one, other = sorted(map(int, np.unravel_index(saved.argmax(), saved.shape)))
        if saved[one, other] < 0 and len(members) <= max_programs:
            break
        shapes[one], sizes[one] = merged[one, other], sizes[one] + sizes[other]
        members[one] += members.pop(other)
        shapes, sizes = np.delete(shapes, other, 0), np.delete(sizes, other)
    return {
        shape: (int(to[0]), int(to[1]), int(to[2]))
        for to, joined in zip(shapes, members, strict=True)
        for shape in joined
    }


def _buckets(
    sizes: Sequence[Shape],
    batch_size: int,
    multiple_of: int,
    max_target_tokens: int,
    program_cost: int,
    max_programs: int,
) -> Iterator[tuple[Shape, int, list[int]]]:
    """Of each batch its shape, its rows, and the numbers of the sizes in it; the largest first."""
    check_integer("BATCH_SIZE", batch_size)
    if batch_size % multiple_of:
        raise InputError(
            f"BATCH_SIZE {batch_size} is not a multiple of the number of devices, {multiple_of}"
        )

    def rows_of(shapes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        affordable = max_target_tokens // (shapes[..., 1] * shapes[..., 2])
        most = np.clip(affordable // multiple_of * multiple_of, multiple_of, batch_size)
        even = -(-counts // -(-counts // most))  # no batch much smaller than the others
        return -(-even // multiple_of) * multiple_of

    of_shape = _by_shape(sizes)
    counts = {shape: len(numbers) for shape, numbers in of_shape.items()}
    buckets: dict[Shape, list[int]] = collections.defaultdict(list)
    for shape, padded in _plan(counts, rows_of, program_cost, max_programs).items():
        buckets[padded] += of_shape[shape]
    for shape in sorted(buckets, key=lambda s: s[0] + _TARGET_COST * s[1] * s[2], reverse=True):
        numbers = buckets[shape]
        rows = int(rows_of(np.array(shape), np.array(len(numbers))))
        for start in range(0, len(numbers), rows):
            yield shape, rows, numbers[start : start + rows]


def score_batches(
    groups: Sequence[ChoiceGroup],
    batch_size: int,
    *,
    multiple_of: int = 1,
    max_target_tokens: int = 16384,
    program_cost: int = 16384,
    max_programs: int = 16,
) -> Iterator[tuple[Batch, list[ChoiceGroup]]]:
    """Batches encoder_input_tokens [B, Li], decoder_input_tokens, decoder_target_tokens [B, C, Lt].

    The first rows are the returned groups, in order; the others, and the choices beyond a group's
    own, are zeros. Groups of like size share a shape, the largest first: what does not fit in
    memory fails at once.

    Args:
      groups: what is scored.
      batch_size: most rows.
      multiple_of: B is a multiple of it (devices); it must divide `batch_size`.
      max_target_tokens: a shape of many or long choices has fewer rows, so that B * C * Lt stays
        within this.
      program_cost: what compiling a shape is worth in tokens of padding. On two cores it takes as
        long as scoring 5,000 (T5 Small) to 30,000 (Tiny); on accelerators as many more.
      max_programs: most shapes, whatever they save.

    Raises:
      InputError: `batch_size` is not a positive multiple of `multiple_of`.
    """
    sizes = [
        (len(group.inputs), len(group.choices), max(map(len, group.choices))) for group in groups
    ]
    limits = (multiple_of, max_target_tokens, program_cost, max_programs)
    for shape, rows, numbers in _buckets(sizes, batch_size, *limits):
        part = [groups[number] for number in numbers]
        yield _filled(part, rows, shape), part


def _filled(groups: Sequence[ChoiceGroup], rows: int, shape: Shape) -> Batch:
    """The groups and rows of zeros, in T5X's names; sentence embeddings where all have one."""
    input_length, num_choices, target_length = shape
    targets = np.zeros((rows, num_choices, target_length), np.int32)
    for i, group in enumerate(groups):
        for j, ids in enumerate(group.choices):
            targets[i, j, : len(ids)] = ids
    batch = {
        "encoder_input_tokens": _padded([group.inputs for group in groups], rows, input_length),
        "decoder_input_tokens": np.pad(targets[..., :-1], ((0, 0), (0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }
    sentences = [
        group.sentence_embedding for group in groups if group.sentence_embedding is not None
    ]
    if len(sentences) == len(groups):
        missing = ((0, rows - len(groups)), (0, 0))
        batch["sentence_embeddings"] = np.pad(np.stack(sentences, dtype=np.float32), missing)
    return batch


def _padded(sequences: Sequence[np.ndarray], rows: int, length: int) -> np.ndarray:
    """Token ids -> int32 [rows, length], with zeros behind and below."""
    result = np.zeros((rows, length), np.int32)
    for row, ids in zip(result, sequences, strict=False):
        row[: len(ids)] = ids
    return result


def input_batches(
    inputs: Sequence[np.ndarray],
    batch_size: int,
    *,
    multiple_of: int = 1,
    program_cost: int = 1 << 16,
    max_programs: int = 6,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Batches encoder_input_tokens int32 [B, Li] to decode from, and whose rows they are.

    The numbers are places in `inputs`; rows beyond them repeat the last, and so end with it. A
    decoder has more to compile than `score_batches` reckons with, so shapes are fewer.

    Args:
      inputs: token ids of each, of any length.
      batch_size, multiple_of, program_cost, max_programs: as of `score_batches`.

    Raises:
      InputError: `batch_size` is not a positive multiple of `multiple_of`.
    """
    sizes = [(len(ids), 1, 1) for ids in inputs]
    limits = (multiple_of, 4 * batch_size, program_cost, max_programs)
    for shape, rows, numbers in _buckets(sizes, batch_size, *limits):
        last = [inputs[numbers[-1]]] * (rows - len(numbers))
        yield _padded([inputs[number] for number in numbers] + last, rows, shape[0]), numbers
