"""Reads and writes runs of T5X's trainer with `t5x_bridge`.

MODEL_DIR/pemoe_record.json        JSON: `Record`
MODEL_DIR/checkpoint_<step>/       T5X's checkpoint, Orbax or legacy: `target` (the trained
                                   parameters) and `state`
"""

import dataclasses
import os

from etils import epath

from pemoe_jax.checkpoints import t5x
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.records import Record, parse_record
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

# Next to the checkpoints, because T5X writes and deletes their folders itself.
RECORD = "pemoe_record.json"


def run_folder(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the MODEL_DIR, given the path of a run or of one of its checkpoints."""
    folder = file_io.resolve(path)
    return folder if t5x.step_of(folder.name) is None else folder.parent


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run of T5X's trainer, or a checkpoint of such a run."""
    return (run_folder(path) / RECORD).exists()


def write_record(model_dir: str | os.PathLike[str], record: Record) -> None:
    """Writes a run's record."""
    path = file_io.resolve_output(model_dir, "MODEL_DIR") / RECORD
    atomic_write.write_json(path, dataclasses.asdict(record))


def read_record(path: str | os.PathLike[str]) -> Record:
    """Reads the record of a run, or of a run's checkpoint."""
    file = run_folder(path) / RECORD
    return parse_record(file_io.read_json(file), os.fspath(file))


def open_trained(path: str | os.PathLike[str]) -> tuple[dict[str, LazyArray], Record, int]:
    """Opens a checkpoint, or a run's newest one, as (path -> trained array, record, step).

    Raises:
      InputError: the run has no checkpoint, or the checkpoint is unreadable.
    """
    run, checkpoint = run_folder(path), file_io.resolve(path)
    if checkpoint == run:
        steps = t5x.checkpoint_steps(run)
        if not steps:
            raise InputError(f"checkpoint {path}: expected a folder checkpoint_<step>, got none")
        checkpoint = run / f"checkpoint_{steps[-1]}"
    step = t5x.step_of(checkpoint.name)
    assert step is not None
    return t5x.open_checkpoint(checkpoint), read_record(run), step
