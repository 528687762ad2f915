"""`pemoe report`: the table by hand, intervals, marks, files, and wrong input."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from report_results import EIGHT, build, eight, printed, step_time, table, write

from pemoe_jax.analysis import published_numbers
from pemoe_jax.analysis.zero_shot import bar_chart, paper_table, paper_table_formats
from pemoe_jax.tools import report

PNG = b"\x89PNG\r\n\x1a\n"


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
        (lambda run: run["tasks"]["cb_a"].update(accuracy="x"), "'accuracy' to be a number"),
        (lambda run: run["tasks"]["cb_a"].update(accuracy=60.0), "accuracy of 0 to 1"),
        (lambda run: run["tasks"]["cb_a"].pop("dataset"), "'dataset' to be text"),
        (lambda run: run.update(tasks={"a": 3}), "task 'a': expected an object, got 3"),
        (lambda run: run.update(trained_datasets="cb"), "list of names, got 'cb'"),
        (lambda run: run.update(trainable="1 %"), "'trainable' to be a .* 64-bit integer"),
        (lambda run: run.update(shots="5"), "'shots' to be a non-negative 64-bit integer"),
        (lambda run: run.update(shots=None), "'shots' to be a .* integer, got None"),
        (lambda run: run.update(checkpoint=["a"]), "'checkpoint' to be text, got \\['a'\\]"),
        (lambda run: run.update(settings={}), "'settings' to be text, got {}"),
        (lambda run: run.update(step=-1), "'step' to be a non-negative 64-bit integer, got -1"),
        (lambda run: run.update(flops=10**400), "'flops' to be a .* 64-bit integer, got 1000"),
        (lambda run: run["tasks"]["cb_a"].update(chance=math.nan), "a chance of 0 to 1, got nan"),
        (lambda run: run["tasks"]["cb_a"].update(shots_left_out="x"), "64-bit integer, got 'x'"),
        (lambda run: run["tasks"]["cb_a"].update(examples=1.5), "to be an integer, got 1.5"),
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
        (lambda run: run["tasks"]["cb_a"].update(examples=11), "cb_a.jsonl: .*11 pred.* 10 with"),
        (lambda run: run["tasks"]["cb_a"].update(accuracy=0.7), "0.7000, as in .* with 0.6000"),
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
    # Invalid UTF-8 outside of strings is a bad line; in a text, it does not concern the accuracy.
    file.write_bytes("\n".join(lines).encode().replace(b'"idx": 3', b'"idx": 3\xff'))
    assert report.main([str(tmp_path)]) == 1
    assert "cb_a.jsonl, line 4: expected" in capsys.readouterr().err
    file.write_bytes("\n".join(lines).encode().replace(b'"idx": 3', b'"x": "\xff", "idx": 3'))
    assert report.main([str(tmp_path)]) == 0
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
        (["{}", "--gin.RUN=3"], "--gin.RUN: this command takes no gin settings"),
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
