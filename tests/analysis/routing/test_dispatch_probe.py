"""Dispatch of sparse layers in training, against a loop over tokens and the layers' own."""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
import sparse_models
from methods import random_params_of

from pemoe_jax.analysis.routing import dispatch_probe
from pemoe_jax.analysis.routing.dispatch_probe import TrainingRows
from pemoe_jax.core import partitioning, routing, steps
from pemoe_jax.data.choices import ChoiceGroup

ROWS = TrainingRows({"inputs": 16, "targets": 8})
SITES = ["encoder/layers_1/mlp/experts", "decoder/layers_1/mlp/experts"]
STACKS = ["encoder", "decoder"]


def example(task: str, index: int, rng: np.random.Generator) -> ChoiceGroup:
    """Returns an example whose second choice is correct."""
    inputs, targets = (rng.integers(2, 32, rng.integers(1, n)) for n in (11, 6))
    return ChoiceGroup(
        task=task,
        idx=index,
        inputs=np.append(inputs, 1),
        choices=(np.array([3, 1]), np.append(targets, 1)),
        is_correct=(False, True),
        input_text="",
        choice_texts=("", ""),
        input_truncated=False,
        target_truncated=False,
    )


@pytest.fixture(scope="module")
def groups() -> dict[str, list[ChoiceGroup]]:
    rng = np.random.default_rng(3)
    return {name: [example(name, i, rng) for i in range(n)] for name, n in (("a", 7), ("b", 4))}


def batches(groups, batch_size=4):
    correct = {
        task: [dataclasses.replace(g, choices=g.choices[1:], is_correct=(True,)) for g in members]
        for task, members in groups.items()
    }
    return list(dispatch_probe.training_batches(correct, ROWS, batch_size))


@functools.partial(jax.jit, static_argnums=0)
def run_in_training_mode(model, params, batch, number):
    """Returns {site: softmax of the router}, and {site: `DISPATCH_STATISTICS`}."""
    _, sown = steps.apply_model(
        model, params, batch, jax.random.key(number), mutable=["intermediates", "routers"]
    )
    return (
        routing.sown_by_router(sown["intermediates"], "router_probs"),
        routing.sown_by_router(sown["routers"], "dispatch"),
    )


def loop(sparse, site, probs, tasks):
    """Yields (task, experts that a token has, experts among them with a place) of every token."""
    length = probs.shape[0]
    size = max(round(sparse.capacity_factor * length / sparse.num_experts), sparse.min_capacity)
    tokens = [t for t in range(length) if tasks[t] >= 0]
    if sparse.routing == "experts" and site.startswith("encoder"):
        count = len(tokens)
        size = max(round(sparse.capacity_factor * count / sparse.num_experts), sparse.min_capacity)
        experts_of = collections.defaultdict(list)
        for expert in range(sparse.num_experts):
            for token in sorted(tokens, key=lambda t: -probs[t, expert])[: min(size, count)]:
                experts_of[token].append(expert)
        yield from ((tasks[t], experts_of[t], experts_of[t]) for t in tokens)
        return
    chosen = {t: np.argsort(-probs[t], kind="stable")[: sparse.top_k].tolist() for t in tokens}
    if sparse.priority == "probability" and site.startswith("encoder"):
        tokens = sorted(tokens, key=lambda t: -probs[t].max())
    taken, placed = collections.Counter(), collections.defaultdict(list)
    for choice in range(sparse.top_k):
        for token in tokens:
            expert = chosen[token][choice]
            if taken[expert] < size:
                placed[token].append(expert)
            taken[expert] += 1
    yield from ((tasks[t], chosen[t], placed[t]) for t in tokens)


