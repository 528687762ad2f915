"""Arrays of a checkpoint, known by name, shape and dtype before they are read."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import Params, PyTree
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


def load_arrays(
    arrays: Mapping[str, LazyArray],
    target: Params,
    source: str,
    report: Callable[[int], None] = lambda _: None,
    transform: Callable[[str, jax.Array], PyTree] = params_lib.identity,
    value_checksums: dict[str, tuple[str, int]] | None = None,
) -> dict[str, PyTree]:
    """Reads arrays onto devices, with the dtypes and shardings of `target`.

    Names and shapes are compared before anything is read. Arrays are read ahead; besides the
    loaded parameters, the host's memory holds at most the bytes of the largest stored array.

    Args:
      arrays: path -> array, as stored.
      target: tree of `jax.ShapeDtypeStruct`; without a sharding: the default device.
      source: the checkpoint, for errors.
      report: called with the number of arrays loaded so far.
      transform: maps (path, array) to the value to return, before the next array is loaded.
      value_checksums: a dict to add path -> `checksum` of arrays that are read whole to.

    Returns:
      Nested dict of transformed jax arrays.

    Raises:
      InputError: an array is missing, extra, of another shape or not of floats, cannot be read,
        or holds NaN or infinity.
    """
    params_lib.check_matches(params_lib.unflatten(arrays), target, source)
    targets = params_lib.flatten(target)
    for path in targets:
        if not jnp.issubdtype(arrays[path].dtype, jnp.floating):
            raise InputError(f"{source}: {path}: expected floats, got {arrays[path].dtype}")
    # The largest first: read buffers are then small by the time most of the memory is used.
    order = sorted(targets, key=lambda path: -arrays[path].nbytes)
    loaded: dict[str, PyTree] = {}
    reads = {path: (arrays[path], targets[path]) for path in order}
    for path, (shards, checksum_of_array) in _read_ahead(reads, value_checksums is not None):
        if value_checksums is not None and checksum_of_array is not None:
            value_checksums[path] = checksum_of_array
        if not all(map(params_lib.all_finite, shards.values())):
            raise InputError(f"{source}: {path} holds NaN or infinity")
        loaded[path] = transform(path, _device_put(shards, targets[path]))
        shards.clear()  # frees the host's copy before the next array arrives
        report(len(loaded))
    return params_lib.unflatten({path: loaded[path] for path in targets})


# ((start, stop) of each axis) -> that part of an array
_Shards = dict[tuple[tuple[int, int], ...], np.ndarray]
# Shards, and the checksum of an array if one shard has all of it.
_Read = tuple[_Shards, tuple[str, int] | None]
# (path, bytes, shards that are being read)
_Pending = tuple[str, int, "concurrent.futures.Future[_Read]"]


def _read_ahead(
    targets: Mapping[str, tuple[LazyArray, jax.ShapeDtypeStruct]], with_checksums: bool
) -> Iterator[tuple[str, _Read]]:
    """Yields (path, (shards, checksum)) in order, read by threads.

    Reads in flight, and the array that the caller holds, take at most the bytes of the largest
    array: an array's bytes count until the next one is requested.
    """
    limit = max((array.nbytes for array, _ in targets.values()), default=0)
    pending: list[_Pending] = []
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for path, (array, target) in targets.items():
                while pending and sum(size for _, size, _ in pending) + array.nbytes > limit:
                    yield _pop_first(pending)
                pending.append(
                    (path, array.nbytes, pool.submit(_read, array, target, with_checksums))
                )
            while pending:
                yield _pop_first(pending)
        finally:  # after an error, do not read the rest
            for _, _, future in pending:
                future.cancel()


def _pop_first(pending: list[_Pending]) -> tuple[str, _Read]:
    path, _, future = pending.pop(0)
    return path, future.result()


def _read(array: LazyArray, target: jax.ShapeDtypeStruct, with_checksum: bool) -> _Read:
    shards = _read_shards(array, target)
    is_whole = len(shards) == 1 and next(iter(shards.values())).shape == array.shape
    return shards, checksum(array, *shards.values()) if with_checksum and is_whole else None


def checksum(stored: LazyArray, values: np.ndarray) -> tuple[str, int]:
    """Returns the checksum of an array as read, and its kind.

    The kind has both dtypes, but for bfloat16: float32 values and their rounding are then equal.
    """
    kind = "bfloat16" if values.dtype == jnp.bfloat16 else f"{stored.dtype} as {values.dtype}"
    return kind, checksums.checksum_of_values(values)


def _read_shards(array: LazyArray, target: jax.ShapeDtypeStruct) -> _Shards:
    """Reads the parts that this process's devices hold, each part once."""
    indices = [(slice(None),) * len(target.shape)]
    if target.sharding is not None:
        indices = list(target.sharding.addressable_devices_indices_map(target.shape).values())
    # Devices that hold the same part (replicas) have the same key.
    parts = {_bounds(index, target.shape): index for index in indices}
    dtype = np.dtype(target.dtype)
    return {key: _read_as(array, index, dtype) for key, index in parts.items()}


def _read_as(array: LazyArray, index: Index, dtype: np.dtype) -> np.ndarray:
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


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _device_put(shards: _Shards, target: jax.ShapeDtypeStruct) -> jax.Array:
    if target.sharding is None:
        (whole,) = shards.values()
        return jax.device_put(whole)
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: shards[_bounds(index or (), target.shape)]
    )
