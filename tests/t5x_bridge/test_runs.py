"""Whole runs with the gin files: the same as `pemoe train`, resumed, scored and decoded."""

import copy
import json
import pathlib
import types

import numpy as np
import pytest
from jsonl_folder import write_folder, write_vocabulary
from programs import DIMENSIONS, flat, parsed, pemoe, read_metrics, read_tensorboard, t5x

from pemoe_jax.core.errors import InputError

MODEL = "models/t5_1_1_tiny.gin"
METHODS = {
    "ia3": ["methods/ia3.gin"],
    "lora": ["methods/lora.gin"],
    "mov": ["methods/mov.gin"],
    "molora": ["methods/molora.gin"],
    "mov_top_2_balanced": ["methods/mov.gin", "routing/top_2_balanced.gin"],
}
# MoV's experts start equal, so the first gradients of its soft routers are mere rounding, which
# Adafactor scales to full steps: no two programs would agree.
SMOOTH = {"OPTIMIZER": "@optim.adamw", "optim.adamw.eps": 1e-3}
STEPS = 6
HALF = 3
RUN = {"TRAIN_STEPS": STEPS, "BATCH_SIZE": 4, "LOG_PERIOD": 1, "LEARNING_RATE": 1e-2}
RUN |= {"OPTIMIZER": "@optim.adafactor", "SCHEDULE": "constant"}
SAVED = {"CHECKPOINT_PERIOD": HALF, "KEEP_CHECKPOINTS": None}


def settings(method: str) -> dict:
    return {**DIMENSIONS, **({"NUM_EXPERTS": 3} if "mo" in method else {})}


def train_settings(workspace, method: str, model_dir: pathlib.Path) -> dict:
    where = {"MODEL_DIR": str(model_dir), "INITIAL_CHECKPOINT_PATH": str(workspace.base)}
    smooth = SMOOTH if method == "mov" else {}
    return {**settings(method), **workspace.data, **RUN, **where, **smooth}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> types.SimpleNamespace:
    """A folder of tasks, a vocabulary, and a base with random weights."""
    from pemoe_jax.checkpoints import base_model
    from pemoe_jax.core import network, params

    folder = tmp_path_factory.mktemp("t5x")
    write_folder(folder / "data")
    write_vocabulary(folder / "spiece.model")
    dimensions = {name.rpartition(".")[2].lower(): value for name, value in DIMENSIONS.items()}
    config = network.T5Config(**dimensions)
    drawn = network.init_params(network.Transformer(config), 5, params.is_base)
    base_model.save_base(folder / "base_model.safetensors", drawn, config.as_dict())
    return types.SimpleNamespace(
        folder=folder,
        base=folder / "base_model.safetensors",
        weights=flat(drawn),
        data={
            "JSONL_DIR": str(folder / "data"),
            "VOCAB_PATH": str(folder / "spiece.model"),
            "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 8},
        },
    )


def train_in_t5x(workspace, method: str, model_dir: pathlib.Path, **more):
    files = [MODEL, *METHODS[method], "runs_t5x/finetune.gin"]
    return t5x("train", files, **train_settings(workspace, method, model_dir) | SAVED | more)


@pytest.fixture(scope="module", params=METHODS)
def run(request, workspace) -> types.SimpleNamespace:
    """A run in T5X, one that is resumed halfway, and one of `pemoe train`."""
    method = request.param
    folder = workspace.folder / method
    step, state = train_in_t5x(workspace, method, folder / "whole")
    train_in_t5x(workspace, method, folder / "parts", TRAIN_STEPS=HALF)
    resumed_step, resumed = train_in_t5x(workspace, method, folder / "parts")
    assert step == resumed_step == STEPS
    files = [MODEL, *METHODS[method], "runs/finetune.gin"]
    pemoe("train", files, **train_settings(workspace, method, folder / "pemoe"))
    return types.SimpleNamespace(
        method=method, folder=folder, params=flat(state.params), resumed=flat(resumed.params)
    )


