"""Small train steps that the tests of `pemoe plan` measure and compile."""

import dataclasses
import functools

import jax
from methods import CONFIG, METHODS

from pemoe_jax.analysis.planning import compiled_step
from pemoe_jax.core import network, optim, partitioning

RATE = 1e-3


def step(method="mov", experts=3, config=CONFIG, rows=4, lengths=(8, 6), **settings):
    chosen = METHODS[method]
    model = network.Transformer(config, chosen.adapters(experts))
    optimizer = optim.adamw(lambda count: RATE)
    return compiled_step.TrainStep(model, chosen.trainable, optimizer, rows, lengths, **settings)


def make_mesh(data: int, model: int):
    return partitioning.make_mesh(model, jax.devices()[: data * model])


@functools.cache
def compiled(method: str, data: int, model: int, fsdp: bool = False, dtype: str = "float32"):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    return compiled_step.compile_step(step(method, config=config), make_mesh(data, model), fsdp)
