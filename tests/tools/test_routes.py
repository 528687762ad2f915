"""`pemoe routes`: the command, and the tasks and examples that it reads."""

import collections
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import sparse_models
from jsonl_folder import write_folder, write_vocabulary
from methods import CONFIG, METHODS
from routing_pages import Page, check_self_contained
from routing_probes import router_probs

from pemoe_jax.analysis.routing import measure, probe
from pemoe_jax.checkpoints import adapter_file, models
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import network, params
from pemoe_jax.core.adapters import describe
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import describe as describe_sparse
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks import TaskRoles, jsonl
from pemoe_jax.tools import routes

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
        record = Record(
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
        "routes.html", "routes.md", "routes.json", "routes.csv", "distances.csv", "run.json",
        "mov_map.png", "mov_entropy.png", "mov_tasks.png",
        "molora_map.png", "molora_entropy.png", "molora_tasks.png",
    }  # fmt: skip
    check_self_contained(Page((out / "routes.html").read_text()), pictures=6)
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


def test_page_of_a_sparse_model(folder, tmp_path, capsys):
    """All tokens of the examples are counted; the text of a note names the rows."""
    sparse = sparse_models.ROUTINGS["gshard"]
    config = dataclasses.replace(TINY, num_encoder_layers=2)
    model = network.Transformer(config, sparse=sparse)
    weights = network.init_params(model, 0, lambda _: True)
    path = tmp_path / "flan.safetensors"
    base_lib.save_base(path, weights, config.as_dict(), sparse=describe_sparse(sparse))
    out = tmp_path / "page"
    flags = ["--examples=3", f"--output={out}", *data_flags(folder)]
    assert routes.main([str(path), *flags]) == 0
    assert "routes.html" in capsys.readouterr().out
    assert {"loads.csv", "flan_load.png"} <= {file.name for file in out.iterdir()}
    check_self_contained(Page((out / "routes.html").read_text()), pictures=4)
    (run,) = json.loads((out / "routes.json").read_text())["runs"]
    sites = ["encoder/layers_1/mlp/experts", "decoder/layers_1/mlp/experts"]
    assert list(run["sparse_layers"]) == list(run["sites"]) == sites
    for stack, site in zip(probe.STACKS, sites, strict=True):
        tokens = sum(task[f"{stack}_tokens"] for task in run["tasks"])
        entry = run["sparse_layers"][site]
        assert entry["tokens"] == tokens <= sum(entry["assigned"]) <= 2 * tokens
        counts = entry["tokens_by_experts"]
        assert counts[1] + 2 * counts[2] == sum(entry["placed"]) <= sum(entry["assigned"])
        rows = [line.split(",") for line in (out / "loads.csv").read_text().splitlines()]
        assert sum(int(row[6]) for row in rows if row[1] == site) == sum(entry["assigned"])
    assert run["training_rows"] == "packed rows, 32 + 8 tokens"


@pytest.mark.parametrize(
    ("checkpoint", "flags", "message"),
    [
        ("base.safetensors", [], r"expected mov, .* with routers, got none$"),
        ("ia3", [], r"expected mov, .* with routers, got ia3$"),
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
