"""Rank classification: scores of grouped choices equal those of seqio's Evaluator."""

import dataclasses
import functools
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_models
from data_tasks import WORDS, make_vocab, write
from methods import CONFIG, METHODS
from report_results import step_time

from pemoe_jax import evaluate
from pemoe_jax.analysis.zero_shot import rank_classification
from pemoe_jax.analysis.zero_shot import results as results_lib
from pemoe_jax.checkpoints import base_model
from pemoe_jax.core import network, params, partitioning, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, inference_batches
from pemoe_jax.tasks import TaskRoles, jsonl

LENGTHS = {"inputs": 32, "targets": 8}


@pytest.fixture(scope="module")
def twin_folder(tmp_path_factory):
    """Two tasks: different numbers of choices, duplicates, truncation, an empty input."""
    folder = tmp_path_factory.mktemp("score")
    rng = np.random.default_rng(1)

    def words(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    ragged = []
    for i in range(13):
        choices = [words(1, 3 if i % 2 else 9) for _ in range(2 + i % 5)]
        ragged.append((words(1, 60), choices[i % len(choices)], choices))
    odd = [
        ("the sky", "blue", ["blue", "red", "blue"]),
        ("the sky", "blue", ["red", "blue", "blue"]),
        ("the grass", "yes", ["yes", "yes"]),
        ("the sea", "green", ["red", "blue"]),
        ("", "no", ["yes", "no"]),
        ("a film", "good", ["good"]),
        ("a film", "good", ["good", words(30, 31)]),
    ]
    write(folder, "ragged", "validation", ragged)
    write(folder, "odd", "validation", odd)
    return folder, make_vocab(folder)


@pytest.fixture
def twins(twin_folder):
    """Their names. Registered for each test, as others register tasks of their own."""
    folder, vocab = twin_folder
    jsonl.register(folder, vocab, eval_tasks=["ragged", "odd"])
    return ["odd_score_eval", "ragged_score_eval"]


@functools.cache
def transformer() -> network.Transformer:
    config = dataclasses.replace(CONFIG, vocab_size=256, num_encoder_layers=2, num_decoder_layers=2)
    return network.Transformer(config, METHODS["mov"].adapters())


@functools.cache
def weights() -> dict:
    """Random parameters, also of the expert vectors."""
    initial = params.flatten(network.init_params(transformer(), 0, lambda _: True))
    keys = jax.random.split(jax.random.key(1), len(initial))
    return params.unflatten(
        {
            path: leaf + 0.3 * jax.random.normal(key, leaf.shape) if "_adapter" in path else leaf
            for (path, leaf), key in zip(initial.items(), keys, strict=True)
        }
    )


@jax.jit
def score_row(network_params: dict, tokens: dict) -> jax.Array:
    """Returns the log-probability of one choice by a pass of the whole network."""
    logits = steps.apply_model(transformer(), network_params, tokens, None)
    target = tokens["decoder_target_tokens"]
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, target[..., None], -1)[..., 0]
    return jnp.sum(picked * (target > 0))


@functools.cache
def seqio_scores(twin: str) -> tuple[np.ndarray, float]:
    """Returns every choice's score and the accuracy by seqio's Evaluator, a pass per choice."""
    import seqio

    evaluator = seqio.Evaluator(
        twin,
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        sequence_length=LENGTHS,
        async_compute_metrics=False,
    )
    scores = {}

    def score_fn(dataset):
        for number, row in dataset.as_numpy_iterator():
            tokens = {key: value[None] for key, value in row.items() if key != "idx"}
            scores[int(number)] = float(score_row(weights(), tokens))
        return sorted(scores.items())

    metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score_fn, step=0)
    return np.array([scores[i] for i in sorted(scores)]), metrics.result()[twin]["accuracy"]


@pytest.mark.parametrize("batch_size", [2, 4, 32])
def test_grouped_scores_are_those_of_seqios_evaluator(twins, batch_size):
    """20 groups of 1 to 6 choices in batches of 2, 4 and 32 rows over two devices."""
    groups = choices.load_choice_groups("jsonl_score_eval", LENGTHS)
    mesh = partitioning.make_mesh()
    assert mesh.shape["data"] == 2
    device_params = partitioning.replicate(weights(), mesh)
    predictions = rank_classification.score_groups(
        transformer(), device_params, groups, batch_size, mesh
    )
    for twin in twins:
        members = [group for group in groups if group.task == twin]
        expected, accuracy = seqio_scores(twin)
        scores = [score for group in members for score in predictions[group].scores]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
        assert np.ptp(expected) > 1, "scores should differ by much more than the tolerance"
        result = results_lib.task_result(
            correct=[group.is_correct[predictions[group].best] for group in members],
            chance=[0.5] * len(members),
            dataset=twin,
            split="validation",
            odd=[],
        )
        assert result["accuracy"] == accuracy
        assert result["examples"] == {"odd_score_eval": 7, "ragged_score_eval": 13}[twin]


