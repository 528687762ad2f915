"""Checkpoints of a run: the trained parameters, the optimizer state, and a record of the model.

MODEL_DIR/checkpoint_<step>/state    Orbax: step, params (the trainable ones), opt_state
MODEL_DIR/checkpoint_<step>/record   JSON: `Record`
MODEL_DIR/checkpoint_<step>/feed     JSON: the position in the training data
MODEL_DIR/checkpoint_<step>/checksums.json    CRC-32C of each file; missing in earlier versions

On a file system, Orbax writes a checkpoint under a temporary name and renames it at the end. A
bucket cannot rename, so there Orbax writes a checkpoint under its final name, and at the end an
object that marks it as finished.
"""

import contextlib
import dataclasses
import functools
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pemoe_jax.checkpoints import t5x, tensorstore_file
from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.checkpoints.records import Record, parse_record
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.core.params import PyTree
from pemoe_jax.core.steps import TrainState
from pemoe_jax.runtime import checksums, distributed, file_io
from pemoe_jax.runtime.file_io import AnyPath

# Files of Orbax. The first marks a finished checkpoint in a bucket, the second is in every
# checkpoint.
_FINISHED_FILE, _METADATA_FILE = "commit_success.txt", "_CHECKPOINT_METADATA"


class _BucketSteps(ocp.path.step.NameFormat):
    """Names and finds the checkpoints of a run in a bucket.

    It replaces Orbax's own class for buckets, which needs Google's client library.
    """

    def build_name(self, step: int) -> str:
        return f"checkpoint_{step}"

    def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
        for step in finished_steps(epath.Path(base_path)):
            yield self.find_step(base_path, step)

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
        path = epath.Path(base_path) / self.build_name(step)
        if not _is_finished(path):
            raise ValueError(f"{path} is not finished")
        return ocp.path.step.Metadata(step=step, path=path)


class DamagedCheckpoint(InputError):
    """A checkpoint cannot be read, or a checksum is wrong."""


