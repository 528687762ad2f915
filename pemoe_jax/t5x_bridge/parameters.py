"""Reading base models and checkpoints of any format with the shardings of T5X."""

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


def init_params(
    module: network.Transformer, seed: int, paths: set[str], where: Shardings
) -> dict[str, jax.Array]:
    """Returns path -> random float32 parameter, as `pemoe train` draws them."""
    drawn = network.init_params(module, seed, paths.__contains__)
    return params_lib.flatten(models.device_put(drawn, where))


def read_model(
    module: network.Transformer, path: str, base_path: str | None, where: Shardings
) -> tuple[FrozenDict, int]:
    """Reads all parameters of a model, frozen ones in the activation dtype of the network.

    Args:
      module: the network that the model must have.
      path: a run of either trainer, an adapter, or a base model.
      base_path: base model to read in place of the one that a run or an adapter names.
      where: path -> sharding.

    Returns:
      (parameters, step); the step of a base model is 0.

    Raises:
      InputError: the path does not exist, belongs to another network, or its base model differs.
    """
    opened = models.open_model(path, base_path)
    check_same_network(path, opened.model, module)
    opened = dataclasses.replace(opened, model=module)
    return freeze(opened.load(where)), opened.step


def check_same_network(
    path: str, actual: network.Transformer, expected: network.Transformer
) -> None:
    """Raises InputError if a checkpoint's dimensions or adapters differ from the configured ones.

    Args:
      path: path of the checkpoint, for the error.
      actual: the checkpoint's network.
      expected: the network of the gin files.
    """
    ignored = ("dropout_rate", "dtype", "sentence_dim")
    config = actual.config.as_dict()
    pairs = {
        f"T5Config.{name}": (value, config[name])
        for name, value in expected.config.as_dict().items()
        if name not in ignored
    }
    pairs["adapters"] = adapters.describe(expected.adapters), adapters.describe(actual.adapters)
    for name, (expected_value, value) in pairs.items():
        if expected_value != value:
            raise InputError(
                f"{path} is of another network: {name}: expected {expected_value} by the gin files,"
                f" got {value}"
            )
