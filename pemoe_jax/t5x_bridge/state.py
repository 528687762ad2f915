"""T5X's train state, whose checkpoints contain only trainable parameters.

T5X gets the first state from an initializer. It writes a state with the method `state_dict`, and
restores it with `restore_state`. Subclasses here replace the initializer and both methods; frozen
parameters are read from the base model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import freeze
from t5x import optimizers, utils
from t5x import partitioning as t5x_partitioning
from t5x import train_state as t5x_train_state

from pemoe_jax.checkpoints import models, same_run, t5x_run
from pemoe_jax.checkpoints.records import Record, package_versions
from pemoe_jax.core import adapters, network, sparse
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import Params, PyTree
from pemoe_jax.runtime import file_io
from pemoe_jax.t5x_bridge import data, parameters


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenParams:
    """The parameters that checkpoints do not contain.

    Attributes:
      paths: their paths.
      read: reads them from the base model, as path -> array.
    """

    paths: frozenset[str]
    read: Callable[[], Mapping[str, jax.Array]]


class TrainState(t5x_train_state.FlaxOptimTrainState):
    """T5X's train state, which writes only trainable parameters to checkpoints."""

    # None if all parameters are trainable.
    frozen: FrozenParams | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def from_t5x(
        cls, state: t5x_train_state.FlaxOptimTrainState, frozen: FrozenParams | None
    ) -> "TrainState":
        """Returns T5X's state as one whose checkpoints leave out the frozen parameters."""
        return cls(
            _optimizer=state._optimizer,
            params_axes=state.params_axes,
            flax_mutables=state.flax_mutables,
            flax_mutables_axes=state.flax_mutables_axes,
            frozen=frozen,
        )

    def state_dict(self) -> dict[str, PyTree]:
        """Returns a checkpoint's content: `target`, the trainable parameters, and `state`."""
        content = super().state_dict()
        if self.frozen is not None:
            paths = self.frozen.paths
            content["target"] = params_lib.select(content["target"], lambda path: path not in paths)
        return content

    def restore_state(self, state_dict: Mapping[str, PyTree]) -> "TrainState":
        """Returns the state of a checkpoint; frozen parameters are read from the base model."""
        target = params_lib.flatten(state_dict["target"])
        # The base is read only if frozen parameters are missing, as they are in checkpoints.
        if self.frozen is not None and self.frozen.paths - target.keys():
            target |= self.frozen.read()
        return super().restore_state({**state_dict, "target": params_lib.unflatten(target)})

    def replace_step(self, step: jax.Array) -> "TrainState":
        """Returns the state at another step."""
        state = self._optimizer.state.replace(step=step)
        return self.replace(_optimizer=self._optimizer.replace(state=state))

    def as_logical_axes(self) -> "TrainState":
        """Returns the state with axis names in place of arrays."""
        return TrainState.from_t5x(super().as_logical_axes(), self.frozen)


