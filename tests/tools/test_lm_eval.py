"""lm-evaluation-harness with our model and exported tasks agrees with `pemoe evaluate`."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

import pemoe_jax
from pemoe_jax import evaluate
from pemoe_jax.core.errors import InputError
from pemoe_jax.tools import export_tasks, lm_eval, lm_eval_model

REPO = pathlib.Path(__file__).parent.parent.parent
BASE = str(REPO / "tasks/quickstart/base.safetensors")
VOCAB = str(REPO / "tasks/quickstart/vocab.model")
PROMPTS = str(REPO / "docs/my_prompts")
TASKS = ["reviews_liked", "reviews_hated", "titles_choose"]
LENGTHS = {"inputs": 128, "targets": 32}


@pytest.fixture(scope="module")
def model() -> lm_eval_model.PemoeLM:
    return lm_eval_model.PemoeLM(base=BASE, vocabulary=VOCAB, batch_size="auto", device="cpu")


def requests(*arguments: tuple) -> list:
    return [types.SimpleNamespace(args=args) for args in arguments]


def test_contexts_are_encoded_once_and_answers_are_in_order(model, monkeypatch):
    texts = ["Did they like it? It was fun.", "Why?"]
    pairs = [(text, choice) for choice in ("yes", "no", "because") for text in texts]
    calls = []
    score = model.model.score
    monkeypatch.setattr(model.model, "score", lambda *args: calls.append(args) or score(*args))
    answers = model.loglikelihood(requests(*pairs, pairs[0]))
    assert calls == [(texts, [["yes", "no", "because"]] * 2)]
    assert answers[-1] == answers[0]
    ranked = {text: dict(model.model.rank(text, ["yes", "no", "because"])) for text in texts}
    expected = [ranked[text][choice] for text, choice in pairs]
    np.testing.assert_allclose([log_prob for log_prob, _ in answers[:-1]], expected, rtol=2e-5)


def test_a_choice_is_greedy_if_it_is_generated(model):
    text = "What is a good title for this text? The rain fell on the harbour."
    (answer,) = model.generate_until(requests((text, {"max_gen_toks": 16})))
    (is_greedy, is_other) = model.loglikelihood(requests((text, answer), (text, f"{answer} no")))
    assert is_greedy[1] and not is_other[1] and is_greedy[0] > is_other[0]


def test_the_extra_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert lm_eval.main(["--model", "pemoe"]) == 1
    assert "error: pemoe lm_eval needs the extra lm-eval (" in capsys.readouterr().err
    assert lm_eval.main(["--help"]) == 0 and "--model_args of pemoe" in capsys.readouterr().out


def test_generation_stops(model):
    text = "What is a good title for this text? The rain fell on the harbour."
    whole, cut, short = model.generate_until(
        requests(
            (text, {"max_gen_toks": 16, "until": ["\n\n", ""], "do_sample": False}),
            (text, {"max_gen_toks": 16, "until": " "}),
            (text, {"max_gen_toks": 1, "temperature": 0.0}),
        )
    )
    assert cut == whole.split(" ")[0] and whole.startswith(short) and len(short) < len(whole)


def test_refusals(model):
    with pytest.raises(InputError, match="encoder-decoder, which has no .*loglikelihood_rolling"):
        model.loglikelihood_rolling(requests(("a text",)))
    with pytest.raises(InputError, match="do_sample must be False .*got True"):
        model.generate_until(requests(("a", {"do_sample": True})))
    with pytest.raises(InputError, match="must be those of docs/lm_eval.md, got 'pretr"):
        lm_eval_model.PemoeLM(base=BASE, pretrained="gpt2")
    with pytest.raises(InputError, match="batch_size must be a positive .* got 'large'"):
        lm_eval_model.PemoeLM(base=BASE, batch_size="large")
    with pytest.raises(InputError, match="must have base=… or adapter=…, got neither"):
        lm_eval_model.PemoeLM()


@pytest.mark.slow
def test_the_benchmark_runs_and_both_models_agree(tmp_path):
    """Scores of lm_eval's own model of T5, on the same folder of Hugging Face."""
    pytest.importorskip("transformers")
    flags = (
        f"--size tiny --requests 3 --choices 2 --length 24 --rounds 1 --json {tmp_path / 'rows'}"
    )
    command = [sys.executable, str(REPO / "benchmarks/lm_eval_choices.py"), *flags.split()]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""}
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows").read_text())
    assert row["row"] == "lm_eval_choices/cpu" and row["ratio"][1] > 0


