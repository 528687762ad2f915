"""`pemoe report`: the table by hand, intervals, marks, seeds, files, and wrong input."""

import csv
import io
import json
import math
import re
import types
from pathlib import Path

import pytest
import sparse_models
from methods import CONFIG, METHODS

from pemoe_jax import evaluate
from pemoe_jax.analysis import published_numbers
from pemoe_jax.analysis.zero_shot import bar_chart, paper_table, paper_table_formats
from pemoe_jax.analysis.zero_shot import results as results_lib
from pemoe_jax.core import network, params
from pemoe_jax.tools import report

PNG = b"\x89PNG\r\n\x1a\n"
# Dataset of P3's tasks -> column of the paper.
EIGHT = {
    "anli": "ANLI",
    "cb": "CB",
    "rte": "RTE",
    "wsc.fixed": "WSC",
    "wic": "WiC",
    "copa": "COPA",
    "winogrande_winogrande_xl": "WNG",
    "hellaswag": "HS",
}


def write(folder: Path, runs: dict[str, dict[str, tuple[str, list[int]]]], **about) -> Path:
    """Writes an evaluation; `runs` is name -> task -> (dataset, 1 or 0 for each example)."""
    run_objects = []
    for name, answers in runs.items():
        tasks = {
            task: results_lib.task_result(
                list(map(bool, correct)), [0.5] * len(correct), dataset, "test", []
            )
            for task, (dataset, correct) in answers.items()
        }
        for task, (_, correct) in answers.items():
            lines = [json.dumps({"idx": i, "correct": bool(x)}) for i, x in enumerate(correct)]
            file = folder / "predictions" / name / f"{task}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
        run = {"name": name, "method": "mov", "variant": "mov-10", "checkpoint": f"runs/{name}"}
        run |= {"step": 5, "trainable": 32, "total": 10_000, **about}
        run_objects.append({**run, **results_lib.summarize(tasks), "tasks": tasks})
    (folder / "results.json").write_text(json.dumps({"runs": run_objects}))
    return folder


def eight(correct: int) -> dict[str, tuple[str, list[int]]]:
    """Returns a prompt of each of the eight datasets; `correct` of ten answers are correct."""
    return {f"{name}_a": (name, [1] * correct + [0] * (10 - correct)) for name in EIGHT}


def printed(capsys, *flags) -> dict[str, dict[str, dict[str, str]]]:
    """Runs the command and returns title -> first cell of a row -> column -> cell."""
    assert report.main([*map(str, flags), "--format=markdown"]) == 0, capsys.readouterr().err
    printed_tables: dict[str, dict[str, dict[str, str]]] = {}
    for part in capsys.readouterr().out.split("## ")[1:]:
        title, *lines = part.splitlines()
        rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
        columns, _rule, *rows = rows
        printed_tables[title] = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    return printed_tables


def table(printed_tables: dict, measure: str) -> dict[str, dict[str, str]]:
    return next(
        rows
        for title, rows in printed_tables.items()
        if title.startswith("Zero-shot") and measure in title
    )


# --- the table ---


def test_mmlu_is_a_column_over_its_subjects(tmp_path, capsys):
    answers = {"astronomy": [1, 1, 1, 0], "virology": [1], "sociology": [0, 0]}
    tasks = {
        f"mmlu_{subject}_score_eval": (f"mmlu_{subject}", correct)
        for subject, correct in answers.items()
    }
    output = printed(capsys, write(tmp_path, {"mov": tasks}))
    assert table(output, "mean")["mov"]["MMLU"] == "58.3"  # (75 + 100 + 0) / 3
    assert table(output, "median")["mov"]["MMLU"] == "75.0"


def test_columns_of_the_paper_in_its_order(tmp_path, capsys):
    write(tmp_path, {"first": eight(6)})
    medians = table(printed(capsys, tmp_path), "median")
    assert list(medians["first"]) == ["run", "method", "parameters", *EIGHT.values(), "average"]
    assert list(EIGHT.values()) == list(published_numbers.COLUMNS)
    assert medians["first"]["method"] == "mov-10"
    assert medians["first"]["parameters"] == "0.32 %"  # 32 / 10,000
    assert {medians["first"][column] for column in EIGHT.values()} == {"60.0"}
    assert medians["chance"]["average"] == "50.0"


