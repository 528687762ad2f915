"""Mutual information of task and expert, computed by hand, and its control with shuffled tasks."""

import dataclasses
import json

import numpy as np
import pytest
from test_routing_page import OTHER, SITE, make_result

from pemoe_jax.analysis.routing import page, specialization


@pytest.mark.parametrize(
    ("sums", "bits"),
    [
        ([[3, 0], [0, 5]], 1.0),  # each task has an expert of its own, whatever its tokens
        ([[1, 3], [2, 6]], 0.0),  # all tasks use the experts alike
        ([[1, 1], [4, 0]], 0.811278 - 0.5),  # H(3/4, 1/4) minus the mean of 1 and 0
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2.0),
    ],
)
def test_mutual_information_by_hand(sums, bits):
    information = specialization.mutual_information(np.array([sums, sums], float))
    assert information == pytest.approx([bits, bits], abs=1e-6)


def specialized_result():
    """Tasks a and b, trained on, have experts of their own at SITE; c and d do not, held out.

    Twelve examples each, whose probabilities vary. OTHER is random.
    """
    rng = np.random.default_rng(1)
    noise = rng.uniform(0.3, 0.7, 48)
    first = np.concatenate([rng.uniform(0.8, 1, 12), rng.uniform(0, 0.2, 12), noise[24:]])
    examples = {SITE: np.stack([first, 1 - first], 1), OTHER: np.stack([noise, 1 - noise], 1)}
    tasks = np.repeat(np.arange(4), 12)
    totals = {
        site: [probs[tasks == t].mean(0) for t in range(4)] for site, probs in examples.items()
    }
    seen = [True, True, False, False]
    result = make_result(totals, names=list("abcd"), seen=seen)
    return dataclasses.replace(result, example_probs=examples, example_tasks=tasks, sites=[SITE])


def test_tasks_are_compared_with_shuffled_ones():
    result = specialized_result()
    entries = specialization.measure(result)
    layer = (SITE, OTHER) if list(result.experts)[0] == SITE else (OTHER, SITE)
    assert [(e.sites, e.group, e.tasks) for e in entries] == [
        *((layer, "trained on", 2), (layer, "held out", 2)),
        *(((SITE,), "trained on", 2), ((SITE,), "held out", 2)),
    ]
    trained, held_out = entries[2:]
    by_task = result.distributions(SITE)
    mean = by_task[:2].mean(axis=0)
    by_hand = -sum(mean * np.log2(mean)) + (by_task[:2] * np.log2(by_task[:2])).sum(axis=1).mean()
    assert trained.bits == pytest.approx(by_hand) and trained.normalized == trained.bits
    assert trained.bits > 0.5 > 5 * trained.shuffled_high
    assert 0 < trained.shuffled_mean < trained.shuffled_high
    assert held_out.bits < 0.05
    # A layer is the mean of its sites.
    assert entries[0].bits == pytest.approx((trained.bits + _bits(result, OTHER)) / 2)


def _bits(result, site):
    one_site = dataclasses.replace(result, sites=[site])
    return specialization.measure(one_site)[2].bits


def test_sites_that_are_a_whole_layer_have_the_last_entries():
    result = specialized_result()
    result = dataclasses.replace(result, sites=list(result.experts))
    groups = ["trained on", "held out"]
    assert [entry.group for entry in specialization.measure(result)] == 2 * groups
    lines = [line for line in page.summary([result]).splitlines() if "information" in line]
    assert len(lines) == 2
    assert all(f"2 tasks {group}" in line for group, line in zip(groups, lines, strict=True))


def test_specialization_is_in_the_files(tmp_path):
    result = specialized_result()
    page.draw_plots(result, tmp_path)
    files = page.render_files([result], tmp_path)
    (run,) = json.loads(files["routes.json"])["runs"]
    entries = specialization.measure(result)
    assert [entry["bits"] for entry in run["specialization"]] == pytest.approx(
        [entry.bits for entry in entries], abs=1e-6
    )
    assert "## Specialization: mutual information of task and expert" in files["routes.md"]
    assert "How much the task decides" in files["routes.html"]
    assert f"2 tasks held out: {entries[-1].bits:.4f} bits (shuffled" in page.summary([result])
    # Roles that are unknown: all tasks together. Without examples there is no table.
    tasks = [dataclasses.replace(task, is_trained=None) for task in result.tasks]
    assert {e.group for e in specialization.measure(dataclasses.replace(result, tasks=tasks))} == {
        "all"
    }
    assert specialization.to_table(specialization.measure(make_result({SITE: [[1, 0]]}))) is None