def data_flags() -> list[str]:
    settings = {"JSONL_DIR": PROMPTS, "VOCAB_PATH": VOCAB, "EVAL_TASKS": TASKS}
    settings["TASK_FEATURE_LENGTHS"] = LENGTHS
    return [f"--gin.{name}={value}" for name, value in settings.items()]


def export(folder: pathlib.Path, *flags: str) -> int:
    run = ["--gin_file=runs/export_tasks.gin", f"--gin.LM_EVAL_DIR={folder}", *data_flags()]
    return export_tasks.main([*run, *flags])


def test_an_empty_choice_is_not_exported(tmp_path, capsys):
    """lm_eval would divide by its length; `pemoe evaluate` scores its EOS."""
    rows = [
        {"inputs": "Why?", "targets": "yes", "answer_choices": ["yes", choice]}
        for choice in ("no", "")
    ]
    (tmp_path / "prompts/empty").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "prompts/empty/validation.jsonl").write_text(lines)
    flags = [f"--gin.JSONL_DIR={tmp_path / 'prompts'}", "--gin.EVAL_TASKS=['empty']"]
    assert export(tmp_path / "tasks", *flags) == 1
    error = capsys.readouterr().err
    assert "empty_score_eval: example 2: answer choices must not be empty, got" in error
    assert "['yes', '']" in error and error.count("\n") == 1
    assert not (tmp_path / "tasks").exists()
    assert export(tmp_path / "tasks", *flags, "--gin.EVAL_EXAMPLES=1") == 0


@pytest.mark.slow
def test_both_evaluations_agree_to_the_example(tmp_path, capsys, recwarn):
    """Accuracies and log-likelihoods of an adapter on three prompts."""
    adapter = pemoe_jax.finetune(
        BASE,
        "mov",
        PROMPTS,
        tmp_path / "mov",
        vocabulary=VOCAB,
        eval_tasks=TASKS,
        task_feature_lengths=LENGTHS,
        train_steps=8,
        batch_size=8,
        num_experts=2,
    )
    flags = [f"--gin.CHECKPOINT_PATH={adapter}", f"--gin.EVAL_OUTPUT_DIR={tmp_path / 'results'}"]
    flags += ["--gin.LENGTH_NORMALIZED=True", *data_flags()]
    assert evaluate.main(["--gin_file=runs/evaluate.gin", *flags]) == 0
    (run,) = json.loads((tmp_path / "results/results.json").read_text())["runs"]

    assert export(tmp_path / "tasks") == 0
    assert export(tmp_path / "tasks") == 1
    assert "LM_EVAL_DIR must be a new or an empty folder" in capsys.readouterr().err
    arguments = ["--model", "pemoe", "--model_args", f"adapter={adapter},vocabulary={VOCAB}"]
    arguments += ["--tasks", "pemoe", "--include_path", str(tmp_path / "tasks")]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "32"]
    assert lm_eval.main(arguments) == 0
    assert not [warning for warning in recwarn if "os.fork()" in str(warning.message)]

    (file,) = (tmp_path / "out").glob("**/results_*.json")
    theirs = json.loads(file.read_text())["results"]
    for task in TASKS:
        ours = run["tasks"][f"{task}_score_eval"]
        assert theirs[task]["acc,none"] == pytest.approx(ours["accuracy"], abs=1e-9)
        for name in ("acc_norm", "acc_bytes"):
            assert theirs[task][f"{name},none"] == pytest.approx(ours[name], abs=1e-9)
        (file,) = (tmp_path / "out").glob(f"**/samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.open()), key=lambda sample: sample["doc_id"])
        lines = (tmp_path / f"results/predictions/mov/{task}_score_eval.jsonl").open()
        for sample, line in zip(samples, map(json.loads, lines), strict=True):
            assert sample["acc"] == line["correct"]
            scores = [float(answer[0]) for answer in sample["filtered_resps"]]
            np.testing.assert_allclose(scores, line["scores"], atol=2e-4)
