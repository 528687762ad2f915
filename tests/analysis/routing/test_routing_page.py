"""Metrics, plots and page of routing, from totals by hand."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest
from routing_pages import Page, check_self_contained

from pemoe_jax.analysis import plots
from pemoe_jax.analysis.routing import metrics, probe
from pemoe_jax.analysis.routing import page as page_lib
from pemoe_jax.analysis.routing import plots as routing_plots
from pemoe_jax.analysis.routing.dispatch_probe import DispatchTotals
from pemoe_jax.analysis.routing.metrics import ProbeResult
from pemoe_jax.core.errors import InputError

# --- metrics ---


def make_result(probs, entropy=None, token_probs=None, counts=None, **settings) -> ProbeResult:
    """Returns the result of tasks with ten tokens each and mean distributions {site: [T, E]}."""
    num_tasks, num_experts = np.shape(next(iter(probs.values())))
    names = settings.pop("names", [f"task_{i}" for i in range(num_tasks)])
    seen = settings.pop("seen", [True] * num_tasks)
    vocab_size = len(counts) if counts is not None else 4
    if token_probs is None:  # slightly above uniform for the first expert
        token_probs = np.full((vocab_size, num_experts), 9.0) + np.eye(num_experts)[0]
    entropy = entropy or dict.fromkeys(probs, [0.5] * num_tasks)
    counts = np.full(vocab_size, 9.0) if counts is None else np.asarray(counts)
    totals = probe.ProbeTotals(
        probs={site: 10 * np.asarray(p, np.float64) for site, p in probs.items()},
        entropy={site: 10 * np.asarray(values) for site, values in entropy.items()},
        num_tokens={stack: np.full(num_tasks, 10.0) for stack in probe.STACKS},
        token_probs=dict.fromkeys(probs, token_probs),
        token_counts=dict.fromkeys(probe.STACKS, counts),
    )
    about = {"name": "mov", "method": "mov", "checkpoint": "/runs/mov", "step": 3}
    return ProbeResult(
        run={**about, "trainable": 10, "total": 100},
        tasks=[
            metrics.ProbedTask(name, f"set of {name}", is_seen, "validation", 2)
            for name, is_seen in zip(names, seen, strict=True)
        ],
        totals=totals,
        experts=dict.fromkeys(probs, num_experts),
        sites=list(probs),
        pieces=settings.pop("pieces", {i: f"▁w{i}" for i in range(vocab_size)}),
        **settings,
    )


SITE = "decoder/layers_3/mlp/gate"
OTHER = "decoder/layers_3/self_attention/key"


def test_divergences_and_distances():
    divergences = metrics.jensen_shannon(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    # (1, 0) and (1/2, 1/2): H(3/4, 1/4) - H(1/2, 1/2) / 2 = 0.8112781 - 0.5
    expected = [[0, 1, 0.3112781], [1, 0, 0.3112781], [0.3112781, 0.3112781, 0]]
    np.testing.assert_allclose(divergences, expected, atol=1e-7)
    # all tasks agree at the other site, which halves the divergence
    both = make_result({SITE: [[1, 0], [0, 1], [0.5, 0.5]], OTHER: [[0.5, 0.5]] * 3})
    np.testing.assert_allclose(
        metrics.task_distances(both), np.sqrt(np.array(expected) / 2), atol=1e-7
    )


def test_distances_compare_normalized_distributions():
    """A top-k router that keeps half of the probability equals one that keeps all of it."""
    result = make_result({SITE: [[0.5, 0.0], [0.0, 0.25]]})
    np.testing.assert_allclose(metrics.task_distances(result), [[0, 1], [1, 0]], atol=1e-7)
    assert metrics.router_entropies(result)[0].mass == pytest.approx(0.375)


def test_router_entropies():
    # tasks (1, 0, 0, 0) and (0, 1, 0, 0): no entropy within either, their mean (1/2, 1/2, 0, 0) has
    # 1 of 2 bits; the tokens' mean entropy is 0.5 nats of ln 4
    (layer,) = metrics.router_entropies(make_result({SITE: [[1, 0, 0, 0], [0, 1, 0, 0]]}))
    assert (layer.stack, layer.layer, layer.kind) == ("decoder", 3, "gate")
    assert layer.mean_entropy == pytest.approx(0.5) and layer.task_bits == pytest.approx(1.0)
    assert layer.token_entropy == pytest.approx(0.5 / np.log(4)) and layer.mass == pytest.approx(1)
    (alike,) = metrics.router_entropies(
        make_result({SITE: [[0.25] * 4] * 2}, {SITE: [np.log(4)] * 2})
    )
    assert alike.mean_entropy == pytest.approx(1) and alike.token_entropy == pytest.approx(1)
    assert alike.task_bits == pytest.approx(0, abs=1e-12)
    (single,) = metrics.router_entropies(make_result({SITE: [[1.0], [1.0]]}, {SITE: [0, 0]}))
    assert (single.mean_entropy, single.token_entropy) == (0, 0)  # a single expert: no 0/0


def test_nearest_trained_task():
    result = make_result(
        {SITE: [[1, 0], [0.2, 0.8], [0, 1]]}, names=["a", "b", "c"], seen=[True, True, False]
    )
    (near,) = metrics.nearest_trained(result).items()
    assert near[0] == "c" and near[1][0] == "b"
    assert near[1][1] == pytest.approx(metrics.task_distances(result)[2, 1])
    assert metrics.nearest_trained(make_result({SITE: [[1, 0]]}, seen=[False])) == {}
    assert metrics.nearest_trained(make_result({SITE: [[1, 0]]}, seen=[None])) == {}


def test_top_tokens():
    # totals over 8, 8, 2 and 40 tokens: distributions (3/4, 1/4), (1/4, 3/4), (1, 0), (3/5, 2/5)
    token_probs = np.array([[6.0, 2], [2, 6], [2, 0], [24, 16]])
    result = make_result(
        {SITE: [[0.5, 0.5]]}, token_probs=token_probs, counts=[8, 8, 2, 40], min_count=5
    )
    first, second = metrics.top_tokens(result, SITE, limit=2)
    assert [(token.piece, token.count) for token in first] == [("▁w0", 8), ("▁w3", 40)]
    assert [token.ratio for token in first] == pytest.approx([1.5, 1.2])  # times E = 2
    assert [token.piece for token in second] == ["▁w1"]  # all others are below 1/E
    rare = dataclasses.replace(result, min_count=1)
    assert metrics.top_tokens(rare, SITE, limit=1)[0][0].piece == "▁w2"


# --- plots ---


def draw_figure(monkeypatch, draw, *args, **kwargs):
    """Returns the figure that `draw` saves."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, png: figures.append(figure))
    draw(*args, **kwargs)
    return figures[0]


