"""The state that T5X trains: its checkpoints hold what trains, and the base is read from its own.

T5X asks an initialiser for the first state and restores later ones by the state's own methods
(`state_dict`, `restore_state`), so both are given here; nothing of T5X's is changed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import freeze
from t5x import train_state as t5x_train_state
from t5x import utils

from pemoe_jax.checkpoints import models, runs, t5x_run
from pemoe_jax.core import adapters, network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io
from pemoe_jax.t5x_bridge import data, parameters


class FrozenParams:
    """The parameters that checkpoints leave out, and where they are read from again.

    Attributes:
      paths: of the parameters.
      read: -> path -> array.
    """

    def __init__(self, paths: set[str], read: Callable[[], Mapping[str, Any]]) -> None:
        self.paths, self.read = frozenset(paths), read


class TrainState(t5x_train_state.FlaxOptimTrainState):
    """T5X's, with all parameters in memory and those that train in checkpoints.

    Attributes:
      frozen: of the others; None: checkpoints hold all.
    """

    frozen: FrozenParams | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def of(cls, state: Any, frozen: FrozenParams | None) -> "TrainState":
        """A state of T5X's, as one of these."""
        return cls(
            _optimizer=state._optimizer,
            params_axes=state.params_axes,
            flax_mutables=state.flax_mutables,
            flax_mutables_axes=state.flax_mutables_axes,
            frozen=frozen,
        )

    def state_dict(self) -> Any:
        """What a checkpoint holds: `target`, the parameters that train, and `state`."""
        found = super().state_dict()
        if self.frozen is not None:
            paths = self.frozen.paths
            found["target"] = params_lib.select(found["target"], lambda path: path not in paths)
        return found

    def restore_state(self, state_dict: Mapping[str, Any]) -> "TrainState":
        """The state that a checkpoint describes; frozen parameters are read from the base."""
        target = params_lib.flatten(state_dict["target"])
        if self.frozen is not None and self.frozen.paths - target.keys():
            target |= self.frozen.read()
        return super().restore_state({**state_dict, "target": params_lib.unflatten(target)})

    def replace_step(self, step: Any) -> "TrainState":
        """The state at another step."""
        optimizer = self._optimizer
        state = optimizer.state.replace(step=step)
        return self.replace(_optimizer=optimizer.replace(state=state))

    def as_logical_axes(self) -> "TrainState":
        """The names of axes in place of arrays."""
        return TrainState.of(super().as_logical_axes(), self.frozen)


