"""The optimizers of `core.optim` in T5X, over the trainable parameters alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax.core import FrozenDict, freeze
from t5x import optimizers

from pemoe_jax.core import optim, partitioning
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.params import Params, PyTree


class FrozenBase(optimizers.OptaxWrapper):
    """An optimizer of `core.optim` over the trainable parameters; frozen ones have no state.

    The learning rate of each step is that of T5X's trainer (`Trainer.learning_rate_fn`). With the
    same schedule the states equal those of `pemoe train`.

    Args:
      optimizer: (learning-rate schedule, param_axes=…) -> optax transformation.
      trainable: patterns of the trainable parameters; each must match a parameter.
    """

    def __init__(self, optimizer: optim.OptimizerFactory, trainable: Sequence[str]) -> None:
        self._optimizer, self._trainable = optimizer, trainable
        self._param_axes: optim.ParamAxes | None = None
        # T5X's wrapper requires an optimizer, which `set_param_axes` replaces. Each step makes one
        # with its own learning rate.
        super().__init__(self._make(jnp.zeros(())))

    def _make(self, learning_rate: jax.Array) -> optax.GradientTransformation:
        return self._optimizer(lambda _: learning_rate, param_axes=self._param_axes)

    def set_param_axes(self, param_logical_axes: PyTree) -> None:
        """Sets the names of the parameters' axes; T5X calls this before it creates a state."""
        axes = params_lib.flatten(param_logical_axes)
        self._param_axes = {path: tuple(names) for path, names in axes.items()}
        # This optimizer creates the initial states, which do not depend on the learning rate.
        self.optax_optimizer = self._make(jnp.zeros(()))

    def init_state(self, params: Params) -> optimizers.OptimizerState:
        """Returns step 0 and the initial states of the trainable parameters."""
        trainable, _ = params_lib.split(params, self._trainable)
        return super().init_state(trainable)

    def apply_gradient(
        self,
        hyper_params: PyTree,
        params: Params,
        state: optimizers.OptimizerState,
        grads: Params,
    ) -> tuple[Params, optimizers.OptimizerState]:
        """Returns the parameters and the state after a step."""
        transformation = self._make(hyper_params.learning_rate)
        trainable, frozen = params_lib.split(params, self._trainable)
        trainable_grads, _ = params_lib.split(grads, self._trainable)
        updates, states = transformation.update(trainable_grads, state.param_states, trainable)
        merged: Params = params_lib.merge(optax.apply_updates(trainable, updates), frozen)
        merged = freeze(merged) if isinstance(params, FrozenDict) else merged
        return merged, optimizers.OptimizerState(step=state.step + 1, param_states=states)

    def derive_logical_axes(
        self, optimizer: optimizers.Optimizer, param_logical_axes: PyTree
    ) -> optimizers.Optimizer:
        """Returns the optimizer with axis names in place of arrays, for its shardings.

        A state of the shape of its parameter has the parameter's names. Others, such as factored
        second moments, have None.
        """
        axes = params_lib.flatten(param_logical_axes)
        shapes = {path: leaf.shape for path, leaf in params_lib.flatten(optimizer.target).items()}

        def state_axes(key_path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> PyTree:
            if partitioning.value_of_param(key_path, shapes) != leaf.shape:
                return None
            return partitioning.value_of_param(key_path, axes)

        states = jax.tree_util.tree_map_with_path(state_axes, optimizer.state.param_states)
        state = optimizers.OptimizerState(step=None, param_states=states)
        return optimizer.replace(target=param_logical_axes, state=state)