def test_losses_equal_those_of_pemoe_train(run):
    actual, expected = read_tensorboard(run.folder / "whole"), read_metrics(run.folder / "pemoe")
    assert sorted(actual) == sorted(expected) == list(range(1, STEPS + 1))
    for step in actual:  # later steps accumulate the rounding of earlier ones
        loss = pytest.approx(expected[step]["train/loss"], rel=1e-6 if step == 1 else 1e-5)
        assert actual[step]["loss"] == loss


def test_adapters_equal_those_of_pemoe_train(run):
    """Within 2e-5 of the change of each array, and rounding.

    A soft router whose experts are still nearly equal is compared to 2e-3 of it, since its gradient
    is a small difference of large terms: there `pemoe train` differs by up to 2.4e-4 between XLA's
    optimization levels, and from T5X by 4.9e-4. test_t5x_steps.py compares the gradients of
    different experts to 5e-6.
    """
    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import network, params

    opened = models.open_model(str(run.folder / "pemoe"))
    expected = flat(opened.load_trained())
    assert expected.keys() == {path for path in run.params if "_adapter/" in path}
    start = flat(network.init_params(opened.model, 0, params.is_adapter))
    for path, array in expected.items():
        moved = np.abs(array - start[path]).max()
        assert moved > 0.0, path
        nearly_equal = run.method == "mov" and "/router/" in path
        bound = (2e-3 if nearly_equal else 2e-5) * moved + 2e-7 * np.abs(array).max()
        assert np.abs(run.params[path] - array).max() < bound, path


def test_a_resumed_run_equals_an_uninterrupted_one(run):
    whole, parts = read_tensorboard(run.folder / "whole"), read_tensorboard(run.folder / "parts")
    assert {step: row["loss"] for step, row in parts.items()} == {
        step: row["loss"] for step, row in whole.items()
    }
    for path, array in run.params.items():
        assert np.array_equal(run.resumed[path], array), path


def test_frozen_parameters_do_not_change(run, workspace):
    for params in (run.params, run.resumed):
        frozen = {path: array for path, array in params.items() if "_adapter/" not in path}
        assert frozen.keys() == workspace.weights.keys()
        for path, array in workspace.weights.items():
            assert array.tobytes() == frozen[path].tobytes(), path


def test_checkpoints_contain_trainable_parameters(run):
    from pemoe_jax.checkpoints import t5x_run

    arrays, record, step = t5x_run.open_trained(run.folder / "whole")
    assert step == STEPS and record.base["needed"]
    assert arrays.keys() == {path for path in run.params if "_adapter/" in path}
    assert record.trained_datasets == ["colour", "free"]
    earlier, _, step = t5x_run.open_trained(run.folder / "whole" / f"checkpoint_{HALF}")
    assert step == HALF and earlier.keys() == arrays.keys()
    for path, array in earlier.items():
        assert not np.array_equal(array.read(), arrays[path].read()), path


def test_router_metrics_have_the_names_of_pemoe_train(run):
    actual, expected = read_tensorboard(run.folder / "whole"), read_metrics(run.folder / "pemoe")
    names = {name for name in expected[STEPS] if name.startswith("router/")}
    assert names == {name for name in actual[STEPS] if name.startswith("router/")}
    assert bool(names) == run.method.startswith("mo")
    for step in actual:
        for name in names:
            assert actual[step][name] == pytest.approx(expected[step][name], rel=1e-5, abs=1e-7)
    if run.method.endswith("balanced"):
        assert actual[STEPS]["router/aux_loss"] > 0.009  # 1e-2 times a loss of at least about 1


def test_both_evaluate_runs_of_both(run, workspace):
    """`t5x.eval` and `pemoe evaluate` take both runs as a list."""
    paths = [str(run.folder / "whole"), str(run.folder / "pemoe")]
    common = {**workspace.data, "CHECKPOINT_PATH": paths}
    out = {name: run.folder / f"scores_{name}" for name in ("t5x", "pemoe")}
    files = [MODEL, *METHODS[run.method], "runs_t5x/evaluate.gin"]
    t5x("eval", files, **settings(run.method), **common, EVAL_OUTPUT_DIR=str(out["t5x"]))
    pemoe("evaluate", ["runs/evaluate.gin"], **common, EVAL_OUTPUT_DIR=str(out["pemoe"]))
    results = json.loads((out["pemoe"] / "results.json").read_text())["runs"]
    assert [result["step"] for result in results] == [STEPS, STEPS]
    assert [result["name"] for result in results] == ["whole", "pemoe"]
    for task in ("check_1_score_eval", "check_2_score_eval"):
        file = out["t5x"] / "inference_eval" / f"{task}-metrics.jsonl"
        scores = [json.loads(line)["accuracy"] for line in file.read_text().splitlines()]
        assert scores == pytest.approx([result["tasks"][task]["accuracy"] for result in results])


