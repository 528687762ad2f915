"""Models from checkpoints: the base of a run, and a path that a user names opened as a model."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.checkpoints import base as base_lib
from pemoe_jax.checkpoints import runs
from pemoe_jax.core import adapters, network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.network import T5Config, Transformer


def build(record: runs.Record) -> Transformer:
    """The network that a checkpoint's record describes, with its adapters."""
    return Transformer(
        config=T5Config(**record.config), adapters=adapters.from_description(record.adapters)
    )


def load_base(
    model: Transformer, path: str | None, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base of a model, read from `path` or, for None, random.

    Returns:
      (parameters, identity): the identity has path, seed (of a random base) and fingerprint.

    Raises:
      InputError: see `checkpoints.base.load`.
    """
    if path is None:
        base = network.init_params(model, seed, params_lib.is_base)
    else:
        base = base_lib.load(path, network.param_shapes(model, params_lib.is_base))
    identity = {
        "path": None if path is None else str(Path(path).absolute()),
        "seed": seed if path is None else None,
        "fingerprint": params_lib.fingerprint(base),
    }
    return base, identity


@dataclasses.dataclass
class OpenedModel:
    """What is known of a model before its arrays are read.

    Attributes:
      name: 'base' or the run's folder; different for each model of a list.
      path: as the user gave it.
      model: the network with its adapters.
      record: of a run; None for a base.
      step: of the checkpoint.
      base_path: what the adapters' base is read from.
    """

    name: str
    path: str
    model: Transformer
    record: runs.Record | None = None
    step: int = 0
    base_path: str | None = None

    def load(self) -> dict[str, Any]:
        """All parameters, frozen matrices in the activation dtype.

        Raises:
          InputError: the base is missing, or not the one that the adapters were trained on.
        """
        shapes = network.param_shapes(self.model)
        if self.record is None:
            base, _ = load_base(self.model, self.path, 0)
            return params_lib.cast_frozen(base, self.model.config.dtype)
        trained, _, _ = runs.load_trainable(self.path)
        recorded = self.record.base
        if not recorded["needed"]:
            return params_lib.place(trained, shapes, f"checkpoint {self.path}")
        base, identity = load_base(self.model, self.base_path, recorded["seed"] or 0)
        if identity["fingerprint"] != recorded["fingerprint"]:
            raise InputError(
                f"checkpoint {self.path} belongs to the base {recorded['path']} with fingerprint"
                f" {recorded['fingerprint']}; {self.base_path} has {identity['fingerprint']}"
            )
        paths = params_lib.flatten(trained)
        frozen = params_lib.select(base, lambda path: path not in paths)
        frozen = params_lib.cast_frozen(frozen, self.model.config.dtype)
        whole = params_lib.merge(trained, frozen)
        return params_lib.place(whole, shapes, f"checkpoint {self.path} and its base")

    def about(self) -> dict[str, Any]:
        """Name, method, checkpoint, step and parameter counts, for tables."""
        counts = {"trainable": 0, "total": params_lib.count(network.param_shapes(self.model))}
        return {
            "name": self.name,
            "method": "none" if self.record is None else self.record.method,
            "checkpoint": str(Path(self.path).absolute()),
            "step": self.step,
            **(counts if self.record is None else self.record.counts),
        }


def open_models(
    paths: str | Sequence[str], model: Transformer | None = None, base_path: str | None = None
) -> list[OpenedModel]:
    """Opens each path: a base file, a run's folder (its newest checkpoint) or one checkpoint.

    Args:
      paths: one or several.
      model: gives the dimensions of a base that does not state them.
      base_path: read in place of the base that a run names.

    Raises:
      InputError: nothing is there, or it is none of these.
    """
    paths = [paths] if isinstance(paths, str) else [str(path) for path in paths]
    if not paths:
        raise InputError("CHECKPOINT_PATH is empty: expected at least one path")
    opened: list[OpenedModel] = []
    names: collections.Counter[str] = collections.Counter()
    for path in paths:
        if base_lib.is_base(path):
            stated = base_lib.read_config(path)
            config = T5Config(**stated) if stated else model.config if model else None
            if config is None:
                raise InputError(f"{path} does not state its dimensions: add --gin_file=models/…")
            found = OpenedModel("base", path, Transformer(config=config))
        else:
            record = runs.read_record(path)
            folder, step = runs.resolve(path)
            base = base_path or record.base["path"]
            found = OpenedModel(folder.name, path, build(record), record, step, base)
        names[found.name] += 1
        if names[found.name] > 1:  # names become folders and rows, so they must differ
            found.name += f"_{names[found.name]}"
        opened.append(found)
    return opened
