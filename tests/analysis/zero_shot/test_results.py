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
    with pytest.raises(InputError, match="results of base on a and 1 more would be lost: choose"):
        results.check_overwrites(tmp_path, ["run"], ["a", "b"])
    with pytest.raises(InputError, match="results of base on b would be lost: choose another"):
        results.check_overwrites(tmp_path, ["run", "base"], ["a", "a_score_eval"])
    with pytest.raises(InputError, match="lost, as this evaluation has SHOTS=3 and SHOTS_SEED=1: "):
        results.check_overwrites(tmp_path, ["run", "base"], ["a", "b"], shots=(3, 1))
    runs[0]["tasks"] = {"a_score_eval": {"split": "test"}}
    (tmp_path / "results.json").write_text(json.dumps({"runs": runs}))
    tasks = ["a", "a_score_eval"]
    for splits in ({}, {"a": "test"}):
        assert results.check_overwrites(tmp_path, ["run", "base"], tasks, splits=splits)
    with pytest.raises(
        InputError, match="split 'test' would be lost, as this evaluation is on 'val'"
    ):
        results.check_overwrites(tmp_path, ["run", "base"], tasks, splits={"a": "val"})
    runs[0]["tasks"] = {"a": {}, "b": {}}
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


def test_merge_joins_the_tasks_of_a_run():
    def result(shots=0, trained=None, **correct):
        tasks = {
            name: results.task_result([True] * count + [False] * (4 - count), [0.5], name, "", [])
            for name, count in correct.items()
        }
        run = {"name": "mov", "checkpoint": "runs/mov", "step": 3, "shots": shots}
        known = {} if trained is None else {"trained_datasets": trained}
        return {"runs": [run | known | {"tasks": tasks} | results.summarize(tasks)]}

    (run,) = results.merge_runs([result(a=1, b=2, trained=["a"]), result(b=3, c=4, trained=["c"])])
    assert {name: task["accuracy"] for name, task in run["tasks"].items()} == {
        **{"a": 0.25, "b": 0.75, "c": 1.0}
    }
    assert run["average"]["mean"] == pytest.approx(2 / 3) and len(run["datasets"]) == 3
    assert run["trained_datasets"] == ["a", "c"]
    (run,) = results.merge_runs([result(a=1), result(b=3, trained=["b"])])
    assert run["trained_datasets"] is None, "unknown of the first"
    other = result(a=1)
    other["runs"][0]["tasks"]["a"]["split"] = "val"
    with pytest.raises(InputError, match="mov: expected one split of 'a', got results on '' and "):
        results.merge_runs([result(a=1), other])
    few = result(shots=3, a=1)
    assert results.merge_runs([result(a=1), few]) == [*result(a=1)["runs"], *few["runs"]]


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


def test_names_that_are_too_long_for_a_file(tmp_path):
    task = prompt(1, 1, "a")
    for folder, name in ((tmp_path / ("r" * 300), "a"), (tmp_path, "a" * 300)):
        with pytest.raises(InputError, match="cannot be read: File name too long"):
            results.load_predictions(str(folder), name, task)
