"""Shardings in T5X, by the axis rules of `core.partitioning`, which `pemoe train` uses too."""

import jax
from jax.sharding import PartitionSpec
from t5x import partitioning as t5x_partitioning
from t5x import train_state as t5x_train_state

from pemoe_jax.core import partitioning

axis_rules = partitioning.axis_rules  # for `PjitPartitioner.logical_axis_rules`


def replicate_uneven_axes(
    partitioner: t5x_partitioning.PjitPartitioner,
) -> t5x_partitioning.PjitPartitioner:
    """Makes a partitioner replicate an axis that does not divide evenly, where T5X raises an error.

    The partitioner is T5X's own, so that all bindings of `partitioning.PjitPartitioner` apply.
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
