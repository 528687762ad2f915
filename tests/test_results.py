"""Accuracies of prompts, data sets and all of them, by hand."""

import json

import pytest

from pemoe_jax.analysis.zero_shot import scores
from pemoe_jax.core.errors import InputError


def prompt(right: int, wrong: int, dataset: str) -> dict:
    correct = [True] * right + [False] * wrong
    chance = [0.5] * len(correct)
    return scores.task_result(correct, chance, dataset, "validation", odd=["empty_input"] * wrong)


def test_a_prompt():
    task = scores.task_result(
        correct=[True, False, True, True],
        chance=[0.5, 0.25, 0.5, 0.75],
        dataset="a",
        split="test",
        odd=["cut_input", "cut_input", "doubled_choices"],
    )
    assert task == {
        "dataset": "a",
        "split": "test",
        "accuracy": 0.75,  # 3 of 4
        "chance": 0.5,  # (0.5 + 0.25 + 0.5 + 0.75) / 4
        "examples": 4,
        "odd": {"cut_input": 2, "doubled_choices": 1},
    }


def test_data_sets_and_their_average():
    tasks = {
        "a_1": prompt(9, 1, "a"),  # 0.9
        "a_2": prompt(1, 9, "a"),  # 0.1
        "a_3": prompt(2, 8, "a"),  # 0.2: median 0.2, mean 0.4
        "b_1": prompt(3, 1, "b"),  # 0.75
        "b_2": prompt(1, 3, "b"),  # 0.25: median and mean 0.5
    }
    found = scores.summarise(tasks)
    a, b = found["datasets"]["a"], found["datasets"]["b"]
    assert (a["median"], a["prompts"], a["examples"]) == (0.2, 3, 30)
    assert a["mean"] == pytest.approx(0.4)
    assert (b["median"], b["mean"], b["prompts"], b["examples"]) == (0.5, 0.5, 2, 8)
    # data sets count alike, however many prompts they have
    assert found["average"]["median"] == pytest.approx((0.2 + 0.5) / 2)
    assert found["average"]["mean"] == pytest.approx((0.4 + 0.5) / 2)
    assert found["average"]["chance"] == 0.5


def test_what_would_be_lost_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not scores.check_replaced(tmp_path, ["run"], ["a"])  # nothing there
    runs = [
        {"checkpoint": "base", "step": 0, "tasks": {"a": {}, "b": {}}},
        {"checkpoint": str(tmp_path / "run"), "step": 3, "tasks": {"a": {}}},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    assert scores.check_replaced(tmp_path, ["run", "base", "new"], ["a", "b", "c"])
    with pytest.raises(InputError, match=r"holds results .* lost: base on a and 1 more: choose"):
        scores.check_replaced(tmp_path, ["run"], ["a", "b"])
    with pytest.raises(InputError, match=r"lost: base on b: choose another EVAL_OUTPUT_DIR"):
        scores.check_replaced(tmp_path, ["run", "base"], ["a", "a_score_eval"])
    for text in ("{", '{"results": 3}', '{"runs": [{"name": "x"}]}', "[]"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match="results.json is in the way, and not of an eval"):
            scores.check_replaced(tmp_path, ["run"], ["a"])
