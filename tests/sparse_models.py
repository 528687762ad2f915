"""Small models with sparse MLPs: one dense and one sparse layer in each stack."""

import dataclasses
import functools

from methods import CONFIG, METHODS, random_params_of

from pemoe_jax.core import network
from pemoe_jax.core.sparse import Sparse

EXPERTS = 4
# The four methods of gin/methods/flan_*.gin, with more tokens than places in training.
ROUTINGS = {
    "switch": Sparse(EXPERTS, capacity_factor=1.0, min_capacity=1, balance_loss=1e-2),
    "gshard": Sparse(
        EXPERTS,
        top_k=2,
        combine="normalized",
        second_expert="random",
        priority="probability",
        min_capacity=1,
        balance_loss=1e-2,
    ),
    "st": Sparse(EXPERTS, top_k=2, router_z_loss=1e-3, balance_loss=1e-2, extra_mlp=True),
    "ec": Sparse(EXPERTS, routing="experts", top_k=2, capacity_factor=2.0, min_capacity=1),
}


def sparse_model(sparse: Sparse, method: str = "full", **config: object) -> network.Transformer:
    """Returns a model of two layers in each stack, of which the second is sparse."""
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    return network.Transformer(
        dataclasses.replace(CONFIG, **(layers | config)), METHODS[method].adapters(), sparse
    )


@functools.cache
def model(routing: str, method: str = "full") -> network.Transformer:
    return sparse_model(ROUTINGS[routing], method)


@functools.cache
def parameters(routing: str, method: str = "full") -> dict:
    return random_params_of(model(routing, method))