class RunCheckpoints:
    """Writes and restores the checkpoints of a MODEL_DIR.

    Saves are asynchronous, and a checkpoint appears whole or not at all. After a checkpoint is
    written, it is opened; only if that succeeds are older ones deleted.

    Args:
      model_dir: the MODEL_DIR, local or `gs://`.
      keep: number of newest checkpoints to keep; None: all.
      find_best: function that maps the steps of checkpoints to the step of the best one, which is
        kept too, or to None if the best one is unknown.
    """

    def __init__(
        self,
        model_dir: str,
        keep: int | None = 1,
        find_best: Callable[[Collection[int]], int | None] = lambda steps: None,
    ) -> None:
        self._folder, self._keep = file_io.resolve_output(model_dir, "MODEL_DIR"), keep
        self._find_best = find_best
        # (step, paths of the parameters) of the save that is not checked yet.
        self._pending: tuple[int, set[str]] | None = None
        self._has_failed = False

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        is_remote = file_io.is_remote(self._folder)
        options = ocp.CheckpointManagerOptions(
            step_prefix="checkpoint",
            create=not is_remote,  # a bucket has no folders
            enable_async_checkpointing=True,
            step_name_format=_BucketSteps() if is_remote else None,
            # Safe with `_BucketSteps`, which finds only finished checkpoints.
            atomicity_options=ocp.options.AtomicityOptions(allow_legacy_atomic_rename=is_remote),
        )
        return ocp.CheckpointManager(
            self._folder, options=options, item_names=("state", "record", "feed")
        )

    def save(
        self, state: TrainState, record: Record, position: Mapping[str, list[int]] | None = None
    ) -> None:
        """Starts to save a state as the checkpoint of its step, unless that exists already.

        Args:
          state: the train state.
          record: the record of the run.
          position: {'examples': number of examples that each data shard has consumed}, which
            `read_data_position` reads; None: unknown.

        Raises:
          InputError: this save, or the one before, has failed.
        """
        step = int(state.step)
        # The last step may be due twice: as a multiple of the period and at the end of training.
        if step in self._manager.all_steps():
            return
        path = self._folder / f"checkpoint_{step}"
        if not isinstance(path, Path) and jax.process_index() == 0 and path.exists():
            _delete_in_bucket(path)  # an unfinished checkpoint of a killed save
        items = {
            "state": ocp.args.StandardSave(_as_tree(state)),
            "record": ocp.args.JsonSave(dataclasses.asdict(record)),
        }
        if position is not None:
            items["feed"] = ocp.args.JsonSave(dict(position))
        self._finish()  # checks the save before this one
        with self._one_line_errors(step):
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._pending = step, set(params_lib.flatten(state.params))

    def check_save(self) -> None:
        """Checks the last save if it has ended; cheap enough to call at each step.

        Raises:
          InputError: the save has failed.
        """
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self._finish()

    def restore_newest(self, state: TrainState) -> tuple[TrainState, int]:
        """Restores the newest undamaged checkpoint: returns (state, step).

        Damaged ones that are newer are renamed to `damaged_checkpoint_<step>`, with a warning. With
        several processes a damaged array is an error, since only some processes may have read it.
        In a bucket any damage is an error, since the connection may have failed instead.

        Args:
          state: a state with the expected shapes, dtypes and shardings.

        Raises:
          InputError: there is no checkpoint, every checkpoint is damaged, or the newest undamaged
            one has the state of another optimizer.
        """
        errors: dict[int, DamagedCheckpoint] = {}
        finished = finished_steps(self._folder)
        if not finished:
            raise InputError(f"{self._folder}: expected a checkpoint_<step>, got none")
        for step in reversed(finished):
            has_opened = False
            try:
                # All processes read the same metadata, so they agree on whether it can be opened.
                _check_opens(self._folder / f"checkpoint_{step}")
                has_opened = True
                restored = self.restore(step, state)
            except DamagedCheckpoint as error:
                is_remote = file_io.is_remote(self._folder)
                if is_remote or (has_opened and jax.process_count() > 1):
                    raise
                errors[step] = error
                continue
            for damaged_step, reason in errors.items():
                path = self._set_aside(damaged_step)
                print(f"warning: {reason}: renamed to {path.name}", flush=True)
            return restored, step
        raise next(iter(errors.values()))

    def _set_aside(self, step: int) -> AnyPath:
        """Renames a damaged checkpoint, and returns its new path."""
        path = self._folder / f"damaged_checkpoint_{step}"
        while path.exists():
            path = path.with_name(f"{path.name}_again")
        if jax.process_index() == 0:
            (self._folder / f"checkpoint_{step}").rename(path)
        self._manager.reload()
        return path

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Restores a saved state with the shapes, dtypes and shardings of `state`.

        Raises:
          DamagedCheckpoint: the checkpoint cannot be read, or a checksum is wrong.
          InputError: the checkpoint has the state of another optimizer than `state`.
        """
        try:  # each process verifies a part of the files
            part = jax.process_index(), jax.process_count()
            checksums.verify_checksums(self._folder / f"checkpoint_{step}", part)
        except InputError as error:
            raise DamagedCheckpoint(str(error)) from error
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            tree = self._manager.restore(step, args=args)["state"]
        except Exception as error:  # Orbax and tensorstore raise many types, also Exception itself
            folder = self._folder / f"checkpoint_{step}" / "state"
            # Only the message distinguishes another optimizer's state from damage.
            if "tree structure" in str(error) or "Requested shape" in str(error):
                raise InputError(
                    f"{folder}: expected the state of the run's optimizer, got other optimizer"
                    " settings: change them back, or choose another MODEL_DIR"
                ) from error
            raise DamagedCheckpoint(
                f"{folder}: cannot be restored: {first_line(error):.200}"
            ) from error
        return dataclasses.replace(state, **tree)

    def close(self) -> None:
        """Waits for the pending save and checks it.

        Raises:
          InputError: the save has failed.
        """
        if self._has_failed:  # the manager would wait for other processes, or raise the error again
            return
        self._finish()
        self._manager.close()

    def delete_older(self, step: int) -> None:
        """Deletes the checkpoints before `step` that are not to be kept.

        The remains of killed and failed saves are deleted too. Call this only after the checkpoint
        of `step` has been opened successfully.
        """
        if jax.process_index():
            return
        if not isinstance(self._folder, Path):
            with file_io.remote_errors(self._folder):
                self._delete_older_in_bucket(self._folder, step)
            return
        for old_step in self._old_steps(step):
            # Renamed first, so that a half-deleted folder does not look like a checkpoint.
            path = self._folder / f"checkpoint_{old_step}"
            path.rename(self._folder / f".deleted_{path.name}")
        for pattern in (".deleted_checkpoint_*", "checkpoint_*.orbax-checkpoint-tmp*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path)

    def _old_steps(self, step: int) -> set[int]:
        """Returns the steps of the finished checkpoints that `delete_older` deletes."""
        steps = [each for each in finished_steps(self._folder) if each <= step]
        old_steps = set() if self._keep is None else {*steps[: -self._keep]}
        if not old_steps:  # skips `find_best`, which may read the run's metrics
            return old_steps
        return old_steps - {self._find_best(steps)}

    def _delete_older_in_bucket(self, folder: epath.Path, step: int) -> None:
        old_steps = self._old_steps(step)
        for each in t5x.checkpoint_steps(folder):
            path = folder / f"checkpoint_{each}"
            if each in old_steps or (each < step and not _is_finished(path)):
                _delete_in_bucket(path)

    def _finish(self) -> None:
        """Waits for the pending save, checks that it opens, and deletes older checkpoints."""
        if self._pending is None:
            return
        (step, expected), self._pending = self._pending, None
        with self._one_line_errors(step):
            self._manager.wait_until_finished()
            checkpoint = self._folder / f"checkpoint_{step}"
            arrays = open_trained(str(checkpoint))[0]
            if missing := expected - arrays.keys():
                raise InputError(f"expected {len(expected)} arrays, {min(missing)} is missing")
            # The service of a bucket stores checksums itself.
            if jax.process_index() == 0 and isinstance(checkpoint, Path):
                checksums.write_checksums(checkpoint)
        self.delete_older(step)

    @contextlib.contextmanager
    def _one_line_errors(self, step: int) -> Iterator[None]:
        """Converts an error of a save to an InputError that names the last good checkpoint."""
        try:
            yield
        except Exception as error:  # Orbax and tensorstore raise many types, also Exception itself
            self._has_failed = True
            # If a device or another process has failed, the save is not at fault, and the caller
            # reports the error.
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise
            if jax.process_count() > 1 and distributed.peer_error_message(error):
                raise
            saved = [str(each) for each in saved_steps(self._folder) if each != step]
            advice = (
                f"resume from checkpoint_{saved[-1]}" if saved else "there is no checkpoint yet"
            )
            path = self._folder / f"checkpoint_{step}"
            # The disk may be full, and the resumed run needs the space.
            if jax.process_count() == 1 and not file_io.is_remote(path):
                shutil.rmtree(f"{path}.orbax-checkpoint-tmp", ignore_errors=True)
            raise InputError(
                f"{path} could not be saved: {_shorten_message(error)}: {advice}"
            ) from error


def _shorten_message(error: Exception) -> str:
    """Returns the last 120 characters of the first line of an error's message.

    The reason is at the end, since tensorstore's messages begin with paths. The annotations that
    tensorstore appends, such as [os_error_code='28'], are left out. For an OSError, only its reason
    is returned.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = re.split(r"\s*\[\w+='", first_line(error))[0]
    return line if len(line) < 120 else f"…{line[-120:]}"


