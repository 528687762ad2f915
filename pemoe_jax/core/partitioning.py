"""The device mesh, `data` × `model`, and the shardings of batches, parameters and their states.

Parameters and activations name their axes; rules map each name to an axis of the mesh, as in T5X
(arXiv 2203.17189). XLA derives the other shardings and the communication.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pemoe_jax.core.errors import InputError

PyTree: TypeAlias = Any  # a leaf or a tree of arrays, shapes or shardings; jax has no type for it
_T = TypeVar("_T")
Rules: TypeAlias = tuple[tuple[str, str | None], ...]

# Earlier rules have priority: with FSDP both `batch` and `embed` map to `data`, and an activation
# [batch, length, embed] is sharded by its batch.
_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("length", None),
    ("kv", None),
    ("expert", None),  # of experts; a router's outputs are "unmodeled", as in T5X
    ("unmodeled", None),
    ("rank", None),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run uses its devices.

    Attributes:
      model_parallelism: tensor-parallel size: the number of devices that each matrix is sharded
        over. It must divide the number of devices; the quotient is the data-parallel size.
      fsdp: whether parameters and optimizer states are also sharded over the data axis.
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
    """Returns a mesh `data` × `model` of the devices; None for all devices of all processes.

    Raises:
      InputError: model_parallelism does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if not isinstance(model_parallelism, int) or model_parallelism < 1 or count % model_parallelism:
        raise InputError(
            f"MODEL_PARALLELISM must be a divisor of the {count} devices, got {model_parallelism!r}"
        )
    shape = (count // model_parallelism, model_parallelism)
    # Splitting lets a mesh axis take a part of a physical axis of a TPU's torus.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "model"))


def data_parallelism() -> int:
    """Returns the number of parts that the mesh of the context divides a batch into."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape.get("data", 1)


def connect_processes(mesh: Mesh) -> None:
    """Opens the connections between processes along each axis of a mesh.

    Call it where all processes arrive at about the same time. A no-op in a single process.
    """
    # On CPUs XLA connects processes at a program's first collective, and fails if one process
    # arrives 30 seconds after another, for example after a longer compilation. So a small
    # collective runs over each axis, and over both, before any such work.
    if jax.process_count() == 1:
        return

    def sums(ones: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(ones, axes) for axes in (*mesh.axis_names, mesh.axis_names)]

    spec = PartitionSpec(*mesh.axis_names)
    ones = jax.make_array_from_callback(
        mesh.devices.shape, NamedSharding(mesh, spec), lambda index: np.ones((1, 1))
    )
    sum_all = jax.shard_map(
        sums, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
    )
    jax.block_until_ready(jax.jit(sum_all)(ones))


def axis_rules(fsdp: bool = False) -> Rules:
    """Returns the pairs (logical axis name, mesh axis or None); the first that applies wins.

    With `fsdp` parameters are also sharded over `data`, along D (as ZeRO-3, arXiv 1910.02054).
    """
    return tuple((name, "data" if fsdp and name == "embed" else axis) for name, axis in _RULES)


def logical_to_mesh_sharding(
    mesh: Mesh, rules: Rules, axes: Sequence[str], shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array with named axes; each mesh axis shards one axis at most.

    An axis whose size is not a multiple of the mesh axis is replicated.
    """
    spec: list[str | None] = [None] * len(axes)
    for name, mesh_axis in rules:
        if mesh_axis is None or mesh_axis in spec or mesh.shape[mesh_axis] == 1:
            continue
        for i, axis in enumerate(axes):
            if axis == name and spec[i] is None and shape[i] % mesh.shape[mesh_axis] == 0:
                spec[i] = mesh_axis
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def param_shardings(
    mesh: Mesh,
    rules: Rules,
    axes: Mapping[str, Sequence[str]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, NamedSharding]:
    """Returns path -> sharding, from paths' `axis_rules`, `network.param_axes` and shapes."""
    return {
        path: logical_to_mesh_sharding(mesh, rules, axes[path], leaf.shape)
        for path, leaf in shapes.items()
    }


def state_shardings(
    abstract: PyTree, param_shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> PyTree:
    """Returns the shardings of a tree that holds states of parameters, such as Adam's moments.

    A state that does not have the shape of its parameter (factored moments, counts) is replicated.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`, such as the train state's.
      param_shardings: path -> sharding of the parameters.
      mesh: the mesh.
    """
    replicated = replicated_sharding(mesh)

    def leaf_sharding(key_path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        sharding = value_of_param(key_path, param_shardings)
        return sharding if sharding and _fits(sharding, leaf.shape) else replicated

    return jax.tree_util.tree_map_with_path(leaf_sharding, abstract)


def value_of_param(key_path: jax.tree_util.KeyPath, values: Mapping[str, _T]) -> _T | None:
    """Returns the value of the parameter path that a state's path in a pytree ends in, or None."""
    keys = [str(getattr(key, "key", getattr(key, "name", None))) for key in key_path]
    suffixes = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((values[path] for path in suffixes if path in values), None)


def _fits(sharding: NamedSharding, shape: Sequence[int]) -> bool:
    return len(sharding.spec) == len(shape) and all(
        axis is None or size % sharding.mesh.shape[axis] == 0
        for axis, size in zip(sharding.spec, shape, strict=True)
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Context in which traced functions shard activations (`layers.constrain_sharding`)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError if a batch does not divide into the devices' microbatches."""
    devices = mesh.shape["data"]
    if not isinstance(batch_size, int) or batch_size < 1 or batch_size % (devices * microbatches):
        pieces = f" × {microbatches} microbatches" if microbatches > 1 else ""
        raise InputError(
            f"BATCH_SIZE must be a positive multiple of {devices * microbatches}"
            f" ({devices} devices{pieces}), got {batch_size!r}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards the rows of a batch over `data`; every process passes the whole batch."""
    return device_put(dict(batch), NamedSharding(mesh, PartitionSpec("data")))


def make_global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards the rows of a batch over `data`; every process passes its `data_shard` alone."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    num_shards = data_shard(mesh)[1]
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.asarray(array), (len(array) * num_shards, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns (shard id, number of shards): which part of each batch this process reads.

    Processes whose devices are in the same rows of the mesh read the same part.

    Raises:
      InputError: the rows of two processes overlap, but are not the same.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shards = sorted({tuple(sorted(shard)) for shard in rows.values()})
    if len({row for shard in shards for row in shard}) != sum(map(len, shards)):
        raise InputError(
            "MODEL_PARALLELISM must be a divisor or a multiple of the"
            f" {len(jax.local_devices())} devices of a process, got {mesh.shape['model']}"
        )
    return shards.index(tuple(sorted(rows[jax.process_index()]))), len(shards)


def device_put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Moves arrays that all processes hold to devices, by a tree of shardings or a single one."""

    def put(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        # `jax.device_put` onto devices of other processes would compare the arrays of all of them.
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def replicated_sharding(mesh: Mesh | jax.sharding.AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every array to every device."""
    return device_put(tree, replicated_sharding(mesh))


def _identity(array: jax.Array) -> jax.Array:
    return array  # one function object, so that `gather` compiles once for each shape


def gather(tree: PyTree) -> PyTree:
    """Returns a tree of device arrays as whole numpy arrays, in every process."""

    def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            assert isinstance(array.sharding, NamedSharding)
            out_sharding = replicated_sharding(array.sharding.mesh)
            array = jax.jit(_identity, out_shardings=out_sharding)(array)
        return np.asarray(array)

    return jax.tree.map(to_host, tree)
