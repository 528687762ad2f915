"""Checkpoints of a run: what trains, its optimiser's state, and a record of what it belongs to.

MODEL_DIR/checkpoint_<step>/state    orbax: step, params (the trainable ones), opt_state
MODEL_DIR/checkpoint_<step>/record   JSON: `Record`
MODEL_DIR/checkpoint_<step>/feed     JSON: where in the training data the run was
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pemoe_jax import __version__
from pemoe_jax.checkpoints import tensorstore_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

PREFIX = "checkpoint"


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself, enough to build the model again without its gin files.

    Attributes:
      method: name of the method (mov, lora, …).
      trainable: the patterns of what trains.
      config: dimensions (`T5Config.as_dict`).
      adapters: `adapters.describe`.
      base: path (None: random weights), seed and fingerprint of the base, and whether the
        checkpoint needs it (False where everything trained).
      counts: trainable and total parameters.
      versions: of the packages that wrote it.
      seed: that adapters were drawn from, those among them that do not train.
      trained_datasets: what it was trained on, under the names of tables; None: not known.
      sentence_encoder: what made the sentence embeddings that routers read (name, dim, fingerprint
        or probe: `sentence_table.same_encoder`); None: they read none.
    """

    method: str
    trainable: list[str]
    config: dict[str, Any]
    adapters: dict[str, Any]
    base: dict[str, Any]
    counts: dict[str, int]
    versions: dict[str, str]
    seed: int = 0
    trained_datasets: list[str] | None = None
    sentence_encoder: dict[str, Any] | None = None


class RunCheckpoints:
    """The checkpoints in a MODEL_DIR; saves are asynchronous and appear whole or not at all."""

    def __init__(self, model_dir: str, keep: int | None = 1) -> None:
        options = ocp.CheckpointManagerOptions(
            step_prefix=PREFIX,
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(
            Path(model_dir).absolute(), options=options, item_names=("state", "record", "feed")
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: Any, record: Record, feed: Mapping[str, list[int]] | None = None) -> None:
        """Saves the state's step, with `feed` for `read_feed`; one that is there already stays."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(_as_tree(state)),
            "record": ocp.args.JsonSave(dataclasses.asdict(record)),
        }
        if feed is not None:
            items["feed"] = ocp.args.JsonSave(dict(feed))
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, state: Any) -> Any:
        """The saved state with the shapes, types and sharding of `state`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        tree = self._manager.restore(step, args=args)["state"]
        return dataclasses.replace(state, **tree)

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_tree(state: Any) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def saved_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a run's folder; empty where there is no folder."""
    names = {child.name for child in folder.glob(f"{PREFIX}_*") if (child / "record").is_dir()}
    return sorted(
        int(found[1]) for name in names if (found := re.fullmatch(rf"{PREFIX}_(\d+)", name))
    )


def resolve(path: str) -> tuple[Path, int]:
    """A run's folder (its newest checkpoint) or one checkpoint's -> (folder of the run, step).

    Raises:
      InputError: nothing is there, or nothing that is a checkpoint.
    """
    folder = Path(file_io.resolve(path))
    named = re.fullmatch(rf"{PREFIX}_(\d+)", folder.name)
    if not folder.is_dir():
        raise InputError(f"checkpoint {path}: no such folder")
    if named:
        if not (folder / "record").is_dir():
            raise InputError(f"checkpoint {path}: expected a folder `record` in it, found none")
        return folder.parent, int(named.group(1))
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"checkpoint {path}: expected a folder {PREFIX}_<step> in it, found none")
    return folder, max(steps)


def is_run(path: str) -> bool:
    """Whether a path names a run's folder with a checkpoint in it, or one checkpoint of a run."""
    folder = file_io.resolve(path)
    if "://" in os.fspath(folder):  # runs are written to local folders
        return False
    return (folder / "record").is_dir() or bool(saved_steps(Path(folder)))


def package_versions() -> dict[str, str]:
    """Of the packages that decide what a checkpoint means."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"pemoe_jax": __version__}
    for package in ("jax", "flax", "optax", "orbax-checkpoint"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_record(path: str) -> Record:
    """The record of a checkpoint; `path` as for `resolve`."""
    folder, step = resolve(path)
    file = file_io.resolve(folder / f"{PREFIX}_{step}" / "record" / "metadata")
    return parse_record(file_io.read_json(file), os.fspath(file))


def read_data_position(path: str, shares: int = 1) -> list[int] | None:
    """The examples that each share of the feed had consumed; None where a checkpoint does not say.

    A run that goes on with another number of shares begins them at the first example that had not
    been consumed: none is left out, those that other shares had gone on to come again.

    Raises:
      InputError: it is unreadable.
    """
    folder, step = resolve(path)
    file = file_io.resolve(folder / f"{PREFIX}_{step}" / "feed" / "metadata")
    if not file.exists():
        return None
    examples = file_io.read_json(file).get("examples")
    if not isinstance(examples, list) or not all(isinstance(n, int) for n in examples):
        raise InputError(f"{file}: examples: expected a list of integers, found {examples!r:.80}")
    if len(examples) == shares:
        return examples
    # share i of n has the examples i, i + n, i + 2n, …
    first = min(consumed * len(examples) + share for share, consumed in enumerate(examples))
    return [max(0, -(-(first - share) // shares)) for share in range(shares)]


_KINDS = {"method": str, "trainable": list, "seed": int, "trained_datasets": list}
_KIND_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def parse_record(found: Mapping[str, Any], where: str) -> Record:
    """The record in a JSON object.

    Raises:
      InputError: a field is missing or of another kind; names it and `where` it was read.
    """
    known = [
        field.name
        for field in dataclasses.fields(Record)
        if field.name in found or field.default is dataclasses.MISSING
    ]
    for name in known:
        kind = _KINDS.get(name, dict)
        absent = name in ("trained_datasets", "sentence_encoder") and found[name] is None
        if not absent and not isinstance(found.get(name), kind):
            raise InputError(
                f"{where}: {name}: expected {_KIND_NAMES[kind]}, found {found.get(name)!r:.80}"
            )
    missing = {"path", "seed", "fingerprint", "needed"} - found["base"].keys()
    if missing:
        raise InputError(f"{where}: base: expected {', '.join(sorted(missing))} too, found none")
    return Record(**{name: found[name] for name in known})


def open_trainable(path: str) -> tuple[dict[str, LazyArray], Record, int]:
    """The trained parameters of a checkpoint (path -> array, not read), its record and its step.

    Raises:
      InputError: no such checkpoint, or it is unreadable.
    """
    folder, step = resolve(path)
    state = file_io.resolve(folder / f"{PREFIX}_{step}" / "state")
    return tensorstore_file.open_orbax(state, "params"), read_record(path), step