def test_the_batches_had_remainders_and_ragged_choices(twins):
    """The batches of the test above cover the cases that it is about."""
    groups = choices.load_choice_groups("jsonl_score_eval", LENGTHS)
    assert {len(group.choices) for group in groups} == {1, 2, 3, 4, 5, 6}
    assert any(group.input_truncated for group in groups) and any(
        group.target_truncated for group in groups
    )
    assert sum("doubled_choices" in group.anomalies for group in groups) >= 3
    for batch_size in (4, 32):
        batches = list(inference_batches.score_batches(groups, batch_size, multiple_of=2))
        rows = [batch["decoder_target_tokens"] for batch, _ in batches]
        assert any(
            (part.sum(-1) == 0).any() for part in rows
        )  # groups with fewer choices than their batch
    _, members = list(inference_batches.score_batches(groups[:3], 4, multiple_of=2))[0]
    assert len(members) == 3  # of 4 rows


def test_doubled_choices_score_alike(twins):
    scores, _ = seqio_scores("odd_score_eval")
    groups = [
        g for g in choices.load_choice_groups("jsonl_score_eval", LENGTHS) if g.task == twins[0]
    ]
    mesh = partitioning.make_mesh()
    predictions = rank_classification.score_groups(transformer(), weights(), groups, 8, mesh)
    for group in groups[:3]:
        own = predictions[group].scores
        for text in set(group.choice_texts):
            same = [s for s, t in zip(own, group.choice_texts, strict=True) if t == text]
            assert np.ptp(same) < 1e-5
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)  # blue, red, blue


def test_ties_of_different_texts_are_odd(twins):
    """Two choices of the same tokens tie; two of the same text are counted as doubled instead."""
    first, second = choices.load_choice_groups(twins[0], LENGTHS)[3:5]
    same = first.choices[0], first.choices[0]
    tied = dataclasses.replace(first, choices=same, choice_texts=("{", "}"))
    doubled = dataclasses.replace(first, choices=same, choice_texts=("a", "a "))
    groups = [tied, doubled, second, first]
    predictions = rank_classification.score_groups(
        transformer(), weights(), groups, 4, partitioning.make_mesh()
    )
    assert [predictions[group].is_tied for group in groups] == [True, False, False, False]
    assert predictions[tied].best == 0
    results = rank_classification.task_results({twins[0]: groups}, predictions, TaskRoles())
    odd = results[twins[0]]["odd"]
    assert (odd["tied_scores"], odd["equal_tokens"], odd["doubled_choices"]) == (1, 1, 1)


def test_best_answers_by_length():
    """By hand, each measure another answer."""
    group = choices.ChoiceGroup(
        task="t",
        idx=0,
        inputs=np.array([5, 1]),
        choices=tuple(np.arange(length) for length in (5, 2, 4)),  # per token -0.8, -3, -1.38
        is_correct=(True, False, False),
        input_text="x",
        # per character -2, -1.2, -1.83; per byte -2, -1.2, -0.92
        choice_texts=("no", "maybe", "ééé"),
        input_truncated=False,
        target_truncated=False,
    )
    scores = [-4.0, -6.0, -5.5]
    expected = {"acc_norm": 1, "acc_bytes": 2, "acc_tokens": 0}
    assert rank_classification.best_by_length(group, scores) == expected
    empty = dataclasses.replace(group, choice_texts=("", "maybe", "ééé"))
    assert rank_classification.best_by_length(empty, scores) == expected
    odd = dataclasses.replace(group, is_correct=(False, True, False))
    predictions = {g: rank_classification.Prediction(0, False, scores) for g in (group, odd)}
    roles = TaskRoles(eval_splits={"t": "test"})
    plain, normalized = (
        rank_classification.task_results({"t": [group, odd]}, predictions, roles, 0, flag)["t"]
        for flag in (False, True)
    )
    assert normalized == plain | {"acc_norm": 0.5, "acc_bytes": 0.0, "acc_tokens": 0.5}
    assert plain["accuracy"] == 0.5


def test_nothing_to_score():
    empty = {"a_score_eval": [], "b_score_eval": []}
    with pytest.raises(InputError, match="nothing to score in 'm': no rows with answer choices in"):
        rank_classification.report_rows("m", empty, TaskRoles())


