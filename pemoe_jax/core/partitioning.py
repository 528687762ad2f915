"""The device mesh, `data` × `expert` × `model`, and shardings of batches, parameters and states.

Parameters and activations have logical names for their axes, and rules map each name to axes of the
mesh, as in T5X (arXiv 2203.17189). XLA derives all other shardings and the communication. `data`
splits batches, `expert` splits batches and experts, `model` splits matrices.
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
    ("expert_groups", "data"),  # groups of tokens while `expert` splits the experts
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", None),
    ("length", None),
    ("kv", None),
    ("expert", "expert"),  # experts of sparse layers
    ("adapter_expert", None),  # experts of adapters are small, so each device holds all of them
    ("unmodeled", None),  # outputs of routers, as in T5X
    ("rank", None),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run uses its devices.

    Attributes:
      model_parallelism: tensor-parallel size: the number of devices that each matrix is sharded
        over. It must divide the number of devices.
      fsdp: whether parameters and optimizer states are also sharded over the axis `data`.
      expert_parallelism: number of devices that the experts of each sparse layer are spread over.
        It must divide the number of experts, and the number of devices that model parallelism
        leaves. A batch is sharded over these devices and over the axis `data`, which has the rest.
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
    """Returns a mesh `data` × `expert` × `model`, by default of all devices of all processes.

    Raises:
      InputError: the sizes do not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    _check_divisor("MODEL_PARALLELISM", model_parallelism, count, f"{count} devices")
    rest = count // model_parallelism
    text = f"{count} devices" if rest == count else f"{rest} devices that MODEL_PARALLELISM leaves"
    _check_divisor("EXPERT_PARALLELISM", expert_parallelism, rest, text)
    shape = (rest // expert_parallelism, expert_parallelism, model_parallelism)
    # With the option, an axis of the mesh may be a part of a physical axis of a TPU's torus.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES)


def _check_divisor(name: str, value: object, dividend: int, dividend_text: str) -> None:
    if not isinstance(value, int) or value < 1 or dividend % value:
        raise InputError(f"{name} must be a divisor of the {dividend_text}, got {value!r}")


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
    """Applies a function on each device to the device's rows of the arrays.

    The function must treat each row by itself. Without `shard_map`, XLA would gather the operands
    of the operations that it does not partition, such as top-k.
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
    # On CPUs, XLA connects a group of processes at the group's first collective operation. It fails
    # if one process arrives 30 seconds after another, for example after a longer compilation. So a
    # small sum runs over each axis, over the batch axes and over all axes, before any long work.
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
    """Returns the pairs (logical axis name, mesh axes or None); earlier pairs have priority.

    With `fsdp`, parameters are also sharded over `data`, along D (as ZeRO-3, arXiv 1910.02054).
    """
    return tuple((name, "data" if fsdp and name == "embed" else axis) for name, axis in _RULES)


def logical_to_mesh_sharding(
    mesh: Mesh, rules: Rules, axes: Sequence[str], shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array whose axes have logical names.

    Each mesh axis shards at most one axis of the array. An axis is not sharded if its size is not a
    multiple of the number of devices along its mesh axes.
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
    """Returns path -> sharding of each parameter.

    Args:
      mesh: the mesh.
      rules: see `axis_rules`.
      axes: path -> logical axis names; see `network.param_axes`.
      shapes: path -> shape.

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

    A state with the shape of its parameter has the parameter's sharding. Other states (factored
    moments, counts) are replicated, except that a state with a leading axis of experts is spread
    over the mesh axis `expert`, as the experts are.

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
    """Returns the value of the parameter whose path is the end of a state's key path, or None.

    In an optimizer's state, 'mu/encoder/…' is the state of the parameter 'encoder/…'.
    """
    keys = [str(getattr(key, "key", getattr(key, "name", None))) for key in key_path]
    suffixes = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((values[path] for path in suffixes if path in values), None)


def _fits(sharding: NamedSharding, shape: Sequence[int]) -> bool:
    """Whether a sharding has as many axes as the shape and divides each of them evenly."""
    return len(sharding.spec) == len(shape) and all(
        size % _axis_size(sharding.mesh, axis) == 0
        for axis, size in zip(sharding.spec, shape, strict=True)
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Context in which traced functions shard their activations (`layers.constrain_sharding`)."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises InputError unless a batch can be divided over the batch axes and microbatches."""
    shards = data_parallelism(mesh)
    if not isinstance(batch_size, int) or batch_size < 1 or batch_size % (shards * microbatches):
        pieces = f" × {microbatches} microbatches" if microbatches > 1 else ""
        raise InputError(
            f"BATCH_SIZE must be a positive multiple of {shards * microbatches}"
            f" (data-parallel size {shards}{pieces}), got {batch_size!r}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards a batch by rows; every process passes the whole batch."""
    return device_put(dict(batch), batch_sharding(mesh))


def make_global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Shards a batch by rows; every process passes only its `data_shard` of the batch."""
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

    A mesh row is the devices along `model` at one position of `data` and `expert`; they need the
    same part of a batch. So processes with devices in the same mesh rows read the same part.

    Raises:
      InputError: two processes have some mesh rows in common, but not all.
    """
    # Process -> numbers of its mesh rows.
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
    """Moves arrays, which every process holds, to devices.

    Args:
      tree: a tree of arrays.
      shardings: a tree of shardings, or one sharding for all arrays.
    """

    def put(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        # For devices of several processes, `jax.device_put` would first compare the arrays of all
        # processes.
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def replicated_sharding(mesh: Mesh | jax.sharding.AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that each device holds completely."""
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
