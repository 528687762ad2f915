"""An adapter to hand on: a folder of adapter.safetensors and adapter_config.json, some MB.

The arrays are float32 under our paths; the configuration is the `Record` of the run they come from.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from pemoe_jax.checkpoints import runs, safetensors_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.runs import Record
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

WEIGHTS = "adapter.safetensors"
CONFIG = "adapter_config.json"
FORMAT = "pemoe_jax adapter"
VERSION = 1


def _folder(path: str | os.PathLike[str]) -> epath.Path:
    place = file_io.resolve(path)
    return place.parent if place.name == WEIGHTS else place


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path names such a folder, or the file in it."""
    folder = _folder(path)
    if (folder / WEIGHTS).exists():
        return True
    config = folder / CONFIG  # PEFT calls its own by the same name
    return config.exists() and file_io.read_json(config).get("format") == FORMAT


def save_adapter(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    record: Record,
    step: int,
    overwrite: bool = False,
) -> None:
    """Writes the folder.

    Args:
      path: of the folder.
      arrays: path -> array.
      record: what they belong to.
      step: that they were trained to.
      overwrite: replaces what is there.

    Raises:
      InputError: something is there, without `overwrite`.
    """
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "step": step,
        **dataclasses.asdict(record),
    }
    with atomic_write.temporary_path(path, overwrite) as beside:
        beside.mkdir()
        safetensors_file.save_file(beside / WEIGHTS, arrays, {"format": FORMAT})
        atomic_write.write_json(beside / CONFIG, config)


def open_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, LazyArray], Record, int]:
    """Path -> array, the record and the step; no array is read.

    Raises:
      InputError: a file is missing or unreadable.
    """
    folder = _folder(path)
    config = file_io.read_json(folder / CONFIG)
    if config.get("format") != FORMAT or config.get("format_version") != VERSION:
        raise InputError(
            f"{folder / CONFIG}: expected format {FORMAT!r}, version {VERSION},"
            f" found {config.get('format')!r}, {config.get('format_version')!r}"
        )
    step = config.get("step")
    if not isinstance(step, int):
        raise InputError(f"{folder / CONFIG}: step: expected an integer, found {step!r}")
    record = runs.parse_record(config, os.fspath(folder / CONFIG))
    arrays, _ = safetensors_file.open_file(folder / WEIGHTS)
    return arrays, record, step
