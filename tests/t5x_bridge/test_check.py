"""`python -m pemoe_jax.t5x_bridge`, with and without T5X."""

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
    """Makes the named packages of T5X look installed, and the others missing."""

    def set_installed(names):
        find_spec = importlib.util.find_spec
        checked = {*installed.EXTRA, *installed.COMMITS}

        def find(name):
            package = name.split(".")[0]
            if package not in checked:
                return find_spec(name)
            return types.SimpleNamespace(origin="somewhere") if package in names else None

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return set_installed


def test_missing_packages_are_named_with_the_command_that_installs_them(present, capsys):
    present({*installed.EXTRA, "t5x"} - {"fiddle", "grain"})
    assert command.main(["--check"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: missing: fiddle, grain: pip install ")
    assert "'.[t5x]'" in lines[0]
    assert [line.split()[2] for line in lines[1:]] == ["airio:", "jestimator:"]
    assert all("git+https://github.com/google" in line for line in lines[1:])


def test_packages_that_do_not_import_are_named(present, capsys, monkeypatch):
    """Such as the jestimator of PyPI."""
    present({*installed.EXTRA, *installed.COMMITS})

    def fail(module):
        raise ImportError(f"cannot import name 'PartitionSpec' of {module}\nand more")

    monkeypatch.setattr(installed, "_import", fail)
    assert command.main(["--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "jestimator.amos does not import" in line and "PyPI's" in line and "and more" not in line


def test_everything_is_installed(present, capsys, monkeypatch):
    present({*installed.EXTRA, *installed.COMMITS})
    monkeypatch.setattr(installed, "_import", lambda module: None)
    monkeypatch.setattr(installed, "_commit", {"t5x": "abc"}.get)
    assert command.main(["--check"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "T5X works: t5x abc" in captured.out
    assert "note: t5x is at commit abc; tested with cc342d4" in captured.out


def test_a_folder_with_its_name_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "t5x").mkdir()
    (tmp_path / "airio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("t5x", "airio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert installed._is_missing(name)


def test_full_commits_are_printed_for_pip(capsys):
    assert command.main(["--requirements"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"\w+ @ git\+https://github\.com/[\w-]+/\w+@[0-9a-f]{40}", line)


def test_the_extra_of_setup_py_is_checked():
    extra = (ROOT / "setup.py").read_text().split('"t5x": [')[1].split("]")[0]
    assert {name.replace("-", "_") for name in re.findall(r'"([\w-]+)"', extra)} == set(
        installed.EXTRA
    )


def test_make_asks_pip_for_both_extras():
    """A comma in an argument of make's `call` would end the list after the first extra."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "t5x-install", "VENV=/no/such"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines() if " -m pip install" in line]
    assert [line[-2:] for line in lines] == [["-e", ".[test,t5x]"], ["-r", "/no/such/t5x.txt"]]
    assert "--no-deps" in lines[1]


def test_misspelled_names_for_gin_raise():
    from pemoe_jax import t5x_bridge

    with pytest.raises(AttributeError, match="no_such"):
        _ = t5x_bridge.no_such
