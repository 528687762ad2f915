"""Reads arrays of a checkpoint onto devices."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.checkpoints import lazy_array
from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import Params, PyTree


def load_arrays(
    arrays: Mapping[str, LazyArray],
    target: Params,
    source: str,
    report: Callable[[int], None] = lambda _: None,
    transform: Callable[[str, jax.Array], PyTree] = params_lib.identity,
    value_checksums: dict[str, tuple[str, int]] | None = None,
) -> dict[str, PyTree]:
    """Reads arrays onto devices, with the dtypes and shardings of `target`.

    Names and shapes are compared before anything is read. Threads read arrays ahead of their
    transfer to the devices. The arrays in host memory have at most as many stored bytes as the
    largest one; in a wider dtype than the stored one, they take more.

    Args:
      arrays: path -> array, as stored.
      target: tree of `jax.ShapeDtypeStruct`; leaves without a sharding go to the default device.
      source: the checkpoint, for errors.
      report: called with the number of arrays loaded so far.
      transform: maps (path, array) to the value to return; called before the next array is moved
        to its devices.
      value_checksums: a dict to fill: path -> `lazy_array.checksum`, for the arrays of which this
        process reads the whole as one shard. None: no checksums are computed.

    Returns:
      Nested dict of transformed jax arrays.

    Raises:
      InputError: an array is missing, extra, unreadable, of another shape or of a dtype that is
        not floating-point, or holds NaN or infinity.
    """
    params_lib.check_matches(params_lib.unflatten(arrays), target, source)
    targets = params_lib.flatten(target)
    for path in targets:
        if not jnp.issubdtype(arrays[path].dtype, jnp.floating):
            raise InputError(f"{source}: {path}: expected floats, got {arrays[path].dtype}")
    # Largest first: the read buffers are smallest at the end, when most arrays are loaded.
    order = sorted(targets, key=lambda path: -arrays[path].nbytes)
    loaded: dict[str, PyTree] = {}
    reads = {path: (arrays[path], targets[path]) for path in order}
    for path, (shards, is_finite, checksum) in _read_ahead(reads, value_checksums is not None):
        if value_checksums is not None and checksum is not None:
            value_checksums[path] = checksum
        if not is_finite:
            raise InputError(f"{source}: {path} holds NaN or infinity")
        loaded[path] = transform(path, _device_put(shards, targets[path]))
        shards.clear()  # frees the host's copy before the next array arrives
        report(len(loaded))
    return params_lib.unflatten({path: loaded[path] for path in targets})


# ((start, stop) of each axis) -> that part of an array
_Shards = dict[tuple[tuple[int, int], ...], np.ndarray]


class _Read(NamedTuple):
    shards: _Shards
    is_finite: bool
    checksum: tuple[str, int] | None  # None unless one shard is the whole array


# (path, stored bytes, result of a reading thread)
_Pending = tuple[str, int, "concurrent.futures.Future[_Read]"]


def _read_ahead(
    targets: Mapping[str, tuple[LazyArray, jax.ShapeDtypeStruct]], with_checksums: bool
) -> Iterator[tuple[str, _Read]]:
    """Reads arrays in threads, and yields (path, result) in the order of `targets`.

    The reads in flight and the array that the caller holds have together at most as many stored
    bytes as the largest array. No read is started while the caller holds an array, so its bytes
    need not be counted.
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
        finally:  # after an error, the arrays whose reads have not started are not read
            for _, _, future in pending:
                future.cancel()


def _pop_first(pending: list[_Pending]) -> tuple[str, _Read]:
    path, _, future = pending.pop(0)
    return path, future.result()


def _read(array: LazyArray, target: jax.ShapeDtypeStruct, with_checksum: bool) -> _Read:
    shards = _read_shards(array, target)
    is_whole = len(shards) == 1 and next(iter(shards.values())).shape == array.shape
    if not with_checksum or not is_whole:
        return _Read(shards, all(map(params_lib.all_finite, shards.values())), None)
    (whole,) = shards.values()
    is_finite = True

    # Checked while the values are in a cache: a second pass would read the array from memory again.
    def visit(values: np.ndarray) -> None:
        nonlocal is_finite
        is_finite = is_finite and params_lib.all_finite(values)

    checksum = lazy_array.checksum(array, whole, visit)
    return _Read(shards, is_finite, checksum)


def _read_shards(array: LazyArray, target: jax.ShapeDtypeStruct) -> _Shards:
    """Reads the parts that this process's devices hold, each part once."""
    indices = [(slice(None),) * len(target.shape)]
    if target.sharding is not None:
        indices = list(target.sharding.addressable_devices_indices_map(target.shape).values())
    # Devices that hold the same part (replicas) have the same key.
    parts = {_bounds(index, target.shape): index for index in indices}
    dtype = np.dtype(target.dtype)
    return {key: lazy_array.read_as(array, index, dtype) for key, index in parts.items()}


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _device_put(shards: _Shards, target: jax.ShapeDtypeStruct) -> jax.Array:
    if target.sharding is None:
        (whole,) = shards.values()
        return jax.device_put(whole)
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: shards[_bounds(index or (), target.shape)]
    )
