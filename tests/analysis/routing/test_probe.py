"""Probes of routers and of sparse layers: totals on the device, and the choice of sites."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_models
from methods import CONFIG, EXPERTS, example_batch, model, random_params
from routing_probes import router_probs

from pemoe_jax.analysis.routing import measure, metrics, probe
from pemoe_jax.core import network, params
from pemoe_jax.core.adapters import Adapters, VectorExperts
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router

GATES = ["encoder/layers_0/mlp/gate", "decoder/layers_0/mlp/gate"]


# --- totals on the device ---


@functools.cache
def sentence_model(**router) -> tuple[network.Transformer, dict]:
    """Returns a model with routers at both gates whose probabilities the sentence [2] selects.

    The probabilities are (1, 2, 5) / 8 for the embedding (1, 0) and (2, 1, 1) / 4 for (0, 1).
    """
    factory = functools.partial(Router, reads="sentence", **router)
    adapters = Adapters(gate=functools.partial(VectorExperts, num_experts=3, router=factory))
    transformer = network.Transformer(dataclasses.replace(CONFIG, sentence_dim=2), adapters)
    flat = params.flatten(network.init_params(transformer, 0, lambda _: True))
    for path in flat:
        if path.endswith("router/kernel"):
            flat[path] = np.log(np.array([[1.0, 2.0, 5.0], [2.0, 1.0, 1.0]], np.float32))
    return transformer, params.unflatten(flat)


# Rows of 7, 4, 2 and 5 input tokens and 5, 3, 1 and 4 target tokens; the last is padding.
BATCH = example_batch()
BATCH["sentence_embeddings"] = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
TASKS = np.array([0, 0, 1, 0], np.int32)
for _name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"):
    BATCH[_name][3] = 0


cached_probe = functools.cache(probe.make_probe)


def run_probe(transformer, weights, batch=BATCH, tasks=TASKS, sites=(), totals=None):
    totals = probe.init_totals(transformer, 2, sites) if totals is None else totals
    return cached_probe(transformer)(weights, batch, tasks, totals)


def test_totals_match_hand_derivation():
    totals = run_probe(*sentence_model(), sites=GATES)
    first, second = np.array([1, 2, 5]) / 8, np.array([2, 1, 1]) / 4
    # H(1/8, 2/8, 5/8) = 3·ln 2/8 + 2·2·ln 2/8 + 5/8·ln(8/5); H(1/2, 1/4, 1/4) = 1.5·ln 2
    first_entropy = (3 + 4) / 8 * np.log(2) + 5 / 8 * np.log(8 / 5)
    second_entropy = 1.5 * np.log(2)
    for site, tokens in zip(GATES, ((7, 4, 2), (5, 3, 1)), strict=True):
        probs = [tokens[0] * first + tokens[1] * second, tokens[2] * first]
        np.testing.assert_allclose(totals.probs[site], probs, rtol=1e-5)
        entropies = [
            tokens[0] * first_entropy + tokens[1] * second_entropy,
            tokens[2] * first_entropy,
        ]
        np.testing.assert_allclose(totals.entropy[site], entropies, rtol=1e-5)
        stack = probe.token_stack(site)
        np.testing.assert_array_equal(totals.num_tokens[stack], [tokens[0] + tokens[1], tokens[2]])
    # EOS (1) ends each of the three inputs; the decoder reads the start token (0) in each
    np.testing.assert_allclose(totals.token_probs[GATES[0]][1], 2 * first + second, rtol=1e-5)
    np.testing.assert_allclose(totals.token_probs[GATES[1]][0], 2 * first + second, rtol=1e-5)
    assert totals.token_counts["encoder"][1] == totals.token_counts["decoder"][0] == 3
    assert totals.token_counts["encoder"][0] == 0  # padding
    assert float(totals.token_counts["encoder"].sum()) == 13


def test_top_1_totals_count_the_remaining_probability():
    totals = run_probe(*sentence_model(top_k=1))
    # top-1 leaves 5/8 of (1, 2, 5)/8 and 1/2 of (2, 1, 1)/4
    expected = [[4 / 2, 0, 7 * 5 / 8], [0, 0, 2 * 5 / 8]]
    np.testing.assert_allclose(totals.probs[GATES[0]], expected, rtol=1e-5)
    np.testing.assert_allclose(totals.entropy[GATES[0]], 0, atol=1e-6)
    np.testing.assert_allclose(metrics.mean_distributions(totals, GATES[0])[1], [0, 0, 1])


def test_head_wise_totals_are_means_over_heads_and_accumulate():
    """Compares MoV's keys and values, with a distribution per head, to a NumPy loop over tokens."""
    transformer, weights = model("mov"), random_params("mov")
    batch = {k: v for k, v in BATCH.items() if k != "sentence_embeddings"}
    sites = list(probe.expert_counts(transformer))
    whole = run_probe(transformer, weights, batch, sites=sites)
    for path, site_probs in router_probs(transformer, weights, batch).items():
        site = path.removesuffix("_adapter/probs")
        stack = probe.token_stack(site)
        mask = batch["encoder_input_tokens" if stack == "encoder" else "decoder_target_tokens"] > 0
        token_ids = batch[f"{stack}_input_tokens"]
        probs, entropy = np.zeros((2, EXPERTS)), np.zeros(2)
        token_probs = np.zeros((CONFIG.vocab_size, EXPERTS))
        for row, column in zip(*np.nonzero(mask), strict=True):
            p = np.asarray(site_probs[row, column], np.float64).reshape(-1, EXPERTS)  # [H or 1, E]
            probs[TASKS[row]] += p.mean(axis=0)
            entropy[TASKS[row]] -= (p * np.log(p)).sum(axis=-1).mean()
            token_probs[token_ids[row, column]] += p.mean(axis=0)
        np.testing.assert_allclose(whole.probs[site], probs, rtol=1e-4)
        np.testing.assert_allclose(whole.entropy[site], entropy, rtol=1e-4)
        np.testing.assert_allclose(whole.token_probs[site], token_probs, rtol=1e-4, atol=1e-6)

    twice = run_probe(
        transformer, weights, batch, sites=sites, totals=jax.tree.map(jnp.copy, whole)
    )
    for double, single in zip(jax.tree.leaves(twice), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(double, 2 * single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["switch", "ec"])
def test_totals_of_sparse_layers(name):
    """Beside MoV's routers; the weights of one expert a token, or of all that chose the token."""
    transformer = sparse_models.model(name, "mov")
    weights = sparse_models.parameters(name, "mov")
    batch = {k: v for k, v in BATCH.items() if k != "sentence_embeddings"}
    experts = probe.expert_counts(transformer)
    sites = ["encoder/layers_1/mlp/experts", "decoder/layers_1/mlp/experts"]
    assert [*experts][-1] == sites[1] and experts.keys() > {"encoder/layers_0/mlp/gate", sites[0]}
    assert measure.select_sites(None, experts) == sites  # MoV's sites have 3 experts
    assert measure.select_sites(["*/mlp/experts"], experts) == sites
    totals = run_probe(transformer, weights, batch, sites=sites)
    sown = router_probs(transformer, weights, batch)
    for site in sites:
        stack = probe.token_stack(site)
        mask = batch["encoder_input_tokens" if stack == "encoder" else "decoder_target_tokens"] > 0
        probs = np.asarray(sown[site.replace("experts", "probs")]) * mask[..., None]
        expected = [probs[task == TASKS].sum(axis=(0, 1)) for task in (0, 1)]
        np.testing.assert_allclose(totals.probs[site], expected, rtol=1e-5)
        np.testing.assert_allclose(np.sum(totals.token_probs[site], 0), np.sum(expected, 0), 1e-5)
        if name == "switch" or stack == "decoder":
            assert ((probs > 0).sum(axis=-1) == mask * transformer.sparse.top_k).all()
        softmax = np.asarray(sown[site.replace("experts", "router_probs")], np.float64)
        entropy = -(softmax * np.log(softmax)).sum(axis=-1) * mask
        expected = [entropy[task == TASKS].sum() for task in (0, 1)]
        np.testing.assert_allclose(totals.entropy[site], expected, rtol=1e-5)
    check = metrics.mean_distributions(totals, sites[0])
    np.testing.assert_allclose(check.sum(axis=-1), 1, rtol=1e-6)


def test_sites_are_in_layer_order():
    experts = probe.expert_counts(model("mov"))
    assert list(experts)[-5:] == [
        "decoder/layers_0/self_attention/key",
        "decoder/layers_0/self_attention/value",
        "decoder/layers_0/encoder_decoder_attention/key",
        "decoder/layers_0/encoder_decoder_attention/value",
        "decoder/layers_0/mlp/gate",
    ]
    assert set(experts.values()) == {EXPERTS}
    assert not probe.expert_counts(model("lora"))
    assert probe.token_stack("decoder/layers_0/encoder_decoder_attention/key") == "encoder"
    assert probe.token_stack("decoder/layers_0/encoder_decoder_attention/query") == "decoder"


def test_probabilities_that_are_not_finite_are_an_error():
    probs = np.ones((3, EXPERTS), np.float32)
    totals = probe.ProbeTotals({GATES[0]: probs, GATES[1]: probs.copy()}, {}, {}, {}, {})
    measure.check_finite(totals, ["a", "b", "c"])
    for value in (np.nan, np.inf):
        totals.probs[GATES[1]][2, 1] = value
        with pytest.raises(InputError, match=rf"ones at {GATES[1]} for c: "):
            measure.check_finite(totals, ["a", "b", "c"])


def test_select_sites_by_patterns():
    sites = ["encoder/layers_0/attention/value", "decoder/layers_0/mlp/gate"]
    experts = dict.fromkeys([*sites, "decoder/layers_0/self_attention/value"], 3)
    assert measure.select_sites(["*/mlp/*", "encoder/*/value"], experts) == sites
    assert measure.select_sites("decoder/*/value", experts) == [list(experts)[2]]


def test_select_sites_rejects_different_numbers_of_experts():
    experts = {"encoder/layers_0/mlp/gate": 3, "decoder/layers_0/mlp/gate": 5}
    assert measure.select_sites(None, experts) == ["decoder/layers_0/mlp/gate"]
    with pytest.raises(InputError, match=r"same number of experts.*3 and 5"):
        measure.select_sites(["*"], experts)
    with pytest.raises(InputError, match="at least one site"):
        measure.select_sites([], experts)
