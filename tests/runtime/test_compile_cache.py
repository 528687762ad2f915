"""The compilation cache: its folder, its settings, and that a second process compiles nothing."""

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


def enabled(**variables: str) -> dict[str, str]:
    """Returns the environment after `enable`."""
    compile_cache.enable(variables)
    return variables


def test_the_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    environment = enabled(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "pemoe_jax" / "compiled"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / ".cache" / "pemoe_jax" / "compiled"
    assert compile_cache.default_folder({}) == home
    assert compile_cache.default_folder({"XDG_CACHE_HOME": "relative"}) == home


def test_variables_of_jax_take_precedence(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    assert enabled(**environment) == environment
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": "gs://elsewhere",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3",
    }
    assert enabled(**environment) == environment
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_gives_a_warning(tmp_path, capsys):
    (tmp_path / "pemoe_jax").write_text("a file")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert enabled(**environment) == environment
    warning = capsys.readouterr().err
    assert warning.startswith("warning: compiled programs are not cached: ")
    assert str(tmp_path / "pemoe_jax") in warning and warning.count("\n") == 1


def test_programs_unread_for_a_month_are_deleted(tmp_path):
    folder = tmp_path / "pemoe_jax" / "compiled"
    folder.mkdir(parents=True)
    now = time.time()
    for name, days in (("old-cache", 31), ("read-cache", 29), ("notes.txt", 31)):
        (folder / name).write_text("")
        os.utime(folder / name, (now - days * 86400, now - 31 * 86400))
    enabled(XDG_CACHE_HOME=str(tmp_path))
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
    assert not err  # XLA may warn about CPU features when it loads a program
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.slow
def test_the_next_process_compiles_nothing_and_computes_the_same(tmp_path):
    """Two processes fill the folder at the same time; a third finds all programs in it.

    A fourth finds only incomplete programs.
    """
    write_folder(tmp_path / "tasks")
    write_vocabulary(tmp_path / "vocab.model")
    first, second = train(tmp_path, "first"), train(tmp_path, "second")
    expected = losses(first, tmp_path / "first")
    assert len(expected) == 3 and losses(second, tmp_path / "second") == expected
    folder = tmp_path / "caches" / "pemoe_jax" / "compiled"
    programs = sorted(path.name for path in folder.iterdir())
    assert any(name.startswith("jit_step-") for name in programs)
    assert losses(train(tmp_path, "third"), tmp_path / "third") == expected
    assert sorted(path.name for path in folder.iterdir()) == programs
    # As they are while another process writes them.
    for program in folder.iterdir():
        program.write_bytes(program.read_bytes()[:1000])
    assert losses(train(tmp_path, "fourth"), tmp_path / "fourth") == expected