def _as_tree(state: TrainState) -> dict[str, PyTree]:
    # A dict, so that the names in a checkpoint do not depend on the class `TrainState`.
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def saved_steps(folder: AnyPath) -> list[int]:
    """Returns the steps of a run's finished checkpoints; none if the folder does not exist."""
    # Without `record`, a folder is a checkpoint of T5X, or damaged.
    steps = finished_steps(folder)
    return [step for step in steps if (folder / f"checkpoint_{step}" / "record").is_dir()]


def finished_steps(folder: AnyPath) -> list[int]:
    """Returns the steps of finished checkpoints, including those without a record."""
    steps = t5x.checkpoint_steps(file_io.resolve(folder)) if folder.is_dir() else []
    return [step for step in steps if _is_finished(folder / f"checkpoint_{step}")]


def _is_finished(checkpoint: AnyPath) -> bool:
    """Whether a checkpoint is complete."""
    # A file system has final names only for finished checkpoints.
    if not file_io.is_remote(checkpoint) or (checkpoint / _FINISHED_FILE).exists():
        return True
    # A checkpoint that was copied from a file system to the bucket lacks that file, but its
    # metadata has the time at which it was finished.
    metadata = checkpoint / _METADATA_FILE
    return metadata.exists() and bool(file_io.read_json(metadata).get("commit_timestamp_nsecs"))


def _delete_in_bucket(checkpoint: epath.Path) -> None:
    # These files are deleted first, so that a half-deleted folder does not look finished.
    for name in (_FINISHED_FILE, _METADATA_FILE):
        (checkpoint / name).unlink(missing_ok=True)
    file_io.delete_folder(checkpoint)


def _check_opens(checkpoint: AnyPath) -> None:
    """Raises DamagedCheckpoint unless record, data position and array metadata are readable."""
    try:
        open_trained(str(checkpoint))
        read_data_position(str(checkpoint))
    except InputError as error:
        raise DamagedCheckpoint(str(error)) from error