def test_medians_means_and_anli_by_hand(tmp_path, capsys):
    """ANLI: prompts of three rounds together, whether the rounds are datasets or not."""
    answers = {
        "anli_a_r1": ("anli", [1, 1, 1, 1, 0]),  # 0.8
        "anli_b_r1": ("anli_r1", [0, 0, 0, 0, 0]),  # 0
        "anli_a_r2": ("anli_r2", [1, 1, 0, 0, 0]),  # 0.4
        "anli_a_r3": ("anli_r3", [1, 1, 1, 1, 1]),  # 1: median 0.6, mean 0.55
        "cb_a": ("cb", [1, 1, 0, 0, 0]),  # 0.4
        "cb_b": ("cb", [0, 0, 0, 1, 1]),  # 0.4
        "cb_c": ("cb", [0, 0, 0, 0, 1]),  # 0.2
        "cb_d": ("cb", [1, 1, 1, 1, 1]),  # 1: median 0.4, mean 0.5
        "mine_a": ("my_data", [1, 0]),  # 0.5, not in the average
    }
    output = printed(capsys, write(tmp_path, {"first": answers}))
    medians, means = table(output, "median"), table(output, "mean")
    columns = ["run", "method", "parameters", "ANLI", "CB", "average", "my_data"]
    assert list(medians["first"]) == columns
    assert [medians["first"][c] for c in columns[3:]] == ["60.0", "40.0", "50.0", "50.0"]
    assert [means["first"][c] for c in columns[3:]] == ["55.0", "50.0", "52.5", "50.0"]
    assert [medians["prompts"][c] for c in columns[3:]] == ["4", "4", "", "1"]
    assert [medians["examples"][c] for c in columns[3:]] == ["20", "20", "", "2"]


def test_other_datasets_are_averaged_without_the_papers(tmp_path, capsys):
    write(tmp_path, {"first": {"b_1": ("b", [1, 0]), "a_1": ("a", [1, 1])}})
    medians = table(printed(capsys, tmp_path), "median")
    assert list(medians["first"])[3:] == ["a", "b", "average"]
    assert medians["first"]["average"] == "75.0"


def test_a_partial_average_is_marked(tmp_path, capsys):
    write(tmp_path, {"whole": eight(6), "part": {"cb_a": ("cb", [1, 0])}})
    output = printed(capsys, tmp_path)
    assert table(output, "median")["whole"]["average"] == "60.0"
    assert table(output, "median")["part"]["average"] == "50.0 †"
    assert table(output, "median")["part"]["RTE"] == "–"
    assert table(output, "median")["examples"]["CB"] == "2–10"
    assert output["Prompts / examples of each run"]["part"]["CB"] == "1 / 2"


def test_datasets_trained_on_are_marked(tmp_path, capsys):
    write(tmp_path, {"first": eight(6)}, trained_datasets=["wsc.fixed", "not evaluated"])
    row = table(printed(capsys, tmp_path), "median")["first"]
    assert [column for column, cell in row.items() if "*" in cell] == ["WSC", "average"]
    scores = json.loads(paper_table_formats.to_json(build(tmp_path)))["rows"][0]["scores"]
    assert scores["WSC"]["trained"] is True and scores["CB"]["trained"] is False


def test_training_datasets_may_be_unknown(tmp_path):
    write(tmp_path, {"first": eight(6)})
    assert (
        "trained"
        not in json.loads(paper_table_formats.to_json(build(tmp_path)))["rows"][0]["scores"]["WSC"]
    )


def test_runs_are_merged_and_selected(tmp_path, capsys):
    first = write(tmp_path / "a", {"x": eight(6), "y": eight(7)})
    second = write(tmp_path / "b", {"x": eight(8)})  # replaces x of the first
    other = write(tmp_path / "c", {"x": eight(9)}, step=10)
    medians = table(printed(capsys, first, second / "results.json", other), "median")
    averages = {name: row["average"] for name, row in medians.items()}
    assert averages["x (step 5)"] == "80.0" and averages["x (step 10)"] == "90.0"
    assert set(table(printed(capsys, first, "--only=y"), "median")) >= {"y", "chance"}
    assert "x" not in table(printed(capsys, first, "--only=y"), "median")


def test_an_older_evaluation_has_no_variant(tmp_path, capsys):
    write(tmp_path, {"first": eight(6)}, variant=None, trainable=None)
    row = table(printed(capsys, tmp_path), "median")["first"]
    assert (row["method"], row["parameters"]) == ("mov", "–")


# --- intervals ---


def load(folder: Path) -> list[dict]:
    return results_lib.load_results(str(folder))["runs"]


def build(folder: Path, **flags) -> paper_table.PaperTable:
    return paper_table.build_paper_table(load(folder), **flags)


def test_intervals_in_the_table(tmp_path, capsys):
    sure = {"cb_a": ("cb", [1] * 10), "rte_a": ("rte", [1, 0] * 50)}
    output = printed(capsys, write(tmp_path, {"first": sure}))
    medians = output["95 % interval of the median"]["first"]
    assert medians["CB"] == "100.0–100.0"
    low, high = map(float, medians["RTE"].split("–"))
    assert 39 <= low <= 42 and 58 <= high <= 61  # 50 ± 1.96 · 5
    low, high = map(float, medians["average"].split("–"))
    assert 69.5 <= low <= 71 and 79 <= high <= 80.5  # 75 ± 1.96 · 5 / 2
    assert not any("interval" in title for title in printed(capsys, tmp_path, "--draws=0"))