def test_entropies_are_drawn_by_layer(monkeypatch):
    routers = [
        metrics.RouterEntropy(f"{stack}/x", stack, i, kind, 0.1 * i + 0.2, 0.9, 0.0, 1.0)
        for stack, kinds in (("encoder", ["gate"]), ("decoder", ["gate", "cross key"]))
        for i in range(3)
        for kind in kinds
    ]
    figure = draw_figure(monkeypatch, routing_plots.plot_entropies, routers, "x.png", title="t")
    drawn = {
        (axis.get_title(loc="left"), line.get_label()): (
            list(line.get_xdata()),
            list(line.get_ydata()),
        )
        for axis in figure.axes
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }
    assert len(figure.axes) == 4 and len(drawn) == 2 * 3
    layers, values = drawn["decoder, each token (low: few experts)", "cross key"]
    assert layers == [0, 1, 2] and values == pytest.approx([0.2, 0.3, 0.4])
    assert drawn["encoder, mean over all (low: few experts)", "gate"][1] == [0.9] * 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["gate", "cross key"]
    for axis in figure.axes:  # all values are inside the axes
        low, high = axis.get_ylim()
        assert all(low < y < high for line in axis.get_lines() for y in line.get_ydata())


def test_sparse_layers_and_wo_of_dense_blocks_look_different(monkeypatch):
    routers = [
        metrics.RouterEntropy("x", "encoder", layer, kind, 0.5, 0.9, 0.0, 1.0)
        for layer, kind in ((0, "wo"), (1, "experts"), (2, "wo"), (3, "experts"))
    ]
    figure = draw_figure(monkeypatch, routing_plots.plot_entropies, routers, "x.png", title="t")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    looks = {
        kind: (line.get_color(), line.get_linestyle(), line.get_marker())
        for kind, line in lines.items()
        if kind in ("wo", "experts")
    }
    assert looks["wo"][1:] != looks["experts"][1:]


def test_dendrogram(monkeypatch):
    # a and c merge at 0.1; both merge with b at the mean of 0.4 and 0.6
    distances = np.array([[0, 0.4, 0.1], [0.4, 0, 0.6], [0.1, 0.6, 0]])
    draw = functools.partial(routing_plots.plot_dendrogram, distances, ["a", "b", "c"], title="t")
    figure = draw_figure(monkeypatch, draw, "x.png", trained=["a", "b"])
    (axis,) = figure.axes
    labels = {label.get_text(): label.get_color() for label in axis.get_yticklabels()}
    assert labels == {"a": plots.TEXT_COLOR, "b": plots.TEXT_COLOR, "c": plots.ACCENT_COLOR}
    branches = [path.vertices for lines in axis.collections for path in lines.get_paths()]
    ends = set(np.round(np.concatenate(branches)[:, 0], 6).tolist())
    assert ends == {0.0, 0.1, 0.5}
    equal = draw_figure(
        monkeypatch, routing_plots.plot_dendrogram, np.zeros((2, 2)), ["a", "b"], "x.png", title="t"
    )
    assert {label.get_color() for label in equal.axes[0].get_yticklabels()} == {plots.TEXT_COLOR}
    with pytest.raises(InputError, match="at least 2 tasks, got 1"):
        routing_plots.plot_dendrogram(np.zeros((1, 1)), ["a"], "x.png", title="t")


