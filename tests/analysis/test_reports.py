import io
import json

import numpy as np
import pytest

from pemoe_jax.analysis import plots, tables
from pemoe_jax.core.errors import InputError

PNG = b"\x89PNG\r\n\x1a\n"


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


def rows(markdown):
    """Cells by the row's first cell, of each table."""
    parts = [part for part in markdown.split("\n\n") if part.startswith("|")]
    cells = [
        [[c.strip() for c in row.strip("|").split("|")] for row in p.split("\n")] for p in parts
    ]
    return [{row[0]: row[1:] for row in table} for table in cells]


def test_markdown(base, mov):
    medians, means, _, origins = rows(tables.to_markdown({"runs": [base, mov]}))
    assert medians["run"] == ["method", "trainable", "rte", "cb", "average"]
    assert medians["base"] == ["–", "0 %", "50.0", "25.0", "37.5"]
    assert medians["mov-10"] == ["mov", "0.32 %", "55.0", "–", "55.0 †"]  # it was not scored on cb
    assert medians["chance"] == ["", "", "50.0", "33.3", "41.7"]
    assert medians["prompts"] == ["", "", "2", "2", ""]
    assert medians["examples"] == ["", "", "100–1,000", "100", ""]
    assert means["base"] == ["49.0", "26.0", "37.5"]
    assert means["mov-10"] == ["54.1", "–", "54.1 †"]
    assert origins["base"] == ["base", "0", "–", "–"]  # of an older version
    assert origins["mov-10"] == ["runs/mov", "300", "/bases/b.safetensors", "bfloat16"]


def test_markdown_names_prompts_and_odd_examples(base, mov):
    text = tables.to_markdown({"runs": [base, mov]})
    lines = [line for line in text.split("\n") if line.startswith(("| rte ", "| cb "))]
    # by data set in the order met, then by name
    assert [line.split("|")[2].strip() for line in lines] == ["rte_a", "rte_b", "cb_a"]
    assert [cell.strip() for cell in lines[0].split("|")[3:-1]] == [
        "validation", "50", "50.0", "48.0", "55.0",
    ]  # fmt: skip
    assert "- rte_a: empty input 3" in text
    assert "- rte_b" not in text


def test_markdown_is_aligned_and_escapes(base):
    base["name"] = "a|b"
    text = tables.to_markdown({"runs": [base]})
    for part in text.split("\n\n"):
        if part.startswith("|"):
            assert len({len(line) for line in part.strip().split("\n")}) == 1
    assert "a\\|b" in text


def test_merge_keeps_the_last_of_equal_runs(base, mov):
    newer = {**mov, "average": {"median": 0.6, "mean": 0.6, "chance": 0.5}}
    merged = tables.merge([{"runs": [base, mov]}, {"runs": [newer]}])
    assert [run["name"] for run in merged["runs"]] == ["base", "mov-10"]
    assert merged["runs"][1]["average"]["median"] == 0.6


def test_runs_of_one_name_are_told_apart(mov):
    step = {**mov, "step": 600}
    seed = {**mov, "checkpoint": "runs/other"}
    (medians, *_) = rows(tables.to_markdown(tables.merge([{"runs": [mov, step]}])))
    assert {"mov-10 (step 300)", "mov-10 (step 600)"} <= set(medians)
    (medians, *_) = rows(tables.to_markdown(tables.merge([{"runs": [mov, seed]}])))
    assert "mov-10 (step 300) (checkpoint runs/other)" in medians


@pytest.mark.parametrize("results", [{}, {"runs": []}, [], {"runs": [{"name": "x"}]}])
def test_not_results(results):
    with pytest.raises(InputError, match="^results.*expected"):
        tables.to_markdown(results)


@pytest.mark.parametrize("width", [200, 60])
def test_print_table(base, mov, width):
    from rich.console import Console

    base["name"] = "base [/b]"  # not markup
    out = io.StringIO()
    for i in range(6):
        base["datasets"][f"data_set_{i}"] = dataset(0.1 * i, 0.1 * i)
    tables.print_table({"runs": [base, mov]}, Console(file=out, width=width))
    text = out.getvalue()
    assert "base [/b]" in text and "mov-10" in text and "0.32 %" in text
    assert max(map(len, text.split("\n"))) <= width
    # wide: a row a run; narrow: a row a data set
    first = [line.split()[0] for line in text.split("\n") if line.split()]
    assert ("mov-10" in first) == (width == 200)
    assert ("data_set_5" in first) == (width == 60)


@pytest.mark.parametrize(
    "part, whole, text",
    [
        (0, 10, "0 %"), (10, 10, "100 %"), (19, 100_000, "0.019 %"), (32, 10_000, "0.32 %"),
        (469, 10_000, "4.69 %"), (123, 1000, "12.3 %"), (1, 1_000_000, "0.0001 %"),
    ],
)  # fmt: skip
def test_share(part, whole, text):
    assert tables.share(part, whole) == text


def test_parameter_summary():
    trainable = {
        "encoder/layers_0/attention/key_adapter/vectors": np.zeros((2, 10, 4)),  # 80
        "encoder/layers_0/attention/key_adapter/router/kernel": np.zeros((4, 10)),  # 40
        "encoder/layers_0/mlp/gate_adapter/vectors": np.zeros((10, 8)),  # 80
        "encoder/layers_0/mlp/gate_adapter/router/kernel": np.zeros((8, 10)),  # 80
        "decoder/layers_0/mlp/gate_adapter/vectors": np.zeros((10, 8)),  # 80
    }
    frozen = {"a/kernel": np.zeros((100, 97)), "b/scale": np.zeros(())}  # 9700 + 1
    text = tables.parameter_summary(
        trainable, frozen, base="tiny", method="mov", extra={"steps": "300"}
    )
    assert text.split("\n") == [
        "base       tiny",
        "method     mov",
        "trainable  360 of 10,061 parameters (3.58 %), 5 of 7 arrays",  # 360 / 10061 = 0.03578
        "sites      key 80 · gate 160 · routers 120",
        "steps      300",
    ]


