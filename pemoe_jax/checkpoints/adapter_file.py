"""Reads and writes exported adapters: folders with adapter.safetensors and adapter_config.json.

The arrays are float32, under this package's paths. adapter_config.json has the fields of the run's
`Record`, the training step, and the format with its version.
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
    """Returns the folder of an adapter, given the path of the folder or of its weights."""
    resolved = file_io.resolve(path)
    return resolved.parent if resolved.name == WEIGHTS else resolved


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an exported adapter, or the file of its weights."""
    folder = adapter_folder(path)
    if (folder / WEIGHTS).exists():
        return True
    # An adapter whose weights are missing is recognized too, so that the error names the missing
    # file. The format distinguishes it from a PEFT adapter, whose configuration has the same name.
    config = folder / CONFIG
    return config.exists() and file_io.read_json(config).get("format") == FORMAT


def save_adapter(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    record: Record,
    step: int,
    overwrite: bool = False,
) -> None:
    """Writes an adapter.

    Args:
      path: the folder.
      arrays: path -> array that the run trained.
      record: the run's record.
      step: the training step of the arrays.
      overwrite: whether to replace an existing folder.

    Raises:
      InputError: the folder exists, and `overwrite` is False.
    """
    config = {"format": FORMAT, "format_version": VERSION, "step": step, **vars(record)}
    with atomic_write.temporary_path(path, overwrite) as folder:
        folder.mkdir()
        safetensors_file.save_file(folder / WEIGHTS, arrays, {"format": FORMAT})
        atomic_write.write_json(folder / CONFIG, config)


def _check_kind(path: str | os.PathLike[str], folder: epath.Path) -> None:
    """Raises InputError for a PEFT adapter or a run, which have to be converted first."""
    expected = f"{path} must be an adapter of pemoe convert adapter or save_pretrained, got"
    file = folder / CONFIG
    if file.exists():
        if "peft_type" in file_io.read_json(file):
            raise InputError(
                f"{expected} a PEFT adapter: use peft.PeftModel, or pemoe convert adapter {path}"
                " FOLDER --base=BASE"
            )
    elif (folder / "record").exists() or any(folder.glob("checkpoint_*/record")):
        raise InputError(f"{expected} a run: use pemoe convert adapter {path} FOLDER")


def open_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, LazyArray], Record, int]:
    """Opens an adapter as (path -> array, record, step), without reading the arrays.

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
