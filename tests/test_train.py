"""The gin files end to end on a tiny model: training, resuming, scoring, wrong input."""

import fcntl
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jsonl_folder import write_folder, write_vocabulary

from pemoe_jax import evaluate, train
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints import models, new_run, runs
from pemoe_jax.core import network, optim
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import feed, packing
from pemoe_jax.runtime import folder_lock, progress, step_times, train_loop

METHODS = ("full", "ia3", "lora", "mov", "molora")
DIMENSIONS = {
    "emb_dim": 16,
    "num_heads": 2,
    "head_dim": 6,
    "mlp_dim": 20,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
CONFIG = network.T5Config(vocab_size=256, **DIMENSIONS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder with training tasks, held-out tasks, a vocabulary and two base models."""
    root = tmp_path_factory.mktemp("train")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    for name, seed in (("base", 0), ("other", 1)):
        transformer = network.Transformer(config=CONFIG)
        base = network.init_params(transformer, seed, params_lib.is_base)
        base_lib.save_base(root / f"{name}.safetensors", base, CONFIG.as_dict())
    return root


def data_flags(folder: pathlib.Path) -> list[str]:
    return [
        f"--gin.JSONL_DIR={folder / 'tasks'}",
        f"--gin.VOCAB_PATH={folder / 'vocab.model'}",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}",
        "--gin.BATCH_SIZE=8",
    ]


def train_flags(folder: pathlib.Path, method: str, model_dir: pathlib.Path, **macros) -> list[str]:
    settings = {
        "INITIAL_CHECKPOINT_PATH": folder / "base.safetensors",
        "TRAIN_STEPS": 12,
        "LOG_PERIOD": 4,
        "LEARNING_RATE": 0.02,
        "SCHEDULE": "constant",
        "VOCAB_SIZE": 256,
        **macros,
    }
    return [
        "--gin_file=models/t5_1_1_tiny.gin",
        f"--gin_file=methods/{method}.gin",
        "--gin_file=runs/finetune.gin",
        f"--gin.MODEL_DIR={model_dir}",
        *(f"--gin.network.T5Config.{name}={value}" for name, value in DIMENSIONS.items()),
        *data_flags(folder),
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]


def read_metrics(model_dir: pathlib.Path, name: str = "train/loss") -> dict[int, float]:
    lines = map(json.loads, (model_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    """A finished run of each method."""
    root = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        assert train.main(train_flags(folder, method, root / method)) == 0
    return {method: root / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_and_run_leaves_its_files(trained, method):
    losses = read_metrics(trained[method])
    assert losses[12] < losses[1] - 0.02
    assert (trained[method] / "config.gin").read_text().count("MODEL_DIR") >= 1
    assert (trained[method] / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((trained[method] / "tensorboard").iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_holds_the_trainable_parameters_alone(trained, folder, method):
    arrays, record, step = runs.open_trained(str(trained[method]))
    paths = set(arrays)
    all_paths = set(params_lib.flatten(network.param_shapes(models.build_model(record))))
    expected = all_paths if method == "full" else set(filter(params_lib.is_adapter, all_paths))
    assert (paths, step) == (expected, 12)
    assert record.counts["trainable"] == params_lib.count(arrays)
    saved = saved_shapes(trained[method] / "checkpoint_12" / "state")
    assert any(path.startswith("opt_state/") and path.endswith(min(paths)) for path in saved)
    for path, shape in saved.items():
        assert not shape or any(path.endswith(name) for name in expected), path


def saved_shapes(state: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array in a checkpoint."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(state).item_metadata.tree
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf.shape
        for path, leaf in leaves
    }


@pytest.mark.parametrize("method", METHODS[1:])
def test_base_is_bit_identical_after_training(trained, folder, method):
    opened = models.open_models(str(trained[method]))[0]
    after = params_lib.flatten(opened.load())
    before, _ = models.load_base(opened.model, str(folder / "base.safetensors"), 0)
    for path, array in params_lib.flatten(before).items():
        assert np.array_equal(np.asarray(array), np.asarray(after[path])), path
    moved = [path for path in after if params_lib.is_adapter(path)]
    start = network.init_params(opened.model, 0, params_lib.is_adapter)
    changes = [
        not np.array_equal(array, after[path]) for path, array in params_lib.flatten(start).items()
    ]
    assert len(changes) == len(moved) and sum(changes) > len(changes) / 2


@pytest.fixture(scope="session")
def stopped(folder, tmp_path_factory) -> pathlib.Path:
    """A run of mov that stopped at step 5 of 12."""
    model_dir = tmp_path_factory.mktemp("stopped") / "mov"
    assert train.main(train_flags(folder, "mov", model_dir, TRAIN_STEPS=5)) == 0
    return model_dir


def test_a_resumed_run_equals_an_uninterrupted_one(folder, trained, stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert train.main(train_flags(folder, "mov", tmp_path)) == 0
    out = capsys.readouterr().out
    assert "resuming from" in out
    assert "\nsettings that changed since the last start: TRAIN_STEPS 5 -> 12\n" in out
    whole, _, _ = runs.open_trained(str(trained["mov"]))
    resumed, _, step = runs.open_trained(str(tmp_path))
    assert step == 12 and whole.keys() == resumed.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(array.read(), resumed[path].read())
    assert train.main(train_flags(folder, "mov", tmp_path)) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumes_in_another_form(folder, tmp_path, capsys):
    """A run with scanned layers, remat and FSDP resumes with unrolled layers, replicated.

    MoV's experts start equal, so the first gradients of its routers are zero except for rounding
    errors of about 1e-8, which differ between programs. AdamW with its usual eps would turn them
    into full steps; 1e-3 is far above them. Later a router's gradient is a small difference of
    large terms, which is less exact than other gradients.
    """
    layers = {"network.T5Config.num_encoder_layers": 2, "network.T5Config.num_decoder_layers": 1}
    settings = {"LOG_PERIOD": 1, "optim.adamw.eps": 1e-3, "INITIAL_CHECKPOINT_PATH": None, **layers}
    loop = {"SCAN_LAYERS": True, "REMAT_POLICY": "minimal", "FSDP": True, "TRAIN_STEPS": 6}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(train_flags(folder, "mov", whole, **settings)) == 0
    assert train.main(train_flags(folder, "mov", parts, **settings | loop)) == 0
    assert train.main(train_flags(folder, "mov", parts, **settings)) == 0
    assert "resuming from" in capsys.readouterr().out
    expected, losses = read_metrics(whole), read_metrics(parts)
    assert losses.keys() == expected.keys() == set(range(1, 13))
    for step, loss in expected.items():
        assert losses[step] == pytest.approx(loss, rel=1e-5), step
    (first, record, _), (second, resumed, _) = map(runs.open_trained, (str(whole), str(parts)))
    assert resumed.config == record.config and first.keys() == second.keys()
    assert_moved_alike(whole, parts)


def assert_moved_alike(run: pathlib.Path, other: pathlib.Path) -> None:
    """Compares the adapters of two runs, relative to how far training moved each array.

    The tolerance is 2e-3 for routers and 2e-5 for the others, plus rounding. A gradient that is
    wrong by one percent changes a router by 5e-3 or more.
    """
    (first, record, step), (second, _, other_step) = map(runs.open_trained, map(str, (run, other)))
    assert step == other_step and first.keys() == second.keys()
    start = params_lib.flatten(
        network.init_params(models.build_model(record), 0, params_lib.is_adapter)
    )
    for path, stored in first.items():
        array = stored.read()
        moved = np.abs(array - start[path]).max()
        assert moved > 0.0, path
        bound = (2e-3 if "/router/" in path else 2e-5) * moved + 2e-7 * np.abs(array).max()
        assert np.abs(second[path].read() - array).max() < bound, path


def assert_ends_alike(run: pathlib.Path, other: pathlib.Path) -> None:
    """Compares trained parameters bit for bit, and the positions in the data."""
    first, _, step = runs.open_trained(str(run))
    second, _, other_step = runs.open_trained(str(other))
    assert step == other_step and first.keys() == second.keys()
    for path, array in first.items():
        np.testing.assert_array_equal(array.read(), second[path].read())
    assert runs.read_data_position(str(run)) == runs.read_data_position(str(other)) != [0]


def test_a_run_resumed_at_an_odd_step_equals_an_uninterrupted_one(folder, tmp_path):
    """The run is longer than the blocks in which examples are read and encoded."""
    settings = {
        "BATCH_SIZE": 64,
        "TRAIN_STEPS": 11,
        "TASK_FEATURE_LENGTHS": "{'inputs': 48, 'targets': 16}",
    }
    assert train.main(train_flags(folder, "ia3", tmp_path / "whole", **settings)) == 0
    for steps in (3, 11):
        settings["TRAIN_STEPS"] = steps
        assert train.main(train_flags(folder, "ia3", tmp_path / "parts", **settings)) == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "parts")
    assert runs.read_data_position(str(tmp_path / "whole"))[0] > 2 * feed._BLOCK


def test_a_run_that_is_resumed_in_one_process_leaves_no_programs(folder, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    counts = []
    for steps in (6, 7):  # the first compiles what both share
        assert train.main(train_flags(folder, "mov", tmp_path, TRAIN_STEPS=steps)) == 0
        gc.collect()
        programs = jax.devices()[0].client.live_executables()
        counts.append((len(programs), len(jax.live_arrays())))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_saves_the_step_that_runs(
    folder, trained, stopped, tmp_path, monkeypatch, capfd, number, code
):
    """Batches that were prefetched but not trained on are read again."""
    plain, times = step_times.StepTimer.add, []

    def add(timer, *arguments):
        times.append(plain(timer, *arguments))
        if len(times) == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(step_times.StepTimer, "add", add)
    handlers = [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))]
    # The evaluation that is due after the step is left out: the time may be short.
    settings = {"EVAL_PERIOD": 5 if number == signal.SIGTERM else 0}
    assert train.main(train_flags(folder, "mov", tmp_path, **settings)) == code
    assert handlers == [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))]
    assert read_metrics(tmp_path, "eval/loss") == {}
    output = capfd.readouterr()
    assert re.search(
        rf"\nstopped by {number.name}, saved in \d+\.\d s: the same command resumes from"
        rf" {tmp_path}/checkpoint_5\n$",
        output.out,
    )
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["status"], about["reason"]) == ("stopped", f"stopped by {number.name}")
    assert about["last_step"] == 5 and about["earlier"] == []
    assert output.err.startswith("\nstopping after this step; interrupt again")
    assert runs.saved_steps(tmp_path) == [5]
    monkeypatch.undo()
    assert_ends_alike(stopped, tmp_path)
    if number != signal.SIGINT:  # one of three equal checkpoints is resumed
        return
    assert train.main(train_flags(folder, "mov", tmp_path)) == 0
    assert_ends_alike(trained["mov"], tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["status"] == "finished" and about["last_step"] == 12 and about["first_step"] == 5
    assert about["earlier"][0]["status"] == "stopped"
    assert {"versions", "devices", "base", "data", "seed", "config", "commit"} <= about.keys()


def test_the_best_checkpoint_is_kept_besides_the_newest(folder, tmp_path, monkeypatch, capsys):
    losses = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(train_loop.TrainLoop, "_evaluate", lambda *_: (next(losses), 0.5))
    settings = {"KEEP_BEST": "eval/loss", "CHECKPOINT_PERIOD": 2, "TRAIN_STEPS": 8}
    flags = train_flags(folder, "mov", tmp_path, **settings)
    assert train.main([*flags, "--gin.EVAL_PERIOD=4"]) == 1
    assert "EVAL_PERIOD must divide CHECKPOINT_PERIOD 2 with KEEP_BEST, got 4" in (
        capsys.readouterr().err
    )
    assert train.main([*flags, "--gin.EVAL_PERIOD=2"]) == 0
    assert runs.saved_steps(tmp_path) == [4, 8]
    assert "\nbest by eval/loss: checkpoint_4 (1.0000)\n" in capsys.readouterr().out


def test_a_second_interrupt_stops_at_once(folder, tmp_path, monkeypatch):
    def add(timer, *_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(step_times.StepTimer, "add", add)
    assert train.main(train_flags(folder, "mov", tmp_path)) == 130
    assert runs.saved_steps(tmp_path) == []


def test_a_run_with_damaged_files_goes_on(folder, trained, tmp_path, capsys):
    """A damaged checkpoint, lines of metrics that are no record, and what a killed run left."""
    settings = {"CHECKPOINT_PERIOD": 2, "KEEP_CHECKPOINTS": None, "LOG_PERIOD": 1}
    assert train.main(train_flags(folder, "mov", tmp_path, TRAIN_STEPS=4, **settings)) == 0
    for file in (tmp_path / "checkpoint_4" / "state").glob("**/d/*"):
        file.write_bytes(b"damaged")
    metrics = tmp_path / "metrics.jsonl"
    junk = b'5\n[1]\n{"a": 1}\n{"step": "1"}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
    metrics.write_bytes(junk + metrics.read_bytes() + b'{"st')
    capsys.readouterr()
    assert train.main(train_flags(folder, "mov", tmp_path, KEEP_CHECKPOINTS=2)) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nwarning: .*checkpoint_4/.*: renamed to damaged_checkpoint_4\n", out)
    assert f"resuming from {tmp_path}/checkpoint_2\n" in out
    assert f"warning: {metrics}: deleted 6 lines without a record\n" in out
    assert [*read_metrics(tmp_path)] == [1, 2, 3, 4, 8, 12]
    assert runs.saved_steps(tmp_path) == [2, 12]
    assert_ends_alike(trained["mov"], tmp_path)
    # Killed after the last checkpoint: the older one is deleted and the curve is drawn.
    (tmp_path / "loss.png").unlink()
    shutil.rmtree(tmp_path / "checkpoint_2" / "state")
    assert train.main(train_flags(folder, "mov", tmp_path)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "loss.png").exists() and not (tmp_path / "checkpoint_2").exists()


def test_a_failed_save_ends_the_run_at_the_next_step(folder, tmp_path, monkeypatch, capsys):
    plain = ocp.CheckpointManager.wait_until_finished

    def fail(manager):
        plain(manager)
        if manager.latest_step() == 4:
            raise OSError(28, "No space left on device", "checkpoint_4/" + 20 * "folder/")

    def close(writer):  # the same disk is full for the metrics
        raise InputError("metrics.jsonl: No space left on device")

    monkeypatch.setattr(progress.MetricWriter, "close", close)
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
    monkeypatch.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda manager: False)
    settings = {"CHECKPOINT_PERIOD": 2, "LOG_PERIOD": 1}
    assert train.main(train_flags(folder, "mov", tmp_path, **settings)) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/checkpoint_4 could not be saved: No space left on device: resume from"
        " checkpoint_2\n"
    )
    assert [*read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_folder_that_another_command_writes_to(folder, tmp_path, monkeypatch, capsys):
    """In an existing folder before data is read."""
    monkeypatch.setattr(folder_lock, "TIMEOUT", 0.0)
    scoring = ["--gin_file=runs/evaluate.gin", f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
    scoring += [f"--gin.CHECKPOINT_PATH={folder / 'base.safetensors'}", *data_flags(folder)]
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert train.main(train_flags(folder, "mov", tmp_path)) == 1
        assert evaluate.main(scoring) == 1
    lines = capsys.readouterr().err.splitlines()
    for line, setting in zip(lines, ("MODEL_DIR", "EVAL_OUTPUT_DIR"), strict=True):
        assert line.startswith(f"error: {setting} must be a folder that no other command writes to")
    assert [*tmp_path.iterdir()] == [tmp_path / ".lock"]


def test_a_state_that_is_not_finite_is_never_saved(folder, tmp_path, capsys):
    settings = {"LEARNING_RATE": 3e38, "CHECKPOINT_PERIOD": 1, "LOG_PERIOD": 50, "TRAIN_STEPS": 4}
    assert train.main(train_flags(folder, "mov", tmp_path, **settings)) == 1
    assert "infinite or NaN after step 2" in capsys.readouterr().err
    arrays, _, step = runs.open_trained(str(tmp_path))
    assert step == 1
    assert all(np.isfinite(array.read()).all() for array in arrays.values())
    # Between reports the loss of a step is looked at while the next one runs.
    settings |= {"CHECKPOINT_PERIOD": 50, "TRAIN_STEPS": 50}
    assert train.main(train_flags(folder, "mov", tmp_path / "later", **settings)) == 1
    assert "the loss is nan at step 2 (learning rate 3e+38), and the" in capsys.readouterr().err
    assert [*read_metrics(tmp_path / "later")] == [1, 3]


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(folder, tmp_path, capsys):
    settings = {"LEARNING_RATE": 3e38, "TRAIN_STEPS": 50, "CHECKPOINT_PERIOD": 50}
    settings |= {"NONFINITE": "skip", "MAX_SKIPPED_STEPS": 3, "LOG_PERIOD": 2}
    assert train.main(train_flags(folder, "mov", tmp_path, **settings)) == 1
    output = capsys.readouterr()
    assert re.search(
        r"the loss is nan at step 5 .*, after 3 steps in a row that were skipped"
        r" \(MAX_SKIPPED_STEPS\): lower LEARNING_RATE and start again: there is no checkpoint yet",
        output.err,
    )
    assert "step 4  skipped 2 steps: not finite\n" in output.out
    assert read_metrics(tmp_path, "train/skipped") == {1: 0, 2: 1, 4: 2, 6: 2}


def test_debug_nans_names_the_module(folder, tmp_path, capsys):
    settings = {"LEARNING_RATE": 3e38, "TRAIN_STEPS": 50, "LOG_PERIOD": 50}
    flags = train_flags(folder, "mov", tmp_path, **settings)
    assert train.main([*flags, "--debug_nans"]) == 1
    assert re.search(
        r"error: the output of encoder/layers_0/\S+ is the first that is not finite, at step 2\n",
        capsys.readouterr().err,
    )


def test_positions_of_another_number_of_shards(stopped, tmp_path):
    """A run of two shards, at examples 6 = 2 · 3 and 9 = 2 · 4 + 1, resumes at example 6.

    Of four shards the first two resume at their third example (8 and 9), the others at their second
    (6 and 7): no example is skipped.
    """
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint_5" / "feed" / "metadata").write_text('{"examples": [3, 4]}')
    assert runs.read_data_position(str(tmp_path), 2) == [3, 4]
    assert runs.read_data_position(str(tmp_path), 1) == [6]
    assert runs.read_data_position(str(tmp_path), 4) == [2, 2, 1, 1]


def test_damaged_and_missing_positions(folder, trained, stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint_5" / "checksums.json").unlink()  # as in runs of earlier versions
    file = tmp_path / "checkpoint_5" / "feed" / "metadata"
    file.write_text('{"examples": 3}')
    assert train.main(train_flags(folder, "mov", tmp_path)) == 1
    assert "list of integers" in capsys.readouterr().err
    shutil.rmtree(file.parent)
    assert train.main(train_flags(folder, "mov", tmp_path)) == 0
    assert "skipping 5 batches" in capsys.readouterr().out
    assert_ends_alike(trained["mov"], tmp_path)


def test_waiting_for_data_is_measured(folder, trained, tmp_path, monkeypatch, capsys):
    shares = read_metrics(trained["mov"], "train/wait_share")
    assert shares.keys() == {1, 4, 8, 12} and all(0 <= share < 1 for share in shares.values())

    plain = packing.BatchIterator.__next__
    monkeypatch.setattr(
        packing.BatchIterator, "__next__", lambda self: time.sleep(0.8) or plain(self)
    )
    # The losses of all steps are checked at the reports.
    trend = train_loop.LossTrend
    monkeypatch.setattr(trend, "update", lambda self, step, losses: f"{step}: {len(losses)} losses")
    assert train.main(train_flags(folder, "mov", tmp_path)) == 0
    assert read_metrics(tmp_path, "train/wait_share")[12] > 0.5
    # The first step is not measured; waiting is in no step.
    seconds = read_metrics(tmp_path, "train/step_seconds")
    assert seconds.keys() == {4, 8, 12} and 0 < seconds[12] < 0.8
    assert set(read_metrics(tmp_path, "batch").values()) == {"8 × (32 + 8)"}
    out = capsys.readouterr().out
    assert "waiting for data" in out
    assert re.findall(r"\n(.*) losses\n", out) == ["1: 1", "4: 3", "8: 4", "12: 4"]


def test_resuming_with_another_base_or_other_tasks_is_refused(folder, trained, capsys):
    changes = {
        "INITIAL_CHECKPOINT_PATH": folder / "other.safetensors",
        "EVAL_TASKS": "['colour_1']",
    }
    assert train.main(train_flags(folder, "mov", trained["mov"], **changes)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for change in ("base fingerprint", "training tasks", "held-out datasets"):
        assert change in error


def test_resuming_with_other_batches_is_refused_unless_allowed(folder, trained, tmp_path, capsys):
    shutil.copytree(trained["mov"], tmp_path / "run")
    changes = {"BATCH_SIZE": 4, "PACK": False, "TRAIN_STEPS": 13}
    flags = train_flags(folder, "mov", tmp_path / "run", **changes)
    assert train.main(flags) == 1
    error = capsys.readouterr().err
    assert "got BATCH_SIZE 8 -> 4; PACK True -> False: change them back, pass --allow" in error
    assert error.count("\n") == 1
    assert train.main([*flags, "--allow_changes"]) == 0
    out = capsys.readouterr().out
    assert "WARNING: this run resumes with changes: BATCH_SIZE 8 -> 4; PACK True -> False\n" in out
    assert runs.saved_steps(tmp_path / "run") == [13]


def test_a_fraction_of_the_training_tasks(folder, trained, tmp_path, capsys):
    flags = train_flags(folder, "mov", tmp_path / "run", TASK_FRACTION=0.4, TRAIN_STEPS=1)
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    (task,) = runs.read_record(str(tmp_path / "run")).trained_tasks
    assert f"\nTASK_FRACTION 0.4: 1 task of jsonl_train, drawn with seed 0: {task}\n" in out
    assert "\ntraining on jsonl_train_fraction_0.4_seed_0: 1 task, 16 examples\n" in out
    # Other tasks are another run; a fraction without a task leaves no file.
    for run, fraction, message in (
        (trained["mov"], 0.4, "resume, got training tasks without "),
        (tmp_path / "none", 0.1, "TASK_FRACTION must leave a task of 'jsonl_train', which has 3 "),
        (tmp_path / "none", 0.0, "TASK_FRACTION must be a number in (0, 1], got 0.0"),
    ):
        assert train.main(train_flags(folder, "mov", run, TASK_FRACTION=fraction)) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_evaluating_on_another_base_is_refused(folder, trained, tmp_path, capsys):
    flags = [
        "--gin_file=runs/evaluate.gin",
        f"--gin.CHECKPOINT_PATH={trained['mov']}",
        f"--gin.INITIAL_CHECKPOINT_PATH={folder / 'other.safetensors'}",
        f"--gin.EVAL_OUTPUT_DIR={tmp_path / 'out'}",
        *data_flags(folder),
    ]
    assert evaluate.main(flags) == 1
    assert "fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("optimizer", "factors", "steps", "expected"),
    [
        (optim.adamw, "constant * linear_warmup", 200, "up to 0.007 (at step 21)"),
        (optim.adamw, "constant * linear_warmup", 11, "up to 0.0035 (at step 11)"),
        (optim.adafactor, "constant", 200, "up to 0.007 (at step 1)"),
    ],
)
def test_recipe_in_one_line(optimizer, factors, steps, expected):
    schedule = optim.create_learning_rate_scheduler(factors, 7e-3, 20, steps)
    line = train._describe_recipe(optimizer, schedule, steps)
    assert line == f"{optimizer.__name__}, {factors}, learning rate {expected}"


def test_a_random_base_is_recreated_from_its_seed(folder, tmp_path, capsys):
    """Also: examples longer than TASK_FEATURE_LENGTHS are counted."""
    short = {"TASK_FEATURE_LENGTHS": "{'inputs': 5, 'targets': 8}", "TRAIN_STEPS": 1}
    flags = train_flags(folder, "ia3", tmp_path, INITIAL_CHECKPOINT_PATH=None, **short)
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in out
    assert re.search(r"\noptimizer +adamw, constant, learning rate up to 0.02 \(at step 1\)\n", out)
    assert re.search(r"\n[1-9]\d* inputs and 0 targets of \d+ examples", out), out
    opened = models.open_models(str(tmp_path))[0]
    base = network.init_params(opened.model, 0, params_lib.is_base)
    assert opened.record.base["fingerprint"] == params_lib.fingerprint(base)
    opened.load()


def test_several_checkpoints_in_one_table(folder, trained, tmp_path):
    paths = [str(folder / "base.safetensors"), *(str(trained[m]) for m in METHODS)]
    flags = [
        "--gin_file=runs/evaluate.gin",
        f"--gin.CHECKPOINT_PATH={paths}",
        f"--gin.EVAL_OUTPUT_DIR={tmp_path}",
        "--gin.ROUTING_PICTURE=True",
        *data_flags(folder),
    ]
    assert evaluate.main(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["base", *METHODS]
    for run in results["runs"]:
        for task, result in run["tasks"].items():
            lines = (tmp_path / "predictions" / run["name"] / f"{task}.jsonl").read_text()
            rows = [json.loads(line) for line in lines.splitlines()]
            assert len(rows) == result["examples"]
            assert np.mean([row["correct"] for row in rows]) == pytest.approx(result["accuracy"])
            for row in rows:
                assert row["prediction"] == row["answer_choices"][int(np.argmax(row["scores"]))]
    table = (tmp_path / "results.md").read_text()
    assert all(name in table for name in ("base", *METHODS))
    assert table.count(f"| {folder / 'base.safetensors'} | float32") == 4  # of the adapters
    assert (tmp_path / "routing_mov.png").exists() and (tmp_path / "routing_molora.png").exists()
    assert not (tmp_path / "routing_ia3.png").exists()


def test_results_are_only_replaced_by_results_of_the_same_run(folder, trained, tmp_path, capsys):
    """Also: DTYPE replaces the dtype of training."""

    def run_evaluate(run: str, **macros) -> int:
        flags = [f"--gin.CHECKPOINT_PATH={trained[run]}", f"--gin.EVAL_OUTPUT_DIR={tmp_path}"]
        flags += [f"--gin.{name}={value}" for name, value in macros.items()]
        return evaluate.main(["--gin_file=runs/evaluate.gin", *flags, *data_flags(folder)])

    assert run_evaluate("mov") == 0
    assert "replacing" not in capsys.readouterr().out
    first = json.loads((tmp_path / "results.json").read_text())["runs"][0]
    assert run_evaluate("lora") == 1
    error = capsys.readouterr().err
    assert f"results of {trained['mov']} on " in error and " would be lost: choose" in error
    assert error.count("\n") == 1
    assert run_evaluate("mov", DTYPE="bfloat16") == 0
    assert f"replacing the results in {tmp_path}" in capsys.readouterr().out
    second = json.loads((tmp_path / "results.json").read_text())["runs"][0]
    assert (first["dtype"], second["dtype"]) == ("float32", "bfloat16")
    assert first["tasks"].keys() == second["tasks"].keys()
    assert run_evaluate("mov", DTYPE="float16") == 1
    assert "must be float32 or bfloat16, got 'float16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        ({"TRAINABLE": "['.*/mov_.*']"}, "TRAINABLE matched 0 of"),
        ({"MODEL_DIR": "/tmp/run[1]"}, "MODEL_DIR must be a path without"),
        ({"BATCH_SIZE": 7}, "BATCH_SIZE must be a positive multiple of 2"),
        ({"MIXTURE_OR_TASK_NAME": "colour_a"}, "unknown task or mixture 'colour_a'"),
        ({"VOCAB_PATH": "/nowhere/v.model"}, "/nowhere/v.model"),
        (
            {"VOCAB_SIZE": 100, "INITIAL_CHECKPOINT_PATH": None},
            "T5Config.vocab_size must be at least",
        ),
        ({"REMAT_POLICY": "most"}, "REMAT_POLICY must be one of ['none', 'minimal', 'full']"),
        ({"TRAIN_STEP": 3}, "close: TRAIN_STEPS"),
        ({"INITIAL_CHECKPOINT_PATH": "/nowhere.safetensors"}, "/nowhere.safetensors"),
        ({"LOSS_NORMALIZING_FACTOR": "'TOKENS'"}, "LOSS_NORMALIZING_FACTOR"),
        ({"SCHEDULE": "'linear'"}, "SCHEDULE must be a product of ['constant',"),
        ({"EVAL_TASKS": "['nothing_*']"}, "'nothing_*' matched none"),
        ({"TASK_FEATURE_LENGTHS": "{'inputs': 32}"}, "'targets'"),
    ],
)
def test_wrong_input_is_one_line(folder, tmp_path, capsys, macros, message):
    model_dir = tmp_path / "run"
    assert train.main(train_flags(folder, "mov", model_dir, **macros)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not model_dir.exists()


def test_dimensions_are_those_of_the_base(folder, capsys):
    """As in evaluation: the model file may be of any size, and the base may have padding rows."""
    small = network.Transformer(config=network.T5Config(dtype="bfloat16", dropout_rate=0.1))
    model = new_run.take_base_dimensions(small, str(folder / "base.safetensors"))
    expected = {**CONFIG.as_dict(), "dtype": "bfloat16", "dropout_rate": 0.1}
    assert model.config.as_dict() == expected
    out = capsys.readouterr().out
    assert out.startswith(f"dimensions taken from {folder}") and out.count("\n") == 1
    assert f"emb_dim {CONFIG.emb_dim} (model file: 512), " in out
    assert new_run.take_base_dimensions(small, None) is small
    assert new_run.take_base_dimensions(model, str(folder / "base.safetensors")) == model
    assert capsys.readouterr().out == ""


EARLY_MISTAKES = """
import json, sys
from pemoe_jax import evaluate, train
from pemoe_jax.tools import cache_tasks, embed
commands = {"train": train, "evaluate": evaluate, "embed": embed, "cache_tasks": cache_tasks}
for command, flags in json.loads(sys.argv[1]):
    assert commands[command].main(flags) == 1
    print(end="\\n", file=sys.stderr)
    assert "tensorflow" not in sys.modules, flags
"""


def test_what_settings_and_paths_show_is_said_before_tensorflow_is_imported(
    folder, trained, tmp_path
):
    bad_index = tmp_path / "INDEX.json"
    bad_index.write_text('{"a": {"dataset": 3}}')
    shutil.copytree(folder / "tasks" / "colour_1", tmp_path / "colour_1")
    (tmp_path / "out").mkdir()
    results = {"runs": [{"checkpoint": "x", "tasks": {"a": {}}}]}
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    mistakes = [
        ({"INITIAL_CHECKPOINT_PATH": "/nowhere"}, "base model /nowhere: no such file"),
        ({"TRAINABLE": "['x']"}, "TRAINABLE matched 0 of"),
        ({"TASK_FEATURE_LENGTHS": "{'inputs': 3}"}, "TASK_FEATURE_LENGTHS['targets'] must be"),
        ({"MODEL_DIR": trained["mov"], "NUM_EXPERTS": 5}, "num_experts 10 -> 5 at key, value, "),
        ({"JSONL_DIR": "/nowhere"}, "JSONL_DIR /nowhere"),
        ({"JSONL_DIR": tmp_path}, "'dataset'"),
        ({"VOCAB_PATH": "/nowhere"}, "got no file at /nowhere"),
        ({"JSONL_DIR": None, "P3_DIR": "/nowhere"}, "P3_DIR /nowhere must be a folder"),
        ({"TRAIN_TASKS": "['zzz']"}, "'zzz' matched none of"),
    ]
    runs_file = ["--gin_file=runs/evaluate.gin", f"--gin.EVAL_OUTPUT_DIR={tmp_path / 'out'}"]
    base = f"--gin.CHECKPOINT_PATH={folder / 'base.safetensors'}"
    embed_files = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/embed.gin"]
    embed_files.append(f"--gin.SENTENCE_EMBEDDINGS={tmp_path / 'table'}")
    commands = [
        *(
            ("train", train_flags(folder, "mov", tmp_path / "run", **flags))
            for flags, _ in mistakes
        ),
        ("evaluate", [*runs_file, *data_flags(folder), "--gin.CHECKPOINT_PATH=/nowhere"]),
        ("evaluate", [*runs_file, *data_flags(folder), base]),
        ("embed", [*embed_files, *data_flags(folder), "--gin.INITIAL_CHECKPOINT_PATH=/nowhere"]),
        ("cache_tasks", ["--p3_dir=/nowhere", f"--output={tmp_path / 'cache'}"]),
    ]
    expected = [message for _, message in mistakes]
    expected += ["/nowhere", "would be lost: choose", "base model /nowhere", "P3_DIR /nowhere must"]
    done = subprocess.run(
        [sys.executable, "-c", EARLY_MISTAKES, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, message in zip(done.stderr.split("\n\n"), expected, strict=False):
        assert line.startswith("error: ") and message in line
    assert done.stdout.startswith("pemoe train models/t5_1_1_tiny.gin methods/mov.gin runs/")


def test_unreadable_line_is_named(folder, tmp_path, capsys):
    write_folder(tmp_path / "tasks")
    file = tmp_path / "tasks" / "colour_1" / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]) + "\n")
    flags = train_flags(folder, "mov", tmp_path / "run", JSONL_DIR=tmp_path / "tasks")
    assert train.main(flags) == 1
    assert f"{file}:5: not JSON" in capsys.readouterr().err


def test_scoring_a_task_without_choices_is_refused(folder, tmp_path, capsys):
    flags = [
        "--gin_file=runs/evaluate.gin",
        f"--gin.CHECKPOINT_PATH={folder / 'base.safetensors'}",
        f"--gin.EVAL_OUTPUT_DIR={tmp_path}",
        *data_flags(folder),
        "--gin.EVAL_TASKS=['free_1']",
    ]
    assert evaluate.main(flags) == 1
    assert "without answer_choices: free_1" in capsys.readouterr().err


def test_runs_from_the_clone_without_an_install(folder, tmp_path):
    """A process of its own, with the clone's root as its working folder."""
    root = pathlib.Path(__file__).parent.parent
    flags = train_flags(folder, "lora", tmp_path / "run", TRAIN_STEPS=2)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pemoe_jax.train", *flags],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint_2").is_dir()
    assert "trainable" in done.stdout and "step 2/2" in done.stdout
