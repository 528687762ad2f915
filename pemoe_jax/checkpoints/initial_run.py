"""A run that another run continues from (INITIAL_CHECKPOINT_PATH): what it trained, on its base.

A run that trained a whole model without adapters is a base like any other, see `base_model`. Of all
other runs, the new one takes over the trained parameters and the base that they belong to. Its own
checkpoints then hold the same parameters, so they need the base alone.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

from pemoe_jax.checkpoints import (
    adapter_file,
    models,
    run_settings,
    runs,
    same_run,
    t5x_run,
)
from pemoe_jax.checkpoints.models import OpenedModel
from pemoe_jax.checkpoints.runs import Record
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.core.network import Transformer
from pemoe_jax.core.params import PyTree
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import JsonObject

# Fields of `T5Config` that determine the shapes of parameters.
DIMENSIONS = (
    *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers"),
    *("num_decoder_layers", "mlp_activations", "logits_via_embedding", "sentence_dim"),
)


@dataclasses.dataclass(frozen=True)
class InitialRun:
    """A run, or an exported adapter, that a new run starts from.

    Attributes:
      path: path that the user passed.
      record: its record.
      opened: the model, whose base is another one; None: the run is a base by itself.
    """

    path: str
    record: Record
    opened: OpenedModel | None


def open_initial_run(path: str | None) -> InitialRun | None:
    """Opens INITIAL_CHECKPOINT_PATH if it is a run or an exported adapter; None if it is neither.

    Raises:
      InputError: the run's base does not exist, or a checkpoint is unreadable.
    """
    if path is None:
        return None
    with file_io.remote_errors(file_io.resolve(path)):
        record = _read_record(path)
    if record is None:
        return None
    if not record.adapters and not record.base["needed"]:
        return InitialRun(path, record, None)
    base_path = record.base["path"]
    if record.base["needed"] and base_path is not None and not file_io.resolve(base_path).exists():
        raise InputError(
            f"INITIAL_CHECKPOINT_PATH {path} belongs to the base {base_path}, which does not exist"
        )
    return InitialRun(path, record, models.open_model(path))


def _read_record(path: str) -> Record | None:
    if adapter_file.is_adapter(path):
        return adapter_file.open_adapter(path)[1]
    if runs.is_run(path):
        return runs.read_record(path)
    return t5x_run.read_record(path) if t5x_run.is_run(path) else None


def take_dimensions(model: Transformer, initial: OpenedModel) -> Transformer:
    """Returns the model with the dimensions of a run."""
    config = initial.model.config
    sizes = {name: getattr(config, name) for name in DIMENSIONS}
    return model.clone(config=dataclasses.replace(model.config, **sizes))


def check_shape(initial: OpenedModel, current: Record, model: Transformer) -> str:
    """Checks that a new run's parameters have the shapes of an initial run's.

    Args:
      initial: the initial run.
      current: the new run.
      model: its network, with the dimensions of the initial run.

    Returns:
      The settings of adapters that differ, such as 'top_k None -> 2 at key'; '' if none does.

    Raises:
      InputError: another shape, with both runs and every difference.
    """
    assert initial.record is not None
    saved = initial.record
    differences = [
        *same_run.adapter_differences(saved.adapters, current.adapters),
        *same_run.sparse_differences(saved.sparse, current.sparse),
    ]
    shapes = [
        {path: leaf.shape for path, leaf in params_lib.flatten(network.param_shapes(m)).items()}
        for m in (initial.model, model)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"INITIAL_CHECKPOINT_PATH must be a base, or a run of this run's shape, got"
            f" {initial.path}: {saved.method} -> {current.method}, {'; '.join(differences)}"
        )
    return "; ".join(differences)


def check_trainable(initial: OpenedModel, trainable: Collection[str], method: str) -> None:
    """Raises InputError if a new run freezes what an initial run trained.

    Its checkpoints would then lack these parameters, and the base does not have them.
    """
    if frozen := initial.trained_arrays.keys() - set(trainable):
        raise InputError(
            f"TRAINABLE and FREEZE must leave trainable what the run {initial.path} trained, got"
            f" {plural(len(frozen), 'array')} that {method} freezes, such as {min(frozen)}"
            " (a run that trained a whole model, also by pemoe convert base, has no such limit)"
        )


def load_params(
    initial: OpenedModel,
    model: Transformer,
    seed: int,
    trainable: Collection[str],
    shardings: models.Shardings,
    frozen_dtype: str,
) -> tuple[dict[str, PyTree], JsonObject, str]:
    """Returns an initial run's parameters, its base's identity, and the fingerprint of the trained.

    Args:
      initial: the initial run.
      model: the new run's network, of the same shape.
      seed: the new run's seed.
      trainable: paths of the parameters that the new run trains; they are float32.
      shardings, frozen_dtype: see `models.load_base`.

    Raises:
      InputError: see `OpenedModel.load`; or `seed` would draw other frozen adapters.
    """
    assert initial.record is not None
    paths = params_lib.flatten(network.param_shapes(model)).keys()
    is_drawn = any(map(params_lib.is_adapter, paths - set(trainable)))
    if is_drawn and seed != initial.record.seed:
        raise InputError(
            f"SEED must be {initial.record.seed}, which draws the frozen adapters of the run"
            f" {initial.path}, got {seed}"
        )
    opened = dataclasses.replace(initial, model=model, frozen_dtype=frozen_dtype)
    params, identity = opened.load_with_identity(shardings, trainable)
    trained = params_lib.select(params, initial.trained_arrays.__contains__)
    return params, identity, params_lib.fingerprint(trained)


def describe(initial: InitialRun, fingerprint: str) -> JsonObject:
    """Returns `Record.initial`, given `params.fingerprint` of what the run trained."""
    return {
        "path": os.fspath(file_io.resolve(initial.path)),
        "method": initial.record.method,
        "fingerprint": fingerprint,
        "settings": fingerprint_settings(initial.path, initial.record),
    }


def fingerprint_settings(path: str, record: Record) -> str | None:
    """Returns a hash of all settings of a run but the seed; None if it has no config.gin.

    An initial run is represented by its settings, not by its path, which differs from seed to seed.
    """
    settings = run_settings.read_settings(path)
    initial_settings = (record.initial or {}).get("settings")
    if settings and initial_settings is not None:
        settings["INITIAL_CHECKPOINT_PATH"] = initial_settings
    return run_settings.fingerprint(settings) if settings else None


def summarize(initial: Mapping[str, Any]) -> str:
    """Returns `Record.initial` as text."""
    return f"{initial['path']}, a run of {initial['method']}, fingerprint {initial['fingerprint']}"


def add_training(fields: Mapping[str, Any], initial: InitialRun | None) -> dict[str, Any]:
    """Returns `TaskRoles.training_record` with the datasets and tasks of an initial run too.

    They are unknown if those of the initial run are; without one the fields stay as they are.
    """
    joined = dict(fields)
    if initial is not None:
        for name in ("trained_datasets", "trained_tasks"):
            before = getattr(initial.record, name)
            joined[name] = None if before is None else sorted({*before, *fields[name]})
    return joined
