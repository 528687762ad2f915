"""Bases and checkpoints in any format we know, read into the places that T5X has for parameters."""

import dataclasses
from typing import Any

import jax
from flax.core import freeze

from pemoe_jax.checkpoints import models
from pemoe_jax.core import adapters, network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

Shardings = dict[str, jax.sharding.Sharding]


def shardings(mesh: jax.sharding.Mesh, axes: Any) -> Shardings:
    """Path -> sharding, of the tree of `PartitionSpec` that a partitioner makes."""
    return {
        path: jax.sharding.NamedSharding(mesh, spec)
        for path, spec in params_lib.flatten(axes).items()
    }


def init_params(
    module: network.Transformer, seed: int, paths: set[str], where: Shardings
) -> dict[str, jax.Array]:
    """Path -> random parameter, float32, as our own runner draws it."""
    found = network.init_params(module, seed, paths.__contains__)
    return params_lib.flatten(models.device_put(found, where))


def read_model(
    module: network.Transformer, path: str, base_path: str | None, where: Shardings
) -> tuple[Any, int]:
    """All parameters that a path names, frozen ones in the network's type, and their step.

    Args:
      module: the network that they must be of.
      path: of a run of ours or of T5X's with this package, an adapter, or a base.
      base_path: read in place of the base that a run or an adapter names.
      where: path -> sharding.

    Returns:
      (frozen dict of parameters, step; 0 of a base).

    Raises:
      InputError: nothing is there, or of another network, or its base is another.
    """
    opened = models.open_model(path, base_path)
    check_same_network(path, opened.model, module)
    opened = dataclasses.replace(opened, model=module)
    return freeze(opened.load(where)), opened.step


def check_same_network(path: str, found: network.Transformer, wanted: network.Transformer) -> None:
    """Raises InputError where a checkpoint's dimensions or adapters are not the configured ones."""
    ignored = ("dropout_rate", "dtype", "sentence_dim")
    config = found.config.as_dict()
    pairs = {
        f"T5Config.{name}": (value, config[name])
        for name, value in wanted.config.as_dict().items()
        if name not in ignored
    }
    pairs["adapters"] = adapters.describe(wanted.adapters), adapters.describe(found.adapters)
    for name, (expected, value) in pairs.items():
        if expected != value:
            raise InputError(
                f"{path} is of another network: {name}: expected {expected} by the gin files,"
                f" found {value}"
            )
