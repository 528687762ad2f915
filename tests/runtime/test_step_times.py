"""Step times: by hand from a clock and steps that end on command, and as read from a file."""

import json

import jax
import pytest

from pemoe_jax.runtime import step_times
from pemoe_jax.runtime.step_times import StepTimer, read_step_times


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(step_times.time, "monotonic", lambda: self.now)

        def block(arrays):
            self.now = max(self.now, *(array.end for array in arrays))

        monkeypatch.setattr(step_times.jax, "block_until_ready", block)


class Output:
    """An output of a step that ends at a time of the clock."""

    def __init__(self, clock, end):
        self.clock, self.end = clock, end

    def is_ready(self):
        return self.clock.now >= self.end


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_steps_that_are_dispatched_ahead_last_from_end_to_end(clock):
    timer = StepTimer()
    # Each step takes 2 s; the host needs 0.5 s for a step, and is a step ahead.
    for step in range(4):
        timer.wait(max_running=1)
        timer.add(clock.now, {"loss": Output(clock, 102 + 2 * step)})
        clock.now += 0.5
    timer.wait(max_running=0)
    assert timer.take_seconds() == [2, 2, 2, 2] and timer.take_seconds() == []


def test_waiting_between_steps_is_in_none(clock):
    """The devices are idle while the host waits for a batch, or saves a checkpoint."""
    timer = StepTimer()
    for pause in (0, 30, 5):
        timer.wait(max_running=0)
        clock.now += pause
        timer.add(clock.now, {"loss": Output(clock, clock.now + 2)})
    timer.wait(max_running=0)
    assert timer.take_seconds() == [2, 2, 2]


def test_steps_that_are_done_when_dispatched(clock):
    """As on a CPU without asynchronous dispatch."""
    timer = StepTimer()
    for seconds in (2, 3, 4):
        timer.wait(max_running=1)
        start = clock.now
        clock.now += seconds
        timer.add(start, {"loss": Output(clock, clock.now), "accuracy": Output(clock, clock.now)})
        clock.now += 10
    assert timer.take_seconds() == [2, 3, 4]


def test_times_of_two_machines_and_batches_are_read_apart(tmp_path):
    def line(step, seconds, device="A", batch="8 × (16 + 8)"):
        return {"step": step, "train/step_seconds": seconds, "device": device, "batch": batch}

    lines = [{"step": 1, "train/loss": 3.0}, line(10, 0.2), line(20, 0.9), line(30, 0.3)]
    lines += [line(40, 0.1, "B"), line(50, 5.0, batch="4 × (16 + 8)"), {"step": 50, "eval/loss": 1}]
    lines[3]["train/peak_memory"], lines[2]["train/peak_memory"] = 5e6, 7e6
    lines += [{**line(60, 7.0, "C"), "train/peak_memory": 9e6}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"step": 7')
    first, *others = read_step_times(file, last_step=50)
    about = {"seconds": 0.3, "device": "A", "batch": "8 × (16 + 8)"}
    assert first == {**about, "memory": 7_000_000} and "memory" not in others[0]
    assert [(row["seconds"], row["device"]) for row in others] == [(0.1, "B"), (5.0, "A")]
    assert read_step_times(tmp_path / "none", 50) == []


def test_peak_memory_of_devices_and_of_the_process():
    class Device:
        platform = "gpu"

        def __init__(self, peak):
            self.memory_stats = lambda: None if peak is None else {"peak_bytes_in_use": peak}

    assert step_times.peak_memory([Device(7), Device(9), Device(None)]) == 9
    assert 2**24 < step_times.peak_memory(jax.devices("cpu")) < 2**40  # bytes, not kilobytes


def test_devices_are_named():
    class Device:
        def __init__(self, platform, device_kind):
            self.platform, self.device_kind = platform, device_kind

    assert step_times.describe_devices([Device("tpu", "TPU v4")] * 8) == "8 × TPU v4"
    assert step_times.describe_devices([Device("gpu", "NVIDIA H200")]) == "NVIDIA H200"
    text = step_times.describe_devices([Device("cpu", "cpu")])
    assert text.endswith(" cores") and text != "cpu"
