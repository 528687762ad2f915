"""The device mesh, `data` × `expert` × `model`, and shardings of batches, parameters and states.

Parameters and activations name their axes; rules map each name to axes of the mesh, as in T5X
(arXiv 2203.17189). XLA derives the other shardings and the communication.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pemoe_jax.core.errors import InputError

PyTree: TypeAlias = Any  # a leaf or a tree of arrays, shapes or shardings; jax has no type for it
_T = TypeVar("_T")
MeshAxes: TypeAlias = str | tuple[str, ...] | None
Rules: TypeAlias = tuple[tuple[str, MeshAxes], ...]

MESH_AXES = ("data", "expert", "model")
BATCH_AXES = ("data", "expert")  # a batch is spread over both

# Earlier rules have priority: with FSDP both `batch` and `embed` map to `data`, and an activation
# [batch, length, embed] is sharded by its batch.
_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("expert_groups", "data"),  # groups of tokens at their experts
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("length", None),
    ("kv", None),
    ("expert", "expert"),  # of sparse layers; a router's outputs are "unmodeled", as in T5X
    ("adapter_expert", None),  # small, so each device holds all of them
    ("unmodeled", None),
    ("rank", None),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run uses its devices.

    Attributes:
      model_parallelism: tensor-parallel size: the number of devices that each matrix is sharded
        over. It must divide the number of devices.
      fsdp: whether parameters and optimizer states are also sharded over the data axis.
      expert_parallelism: number of devices that the experts of each sparse layer are spread over.
        It must divide the number of experts, and the number of devices that model parallelism
        leaves. A batch is sharded over these devices and over the data axis, which has the rest.
    """

    model_parallelism: int = 1
    fsdp: bool = False
    expert_parallelism: int = 1

    def make_mesh(self) -> Mesh:
        """Returns the mesh of all devices, `data` × `expert` × `model`."""
        return make_mesh(self.model_parallelism, expert_parallelism=self.expert_parallelism)

    def axis_rules(self) -> Rules:
        """Returns the rules that map logical axis names to axes of the mesh."""
        return axis_rules(self.fsdp)


def make_mesh(
    model_parallelism: int = 1,
    devices: Sequence[jax.Device] | None = None,
    expert_parallelism: int = 1,
) -> Mesh:
    """Returns a mesh `data` × `expert` × `model` of devices; None for all of all processes.

    Raises:
      InputError: the sizes do not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    _check_divisor("MODEL_PARALLELISM", model_parallelism, count, f"{count} devices")
    left = count // model_parallelism
    text = f"{count} devices" if left == count else f"{left} devices that MODEL_PARALLELISM leaves"
    _check_divisor("EXPERT_PARALLELISM", expert_parallelism, left, text)
    shape = (left // expert_parallelism, expert_parallelism, model_parallelism)
    # Splitting lets a mesh axis take a part of a physical axis of a TPU's torus.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES)


def _check_divisor(name: str, value: object, of: int, text: str) -> None:
    if not isinstance(value, int) or value < 1 or of % value:
        raise InputError(f"{name} must be a divisor of the {text}, got {value!r}")


def data_parallelism(mesh: Mesh | jax.sharding.AbstractMesh | None = None) -> int:
    """Returns the number of parts that a mesh, by default the context's, divides a batch into."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def batch_axes() -> tuple[str, ...]:
    """Returns the axes of the context's mesh that a batch is spread over."""
    shape = jax.sharding.get_abstract_mesh().shape  # T5X's mesh has no axis `expert`
    return tuple(axis for axis in BATCH_AXES if axis in shape)


def divides_rows(rows: int) -> bool:
    """Whether the context's mesh has several devices and divides this number of rows evenly."""
    devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
    return devices > 1 and rows % data_parallelism() == 0


def map_rows(function: Callable[..., PyTree], *arrays: jax.Array) -> PyTree:
    """Applies a function, which treats each row by itself, to each device's rows of the arrays.

    XLA gathers the operands of operations that it does not partition, such as top-k.
    """
    if not divides_rows(len(arrays[0])):
        return function(*arrays)
    rows = PartitionSpec(batch_axes())
    return jax.shard_map(function, in_specs=rows, out_specs=rows)(*arrays)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch by its rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def connect_processes(mesh: Mesh) -> None:
    """Opens the connections between processes along each axis of a mesh.

    Call it where all processes arrive at about the same time. A no-op in a single process.
    """
    # On CPUs XLA connects processes at a program's first collective, and fails if one process
    # arrives 30 seconds after another, for example after a longer compilation. So a small
    # collective runs over each axis, over those of a batch, and over all, before any such work.
    if jax.process_count() == 1:
        return

    def sums(ones: jax.Array) -> list[jax.Array]:
        groups = (*mesh.axis_names, BATCH_AXES, mesh.axis_names)
        return [jax.lax.psum(ones, axes) for axes in groups]

    spec = PartitionSpec(*mesh.axis_names)
    ones = jax.make_array_from_callback(
        mesh.devices.shape, NamedSharding(mesh, spec), lambda index: np.ones((1, 1, 1))
    )
    sum_all = jax.shard_map(
        sums, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
    )
    jax.block_until_ready(jax.jit(sum_all)(ones))