class TrainStateInitializer(utils.TrainStateInitializer):
    """T5X's, which reads the base in any of our formats and draws adapters as our runner does.

    Args:
      optimizer_def, init_fn, input_shapes, partitioner, input_types: T5X's; `init_fn` is a method
        of `EncoderDecoderModel`.
      base_path: of the base (INITIAL_CHECKPOINT_PATH); None: random weights.
      model_dir: gets a record beside its checkpoints, by which our own commands read them; what is
        there must belong to the same base and settings.
      method: its name, for tables.
      mixture_or_task_name: what is trained on, for tables.

    Raises:
      InputError: `model_dir` holds a run of other settings.
    """

    global_train_state_shape: Any
    train_state_axes: Any

    def __init__(
        self,
        optimizer_def: Any,
        init_fn: Any,
        input_shapes: Mapping[str, Any],
        partitioner: Any,
        input_types: Mapping[str, Any] | None = None,
        *,
        base_path: str | None = None,
        model_dir: str | None = None,
        method: str = "",
        mixture_or_task_name: str | None = None,
    ) -> None:
        super().__init__(optimizer_def, init_fn, input_shapes, partitioner, input_types)
        self._model, self._optimizer = init_fn.__self__, optimizer_def
        self._base_path, self._model_dir = base_path, model_dir
        self._method, self._name = method, mixture_or_task_name
        if optimizer_def is None:
            raise InputError(
                "t5x_bridge.TrainStateInitializer is for training: expected the checkpoint's path"
                " as CHECKPOINT_PATH and t5x_bridge.Checkpoints to read it"
            )
        shapes = self.global_train_state_shape
        self._frozen = set(params_lib.flatten(shapes.params)) - self._model.trainable_paths
        frozen = FrozenParams(self._frozen, self._read_frozen) if self._frozen else None
        self.global_train_state_shape = TrainState.of(shapes, frozen)
        self.train_state_axes = partitioner.get_mesh_axes(self.global_train_state_shape)
        self._places = parameters.shardings(partitioner.mesh, self.train_state_axes.params)

    def from_scratch(self, init_rng: Any) -> TrainState:
        """The base and new adapters, step 0; the key does not matter, the model's seed does."""
        del init_rng
        module, seed = self._model.module, self._model.seed
        base = self._read_base(new_run=True)
        added = parameters.init_params(
            module, seed, self._places.keys() - base.keys(), self._places
        )
        create = self._partitioner.partition(
            self._first_state,
            in_axis_resources=(self.train_state_axes.params,),
            out_axis_resources=self.train_state_axes,
            donate_argnums=(0,),
        )
        return create(freeze(params_lib.unflatten(base | added)))

    def _first_state(self, params: Any) -> TrainState:
        optimizer = self._optimizer.create(params)
        step = jnp.zeros((), jnp.int32)
        optimizer = optimizer.replace(state=optimizer.state.replace(step=step))
        return self.global_train_state_shape.replace(_optimizer=optimizer)

    def _read_base(self, new_run: bool) -> dict[str, jax.Array]:
        """Path -> array, frozen ones in the activation dtype; a run that goes on keeps its base."""
        model = self._model
        trains = model.trainable_paths.__contains__
        base, identity = models.load_base(
            model.module, self._base_path, model.seed, trains, self._places
        )
        if self._model_dir is not None:
            now = self._record(identity)
            if not new_run:
                _check_same_run(self._model_dir, t5x_run.read_record(self._model_dir), now)
            elif jax.process_index() == 0:
                t5x_run.write_record(self._model_dir, now)
        return params_lib.flatten(base)

    def _read_frozen(self) -> dict[str, jax.Array]:
        """For a run that goes on: what its checkpoints leave out."""
        module, seed = self._model.module, self._model.seed
        base = self._read_base(new_run=False)
        untrained = {path for path in self._frozen if params_lib.is_adapter(path)}
        added = parameters.init_params(module, seed, untrained, self._places)
        return {path: leaf for path, leaf in (base | added).items() if path in self._frozen}

    def _record(self, identity: Mapping[str, Any]) -> runs.Record:
        module = self._model.module
        shapes = params_lib.flatten(network.param_shapes(module))
        trained = {path: shapes[path] for path in self._model.trainable_paths}
        return runs.Record(
            method=self._method,
            trainable=list(self._model.trainable),
            config=module.config.as_dict(),
            adapters=adapters.describe(module.adapters),
            base={**identity, "needed": bool(self._frozen)},
            counts={"trainable": params_lib.count(trained), "total": params_lib.count(shapes)},
            versions=runs.package_versions(),
            seed=self._model.seed,
            trained_datasets=None if self._name is None else data.datasets(self._name),
        )


def _check_same_run(model_dir: str, before: runs.Record, now: runs.Record) -> None:
    """Raises InputError where what must not change in a run has changed."""
    for name, of in {
        "base fingerprint": lambda record: record.base["fingerprint"],
        "method": lambda record: record.method,
        "adapters": lambda record: record.adapters,
        "TRAINABLE": lambda record: record.trainable,
        "SEED": lambda record: record.seed,
        "T5Config": lambda record: {k: v for k, v in record.config.items() if k != "dropout_rate"},
    }.items():
        if of(before) != of(now):
            raise InputError(
                f"{file_io.resolve(model_dir)} holds a run with {name} {of(before)!r},"
                " expected the same"
                f" to go on, found {of(now)!r}: choose another MODEL_DIR or mend the setting"
            )
