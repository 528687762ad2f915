"""Checkpoints of a run: the trained parameters, the optimizer state, and a record of the model.

MODEL_DIR/checkpoint_<step>/state    Orbax: step, params (the trainable ones), opt_state
MODEL_DIR/checkpoint_<step>/record   JSON: `Record`
MODEL_DIR/checkpoint_<step>/feed     JSON: the position in the training data
"""

import dataclasses
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from pemoe_jax import __version__
from pemoe_jax.checkpoints import t5x, tensorstore_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.core.params import PyTree
from pemoe_jax.core.steps import TrainState
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import JsonObject


@dataclasses.dataclass(frozen=True)
class Record:
    """Describes a checkpoint, enough to build its model without the run's gin files.

    Attributes:
      method: name of the method (mov, lora, …).
      trainable: patterns of the trainable parameters.
      config: `T5Config.as_dict()`.
      adapters: `adapters.describe()` of the adapters.
      sparse: `sparse.describe()` of the sparse layers; None: a dense model.
      base: path (None: random weights), seed and fingerprint of the base model, and whether the
        checkpoint needs it (False if every parameter was trained); `upcycled`, the seed and the
        noise of `upcycling`, if a sparse model started from a dense one.
      counts: trainable and total number of parameters.
      versions: versions of the packages that wrote the checkpoint.
      seed: seed of the adapters' initial values; those that are not trained are drawn again.
      trained_datasets: names of the datasets of training, as in tables; None: unknown.
      trained_tasks: names of the tasks of training; None: unknown.
      held_out: names of the datasets that are held out from training; None: unknown.
      optimizer: name of the optimizer's function; None: unknown.
      sentence_encoder: encoder of the sentence embeddings that routers read (name, dim,
        fingerprint or probe: `sentence_table.is_same_encoder`); None: routers read none.
      initial: path and method of the run that this one started from, the fingerprint of what it
        trained, and a hash of its settings (`initial_run.fingerprint_settings`); None: it started
        from a base model. `trained_datasets` and `trained_tasks` then have those of both.
    """

    method: str
    trainable: list[str]
    config: JsonObject
    adapters: JsonObject
    base: JsonObject
    counts: dict[str, int]
    versions: dict[str, str]
    seed: int = 0
    sparse: JsonObject | None = None
    trained_datasets: list[str] | None = None
    trained_tasks: list[str] | None = None
    held_out: list[str] | None = None
    optimizer: str | None = None
    sentence_encoder: JsonObject | None = None
    initial: JsonObject | None = None


class RunCheckpoints:
    """Writes and restores the checkpoints of a MODEL_DIR.

    Saves are asynchronous, and appear whole or not at all. Each is opened once after it is written,
    which raises InputError if it is unreadable.

    Args:
      keep: number of newest checkpoints to keep; None: all.
    """

    def __init__(self, model_dir: str, keep: int | None = 1) -> None:
        options = ocp.CheckpointManagerOptions(
            step_prefix="checkpoint", max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            Path(model_dir).absolute(), options=options, item_names=("state", "record", "feed")
        )
        self._to_check: tuple[int, set[str]] | None = None  # a step, and its parameters' paths

    def save(
        self, state: TrainState, record: Record, position: Mapping[str, list[int]] | None = None
    ) -> None:
        """Saves a state under its step, unless that step is saved already.

        `position` is a position in the training data, which `read_data_position` reads.
        """
        step = int(state.step)
        # The last step may be due twice: as a multiple of the period and at the end of training.
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(_as_tree(state)),
            "record": ocp.args.JsonSave(dataclasses.asdict(record)),
        }
        if position is not None:
            items["feed"] = ocp.args.JsonSave(dict(position))
        self._finish()
        self._to_check = step, set(params_lib.flatten(state.params))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Restores a saved state with the shapes, dtypes and shardings of `state`.

        Raises:
          InputError: the checkpoint is damaged, or of an optimizer with another state.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            tree = self._manager.restore(step, args=args)["state"]
        except Exception as error:  # Orbax and tensorstore raise many types, also Exception itself
            folder = self._manager.directory / f"checkpoint_{step}" / "state"
            if "tree structure" in str(error):
                reason = "expected the state of the run's optimizer, got other optimizer settings"
            else:
                reason = f"cannot be restored: {first_line(error):.200}"
            raise InputError(f"{folder}: {reason}") from error
        return dataclasses.replace(state, **tree)

    def close(self) -> None:
        """Waits for pending saves and checks them."""
        self._finish()
        self._manager.close()

    def _finish(self) -> None:
        """Waits for the pending save and checks that it can be read."""
        self._manager.wait_until_finished()
        if self._to_check is None:
            return
        (step, expected), self._to_check = self._to_check, None
        checkpoint = self._manager.directory / f"checkpoint_{step}"
        if missing := expected - open_trained(str(checkpoint))[0].keys():
            raise InputError(
                f"{checkpoint}: expected {len(expected)} arrays, {min(missing)} is missing"
            )