# --- the page ---


def test_page_is_self_contained_and_escapes_names(tmp_path):
    name = "<b>bold</b> & <script>alert(1)</script>"
    result = make_result(
        {SITE: [[0.7, 0.3], [0.2, 0.8]]},
        names=[name, "plain"],
        seen=[True, False],
        pieces={0: "<start>", 1: "<i>", 2: '"', 3: "`|*"},
    )
    page_lib.draw_plots(result, tmp_path)
    files = page_lib.render_files([result], tmp_path)
    assert set(files) == {
        "routes.html", "routes.md", "routes.json", "routes.csv", "distances.csv",
    }  # fmt: skip
    page = Page(files["routes.html"])
    check_self_contained(page, pictures=3)
    assert not {"b", "i", "start"} & {tag for tag, _ in page.elements}
    for text in (name, "<start>", "<i>", "held out", "trained on", "0.700", SITE):
        assert text in page.text
    assert "`<start>" in files["routes.md"] and "`'\\|*" not in files["routes.md"].split("`")[0]
    assert json.loads(files["routes.json"])["runs"][0]["tasks"][0]["name"] == name


def test_files_contain_the_metrics(tmp_path):
    result = make_result(
        {SITE: [[0.7, 0.3], [0.2, 0.8]]}, names=["a", "b"], seen=[True, False], min_count=1
    )
    page_lib.draw_plots(result, tmp_path)
    files = page_lib.render_files([result], tmp_path)
    lines = files["routes.csv"].splitlines()
    assert lines[0] == "run,site,task,dataset,seen,expert,probability"
    assert lines[1:] == [
        f"mov,{SITE},a,set of a,1,1,0.7",
        f"mov,{SITE},a,set of a,1,2,0.3",
        f"mov,{SITE},b,set of b,0,1,0.2",
        f"mov,{SITE},b,set of b,0,2,0.8",
    ]
    whole = json.loads(files["routes.json"])
    (run,) = whole["runs"]
    assert run["sites"][SITE]["means"] == {"a": [0.7, 0.3], "b": [0.2, 0.8]}
    (pair,) = files["distances.csv"].splitlines()[1:]
    assert pair.startswith("mov,a,b,")
    assert float(pair.split(",")[3]) == pytest.approx(run["distances"][0][1], abs=1e-6)
    assert run["nearest_seen"]["b"]["task"] == "a"
    assert run["measure"] == "mean probability"
    assert len(run["sites"][SITE]["top_tokens"]) == 2
    assert re.search(r"\| a +\| set of a +\| trained on \| +10 \| 0.700 \|", files["routes.md"])


SPARSE = [f"{stack}/layers_{i}/mlp/experts" for stack in probe.STACKS for i in (1, 3)]


def sparse_result(experts_choose: bool = False) -> ProbeResult:
    """Returns a result of two tasks and two experts; every second layer has a router.

    Of 10 + 20 tokens, 8 + 16 choose the first expert, and 2 + 4 of these have no place.
    """
    by_site = dict.fromkeys(SPARSE, [[0.9, 0.1]] * 2)
    totals = DispatchTotals(
        assigned=np.array([[8, 2], [16, 4]], np.float32),
        placed=np.array([[6, 2], [12, 4]], np.float32),
        tokens_by_experts=np.array([[2, 8, 0], [4, 16, 0]], np.float32),
    )
    chosen = DispatchTotals(
        assigned=np.array([[5, 6], [10, 9]], np.float32),
        placed=np.array([[5, 6], [10, 9]], np.float32),
        tokens_by_experts=np.array([[1, 7, 2], [2, 17, 1]], np.float32),
    )
    by_stack = {"encoder": chosen if experts_choose else totals, "decoder": totals}
    return make_result(
        by_site,
        dict.fromkeys(by_site, [0.0, 0.0]),
        names=["a", "b"],
        dispatch={site: by_stack[probe.token_stack(site)] for site in SPARSE},
        experts_choose=experts_choose,
        rows="packed rows, 16 + 8 tokens",
    )


