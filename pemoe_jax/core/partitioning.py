"""The device mesh, `data` × `model`, and where batches, parameters and their states lie on it.

Parameters and activations name their axes; rules say which axis of the mesh each name lies on
(as T5X's: arXiv 2203.17189). XLA derives the rest, and the communication.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pemoe_jax.core.errors import InputError

Rules = tuple[tuple[str, str | None], ...]

_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("length", None),
    ("kv", None),
    ("expert", None),
    ("rank", None),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over its devices.

    Attributes:
      model_parallelism: tensor-parallel size: the number of devices that share each matrix. It must
        divide the number of devices; the others share the batch.
      fsdp: also shard parameters and optimizer states over the data axis (ZeRO-3).
    """

    model_parallelism: int = 1
    fsdp: bool = False

    def make_mesh(self) -> Mesh:
        """Returns the mesh of all devices, `data` × `model`."""
        return make_mesh(self.model_parallelism)

    def axis_rules(self) -> Rules:
        """Returns the rules that map logical axis names to axes of the mesh."""
        return axis_rules(self.fsdp)


def make_mesh(model_parallelism: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes, or those given, as `data` × `model`.

    Args:
      model_parallelism: over how many devices each matrix is spread.
      devices: None: all.

    Raises:
      InputError: it does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if not isinstance(model_parallelism, int) or model_parallelism < 1 or count % model_parallelism:
        raise InputError(
            f"MODEL_PARALLELISM: expected a divisor of the {count} devices,"
            f" found {model_parallelism!r}"
        )
    shape = (count // model_parallelism, model_parallelism)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "model"))


def connect_processes(mesh: Mesh) -> None:
    """Has several processes reach each other along each axis of a mesh; one by itself does nothing.

    On CPUs XLA connects them at a program's first collective, and an error ends the run where one
    comes to it half a minute after another: it compiled for longer, or read a base. To be called
    while all are at the same place.
    """
    if jax.process_count() == 1:
        return

    def sums(ones: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(ones, axes) for axes in (*mesh.axis_names, mesh.axis_names)]

    spread, whole = PartitionSpec(*mesh.axis_names), PartitionSpec()
    placed = NamedSharding(mesh, spread)
    ones = jax.make_array_from_callback(mesh.devices.shape, placed, lambda i: np.ones((1, 1)))
    sum_all = jax.shard_map(sums, mesh=mesh, in_specs=spread, out_specs=whole, check_vma=False)
    jax.block_until_ready(jax.jit(sum_all)(ones))


def axis_rules(fsdp: bool = False) -> Rules:
    """(name of a parameter's or activation's axis, axis of the mesh); the first rule counts.

    Args:
      fsdp: parameters are spread over `data` too, along D (as ZeRO-3, arXiv 1910.02054).
    """
    return tuple((name, "data" if fsdp and name == "embed" else axis) for name, axis in _RULES)


def logical_to_mesh_sharding(
    mesh: Mesh, rules: Rules, axes: Sequence[str], shape: Sequence[int]
) -> NamedSharding:
    """Of an array whose axes are named; an axis that does not divide evenly is not spread."""
    spec: list[str | None] = [None] * len(axes)
    for name, mesh_axis in rules:  # in the order of the rules, each mesh axis once
        if mesh_axis is None or mesh_axis in spec or mesh.shape[mesh_axis] == 1:
            continue
        for i, axis in enumerate(axes):
            if axis == name and spec[i] is None and shape[i] % mesh.shape[mesh_axis] == 0:
                spec[i] = mesh_axis
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def param_shardings(
    mesh: Mesh, rules: Rules, axes: Mapping[str, Sequence[str]], shapes: Mapping[str, Any]
) -> dict[str, NamedSharding]:
    """path -> sharding, of every parameter.

    Args:
      axes: path -> names of its axes (`network.param_axes`).
      shapes: path -> anything with a shape.
    """
    return {
        path: logical_to_mesh_sharding(mesh, rules, axes[path], leaf.shape)
        for path, leaf in shapes.items()
    }


def state_shardings(abstract: Any, of_params: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Of a tree that holds states of parameters: a leaf lies as the parameter it ends in.

    Leaves of other shapes than that parameter's (factored moments, counts) are whole everywhere.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`, as of an optimiser's state.
      of_params: path -> sharding of the parameters.
    """
    whole = replicated_sharding(mesh)

    def place(path: Any, leaf: Any) -> NamedSharding:
        keys = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
        for start in range(len(keys)):
            found = of_params.get("/".join(keys[start:]))
            if found is not None:
                return found if _fits(found, leaf.shape) else whole
        return whole

    return jax.tree_util.tree_map_with_path(place, abstract)


def _fits(sharding: NamedSharding, shape: Sequence[int]) -> bool:
    if len(sharding.spec) != len(shape):
        return False
    return all(
        axis is None or size % sharding.mesh.shape[axis] == 0
        for axis, size in zip(sharding.spec, shape, strict=True)
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Context in which traced functions shard activations (`layers.constrain_sharding`)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError where a batch does not divide into the devices' microbatches."""
    devices = mesh.shape["data"]
    if not isinstance(batch_size, int) or batch_size < 1 or batch_size % (devices * microbatches):
        pieces = f"{devices} devices" + (
            f" × {microbatches} microbatches" if microbatches > 1 else ""
        )
        raise InputError(
            f"BATCH_SIZE {batch_size} does not divide over {pieces}:"
            f" expected a positive multiple of {devices * microbatches}"
        )


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Numpy arrays that all processes have alike -> device arrays, rows spread over `data`."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return device_put(dict(batch), jax.tree.map(lambda _: sharding, dict(batch)))


def make_global_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """As `shard_batch`, from the rows of this process's share alone (`data_shard`)."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    count = data_shard(mesh)[1]
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.asarray(array), (len(array) * count, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which share of a batch's rows this process gives, of how many shares.

    Processes whose devices lie in the same rows of `data` give the same share.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(found)) for found in rows.values()})
    if len({row for share in shares for row in share}) != sum(map(len, shares)):
        raise InputError(
            "MODEL_PARALLELISM: the processes' devices overlap in part: expected a divisor or a"
            f" multiple of the {len(jax.local_devices())} devices of a process,"
            f" found {mesh.shape['model']}"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def device_put(tree: Any, shardings: Any) -> Any:
    """Arrays that all processes have alike -> device arrays of the given shardings."""

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device."""
    return device_put(tree, jax.tree.map(lambda _: replicated_sharding(mesh), tree))


def _same(array: jax.Array) -> jax.Array:
    return array  # a function of its own, so that arrays of one shape share a program


def gather(tree: Any) -> Any:
    """Device arrays, however they lie -> numpy arrays, whole, in every process."""

    def whole(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            mesh: Any = getattr(array.sharding, "mesh", None)
            array = jax.jit(_same, out_shardings=replicated_sharding(mesh))(array)
        return np.asarray(array)

    return jax.tree.map(whole, tree)