def test_missing_predictions_leave_intervals_out(tmp_path, capsys):
    write(tmp_path, {"first": eight(6), "second": eight(5)})
    (tmp_path / "predictions" / "first" / "cb_a.jsonl").unlink()
    output = printed(capsys, tmp_path)["95 % interval of the median"]
    assert output["first"]["CB"] == output["first"]["average"] == "–"
    assert output["first"]["RTE"] != "–" and output["second"]["average"] != "–"
    report.main([str(tmp_path), "--format=markdown"])
    assert "predictions are missing: first." in capsys.readouterr().out


# --- seeds ---


def seeded(
    folder: Path, correct_by_seed: dict[int, int], settings: str = "abc", **about
) -> list[Path]:
    """Writes an evaluation for each seed; the given number of ten answers is correct."""
    return [
        write(
            folder / f"{settings}{seed}",
            {f"first-seed{seed}": eight(correct)},
            **{"seed": seed, "settings": settings, **about},
        )
        for seed, correct in correct_by_seed.items()
    ]


def test_runs_that_differ_by_seed_are_a_row(tmp_path, capsys):
    """Mean 60, deviation (n - 1) sqrt((100 + 0 + 100) / 2) = 10."""
    folders = seeded(tmp_path, {0: 5, 1: 6, 4: 7})
    other = write(tmp_path / "other", {"second": eight(9)})
    output = printed(capsys, *folders, other)
    medians, means = table(output, "median"), table(output, "mean")
    assert list(medians) == ["first", "second", "chance", "prompts", "examples"]
    for column in ("CB", "average"):
        assert medians["first"][column] == means["first"][column] == "60.0 ±10.0"
        assert medians["second"][column] == "90.0"
    assert (medians["first"]["seeds"], medians["second"]["seeds"]) == ("3", "1")
    by_seed = output["Average of the medians, seed by seed"]
    assert list(by_seed) == ["first"]
    assert by_seed["first"] == {
        "run": "first",
        "seed 0": "50.0",
        "seed 1": "60.0",
        "seed 4": "70.0",
    }
    low, high = map(float, output["95 % interval of the median"]["first"]["CB"].split("–"))
    assert low < 60 < high  # the same draws of examples for all seeds
    assert high - low > 40  # ten examples: 2 · 1.96 · sqrt(0.24 / 10) = 61 for each seed


def test_seeds_in_csv_and_json(tmp_path):
    runs = [run for folder in seeded(tmp_path, {0: 5, 1: 8}) for run in load(folder)]
    report_table = paper_table.build_paper_table(runs)
    (line,) = csv.DictReader(io.StringIO(paper_table_formats.to_csv(report_table)))
    (row,) = json.loads(paper_table_formats.to_json(report_table))["rows"]
    assert line["run"] == row["run"] == "first"
    assert line["CB"] == "65.0" and row["scores"]["CB"]["median"] == 65.0
    # 15 · sqrt(2) = 21.2132
    assert line["CB_median_sd"] == "21.2132" and row["average"]["mean_sd"] == 21.2132
    assert (line["average_mean_least"], line["average_mean_greatest"]) == ("50.0", "80.0")
    assert row["seeds"] == [0, 1] and line["seeds"] == "0 1"
    assert row["average"]["median_seeds"] == [50.0, 80.0]
    assert "; " in line["checkpoint"]


def test_runs_that_are_not_grouped(tmp_path):
    def names(*folders: Path, **flags) -> list[str]:
        runs = [run for folder in folders for run in load(folder)]
        return [row.name for row in paper_table.build_paper_table(runs, draws=0, **flags).rows]

    first = seeded(tmp_path / "1", {0: 5, 1: 6})
    assert names(*first) == ["first"]
    assert names(*first, seeds_apart=True) == ["first-seed0", "first-seed1"]
    assert names(first[0]) == ["first-seed0"]
    # Other settings, another step, results of an older version, the same seed twice, other tasks.
    assert len(names(*first, *seeded(tmp_path / "2", {2: 5}, settings="b"))) == 2
    assert len(names(*first, *seeded(tmp_path / "3", {2: 5}, step=6))) == 2
    assert len(names(*first, *seeded(tmp_path / "4", {2: 5}, seed=None))) == 2
    again = seeded(tmp_path / "5", {1: 9}, checkpoint="elsewhere")
    assert len(names(*first, *again)) == 3
    part = write(tmp_path / "6", {"first-seed2": {"cb_a": ("cb", [1, 0])}}, seed=2, settings="abc")
    assert len(names(*first, part)) == 2


