"""Progress lines without a terminal, and the file of metrics."""

import gc
import json
import resource
import sys

import numpy as np
import pytest

from pemoe_jax.analysis import plots
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import progress, step_times


def test_durations_and_thousands():
    assert progress.format_duration(59.9) == "0:59"
    assert progress.format_duration(3723) == "1:02:03"  # 3600 + 2 * 60 + 3
    assert [progress.format_count(n) for n in (999, 12_345, 2_500_000)] == ["999", "12.3k", "2.5M"]


def set_clock(monkeypatch, seconds):
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)


def test_lines_show_the_count_and_the_remaining_time(capsys, monkeypatch):
    set_clock(monkeypatch, 100)
    bar = progress.Progress("step", total=50, done=10)
    set_clock(monkeypatch, 105)
    bar.report_if_due(20, "early")  # 5 s after the start: nothing yet
    set_clock(monkeypatch, 111)
    bar.report_if_due(32, "loss 1.0")  # 6 s for 12 steps: half a second each, 18 steps left
    assert capsys.readouterr().out == "step 32/50  loss 1.0  left 0:09\n"
    set_clock(monkeypatch, 112)
    bar.report_if_due(50, "done")  # the end is always reported
    assert "step 50/50  done  left 0:00" in capsys.readouterr().out
    bar = progress.Progress("reading", total=50)
    bar.advance(10)
    set_clock(monkeypatch, 123)
    bar.report_if_slow(20, "arrays")
    assert "reading 20/50  arrays  left 0:33" in capsys.readouterr().out  # 11 s for 10, 30 left
    bar.report_if_slow(50, "arrays")  # not at the end
    assert capsys.readouterr().out == ""


def test_remaining_time_leaves_compiling_out(capsys, monkeypatch):
    """The first step takes 41 s, 40 of them to compile, and each further step one."""
    set_clock(monkeypatch, 0)
    bar = progress.Progress("step", total=120)
    set_clock(monkeypatch, 40)
    bar.advance(1)  # the first step is under way
    set_clock(monkeypatch, 41)
    bar.report(1, "loss 9.0")
    assert capsys.readouterr().out == "step 1/120  loss 9.0\n"  # nothing to estimate it from
    set_clock(monkeypatch, 60)
    bar.report(21, "loss 5.0")  # 20 s for 20 steps
    assert capsys.readouterr().out == "step 21/120  loss 5.0  left 1:39\n"
    bar = progress.Progress("step", total=1)
    bar.report(1, "loss 9.0")
    assert capsys.readouterr().out == "step 1/1  loss 9.0  left 0:00\n"


def test_metrics_resume_from_a_checkpoint(tmp_path):
    """Lines after the checkpoint's step and an unfinished line are deleted."""
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3))
    file.write_text(lines + '{"step": 4, "lo')
    metrics = progress.MetricWriter(tmp_path, first_step=2)
    metrics.write(3, {"loss": 0.5}, {"device": "8 × TPU v4"})
    metrics.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[:2] == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert rows[2:] == [{"step": 3, "loss": 0.5, "device": "8 × TPU v4"}]
    progress.MetricWriter(tmp_path).close()  # a run from step 0
    assert file.read_text() == ""


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"step": 1.0}',
        '{"step": true}',
        '{"step": Infinity}',
        f'{{"step": {2**63}}}',
    ]
    + [f'{{"step": 1, "batch": {value}}}' for value in ("[]", "{}", "null", "true", "9" * 400)],
)
def test_lines_that_are_no_record(line, tmp_path):
    """Readers of step times and of curves had tracebacks for some of them."""
    assert progress.parse_metrics(line) == {}
    file = tmp_path / "metrics.jsonl"
    good = {"step": 2, "device": "x", "batch": "y", "train/step_seconds": 1.0, "train/loss": 2.0}
    file.write_text(f"{line}\n{json.dumps(good)}\n")
    times = [{"seconds": 1.0, "device": "x", "batch": "y"}]
    assert step_times.read_step_times(file, 9) == times
    with pytest.raises(InputError, match="metrics.jsonl, line 1: expected a JSON object with"):
        plots.loss_curve(file, tmp_path / "loss.png")


def test_a_full_disk_for_tensorboard_is_one_line(tmp_path):
    """A file may have 900 bytes: TensorFlow's errors are not of the class OSError."""
    writer = progress.MetricWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    try:
        with pytest.raises(InputError, match=r"/tensorboard: File too large$"):
            for step in range(1, 21):  # TensorFlow writes at the eleventh
                writer.write(step, {"train/loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_best_step_of_a_metric(tmp_path):
    """Of steps that have a checkpoint; of equal ones the first; NaN and texts do not count."""
    file = tmp_path / "metrics.jsonl"
    assert progress.best_step(file, "eval/loss", [2]) is None
    losses = {1: 0.5, 2: 2.0, 3: 1.0, 4: 1.0, 5: float("nan"), 6: "0"}
    file.write_text(
        "".join(json.dumps({"step": s, "eval/loss": v}) + "\n" for s, v in losses.items())
    )
    assert progress.best_step(file, "eval/loss", [2, 3, 4, 5, 6]) == (3, 1.0)
    assert progress.best_step(file, "eval/accuracy", [2]) is None
    file.write_text(file.read_text().replace("loss", "accuracy"))
    assert progress.best_step(file, "eval/accuracy", [*losses]) == (2, 2.0)


def test_written_scalars_take_no_memory(tmp_path):
    """TensorFlow keeps each Python number that it converts to a tensor; a long run writes many."""
    writer = progress.MetricWriter(tmp_path)
    numbers = iter(np.random.default_rng(0).random(1000).tolist())

    def write(times: int) -> int:
        for step in range(times):
            writer.write(step, {f"train/{i}": next(numbers) for i in range(10)})
        gc.collect()
        return sys.getallocatedblocks()

    before = write(20)
    assert write(60) - before < 300  # 600 numbers
    writer.close()
