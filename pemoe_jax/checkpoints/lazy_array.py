"""Arrays of a checkpoint, known by name, shape and dtype before they are read."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from pemoe_jax.runtime import checksums, file_io

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read when it is needed, whole or in parts.

    Attributes:
      shape: stored shape.
      dtype: stored dtype.
      read_slice: maps one slice per axis to that part of the array; raises `InputError` if the
        part cannot be read.
      parts: the arrays along the first axis, if they are stored one by one; see `stack`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_slice: Callable[[Index], np.ndarray]
    parts: tuple["LazyArray", ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the whole array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads the whole array."""
        return self.read_slice((slice(None),) * len(self.shape))

    @property
    def T(self) -> "LazyArray":
        """The transpose; reading it returns a transposed view and copies nothing."""
        return LazyArray(self.shape[::-1], self.dtype, lambda index: self.read_slice(index[::-1]).T)


def from_numpy(array: np.ndarray) -> LazyArray:
    """Wraps an array in memory."""
    return LazyArray(array.shape, array.dtype, lambda index: array[index])


_ROWS = 4096  # compared at a time


def is_equal(a: LazyArray, b: LazyArray) -> bool:
    """Whether two arrays are equal, read by rows until they differ."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.shape:
        return False
    rest = (slice(None),) * (len(a.shape) - 1)
    parts = ((slice(i, i + _ROWS), *rest) for i in range(0, a.shape[0], _ROWS))
    return all(np.array_equal(a.read_slice(part), b.read_slice(part)) for part in parts)


def stack(parts: Sequence[LazyArray]) -> LazyArray:
    """Stacks arrays of one shape and dtype along a new first axis.

    They are read one by one into the stacked array, so that only one exists twice.
    """
    shape, dtype = (len(parts), *parts[0].shape), parts[0].dtype
    return LazyArray(shape, dtype, lambda index: _read_parts(parts, index, dtype), tuple(parts))


def _read_parts(parts: Sequence[LazyArray], index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads a slice of stacked arrays in a dtype; each is cast on its own."""
    parts, rest = parts[index[0]], index[1:]
    shape = (len(range(*i.indices(n))) for i, n in zip(rest, parts[0].shape, strict=True))
    result = file_io.aligned_empty((len(parts), *shape), dtype)
    for target, part in zip(result, parts, strict=True):
        _copy(part.read_slice(rest), target)
    return result


def unstack(array: LazyArray) -> list[LazyArray]:
    """Returns the arrays along the first axis, the inverse of `stack`.

    An array that is not stored in parts is read whole, once, and kept until its last part is read:
    a part of a chunk cannot be read alone.
    """
    if array.parts:
        return list(array.parts)
    remaining = set(range(array.shape[0]))
    whole: list[np.ndarray] = []

    def read_part(i: int, index: Index) -> np.ndarray:
        if not whole:
            whole.append(array.read())
        part = whole[0][i][index]
        remaining.discard(i)
        if not remaining:
            whole.clear()
            remaining.update(range(array.shape[0]))
        return part

    return [
        LazyArray(array.shape[1:], array.dtype, functools.partial(read_part, i))
        for i in range(array.shape[0])
    ]


def checksum(
    stored: LazyArray, values: np.ndarray, visit: Callable[[np.ndarray], None] | None = None
) -> tuple[str, int]:
    """Returns the checksum of an array as read, and its kind; see `checksum_of_values`.

    The kind has both dtypes, but for bfloat16: float32 values and their rounding are then equal.
    """
    kind = "bfloat16" if values.dtype == ml_dtypes.bfloat16 else f"{stored.dtype} as {values.dtype}"
    return kind, checksums.checksum_of_values(values, visit)


def read_as(array: LazyArray, index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads a slice in a dtype; a transposed matrix becomes row-major."""
    if array.parts:
        return _read_parts(array.parts, index, dtype)
    values = array.read_slice(index)
    if values.flags.c_contiguous or values.ndim != 2:
        return values.astype(dtype, copy=False)
    # Aligned, so that JAX on a CPU adopts the memory without a copy.
    result = file_io.aligned_empty(values.shape, dtype)
    _copy(values, result)
    return result


_BLOCK = 64  # columns per copy: each cache line that is read then serves 16 float32 values


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """Copies values into an array of any dtype, a transposed matrix in blocks of columns.

    A plain copy of a transposed matrix reads one value per cache line; Hugging Face kernels are
    stored [out, in], so all of them come transposed.
    """
    block = values.shape[-1] if values.flags.c_contiguous else _BLOCK
    for i in range(0, values.shape[-1], max(block, 1)):
        target[..., i : i + block] = values[..., i : i + block]