class TrainStateInitializer(utils.TrainStateInitializer):
    """T5X's initializer; reads base models of any format and draws adapters as `pemoe train` does.

    Args:
      optimizer_def, init_fn, input_shapes, partitioner, input_types: as in T5X; `init_fn` is a
        method of `EncoderDecoderModel`.
      base_path: path of the base model (INITIAL_CHECKPOINT_PATH); None for random weights.
      upcycle_noise: see `options.Checkpointing`.
      model_dir: MODEL_DIR. A new run writes a record of its base model and settings there, by which
        `pemoe` commands read its checkpoints; a resumed run is compared with it.
      method: name of the method, for tables.
      mixture_or_task_name: name of the training data, for tables.

    Raises:
      InputError: `optimizer_def` is None, or MODEL_DIR has a character of shell patterns; later,
        when parameters are read: `model_dir` holds a run with other settings.
    """

    global_train_state_shape: PyTree
    train_state_axes: PyTree

    def __init__(
        self,
        optimizer_def: optimizers.OptimizerDef,
        init_fn: Any,
        input_shapes: Mapping[str, tuple[int, ...]],
        partitioner: t5x_partitioning.BasePartitioner,
        input_types: Mapping[str, jax.typing.DTypeLike] | None = None,
        *,
        base_path: str | None = None,
        upcycle_noise: float = 0.0,
        model_dir: str | None = None,
        method: str = "",
        mixture_or_task_name: str | None = None,
    ) -> None:
        super().__init__(optimizer_def, init_fn, input_shapes, partitioner, input_types)
        self._model, self._optimizer = init_fn.__self__, optimizer_def
        self._base_path, self._model_dir = base_path, model_dir
        self._upcycle_noise = upcycle_noise
        self._method, self._name = method, mixture_or_task_name
        if optimizer_def is None:
            raise InputError(
                "t5x_bridge.TrainStateInitializer is for training: to read a checkpoint, set"
                " CHECKPOINT_PATH and use t5x_bridge.Checkpoints"
            )
        if model_dir:
            file_io.check_no_pattern(model_dir, "MODEL_DIR")
        shapes = self.global_train_state_shape
        self._frozen = frozenset(params_lib.flatten(shapes.params)) - self._model.trainable_paths
        frozen = FrozenParams(self._frozen, self._read_frozen) if self._frozen else None
        self.global_train_state_shape = TrainState.from_t5x(shapes, frozen)
        self.train_state_axes = partitioner.get_mesh_axes(self.global_train_state_shape)
        self._shardings = parameters.shardings(partitioner.mesh, self.train_state_axes.params)

    def from_scratch(self, init_rng: jax.Array) -> TrainState:
        """Returns the state of the base model with new adapters, at step 0."""
        del init_rng  # parameters depend on the model's seed
        base = self._read_base(is_resumed=False)
        adapter_params = self._draw(self._shardings.keys() - base.keys())
        # Compiled with the states' shardings. Created eagerly, states would be replicated first.
        create = self._partitioner.partition(
            self._first_state,
            in_axis_resources=(self.train_state_axes.params,),
            out_axis_resources=self.train_state_axes,
            donate_argnums=(0,),
        )
        return create(freeze(params_lib.unflatten(base | adapter_params)))

    def _draw(self, paths: set[str]) -> dict[str, jax.Array]:
        """Returns path -> random float32 parameter, as `pemoe train` draws them."""
        drawn = network.init_params(self._model.module, self._model.seed, paths.__contains__)
        return params_lib.flatten(models.device_put(drawn, self._shardings))

    def _first_state(self, params: Params) -> TrainState:
        optimizer = self._optimizer.create(params)
        state = self.global_train_state_shape.replace(_optimizer=optimizer)
        return state.replace_step(jnp.zeros((), jnp.int32))

    def _read_base(self, is_resumed: bool) -> dict[str, jax.Array]:
        """Reads the base model, and writes the record of a new run or checks a resumed run's.

        Args:
          is_resumed: whether the run resumes, and so has a record.

        Returns:
          path -> array of the base's parameters.

        Raises:
          InputError: the base cannot be read, or the record differs.
        """
        model = self._model
        is_trainable = model.trainable_paths.__contains__
        base, identity = models.load_base(
            model.module,
            self._base_path,
            model.seed,
            is_trainable,
            self._shardings,
            upcycle_noise=self._upcycle_noise,
        )
        if self._model_dir is not None:
            record = self._record(identity)
            if is_resumed:
                same_run.check_same_run(
                    self._model_dir, t5x_run.read_record(self._model_dir), record
                )
            elif jax.process_index() == 0:
                t5x_run.write_record(self._model_dir, record)
        return params_lib.flatten(base)

    def _read_frozen(self) -> dict[str, jax.Array]:
        """Reads the parameters that the checkpoints of a resumed run do not contain."""
        base = self._read_base(is_resumed=True)
        # TRAINABLE may leave some adapters frozen: they still have their initial values.
        drawn = self._draw(set(filter(params_lib.is_adapter, self._frozen)))
        return {path: leaf for path, leaf in (base | drawn).items() if path in self._frozen}

    def _record(self, identity: Mapping[str, object]) -> Record:
        module = self._model.module
        shapes = params_lib.flatten(network.param_shapes(module))
        trainable = {path: shapes[path] for path in self._model.trainable_paths}
        return Record(
            method=self._method,
            trainable=list(self._model.trainable),
            config=module.config.as_dict(),
            adapters=adapters.describe(module.adapters),
            sparse=sparse.describe(module.sparse),
            base={**identity, "needed": bool(self._frozen)},
            counts={"trainable": params_lib.count(trainable), "total": params_lib.count(shapes)},
            versions=package_versions(),
            seed=self._model.seed,
            **({} if self._name is None else data.training_record(self._name)),
        )
