"""Compiled programs are kept for the next process, where that can be, and never in the way."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonl_folder import write_folder, write_vocabulary

from pemoe_jax.runtime import compile_cache

ROOT = Path(__file__).parents[2]


def started(**given: str) -> dict[str, str]:
    compile_cache.enable(given)
    return given


def test_it_lies_in_the_users_folder_of_caches(tmp_path, monkeypatch):
    set_by_us = started(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "pemoe_jax" / "compiled"
    assert set_by_us["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert set_by_us["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / ".cache" / "pemoe_jax" / "compiled"
    assert compile_cache.default_folder({}) == home
    assert compile_cache.default_folder({"XDG_CACHE_HOME": "relative"}) == home


def test_jaxs_own_variables_count(tmp_path):
    given = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    assert started(**given) == given
    given |= {
        "JAX_COMPILATION_CACHE_DIR": "gs://elsewhere",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3",
    }
    assert started(**given) == given
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_kept_one_line_says_so(tmp_path, capsys):
    (tmp_path / "pemoe_jax").write_text("a file")
    given = {"XDG_CACHE_HOME": str(tmp_path)}
    assert started(**given) == given
    said = capsys.readouterr().err
    assert said.startswith("warning: compiled programs are not kept: ") and said.count("\n") == 1
    assert str(tmp_path / "pemoe_jax") in said


def test_what_nobody_reads_is_forgotten(tmp_path):
    folder = tmp_path / "pemoe_jax" / "compiled"
    folder.mkdir(parents=True)
    now = time.time()
    for name, days in (("old-cache", 31), ("read-cache", 29), ("notes.txt", 31)):
        (folder / name).write_text("")
        os.utime(folder / name, (now - days * 86400, now - 31 * 86400))
    started(XDG_CACHE_HOME=str(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "read-cache"]


def train(root: Path, name: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(root / "caches"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [
        *(sys.executable, "-m", "pemoe_jax.train"),
        *(f"--gin_file={f}.gin" for f in ("models/t5_1_1_tiny", "methods/mov", "runs/finetune")),
        f"--gin.MODEL_DIR={root / name}",
        f"--gin.JSONL_DIR={root / 'tasks'}",
        f"--gin.VOCAB_PATH={root / 'vocab.model'}",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}",
        *("--gin.VOCAB_SIZE=256", "--gin.BATCH_SIZE=8", "--gin.INITIAL_CHECKPOINT_PATH=None"),
        *("--gin.TRAIN_STEPS=3", "--gin.LOG_PERIOD=1"),
    ]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def losses(process: subprocess.Popen, folder: Path) -> list[float]:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert not err  # XLA has much to say of machines when it reads a program
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.slow
def test_the_next_process_compiles_nothing_and_computes_the_same(tmp_path):
    """Two at once fill the folder, and take it from each other; the third finds all in it."""
    write_folder(tmp_path / "tasks")
    write_vocabulary(tmp_path / "vocab.model")
    first, beside = train(tmp_path, "first"), train(tmp_path, "beside")
    told = losses(first, tmp_path / "first")
    assert len(told) == 3 and losses(beside, tmp_path / "beside") == told
    folder = tmp_path / "caches" / "pemoe_jax" / "compiled"
    kept = sorted(path.name for path in folder.iterdir())
    assert any(name.startswith("jit_step-") for name in kept)
    assert losses(train(tmp_path, "again"), tmp_path / "again") == told
    assert sorted(path.name for path in folder.iterdir()) == kept
