"""Runs and results in buckets, end to end, against the fake of `fake_gcs`."""

import json

import numpy as np
import pytest
from jsonl_folder import write_folder, write_vocabulary
from test_train import data_flags, read_metrics, train_flags

from pemoe_jax import evaluate, train
from pemoe_jax.checkpoints import base_model, runs
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.runtime import file_io
from pemoe_jax.tools import convert, report, verify

pytestmark = pytest.mark.slow

RUN = file_io.to_path("gs://bucket/a/run")
SETTINGS = {"CHECKPOINT_PERIOD": 2, "LOG_PERIOD": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from test_train import CONFIG

    root = tmp_path_factory.mktemp("buckets")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    base = network.init_params(network.Transformer(config=CONFIG), 0, params_lib.is_base)
    base_model.save_base(root / "base.safetensors", base, CONFIG.as_dict())
    return root


@pytest.fixture(scope="module")
def local_run(folder, tmp_path_factory):
    """A run on disk."""
    run = tmp_path_factory.mktemp("local") / "run"
    assert train.main(train_flags(folder, "mov", run, TRAIN_STEPS=6, **SETTINGS)) == 0
    return run


def copy(gcs, source, target: str) -> None:
    """Copies a local folder into the bucket, as gsutil would."""
    for file in source.glob("**/*"):
        if file.is_file():
            gcs.objects[f"{target}/{file.relative_to(source)}"] = file.read_bytes(), 1


def test_a_run_in_a_bucket_ends_as_one_on_disk(gcs, folder, local_run, capsys):
    """Resumed after a kill, which left half of a checkpoint and lines of later steps."""
    assert train.main(train_flags(folder, "mov", RUN, TRAIN_STEPS=3, **SETTINGS)) == 0
    assert runs.saved_steps(RUN) == [3]
    metrics = gcs.read(RUN / "metrics.jsonl")
    gcs.objects["bucket/a/run/metrics.jsonl"] = metrics + b'{"step": 4, "train/loss": 9}\n', 1
    gcs.objects["bucket/a/run/checkpoint_4/state/manifest.ocdbt"] = b"half", 1
    kinds = ("answer", "lose", "busy", "delay")
    faults = iter([kind for k in kinds for kind in (*[None] * 25, k)])
    gcs.fault = lambda method, name: next(faults, None)
    assert train.main(train_flags(folder, "mov", RUN, TRAIN_STEPS=6, **SETTINGS)) == 0
    assert f"resuming from {RUN}/checkpoint_3\n" in capsys.readouterr().out
    gcs.fault = lambda method, name: None
    assert runs.saved_steps(RUN) == [6]
    first, _, _ = runs.open_trained(str(local_run))
    second, _, _ = runs.open_trained(str(RUN))
    for path, array in first.items():
        np.testing.assert_array_equal(array.read(), second[path].read())
    lines = [json.loads(line) for line in gcs.read(RUN / "metrics.jsonl").splitlines()]
    assert {line["step"]: line["train/loss"] for line in lines} == read_metrics(local_run)
    assert len(lines) == 6
    names = {name.split("/")[0] for name in gcs.names(RUN)} - {""}
    files = {"config.gin", "loss.png", "metrics.jsonl", "run.json", "tensorboard"}
    assert names == {"checkpoint_6", *files}
    assert json.loads(gcs.read(RUN / "run.json"))["status"] == "finished"
    gcs.objects["bucket/a/run/checkpoint_8/state/manifest.ocdbt"] = b"half", 1
    assert verify.main([str(RUN)]) == 0  # the half checkpoint does not count
    assert f"{RUN}: 1 item verified, no fault" in capsys.readouterr().out


def test_evaluation_from_and_to_a_bucket(gcs, folder, local_run, tmp_path, capsys):
    """Of a run that was copied there, its adapter, and a run that starts from it."""
    copy(gcs, local_run, "bucket/a/run")
    adapter = "gs://bucket/adapter"
    assert convert.main(["adapter", str(RUN), adapter]) == 0
    assert verify.main([str(RUN)]) == verify.main([adapter]) == 0
    verified = capsys.readouterr().out
    assert "; CRC-32Cs of " in verified and "finite values, CRC-32Cs\n" in verified
    (name,) = (name for name in gcs.names(RUN) if name.endswith("/feed/metadata"))
    content = gcs.read(RUN / name)
    gcs.objects[f"bucket/a/run/{name}"] = content.replace(b"examples", b"examplez"), 2
    assert verify.main([f"{RUN}/checkpoint_6"]) == 1
    assert f"FAULT  {RUN}/{name}: damaged: expected the size and" in capsys.readouterr().out
    gcs.objects[f"bucket/a/run/{name}"] = content, 3
    out = "gs://bucket/results"
    flags = ["--gin_file=runs/evaluate.gin", f"--gin.EVAL_OUTPUT_DIR={out}", *data_flags(folder)]
    assert evaluate.main([*flags, f"--gin.CHECKPOINT_PATH=['{RUN}', '{adapter}']"]) == 0
    assert evaluate.main([*flags, f"--gin.CHECKPOINT_PATH={adapter}"]) == 1
    assert f"error: {out}: results of {RUN} on " in capsys.readouterr().err
    results = json.loads(gcs.read(f"{out}/results.json"))["runs"]
    assert [run["checkpoint"] for run in results] == [str(RUN), adapter]
    assert results[0]["tasks"] == results[1]["tasks"] and results[0]["settings"]
    assert {"results.md", "predictions/run/check_1_score_eval.jsonl"} <= {*gcs.names(out)}
    assert ".lock" not in gcs.names(out)
    assert report.main([out, "--output=gs://bucket/report", "--draws=10"]) == 0
    expected = ["report.csv", "report.json", "report.md", "report.png"]
    assert gcs.names("gs://bucket/report") == expected
    settings = {"TRAIN_STEPS": 1, "INITIAL_CHECKPOINT_PATH": str(RUN)}
    assert train.main(train_flags(folder, "mov", tmp_path / "next", **settings)) == 0
    assert runs.read_record(str(tmp_path / "next")).initial["path"] == str(RUN)
