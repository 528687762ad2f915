"""Arrays that lie in a checkpoint: known by name, shape and type, read one by one when wanted."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that has not been read.

    Attributes:
      shape, dtype: as it is stored.
      read_slice: (one slice an axis) -> that part of it; raises InputError where it cannot.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_slice: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Of the whole array, as stored."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array."""
        return self.read_slice((slice(None),) * len(self.shape))

    @property
    def T(self) -> "LazyArray":
        """Its transpose; reading it copies nothing more."""
        return LazyArray(self.shape[::-1], self.dtype, lambda index: self.read_slice(index[::-1]).T)


def from_numpy(array: np.ndarray) -> LazyArray:
    """An array that is in memory already."""
    return LazyArray(array.shape, array.dtype, lambda index: array[index])


def load_arrays(
    arrays: Mapping[str, LazyArray],
    target: Any,
    what: str,
    report: Callable[[int], None] = lambda _: None,
    made: Callable[[str, jax.Array], Any] = params_lib.identity,
) -> dict[str, Any]:
    """Reads a checkpoint's arrays, one by one, into the types and shardings of `target`.

    Names and shapes are compared before anything is read. Host memory at most: the parameters and
    the largest stored array; other arrays are read ahead while they fit into that.

    Args:
      arrays: path -> array, as stored.
      target: tree of `jax.ShapeDtypeStruct`; without a sharding: on the default device.
      what: names the checkpoint in errors.
      report: called with the number of arrays that are read.
      made: (path, array) -> what it is kept as, before the next array is placed.

    Returns:
      Nested dict of what is made of jax arrays.

    Raises:
      InputError: a name is missing, extra or of another shape; an array cannot be read or holds
        values that are not finite.
    """
    params_lib.check_matches(params_lib.unflatten(arrays), target, what)
    wanted = params_lib.flatten(target)
    for path in wanted:
        if not jax.numpy.issubdtype(arrays[path].dtype, jax.numpy.floating):
            raise InputError(f"{what}: {path}: expected floats, found {arrays[path].dtype}")
    # the largest first: what reading takes beside the arrays is little where memory is fullest
    order = sorted(wanted, key=lambda path: -arrays[path].nbytes)
    placed: dict[str, Any] = {}
    for path, pieces in _read_ahead({path: (arrays[path], wanted[path]) for path in order}):
        if not all(map(params_lib.all_finite, pieces.values())):
            raise InputError(f"{what}: {path} holds NaN or infinity")
        placed[path] = made(path, _assemble(pieces, wanted[path]))
        pieces.clear()  # the array holds the values now
        report(len(placed))
    return params_lib.unflatten({path: placed[path] for path in wanted})


_Pieces = dict[tuple[tuple[int, int], ...], np.ndarray]


def _read_ahead(
    wanted: Mapping[str, tuple[LazyArray, jax.ShapeDtypeStruct]],
) -> Iterator[tuple[str, _Pieces]]:
    """(path, its pieces in the wanted type), in order, read by threads within a limit of bytes.

    The limit is the largest array, counted until the next one is asked for.
    """
    limit = max((stored.nbytes for stored, _ in wanted.values()), default=0)
    waiting: list[tuple[str, int, concurrent.futures.Future[_Pieces]]] = []
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for path, (stored, want) in wanted.items():
                while waiting and sum(size for _, size, _ in waiting) + stored.nbytes > limit:
                    yield _first(waiting)
                waiting.append((path, stored.nbytes, pool.submit(_read_pieces, stored, want)))
            while waiting:
                yield _first(waiting)
        finally:  # an error ends the reading
            for _, _, future in waiting:
                future.cancel()


def _first(waiting: list[tuple[str, int, Any]]) -> tuple[str, _Pieces]:
    path, _, future = waiting[0]
    pieces = future.result()
    del waiting[0]  # not before it is here: until then its bytes count
    return path, pieces


def _read_pieces(stored: LazyArray, want: jax.ShapeDtypeStruct) -> _Pieces:
    """What this process's devices hold of an array, each part read once."""
    whole = (slice(None),) * len(want.shape)
    indices = [whole]
    if want.sharding is not None:
        indices = list(want.sharding.addressable_devices_indices_map(want.shape).values())
    parts = {_key(index, want.shape): index for index in indices}
    return {
        key: _row_by_row(stored.read_slice(index), np.dtype(want.dtype))
        for key, index in parts.items()
    }


_BLOCK = 64  # rows and columns that a processor's cache holds together


def _row_by_row(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in a type, its rows one after the other; a transposed one is turned in blocks."""
    if array.flags.c_contiguous or array.ndim != 2:
        return array.astype(dtype, copy=False)
    turned = file_io.aligned_empty(array.shape, dtype)
    for i in range(0, array.shape[1], _BLOCK):
        turned[:, i : i + _BLOCK] = array[:, i : i + _BLOCK]
    return turned


def _key(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    spans = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in spans)


def _assemble(pieces: _Pieces, want: jax.ShapeDtypeStruct) -> jax.Array:
    if want.sharding is None:
        (piece,) = pieces.values()
        return jax.device_put(piece)

    def piece_at(index: Index | None) -> np.ndarray:
        assert index is not None
        return pieces[_key(index, want.shape)]

    return jax.make_array_from_callback(want.shape, want.sharding, piece_at)
