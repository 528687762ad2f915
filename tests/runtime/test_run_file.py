"""`run.json`: written at the start, true to the end, not left by a command that wrote nothing."""

import json
import os

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, run_file


def read(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def run(work) -> int:
    flags = gin_flags.make_parser("count", "", "", ())
    return gin_flags.run_command(flags, lambda *_: work(), [])


def test_a_file_says_how_its_command_ended(tmp_path, capsys):
    def work(error=None):
        run_file.begin(tmp_path, seed=3)
        assert read(tmp_path)["status"] == "running"
        assert read(tmp_path)["process"] == os.getpid() and read(tmp_path)["end"] is None
        (tmp_path / "result").write_text("")
        if error is not None:
            raise error

    assert run(work) == 0
    about = read(tmp_path)
    assert (about["status"], about["seed"], about["earlier"]) == ("finished", 3, [])
    assert about["seconds"] >= 0
    assert run(lambda: work(InputError("X must be 1"))) == 1
    assert (read(tmp_path)["status"], read(tmp_path)["reason"]) == ("failed", "X must be 1")
    assert run(lambda: work(KeyboardInterrupt())) == 130
    with pytest.raises(TypeError):
        run(lambda: work(TypeError("a\nb")))
    assert read(tmp_path)["reason"] == "TypeError: a"
    statuses = [each["status"] for each in read(tmp_path)["earlier"]]
    assert statuses == ["finished", "failed", "stopped"]


@pytest.mark.parametrize("content", ["", "[]", '{"earlier": 5}', "{"])
def test_a_damaged_file_is_replaced(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    run_file.begin(tmp_path)
    run_file.finish("finished", "")
    assert read(tmp_path)["status"] == "finished"


def test_a_command_that_fails_before_it_writes_leaves_no_file(tmp_path, capsys):
    def work():
        run_file.begin(tmp_path)
        raise InputError("X must be 1")

    assert run(work) == 1
    assert not [*tmp_path.iterdir()]
