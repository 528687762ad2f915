"""results.json: accuracies of prompts, datasets and averages by hand; what is not overwritten."""

import json

import pytest

from pemoe_jax.analysis.zero_shot import results
from pemoe_jax.core.errors import InputError


def prompt(right: int, wrong: int, dataset: str) -> dict:
    correct = [True] * right + [False] * wrong
    chance = [0.5] * len(correct)
    return results.task_result(correct, chance, dataset, "validation", odd=["empty_input"] * wrong)


def test_task_result():
    task = results.task_result(
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


def test_a_model_that_always_gives_the_same_answer():
    yes_no, mixed = ["yes", "no"], ["no", "yes "]
    assert results.same_answer([(0, yes_no), (0, yes_no)]) == "'yes'"
    assert results.same_answer([(0, yes_no), (1, mixed)]) == "'yes'"
    assert results.same_answer([(0, yes_no), (0, mixed)]) == "choice 1"
    assert results.same_answer([(0, yes_no), (1, yes_no)]) == ""
    # one example, or one choice, says nothing
    assert results.same_answer([(0, yes_no)]) == ""
    assert results.same_answer([(0, yes_no), (0, ["no"])]) == ""
    task = results.task_result([True], [0.5], "a", "test", [], same_answer="'yes'")
    assert task["same_answer"] == "'yes'"


def test_summary_of_datasets_and_average():
    tasks = {
        "a_1": prompt(9, 1, "a"),  # 0.9
        "a_2": prompt(1, 9, "a"),  # 0.1
        "a_3": prompt(2, 8, "a"),  # 0.2: median 0.2, mean 0.4
        "b_1": prompt(3, 1, "b"),  # 0.75
        "b_2": prompt(1, 3, "b"),  # 0.25: median and mean 0.5
    }
    summary = results.summarize(tasks)
    a, b = summary["datasets"]["a"], summary["datasets"]["b"]
    assert (a["median"], a["prompts"], a["examples"]) == (0.2, 3, 30)
    assert a["mean"] == pytest.approx(0.4)
    assert (b["median"], b["mean"], b["prompts"], b["examples"]) == (0.5, 0.5, 2, 8)
    # Datasets have equal weights, however many prompts they have.
    assert summary["average"]["median"] == pytest.approx((0.2 + 0.5) / 2)
    assert summary["average"]["mean"] == pytest.approx((0.4 + 0.5) / 2)
    assert summary["average"]["chance"] == 0.5


def test_results_that_are_not_recomputed_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not results.check_overwrites(tmp_path, ["run"], ["a"])  # an empty folder
    runs = [
        {"checkpoint": "base", "step": 0, "tasks": {"a": {}, "b": {}}},
        {"checkpoint": str(tmp_path / "run"), "step": 3, "tasks": {"a": {}}},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    assert results.check_overwrites(tmp_path, ["run", "base", "new"], ["a", "b", "c"])
    with pytest.raises(InputError, match="lost, those of base on a and 1 more: choose another"):
        results.check_overwrites(tmp_path, ["run"], ["a", "b"])
    with pytest.raises(InputError, match="lost, those of base on b: choose another EVAL_OUTPUT"):
        results.check_overwrites(tmp_path, ["run", "base"], ["a", "a_score_eval"])
    with pytest.raises(
        InputError, match="with SHOTS=0 would be lost, got SHOTS=3 and SHOTS_SEED=1"
    ):
        results.check_overwrites(tmp_path, ["run", "base"], ["a", "b"], shots=(3, 1))
    few = [run | {"shots": 3, "shots_seed": 1} for run in runs]
    (tmp_path / "results.json").write_text(json.dumps({"runs": few}))
    assert results.check_overwrites(tmp_path, ["run", "base"], ["a", "b"], shots=(3, 1))
    for other in ((0, 0), (2, 1), (3, 0)):
        with pytest.raises(InputError, match="with SHOTS=3 and SHOTS_SEED=1 would be lost"):
            results.check_overwrites(tmp_path, ["run", "base"], ["a", "b"], shots=other)
    wrong = ("{", '{"results": 3}', '{"runs": [{"name": "x"}]}', "[]", "[" * 100_000)
    for text in (*wrong, '{"runs": [{"checkpoint": 5, "tasks": {"a": {}}}]}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match="results.json: expected the results of an evaluation"):
            results.check_overwrites(tmp_path, ["run"], ["a"])


def test_merge_keeps_the_last_of_equal_runs():
    old = [{"name": "base"}, {"name": "mov", "checkpoint": "runs/mov", "step": 3, "average": 1}]
    new = [{"name": "mov", "checkpoint": "runs/mov", "step": 3, "average": 2}]
    assert results.merge_runs([{"runs": old}, {"runs": new}]) == [old[0], new[0]]
    few = new[0] | {"shots": 3, "shots_seed": 0}
    assert results.merge_runs([{"runs": new}, {"runs": [few]}]) == [new[0], few]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", r'expected {"runs": \[...\]}'),
        ('{"runs": []}', "at least one run"),
        ('{"runs": [7]}', "run 0: expected an object, got 7"),
    ],
)
def test_a_file_without_results_is_an_error(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=message):
        results.load_results(str(tmp_path))