def newest_readable_step(folder: AnyPath) -> int:
    """Returns the step of a run's newest checkpoint that opens; 0 if there is no checkpoint.

    No array is read.

    Raises:
      DamagedCheckpoint: there are checkpoints, but none opens; the error of the newest one.
    """
    first_error: DamagedCheckpoint | None = None
    for step in reversed(finished_steps(folder)):
        try:
            _check_opens(folder / f"checkpoint_{step}")
        except DamagedCheckpoint as error:
            first_error = first_error or error
        else:
            return step
    if first_error is not None:
        raise first_error
    return 0


def resolve(path: str) -> tuple[AnyPath, int]:
    """Returns (MODEL_DIR, step) of a checkpoint, or of a run's newest checkpoint.

    Raises:
      InputError: the path does not exist, or is neither a run nor a checkpoint.
    """
    folder = file_io.to_path(file_io.resolve(path))
    if not folder.is_dir():
        raise InputError(f"checkpoint {path}: no such folder")
    step = t5x.step_of(folder.name)
    if step is not None:
        if not (folder / "record").is_dir():
            raise InputError(f"checkpoint {path}: expected a folder `record` in it, got none")
        return folder.parent, step
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"checkpoint {path}: expected a folder checkpoint_<step>, got none")
    return folder, max(steps)


def is_run(path: str) -> bool:
    """Whether a path is a run with a checkpoint, or a checkpoint of a run."""
    folder = file_io.to_path(file_io.resolve(path))
    return (folder / "record").is_dir() or bool(saved_steps(folder))


def _item_folder(path: str, item: str) -> AnyPath:
    """Returns the folder of an item, such as 'record', of a checkpoint or a run's newest one."""
    folder, step = resolve(path)
    return folder / f"checkpoint_{step}" / item


def read_record(path: str) -> Record:
    """Reads the record of a checkpoint, or of a run's newest checkpoint."""
    file = _item_folder(path, "record") / "metadata"
    return parse_record(file_io.read_json(file), str(file))


def read_data_position(path: str, num_shards: int = 1) -> list[int] | None:
    """Returns the number of examples that each data shard has consumed; None if not saved.

    If the checkpoint was saved with another number of shards, all shards start at the first example
    that was not consumed. No example is skipped then, but later ones that some shards had consumed
    already are repeated.

    Args:
      path: a checkpoint, or a run, whose newest checkpoint is read.
      num_shards: number of data shards of the resumed run.

    Raises:
      InputError: the position is unreadable.
    """
    file = _item_folder(path, "feed") / "metadata"
    if not file.exists():
        return None
    examples = file_io.read_json(file).get("examples")
    if not (isinstance(examples, list) and examples and all(map(file_io.is_count, examples))):
        raise InputError(
            f"{file}: examples: expected a list of integers, one for each data shard, got"
            f" {examples!r:.80}"
        )
    if len(examples) == num_shards:
        return examples
    # Shard i of n holds the examples i, i + n, i + 2n, …, so its first example that was not
    # consumed is consumed · n + i. Of the examples before `first`, new shard i of n holds
    # ceil((first - i) / n).
    first = min(consumed * len(examples) + shard for shard, consumed in enumerate(examples))
    return [max(0, -(-(first - shard) // num_shards)) for shard in range(num_shards)]


def open_trained(path: str) -> tuple[dict[str, LazyArray], Record, int]:
    """Opens a checkpoint, or a run's newest one, as (path -> trained array, record, step).

    No array is read yet. The first read of any array verifies the checksums of all files.

    Raises:
      InputError: the checkpoint does not exist, or is unreadable.
    """
    folder, step = resolve(path)
    # Resolved once: the run may save a newer checkpoint before the record is read.
    checkpoint = folder / f"checkpoint_{step}"
    arrays = tensorstore_file.open_orbax(file_io.resolve(checkpoint / "state"), "params")
    return _verify_on_read(arrays, checkpoint), read_record(str(checkpoint)), step


def _verify_on_read(arrays: Mapping[str, LazyArray], checkpoint: AnyPath) -> dict[str, LazyArray]:
    """Returns the arrays; the first read of any of them verifies the checkpoint's checksums."""
    lock, is_verified = threading.Lock(), False

    def read_slice(array: LazyArray, index: Index) -> np.ndarray:
        nonlocal is_verified
        with lock:  # several threads may read
            if not is_verified:
                checksums.verify_checksums(checkpoint)
            is_verified = True
        return array.read_slice(index)

    return {
        path: dataclasses.replace(array, read_slice=functools.partial(read_slice, array))
        for path, array in arrays.items()
    }
