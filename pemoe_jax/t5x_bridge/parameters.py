"""Reads base models and checkpoints of all formats with T5X's shardings."""

import dataclasses

import jax
from flax.core import FrozenDict, freeze

from pemoe_jax.checkpoints import models
from pemoe_jax.core import adapters, network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import Params

Shardings = dict[str, jax.sharding.Sharding]  # by path


def shardings(mesh: jax.sharding.Mesh, specs: Params) -> Shardings:
    """Returns path -> sharding, from a partitioner's tree of `PartitionSpec`."""
    return {
        path: jax.sharding.NamedSharding(mesh, spec)
        for path, spec in params_lib.flatten(specs).items()
    }


def read_model(
    module: network.Transformer, path: str, base_path: str | None, where: Shardings
) -> tuple[FrozenDict, int]:
    """Returns all parameters of a model, frozen ones in the activation dtype, and its step.

    Args:
      module: the network that the model must have.
      path: a run of either trainer, an adapter, or a base model (at step 0).
      base_path: base model to read in place of the one that a run or an adapter names.
      where: path -> sharding.

    Raises:
      InputError: the path does not exist, belongs to another network, or its base model differs.
    """
    opened = models.open_model(path, base_path)
    _check_same_network(path, opened.model, module)
    opened = dataclasses.replace(opened, model=module)
    return freeze(opened.load(where)), opened.step


def _check_same_network(
    path: str, actual: network.Transformer, expected: network.Transformer
) -> None:
    def settings(module: network.Transformer) -> dict[str, object]:
        config = {f"T5Config.{name}": value for name, value in module.config.as_dict().items()}
        return config | {"adapters": adapters.describe(module.adapters)}

    actual_settings = settings(actual)
    for name, value in settings(expected).items():
        ignored = name in ("T5Config.dropout_rate", "T5Config.dtype", "T5Config.sentence_dim")
        if not ignored and actual_settings[name] != value:
            raise InputError(
                f"{path} is of another network: {name}: expected {value} by the gin files, got"
                f" {actual_settings[name]}"
            )