def test_rows_with_equal_names_have_different_labels(tmp_path, capsys):
    first, second = (
        seeded(tmp_path, {0: 5, 1: 6}),
        seeded(tmp_path, {0: 7, 1: 8}, settings="b", step=7),
    )
    medians = table(printed(capsys, *first, *second), "median")
    assert medians["first (step 5)"]["average"] == "55.0 ±7.1"
    assert medians["first (step 7)"]["average"] == "75.0 ±7.1"


def test_seeds_are_dots_on_their_bar(tmp_path, monkeypatch):
    panels = []

    def save_figure(figure, png):
        for axis in figure.axes:
            dots = [point.get_offsets().tolist() for point in axis.collections]
            panels.append((axis.get_title(loc="left"), dots, [b.get_width() for b in axis.patches]))
        panels.append(figure.texts[-1].get_text())

    monkeypatch.setattr(bar_chart.plots, "save_figure", save_figure)
    runs = [run for folder in seeded(tmp_path, {0: 5, 1: 8}) for run in load(folder)]
    paper_table_formats.draw_bars(paper_table.build_paper_table(runs, draws=10), tmp_path / "a.png")
    title, dots, widths = panels[0]
    assert title == "ANLI" and widths == [65.0]
    assert dots == [[[50.0, 0.0], [80.0, 0.0]]]
    assert "dots: seeds" in panels[-1]


# --- published rows ---


def test_with_paper(tmp_path, capsys):
    write(tmp_path, {"part": {"cb_a": ("cb", [1, 0])}})
    output = printed(capsys, tmp_path, "--with_paper")
    medians, means = table(output, "median"), table(output, "mean")
    assert list(medians["part"])[3:] == [*published_numbers.COLUMNS, "average"]
    assert medians["part"]["average"] == "50.0 †"  # the paper's is over eight
    assert medians["paper 3B mov-30"]["average"] == "60.6"
    assert medians["paper 3B mov-30"]["parameters"] == "0.68 %"
    assert means["T0 3B"]["CB"] == "45.4" and means["T0 3B"]["average"] == "–"
    assert "T0 3B" not in medians and "paper 3B mov-30" not in means
    report.main([str(tmp_path), "--with_paper"])
    out = " ".join(capsys.readouterr().out.split())
    assert "arXiv 2309.05444" in out and published_numbers.PAPER_SOURCE in out


def test_published_rows_have_a_source_and_agree_with_the_shares():
    for row in published_numbers.ROWS:
        assert row.source and row.measure in paper_table.MEASURES
        assert set(row.accuracies) <= set(published_numbers.COLUMNS)
        assert row.accuracies or row.average is not None
    assert len({row.name for row in published_numbers.ROWS}) == len(published_numbers.ROWS)
    shares = {
        method: share
        for (base, method, _), share in published_numbers.TRAINABLE_SHARES.items()
        if base < 3e9
    }
    for row in published_numbers.ROWS:
        if row.method in shares:
            assert row.share == shares[row.method]


COSTS = "Costs, and the average of the medians"


def test_dense_and_sparse_runs_are_in_one_table_of_costs(tmp_path, capsys):
    """Older evaluations did not record what a token uses."""
    folders = [tmp_path / name for name in ("mov", "flan", "old")]
    sizes = {"used": 10_000, "flops": 1_230_000, "flops_with_places": 1_230_000}
    write(folders[0], {"mov": eight(6)}, **sizes)
    other = {"total": 50_000, "trainable": 50_000, "flops_with_places": 2_000_000}
    flan = {**sizes, **other, "variant": "flan_switch-8 top-1"}
    write(folders[1], {"flan": eight(5)}, **flan)
    write(folders[2], {"old": eight(5)})
    assert COSTS not in printed(capsys, folders[2])
    dense = printed(capsys, folders[0], folders[2])[COSTS]
    assert [*dense["mov"].items()][1:] == [
        *(("method", "mov-10"), ("trainable", "32"), ("file", "128 B"), ("total", "10,000")),
        *(("FLOPs", "1.23 M"), ("average", "60.0")),
    ]
    rows = printed(capsys, *folders)[COSTS]
    assert [*rows["flan"].values()][1:] == [
        *(
            "flan_switch-8 top-1",
            "50,000",
            "200 kB",
            "50,000",
            "10,000",
            "1.23 M",
            "2.00 M",
            "50.0",
        ),
    ]
    assert rows["mov"]["activated"] == "10,000" and rows["old"]["activated"] == "–"


def csv_text(*folders: Path) -> str:
    runs = [run for folder in folders for run in load(folder)]
    return paper_table_formats.to_csv(paper_table.build_paper_table(runs, draws=0))


