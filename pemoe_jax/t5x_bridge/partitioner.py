"""Where T5X puts arrays: by the axis rules of our own runner, told once, in `core.partitioning`."""

from typing import Any

import jax
from jax.sharding import PartitionSpec
from t5x import partitioning as t5x_partitioning

from pemoe_jax.core import partitioning


def axis_rules(fsdp: bool = False) -> partitioning.Rules:
    """(logical axis, mesh axis or None), for `PjitPartitioner.logical_axis_rules`.

    Args:
      fsdp: parameters are spread over `data` too.
    """
    return partitioning.axis_rules(fsdp)


class PjitPartitioner(t5x_partitioning.PjitPartitioner):
    """T5X's, but an axis that does not divide evenly is whole on every device, and no error."""

    def get_mesh_axes(self, train_state: Any) -> Any:
        """The state with a `PartitionSpec` or None in place of each array."""

        def spec(leaf: Any, names: Any) -> PartitionSpec | None:
            if names is None:
                return None
            rules = self.logical_axis_rules
            return partitioning.logical_to_mesh_sharding(
                self.mesh, rules, tuple(names), leaf.shape
            ).spec

        # the names of axes are in the other tree, and are no part of a state's arrays
        arrays = train_state.replace(params_axes=None, flax_mutables_axes=None)
        return jax.tree.map(spec, arrays, self.get_logical_axes(train_state))
