"""Sparse layers on a mesh: results of one device on several, and which arrays a program holds."""

import dataclasses
import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import CONFIG, example_batch, largest_difference, random_params_of

from pemoe_jax.core import experts, network, optim, params, partitioning, steps
from pemoe_jax.core.routing import TokenInfo
from pemoe_jax.core.sparse import Sparse

# (data, expert, model), with FSDP where all three are followed by True.
TWO = [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
FOUR = [(4, 1, 1), (1, 4, 1), (2, 2, 1, True), (1, 2, 2), (2, 1, 2)]
ROUTINGS = {
    "no limit": {"capacity_factor": None, "top_k": 2},
    "capacity": {"capacity_factor": 1.0, "min_capacity": 1, "top_k": 2},
    "expert choice": {"routing": "experts", "capacity_factor": 1.0, "min_capacity": 1},
}


def make_mesh(sizes) -> tuple[jax.sharding.Mesh, partitioning.Rules]:
    data, expert, model, *fsdp = sizes
    mesh = partitioning.make_mesh(model, jax.devices()[: data * expert * model], expert)
    return mesh, partitioning.axis_rules(bool(fsdp))


# --- the layer ---


def make_layer(routing: str) -> experts.SparseMlpBlock:
    sparse = Sparse(num_experts=4, balance_loss=0.1, router_z_loss=0.01, **ROUTINGS[routing])
    return experts.SparseMlpBlock(sparse, mlp_dim=12, dropout_rate=0.3)


@functools.cache
def layer_params(routing: str) -> tuple[dict, dict]:
    """Returns random parameters and the names of their axes, by path."""
    with params.record_specs() as specs:
        jax.eval_shape(lambda: make_layer(routing).init(jax.random.key(0), jnp.ones((1, 1, 8))))
    arrays = params.flatten(params.initialize(specs, 0))
    router = "router/router_weights/w/kernel"
    arrays[router] = 30 * arrays[router]  # so that experts differ in their loads
    return arrays, {path: spec.axes for path, spec in specs.items()}


def apply_layer(routing: str, sizes):
    """Returns (gradients of parameters and inputs, outputs and statistics), and the program."""
    mesh, rules = make_mesh(sizes)
    arrays, axes = layer_params(routing)
    shardings = partitioning.param_shardings(mesh, rules, axes, arrays)
    arrays = {path: np.asarray(leaf) for path, leaf in arrays.items()}
    weights = params.unflatten(partitioning.device_put(arrays, shardings))
    rng = np.random.default_rng(0)
    x = {"x": np.float32(rng.standard_normal((8, 6, 8))), "valid": rng.random((8, 6)) > 0.2}
    noise = rng.standard_normal(x["x"].shape)

    def loss(weights, x, valid):
        y, collections = make_layer(routing).apply(
            {"params": weights}, x, TokenInfo(valid, deterministic=False),
            rngs={"dropout": jax.random.key(0)}, mutable=["routers"],
        )  # fmt: skip
        (statistics,) = collections["routers"]["statistics"]
        return jnp.sum(y * noise) + statistics[-1], (y, collections)

    with partitioning.use_mesh(mesh, rules):
        batch = partitioning.shard_batch(x, mesh)
        grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        program = grad.lower(weights, batch["x"], batch["valid"]).compile()
        return program(weights, batch["x"], batch["valid"]), program.as_text()


def check_layers(routings, meshes) -> None:
    """The layer's outputs, statistics and gradients; rows are exchanged and never gathered."""
    for routing in routings:
        expected, _ = apply_layer(routing, (1, 1, 1))
        for sizes in meshes:
            actual, text = apply_layer(routing, sizes)
            leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
            for a, b in leaves:
                np.testing.assert_allclose(
                    a, b, rtol=0, atol=2e-6 * np.abs(b).max(), err_msg=f"{routing} {sizes}"
                )
            exchanges = len(re.findall(r" all-to-all\(", text))
            gathers = re.findall(r"(\S+) all-gather\(", text)
            if routing == "no limit" and sizes[1] > 1:
                assert gathers  # of tokens to the experts' devices
            else:  # with a capacity, two exchanges forward and two backward
                assert exchanges == (4 if sizes[1] > 1 else 0), (routing, sizes)
                assert len(sizes) > 3 or not gathers, (routing, sizes, gathers)


@pytest.mark.parametrize(
    "routing", ["no limit", "capacity", pytest.param("expert choice", marks=pytest.mark.slow)]
)
def test_a_layer_on_two_devices(routing):
    check_layers([routing], TWO)


@pytest.mark.parametrize("factor", [None, 1.25])
def test_no_array_of_all_tokens_and_experts(factor):
    """T 256, E 8, C 10 of a row, D 16, F 20: nothing has T·E·C, T·E·D or T·E·F values."""
    sparse = Sparse(num_experts=8, top_k=2, capacity_factor=factor)
    layer = experts.SparseMlpBlock(sparse, mlp_dim=20)
    x = jax.ShapeDtypeStruct((4, 64, 16), jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]

    def loss(weights, x):
        y, collections = layer.apply(
            {"params": weights}, x, TokenInfo(deterministic=False), mutable=["routers"]
        )
        return jnp.sum(jnp.sin(y)) + collections["routers"]["statistics"][0][-1]

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shapes, x).compile().as_text()
    sizes = [
        math.prod(map(int, dimensions.split(",")))
        for dimensions in re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", text)
    ]
    assert 5_000 < max(sizes) < 256 * 8 * 10


