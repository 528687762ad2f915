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


# A second training that finds only incomplete programs, as they are while a process writes them.
# In the process of the first, since most of a start's time goes to imports.
TWICE = """
import json, pathlib, sys
from pemoe_jax import train
folder, *flags = json.loads(sys.argv[1])
assert train.main(flags[0]) == 0
import jax
jax.clear_caches()
before = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
pathlib.Path(folder, "../names.json").write_text(json.dumps(sorted(before)))
for name, content in before.items():
    pathlib.Path(folder, name).write_bytes(content[:1000])
assert train.main(flags[1]) == 0
"""


def train_flags(root: Path, name: str) -> list[str]:
    return [
        *(f"--gin_file={f}.gin" for f in ("models/t5_1_1_tiny", "methods/mov", "runs/finetune")),
        f"--gin.MODEL_DIR={root / name}",
        f"--gin.JSONL_DIR={root / 'tasks'}",
        f"--gin.VOCAB_PATH={root / 'vocab.model'}",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}",
        *("--gin.VOCAB_SIZE=256", "--gin.BATCH_SIZE=8", "--gin.INITIAL_CHECKPOINT_PATH=None"),
        *("--gin.TRAIN_STEPS=3", "--gin.LOG_PERIOD=1"),
        *(f"--gin.network.T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")),
    ]


def start(root: Path, *arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(root / "caches"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert not err  # XLA may warn about CPU features when it loads a program


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.slow
def test_the_next_process_compiles_nothing_and_computes_the_same(tmp_path):
    """Two processes fill the folder at the same time; a third finds all programs in it.

    A fourth training finds only incomplete programs.
    """
    write_folder(tmp_path / "tasks")
    write_vocabulary(tmp_path / "vocab.model")
    for process in [
        start(tmp_path, "-m", "pemoe_jax.train", *train_flags(tmp_path, name))
        for name in ("first", "second")
    ]:
        wait(process)
    expected = losses(tmp_path / "first")
    assert len(expected) == 3 and losses(tmp_path / "second") == expected
    folder = tmp_path / "caches" / "pemoe_jax" / "compiled"
    programs = sorted(path.name for path in folder.iterdir())
    assert any(name.startswith("jit_step-") for name in programs)
    trainings = [train_flags(tmp_path, name) for name in ("third", "fourth")]
    wait(start(tmp_path, "-c", TWICE, json.dumps([str(folder), *trainings])))
    assert json.loads((folder.parent / "names.json").read_text()) == programs
    assert losses(tmp_path / "third") == losses(tmp_path / "fourth") == expected
