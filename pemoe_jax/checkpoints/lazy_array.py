"""Arrays of a checkpoint whose shape and dtype are known before their values are read."""

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
      parts: the arrays that `stack` joined along a new first axis; empty for any other array.
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


_ROWS = 4096  # rows per block of `is_equal`, so that no whole array is in memory


def is_equal(a: LazyArray, b: LazyArray) -> bool:
    """Whether two arrays have the same shape, dtype and values; False for scalars.

    Blocks of rows are read until two differ.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype) or not a.shape:
        return False
    rest = (slice(None),) * (len(a.shape) - 1)
    parts = ((slice(i, i + _ROWS), *rest) for i in range(0, a.shape[0], _ROWS))
    return all(np.array_equal(a.read_slice(part), b.read_slice(part)) for part in parts)


def stack(parts: Sequence[LazyArray]) -> LazyArray:
    """Stacks arrays of the same shape and dtype along a new first axis.

    The parts are read one by one into the result, so that at most one is in memory twice.
    """
    shape, dtype = (len(parts), *parts[0].shape), parts[0].dtype
    return LazyArray(shape, dtype, lambda index: _read_parts(parts, index, dtype), tuple(parts))


def _read_parts(parts: Sequence[LazyArray], index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads a slice of stacked arrays in a dtype.

    Each part is cast as it is copied: the result never exists in the stored dtype.
    """
    parts, rest = parts[index[0]], index[1:]
    shape = (len(range(*i.indices(n))) for i, n in zip(rest, parts[0].shape, strict=True))
    result = file_io.aligned_empty((len(parts), *shape), dtype)
    for target, part in zip(result, parts, strict=True):
        _copy(part.read_slice(rest), target)
    return result


def unstack(array: LazyArray) -> list[LazyArray]:
    """Returns the arrays along the first axis, the inverse of `stack`.

    An array that `stack` did not make is read as a whole, and kept in memory until each of its
    parts has been read, because storage formats with chunks cannot read a part of a chunk alone.
    """
    if array.parts:
        return list(array.parts)
    remaining = set(range(array.shape[0]))
    whole: list[np.ndarray] = []  # the array while it is in memory, else empty

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
    """Returns (kind, checksum) of an array's values in the dtype in which they were read.

    Only checksums of the same kind are comparable (`checksums.join`). The kind names the stored
    dtype and the dtype of `values`. For bfloat16 values it names that dtype alone, so that a
    float32 checkpoint and its bfloat16 copy have the same checksum.

    Args:
      stored: the array in the checkpoint.
      values: its values, cast to the dtype in which they are used.
      visit: see `checksums.checksum_of_values`.
    """
    kind = "bfloat16" if values.dtype == ml_dtypes.bfloat16 else f"{stored.dtype} as {values.dtype}"
    return kind, checksums.checksum_of_values(values, visit)


def read_as(array: LazyArray, index: Index, dtype: np.dtype) -> np.ndarray:
    """Reads a slice in a dtype, in row-major order."""
    if array.parts:
        return _read_parts(array.parts, index, dtype)
    values = array.read_slice(index)
    if values.flags.c_contiguous and values.dtype == dtype:
        return values
    # Aligned, so that JAX on a CPU adopts the memory without a copy.
    result = file_io.aligned_empty(values.shape, dtype)
    _copy(values, result)
    return result


# Columns per copy. With so few, all 16 float32 values of a cache line are used before the line is
# evicted.
_BLOCK = 64


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """Copies values into an array of any dtype, a transposed matrix in blocks of columns.

    A plain copy of a transposed matrix uses only one value of each cache line that it reads.
    Hugging Face stores kernels as [out, in], so all of them are transposed here.
    """
    if values.flags.c_contiguous:
        target[...] = values
        return
    for i in range(0, values.shape[-1], _BLOCK):
        target[..., i : i + _BLOCK] = values[..., i : i + _BLOCK]
