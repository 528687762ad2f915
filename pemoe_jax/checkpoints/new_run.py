"""Sets up a new run: its dimensions, first train state and record.

The run starts from a base, random weights, or an earlier run, which `initial_run` reads.
"""

import dataclasses
from collections.abc import Mapping

import jax
import optax

from pemoe_jax.checkpoints import base_model, initial_run, models, upcycling
from pemoe_jax.checkpoints.models import OpenedModel
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import network, partitioning, quantized, sparse, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import PyTree
from pemoe_jax.core.sparse import Sparse
from pemoe_jax.runtime import options


def take_base_dimensions(
    model: network.Transformer, base_path: str | None, upcycle_noise: float | None = None
) -> network.Transformer:
    """Returns the model with the dimensions of its base, and prints those that changed.

    Args:
      model: the network of the gin files.
      base_path: path of the base; None: random weights, so the model is returned unchanged.
      upcycle_noise: UPCYCLE_NOISE; None: not set.

    Raises:
      InputError: the base is sparse, and the model is dense or has other experts; or noise is set,
        but the base is not upcycled.
    """
    base = None if base_path is None else base_model.open_base(base_path)
    is_upcycled = base is not None and upcycling.should_upcycle(model, base)
    if upcycle_noise and not is_upcycled:
        raise InputError(
            "UPCYCLE_NOISE must be 0.0 unless a sparse model starts from a dense base, got"
            f" {upcycle_noise}"
        )
    if base is None:
        return model
    if model.sparse is not None and not is_upcycled:
        # A base that states no routing, such as a Switch Transformer, is taken to be trained with
        # the defaults of `Sparse`.
        trained = sparse.from_description(base.sparse)
        assert trained is not None
        _warn_of_other_routing(model.sparse, trained, str(base_path))
    sizes = base.model_dimensions(model.config)
    changed = {name: value for name, value in sizes.items() if getattr(model.config, name) != value}
    if changed:
        text = ", ".join(
            f"{name} {value} (model file: {getattr(model.config, name)})"
            for name, value in changed.items()
        )
        print(f"dimensions taken from {base_path}: {text}", flush=True)
    return model.clone(config=dataclasses.replace(model.config, **sizes))


def _warn_of_other_routing(current: Sparse, trained: Sparse, base_path: str) -> None:
    """Prints a warning if a run does not route tokens as its base did in training."""
    settings, flags = [], []
    for name in ("routing", "top_k", "combine"):
        before, now = getattr(trained, name), getattr(current, name)
        if before != now:
            settings.append(f"{name.upper()} {before!r} (this run: {now!r})")
            flags.append(f"--gin.{name.upper()}={before}")
    if settings:
        print(
            f"WARNING: {base_path} was trained with {', '.join(settings)}: to start as its"
            f" function, pass {' '.join(flags)}",
            flush=True,
        )


def check_initial_run(
    initial: OpenedModel,
    record: Record,
    model: network.Transformer,
    method: options.Method,
    upcycle_noise: float | None,
) -> None:
    """Checks that a run can start from an initial run, and prints the settings that differ.

    Args:
      initial: the initial run.
      record: the new run's record.
      model: the new run's network.
      method: the new run's method.
      upcycle_noise: UPCYCLE_NOISE of the new run; None: not set.

    Raises:
      InputError: shapes differ, the new run freezes what the initial run trained, or its noise is
        not that of the initial run.
    """
    changes = initial_run.check_shape(initial, record, model)
    shapes = params_lib.flatten(network.param_shapes(model))
    initial_run.check_trainable(initial, find_trainable_paths(method, shapes), method.name)
    assert initial.record is not None
    # If the initial run upcycled its base, so does the new run, and with the same noise.
    initial_noise = initial.record.base.get("upcycled", {}).get("noise", 0.0)
    if upcycle_noise and upcycle_noise != initial_noise:
        raise InputError(
            f"UPCYCLE_NOISE must be {initial_noise}, as in the run {initial.path}, got"
            f" {upcycle_noise}"
        )
    if changes:
        print(f"settings that differ from those of {initial.path}: {changes}", flush=True)


def find_trainable_paths(
    method: options.Method, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> set[str]:
    """Returns the paths of the parameters to train.

    Args:
      method: the patterns of trainable parameters, and FROZEN_DTYPE.
      shapes: parameter path -> shape, of the whole model.

    Raises:
      InputError: a pattern matches no parameter, FROZEN_DTYPE is unknown, or it asks for quantized
        matrices while no matrix is frozen.
    """
    quantized.check_frozen_dtype(method.frozen_dtype)
    paths = params_lib.trainable_paths(shapes, method.trainable)
    has_frozen_matrix = any(params_lib.is_matrix(path) for path in shapes.keys() - paths)
    if method.frozen_dtype != quantized.ACTIVATIONS and not has_frozen_matrix:
        raise InputError(
            f"FROZEN_DTYPE must be 'activations' for {method.name}, which trains all matrices,"
            f" got {method.frozen_dtype!r}"
        )
    return paths


def initialize(
    model: network.Transformer,
    method: options.Method,
    optimizer: optax.GradientTransformation,
    checkpointing: options.Checkpointing,
    record: Record,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules,
    initial: initial_run.InitialRun | None,
) -> tuple[steps.TrainState, PyTree, Record]:
    """Loads or draws the parameters of a new run.

    Args:
      model: the network.
      method: which parameters train, and FROZEN_DTYPE.
      optimizer: the optimizer, whose state is created.
      checkpointing: path of the base, and UPCYCLE_NOISE.
      record: the run's record, in which the fields that depend on the base are not final.
      mesh: the devices.
      rules: logical axis -> mesh axis.
      initial: the run to start from; None: the run starts from a base or random weights.

    Returns:
      (sharded train state at step 0, frozen parameters, completed record)
    """
    shapes = params_lib.flatten(network.param_shapes(model))
    # Checked first, because reading the base may take minutes.
    trainable_paths = find_trainable_paths(method, shapes)
    shardings = partitioning.param_shardings(mesh, rules, network.param_axes(model), shapes)
    if initial is None or initial.opened is None:
        base, base_identity = models.load_base(
            model,
            checkpointing.initial_checkpoint_path,
            record.seed,
            trainable_paths.__contains__,
            shardings,
            method.frozen_dtype,
            checkpointing.upcycle_noise or 0.0,
        )
        adapter_params = models.device_put(
            network.init_params(model, record.seed, params_lib.is_adapter), shardings
        )
        params, fingerprint = params_lib.merge(adapter_params, base), base_identity["fingerprint"]
    else:
        params, base_identity, fingerprint = initial_run.load_params(
            initial.opened, model, record.seed, trainable_paths, shardings, method.frozen_dtype
        )
    trained, frozen = params_lib.split(params, method.trainable)
    record = dataclasses.replace(
        record,
        config=model.config.as_dict(),
        base={**base_identity, "needed": bool(frozen), "frozen_dtype": method.frozen_dtype},
        counts={"trainable": params_lib.count(trained), "total": params_lib.count(shapes)},
        initial=None if initial is None else initial_run.describe(initial, fingerprint),
    )

    def create(params: PyTree) -> steps.TrainState:
        return steps.TrainState.create(params, optimizer)

    # The state is created by a compiled program with the right shardings. Created eagerly, the
    # optimizer state would first be replicated on every device.
    state_shardings = partitioning.state_shardings(jax.eval_shape(create, trained), shardings, mesh)
    return jax.jit(create, out_shardings=state_shardings)(trained), frozen, record