def step_time(seconds: float, device: str = "A", batch: str = "8 × (16 + 8)") -> dict:
    return {"seconds": seconds, "device": device, "batch": batch}


def test_step_times(tmp_path, capsys):
    """Mean 0.2 s, deviation sqrt((0.01 + 0 + 0.01) / 2) = 0.1; a run without them has none."""
    folders = [
        seeded(tmp_path, {seed: 6}, step_times=[step_time(0.1 + 0.1 * seed)])[0]
        for seed in (0, 1, 2)
    ]
    folders.append(write(tmp_path / "old", {"old": eight(5)}))
    rows = printed(capsys, *folders)[COSTS]
    assert rows["first"]["step time"] == "200 ms ±100 ms" and rows["first"]["seeds"] == "3"
    assert rows["old"]["step time"] == "–" and "device" not in rows["old"]
    report.main([*map(str, folders)])
    assert "device A; batch 8 × (16 + 8)." in " ".join(capsys.readouterr().out.split())
    # A run that went on on another machine, and a third machine.
    both = [{**step_time(0.3), "memory": 1_500_000}, step_time(1.25, "B")]
    more = {"step_times": both, "evaluation_seconds": 2.25}
    folders.append(write(tmp_path / "moved", {"moved": eight(5)}, **more))
    rows = printed(capsys, *folders)[COSTS]
    assert rows["moved"]["peak memory"] == "1.50 MB / –" and rows["old"]["peak memory"] == "–"
    assert rows["moved"]["evaluation"] == "2.2 s" and rows["first"]["evaluation"] == "–"
    assert rows["moved"]["step time"] == "300 ms / 1.25 s" and rows["moved"]["device"] == "A / B"
    assert rows["first"]["device"] == "A" and rows["old"]["device"] == "–"
    assert "batch" not in rows["first"]
    report.main([*map(str, folders)])
    assert "not comparable" in capsys.readouterr().out
    report_table = paper_table.build_paper_table([run for f in folders for run in load(f)], draws=0)
    lines = list(csv.DictReader(io.StringIO(paper_table_formats.to_csv(report_table))))
    by_run = {line["run"]: (line["step_seconds"], line["device"]) for line in lines}
    assert by_run == {"first": ("0.2", "A"), "old": ("", ""), "moved": ("0.3; 1.25", "A; B")}
    assert lines[0]["step_seconds_sd"] == "0.1"
    by_run = {
        row["run"]: row for row in json.loads(paper_table_formats.to_json(report_table))["rows"]
    }
    assert by_run["moved"]["step_times"] == both and "step_times" not in by_run["old"]
    assert by_run["first"]["step_times"] == [
        {**step_time(0.2), "sd": 0.1, "seeds": [0.1, 0.2, 0.3]},
    ]


# --- solved examples in the input ---


def test_zero_and_few_shots_of_a_run_are_a_row(tmp_path, capsys):
    """Nothing is averaged over both; a run with one of them has blanks in the other's columns."""
    zero = write(tmp_path / "0", {"a": eight(6), "b": eight(5)})
    few = {f"{name}_a": (name, [1] * 9 + [0]) for name in ("cb", "mine")}
    five = write(tmp_path / "5", {"a": few, "c": few}, shots=5)
    file = five / "results.json"
    contents = json.loads(file.read_text())
    for run in contents["runs"]:
        run["tasks"]["cb_a"]["shots_left_out"] = 7
    file.write_text(json.dumps(contents))
    output = printed(capsys, zero, five)
    medians = output["Accuracy in %: median over the prompts of a dataset"]
    columns = [*EIGHT.values(), "average", "CB 5-shot", "average 5-shot", "mine 5-shot"]
    assert list(medians["a"])[3:] == columns and list(medians)[:3] == ["a", "b", "c"]
    assert [medians["a"][c] for c in columns[-5:]] == ["60.0", "60.0", "90.0", "90.0", "90.0"]
    assert [medians["b"][c] for c in columns[-4:]] == ["50.0", "–", "–", "–"]
    assert [medians["c"][c] for c in columns[-4:]] == ["–", "90.0", "90.0", "90.0"]
    assert medians["chance"]["CB 5-shot"] == "50.0"
    assert (medians["shots left out"]["CB"], medians["shots left out"]["CB 5-shot"]) == ("–", "7")
    assert output["95 % interval of the median"]["b"]["CB 5-shot"] == "–"
    report_table = paper_table.build_paper_table(load(zero) + load(five), draws=0)
    note = "over different datasets"
    assert note in paper_table_formats.to_json(report_table)
    assert note not in paper_table_formats.to_json(build(five))
    lines = list(csv.DictReader(io.StringIO(paper_table_formats.to_csv(report_table))))
    assert (lines[0]["CB"], lines[0]["CB_5_shots"], lines[0]["average_5_shots"]) == (
        *("60.0", "90.0", "90.0"),
    )
    assert lines[1]["CB_5_shots"] == lines[2]["CB"] == ""
    contents = json.loads(paper_table_formats.to_json(report_table))
    shots = {"shots": 5, "shots_seed": 0}
    assert contents["few_shot"] == [{**shots, "columns": ["CB", "mine"], "averaged": ["CB"]}]
    rows = contents["rows"]
    assert rows[0]["few_shot"][0]["scores"]["mine"]["median"] == 90.0
    assert rows[0]["average"]["median"] == 60.0 and "few_shot" not in rows[1]
    assert rows[2]["scores"] == {} and rows[2]["few_shot"][0]["complete"]


