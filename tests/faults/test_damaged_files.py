"""A sample of `make faults`: damaged files of the readers that need no TensorFlow."""

import damaged_files
import pytest

NAMES = ("adapters", "`adapter_config.json`", "their record and position", "`INDEX.json`")


@pytest.mark.parametrize("name", [*NAMES, "`metrics.jsonl`"])
def test_damaged_files_are_refused_in_one_line_or_read(name):
    result = damaged_files.run_reader(name, num_cases=150)
    assert result["errors"] == [] and not damaged_files.is_bad(result)
    # Enough cases must be refused to show that the damage is real.
    assert result["clear"] > 50 and result["clear"] + result["same"] + result["changed"] == 150


def test_a_traceback_is_counted_and_placed(monkeypatch, tmp_path):
    """The check can fail: a reader that trusts its file is reported."""

    def trusting(folder):
        path = folder / "x.json"
        path.write_text('{"size": 3}')
        import json

        return damaged_files.Reader(lambda: json.loads(path.read_bytes())["size"] + 1, [path])

    monkeypatch.setitem(damaged_files.READERS, "trusting", trusting)
    result = damaged_files.run_reader("trusting", num_cases=100)
    assert result["traceback"] > 50 and any("JSONDecodeError" in e for e in result["errors"])
