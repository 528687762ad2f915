"""`pemoe evaluate` on MMLU and `pemoe infer` on BBH: means are those of the predictions."""

import csv
import json
import pathlib
import re
import statistics

import numpy as np
import pytest
from benchmark_folders import BBH_TASKS, TEST_SIZES, write_bbh, write_mmlu

from pemoe_jax import evaluate, infer
from pemoe_jax.checkpoints import base_model
from pemoe_jax.core import decoding, network, params
from pemoe_jax.tasks import quickstart
from pemoe_jax.tasks.vocabulary import load_vocabulary

CONFIG = network.T5Config(
    vocab_size=1152,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Folders of both benchmarks, and two random bases."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_mmlu(root / "mmlu")
    write_bbh(root / "bbh")
    for seed in (0, 1):
        base = network.init_params(network.Transformer(CONFIG), seed, params.is_base)
        flat = params.flatten(base)
        for path in flat:  # answers depend on the question
            if "encoder_decoder_attention" in path or "logits" in path:
                flat[path] = flat[path] * 6
        path = root / f"base_{seed}.safetensors"
        base_model.save_base(path, params.unflatten(flat), CONFIG.as_dict())
    return root


def flags(folder: pathlib.Path, run: str, out: pathlib.Path, **macros) -> list[str]:
    settings = {
        "CHECKPOINT_PATH": [str(folder / f"base_{seed}.safetensors") for seed in (0, 1)],
        "EVAL_OUTPUT_DIR": out,
        "VOCAB_PATH": quickstart.vocabulary(),
        "BATCH_SIZE": 8,
        **macros,
    }
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    return [f"--gin_file=runs/{run}.gin", *flags]


def read(out: pathlib.Path) -> dict[str, dict]:
    return {run["name"]: run for run in json.loads((out / "results.json").read_text())["runs"]}


def predictions(out: pathlib.Path, run: str, task: str) -> list[dict]:
    path = out / "predictions" / run / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_means_of_mmlu_are_those_of_its_predictions(folder, tmp_path, capsys):
    lengths = {"inputs": 320, "targets": 4}
    macros = {"MMLU_DIR": folder / "mmlu", "TASK_FEATURE_LENGTHS": lengths}
    assert evaluate.main(flags(folder, "mmlu", tmp_path, **macros)) == 0
    runs = read(tmp_path)
    means = {}
    for name in ("base_0", "base_1"):
        accuracies = {}
        for subject, size in TEST_SIZES.items():
            with (folder / "mmlu" / "test" / f"{subject}_test.csv").open(newline="") as file:
                answers = [row[-1] for row in csv.reader(file)]
            rows = predictions(tmp_path, name, f"mmlu_{subject}_score_eval")
            chosen = ["ABCD"[int(np.argmax(row["scores"]))] for row in rows]
            assert len(chosen) == size
            accuracies[subject] = statistics.fmean(
                letter == answer for letter, answer in zip(chosen, answers, strict=True)
            )
        summary = runs[name]["benchmarks"]["MMLU"]
        assert summary["mean"] == pytest.approx(statistics.fmean(accuracies.values()))
        assert (summary["members"], summary["of"], len(summary["missing"])) == (5, 57, 52)
        stem = (accuracies["astronomy"] + accuracies["college_biology"]) / 2
        areas = {area: values["mean"] for area, values in summary["areas"].items()}
        assert areas == {
            "STEM": pytest.approx(stem),
            "humanities": pytest.approx(accuracies["philosophy"]),
            "social sciences": pytest.approx(accuracies["sociology"]),
            "other": pytest.approx(accuracies["nutrition"]),
        }
        means[name] = summary["mean"]
        # The subject with the longest name and questions has no room for five shots.
        left_out = {task: result["shots_left_out"] for task, result in runs[name]["tasks"].items()}
        for task, count in left_out.items():
            rows = predictions(tmp_path, name, task)
            assert count == sum(5 - row["shots"] for row in rows)
        assert runs[name]["shots"] == 5
        assert 0 < summary["shots_left_out"] == sum(left_out.values()) < 25 * 5
    assert len(set(means.values())) == 2, "the bases should differ"
    printed = capsys.readouterr().out
    markdown = (tmp_path / "results.md").read_text()
    for text in (printed, markdown):
        assert "MMLU: accuracy in %, mean over subjects" in text and "2 of 18" in text
    for name, mean in means.items():
        assert re.search(rf"\| {name} .* {100 * mean:.1f} \|\n", markdown)
    assert "not in the means over subjects: abstract_algebra, college_chemistry," in markdown


def test_means_of_bbh_are_those_of_its_predictions(folder, tmp_path, monkeypatch, capsys):
    """Predictions are fixed: whether one is right depends on the input, the task and the mode."""
    vocabulary = load_vocabulary(quickstart.vocabulary())
    texts = ("it is warm. so the answer is yes.", "no", "so the answer is no.", "yes.", "the sky")

    def decode(model, weights, inputs, length, *_):
        rows = np.zeros((len(inputs), length), np.int32)
        for row, tokens in zip(rows, np.asarray(inputs), strict=True):
            ids = vocabulary.encode(texts[int(tokens.sum()) % len(texts)])
            row[: len(ids)] = ids
        return rows

    monkeypatch.setattr(decoding, "greedy_decode", decode)
    lengths = {"inputs": 512, "targets": 24}
    macros = {"BBH_DIR": folder / "bbh", "TASK_FEATURE_LENGTHS": lengths}
    macros["CHECKPOINT_PATH"] = folder / "base_0.safetensors"
    assert infer.main(flags(folder, "bbh", tmp_path, **macros)) == 0
    run = read(tmp_path)["base_0"]
    means = {}
    by_mode = {}
    for mode in ("direct", "reasoning"):
        scores = by_mode[mode] = {}
        for task in BBH_TASKS:
            examples = json.loads((folder / "bbh" / "bbh" / f"{task}.json").read_text())["examples"]
            rows = predictions(tmp_path, "base_0", f"bbh_{mode}_{task}")
            answers = [
                re.sub(r"^.*the answer is ", "", row["prediction"]).rstrip(".") for row in rows
            ]
            assert answers == [row["answer"] for row in rows]
            pairs = zip(answers, examples, strict=True)
            scores[task] = 100 * statistics.fmean(a == e["target"] for a, e in pairs)
        deduction = [score for task, score in scores.items() if task.startswith("logical_")]
        summary = run["benchmarks"][f"BBH, {mode}"]
        means[mode] = (scores["navigate"] + sum(deduction) / 2) / 2
        assert summary["mean"] == pytest.approx(means[mode])
        assert (summary["members"], summary["of"], len(summary["missing"])) == (2, 23, 24)
        assert all(
            row["shots"] == 3
            for task in BBH_TASKS
            for row in predictions(tmp_path, "base_0", f"bbh_{mode}_{task}")
        )
    assert by_mode["direct"] != by_mode["reasoning"] and min(means.values()) > 0
    printed = capsys.readouterr().out
    assert "BBH, direct: accuracy in %" in printed and "2 of 23" in printed
    markdown = (tmp_path / "results.md").read_text()
    for mean in means.values():
        assert re.search(rf"\| base_0 +\| none +\| +3 \| +{mean:.1f} \|\n", markdown)


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"MMLU_DIR": "m", "BBH_DIR": "b"}, "expected one folder of tasks, got MMLU_DIR='m', BBH_"),
        ({"MMLU_DIR": "no/such"}, "MMLU_DIR "),
        ({"MMLU_SPLIT": "dev"}, "MMLU_SPLIT must be one of 'test', 'val', got 'dev'"),
        ({"EVAL_TASKS": ["a"]}, "EVAL_TASKS must be None with MMLU_DIR, got ['a']: name a"),
        ({"MIXTURE_OR_TASK_NAME": "mmlu"}, "unknown task or mixture 'mmlu'"),
    ],
)
def test_wrong_settings_are_one_line(folder, tmp_path, capsys, macros, message):
    macros = {"MMLU_DIR": folder / "mmlu", **macros}
    assert evaluate.main(flags(folder, "mmlu", tmp_path, **macros)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error
    assert not list(tmp_path.iterdir())