def test_other_shots_are_other_columns_also_where_seeds_are_joined(tmp_path, capsys):
    """Of one seed without shots, two with three of them, and one with others drawn."""
    few = {"shots": 3, "shots_seed": 0}
    seeds = [{"seed": seed, "settings": "abc"} for seed in (0, 1)]
    folders = [
        write(tmp_path / name, {"mov": eight(correct)}, **about)
        for name, correct, about in (
            ("zero", 6, seeds[0]),
            ("few", 8, seeds[0] | few),
            ("few_1", 7, seeds[1] | few | {"checkpoint": "runs/mov_1"}),
            ("other", 9, seeds[0] | few | {"shots_seed": 1}),
        )
    ]
    output = printed(capsys, *folders, "--draws=0")
    row = output["Accuracy in %: median over the prompts of a dataset"]["mov"]
    averages = {name: cell for name, cell in row.items() if "average" in name}
    assert averages == {
        "average": "60.0",
        "average 3-shot": "75.0 ±7.1",
        "average 3-shot seed 1": "90.0",
    }
    assert row["seeds"] == "1 / 2 / 1"
    lines = list(csv.DictReader(io.StringIO(csv_text(*folders))))
    assert [line["average_3_shots_seed_1"] for line in lines] == ["90.0"]


def test_seeds_of_zero_and_few_shots(tmp_path, capsys):
    """Three seeds at 0 shots and two of them at 5: 60 ± 10, and 85 ± 7.1."""
    folders = seeded(tmp_path / "0", {0: 5, 1: 6, 2: 7}, used=10_000)
    folders += seeded(tmp_path / "5", {0: 8, 1: 9}, shots=5)
    output = printed(capsys, *folders)
    costs = output[COSTS]["first"]
    assert (costs["average"], costs["average 5-shot"]) == ("60.0 ±10.0", "85.0 ±7.1")
    assert costs["seeds"] == "3 / 2"
    by_seed = output["Average of the medians, seed by seed"]["first"]
    assert by_seed["seed 2"] == "70.0" and by_seed["seed 0 5-shot"] == "80.0"
    # Rows of single seeds are not joined to a row of their mean.
    apart = seeded(tmp_path / "again", {0: 5}, checkpoint="copy")
    runs = [run for folder in [*folders[:3], *apart, *folders[3:]] for run in load(folder)]
    rows = paper_table.build_paper_table(runs, draws=0).rows
    few = [row for row in rows if any(key.shots[0] for key in row.scores)]
    assert [{key.shots for key in row.scores} for row in few] == [{(5, 0)}] and len(rows) == 5


# --- files ---


def test_output(tmp_path, capsys):
    write(tmp_path, {"first": eight(6), "second": eight(5)}, trained_datasets=["cb"])
    folder = tmp_path / "new" / "report"
    assert report.main([str(tmp_path), "--with_paper", f"--output={folder}"]) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["report.csv", "report.json", "report.md", "report.png"]
    assert (folder / "report.png").read_bytes().startswith(PNG)
    assert "(report.png)" in (folder / "report.md").read_text()
    capsys.readouterr()
    for kind in ("csv", "json"):
        report.main([str(tmp_path), "--with_paper", f"--format={kind}"])
        assert capsys.readouterr().out == (folder / f"report.{kind}").read_text()


