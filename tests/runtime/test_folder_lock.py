"""Locks of output folders between processes."""

import os
import subprocess
import sys

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import folder_lock

HOLD = """
import pathlib, sys, time
from pemoe_jax.runtime import folder_lock
folder_lock.hold(pathlib.Path(sys.argv[1]), "MODEL_DIR")
print(flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def release():
    yield
    folder_lock.release_all()


def test_the_owner_is_named_and_leaves_no_lock_when_it_is_killed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    owner.stdout.readline()
    monkeypatch.setattr(folder_lock, "TIMEOUT", 0.0)
    with pytest.raises(InputError, match=rf"^MODEL_DIR must .* by process {owner.pid} on \w"):
        folder_lock.hold(folder, "MODEL_DIR")
    owner.kill()
    owner.communicate()
    folder_lock.hold(folder, "MODEL_DIR")
    assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_process_holds_a_folder_until_it_releases_all(tmp_path, monkeypatch):
    lock = folder_lock.hold(tmp_path, "MODEL_DIR")
    assert folder_lock.hold(tmp_path, "MODEL_DIR") == lock
    monkeypatch.setattr(folder_lock, "TIMEOUT", 0.0)
    command = [
        sys.executable,
        "-c",
        HOLD.replace("time.sleep(600)", "").replace(
            "folder_lock.hold", "folder_lock.TIMEOUT = 0; folder_lock.hold"
        ),
        str(tmp_path),
    ]
    assert subprocess.run(command, timeout=60, stderr=subprocess.PIPE).returncode == 1
    folder_lock.release_all()
    assert subprocess.run(command, timeout=60).returncode == 0


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(folder_lock.errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    folder_lock.hold(tmp_path, "MODEL_DIR")
    assert capsys.readouterr().out.endswith("run one command in it at a time\n")


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    folder_lock.hold(tmp_path / "empty", "MODEL_DIR")
    folder_lock.hold(tmp_path / "full", "MODEL_DIR")
    (tmp_path / "full" / "config.gin").touch()
    folder_lock.hold(tmp_path, "EVAL_OUTPUT_DIR")
    folder_lock.release_all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "full"]


def test_what_a_killed_command_left_unfinished_is_deleted(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    pid = int(ended.stdout)
    (tmp_path / f".config.gin.{pid}").touch()
    (tmp_path / f".adapter.{pid}").mkdir()
    kept = [f".loss.png.{os.getpid()}", f"notes.{pid}", ".vimrc.swp", f".x.{10**30}"]
    for name in kept:
        (tmp_path / name).touch()
    folder_lock.hold(tmp_path, "MODEL_DIR")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".lock"])
