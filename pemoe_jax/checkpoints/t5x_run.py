"""Runs of T5X's trainer with `t5x_bridge`: T5X's checkpoints of what trained, and our record.

MODEL_DIR/pemoe_record.json        JSON: `runs.Record`
MODEL_DIR/checkpoint_<step>/       T5X's, Orbax or legacy: `target` (what trains), `state`
"""

import dataclasses
import os
import re

from etils import epath

from pemoe_jax.checkpoints import runs, t5x
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.runs import Record
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

RECORD = "pemoe_record.json"


def run_folder(path: str | os.PathLike[str]) -> epath.Path:
    """The run's, of its own path or of one of its checkpoints'."""
    place = file_io.resolve(path)
    return place.parent if re.fullmatch(r"checkpoint_\d+", place.name) else place


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path names such a run's folder, or one checkpoint of it."""
    return (run_folder(path) / RECORD).exists()


def write_record(model_dir: str | os.PathLike[str], record: Record) -> None:
    """Beside the checkpoints."""
    path = file_io.resolve_local(model_dir, "MODEL_DIR") / RECORD
    atomic_write.write_json(path, dataclasses.asdict(record))


def read_record(path: str | os.PathLike[str]) -> Record:
    """Of a run or one checkpoint of it.

    Raises:
      InputError: it is missing or unreadable.
    """
    file = run_folder(path) / RECORD
    return runs.parse_record(file_io.read_json(file), os.fspath(file))


def open_trainable(path: str | os.PathLike[str]) -> tuple[dict[str, LazyArray], Record, int]:
    """What trained (path -> array, not read), the record and the step, the newest of a run's.

    Raises:
      InputError: there is no finished checkpoint, or it is unreadable.
    """
    run, place = run_folder(path), file_io.resolve(path)
    if place == run:
        steps = t5x.checkpoint_steps(run)
        if not steps:
            raise InputError(f"checkpoint {path}: expected a folder checkpoint_<step> in it")
        place = run / f"checkpoint_{steps[-1]}"
    opened = t5x.open_legacy(place) if t5x.is_legacy(place) else t5x.open_orbax(place)
    return opened, read_record(run), int(place.name.rpartition("_")[2])