def test_csv_and_json_agree(tmp_path):
    write(
        tmp_path, {"first": eight(6), "part": {"cb_a": ("cb", [1, 0, 0])}}, trained_datasets=["cb"]
    )
    report_table = build(tmp_path, with_paper=True)
    lines = list(csv.DictReader(io.StringIO(paper_table_formats.to_csv(report_table))))
    rows = json.loads(paper_table_formats.to_json(report_table))["rows"]
    assert [line["run"] for line in lines] == [row["run"] for row in rows]
    assert list(lines[0])[:12] == [
        "run",
        "method",
        "parameters",
        *published_numbers.COLUMNS,
        "average",
    ]
    for line, row in zip(lines, rows, strict=True):
        assert float(line["parameters"]) == row["parameters"]
        for key in (*published_numbers.COLUMNS, "average"):
            score = row["average"] if key == "average" else row["scores"].get(key, {})
            assert line[key] == str(score.get("median", ""))
            assert line[f"{key}_mean"] == str(score.get("mean", ""))
            assert line[f"{key}_examples"] == str(score.get("examples", ""))
            assert line[f"{key}_trained"] == (
                str(int(score["trained"])) if "trained" in score else ""
            )
            low, high = score.get("median_interval", ("", ""))
            assert (line[f"{key}_median_low"], line[f"{key}_median_high"]) == (str(low), str(high))
    assert [line["complete"] for line in lines[:3]] == ["1", "0", ""]
    assert lines[1]["CB"] == "33.3333"


def test_bars(tmp_path, monkeypatch):
    """Each known value has a bar of its length, hatched if the run was trained on the dataset."""
    panels = []

    def save_figure(figure, png):
        for axis in figure.axes:
            widths = [(round(bar.get_width(), 1), bar.get_hatch()) for bar in axis.patches]
            panels.append((axis.get_title(loc="left"), widths, [t.get_text() for t in axis.texts]))

    monkeypatch.setattr(bar_chart.plots, "save_figure", save_figure)
    write(tmp_path, {"first": eight(6), "part": {"cb_a": ("cb", [1, 0])}}, trained_datasets=["cb"])
    paper_table_formats.draw_bars(build(tmp_path, draws=10), tmp_path / "a.png")
    by_title = {title: (widths, texts) for title, widths, texts in panels}
    assert list(by_title) == [*published_numbers.COLUMNS, "average"]
    assert by_title["CB"] == ([(60.0, "////"), (50.0, "////")], ["60.0", "50.0"])
    assert by_title["RTE"] == ([(60.0, None)], ["60.0", "–"])
    assert by_title["average"][1] == ["60.0", "50.0 †"]


