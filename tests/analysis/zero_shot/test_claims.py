"""Differences, intervals and verdicts of claims, on answers that are computed by hand."""

import json
import re

import numpy as np
import pytest

from pemoe_jax.analysis.zero_shot import claims, claims_report
from pemoe_jax.core.errors import InputError

CLAIM = claims.Claim("a_over_b", "A beats B.", "unknown", "file", ("a",), ("b",))


def make_run(folder, name, answers, dataset=lambda task: task[0]):
    """Writes the predictions of {task: {example: correct}} and returns the run."""
    tasks = {}
    for task, correct in answers.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"idx": i, "correct": bool(c)}) for i, c in correct.items()]
        (folder / name / f"{task}.jsonl").write_text("\n".join(lines))
        tasks[task] = {
            "dataset": dataset(task),
            "accuracy": sum(correct.values()) / len(correct),
            "examples": len(correct),
            "predictions": str(folder / name),
        }
    return {"name": name, "tasks": tasks}


def answers(text):
    return {i: int(c) for i, c in enumerate(text)}


def test_difference_is_the_mean_over_examples_prompts_and_datasets(tmp_path):
    a = {"x1": answers("1111"), "x2": answers("1100"), "y1": {3: 1, 8: 0}}
    b = {"x1": answers("1000"), "x2": answers("1100"), "y1": {3: 0, 8: 0}}
    runs = {"a": {0: make_run(tmp_path, "a", a)}, "b": {0: make_run(tmp_path, "b", b)}}
    result = claims.measure(CLAIM, runs)
    assert result["differences"] == [pytest.approx(100 * ((0.75 + 0) / 2 + 0.5) / 2)]
    assert (result["prompts"], result["examples"], result["agree"]) == (3, 10, 1)
    # a single seed has no interval over seeds
    assert result["seed_interval"] is None and result["verdict"] == claims.UNDECIDED
    only_y = claims.Claim(**{**vars(CLAIM), "datasets": ("y*",)})
    assert claims.measure(only_y, runs)["difference"] == pytest.approx(50)


def test_seeds_are_paired(tmp_path):
    """The interval is that of a paired t-test; a seed of one experiment alone is left out."""
    scores = {"a": {0: 6, 1: 8, 2: 7, 9: 0}, "b": {0: 4, 1: 5, 2: 6}}
    runs = {
        name: {
            seed: make_run(tmp_path, f"{name}{seed}", {"x": answers("1" * n + "0" * (10 - n))})
            for seed, n in by_seed.items()
        }
        for name, by_seed in scores.items()
    }
    result = claims.measure(CLAIM, runs)
    assert result["seeds"] == [0, 1, 2] and result["agree"] == 3
    assert result["differences"] == pytest.approx([20, 30, 10])
    half = 4.302653 * 10 / 3**0.5  # t with two degrees of freedom, times the standard error
    assert result["seed_interval"] == pytest.approx([20 - half, 20 + half], abs=1e-4)


def test_differences_of_differences(tmp_path):
    counts = {"a": 9, "b": 4, "c": 5, "d": 3}
    runs = {
        name: {0: make_run(tmp_path, name, {"x": answers("1" * n + "0" * (10 - n))})}
        for name, n in counts.items()
    }
    claim = claims.Claim("gain", "", "", "", ("a", "d"), ("b", "c"))
    assert claims.measure(claim, runs)["difference"] == pytest.approx(10 * (9 - 4 - (5 - 3)))


def test_interval_over_prompts_has_the_variance_of_prompts_and_examples():
    """Without variance between examples, the variance of the drawn means is that of prompts / P."""
    values = np.repeat([[0.0], [1.0], [2.0], [5.0]], 30, axis=1)
    drawn = claims._draw("x", values, 20_000)
    assert drawn.mean() == pytest.approx(2.0, abs=0.03)
    assert drawn.var() == pytest.approx(values[:, 0].var() / 4, rel=0.05)
    drawn = claims._draw("x", np.repeat([np.arange(6.0)], 3, axis=0), 20_000)
    assert drawn.var() == pytest.approx(np.arange(6).var() / 6, rel=0.05)
    missing = np.array([[1.0, np.nan], [1.0, 1.0]])
    assert claims._draw("x", missing, 500).max() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("bound", "seeds", "prompts", "verdict"),
    [
        (0, [1, 3], [0.5, 4], claims.REPRODUCED),
        (0, [1, 3], [-0.5, 4], claims.UNDECIDED),
        (0, [-1, 3], [0.5, 4], claims.UNDECIDED),
        (0, None, [0.5, 4], claims.UNDECIDED),
        (0, [-3, -1], [-4, -0.1], claims.NOT_REPRODUCED),
        (0, [-3, -1], [0.1, 2], claims.UNDECIDED),
        (-1, [-0.9, 3], [-0.5, 4], claims.REPRODUCED),
        (-1, [-4, -1.1], [-3, -1.2], claims.NOT_REPRODUCED),
        (-1, [-4, -0.9], [-3, -1.2], claims.UNDECIDED),
    ],
)
def test_verdicts(bound, seeds, prompts, verdict):
    assert claims._verdict(bound, seeds, prompts) == verdict


def test_claims_that_cannot_be_measured(tmp_path):
    run = make_run(tmp_path, "a", {"x": answers("10")})
    assert claims.measure(CLAIM, {"a": {0: run}})["verdict"] == claims.NOT_MEASURED
    other = make_run(tmp_path, "b", {"x": answers("101")})
    with pytest.raises(InputError, match="claim a_over_b: expected the same examples of x"):
        claims.measure(CLAIM, {"a": {0: run}, "b": {0: other}})
    (tmp_path / "b" / "x.jsonl").unlink()
    with pytest.raises(InputError, match="expected predictions of x by b"):
        claims.measure(CLAIM, {"a": {0: run}, "b": {0: other}})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{}", "expected {\"claims\": […]}, got no 'claims'"),
        ('{"claims": []}', "expected claims with different ids"),
        ('{"claims": [{"id": "a"}]}', "missing 5 required"),
        ('{"claims": [{"id": "a", "other": 1}]}', "unexpected keyword argument 'other'"),
        (
            '{"claims": [{"id": "a", "claim": "", "paper": "", "source": "", "plus": ["a"],'
            ' "minus": []}]}',
            "must list equally many experiments",
        ),
    ],
)
def test_files_that_hold_no_claims(tmp_path, entries, message):
    file = tmp_path / "claims.json"
    file.write_text(entries)
    with pytest.raises(InputError, match=re.escape(message)):
        claims.load_claims(file)


def test_memory_that_no_seed_recorded_is_not_zero():
    first = {"step_times": [{"seconds": 1.0, "device": "cpu"}], "evaluation_seconds": 2.0}
    costs = claims_report._costs([first])
    assert costs == {
        **{"device": "cpu", "step_seconds": 1.0, "evaluation_seconds": 2.0},
        "peak_memory": None,
    }
    second = {"step_times": [{"seconds": 3.0, "device": "cpu", "memory": 5}]}
    assert claims_report._costs([first, second])["peak_memory"] == 5
    assert claims_report._costs([{}]) == {}
