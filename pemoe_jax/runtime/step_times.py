"""Step times: measured while training, recorded in metrics.jsonl, and read for reports.

A line of metrics.jsonl has the median time of the steps since the last report, and the devices and
the batch that it is of: a run may resume on another machine, or with another batch.
"""

import collections
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from pemoe_jax.core.params import PyTree

SECONDS, DEVICE, BATCH = "train/step_seconds", "device", "batch"


class StepTimer:
    """Measures steps from their start to their end on the devices.

    A step starts when it is dispatched, or when the step before it ends if that is later. So
    waiting for data, reports, evaluations and saves between two steps are in neither.
    """

    def __init__(self) -> None:
        self._running: collections.deque[tuple[float, PyTree]] = collections.deque()
        self._last_end = -float("inf")
        self._seconds: list[float] = []

    def add(self, dispatch_time: float, outputs: PyTree) -> None:
        """Adds a step that was dispatched at a time of `time.monotonic`."""
        self._running.append((dispatch_time, jax.tree.leaves(outputs)))
        self._end_finished_steps()

    def wait(self, max_running: int) -> None:
        """Waits until at most `max_running` steps are running."""
        while len(self._running) > max_running:
            jax.block_until_ready(self._running[0][1])
            self._end_first_step()
        self._end_finished_steps()

    def take_seconds(self) -> list[float]:
        """Returns the durations of the finished steps since the last call."""
        seconds, self._seconds = self._seconds, []
        return seconds

    def _end_finished_steps(self) -> None:
        while self._running and all(array.is_ready() for array in self._running[0][1]):
            self._end_first_step()

    def _end_first_step(self) -> None:
        (dispatch_time, _), end = self._running.popleft(), time.monotonic()
        self._seconds.append(end - max(dispatch_time, self._last_end))
        self._last_end = end


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Returns the number and kind of devices, such as '8 × TPU v4'; of a CPU also its cores."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"{_processor_name()}, {_count_cores()} cores"
    return kind if len(devices) == 1 else f"{len(devices)} × {kind}"


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return name[1].strip() if name else platform.machine()


def _count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_step_times(metrics: Path, last_step: int) -> list[dict[str, str | float]]:
    """Reads the step times of a run up to a step, of each machine and batch.

    Args:
      metrics: the run's metrics.jsonl.
      last_step: later lines are ignored.

    Returns:
      {"seconds", "device", "batch"} of each pair of device and batch, those of most reports first;
      "seconds" is the median of the reports' medians. Empty if the file has none.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        row = _parse_line(line)
        if {SECONDS, DEVICE, BATCH, "step"} <= row.keys() and row["step"] <= last_step:
            seconds.setdefault((row[DEVICE], row[BATCH]), []).append(row[SECONDS])
    by_reports = sorted(seconds.items(), key=lambda item: -len(item[1]))
    return [
        {"seconds": statistics.median(values), "device": device, "batch": batch}
        for (device, batch), values in by_reports
    ]


def _parse_line(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that is training
        return {}
    return row if isinstance(row, dict) else {}
