"""`pemoe infer` end to end on a tiny model: predictions, metrics, wrong input."""

import io
import json
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
from jsonl_folder import write_folder, write_vocabulary

from pemoe_jax import infer
from pemoe_jax.analysis import generation
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints import models
from pemoe_jax.core import decoding, network
from pemoe_jax.core import params as params_lib
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks import tokenizer

CONFIG = network.T5Config(
    vocab_size=256,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
LENGTHS = {"inputs": 8, "targets": 6}
TASKS = {"colour_1", "colour_2", "free_1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Tasks, a vocabulary and two random bases whose outputs depend on the input."""
    root = tmp_path_factory.mktemp("infer")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    for seed in (0, 1):
        base = network.init_params(network.Transformer(CONFIG), seed, params_lib.is_base)
        flat = params_lib.flatten(base)
        # Cross-attention dominates, and only ids of words are decoded.
        for path in flat:
            if "encoder_decoder_attention" in path:
                flat[path] = flat[path] * 6
        kernel = np.array(flat["decoder/logits_dense/kernel"])
        kernel[:, 70:] = 0
        flat["decoder/logits_dense/kernel"] = kernel
        base_lib.save_base(
            root / f"base_{seed}.safetensors", params_lib.unflatten(flat), CONFIG.as_dict()
        )
    return root


def flags(folder: pathlib.Path, out: pathlib.Path, **macros) -> list[str]:
    settings = {
        "CHECKPOINT_PATH": folder / "base_0.safetensors",
        "EVAL_OUTPUT_DIR": out,
        "JSONL_DIR": folder / "tasks",
        "VOCAB_PATH": folder / "vocab.model",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 4,
        **macros,
    }
    return [
        "--gin_file=runs/infer.gin",
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]


def read(out: pathlib.Path, task: str, run: str = "base_0") -> list[dict]:
    path = out / "predictions" / run / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def decoded(folder, tmp_path_factory) -> pathlib.Path:
    """Both bases decoded on the evaluation splits of the training tasks."""
    out = tmp_path_factory.mktemp("decoded")
    bases = [str(folder / f"base_{seed}.safetensors") for seed in (0, 1)]
    assert infer.main(flags(folder, out, CHECKPOINT_PATH=bases)) == 0
    return out


def test_predictions_equal_greedy_decoding_of_each_example(folder, decoded):
    """Without padding: batching and devices do not change a prediction."""
    vocabulary = tokenizer.open_tokenizer(folder / "vocab.model")
    texts = set()
    for run in ("base_0", "base_1"):
        opened = models.open_model(str(folder / f"{run}.safetensors"))
        params = opened.load()
        for task in TASKS:
            lines = read(decoded, task, run)
            assert len(lines) == 6
            for line in lines:
                ids = vocabulary.encode(line["inputs"])[: LENGTHS["inputs"] - 1] + [1]
                tokens = decoding.greedy_decode(
                    opened.model, params, np.array([ids]), LENGTHS["targets"]
                )
                assert vocabulary.decode(np.asarray(tokens)[0].tolist()) == line["prediction"]
                texts.add(line["prediction"])
    assert len(texts) > 4, "the model should give different predictions"


def test_predictions_are_in_the_order_of_the_examples(folder, decoded):
    for task in TASKS:
        rows = (folder / "tasks" / task / "validation.jsonl").read_text().splitlines()
        for row, line in zip(map(json.loads, rows), read(decoded, task), strict=True):
            assert (line["inputs"], line["targets"]) == (row["inputs"], row["targets"])


def test_shots_come_before_each_input(folder, tmp_path, capsys):
    """Every evaluated row is also in the train split, and never a shot of itself."""
    out = tmp_path / "out"
    lengths = {"inputs": 22, "targets": 6}
    macros = {"TASK_FEATURE_LENGTHS": lengths, "SHOTS": 2, "SHOTS_SEED": 5}
    assert infer.main(flags(folder, out, **macros)) == 0
    assert "2 shots in front of each input; " in capsys.readouterr().out
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert (run["shots"], run["shots_seed"]) == (2, 5)
    opened = models.open_model(str(folder / "base_0.safetensors"))
    params = opened.load()
    used = set()
    for task in TASKS:
        vocabulary = seqio_tasks.get_mixture_or_task(task).output_features["inputs"].vocabulary
        shots = [json.loads(line) for line in (out / "shots" / f"{task}.jsonl").open()]
        assert len({shot["inputs"] for shot in shots}) == 3
        lines = read(out, task)
        for line in lines:
            others = [shot for shot in shots if shot["inputs"] != line["inputs"]][:2]
            texts = [f"{shot['inputs']} {shot['targets']}" for shot in others]
            texts = [*texts[len(texts) - line["shots"] :], line["inputs"]]
            ids = [*vocabulary.encode(" ".join(texts)), 1]
            assert len(ids) <= lengths["inputs"]
            tokens = decoding.greedy_decode(opened.model, params, np.array([ids]), 6)
            assert vocabulary.decode(np.asarray(tokens)[0].tolist()) == line["prediction"]
            used.add(line["shots"])
        left_out = sum(2 - line["shots"] for line in lines)
        assert run["tasks"][task]["shots_left_out"] == left_out
        assert re.search(rf"\| {task} .* {left_out} \|", (out / "results.md").read_text())
    assert len(used) > 1, "the shots should fit before some inputs only"
    # Other shots would replace these results.
    assert infer.main(flags(folder, out, **macros | {"SHOTS": 0})) == 1
    assert "results with SHOTS=2 and SHOTS_SEED=5 would be lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "SHOTS must be an integer of at least 0, got -1"),
        (1.5, "SHOTS must be an integer, got 1.5"),
        (4, "SHOTS must be at most 3 for 'free_1', as one of its 4 solved examples"),
        (9, "SHOTS must be at most 4 for 'colour_1', the number of its solved examples"),
    ],
)
def test_wrong_shots(folder, tmp_path, capsys, value, message):
    assert infer.main(flags(folder, tmp_path / "out", SHOTS=value)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shots_of_a_text(folder, tmp_path, capsys):
    assert infer.main([*flags(folder, tmp_path, SHOTS=1), "--text", "say snow"]) == 1
    assert "SHOTS must be 0 with --text" in capsys.readouterr().err


def test_results(decoded):
    results = json.loads((decoded / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["base_0", "base_1"]
    for run in results["runs"]:
        assert run["tasks"].keys() == TASKS
        task = run["tasks"]["colour_1"]
        assert (task["dataset"], task["split"], task["examples"]) == ("colour", "validation", 6)
        assert task["metrics"].keys() == {"accuracy"}
        assert task["cut_inputs"] == sum("cut_input" in line for line in read(decoded, "colour_1"))
    text = (decoded / "results.md").read_text()
    assert "| colour " in text and "| free_1 " in text and "base_1: decoded" in text


def test_long_inputs_are_truncated_and_counted(folder, decoded):
    tasks = json.loads((decoded / "results.json").read_text())["runs"][0]["tasks"]
    vocabulary = tokenizer.open_tokenizer(folder / "vocab.model")
    for task in TASKS:
        lines = read(decoded, task)
        long = [len(vocabulary.encode(line["inputs"])) + 1 > 8 for line in lines]
        assert tasks[task]["cut_inputs"] == sum(long)
        assert ["cut_input" in line for line in lines] == long
    assert 0 < sum(task["cut_inputs"] for task in tasks.values()) < 18


def test_metrics_by_name_and_their_values(folder, decoded, tmp_path, capsys):
    """Targets are chosen so that 4 of 6 predictions are correct."""
    for name in ("plain", "asked"):
        rows = [
            {"inputs": line["inputs"], "targets": line["prediction"] if i % 3 else "zebra"}
            for i, line in enumerate(read(decoded, "free_1"))
        ]
        path = tmp_path / "tasks" / name / "validation.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = path.with_name("train.jsonl")
        train.write_text(path.read_text())
    index = {"asked": {"metrics": ["Squad", "ROUGE", "Other"]}}
    (tmp_path / "tasks" / "INDEX.json").write_text(json.dumps(index))
    assert infer.main(flags(folder, tmp_path / "out", JSONL_DIR=tmp_path / "tasks")) == 0
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["tasks"]
    assert tasks["plain"]["metrics"] == {"accuracy": pytest.approx(400 / 6)}
    assert tasks["plain"]["unreachable_targets"] == 2  # the vocabulary has no z
    lines = read(tmp_path / "out", "plain")
    assert [i for i, line in enumerate(lines) if "unreachable_target" in line] == [0, 3]
    printed = capsys.readouterr().out
    assert "odd rows: targets that cannot be decoded (characters" in printed and "): 4 (" in printed
    asked = tasks["asked"]["metrics"]
    assert asked.keys() == {"exact_match", "f1", "rouge1", "rouge2", "rougeLsum"}
    assert asked["exact_match"] == pytest.approx(400 / 6)


def test_a_held_out_mixture_and_a_few_examples(folder, tmp_path):
    """For <task>_score_eval tasks of a mixture, <task> is decoded."""
    macros = {"MIXTURE_OR_TASK_NAME": "jsonl_score_eval", "EVAL_EXAMPLES": 2}
    assert infer.main(flags(folder, tmp_path, **macros)) == 0
    tasks = json.loads((tmp_path / "results.json").read_text())["runs"][0]["tasks"]
    assert {name: task["examples"] for name, task in tasks.items()} == {"check_1": 2, "check_2": 2}


def test_held_out_tasks_are_decoded_where_eval_tasks_is_set(folder, decoded, tmp_path):
    """Also one without choices, and rows without targets, which no metric counts."""
    root = tmp_path / "tasks"
    shutil.copytree(folder / "tasks", root)
    rows = [{"inputs": line["inputs"], "targets": line["prediction"]} for line in
            read(decoded, "free_1")]  # fmt: skip
    for number in (0, 2):
        del rows[number]["targets"]
    rows[3]["targets"] = "zebra"
    path = root / "free_1" / "validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "check_2" / "validation.jsonl"
    path.write_text('{"inputs": "is the grass green"}\n')
    macros = {"JSONL_DIR": root, "EVAL_TASKS": ["free_*", "check_*"]}
    assert infer.main(flags(folder, tmp_path / "out", **macros)) == 0
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["tasks"]
    assert tasks.keys() == {"free_1", "check_1", "check_2"}
    # of 6 rows two have no target, and of the other four one is wrong
    assert tasks["free_1"]["metrics"] == {"accuracy": 75.0}
    assert (tasks["free_1"]["examples"], tasks["free_1"]["without_target"]) == (6, 2)
    assert tasks["check_2"]["metrics"] == {} and "without_target" not in tasks["check_1"]
    lines = read(tmp_path / "out", "free_1")
    assert ["targets" in line for line in lines] == [False, True, False, True, True, True]
    assert [line["prediction"] for line in lines] == [
        line["prediction"] for line in read(decoded, "free_1")
    ]


def test_texts_and_standard_input(folder, decoded, monkeypatch, capsys):
    lines = read(decoded, "free_1")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{lines[1]['inputs']}\n{lines[2]['inputs']}\n"))
    settings = {
        "CHECKPOINT_PATH": folder / "base_0.safetensors",
        "VOCAB_PATH": folder / "vocab.model",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 4,
    }
    command = [f"--gin.{name}={value}" for name, value in settings.items()]
    texts = ["--text", lines[0]["inputs"], "--text=-"]
    assert infer.main(["--gin_file=runs/infer.gin", *command, *texts]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers == [line["prediction"] for line in lines[:3]]
    # An answer for each line, whatever else ends a line elsewhere.
    text = f"\ufeff{lines[0]['inputs']}\r\na\x0bb\u2028c\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert infer.main(["--gin_file=runs/infer.gin", *command, "--text=-"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2 and answers[0] == lines[0]["prediction"]
    assert infer.main(["--gin_file=runs/infer.gin", *command, "--text= "]) == 1
    assert "--text must be a text" in capsys.readouterr().err
    ignored = ["--gin.EVAL_TASKS=['free_1']", "--gin.EVAL_OUTPUT_DIR=/x"]
    assert infer.main(["--gin_file=runs/infer.gin", *command, *ignored, "--text= "]) == 1
    warning = "warning: --text has no use for EVAL_OUTPUT_DIR, EVAL_TASKS\n"
    assert warning in capsys.readouterr().err
    latin = io.TextIOWrapper(io.BytesIO("é".encode("latin-1")), encoding="utf-8")
    for content, value in ((latin, "-"), (None, "a\udcff")):
        monkeypatch.setattr("sys.stdin", content)
        assert infer.main(["--gin_file=runs/infer.gin", *command, f"--text={value}"]) == 1
        assert "error: --text must be UTF-8, got other bytes\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"MIXTURE_OR_TASK_NAME": "colour"}, "unknown task or mixture 'colour'"),
        ({"CHECKPOINT_PATH": "/no/such"}, "/no/such"),
        (
            {"BATCH_SIZE": 3},
            "BATCH_SIZE must be a positive multiple of 2 (data-parallel size 2), got 3",
        ),
        ({"JSONL_DIR": None}, "no data"),
        ({"TASK_FEATURE_LENGTHS": "{'inputs': 8}"}, "must be a positive integer, got None"),
        ({"EVAL_EXAMPLES": 0}, "EVAL_EXAMPLES must be a positive integer"),
        ({"BATCH": 2}, "--gin.BATCH: no gin file has a macro of this name"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, capsys, monkeypatch, macros, message):
    monkeypatch.delenv("PEMOE_P3_DIR", raising=False)
    assert infer.main(flags(folder, tmp_path, **macros)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error
    assert not list(tmp_path.iterdir())


def test_wrong_metrics_and_no_evaluation_split_are_one_line(folder, tmp_path, capsys):
    path = tmp_path / "tasks" / "t" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"inputs": "say", "targets": "yes"}) + "\n")
    command = flags(folder, tmp_path / "out", JSONL_DIR=tmp_path / "tasks")
    assert infer.main(command) == 1
    assert "no task of 'jsonl_decode' has an evaluation split" in capsys.readouterr().err
    path.with_name("test.jsonl").write_text(path.read_text())
    (tmp_path / "tasks" / "INDEX.json").write_text(json.dumps({"t": {"metrics": ["Rouge"]}}))
    assert infer.main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "INDEX.json: 't': 'metrics' must be names among" in error[0]
    assert not (tmp_path / "out").exists()


def test_metrics_of_scores_are_an_error(folder, tmp_path, capsys):
    import seqio

    def score_metric(targets, scores):
        return {}

    assert infer.main(flags(folder, tmp_path, EVAL_EXAMPLES=1)) == 0
    capsys.readouterr()
    plain = seqio_tasks.get_mixture_or_task("free_1")
    scored = plain.replace(name="users_scored", metric_fns=[score_metric])
    seqio.TaskRegistry.add_provider("users_scored", scored)
    try:
        macros = {"EVAL_EXAMPLES": 1, "MIXTURE_OR_TASK_NAME": "users_scored"}
        assert infer.main(flags(folder, tmp_path / "out", **macros)) == 1
    finally:
        seqio.TaskRegistry.remove("users_scored")
    assert "'users_scored' has a metric of SCORE" in capsys.readouterr().err


def test_devices_are_two():
    """The tests above rely on it."""
    assert len(jax.devices()) == 2


def test_logits_that_are_not_finite_are_an_error(folder, tmp_path, capsys, monkeypatch):
    def not_finite(model, params, inputs, length, *_):
        return np.full((len(inputs), length), decoding.NOT_FINITE)

    monkeypatch.setattr(decoding, "greedy_decode", not_finite)
    macros = {"MIXTURE_OR_TASK_NAME": "free_1", "EVAL_EXAMPLES": 1}
    assert infer.main(flags(folder, tmp_path, **macros)) == 1
    error = capsys.readouterr().err.strip()
    assert "expected finite logits, got infinite or NaN ones for free_1, example 1: " in error
    assert not [*tmp_path.iterdir()]


def test_undefined_metrics_are_null():
    """JSON has no NaN."""
    results = {"t": {"m": float("nan"), "n": 2.0}}
    evaluator = types.SimpleNamespace(
        evaluate=lambda **_: (types.SimpleNamespace(result=lambda: results), None)
    )
    task = generation.Task("t", "t", "test", evaluator, None, target_texts=["a"])
    result = generation.compute_metrics(task, [np.zeros(1)], 0)
    assert result["metrics"] == {"m": None, "n": 2.0}
    run = {"name": "r", "tasks": {"t": result}}
    assert generation.dataset_table(run).rows == [["t", "1", "1", "–", "2.0"]]


def test_reachable_targets():
    class Vocabulary:  # lacks braces, changes ½ and keeps single spaces, as T5's
        def encode(self, text):
            return text.replace("½", "1/2").replace("{", "?").split()

        def decode(self, ids):
            return " ".join(ids)

    texts = ("a b", " a  b ", "½", "{", "a b c", "")
    reachable = [generation.is_reachable(Vocabulary(), text, 2) for text in texts]
    assert reachable == [True, True, False, False, False, True]
