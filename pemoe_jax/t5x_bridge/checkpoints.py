"""What `t5x.eval` and `t5x.infer` restore: whatever `pemoe evaluate` takes."""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pemoe_jax.checkpoints import models
from pemoe_jax.core import network
from pemoe_jax.runtime import file_io
from pemoe_jax.t5x_bridge import parameters


def checkpoint_path(path: str | Sequence[str]) -> str | list[str]:
    """CHECKPOINT_PATH as T5X wants it: it must end in a step.

    Args:
      path: of a run (its newest checkpoint), one checkpoint, an adapter or a base; or some.

    Returns:
      <path>/checkpoint_<step>, which is there for runs alone; `Checkpoints` knows.
    """
    if not isinstance(path, str):
        return [str(checkpoint_path(one)) for one in path]
    place = os.fspath(file_io.resolve(path))
    if re.search(r"checkpoint_\d+$", place):
        return place
    step = models.open_model(place).step if file_io.resolve(place).exists() else 0
    return f"{place}/checkpoint_{step}"


class Checkpoints:
    """In place of T5X's checkpoint manager, for reading (RestoreCheckpointConfig names it).

    Args:
      directory: not used.
      train_state: of shapes, whose parameters are filled in.
      partitioner: says where they lie.
      module: the network that they must be of.
      base_path: read in place of the base that a run or an adapter names; None: that one.
      settings: what else T5X hands to its own, for writing.
    """

    def __init__(
        self,
        directory: str,
        train_state: Any,
        partitioner: Any,
        module: network.Transformer,
        base_path: str | None = None,
        **settings: Any,
    ) -> None:
        del directory, settings
        self._state, self._module, self._base_path = train_state, module, base_path
        axes = partitioner.get_mesh_axes(train_state).params
        self._places = parameters.shardings(partitioner.mesh, axes)

    def restore(self, path: str, **settings: Any) -> Any:
        """The state with the parameters at a path of `checkpoint_path`, and their step.

        Raises:
          InputError: see `parameters.read_model`.
        """
        del settings
        there = file_io.resolve(path).exists()
        params, step = parameters.read_model(
            self._module, path if there else os.path.dirname(path), self._base_path, self._places
        )
        return self._state.replace_params(params).replace_step(jnp.asarray(step, jnp.int32))
