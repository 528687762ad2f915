"""A path that a user names, opened as a model: a base alone, or a run's checkpoint on its base."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.checkpoints import base as base_lib
from pemoe_jax.checkpoints import runs
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.network import Transformer


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
            base, _ = base_lib.load_or_init(self.model, self.path, 0)
            return params_lib.cast_frozen(base, self.model.config.dtype)
        trained, _, _ = runs.load_trainable(self.path)
        recorded = self.record.base
        if not recorded["needed"]:
            return params_lib.place(trained, shapes, f"checkpoint {self.path}")
        base, identity = base_lib.load_or_init(self.model, self.base_path, recorded["seed"] or 0)
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
            config = base_lib.read_config(path) or (model and model.config)
            if config is None:
                raise InputError(f"{path} does not state its dimensions: add --gin_file=models/…")
            found = OpenedModel("base", path, Transformer(config=config))
        else:
            record = runs.read_record(path)
            folder, step = runs.resolve(path)
            base = base_path or record.base["path"]
            found = OpenedModel(folder.name, path, record.model(), record, step, base)
        names[found.name] += 1
        if names[found.name] > 1:  # names become folders and rows, so they must differ
            found.name += f"_{names[found.name]}"
        opened.append(found)
    return opened
