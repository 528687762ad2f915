"""Makes T5X shard arrays by the axis rules of `pemoe train` (`core.partitioning`)."""

import jax
from jax.sharding import PartitionSpec
from t5x import partitioning as t5x_partitioning
from t5x import train_state as t5x_train_state

from pemoe_jax.core import partitioning
from pemoe_jax.core.errors import InputError


def axis_rules(fsdp: bool = False, expert_parallelism: int = 1) -> partitioning.Rules:
    """Returns `partitioning.axis_rules` for T5X's mesh `data` × `model`.

    Args:
      fsdp: whether parameters are also sharded over `data`.
      expert_parallelism: must be 1.

    Raises:
      InputError: `expert_parallelism` is not 1.
    """
    if expert_parallelism != 1:
        raise InputError(
            "EXPERT_PARALLELISM must be 1 in T5X, whose mesh has no axis for experts, got"
            f" {expert_parallelism!r}: use pemoe train"
        )
    # Mesh axes of `pemoe train` -> those of T5X's mesh; other names are the same.
    t5x_axes: dict[partitioning.MeshAxes, partitioning.MeshAxes]
    t5x_axes = {partitioning.BATCH_AXES: "data", "expert": None}
    return tuple((name, t5x_axes.get(axes, axes)) for name, axes in partitioning.axis_rules(fsdp))


def replicate_uneven_axes(
    partitioner: t5x_partitioning.PjitPartitioner,
) -> t5x_partitioning.PjitPartitioner:
    """Makes a partitioner replicate arrays over mesh axes that do not divide them evenly.

    T5X would raise an error. Only one method of T5X's own partitioner is replaced, so that all gin
    bindings of `partitioning.PjitPartitioner` still apply.
    """

    def get_mesh_axes(train_state: t5x_train_state.TrainState) -> t5x_train_state.TrainState:
        """Returns the state with a `PartitionSpec` or None in place of each array."""
        mesh, rules = partitioner.mesh, partitioner.logical_axis_rules

        def spec(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...] | None) -> PartitionSpec | None:
            if names is None:
                return None
            return partitioning.logical_to_mesh_sharding(mesh, rules, names, leaf.shape).spec

        # Without these fields the state has the structure of the tree of axis names.
        arrays = train_state.replace(params_axes=None, flax_mutables_axes=None)
        return jax.tree.map(spec, arrays, partitioner.get_logical_axes(train_state))

    partitioner.get_mesh_axes = get_mesh_axes
    return partitioner