def test_a_step_that_does_not_exist_is_an_error(tmp_path):
    """Otherwise the newest checkpoint of the run would be evaluated."""
    from pemoe_jax.t5x_bridge import checkpoints

    (tmp_path / "run" / "checkpoint_6").mkdir(parents=True)
    path = str(tmp_path / "run" / "checkpoint_6")
    assert checkpoints.checkpoint_path([path]) == [path]
    with pytest.raises(InputError, match=r"run/checkpoint_7: no such checkpoint"):
        checkpoints.checkpoint_path([path, str(tmp_path / "run" / "checkpoint_7")])


def test_decoding_equals_that_of_pemoe_infer(run, workspace):
    common = {**workspace.data, "CHECKPOINT_PATH": str(run.folder / "whole")}
    files = [MODEL, *METHODS[run.method], "runs_t5x/infer.gin"]
    out = {name: run.folder / f"infer_{name}" for name in ("t5x", "pemoe")}
    t5x("infer", files, **settings(run.method), **common, INFER_OUTPUT_DIR=str(out["t5x"]))
    pemoe("infer", ["runs/infer.gin"], **common, EVAL_OUTPUT_DIR=str(out["pemoe"]))
    compared = 0
    for file in (out["pemoe"] / "predictions" / "whole").glob("*.jsonl"):
        expected = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
        theirs = out["t5x"] / f"{file.stem}-predict.jsonl-00000-of-00001"
        predictions = [json.loads(line)["prediction"] for line in theirs.read_text().splitlines()]
        assert predictions == expected, file.stem
        compared += len(predictions)
    assert compared >= 18


def test_experts_are_not_spread_over_devices():
    """T5X's mesh is `data` × `model`: rules name no other axis, and asking for one is an error."""
    from pemoe_jax import t5x_bridge

    assert {axes for _, axes in t5x_bridge.axis_rules(fsdp=True)} == {"data", "model", None}
    with pytest.raises(InputError, match="EXPERT_PARALLELISM must be 1 in T5X, .* got 2"):
        t5x_bridge.axis_rules(expert_parallelism=2)


@pytest.mark.parametrize(
    ("flag", "changed", "value"),
    [
        ("RANDOM_SEED", "SEED", 7),
        ("SEED", "SEED", 7),
        ("partitioning.PjitPartitioner.num_partitions", "partition", 2),
        ("MODEL_PARALLELISM", "partition", 2),
        ("utils.create_learning_rate_scheduler.base_learning_rate", "rate", 0.25),
        ("LEARNING_RATE", "rate", 0.25),
    ],
)
def test_names_of_t5x_take_effect(workspace, tmp_path, flag, changed, value):
    """Flags with T5X's names reach what T5X's `train` gets, as our macros do."""
    import gin

    def evaluate(name: str):  # gin evaluates references where they are copied
        return copy.deepcopy(gin.query_parameter(name))

    files = [MODEL, *METHODS["mov"], "runs_t5x/finetune.gin"]
    settings = {**train_settings(workspace, "mov", tmp_path), "LEARNING_RATE": 0.125, flag: value}
    with parsed("train", files, **settings):
        seeds = (
            evaluate("train_script.train.random_seed"),
            evaluate("train_script.train.model").seed,
        )
        actual = {
            "SEED": seeds,
            "partition": evaluate("train_script.train.partitioner")._num_partitions,
            "rate": float(evaluate("t5x.trainer.Trainer.learning_rate_fn")(5)),
        }
    expected = {"SEED": (0, 0), "partition": 1, "rate": 0.125}
    assert actual == {**expected, changed: (value, value) if changed == "SEED" else value}
