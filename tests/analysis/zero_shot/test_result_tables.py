"""The tables of `pemoe evaluate`: cells by hand, prompts, odd examples, labels, width."""

import pytest

from pemoe_jax.analysis.zero_shot import result_tables


def dataset(median, mean, chance=0.5, prompts=2, examples=100):
    return {
        "median": median, "mean": mean, "chance": chance, "prompts": prompts, "examples": examples,
    }  # fmt: skip


def task(dataset, accuracy, **odd):
    return {
        "dataset": dataset, "split": "validation", "accuracy": accuracy, "chance": 0.5,
        "examples": 50, "odd": {"empty_input": 0, **odd},
    }  # fmt: skip


@pytest.fixture
def base():
    return {
        "name": "base", "method": None, "checkpoint": "base", "step": 0,
        "trainable": 0, "total": 1_000_000,
        "datasets": {"rte": dataset(0.5, 0.49), "cb": dataset(0.25, 0.26, chance=1 / 3)},
        "average": {"median": 0.375, "mean": 0.375, "chance": 5 / 12},
        "tasks": {"rte_b": task("rte", 0.5), "cb_a": task("cb", 0.25), "rte_a": task("rte", 0.48)},
    }  # fmt: skip


@pytest.fixture
def mov():
    return {
        "name": "mov-10", "method": "mov", "checkpoint": "runs/mov", "step": 300,
        "base": "/bases/b.safetensors", "dtype": "bfloat16",
        "trainable": 3_200, "total": 1_000_000,
        "datasets": {"rte": dataset(0.55, 0.5412, examples=1000)},
        "average": {"median": 0.55, "mean": 0.5412, "chance": 0.5},
        "tasks": {"rte_a": task("rte", 0.55, empty_input=3)},
    }  # fmt: skip


def tables(*runs):
    """Returns first cell -> other cells of the rows, for every table."""
    markdown = result_tables.results_markdown({"runs": list(runs)})
    parts = [part for part in markdown.split("\n\n") if part.startswith("|")]
    cells = [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in part.split("\n")]
        for part in parts
    ]
    return [{row[0]: row[1:] for row in table} for table in cells]


def test_cells(base, mov):
    medians, means, _, checkpoints = tables(base, mov)
    assert medians["run"] == ["method", "trainable", "rte", "cb", "average"]
    assert medians["base"] == ["–", "0 %", "50.0", "25.0", "37.5"]
    assert medians["mov-10"] == ["mov", "0.32 %", "55.0", "–", "55.0 †"]  # not evaluated on cb
    assert medians["chance"] == ["", "", "50.0", "33.3", "41.7"]
    assert medians["prompts"] == ["", "", "2", "2", ""]
    assert medians["examples"] == ["", "", "100–1,000", "100", ""]
    assert means["base"] == ["49.0", "26.0", "37.5"]
    assert means["mov-10"] == ["54.1", "–", "54.1 †"]
    assert checkpoints["base"] == ["base", "–", "–", "0"]  # results of an older version
    assert checkpoints["mov-10"] == ["runs/mov", "/bases/b.safetensors", "bfloat16", "300"]


def test_accuracies_per_length_have_a_table_where_a_run_has_some(base, mov):
    for name, accuracy in {"rte_b": 0.2, "rte_a": 0.4, "cb_a": 0.5}.items():
        base["tasks"][name] |= {"acc_norm": accuracy, "acc_bytes": accuracy + 0.1}
    mov["tasks"]["rte_a"]["acc_tokens"] = 0.25
    _, _, table, _, _ = tables(base, mov)
    assert table["run"] == ["log-likelihood", "rte", "cb", "average"]
    # the last row of a run: the median of 0.3 and 0.5, and 0.6; (0.4 + 0.6) / 2
    assert table["base"] == ["per byte (acc_bytes)", "40.0", "60.0", "50.0"]
    assert table["mov-10"] == ["per token (acc_tokens)", "25.0", "–", "25.0 †"]


def test_shots_have_columns_where_a_run_has_some(base, mov):
    mov["shots"] = 3
    mov["datasets"]["rte"]["shots_left_out"] = mov["tasks"]["rte_a"]["shots_left_out"] = 1234
    medians, _, prompts, _ = tables(base, mov)
    assert medians["run"] == ["method", "trainable", "shots", "rte", "cb", "average"]
    assert (medians["base"][2], medians["mov-10"][2]) == ("0", "3")
    assert medians["shots left out"] == ["", "", "", "1,234", "–", ""]
    assert medians["examples"] == ["", "", "", "100–1,000", "100", ""]
    assert prompts["dataset"][3] == "shots left out"
    text = result_tables.results_markdown({"runs": [base, mov]})
    cells = next(line for line in text.split("\n") if " rte_a " in line).split("|")
    assert [cell.strip() for cell in cells[3:6]] == ["validation", "50", "1,234"]


def test_prompts_and_odd_examples(base, mov):
    text = result_tables.results_markdown({"runs": [base, mov]})
    lines = [line for line in text.split("\n") if line.startswith(("| rte ", "| cb "))]
    # Datasets in the order of the first run, then prompts by name.
    assert [line.split("|")[2].strip() for line in lines] == ["rte_a", "rte_b", "cb_a"]
    assert [cell.strip() for cell in lines[0].split("|")[3:-1]] == [
        "validation", "50", "50.0", "48.0", "55.0",
    ]  # fmt: skip
    assert "- rte_a: empty input 3" in text
    assert "- rte_b" not in text


def test_a_model_that_always_gives_the_same_answer_is_flagged(base, mov):
    base["tasks"]["rte_b"]["same_answer"] = "'yes'"
    base["tasks"]["cb_a"]["same_answer"] = "choice 1"
    text = result_tables.results_markdown({"runs": [base, mov]})
    note = "base gives the same answer to every example of 2 of 3 prompts: rte_b ('yes'), cb_a"
    assert text.count(f"{note} (choice 1)") == 1 and "mov-10 gives" not in text


def test_runs_with_equal_names_have_different_labels(mov):
    medians, *_ = tables(mov, {**mov, "step": 600})
    assert {"mov-10 (step 300)", "mov-10 (step 600)"} <= set(medians)
    medians, *_ = tables(mov, {**mov, "checkpoint": "runs/other"})
    assert "mov-10 (step 300) (checkpoint runs/other)" in medians


@pytest.mark.parametrize("width", [200, 60])
def test_print_results(base, mov, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    base["name"] = "base [/b]"  # rich would read it as markup
    for i in range(6):
        base["datasets"][f"data_set_{i}"] = dataset(0.1 * i, 0.1 * i)
    result_tables.print_results({"runs": [base, mov]})
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= width
    # Two tables, which are split on a narrow terminal.
    assert (out.count("base [/b]") == 2) == (width == 200)
    assert "mov-10" in out and "0.32 %" in out and "data_set_5" in out
    assert "† Average over the datasets" in out
