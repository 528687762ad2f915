"""Measures the times of training steps and the memory, and reads them from metrics.jsonl.

A line of metrics.jsonl has the median time of the steps since the line before it, and the peak
memory so far. It also has the devices and the batch, which may change when a run is resumed.
"""

import collections
import math
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from pemoe_jax.core.params import PyTree
from pemoe_jax.runtime import file_io, progress
from pemoe_jax.runtime.file_io import AnyPath

# Fields of a line of metrics.jsonl.
SECONDS, DEVICE, BATCH = "train/step_seconds", "device", "batch"
PEAK_MEMORY = "train/peak_memory"


class StepTimer:
    """Measures steps from their start to their end on the devices.

    A step starts when it is dispatched, or when the previous step ends if that is later. So the
    time between two steps, for data, reports, evaluations and saves, counts for neither of them.
    """

    def __init__(self) -> None:
        self._running: collections.deque[tuple[float, PyTree]] = collections.deque()
        self._last_end = -float("inf")
        self._seconds: list[float] = []

    def add(self, dispatch_time: float, outputs: PyTree) -> None:
        """Adds a running step: the `time.monotonic()` of its dispatch, and its output arrays."""
        self._running.append((dispatch_time, jax.tree.leaves(outputs)))
        self._end_finished_steps()

    def wait(self, max_running: int) -> None:
        """Waits until at most `max_running` steps are running."""
        while len(self._running) > max_running:
            jax.block_until_ready(self._running[0][1])
            self._end_first_step()
        self._end_finished_steps()

    def take_seconds(self) -> list[float]:
        """Returns the durations of the steps that finished since the last call."""
        seconds, self._seconds = self._seconds, []
        return seconds

    def _end_finished_steps(self) -> None:
        # Called as often as possible, because a step whose end is noticed late looks longer.
        while self._running and all(array.is_ready() for array in self._running[0][1]):
            self._end_first_step()

    def _end_first_step(self) -> None:
        (dispatch_time, _), end = self._running.popleft(), time.monotonic()
        self._seconds.append(end - max(dispatch_time, self._last_end))
        self._last_end = end


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Returns 'TPU v4' or '8 × TPU v4'; for a CPU, the processor's name and number of cores."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"{_processor_name()}, {_count_cores()} cores"
    return kind if len(devices) == 1 else f"{len(devices)} × {kind}"


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    return name[1].strip() if name else platform.machine()


def _count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # only on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(devices: Sequence[jax.Device]) -> int:
    """Returns the most bytes that a device has had in use; on a CPU, those of the whole process.

    Returns 0 if the devices have no such statistic.
    """
    if devices[0].platform == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)  # macOS reports bytes, Linux KiB
    # Some backends have no statistics, or lack this one.
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)


def read_step_times(metrics: AnyPath, last_step: int) -> list[dict[str, str | float | int]]:
    """Reads the step times of a run up to a step, by devices and batch.

    Args:
      metrics: the run's metrics.jsonl.
      last_step: later lines are ignored.

    Returns:
      {"seconds", "device", "batch", "memory"} of each pair of devices and batch, the pair with most
      lines first. "seconds" is the median of the medians in its lines. "memory" is the peak in
      bytes, absent if it is unknown. The list is empty if the file has no step times.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    memory: dict[tuple[str, str], int] = {}
    text = file_io.read_text(metrics, "replace") if metrics.is_file() else ""
    for line in text.splitlines():
        row = progress.parse_metrics(line)
        device, batch, value = (row.get(name) for name in (DEVICE, BATCH, SECONDS))
        if not (isinstance(device, str) and isinstance(batch, str) and isinstance(value, float)):
            continue
        if row["step"] <= last_step:
            key = device, batch
            seconds.setdefault(key, []).append(value)
            peak = row.get(PEAK_MEMORY)
            if isinstance(peak, (int, float)) and math.isfinite(peak):
                memory[key] = max(int(peak), memory.get(key, 0))
    most_lines_first = sorted(seconds.items(), key=lambda item: -len(item[1]))
    return [
        {
            "seconds": statistics.median(values),
            "device": key[0],
            "batch": key[1],
            **({"memory": memory[key]} if key in memory else {}),
        }
        for key, values in most_lines_first
    ]