def axis_rules(fsdp: bool = False) -> Rules:
    """Returns the pairs (logical axis name, mesh axes or None); the first that applies wins.

    With `fsdp` parameters are also sharded over `data`, along D (as ZeRO-3, arXiv 1910.02054).
    """
    return tuple((name, "data" if fsdp and name == "embed" else axis) for name, axis in _RULES)


def logical_to_mesh_sharding(
    mesh: Mesh, rules: Rules, axes: Sequence[str], shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array with named axes; each mesh axis shards one axis at most.

    An axis whose size is not a multiple of the mesh axes is replicated.
    """
    spec: list[MeshAxes] = [None] * len(axes)
    used: set[str] = set()
    for name, mesh_axes in rules:
        names, size = set(_axis_names(mesh_axes)), _axis_size(mesh, mesh_axes)
        if size == 1 or names & used:
            continue
        for i, axis in enumerate(axes):
            if axis == name and spec[i] is None and shape[i] % size == 0:
                spec[i] = mesh_axes
                used |= names
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axis_names(mesh_axes: MeshAxes) -> tuple[str, ...]:
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes


def _axis_size(mesh: Mesh | jax.sharding.AbstractMesh, mesh_axes: MeshAxes) -> int:
    return math.prod(mesh.shape[name] for name in _axis_names(mesh_axes))


def param_shardings(
    mesh: Mesh,
    rules: Rules,
    axes: Mapping[str, Sequence[str]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, NamedSharding]:
    """Returns path -> sharding, from `axis_rules`, `network.param_axes` and shapes by path.

    Raises:
      InputError: experts cannot be spread evenly over the axis `expert`.
    """
    _check_experts(mesh.shape.get("expert", 1), axes, shapes)
    return {
        path: logical_to_mesh_sharding(mesh, rules, axes[path], leaf.shape)
        for path, leaf in shapes.items()
    }


def _check_experts(
    size: int, axes: Mapping[str, Sequence[str]], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    if size == 1:
        return
    if not any("expert" in names for names in axes.values()):
        raise InputError(
            f"EXPERT_PARALLELISM must be 1 for a model without sparse layers, got {size}"
        )
    for path, leaf in shapes.items():
        experts = dict(zip(axes[path], leaf.shape, strict=True)).get("expert", size)
        if experts % size:
            raise InputError(
                f"EXPERT_PARALLELISM must be a divisor of NUM_EXPERTS ({experts}), got {size}"
            )


def state_shardings(
    abstract: PyTree, param_shardings: Mapping[str, NamedSharding], mesh: Mesh
) -> PyTree:
    """Returns the shardings of a tree that holds states of parameters, such as Adam's moments.

    A state that does not have the shape of its parameter (factored moments, counts) is replicated;
    of experts, which have states of their own, it is spread like them over `expert`.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`, such as the train state's.
      param_shardings: path -> sharding of the parameters.
      mesh: the mesh.
    """
    replicated = replicated_sharding(mesh)

    def leaf_sharding(key_path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        sharding = value_of_param(key_path, param_shardings)
        if sharding is None or _fits(sharding, leaf.shape):
            return sharding or replicated
        experts = NamedSharding(mesh, PartitionSpec("expert"))
        has_experts = sharding.spec[:1] == ("expert",) and leaf.ndim > 0
        return experts if has_experts and _fits(experts, leaf.shape[:1]) else replicated

    return jax.tree_util.tree_map_with_path(leaf_sharding, abstract)


def value_of_param(key_path: jax.tree_util.KeyPath, values: Mapping[str, _T]) -> _T | None:
    """Returns the value of the parameter path that a state's path in a pytree ends in, or None."""
    keys = [str(getattr(key, "key", getattr(key, "name", None))) for key in key_path]
    suffixes = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((values[path] for path in suffixes if path in values), None)


def _fits(sharding: NamedSharding, shape: Sequence[int]) -> bool:
    return len(sharding.spec) == len(shape) and all(
        size % _axis_size(sharding.mesh, axis) == 0
        for axis, size in zip(sharding.spec, shape, strict=True)
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Context in which traced functions shard activations (`layers.constrain_sharding`)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError if a batch does not divide into the devices' microbatches."""
    devices = data_parallelism(mesh)
    if not isinstance(batch_size, int) or batch_size < 1 or batch_size % (devices * microbatches):
        pieces = f" × {microbatches} microbatches" if microbatches > 1 else ""
        raise InputError(
            f"BATCH_SIZE must be a positive multiple of {devices * microbatches}"
            f" ({devices} devices{pieces}), got {batch_size!r}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards the rows of a batch; every process passes the whole batch."""
    return device_put(dict(batch), batch_sharding(mesh))


def make_global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards the rows of a batch; every process passes its `data_shard` alone."""
    sharding = batch_sharding(mesh)
    num_shards = data_shard(mesh)[1]
    return {
        name: jax.make_array_from_process_local_data(
            sharding, np.asarray(array), (len(array) * num_shards, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns (shard id, number of shards): which part of each batch this process reads.

    Processes whose devices are in the same rows of the mesh, numbered over `data` and `expert`,
    read the same part.

    Raises:
      InputError: the rows of two processes overlap, but are not the same.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.devices.shape[-1])):
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
