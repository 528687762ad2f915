"""`pemoe report`: rows of several runs: seeds, costs and step times, zero and few shots."""

import csv
import io
import json
from pathlib import Path

from report_results import EIGHT, build, eight, load, printed, step_time, table, write

from pemoe_jax.analysis.zero_shot import bar_chart, paper_table, paper_table_formats
from pemoe_jax.tools import report

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
    assert "dots: single seeds" in panels[-1]


# --- costs ---

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
