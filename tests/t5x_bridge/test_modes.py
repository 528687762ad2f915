"""Further runs in T5X: meshes, bfloat16, full fine-tuning, wrong base models, the commands."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from programs import DIMENSIONS, GIN, bindings, flat, pemoe, read_metrics, read_tensorboard, t5x

MODEL = "models/t5_1_1_tiny.gin"
METHOD = ["methods/lora.gin"]
RUN = {"TRAIN_STEPS": 2, "BATCH_SIZE": 4, "LOG_PERIOD": 1, "LEARNING_RATE": 1e-2}
RUN |= {"OPTIMIZER": "@optim.adafactor", "SCHEDULE": "constant"}


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> dict:
    """Settings of the data, with random weights as the base."""
    from jsonl_folder import write_folder, write_vocabulary

    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "data")
    write_vocabulary(folder / "spiece.model")
    return {
        **DIMENSIONS,
        "JSONL_DIR": str(folder / "data"),
        "VOCAB_PATH": str(folder / "spiece.model"),
        "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 8},
        "INITIAL_CHECKPOINT_PATH": None,
    }


def train(model_dir: pathlib.Path, settings: dict, method: list[str] = METHOD):
    files = [MODEL, *method, "runs_t5x/finetune.gin"]
    return t5x("train", files, **RUN | settings | {"MODEL_DIR": str(model_dir)})


@pytest.fixture(scope="module")
def plain(common, tmp_path_factory):
    """A run on two devices; on CPUs T5X shards matrices over a process's devices, and no data."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    _, state = train(folder, common)
    kernel = state.params["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 10)
    return folder, flat(state.params)


@pytest.fixture
def data_parallel(monkeypatch):
    """Makes the mesh of two devices that accelerators have with MODEL_PARALLELISM 1."""
    from t5x import partitioning as t5x_partitioning

    from pemoe_jax.core import partitioning

    monkeypatch.setattr(t5x_partitioning, "get_cpu_mesh", partitioning.make_mesh)


@pytest.mark.parametrize(("fsdp", "rows"), [(False, 16), (True, 8)])
def test_meshes(common, plain, tmp_path, data_parallel, fsdp, rows):
    """With replicated matrices, and with FSDP, the run is the same."""
    _, state = train(tmp_path / "run", common | {"FSDP": fsdp})
    kernel = state.params["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (rows, 20)
    actual = flat(state.params)
    for path, array in plain[1].items():
        np.testing.assert_allclose(actual[path], array, rtol=1e-5, atol=1e-6, err_msg=path)
    losses, expected = read_tensorboard(tmp_path / "run"), read_tensorboard(plain[0])
    for step in expected:
        assert losses[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


def test_a_run_resumes_on_another_mesh(common, plain, tmp_path, data_parallel):
    folder = shutil.copytree(plain[0], tmp_path / "run")
    step, state = train(folder, common | {"FSDP": True, "TRAIN_STEPS": 3})
    assert step == 3
    frozen = {path: array for path, array in plain[1].items() if "_adapter/" not in path}
    resumed = flat(state.params)
    for path, array in frozen.items():
        assert array.tobytes() == resumed[path].tobytes(), path


def test_frozen_matrices_are_in_bfloat16(common, tmp_path, data_parallel):
    """The losses are those of `pemoe train`; a resumed run has the same dtypes."""
    settings = common | {"DTYPE": "bfloat16"}
    train(tmp_path / "t5x", settings | {"TRAIN_STEPS": 1})
    _, state = train(tmp_path / "t5x", settings)
    kernel = state.params["encoder"]["layers_0"]["mlp"]["wi_0"]
    assert kernel["kernel"].dtype == "bfloat16"
    adapter = state.params["encoder"]["layers_0"]["mlp"]["wi_0_adapter"]
    assert adapter["lora_a"].dtype == "float32"
    files = [MODEL, *METHOD, "runs/finetune.gin"]
    pemoe("train", files, **RUN | settings | {"MODEL_DIR": str(tmp_path / "pemoe")})
    actual, expected = read_tensorboard(tmp_path / "t5x"), read_metrics(tmp_path / "pemoe")
    for step in (1, 2):
        assert actual[step]["loss"] == pytest.approx(expected[step]["train/loss"], rel=1e-6)


def test_full_fine_tuning_resumes(common, tmp_path):
    settings = common | {"OPTIMIZER": "@optim.adamw", "DROPOUT_RATE": 0.1}
    method = ["methods/full.gin"]
    _, whole = train(tmp_path / "whole", settings, method)
    train(tmp_path / "parts", settings | {"TRAIN_STEPS": 1}, method)
    _, parts = train(tmp_path / "parts", settings, method)
    resumed = flat(parts.params)
    for path, array in flat(whole.params).items():
        assert np.array_equal(resumed[path], array), path


def test_an_upcycled_model_with_frozen_routers_resumes(common, tmp_path):
    """Checkpoints have no routers; the first loss is that of `pemoe train`, noise included."""
    from pemoe_jax.checkpoints import base_model, models, t5x_run
    from pemoe_jax.core import network

    layers = {f"network.T5Config.num_{stack}_layers": 2 for stack in ("encoder", "decoder")}
    sizes = {name.rpartition(".")[2].lower(): n for name, n in (DIMENSIONS | layers).items()}
    config = network.T5Config(**sizes)
    dense = network.init_params(network.Transformer(config), 0, lambda _: True)
    base_model.save_base(base := tmp_path / "base.safetensors", dense, config.as_dict())
    method = ["methods/flan_switch.gin"]
    settings = common | layers | {"INITIAL_CHECKPOINT_PATH": str(base), "NUM_EXPERTS": 4}
    settings |= {"FREEZE": "router", "UPCYCLE_NOISE": 0.1}
    _, whole = train(tmp_path / "whole", settings, method)
    train(tmp_path / "parts", settings | {"TRAIN_STEPS": 1}, method)
    _, parts = train(tmp_path / "parts", settings, method)
    resumed = flat(parts.params)
    for path, array in flat(whole.params).items():
        assert np.array_equal(resumed[path], array), path
    arrays, _, _ = t5x_run.open_trained(tmp_path / "whole")
    assert arrays.keys() == {path for path in resumed if "/mlp/router/" not in path}
    opened = flat(models.open_model(str(tmp_path / "whole")).load())
    assert all(np.array_equal(opened[path], array) for path, array in resumed.items())
    files = [MODEL, *method, "runs/finetune.gin"]
    pemoe("train", files, **RUN | settings | {"MODEL_DIR": str(tmp_path / "pemoe")})
    actual, expected = read_tensorboard(tmp_path / "whole"), read_metrics(tmp_path / "pemoe")
    assert actual[1]["loss"] == pytest.approx(expected[1]["train/loss"], rel=1e-6)


def test_the_legacy_format_is_resumed_and_read(common, plain, tmp_path):
    from pemoe_jax.checkpoints import t5x_run

    settings = common | {"train_script.train.use_orbax": False}
    train(tmp_path / "run", settings | {"TRAIN_STEPS": 1})
    _, state = train(tmp_path / "run", settings)
    resumed = flat(state.params)
    for path, array in plain[1].items():
        assert np.array_equal(resumed[path], array), path
    arrays, _, step = t5x_run.open_trained(tmp_path / "run")
    assert step == RUN["TRAIN_STEPS"] and arrays.keys() == {p for p in resumed if "_adapter/" in p}
    for path, array in arrays.items():
        assert np.array_equal(array.read(), resumed[path]), path


def test_microbatches_and_evaluation_during_training(common, tmp_path):
    more = {
        "MICROBATCHES": 2,
        "EVAL_PERIOD": 2,
        "CHECKPOINT_PERIOD": 2,
        "LOSS_NORMALIZING_FACTOR": None,
    }
    more["TRAIN_EVAL"] = "@train_eval/utils.DatasetConfig()"
    more["INFER_EVAL"] = "@infer_eval/utils.DatasetConfig()"
    more["MIXTURE_OR_TASK_NAME"] = "colour_1"
    train(tmp_path / "run", common | more, ["methods/mov.gin"])
    scalars = read_tensorboard(tmp_path / "run")
    # A mean over microbatches; nearly uniform probabilities of 10 experts have entropy log 10.
    assert scalars[2]["router/entropy"] == pytest.approx(np.log(10), abs=0.05)
    (evaluated,) = read_tensorboard(tmp_path / "run", "training_eval/colour_1").values()
    assert evaluated["router/entropy"] == pytest.approx(np.log(10), abs=0.05)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SEED": 1}, "to resume, got SEED 0 -> 1; base fingerprint .* -> "),
        ({"ALPHA": 8.0}, "to resume, got alpha 16.0 -> 8.0 at query, key, value, out, "),
    ],
)
def test_a_run_does_not_resume_with_other_settings(common, plain, changed, message):
    from pemoe_jax.core.errors import InputError

    with pytest.raises(InputError, match=message):
        train(plain[0], common | {"TRAIN_STEPS": 3} | changed)


def test_a_checkpoint_of_another_network_is_rejected(common, plain, tmp_path):
    from pemoe_jax.core.errors import InputError

    settings = {name: value for name, value in common.items() if name != "INITIAL_CHECKPOINT_PATH"}
    settings |= {"CHECKPOINT_PATH": str(plain[0]), "EVAL_OUTPUT_DIR": str(tmp_path)}
    with pytest.raises(
        InputError, match="another network than the gin files: adapters at query, key, "
    ):
        t5x("eval", [MODEL, "methods/ia3.gin", "runs_t5x/evaluate.gin"], **settings)


def test_the_adapter_of_a_run_is_converted_and_scored_with_its_base(common, plain, tmp_path):
    """By `convert adapter`, from T5X's run; the adapter is read as a run is."""
    from pemoe_jax.tools import convert

    adapter = tmp_path / "adapter"
    assert convert.main(["adapter", str(plain[0]), str(adapter)]) == 0
    files = [MODEL, *METHOD, "runs_t5x/infer.gin"]
    out = {"run": plain[0], "adapter": adapter}
    settings = {name: value for name, value in common.items() if name != "INITIAL_CHECKPOINT_PATH"}
    scores = {}
    for name, path in out.items():
        more = {"CHECKPOINT_PATH": str(path), "INFER_OUTPUT_DIR": str(tmp_path / name)}
        more |= {"infer_script.infer.mode": "score", "MIXTURE_OR_TASK_NAME": "colour_1"}
        t5x("infer", files, **settings | more)
        (file,) = (tmp_path / name).glob("colour_1-score.jsonl-00000-of-00001")
        scores[name] = [json.loads(line)["score"] for line in file.read_text().splitlines()]
    assert scores["run"] == scores["adapter"] and len(scores["run"]) == 6


def test_the_commands_of_the_documentation(common, tmp_path):
    """`python -m t5x.train` and then `t5x.eval`, as a user types them, outside the clone."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(GIN.parent), environment.get("PYTHONPATH")])
    )

    def run(program, files, **macros):
        flags = [f"--gin.{line.replace(' = ', '=', 1)}" for line in bindings(macros)]
        gin_files = [f"--gin_file={file}" for file in files]
        command = [sys.executable, "-m", f"t5x.{program}", f"--gin_search_paths={GIN}"]
        done = subprocess.run(
            [*command, *gin_files, *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    models = [MODEL, "methods/mov.gin", "routing/top_2.gin"]
    run("train", [*models, "runs_t5x/finetune.gin"], **RUN, **common, MODEL_DIR=str(tmp_path / "a"))
    settings = {name: value for name, value in common.items() if name != "INITIAL_CHECKPOINT_PATH"}
    settings |= {"CHECKPOINT_PATH": str(tmp_path / "a"), "EVAL_OUTPUT_DIR": str(tmp_path / "b")}
    run("eval", [*models, "runs_t5x/evaluate.gin"], **settings)
    file = tmp_path / "b/inference_eval/check_1_score_eval-metrics.jsonl"
    assert json.loads(file.read_text())["step"] == RUN["TRAIN_STEPS"]
