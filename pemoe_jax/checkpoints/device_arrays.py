"""Reads arrays of a checkpoint onto devices."""

import concurrent.futures
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
from pemoe_jax.runtime import threads


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
    transfer to the devices. At any time, the stored size of all arrays in host memory together is
    at most that of the largest array. They take more memory if `target` has a wider dtype.

    Args:
      arrays: path -> array, as stored.
      target: tree of `jax.ShapeDtypeStruct`; leaves without a sharding go to the default device.
      source: the checkpoint, for errors.
      report: called with the number of arrays loaded so far.
      transform: maps (path, array) to the value to return; called before the next arrays are read
        and moved to their devices. Small arrays are moved in groups of at most 16 MiB.
      value_checksums: a dict to fill with path -> `lazy_array.checksum`, for the arrays that this
        process reads as a whole, in one shard. None: no checksums are computed.

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
    # Largest first, so that the read buffers are smallest at the end, when most arrays are loaded.
    order = sorted(targets, key=lambda path: -arrays[path].nbytes)
    loaded: dict[str, PyTree] = {}
    reads = {path: (arrays[path], targets[path]) for path in order}
    for group in _read_ahead(reads, value_checksums is not None):
        for path, read in group.items():
            if not read.is_finite:
                raise InputError(f"{source}: {path} holds NaN or infinity")
            if value_checksums is not None and read.checksum is not None:
                value_checksums[path] = read.checksum
        on_device = _device_put(group, targets)
        # Frees the host's copies before the next group is read; `read` refers to the last one.
        group.clear()
        del read
        for path in list(on_device):
            loaded[path] = transform(path, on_device.pop(path))
            report(len(loaded))
    return params_lib.unflatten({path: loaded[path] for path in targets})


# ((start, stop) of each axis) -> that part of an array
_Shards = dict[tuple[tuple[int, int], ...], np.ndarray]


class _Read(NamedTuple):
    """The parts of an array that this process has read."""

    shards: _Shards
    is_finite: bool
    checksum: tuple[str, int] | None  # None unless one shard is the whole array


_Group = dict[str, _Read]  # by path

# Small arrays are read and moved to the devices together, because passing arrays between threads
# one by one took a fifth of the time: T5 v1.1 Small has 188 arrays of at most 2 MiB.
_GROUP_BYTES = 1 << 24


def _read_ahead(
    targets: Mapping[str, tuple[LazyArray, jax.ShapeDtypeStruct]], with_checksums: bool
) -> Iterator[_Group]:
    """Reads arrays in threads, and yields groups of path -> result in the order of `targets`.

    The reads in flight and the group that the caller holds have together at most as many stored
    bytes as the largest array. The bytes of the caller's group need not be counted, because no read
    starts before the caller asks for the next group.
    """
    sizes = {path: array.nbytes for path, (array, _) in targets.items()}
    limit = max(sizes.values(), default=0)
    pending: list[tuple[int, concurrent.futures.Future[_Group]]] = []  # (stored bytes, group)

    def read_group(paths: list[str]) -> _Group:
        return {path: _read(*targets[path], with_checksums) for path in paths}

    with threads.make_pool() as pool:
        try:
            # At least four groups fit into the limit, so that threads have work.
            for paths in _group(sizes, min(_GROUP_BYTES, limit // 4)):
                num_bytes = sum(sizes[path] for path in paths)
                while pending and sum(size for size, _ in pending) + num_bytes > limit:
                    yield pending.pop(0)[1].result()
                pending.append((num_bytes, pool.submit(read_group, paths)))
            while pending:
                yield pending.pop(0)[1].result()
        finally:  # after an error, the groups whose reads have not started are not read
            for _, future in pending:
                future.cancel()


def _group(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yields groups of names, in order, whose sizes add up to at most `limit`.

    A name with a larger size has a group of its own.
    """
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _read(array: LazyArray, target: jax.ShapeDtypeStruct, with_checksum: bool) -> _Read:
    shards = _read_shards(array, target)
    is_whole = len(shards) == 1 and next(iter(shards.values())).shape == array.shape
    if not with_checksum or not is_whole:
        return _Read(shards, all(map(params_lib.is_array_finite, shards.values())), None)
    (whole,) = shards.values()
    # Checked while the values are in a cache: a second pass would read the array from memory again.
    # A list, because threads check the parts of a large array.
    are_finite: list[bool] = []
    checksum = lazy_array.checksum(
        array, whole, lambda part: are_finite.append(params_lib.is_array_finite(part))
    )
    return _Read(shards, all(are_finite), checksum)


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


def _device_put(group: _Group, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Moves the arrays of a group to their devices."""
    arrays, without_sharding = {}, {}
    for path, read in group.items():
        target, shards = targets[path], read.shards
        if target.sharding is None:
            (without_sharding[path],) = shards.values()
        else:
            arrays[path] = _put_shards(shards, target)
    return arrays | jax.device_put(without_sharding)


def _put_shards(shards: _Shards, target: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: shards[_bounds(index or (), target.shape)]
    )