def test_loads_by_hand():
    """24 of 30 tokens go to the first of two experts, and 6 of them are dropped."""
    load, *_ = metrics.sparse_loads(sparse_result())
    assert (load.tokens, load.dropped, load.without_expert) == (30, pytest.approx(0.2), 0.2)
    assert load.load.tolist() == [1.6, 0.4] and load.dead == 0
    first, _, last, _ = metrics.sparse_loads(sparse_result(experts_choose=True))
    assert first.experts_choose and not last.experts_choose
    assert first.load.tolist() == [1, 1] and first.dropped == 0 and first.without_expert == 0.1
    nobody = np.zeros(2), np.zeros(2), np.zeros(3)
    empty = metrics.SparseLoad(SPARSE[0], False, *nobody)
    assert (empty.tokens, empty.without_expert, empty.dead) == (0, 0, 2)
    assert metrics.sparse_loads(make_result({SITE: [[0.5, 0.5]]})) == []


def test_loads_in_the_files(tmp_path):
    result = sparse_result(experts_choose=True)
    page_lib.draw_plots(result, tmp_path)
    files = page_lib.render_files([result], tmp_path)
    lines = files["loads.csv"].splitlines()
    assert lines[0] == "run,site,task,dataset,seen,expert,assigned,dropped"
    assert len(lines) == 1 + 4 * 2 * 2
    assert f"mov,{SPARSE[2]},b,set of b,1,1,16,4" in lines
    assert f"mov,{SPARSE[0]},b,set of b,1,1,10,0" in lines
    (run,) = json.loads(files["routes.json"])["runs"]
    entry = run["sparse_layers"][SPARSE[2]]
    assert entry["assigned"] == [24, 6] and entry["placed"] == [18, 6]
    assert entry["dropped"] == entry["without_expert"] == 0.2
    assert run["training_rows"] == "packed rows, 16 + 8 tokens"
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in files["routes.md"].splitlines()
        if re.match(r"\| (en|de)coder/layers_1/mlp/experts +\| (tokens|experts)", line)
    ]
    shares = ["10.0 %", "80.0 %", "10.0 %"], ["20.0 %", "80.0 %", "0.0 %"]
    assert cells == [
        [SPARSE[0], "experts", "30", "1.00", "1.00", "0", "–", *shares[0]],
        [SPARSE[2], "tokens", "30", "1.60", "0.40", "0", "20.0 %", *shares[1]],
    ]
    page = Page(files["routes.html"])
    check_self_contained(page, pictures=4)
    assert "packed rows, 16 + 8 tokens" in page.text


def test_loads_are_drawn(monkeypatch):
    result = sparse_result(experts_choose=True)
    loads = metrics.sparse_loads(result)
    figure = draw_figure(monkeypatch, routing_plots.plot_loads, loads, "x.png", title="t")
    bars = {
        axis.get_title(loc="left"): [
            (round(bar.get_x() + 0.4), round(bar.get_height(), 6)) for bar in axis.patches
        ]
        for axis in figure.axes
    }
    assert list(bars) == [
        "encoder 1\nwithout expert 10.0 %",
        "encoder 3\nwithout expert 10.0 %",
        "decoder 1\ndropped 20.0 %\nwithout expert 20.0 %",
        "decoder 3\ndropped 20.0 %\nwithout expert 20.0 %",
    ]
    first, _, last, _ = bars.values()
    assert first == [(0, 0.0), (1, 0.8), (2, 0.1), (0, 0.1), (1, 0.0), (2, 0.0)]
    assert last == [(1, 1.2), (2, 0.4), (1, 0.4), (2, 0.0)]


def test_page_of_sparse_layers(tmp_path):
    result = sparse_result()
    page_lib.draw_plots(result, tmp_path)
    text = page_lib.to_markdown([result], tmp_path)
    assert "mean weight by expert" in text
    assert "| decoder/layers_3/mlp/experts |" in text and "has a dense MLP" in text
    assert plots._site_title("decoder/layers_3/mlp/experts") == "dec 3 · experts"
    assert "has a dense MLP" not in page_lib.to_markdown(
        [make_result({SITE: [[0.5, 0.5]]})], tmp_path
    )


def test_page_with_one_task_and_unknown_roles(tmp_path):
    result = make_result({SITE: [[0.1, 0.1]]}, seen=[None])  # top-k, with 0.2 of the probability
    page_lib.draw_plots(result, tmp_path)
    files = page_lib.render_files([result], tmp_path)
    check_self_contained(Page(files["routes.html"]), pictures=2)  # no dendrogram of one task
    assert "mean share of the mixture" in files["routes.html"] and "0.200" in files["routes.md"]
    page = Page(files["routes.html"])
    assert "held" not in {attributes.get("class") for tag, attributes in page.elements}
