"""Shardings in T5X, by the axis rules of `core.partitioning`, which `pemoe train` uses too."""

from typing import TYPE_CHECKING

import jax
from jax.sharding import PartitionSpec
from t5x import partitioning as t5x_partitioning

from pemoe_jax.core import partitioning

if TYPE_CHECKING:
    from t5x import train_state as t5x_train_state


def axis_rules(fsdp: bool = False) -> partitioning.Rules:
    """Returns (logical axis name, mesh axis or None) for `PjitPartitioner.logical_axis_rules`.

    Args:
      fsdp: whether parameters are also sharded over `data`.
    """
    return partitioning.axis_rules(fsdp)


class PjitPartitioner(t5x_partitioning.PjitPartitioner):
    """T5X's partitioner; an axis that does not divide evenly is replicated, not an error."""

    def get_mesh_axes(
        self, train_state: "t5x_train_state.TrainState"
    ) -> "t5x_train_state.TrainState":
        """Returns the state with a `PartitionSpec` or None in place of each array."""

        def spec(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...] | None) -> PartitionSpec | None:
            if names is None:
                return None
            rules = self.logical_axis_rules
            return partitioning.logical_to_mesh_sharding(
                self.mesh, rules, tuple(names), leaf.shape
            ).spec

        # The axis names are the second tree; without them both trees have the same structure.
        arrays = train_state.replace(params_axes=None, flax_mutables_axes=None)
        return jax.tree.map(spec, arrays, self.get_logical_axes(train_state))
