"""Loss curves and routing maps."""

import json

import matplotlib
import numpy as np
import pytest

from pemoe_jax.analysis import plots
from pemoe_jax.core.errors import InputError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def curves(monkeypatch):
    """The (label, steps, values) of all lines that are drawn."""
    save, curves = plots.save_figure, []

    def save_figure(figure, png):
        for axis in figure.axes:
            for line in axis.get_lines():
                curves.append((axis.get_ylabel(), *map(list, line.get_data())))
        return save(figure, png)

    monkeypatch.setattr(plots, "save_figure", save_figure)
    return curves


def test_names_are_no_formulas(tmp_path):
    title = r"mov_$JOB_$SEED \frac{ ^2 _"
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "train/loss": 9.8}\n')
    assert plots.loss_curve(metrics, tmp_path / "a.png", title=title).read_bytes()[:8] == PNG
    matplotlib.rc("text", parse_math=True)  # as before the first figure
    assert plots.text_width(title, 9) > plots.text_width(title[4:], 9) > 1


def test_training_losses_are_drawn_amid_their_steps(tmp_path, curves):
    """A report is the mean of the steps since the last one, an evaluation is of the moment."""
    lines = [
        {"step": 1, "train/loss": 9.8, "train/accuracy": 0.1, "train/learning_rate": 0.1},
        {"step": 50, "train/loss": 6.2, "train/accuracy": 0.3, "train/learning_rate": 0.2},
        {"step": 50, "eval/loss": 3.1, "eval/accuracy": 0.5},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots.loss_curve(metrics, tmp_path / "curve.png")
    assert curves == [
        ("loss", [1, 26], [9.8, 6.2]),  # the middle of the steps 2 to 50
        ("loss", [50], [3.1]),
        ("token accuracy", [1, 26], [0.1, 0.3]),
        ("token accuracy", [50], [0.5]),
        ("learning rate", [1, 50], [0.1, 0.2]),
    ]


def test_loss_curve(tmp_path, curves):
    """Every curve is on its panel; a step that is logged twice counts once."""
    lines = [
        {"step": 1, "train/loss": 3.0, "train/learning_rate": 0.1},
        {"step": 2, "train/loss": 9.0, "train/learning_rate": 0.1},
        {
            "step": 2,
            "train/loss": 2.0,
            "train/learning_rate": 0.2,
        },  # resumed at step 1: this line counts
        {"step": 2, "eval/loss": 2.5},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    png = plots.loss_curve(metrics, tmp_path / "new" / "curve.png")
    assert png.read_bytes().startswith(PNG)
    assert [path.name for path in png.parent.iterdir()] == ["curve.png"]  # no temporary file
    assert curves == [
        ("loss", [1, 2], [3.0, 2.0]),
        ("loss", [2], [2.5]),
        ("learning rate", [1, 2], [0.1, 0.2]),
    ]


def test_running_mean():
    # Width 1: means of (1), (1, 2, 6), (2, 6), (6, 4), (4); the NaN is left out.
    smooth = plots._running_mean(np.array([1.0, 2.0, 6.0, np.nan, 4.0]), 1)
    np.testing.assert_allclose(smooth, [1.0, 3.0, 4.0, 5.0, 4.0])
    # A line stays a line, to its ends.
    np.testing.assert_allclose(plots._running_mean(np.arange(9.0), 3), np.arange(9.0))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"step": 1, "train/loss": 1}\nnope\n', "line 2: expected a JSON object"),
        ('{"train/loss": 1}\n', "line 1: expected"),
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
        "decoder/layers_1/encoder_decoder_attention/key": {"imdb_a": sharp},  # lacks a task
    }
    for max_ratio in (4.0, None):
        png = plots.routing_map(
            probs, tmp_path / "map.png", trained={"imdb_a"}, max_ratio=max_ratio
        )
        assert png.read_bytes().startswith(PNG)


def test_log_ratios():
    # log2 of the ratio to 1/E; the row between the groups and a missing task are NaN.
    image = plots._log_ratios({"a": [0.5, 0.25, 0.125, 0.125]}, ["a", None, "b"], 4)
    np.testing.assert_allclose(image[0], [1, 0, -1, -1])
    assert np.isnan(image[1:]).all()


def test_panel_lines():
    encoder = [f"encoder/layers_{i}/mlp/{site}" for i in range(2) for site in ("gate", "wo")]
    decoder = ["decoder/layers_0/mlp/gate", "decoder/layers_0/mlp/wo"]
    assert plots._panel_lines(encoder + decoder, 5) == [encoder, decoder]
    assert plots._panel_lines(encoder + decoder, 3) == [encoder[:2], encoder[2:], decoder]
    assert plots._panel_lines(encoder, 1) == [[site] for site in encoder]
    many = [f"decoder/layers_0/mlp/{i}" for i in range(10)]
    assert list(map(len, plots._panel_lines(many, 9))) == [5, 5]  # not 9 and 1


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
def test_probabilities_of_different_lengths_are_an_error(tmp_path, probs):
    with pytest.raises(InputError, match="one length"):
        plots.routing_map(probs, tmp_path / "map.png")
