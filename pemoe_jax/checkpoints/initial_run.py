"""Opens, checks and loads an initial run: an earlier run that a new run starts from.

Its path is INITIAL_CHECKPOINT_PATH. `new_run` sets up the new run.

An initial run that trained a whole model without adapters is opened as a base, see `base_model`.
From any other initial run, the new run takes the trained parameters and their base. The new run
trains at least these parameters, so its checkpoints need that base, but not the initial run.
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
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.core.network import Transformer
from pemoe_jax.core.params import PyTree
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import JsonObject

# Fields of `T5Config` that determine the shapes of parameters.
DIMENSIONS = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "mlp_activations",
    "logits_via_embedding",
    "sentence_dim",
)


@dataclasses.dataclass(frozen=True)
class InitialRun:
    """A run, or an exported adapter, that a new run starts from.

    Attributes:
      path: the path that the user passed.
      record: its record.
      opened: the run's model; None: the run trained a whole model, which is read as a base.
    """

    path: str
    record: Record
    opened: OpenedModel | None


def open_initial_run(path: str | None) -> InitialRun | None:
    """Opens INITIAL_CHECKPOINT_PATH if it is a run or an exported adapter, else returns None.

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
    """Returns the record of a run or an exported adapter; None for any other path."""
    if adapter_file.is_adapter(path):
        return adapter_file.open_adapter(path)[1]
    if runs.is_run(path):
        return runs.read_record(path)
    return t5x_run.read_record(path) if t5x_run.is_run(path) else None


def take_dimensions(model: Transformer, initial: OpenedModel) -> Transformer:
    """Returns the model with the dimensions of an initial run."""
    config = initial.model.config
    sizes = {name: getattr(config, name) for name in DIMENSIONS}
    return model.clone(config=dataclasses.replace(model.config, **sizes))


def check_shape(initial: OpenedModel, current: Record, model: Transformer) -> str:
    """Checks that a new run has parameters of the same shapes as its initial run.

    Args:
      initial: the initial run.
      current: the record of the new run.
      model: the new run's network, with the dimensions of the initial run.

    Returns:
      The settings that differ, such as 'top_k None -> 2 at key'; '' if all are equal.

    Raises:
      InputError: shapes differ; the message has both methods and every setting that differs.
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
            "INITIAL_CHECKPOINT_PATH must be a base, or a run with parameters of the same shapes,"
            f" got {initial.path}: {saved.method} -> {current.method}, {'; '.join(differences)}"
        )
    return "; ".join(differences)


def check_trainable(initial: OpenedModel, trainable: Collection[str], method: str) -> None:
    """Raises InputError if a new run freezes parameters that its initial run trained.

    The new run could not restore them: its checkpoints hold only the parameters that it trains, and
    the base has other values.
    """
    if frozen := initial.trained_arrays.keys() - set(trainable):
        raise InputError(
            "TRAINABLE and FREEZE must not freeze parameters that the initial run"
            f" {initial.path} trained, got {plural(len(frozen), 'frozen array')} of {method}, such"
            f" as {min(frozen)} (a whole model, such as pemoe convert base writes, may be frozen)"
        )


def load_params(
    initial: OpenedModel,
    model: Transformer,
    seed: int,
    trainable: Collection[str],
    shardings: models.Shardings,
    frozen_dtype: str,
) -> tuple[dict[str, PyTree], JsonObject, str]:
    """Loads the parameters of an initial run and of its base.

    Args:
      initial: the initial run.
      model: the new run's network, with parameters of the same shapes.
      seed: the new run's seed.
      trainable: paths of the parameters that the new run trains, which are loaded in float32.
      shardings, frozen_dtype: see `models.load_base`.

    Returns:
      (parameters, identity of the base, fingerprint of the parameters that the initial run trained)

    Raises:
      InputError: see `OpenedModel.load`; or the new run has frozen adapters, and another seed than
        the initial run.
    """
    assert initial.record is not None
    # Checkpoints omit frozen adapters: they are drawn again, so both runs need the same seed.
    paths = params_lib.flatten(network.param_shapes(model)).keys()
    has_frozen_adapters = any(map(params_lib.is_adapter, paths - set(trainable)))
    if has_frozen_adapters and seed != initial.record.seed:
        raise InputError(
            f"SEED must be {initial.record.seed}, as in the run {initial.path}, whose frozen"
            f" adapters are drawn from it, got {seed}"
        )
    opened = dataclasses.replace(initial, model=model, frozen_dtype=frozen_dtype)
    params, identity = opened.load_with_identity(shardings, trainable)
    trained = params_lib.select(params, initial.trained_arrays.__contains__)
    return params, identity, params_lib.fingerprint(trained)


def describe(initial: InitialRun, fingerprint: str) -> JsonObject:
    """Returns `Record.initial`: path, method, a hash of the settings, and the fingerprint.

    Args:
      initial: the initial run.
      fingerprint: `params.fingerprint` of the parameters that the initial run trained.
    """
    return {
        "path": os.fspath(file_io.resolve(initial.path)),
        "method": initial.record.method,
        "fingerprint": fingerprint,
        "settings": fingerprint_settings(initial.path, initial.record),
    }


def fingerprint_settings(path: str, record: Record) -> str | None:
    """Returns a hash of all settings of a run except its seed; None if it has no config.gin.

    Runs that differ only in their seeds have the same hash. Therefore, if the run has an initial
    run, the hash of the initial run's settings replaces its path, which usually contains a seed.
    """
    settings = run_settings.read_settings(path)
    initial_settings = (record.initial or {}).get("settings")
    if settings and initial_settings is not None:
        settings["INITIAL_CHECKPOINT_PATH"] = initial_settings
    return run_settings.fingerprint(settings) if settings else None


def summarize(initial: Mapping[str, Any]) -> str:
    """Returns `Record.initial` as text, for the summary of a run."""
    return f"{initial['path']}, a run of {initial['method']}, fingerprint {initial['fingerprint']}"


def add_training(fields: Mapping[str, Any], initial: InitialRun | None) -> dict[str, Any]:
    """Adds the training datasets and tasks of an initial run to `TaskRoles.training_record`.

    Args:
      fields: the new run's `TaskRoles.training_record`.
      initial: its initial run; None if it has none, and then the fields are returned unchanged.

    Returns:
      The fields, with the datasets and tasks of both runs. These are None if those of the initial
      run are unknown.
    """
    merged = dict(fields)
    if initial is not None:
        for name in ("trained_datasets", "trained_tasks"):
            initial_names = getattr(initial.record, name)
            merged[name] = None
            if initial_names is not None:
                merged[name] = sorted({*initial_names, *fields[name]})
    return merged