def _as_tree(state: TrainState) -> dict[str, PyTree]:
    # A dict, so that names in the checkpoint do not depend on the class.
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of a run's finished checkpoints; none if the folder does not exist."""
    # A folder without `record` belongs to T5X, or is one that Orbax has not finished.
    folders = (path for path in folder.glob("checkpoint_*") if (path / "record").is_dir())
    return sorted(step for path in folders if (step := t5x.step_of(path.name)) is not None)


def resolve(path: str) -> tuple[Path, int]:
    """Returns (MODEL_DIR, step) of a checkpoint, or of a run's newest checkpoint.

    Raises:
      InputError: the path does not exist, or is neither a run nor a checkpoint.
    """
    folder = Path(file_io.resolve(path))
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
    folder = file_io.resolve(path)
    if "://" in os.fspath(folder):  # runs are written to local folders only
        return False
    return (folder / "record").is_dir() or bool(saved_steps(Path(folder)))


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that determine what a checkpoint means."""
    versions = {"pemoe_jax": __version__}
    for package in ("jax", "flax", "optax", "orbax-checkpoint"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _item_folder(path: str, item: str) -> Path:
    folder, step = resolve(path)
    return folder / f"checkpoint_{step}" / item


def read_record(path: str) -> Record:
    """Reads the record of a checkpoint, or of a run's newest checkpoint."""
    file = _item_folder(path, "record") / "metadata"
    return parse_record(file_io.read_json(file), str(file))


def read_data_position(path: str, num_shards: int = 1) -> list[int] | None:
    """Returns the number of examples that each data shard has consumed; None if not saved.

    With another number of shards than the checkpoint's, every shard starts at the first example
    that was not consumed: no example is skipped, and those that faster shards had consumed are
    repeated.

    Raises:
      InputError: the position is unreadable.
    """
    file = _item_folder(path, "feed") / "metadata"
    if not file.exists():
        return None
    examples = file_io.read_json(file).get("examples")
    if not isinstance(examples, list) or not all(isinstance(n, int) for n in examples):
        raise InputError(f"{file}: examples: expected a list of integers, got {examples!r:.80}")
    if len(examples) == num_shards:
        return examples
    # Shard i of n holds the examples i, i + n, i + 2n, …
    first = min(consumed * len(examples) + shard for shard, consumed in enumerate(examples))
    return [max(0, -(-(first - shard) // num_shards)) for shard in range(num_shards)]


_TYPES = {
    **{"method": str, "trainable": list, "seed": int, "optimizer": str},
    **{"trained_datasets": list, "trained_tasks": list, "held_out": list},
}
_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def parse_record(values: JsonObject, source: str) -> Record:
    """Returns the record in a JSON object of the file `source`; ignores other keys.

    Raises:
      InputError: a field is missing or has another type.
    """
    # Fields with a default are missing in records of earlier versions.
    names = [
        field.name
        for field in dataclasses.fields(Record)
        if field.name in values or field.default is dataclasses.MISSING
    ]
    for name in names:
        value, expected = values.get(name), _TYPES.get(name, dict)
        is_null = value is None and Record.__dataclass_fields__[name].default is None
        if not is_null and not isinstance(value, expected):
            raise InputError(
                f"{source}: {name}: expected {_TYPE_NAMES[expected]}, got {value!r:.80}"
            )
    missing = {"path", "seed", "fingerprint", "needed"} - values["base"].keys()
    if missing:
        raise InputError(f"{source}: base: expected the keys {', '.join(sorted(missing))}")
    return Record(**{name: values[name] for name in names})


def open_trained(path: str) -> tuple[dict[str, LazyArray], Record, int]:
    """Opens a checkpoint, a run's newest, as (path -> array, the record, the step).

    Raises:
      InputError: the checkpoint does not exist, or is unreadable.
    """
    folder, step = resolve(path)
    checkpoint = folder / f"checkpoint_{step}"  # resolved once: a run may save another meanwhile
    arrays = tensorstore_file.open_orbax(file_io.resolve(checkpoint / "state"), "params")
    return arrays, read_record(str(checkpoint)), step
