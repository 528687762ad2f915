"""`python -m pemoe_jax.t5x_bridge`: plain words, wherever T5X is and wherever it is not."""

import importlib.util
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest

from pemoe_jax.t5x_bridge import __main__ as command
from pemoe_jax.t5x_bridge import installed

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def present(monkeypatch):
    """Makes chosen packages look installed, and no others of those asked for."""

    def make(names):
        real = importlib.util.find_spec
        asked = {*installed.EXTRA, *installed.COMMITS}

        def find(name):
            package = name.split(".")[0]
            if package not in asked:
                return real(name)
            return types.SimpleNamespace(origin="somewhere") if package in names else None

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return make


def test_what_is_missing_is_named_with_its_cure(present, capsys):
    present({*installed.EXTRA, "t5x"} - {"fiddle", "grain"})
    assert command.main(["--check"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert lines[0].startswith("error: missing: fiddle, grain: pip install ")
    assert "'.[t5x]'" in lines[0]
    assert [line.split()[2] for line in lines[1:]] == ["airio:", "jestimator:"]
    assert all("git+https://github.com/google" in line for line in lines[1:])


def test_what_does_not_import_is_named_with_its_cure(present, capsys, monkeypatch):
    """As the jestimator of PyPI does not."""
    present({*installed.EXTRA, *installed.COMMITS})

    def fail(module):
        raise ImportError(f"cannot import name 'PartitionSpec' of {module}\nand more")

    monkeypatch.setattr(installed, "_import", fail)
    assert command.main(["--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "jestimator.amos does not import" in line and "PyPI's" in line and "and more" not in line


def test_all_is_well(present, capsys, monkeypatch):
    present({*installed.EXTRA, *installed.COMMITS})
    monkeypatch.setattr(installed, "_import", lambda module: None)
    monkeypatch.setattr(installed, "_commit", {"t5x": "abc"}.get)
    assert command.main(["--check"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and "T5X works: t5x abc" in told.out
    assert "note: t5x is at commit abc; tested with cc342d4" in told.out


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "t5x").mkdir()
    (tmp_path / "airio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("t5x", "airio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert installed._is_missing(name)


def test_commits_are_whole_and_printed_for_pip(capsys):
    assert command.main(["--requirements"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"\w+ @ git\+https://github\.com/[\w-]+/\w+@[0-9a-f]{40}", line)


def test_the_extra_is_what_is_checked():
    extra = (ROOT / "setup.py").read_text().split('"t5x": [')[1].split("]")[0]
    assert {name.replace("-", "_") for name in re.findall(r'"([\w-]+)"', extra)} == set(
        installed.EXTRA
    )


def test_make_asks_pip_for_both_extras():
    """A comma in an argument of make's `call` would cut the list after the first."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "t5x-install", "VENV=/no/such"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines() if " -m pip install" in line]
    assert [line[-2:] for line in lines] == [["-e", ".[test,t5x]"], ["-r", "/no/such/t5x.txt"]]
    assert "--no-deps" in lines[1]


def test_names_for_gin_are_told_apart_from_misspellings():
    from pemoe_jax import t5x_bridge

    with pytest.raises(AttributeError, match="no_such"):
        _ = t5x_bridge.no_such
