"""`pemoe routes`: probe totals, metrics, plots, the page and the command."""

import collections
import dataclasses
import functools
import html.parser
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_models
from jsonl_folder import write_folder, write_vocabulary
from methods import CONFIG, EXPERTS, METHODS, example_batch, model, random_params

from pemoe_jax.analysis import plots
from pemoe_jax.analysis.routing import measure, metrics, probe
from pemoe_jax.analysis.routing import page as page_lib
from pemoe_jax.analysis.routing import plots as routing_plots
from pemoe_jax.analysis.routing.metrics import ProbeResult
from pemoe_jax.checkpoints import adapter_file, models, runs
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.core import network, params, steps
from pemoe_jax.core.adapters import Adapters, VectorExperts, describe
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks import TaskRoles, jsonl
from pemoe_jax.tools import routes

GATES = ["encoder/layers_0/mlp/gate", "decoder/layers_0/mlp/gate"]


# --- totals on the device ---


@functools.cache
def sentence_model(**router) -> tuple[network.Transformer, dict]:
    """Returns a model with routers at both gates whose probabilities the sentence [2] selects.

    The probabilities are (1, 2, 5) / 8 for the embedding (1, 0) and (2, 1, 1) / 4 for (0, 1).
    """
    factory = functools.partial(Router, reads="sentence", **router)
    adapters = Adapters(gate=functools.partial(VectorExperts, num_experts=3, router=factory))
    transformer = network.Transformer(dataclasses.replace(CONFIG, sentence_dim=2), adapters)
    flat = params.flatten(network.init_params(transformer, 0, lambda _: True))
    for path in flat:
        if path.endswith("router/kernel"):
            flat[path] = np.log(np.array([[1.0, 2.0, 5.0], [2.0, 1.0, 1.0]], np.float32))
    return transformer, params.unflatten(flat)


# Rows of 7, 4, 2 and 5 input tokens and 5, 3, 1 and 4 target tokens; the last is padding.
BATCH = example_batch()
BATCH["sentence_embeddings"] = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
TASKS = np.array([0, 0, 1, 0], np.int32)
for _name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"):
    BATCH[_name][3] = 0


cached_probe = functools.cache(probe.make_probe)


def run_probe(transformer, weights, batch=BATCH, tasks=TASKS, sites=(), totals=None):
    totals = probe.init_totals(transformer, 2, sites) if totals is None else totals
    return cached_probe(transformer)(weights, batch, tasks, totals)


@functools.partial(jax.jit, static_argnums=0)
def router_probs(transformer, weights, batch) -> dict:
    """Returns {<site>_adapter/probs: [B, L, (H,) E]}."""
    _, collections = steps.apply_model(transformer, weights, batch, None, mutable=["intermediates"])
    return {path: probs for path, (probs,) in params.flatten(collections["intermediates"]).items()}


def test_totals_match_hand_derivation():
    totals = run_probe(*sentence_model(), sites=GATES)
    first, second = np.array([1, 2, 5]) / 8, np.array([2, 1, 1]) / 4
    # H(1/8, 2/8, 5/8) = 3·ln 2/8 + 2·2·ln 2/8 + 5/8·ln(8/5); H(1/2, 1/4, 1/4) = 1.5·ln 2
    first_entropy = (3 + 4) / 8 * np.log(2) + 5 / 8 * np.log(8 / 5)
    second_entropy = 1.5 * np.log(2)
    for site, tokens in zip(GATES, ((7, 4, 2), (5, 3, 1)), strict=True):
        probs = [tokens[0] * first + tokens[1] * second, tokens[2] * first]
        np.testing.assert_allclose(totals.probs[site], probs, rtol=1e-5)
        entropies = [
            tokens[0] * first_entropy + tokens[1] * second_entropy,
            tokens[2] * first_entropy,
        ]
        np.testing.assert_allclose(totals.entropy[site], entropies, rtol=1e-5)
        stack = probe.token_stack(site)
        np.testing.assert_array_equal(totals.num_tokens[stack], [tokens[0] + tokens[1], tokens[2]])
    # EOS (1) ends each of the three inputs; the decoder reads the start token (0) in each
    np.testing.assert_allclose(totals.token_probs[GATES[0]][1], 2 * first + second, rtol=1e-5)
    np.testing.assert_allclose(totals.token_probs[GATES[1]][0], 2 * first + second, rtol=1e-5)
    assert totals.token_counts["encoder"][1] == totals.token_counts["decoder"][0] == 3
    assert totals.token_counts["encoder"][0] == 0  # padding
    assert float(totals.token_counts["encoder"].sum()) == 13