# --- a model ---


def train(capacity_factor: float | None, sizes):
    """Returns losses and parameters of three steps of AdamW on a mesh."""
    mesh, rules = make_mesh(sizes)
    config = dataclasses.replace(CONFIG, num_encoder_layers=2, num_decoder_layers=2)
    sparse = Sparse(
        num_experts=4, top_k=2, combine="normalized", capacity_factor=capacity_factor,
        min_capacity=1, balance_loss=0.1, router_z_loss=0.01,
    )  # fmt: skip
    model = network.Transformer(config, sparse=sparse)
    axes, whole = network.param_axes(model), params.flatten(random_params_of(model))
    shardings = partitioning.param_shardings(mesh, rules, axes, whole)
    optimizer = optim.adamw(lambda _: 1e-3, eps=1e-3)
    state = steps.TrainState.create(params.unflatten(whole), optimizer)
    state_shardings = partitioning.state_shardings(jax.eval_shape(lambda: state), shardings, mesh)
    state = partitioning.device_put(jax.tree.map(np.asarray, state), state_shardings)
    step = steps.make_train_step(model, optimizer, steps.Loss(), state_sharding=state_shardings)
    losses = []
    with partitioning.use_mesh(mesh, rules):
        for seed in range(3):
            batch = partitioning.shard_batch(example_batch(seed=seed), mesh)
            state, metrics = step(state, {}, batch, jax.random.key(0))
            losses.append(float(metrics["loss"]))
    expert_kernel = state.params["encoder"]["layers_1"]["mlp"]["expert"]["wo"]["kernel"]
    assert expert_kernel.addressable_shards[0].data.shape[0] == 4 // sizes[1]
    return losses, jax.tree.map(np.asarray, state.params)


def check_models(factors, meshes) -> None:
    for factor in factors:
        expected_losses, expected = train(factor, (1, 1, 1))
        for sizes in meshes:
            losses, actual = train(factor, sizes)
            np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                assert largest_difference(a, b) < 1e-5, sizes


@pytest.mark.slow
def test_training_on_two_devices():
    check_models([1.0], TWO[:2])


CHECK_FOUR = """
import test_expert_mlp as tests
tests.check_layers(tests.ROUTINGS, tests.FOUR)
tests.check_models([1.0, None], tests.FOUR[2:4])
"""


@pytest.mark.slow
def test_four_devices():
    """In a process of its own, as the tests have two devices.

    Models on two axes, one of them the experts'; single axes are in the test above.
    """
    tests = pathlib.Path(__file__).parents[1]
    flags = re.sub(r"(device_count=)\d+", r"\g<1>4", os.environ["XLA_FLAGS"])
    path = os.pathsep.join([str(tests), str(tests / "core"), str(tests.parent)])
    process = subprocess.run(
        [sys.executable, "-c", CHECK_FOUR],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