# --- the terminal ---


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    runs = {"mov-30 [seed/0]": eight(6), "a_run_of_a_long_name": eight(7)}
    write(tmp_path, runs, trained_datasets=["cb"])
    assert report.main([str(tmp_path), "--with_paper"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "mov-30 [seed/0]" in out  # rich would read it as markup
    for column in (*published_numbers.COLUMNS, "average"):
        assert re.search(rf"\b{column}\b", out)


# --- wrong input ---


def broken(folder: Path, change) -> str:
    write(folder, {"first": eight(6)})
    file = folder / "results.json"
    results = json.loads(file.read_text())
    change(results["runs"][0])
    file.write_text(json.dumps(results))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("tasks"), "'tasks' to be an object, got None"),
        (lambda run: run.update(tasks={}), "at least one task"),
        (lambda run: run.pop("name"), "'name' to be text"),
        (lambda run: run["tasks"]["cb_a"].update(accuracy="x"), "task 'cb_a': .*'accuracy'"),
        (lambda run: run["tasks"]["cb_a"].update(accuracy=60.0), "accuracy of 0 to 1"),
        (lambda run: run["tasks"]["cb_a"].pop("dataset"), "'dataset' to be text"),
        (lambda run: run.update(tasks={"a": 3}), "task 'a': expected an object, got 3"),
        (lambda run: run.update(trained_datasets="cb"), "list of names, got 'cb'"),
        (lambda run: run.update(trainable="1 %"), "'trainable' to be a number"),
        (lambda run: run.update(shots="5"), "'shots' to be a number"),
        (lambda run: run.update(shots=None), "'shots' to be a number, got None"),
        (lambda run: run.update(checkpoint=["a"]), "'checkpoint' to be text, got \\['a'\\]"),
        (lambda run: run.update(settings={}), "'settings' to be text, got {}"),
        (lambda run: run.update(step=-1), "'step' to be a number, got -1"),
        (lambda run: run.update(flops=10**400), "'flops' to be a number, got 1000"),
        (lambda run: run["tasks"]["cb_a"].update(chance=math.nan), "a chance of 0 to 1, got nan"),
        (lambda run: run["tasks"]["cb_a"].update(shots_left_out="x"), "a number of shots, got 'x'"),
        (
            lambda run: run.update(step_times=[step_time(math.inf)]),
            "step_times: expected positive 'seconds', got inf",
        ),
        (lambda run: run.update(tasks={"a": {"metrics": {}}}), "got those of `pemoe infer`"),
        (lambda run: run.update(step_times=3), "'step_times' to be a list, got 3"),
        (
            lambda run: run.update(evaluation_seconds=-1),
            "'evaluation_seconds' to be a time, got -1",
        ),
        (
            lambda run: run.update(step_times=[{**step_time(1.0), "memory": -3}]),
            "expected 'memory' in bytes, got -3",
        ),
        (lambda run: run.update(step_times=[{"seconds": 3}]), "step_times: .*'device' to be text"),
        (lambda run: run["tasks"]["cb_a"].update(examples=11), "cb_a.jsonl: .*11 with .* 10 with"),
        (lambda run: run["tasks"]["cb_a"].update(accuracy=0.7), "0.7000, got 10 with 0.6000"),
    ],
)
def test_wrong_results_are_a_one_line_error(tmp_path, capsys, change, message):
    assert report.main([broken(tmp_path, change)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


def test_a_broken_prediction_names_its_line(tmp_path, capsys):
    write(tmp_path, {"first": eight(6)})
    file = tmp_path / "predictions" / "first" / "cb_a.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], '{"idx": 3, "cor', *lines[4:]]))
    assert report.main([str(tmp_path)]) == 1
    assert "cb_a.jsonl, line 4: expected" in capsys.readouterr().err
    assert report.main([str(tmp_path), "--draws=0"]) == 0
    for old, new in (('"idx": 3', '"idx": 0'), ('"idx": 3', '"idx": 1e999'), ("true", '"true"')):
        file.write_text("\n".join(lines).replace(old, new))
        assert report.main([str(tmp_path)]) == 1
        assert re.search("cb_a.jsonl(, line .)?: expected .*\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}/none"], "results.json.*No such file"),
        (["{}", "--only=mov"], "--only must be one of first, got mov"),
        (["{}", "--draws=-1"], "--draws must be at least 0, got -1"),
        (["{}", "--gin.RUN=3"], "--gin.RUN: report takes no gin flags"),
        (["{}", "--output={}/results.json"], "--output must be a folder, got .* is a file"),
        (["{}", "--output="], "--output: expected a path, got ''"),
    ],
)
def test_wrong_flags_are_a_one_line_error(tmp_path, capsys, flags, message):
    write(tmp_path, {"first": eight(6)})
    if flags == ["{}/none"]:
        (tmp_path / "none").mkdir()
    assert report.main([flag.format(tmp_path) for flag in flags]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


# --- what `pemoe evaluate` records for the report ---


@pytest.mark.parametrize(
    ("trained", "expected"),
    [(["rte", "imdb", "cb"], ["cb", "rte"]), ([], []), (None, None)],
)
def test_evaluate_records_variant_and_training_datasets(trained, expected):
    """Training datasets are limited to the evaluated ones, and omitted if they are unknown."""
    method = METHODS["mov"]
    record = types.SimpleNamespace(trained_datasets=trained, initial=None)
    opened = types.SimpleNamespace(
        model=network.Transformer(CONFIG, method.adapters(num_experts=3)),
        record=record,
        path="no run's",
        summary=lambda: {"name": "first", "method": "mov"},
    )
    about = evaluate.describe_run(opened, {"cb": {}, "rte": {}, "wic": {}})
    assert (about["method"], about["variant"]) == ("mov", "mov-3")
    assert about.get("trained_datasets") == expected
    assert "settings" not in about  # it has no folder with a config.gin
    shapes = params.flatten(network.param_shapes(opened.model))
    assert about["used"] == params.count(shapes) and about["flops"] == about["flops_with_places"]


def test_evaluate_records_step_times_up_to_the_checkpoint(tmp_path):
    (tmp_path / "checkpoint_20" / "record").mkdir(parents=True)
    line = {"train/step_seconds": 0.5, "device": "A", "batch": "8 × (16 + 8)"}
    lines = [json.dumps({"step": step, **line}) for step in (10, 20)]
    lines.append(json.dumps({"step": 30, **line, "train/step_seconds": 9.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    opened = types.SimpleNamespace(
        model=network.Transformer(CONFIG),
        record=types.SimpleNamespace(trained_datasets=None, initial=None),
        path=str(tmp_path),
        step=20,
        summary=lambda: {"name": "first", "method": "full"},
    )
    assert evaluate.describe_run(opened, {})["step_times"] == [step_time(0.5)]
    (tmp_path / "metrics.jsonl").unlink()
    assert evaluate.describe_run(opened, {})["step_times"] == []


def test_evaluate_records_what_a_token_of_a_sparse_model_uses():
    """3 of 4 experts of 3 · 16 · 20 parameters in two layers are not used."""
    model = sparse_models.model("switch")
    summary = {"name": "first", "method": "flan_switch"}
    opened = types.SimpleNamespace(model=model, record=None, path="", summary=summary.copy)
    about = evaluate.describe_run(opened, {})
    assert about["variant"] == "flan_switch-4 top-1"
    assert about["used"] == params.count(network.param_shapes(model)) - 2 * 3 * 960
    # Capacity factor 1 and one expert a token: as many places as tokens.
    assert about["flops"] == about["flops_with_places"]