def test_odd_rows_are_printed_unless_the_summary_has_counted_them(twins, capsys):
    groups = {name: choices.load_choice_groups(name, LENGTHS) for name in twins}
    rank_classification.report_rows("m", {**groups, "empty_score_eval": []}, TaskRoles())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "not scored, no rows with answer choices in the evaluation split: 1 task (empty_score_eval)"
    )
    assert lines[1] == "odd rows: targets not among their choices: 1 (odd_score_eval example 4)"
    assert "odd rows: empty inputs: 1 (odd_score_eval example 5)" in lines
    kinds = ["target_not_in_choices", "empty_input"]
    counted = TaskRoles(counted_odd_rows={"odd_score_eval": kinds})
    rank_classification.report_rows("m", groups, counted)
    others = [line for line in lines[1:] if "not among" not in line and "empty" not in line]
    assert capsys.readouterr().out.splitlines() == others


def test_scores_that_are_not_finite_are_an_error(twins):
    groups = choices.load_choice_groups(twins[0], LENGTHS)[3:5]
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), weights())
    with pytest.raises(
        InputError, match=r"run: expected finite scores, got \[nan.* for odd_score_"
    ):
        rank_classification.score_groups(
            transformer(), broken, groups, 2, partitioning.make_mesh(), "run"
        )


# --- few-shot evaluation, last as it registers other folders ---


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """A random base model."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    config = dataclasses.replace(CONFIG, vocab_size=256)
    initial = network.init_params(network.Transformer(config), 0, params.is_base)
    base_model.save_base(path, initial, config.as_dict())
    return path


def evaluate_folder(base: pathlib.Path, folder: pathlib.Path, out: pathlib.Path, shots: int):
    """Returns the run in results.json, and the predictions of each task."""
    settings = {
        "CHECKPOINT_PATH": base,
        "EVAL_OUTPUT_DIR": out,
        "JSONL_DIR": folder,
        "VOCAB_PATH": make_vocab(folder),
        "EVAL_TASKS": ["*"],
        "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 8},
        "BATCH_SIZE": 4,
        "SHOTS": shots,
        "LENGTH_NORMALIZED": shots > 0,
    }
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    assert evaluate.main(["--gin_file=runs/evaluate.gin", *flags]) == 0
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    predictions = {
        path.name.removesuffix("_score_eval.jsonl"): [*map(json.loads, path.open())]
        for path in (out / "predictions" / "base").iterdir()
    }
    return run, predictions


def test_shots_equal_longer_inputs(base, tmp_path):
    """The scores are those of a zero-shot evaluation of the same text."""
    rng = np.random.default_rng(3)
    choices = ["yes", "no", "maybe"]
    for task in ("first", "second"):
        rows = [
            (" ".join(rng.choice(WORDS, rng.integers(2, 9))), str(rng.choice(choices)), choices)
            for _ in range(16)
        ]
        write(tmp_path / "few", task, "train", rows)
        # The first row is leaked.
        write(tmp_path / "few", task, "validation", [rows[0], *rows[-6:]][:7])
    run, few = evaluate_folder(base, tmp_path / "few", tmp_path / "few_results", shots=3)
    for task, lines in few.items():
        file = tmp_path / "few_results" / "shots" / f"{task}_score_eval.jsonl"
        shots = [*map(json.loads, file.open())]
        joined = []
        for line in lines:
            others = [shot for shot in shots if shot["inputs"] != line["inputs"]][:3]
            texts = [f"{shot['inputs']} {shot['targets']}" for shot in others]
            joined.append(" ".join([*texts[len(texts) - line["shots"] :], line["inputs"]]))
        write(tmp_path / "joined", task, "validation", [(text, "yes", choices) for text in joined])
        left_out = run["tasks"][f"{task}_score_eval"]["shots_left_out"]
        assert left_out == sum(3 - line["shots"] for line in lines)
        assert 0 < left_out < 3 * len(lines)
    assert (run["shots"], run["shots_seed"]) == (3, 0)
    table = (tmp_path / "few_results" / "results.md").read_text()
    assert "| shots left out |" in table and "cut input" not in table
    assert "| base | per byte (acc_bytes)     |" in table
    assert all(0 <= entry["acc_tokens"] <= 1 for entry in run["tasks"].values())
    run, zero = evaluate_folder(base, tmp_path / "joined", tmp_path / "zero_results", shots=0)
    assert {task: [line["scores"] for line in lines] for task, lines in few.items()} == {
        task: [line["scores"] for line in lines] for task, lines in zero.items()
    }
    assert len(zero) == 2 and not re.search("shots|acc_", json.dumps([run, zero]))
    assert not re.search("shots|acc_", (tmp_path / "zero_results" / "results.md").read_text())
    assert not (tmp_path / "zero_results" / "shots").exists()


# --- what is recorded for `pemoe report` ---


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