def test_parameter_summary_of_full_fine_tuning():
    text = tables.parameter_summary({"a": np.zeros(3)}, {}, base="tiny", method="full")
    assert "3 of 3 parameters (100 %), 1 of 1 arrays" in text
    assert "sites" not in text


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(monkeypatch):
    """What is drawn: (axis label, x, y) of each line, caught before the figure is closed."""
    drawn = []

    def catch(figure, png):
        for axis in figure.axes:
            drawn.extend((axis.get_ylabel(), *line.get_data()) for line in axis.get_lines())
        return save(figure, png)

    save = plots.save
    monkeypatch.setattr(plots, "save", catch)
    return drawn


def test_loss_curve(tmp_path, monkeypatch):
    drawn = lines_of(monkeypatch)
    first = write(
        tmp_path / "a.jsonl",
        {"step": 1, "loss": 3.0, "learning_rate": 0.1},
        {"step": 2, "loss": 9.0, "learning_rate": 0.1},
        {"step": 2, "loss": 2.0, "learning_rate": 0.2},  # went back to step 1: this one counts
        {"step": 2, "eval/loss": 2.5},
    )
    second = write(tmp_path / "b.jsonl", {"step": 1, "train/loss": float("nan")})
    second.write_text(second.read_text() + '{"step": 2, "lo')  # still being written
    png = plots.loss_curve({"one": first, "two": second}, tmp_path / "new" / "curve.png")
    assert png.read_bytes().startswith(PNG)
    assert [path.name for path in png.parent.iterdir()] == ["curve.png"]  # nothing left beside it
    found = [(label, list(x), list(y)) for label, x, y in drawn[:2]]
    assert found == [("loss", [1, 2], [3.0, 2.0]), ("loss", [2], [2.5])]
    assert [label for label, *_ in drawn] == ["loss", "loss", "loss", "learning rate"]


def test_running_mean():
    # width 1: means of (1, 2), (1, 2, 6), (2, 6), (6, 4), (4); the NaN is left out
    smooth = plots._running_mean(np.array([1.0, 2.0, 6.0, np.nan, 4.0]), 1)
    np.testing.assert_allclose(smooth, [1.5, 3.0, 4.0, 5.0, 4.0])


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"step": 1, "loss": 1}\nnope\n', "line 2: expected a JSON object"),
        ('{"loss": 1}\n', "line 1: expected"),
        ("[1]\n", "line 1: expected"),
        ("", "expected lines with"),
    ],
)
def test_unreadable_metrics(tmp_path, text, message):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        plots.loss_curve(file, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
    with pytest.raises(InputError, match="expected a file of metrics"):
        plots.loss_curve(tmp_path / "none.jsonl", tmp_path / "curve.png")


def test_routing_map(tmp_path):
    uniform, sharp = np.full(4, 0.25), np.array([1.0, 0.0, 0.0, 0.0])
    probs = {
        "encoder/layers_0/mlp/gate_adapter": {
            "imdb_a": uniform,
            "super_glue_rte_GPT_3_style": sharp,
        },
        "decoder/layers_1/encoder_decoder_attention/key": {"imdb_a": sharp},  # a task is missing
    }
    for fold in (4.0, None):
        png = plots.routing_map(probs, tmp_path / "map.png", seen={"imdb_a"}, fold=fold)
        assert png.read_bytes().startswith(PNG)


def test_routing_image():
    # log2 of the multiple of 1/E; the row between the tasks and a missing task stay empty
    image = plots._image({"a": [0.5, 0.25, 0.125, 0.125]}, ["a", None, "b"], 4)
    np.testing.assert_allclose(image[0], [1, 0, -1, -1])
    assert np.isnan(image[1:]).all()


def test_routing_lines():
    encoder = [f"encoder/layers_{i}/mlp/{site}" for i in range(2) for site in ("gate", "wo")]
    decoder = ["decoder/layers_0/mlp/gate", "decoder/layers_0/mlp/wo"]
    assert plots._lines(encoder + decoder, 5) == [encoder, decoder]
    assert plots._lines(encoder + decoder, 3) == [encoder[:2], encoder[2:], decoder]
    assert plots._lines(encoder, 1) == [[site] for site in encoder]
    many = [f"decoder/layers_0/mlp/{i}" for i in range(10)]
    assert list(map(len, plots._lines(many, 9))) == [5, 5]  # rather than 9 and 1


@pytest.mark.parametrize(
    "site, title",
    [
        ("decoder/layers_3/encoder_decoder_attention/key_adapter", "dec 3 · cross key"),
        ("decoder/layers_11/self_attention/value", "dec 11 · self value"),
        ("params/encoder/layers_0/mlp/gate_adapter/router/kernel", "enc 0 · gate"),
        ("anything else", "anything else"),
    ],
)
def test_site_title(site, title):
    assert plots._site_title(site) == title


@pytest.mark.parametrize("probs", [{}, {"s": {"a": [0.5, 0.5], "b": [1.0]}}, {"s": {"a": [[1.0]]}}])
def test_not_routing(tmp_path, probs):
    with pytest.raises(InputError, match="one length"):
        plots.routing_map(probs, tmp_path / "map.png")
