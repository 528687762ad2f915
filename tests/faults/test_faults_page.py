"""docs/reliability.md shows the recorded results of `make faults`, in which nothing failed."""

import json
import subprocess
import sys

import damaged_files
import pytest
import summary


def test_the_page_shows_the_recorded_results():
    results = json.loads(summary.RESULTS.read_text())
    page = summary.PAGE.read_text()
    assert summary.render(page, results) == page
    readers = results.get("damaged files", {}).get("readers", {})
    assert not any(map(damaged_files.is_bad, readers.values()))
    assert results["settings"]["traceback"] == 0
    changed = {**results, "settings": {**results["settings"], "clear": 12_345}}
    assert "12,345" in summary.render(page, changed)


@pytest.mark.slow
def test_odd_settings_are_refused_in_one_line():
    script = summary.ROOT / "tests" / "faults" / "odd_settings.py"
    done = subprocess.run([sys.executable, script, "--cases=40"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one():
    script = summary.ROOT / "tests" / "faults" / "kills.py"
    command = [sys.executable, script, "--each=1", "--methods", "mov", "--no_two"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mov {'random moment': 0, 'file event': 1}" in done.stdout