def test_top_1_totals_count_the_remaining_probability():
    totals = run_probe(*sentence_model(top_k=1))
    # top-1 leaves 5/8 of (1, 2, 5)/8 and 1/2 of (2, 1, 1)/4
    expected = [[4 / 2, 0, 7 * 5 / 8], [0, 0, 2 * 5 / 8]]
    np.testing.assert_allclose(totals.probs[GATES[0]], expected, rtol=1e-5)
    np.testing.assert_allclose(totals.entropy[GATES[0]], 0, atol=1e-6)
    np.testing.assert_allclose(metrics.mean_distributions(totals, GATES[0])[1], [0, 0, 1])


def test_head_wise_totals_are_means_over_heads_and_accumulate():
    """Compares MoV's keys and values, with a distribution per head, to a NumPy loop over tokens."""
    transformer, weights = model("mov"), random_params("mov")
    batch = {k: v for k, v in BATCH.items() if k != "sentence_embeddings"}
    sites = list(probe.expert_counts(transformer))
    whole = run_probe(transformer, weights, batch, sites=sites)
    for path, site_probs in router_probs(transformer, weights, batch).items():
        site = path.removesuffix("_adapter/probs")
        stack = probe.token_stack(site)
        mask = batch["encoder_input_tokens" if stack == "encoder" else "decoder_target_tokens"] > 0
        token_ids = batch[f"{stack}_input_tokens"]
        probs, entropy = np.zeros((2, EXPERTS)), np.zeros(2)
        token_probs = np.zeros((CONFIG.vocab_size, EXPERTS))
        for row, column in zip(*np.nonzero(mask), strict=True):
            p = np.asarray(site_probs[row, column], np.float64).reshape(-1, EXPERTS)  # [H or 1, E]
            probs[TASKS[row]] += p.mean(axis=0)
            entropy[TASKS[row]] -= (p * np.log(p)).sum(axis=-1).mean()
            token_probs[token_ids[row, column]] += p.mean(axis=0)
        np.testing.assert_allclose(whole.probs[site], probs, rtol=1e-4)
        np.testing.assert_allclose(whole.entropy[site], entropy, rtol=1e-4)
        np.testing.assert_allclose(whole.token_probs[site], token_probs, rtol=1e-4, atol=1e-6)

    twice = run_probe(
        transformer, weights, batch, sites=sites, totals=jax.tree.map(jnp.copy, whole)
    )
    for double, single in zip(jax.tree.leaves(twice), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(double, 2 * single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["switch", "ec"])
def test_totals_of_sparse_layers(name):
    """Beside MoV's routers; the weights of one expert a token, or of all that chose the token."""
    transformer = sparse_models.model(name, "mov")
    weights = sparse_models.parameters(name, "mov")
    batch = {k: v for k, v in BATCH.items() if k != "sentence_embeddings"}
    experts = probe.expert_counts(transformer)
    sites = ["encoder/layers_1/mlp/experts", "decoder/layers_1/mlp/experts"]
    assert [*experts][-1] == sites[1] and experts.keys() > {"encoder/layers_0/mlp/gate", sites[0]}
    assert measure.select_sites(None, experts) == sites[1:]  # MoV's sites have 3 experts
    assert measure.select_sites(["*/mlp/experts"], experts) == sites
    totals = run_probe(transformer, weights, batch, sites=sites)
    sown = router_probs(transformer, weights, batch)
    for site in sites:
        stack = probe.token_stack(site)
        mask = batch["encoder_input_tokens" if stack == "encoder" else "decoder_target_tokens"] > 0
        probs = np.asarray(sown[site.replace("experts", "probs")]) * mask[..., None]
        expected = [probs[task == TASKS].sum(axis=(0, 1)) for task in (0, 1)]
        np.testing.assert_allclose(totals.probs[site], expected, rtol=1e-5)
        np.testing.assert_allclose(np.sum(totals.token_probs[site], 0), np.sum(expected, 0), 1e-5)
        if name == "switch" or stack == "decoder":
            assert ((probs > 0).sum(axis=-1) == mask * transformer.sparse.top_k).all()
        if name == "switch":
            np.testing.assert_allclose(totals.entropy[site], 0, atol=1e-6)
    check = metrics.mean_distributions(totals, sites[0])
    np.testing.assert_allclose(check.sum(axis=-1), 1, rtol=1e-6)


def test_sites_are_in_layer_order():
    experts = probe.expert_counts(model("mov"))
    assert list(experts)[-5:] == [
        "decoder/layers_0/self_attention/key",
        "decoder/layers_0/self_attention/value",
        "decoder/layers_0/encoder_decoder_attention/key",
        "decoder/layers_0/encoder_decoder_attention/value",
        "decoder/layers_0/mlp/gate",
    ]
    assert set(experts.values()) == {EXPERTS}
    assert not probe.expert_counts(model("lora"))
    assert probe.token_stack("decoder/layers_0/encoder_decoder_attention/key") == "encoder"
    assert probe.token_stack("decoder/layers_0/encoder_decoder_attention/query") == "decoder"


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


class _Page(html.parser.HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text


def check_self_contained(page: _Page, pictures: int) -> None:
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(images) == pictures
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in images)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert attributes.get("href", "#").startswith("#")
        assert tag == "img" or "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.text and "@import" not in page.text  # in the style sheet


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
    page = _Page(files["routes.html"])
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


def test_page_of_sparse_layers(tmp_path):
    """Every second layer has a router."""
    by_site = {
        f"{s}/layers_{i}/mlp/experts": [[0.9, 0.1]] * 2 for s in probe.STACKS for i in (1, 3)
    }
    result = make_result(by_site, dict.fromkeys(by_site, [0.0, 0.0]))
    page_lib.draw_plots(result, tmp_path)
    text = page_lib.to_markdown([result], tmp_path)
    assert "| decoder/layers_3/mlp/experts |" in text and "has a dense MLP" in text
    assert plots._site_title("decoder/layers_3/mlp/experts") == "dec 3 · experts"
    assert "has a dense MLP" not in page_lib.to_markdown(
        [make_result({SITE: [[0.5, 0.5]]})], tmp_path
    )


def test_page_with_one_task_and_unknown_roles(tmp_path):
    result = make_result({SITE: [[0.1, 0.1]]}, seen=[None])  # top-k, with 0.2 of the probability
    page_lib.draw_plots(result, tmp_path)
    files = page_lib.render_files([result], tmp_path)
    check_self_contained(_Page(files["routes.html"]), pictures=2)  # no dendrogram of one task
    assert "mean share of the mixture" in files["routes.html"] and "0.200" in files["routes.md"]
    page = _Page(files["routes.html"])
    assert "held" not in {attributes.get("class") for tag, attributes in page.elements}


# --- the command ---

LENGTHS = {"inputs": 32, "targets": 8}
TINY = dataclasses.replace(CONFIG, vocab_size=256, num_encoder_layers=1, num_decoder_layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder of tasks, a vocabulary, a base model, and adapters with random weights."""
    root = tmp_path_factory.mktemp("routes")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    base = network.init_params(network.Transformer(TINY), 0, params.is_base)
    base_lib.save_base(root / "base.safetensors", base, TINY.as_dict())
    for method in ("ia3", "mov", "molora"):
        adapters = METHODS[method].adapters()
        initial = params.flatten(
            network.init_params(network.Transformer(TINY, adapters), 1, params.is_adapter)
        )
        rng = np.random.default_rng(0)
        arrays = {p: a + rng.standard_normal(a.shape, np.float32) for p, a in initial.items()}
        record = runs.Record(
            method=method,
            trainable=[params.ADAPTER_PATTERN],
            config=TINY.as_dict(),
            adapters=describe(adapters),
            base={
                "path": str(root / "base.safetensors"),
                "seed": None,
                "fingerprint": None,
                "needed": True,
            },
            counts={"trainable": params.count(arrays), "total": 9999},
            versions={},
            trained_datasets=["colour", "free"],
        )
        adapter_file.save_adapter(root / method, arrays, record, step=2)
    return root


def data_flags(root: pathlib.Path) -> list[str]:
    return [
        f"--gin.JSONL_DIR={root / 'tasks'}",
        f"--gin.VOCAB_PATH={root / 'vocab.model'}",
        f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}",
        "--gin.BATCH_SIZE=8",
    ]


def test_page_of_two_runs_and_means_of_examples_run_one_by_one(folder, tmp_path, capsys):
    out = tmp_path / "page"
    checkpoints = [str(folder / "mov"), str(folder / "molora")]
    flags = ["--examples=3", f"--output={out}", *data_flags(folder)]
    assert routes.main([*checkpoints, *flags]) == 0
    assert "routes.html" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "routes.html", "routes.md", "routes.json", "routes.csv", "distances.csv",
        "mov_map.png", "mov_entropy.png", "mov_tasks.png",
        "molora_map.png", "molora_entropy.png", "molora_tasks.png",
    }  # fmt: skip
    check_self_contained(_Page((out / "routes.html").read_text()), pictures=6)
    results = json.loads((out / "routes.json").read_text())["runs"]
    assert [run["name"] for run in results] == ["mov", "molora"]
    for run in results:
        # a prompt of each dataset, training tasks first
        seen = {task["name"]: task["seen"] for task in run["tasks"]}
        assert list(seen.items()) == [("colour_1", True), ("free_1", True), ("check_1", False)]
        assert {task["examples"] for task in run["tasks"]} == {3}
        assert {site.rsplit("/", 2)[0] for site in run["sites"]} == {"decoder/layers_1"}
    run = results[0]
    assert list(run["sites"]) == [
        f"decoder/layers_1/{site}"
        for site in (
            "self_attention/key", "self_attention/value", "encoder_decoder_attention/key",
            "encoder_decoder_attention/value", "mlp/gate",
        )
    ]  # fmt: skip
    assert len(run["entropies"]) == 1 * 3 + 2 * 5

    opened = models.open_model(str(folder / "mov"))
    weights = opened.load()
    for name in seen:
        lines = (folder / "tasks" / name / "validation.jsonl").read_text().splitlines()[:3]
        totals = collections.Counter()
        for row in map(json.loads, lines):
            site_probs, lengths = run_alone(opened.model, weights, name, row)
            for path, probs in site_probs.items():
                site = path.removesuffix("_adapter/probs")
                tokens = lengths[probe.token_stack(site)]
                totals[site] += np.asarray(probs[0, :tokens]).reshape(tokens, -1, 3).mean(1).sum(0)
        for site, entry in run["sites"].items():
            expected = totals[site] / totals[site].sum()
            np.testing.assert_allclose(entry["means"][name], expected, atol=2e-6)
            assert np.ptp(expected) > 0.01, "routing should depend on the token"


def run_alone(transformer, weights, task, row) -> tuple[dict, dict]:
    """Returns one example's router probabilities and lengths, without the package's batching."""
    vocabulary = seqio_tasks.get_mixture_or_task(task).output_features["inputs"].vocabulary
    ids, targets = ([*vocabulary.encode(row[key]), 1] for key in ("inputs", "targets"))
    target = np.pad(targets, (0, 8 - len(targets)))[None]
    batch = {
        "encoder_input_tokens": np.pad(ids, (0, 32 - len(ids)))[None],
        "decoder_target_tokens": target,
        "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
    }
    return router_probs(transformer, weights, batch), {"encoder": len(ids), "decoder": len(targets)}


@pytest.mark.parametrize(
    ("checkpoint", "flags", "message"),
    [
        ("base.safetensors", [], r"expected a run of mov, .*, got a run of none"),
        ("ia3", [], r"expected a run of mov, .*, got a run of ia3"),
        ("mov", ["--sites", "decoder/layers_1/mlp/gat"], r"mlp/gat' matches none of the 13"),
        (
            "mov",
            ["--tasks", "colour_9"],
            r"'colour_9' matches none of 5 tasks; did you mean colour_",
        ),
        ("mov", ["--examples=0"], "ROUTES_EXAMPLES must be a positive integer, got 0"),
        (None, [], "CHECKPOINT_PATH is not set"),
        ("nothing", [], "nothing"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, capsys, checkpoint, flags, message):
    checkpoints = [str(folder / checkpoint)] if checkpoint else []
    code = routes.main([*checkpoints, f"--output={tmp_path / 'out'}", *flags, *data_flags(folder)])
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def task_roles(folder):
    return jsonl.register(folder / "tasks", folder / "vocab.model", use=())


def test_select_tasks(task_roles):
    assert measure.select_tasks(["check_*"], task_roles) == ["check_1", "check_2"]
    assert measure.select_tasks("check_2_score_eval", task_roles) == [
        "check_2"
    ]  # the task that it scores
    assert measure.select_tasks(["free_1", "colour_2", "*"], task_roles)[:2] == [
        "free_1",
        "colour_2",
    ]
    assert measure.select_tasks(["jsonl_score_eval"], task_roles) == ["check_1", "check_2"]
    assert "colour_1" in measure.select_tasks(["colour_1"], TaskRoles())
    for patterns, message in (
        ([], "must name at least one task"),
        ([3], "must be a list of name patterns"),
        (["check_1", "x*"], r"'x\*' matches none"),
    ):
        with pytest.raises(InputError, match=message):
            measure.select_tasks(patterns, task_roles)
    with pytest.raises(InputError, match="ROUTES_TASKS is not set"):
        measure.select_tasks(None, TaskRoles())


def test_task_and_its_score_task_read_the_same_examples(task_roles):
    examples = measure.read_examples("colour_1", LENGTHS, 3)
    score_examples = measure.read_examples("colour_1_score_eval", LENGTHS, 3)
    assert len(examples) == len(score_examples) == 3
    for example, score in zip(examples, score_examples, strict=True):
        np.testing.assert_array_equal(example.inputs, score.inputs)
        np.testing.assert_array_equal(example.choices[0], score.choices[0])
        assert example.choice_texts == score.choice_texts and len(score.choices) == 1
    (truncated,) = measure.read_examples("colour_1", {"inputs": 3, "targets": 8}, 1)
    assert len(truncated.inputs) == 3 and truncated.input_truncated


def test_trained_datasets_come_from_the_record_or_roles(task_roles):
    @dataclasses.dataclass
    class Opened:
        record: object

    @dataclasses.dataclass
    class Record:
        trained_datasets: list[str] | None

    assert measure.trained_datasets(Opened(Record(["check"])), task_roles) == {"check"}
    assert measure.trained_datasets(Opened(Record(None)), task_roles) == {"colour", "free"}
    assert measure.trained_datasets(Opened(None), TaskRoles()) is None


def test_select_sites_by_patterns():
    sites = ["encoder/layers_0/attention/value", "decoder/layers_0/mlp/gate"]
    experts = dict.fromkeys([*sites, "decoder/layers_0/self_attention/value"], 3)
    assert measure.select_sites(["*/mlp/*", "encoder/*/value"], experts) == sites
    assert measure.select_sites("decoder/*/value", experts) == [list(experts)[2]]


def test_select_sites_rejects_different_numbers_of_experts():
    experts = {"encoder/layers_0/mlp/gate": 3, "decoder/layers_0/mlp/gate": 5}
    assert measure.select_sites(None, experts) == ["decoder/layers_0/mlp/gate"]
    with pytest.raises(InputError, match=r"same number of experts.*3 and 5"):
        measure.select_sites(["*"], experts)
    with pytest.raises(InputError, match="at least one site"):
        measure.select_sites([], experts)


def test_probabilities_that_are_not_finite_are_an_error():
    probs = np.ones((3, EXPERTS), np.float32)
    totals = probe.ProbeTotals({GATES[0]: probs, GATES[1]: probs.copy()}, {}, {}, {}, {})
    measure.check_finite(totals, ["a", "b", "c"])
    for value in (np.nan, np.inf):
        totals.probs[GATES[1]][2, 1] = value
        with pytest.raises(InputError, match=rf"ones at {GATES[1]} for c: "):
            measure.check_finite(totals, ["a", "b", "c"])
