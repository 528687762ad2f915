"""Exported adapters: a folder of some MB with `adapter.safetensors` and `adapter_config.json`.

The arrays are float32 under this package's paths. The configuration is the `Record` of the run
that trained them.
"""

import os
from collections.abc import Mapping

import numpy as np
from etils import epath

from pemoe_jax.checkpoints import safetensors_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.records import Record, parse_record
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

WEIGHTS = "adapter.safetensors"
CONFIG = "adapter_config.json"
FORMAT = "pemoe_jax adapter"
VERSION = 1


def adapter_folder(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the folder of a path to an adapter or to the weights in it."""
    resolved = file_io.resolve(path)
    return resolved.parent if resolved.name == WEIGHTS else resolved


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an exported adapter, or the weights in one."""
    folder = adapter_folder(path)
    if (folder / WEIGHTS).exists():
        return True
    # PEFT's configuration has the same name. An adapter without weights is still recognized,
    # so that the error names the missing file.
    config = folder / CONFIG
    return config.exists() and file_io.read_json(config).get("format") == FORMAT


def save_adapter(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    record: Record,
    step: int,
    overwrite: bool = False,
) -> None:
    """Writes arrays (path -> array) that a run trained until `step`, and the run's record.

    Raises:
      InputError: the folder exists, without `overwrite`.
    """
    config = {"format": FORMAT, "format_version": VERSION, "step": step, **vars(record)}
    with atomic_write.temporary_path(path, overwrite) as folder:
        folder.mkdir()
        safetensors_file.save_file(folder / WEIGHTS, arrays, {"format": FORMAT})
        atomic_write.write_json(folder / CONFIG, config)


def _check_kind(path: str | os.PathLike[str], folder: epath.Path) -> None:
    """Raises InputError for a PEFT adapter or a run, which have to be converted."""
    expected = f"{path} must be an adapter of pemoe convert adapter or save_pretrained, got"
    file = folder / CONFIG
    if file.exists():
        if "peft_type" in file_io.read_json(file):
            raise InputError(
                f"{expected} a PEFT adapter: use peft.PeftModel, or pemoe convert adapter {path}"
                " FOLDER --base=BASE"
            )
    elif (folder / "record").exists() or any(folder.glob("checkpoint_*/record")):
        raise InputError(f"{expected} a run: pemoe convert adapter {path} FOLDER writes one")


def open_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, LazyArray], Record, int]:
    """Opens an adapter as (path -> array, the record, the step); reads no array.

    Raises:
      InputError: a file is missing or unreadable.
    """
    folder = adapter_folder(path)
    file = folder / CONFIG
    _check_kind(path, folder)
    config = file_io.read_json(file)
    if config.get("format") != FORMAT or config.get("format_version") != VERSION:
        raise InputError(
            f"{file}: expected format {FORMAT!r}, version {VERSION},"
            f" got {config.get('format')!r}, {config.get('format_version')!r}"
        )
    step = config.get("step")
    if not isinstance(step, int):
        raise InputError(f"{file}: step: expected an integer, got {step!r}")
    arrays, _ = safetensors_file.open_file(folder / WEIGHTS)
    return arrays, parse_record(config, os.fspath(file)), step