@pytest.mark.parametrize("name", sparse_models.ROUTINGS)
def test_totals_match_a_loop_over_tokens(name, groups):
    # Which second experts GShard keeps depends on the random key; another test has them.
    sparse = dataclasses.replace(sparse_models.ROUTINGS[name], second_expert="all")
    model = sparse_models.sparse_model(sparse)
    params = random_params_of(model)
    mesh = partitioning.make_mesh()
    totals = dispatch_probe.measure_dispatch(model, params, groups, ROWS, 4, mesh)
    assert list(totals) == SITES
    experts = sparse.num_experts
    expected = {
        site: (np.zeros((2, experts)), np.zeros((2, experts)), np.zeros((2, experts + 1)))
        for site in SITES
    }
    for number, (batch, task_ids) in enumerate(batches(groups)):
        probs, _ = run_in_training_mode(model, params, batch, number)
        for site, stack in zip(SITES, STACKS, strict=True):
            for row_probs, row_tasks in zip(np.asarray(probs[site]), task_ids[stack], strict=True):
                for task, chosen, placed in loop(sparse, site, row_probs, row_tasks):
                    for counts, members in zip(expected[site], (chosen, placed), strict=False):
                        np.add.at(counts[task], members, 1)
                    expected[site][2][task, len(placed)] += 1
    for site in SITES:
        whole = totals[site].assigned, totals[site].placed, totals[site].tokens_by_experts
        for array, counts in zip(whole, expected[site], strict=True):
            np.testing.assert_array_equal(array, counts)
        assert np.sum(whole[1]) < np.sum(whole[0]) or name == "ec"
    ids = "inputs", "choices"
    for stack, site, key in zip(STACKS, SITES, ids, strict=True):
        members = [[getattr(g, key) for g in group] for group in groups.values()]
        sizes = [sum(len(x if stack == "encoder" else x[1]) for x in group) for group in members]
        np.testing.assert_array_equal(totals[site].tokens_by_experts.sum(axis=1), sizes)


@pytest.mark.parametrize("name", ["gshard", "ec"])
def test_shares_are_those_that_the_layers_report(name, groups):
    """With random second experts, in one batch."""
    model, params = sparse_models.model(name), sparse_models.parameters(name)
    (batch, _), *others = batches(groups, batch_size=8)
    assert not others
    mesh = partitioning.make_mesh()
    totals = dispatch_probe.measure_dispatch(model, params, groups, ROWS, 8, mesh)
    _, statistics = run_in_training_mode(model, params, batch, 0)
    for site in SITES:
        assigned, placed = totals[site].assigned.sum(), totals[site].placed.sum()
        dropped, without_expert, _ = np.asarray(statistics[site]).tolist()
        assert 1 - placed / assigned == pytest.approx(dropped, abs=1e-6)
        by_number = totals[site].tokens_by_experts.sum(axis=0)
        assert by_number[0] / by_number.sum() == pytest.approx(without_expert, abs=1e-6)
        if name == "gshard":
            assert by_number.sum() < assigned < 2 * by_number.sum()


def test_tokens_have_the_tasks_of_their_examples(groups):
    tokens = {(stack, task): [] for stack in STACKS for task in (0, 1)}
    for batch, task_ids in batches(groups):
        for stack, key in zip(
            STACKS, ("encoder_input_tokens", "decoder_target_tokens"), strict=True
        ):
            np.testing.assert_array_equal(task_ids[stack] >= 0, batch[key] > 0)
            for task in (0, 1):
                tokens[stack, task] += batch[key][task_ids[stack] == task].tolist()
    assert max(batch["encoder_segment_ids"].max() for batch, _ in batches(groups)) > 1
    for task, members in enumerate(groups.values()):
        inputs = np.concatenate([group.inputs for group in members])
        assert sorted(tokens["encoder", task]) == sorted(inputs)
        targets = np.concatenate([group.choices[1] for group in members])
        assert sorted(tokens["decoder", task]) == sorted(targets)


def test_rows_of_a_run_are_those_of_its_settings(tmp_path):
    (tmp_path / "checkpoint_5" / "record").mkdir(parents=True)
    assert dispatch_probe.read_training_rows(str(tmp_path), ROWS) == ROWS
    (tmp_path / "config.gin").write_text(
        "PACK = False\nTASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 1024}\n"
    )
    rows = dispatch_probe.read_training_rows(str(tmp_path), ROWS)
    assert rows == TrainingRows({"inputs": 64, "targets": 1024}, pack=False)
    assert str(rows) == "rows of one example, 64 + 1,024 tokens"
    (tmp_path / "config.gin").write_text("PACK = True\nTASK_FEATURE_LENGTHS = @lengths()\n")
    assert dispatch_probe.read_training_rows(str(tmp_path), ROWS) == ROWS
