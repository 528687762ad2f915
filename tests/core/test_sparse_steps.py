"""Steps of models with sparse MLPs: which router a statistic belongs to, losses, microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import example_batch, largest_difference, random_params_of
from sparse_models import EXPERTS, ROUTINGS, model, parameters, sparse_model

from pemoe_jax.core import params, routing, steps

MIXED_PATHS = [
    "decoder/layers_0/encoder_decoder_attention/key_adapter",
    "decoder/layers_0/encoder_decoder_attention/value_adapter",
    "decoder/layers_0/mlp/gate_adapter",
    "decoder/layers_0/self_attention/key_adapter",
    "decoder/layers_0/self_attention/value_adapter",
    "decoder/layers_1/encoder_decoder_attention/key_adapter",
    "decoder/layers_1/encoder_decoder_attention/value_adapter",
    "decoder/layers_1/mlp/experts",
    "decoder/layers_1/self_attention/key_adapter",
    "decoder/layers_1/self_attention/value_adapter",
    "encoder/layers_0/attention/key_adapter",
    "encoder/layers_0/attention/value_adapter",
    "encoder/layers_0/mlp/gate_adapter",
    "encoder/layers_1/attention/key_adapter",
    "encoder/layers_1/attention/value_adapter",
    "encoder/layers_1/mlp/experts",
]


def test_sown_statistics_are_in_the_order_of_paths():
    """'mlp/statistics' follows 'mlp/gate_adapter/statistics', but 'mlp/experts' precedes it."""
    sown = {"mlp": {"gate_adapter": {"statistics": (1,)}, "statistics": (2,), "dispatch": (3,)}}
    by_router = routing.sown_by_router({"encoder": {"layers_0": sown}}, "statistics")
    assert [*by_router.items()] == [
        ("encoder/layers_0/mlp/experts", 2),
        ("encoder/layers_0/mlp/gate_adapter", 1),
    ]
    dispatch = routing.sown_by_router({"encoder": {"layers_0": sown}}, "dispatch")
    assert dispatch == {"encoder/layers_0/mlp/experts": 3}


@functools.cache
def mixed_step():
    """Returns params -> metrics of a training step's forward pass: places are limited."""
    key = jax.random.key(0)
    return jax.jit(
        lambda p: steps.grads_and_metrics(
            model("switch", "mov"), steps.Loss(), {}, p, example_batch(), key
        )[1]
    )


def test_rows_follow_router_paths():
    """A router of zeros has the entropy log E, and no other one has; MoV has 3 experts here."""
    flat = params.flatten(parameters("switch", "mov"))
    assert steps.router_paths(model("switch", "mov")) == MIXED_PATHS
    for path, size in (
        ("decoder/layers_0/mlp/gate_adapter/router/kernel", 3),
        ("encoder/layers_1/mlp/router/router_weights/w/kernel", EXPERTS),
        ("decoder/layers_1/mlp/router/router_weights/w/kernel", EXPERTS),
    ):
        metrics = mixed_step()(params.unflatten({**flat, path: jnp.zeros_like(flat[path])}))
        router = path.removesuffix("/router/kernel")
        router = router.replace("/router/router_weights/w/kernel", "/experts")
        is_even = np.isclose(metrics["routers"][:, 0], np.log(size), rtol=0, atol=1e-6)
        assert [p for p, even in zip(MIXED_PATHS, is_even, strict=True) if even] == [router]
    assert metrics["dispatch"].shape == (2, 3)


def test_auxiliary_loss_is_a_mean_of_each_kind():
    paths = ["a/mlp/experts", "a/mlp/gate_adapter", "b/mlp/experts", "b/key_adapter", "c_adapter"]
    losses = np.array([1.0, 10, 3, 20, 60])
    assert routing.total_aux_loss(paths, losses) == 2 + 30
    assert routing.total_aux_loss(paths[1::2], losses[1::2]) == 15


def test_metrics_of_sparse_layers():
    """The loss contains exactly the metric aux_loss, and dispatch statistics have names."""
    metrics = jax.device_get(mixed_step()(parameters("switch", "mov")))
    by_name = steps.summarize_routers(MIXED_PATHS, metrics, "sites")
    aux_loss = float(metrics["loss"] - metrics["cross_ent_loss"])
    assert by_name["aux_loss"] == pytest.approx(aux_loss, rel=1e-4)
    rows = metrics["dispatch"]
    assert by_name["dropped"] == pytest.approx(rows[:, 0].mean()) and by_name["dropped"] > 0
    assert by_name["decoder/mlp/experts/without_expert"] == pytest.approx(rows[0, 1])
    assert by_name["encoder/mlp/experts/used"] == pytest.approx(rows[1, 2])
    assert "encoder/mlp/gate/dropped" not in by_name
    by_layer = steps.summarize_routers(MIXED_PATHS, metrics, "layers")
    assert by_layer["encoder/layers_1/mlp/experts/dropped"] == pytest.approx(rows[1, 0])


@pytest.mark.parametrize("name", ["gshard", "ec"])
def test_microbatches_equal_the_whole_batch(name):
    """Groups are rows; without dropout, balance losses and random second experts."""
    sparse = dataclasses.replace(
        ROUTINGS[name],
        sparse_step=1,
        balance_loss=0.0,
        second_expert="all",
        eval_capacity_factor=1.0,
    )
    tiny = sparse_model(sparse, num_encoder_layers=1, num_decoder_layers=1)
    weights = random_params_of(tiny)
    results = [
        jax.jit(
            lambda w, n=n: steps.grads_and_metrics(
                tiny, steps.Loss(), w, {}, example_batch(), None, n
            )
        )(weights)
        for n in (1, 2)
    ]
    (whole, metrics), (parts, other_metrics) = jax.device_get(results)
    assert metrics["loss"] == pytest.approx(other_metrics["loss"], rel=1e-6)
    if name != "ec":
        assert metrics["dispatch"][1, 0] > 0  # some assignments are dropped
    for path, leaf in params.flatten(whole).items():
        assert largest_difference(params.flatten(parts)[path], leaf) < 2e-5, path
