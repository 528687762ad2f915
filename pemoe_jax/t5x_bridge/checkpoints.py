"""Lets `t5x.eval` and `t5x.infer` read all checkpoints that `pemoe evaluate` reads."""

import os
import re
from collections.abc import Sequence

import jax.numpy as jnp
from t5x import partitioning as t5x_partitioning
from t5x import train_state as t5x_train_state

from pemoe_jax.checkpoints import models
from pemoe_jax.core import network
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io
from pemoe_jax.t5x_bridge import parameters


def checkpoint_path(path: str | Sequence[str]) -> str | list[str]:
    """Returns CHECKPOINT_PATH in the form that T5X expects: <path>/checkpoint_<step>.

    An adapter or a base model has no such folder: `Checkpoints` removes the last part again.

    Args:
      path: a run (for its newest checkpoint), a checkpoint, an adapter or a base model, or several.

    Raises:
      InputError: a checkpoint of this step does not exist.
    """
    if not isinstance(path, str):
        return [str(checkpoint_path(each)) for each in path]
    resolved = os.fspath(file_io.resolve(path))  # 'gs://…', or an absolute path
    if re.search(r"checkpoint_\d+$", resolved):
        # Otherwise `Checkpoints` would take the step for one that was added here, and read the
        # newest checkpoint of the run.
        if not file_io.resolve(resolved).exists():
            raise InputError(f"CHECKPOINT_PATH: {resolved}: no such checkpoint")
        return resolved
    # A path that does not exist raises an InputError in `Checkpoints.restore`.
    step = models.open_model(resolved).step if file_io.resolve(resolved).exists() else 0
    return f"{resolved}/checkpoint_{step}"


class Checkpoints:
    """Reads checkpoints in place of T5X's checkpoint manager (`RestoreCheckpointConfig`).

    Args:
      directory, settings: ignored; T5X passes them for writing.
      train_state: the state to restore, with shapes in place of arrays.
      partitioner: T5X's partitioner, which determines the shardings.
      module: the network that a checkpoint must belong to.
      base_path: base model to read in place of the one that a run or an adapter names.
    """

    def __init__(
        self,
        directory: str,
        train_state: t5x_train_state.TrainState,
        partitioner: t5x_partitioning.BasePartitioner,
        module: network.Transformer,
        base_path: str | None = None,
        **settings: object,
    ) -> None:
        del directory, settings
        self._state, self._module, self._base_path = train_state, module, base_path
        axes = partitioner.get_mesh_axes(train_state).params
        self._shardings = parameters.shardings(partitioner.mesh, axes)

    def restore(self, path: str, **settings: object) -> t5x_train_state.TrainState:
        """Returns the state with the parameters and the step of a checkpoint.

        Args:
          path: a path that `checkpoint_path` returned.
          settings: ignored; T5X passes them for its own formats.

        Raises:
          InputError: see `parameters.read_model`.
        """
        del settings
        # Base models and adapters have no folder 'checkpoint_<step>': `checkpoint_path` added it.
        if not file_io.resolve(path).exists():
            path = os.path.dirname(path)
        params, step = parameters.read_model(self._module, path, self._base_path, self._shardings)
        return self._state.replace_params(params).replace_step(jnp.asarray(step, jnp.int32))
