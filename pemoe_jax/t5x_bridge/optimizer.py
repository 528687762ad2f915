"""Our optimisers inside T5X, over the parameters that train; a run with it can be resumed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import FrozenDict, freeze
from t5x import optimizers

from pemoe_jax.core import optim
from pemoe_jax.core import params as params_lib


class FrozenBase(optimizers.OptaxWrapper):
    """One of `core.optim`'s optimisers; frozen parameters have no state and are handed through.

    T5X's trainer gives the learning rate of each step (`Trainer.learning_rate_fn`), and with the
    same schedule the states are those of our own runner.

    Args:
      optimizer: learning-rate schedule -> optax transformation.
      trainable: patterns of the parameters that train; each must match something.
    """

    def __init__(self, optimizer: optim.OptimizerFactory, trainable: Sequence[str]) -> None:
        self._optimizer = optimizer
        self._trainable = trainable
        super().__init__(optimizer(lambda _: jnp.zeros(())))

    def init_state(self, params: Any) -> Any:
        """T5X's record of the step and the trainable parameters' states."""
        trained, _ = params_lib.split(params, self._trainable)
        return super().init_state(trained)

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: Any, grads: Any
    ) -> tuple[Any, Any]:
        """One step: (parameters, state)."""
        transformation = self._optimizer(lambda _: hyper_params.learning_rate)
        trained, frozen = params_lib.split(params, self._trainable)
        gradients, _ = params_lib.split(grads, self._trainable)
        updates, states = transformation.update(gradients, state.param_states, trained)
        merged: Any = params_lib.merge(optax.apply_updates(trained, updates), frozen)
        merged = freeze(merged) if isinstance(params, FrozenDict) else merged
        return merged, optimizers.OptimizerState(step=state.step + 1, param_states=states)

    def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
        """The names of axes: a state of its parameter's shape has that parameter's, others none."""
        axes = params_lib.flatten(param_logical_axes)
        shapes = {path: leaf.shape for path, leaf in params_lib.flatten(optimizer.target).items()}

        def of_state(path: Any, leaf: Any) -> Any:
            keys = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
            for start in range(len(keys)):
                name = "/".join(keys[start:])
                if name in axes:
                    return axes[name] if shapes[name] == leaf.shape else None
            return None

        states = jax.tree_util.tree_map_with_path(of_state, optimizer.state.param_states)
        state = optimizers.OptimizerState(step=None, param_states=states)
        return optimizer.replace(target=param_logical_axes, state=state)
