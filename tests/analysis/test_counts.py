"""The parameter summary of a run, and the label of a method with its routing."""

import functools

import numpy as np
import pytest
from methods import CONFIG, METHODS

from pemoe_jax.analysis import counts
from pemoe_jax.core import adapters, network, params, routing


def test_parameter_summary():
    trainable = {
        "encoder/layers_0/attention/key_adapter/vectors": np.zeros((2, 10, 4)),  # 80
        "encoder/layers_0/attention/key_adapter/router/kernel": np.zeros((4, 10)),  # 40
        "encoder/layers_0/mlp/gate_adapter/vectors": np.zeros((10, 8)),  # 80
        "encoder/layers_0/mlp/gate_adapter/router/kernel": np.zeros((8, 10)),  # 80
        "decoder/layers_0/mlp/gate_adapter/vectors": np.zeros((10, 8)),  # 80
    }
    frozen = {"a/kernel": np.zeros((100, 97)), "b/scale": np.zeros(())}  # 9700 + 1
    text = counts.parameter_summary(
        trainable, frozen, base="tiny", method="mov", extra={"steps": "300"}
    )
    assert text.split("\n") == [
        "base       tiny",
        "method     mov",
        "trainable  360 of 10,061 parameters (3.58 %), 5 of 7 arrays",  # 360 / 10061 = 0.03578
        "sites      key 80 · gate 160 · routers 120",
        "steps      300",
    ]


def test_parameter_summary_of_full_fine_tuning():
    text = counts.parameter_summary({"a": np.zeros(3)}, {}, base="tiny", method="full")
    assert "3 of 3 parameters (100 %), 1 of 1 arrays" in text
    assert "sites" not in text


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_method_label_of_a_model(method):
    """Experts, rank and routing are read from a model, with and without its description."""
    router = functools.partial(routing.Router, top_k=2)
    expert = functools.partial(METHODS[method].expert, num_experts=3, router=router)
    record = adapters.Adapters(**{site: expert for site in METHODS[method].sites})
    shapes = params.flatten(network.param_shapes(network.Transformer(CONFIG, record)))
    label = {"mov": "mov-3", "molora": "molora-3 r4"}[method]
    assert counts.method_label(method, shapes) == label
    assert counts.method_label(method, shapes, adapters.describe(record)) == f"{label} top-2"


@pytest.mark.parametrize(
    ("method", "fields", "expected"),
    [
        ("mov", {}, ""),
        ("mov", {"top_k": 1}, "top-1"),
        ("mov", {"top_k": 2, "balance_loss": 1e-2}, "top-2 balanced"),
        ("mov", {"top_k": 2, "balance_loss": 0.1}, "top-2 balanced 0.1"),
        (
            "mov",
            {"top_k": 2, "renormalize": True, "straight_through": True},
            "top-2 renormalized straight-through",
        ),
        ("mov", {"reads": "y"}, ""),  # the default of MoV
        ("mov", {"reads": "x"}, "x"),
        ("molora", {"reads": "x"}, ""),
        ("molora", {"reads": "y", "z_loss": 1e-3}, "z-loss y"),
        ("molora", {"reads": "sentence", "jitter_noise": 1e-2}, "jitter sentence"),
        ("mov", {"temperature": 0.5}, "temperature 0.5"),
    ],
)
def test_routing_label(method, fields, expected):
    router = functools.partial(routing.Router, **fields)
    expert = functools.partial(METHODS[method].expert, num_experts=3, router=router)
    record = adapters.Adapters(**{site: expert for site in METHODS[method].sites})
    assert counts.routing_label(adapters.describe(record)) == expected


def test_routing_that_differs_by_site():
    sites = {
        "key": {"kind": "VectorExperts", "router": {"top_k": 2}},
        "gate": {"kind": "VectorExperts", "router": {"top_k": None}},
        "wo": {"kind": "LoRAExperts", "router": None},
    }
    assert counts.routing_label(sites) == "top-2/soft"
    assert counts.routing_label({"gate": sites["gate"], "wo": sites["wo"]}) == ""
