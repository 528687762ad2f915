"""Reads base models and checkpoints of all formats with T5X's shardings."""

import dataclasses

import jax
from flax.core import FrozenDict, freeze

from pemoe_jax.checkpoints import models, same_run
from pemoe_jax.core import adapters, network, sparse
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
    module: network.Transformer, path: str, base_path: str | None, param_shardings: Shardings
) -> tuple[FrozenDict, int]:
    """Returns all parameters of a model, the frozen ones in the activations' dtype, and its step.

    Args:
      module: the network that the model must have.
      path: a run of either trainer, an adapter, or a base model (at step 0).
      base_path: base model to read in place of the one that a run or an adapter names.
      param_shardings: path -> sharding.

    Raises:
      InputError: the path does not exist, belongs to another network, or its base model differs.
    """
    opened = models.open_model(path, base_path)
    _check_same_network(path, opened.model, module)
    # The gin files' network may have another dtype than the checkpoint's.
    opened = dataclasses.replace(opened, model=module)
    return freeze(opened.load(param_shardings)), opened.step


def _check_same_network(
    path: str, actual: network.Transformer, expected: network.Transformer
) -> None:
    """Raises InputError, with every difference, if a checkpoint's network is not the expected one.

    Dropout and dtype, which change no parameter, may differ, and so may the size of sentence
    embeddings, which changes only routers that T5X cannot run.
    """
    expected_config = expected.config.as_dict()
    differences = [
        f"T5Config.{name} {value} -> {expected_config[name]}"
        for name, value in actual.config.as_dict().items()
        if name not in ("dropout_rate", "dtype", "sentence_dim") and value != expected_config[name]
    ]
    described = (adapters.describe(module.adapters) for module in (actual, expected))
    differences += same_run.adapter_differences(*described)
    settings = (sparse.describe(module.sparse) for module in (actual, expected))
    differences += same_run.sparse_differences(*settings)
    if differences:
        raise InputError(
            f"{path} is of another network than the gin files: {'; '.join(differences)}"
        )
