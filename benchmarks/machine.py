"""Measures the machine that a benchmark runs on: cores, memory, load, versions (Linux).

This module needs the standard library alone, because peers import it without the dependencies of
this package.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import threading
import time

CORES = 2  # that a comparison on CPU uses
MEGABYTE = 1e6


def pin(cores: int = CORES) -> None:
    """Restricts this process to the first cores; call it before jax or torch count them."""
    # Each library derives its number of threads from the cores that it counts, in its own way. On
    # a larger machine the sides would differ in it.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))


def memory(field: str) -> int:
    """Returns a field of /proc/self/status in bytes.

    Fields: VmRSS, the resident memory now; VmHWM, its peak; RssAnon, the resident memory now
    without mapped files.
    """
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def reset_peak_memory() -> None:
    """Restarts the peak that VmHWM reports."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class PeakMemory:
    """Context manager: `added` is the increase of anonymous memory from entry to peak, in bytes."""

    def __init__(self, interval: float = 0.02):
        self.interval = interval  # seconds

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = memory("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        # Sampled, because the system records no peak of anonymous memory. VmHWM would count the
        # mapped files of a checkpoint, which the system can drop.
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, memory("RssAnon"))

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self.added = self.peak - self.before


def _busy_seconds() -> float:
    """Returns the CPU seconds of all processes since the machine started."""
    # Fields: user nice system idle iowait irq softirq steal. Waiting for disks (iowait) counts as
    # idle.
    fields = pathlib.Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    jiffies = [int(field) for field in fields]
    idle = jiffies[3] + jiffies[4]
    return (sum(jiffies[:8]) - idle) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """Measures from now on how busy other processes keep the cores."""

    def __init__(self) -> None:
        self._before, self._clock = _busy_seconds(), time.perf_counter()

    def share(self, own: float) -> float:
        """Returns the share of all cores that others used; `own`: CPU seconds of the benchmark."""
        # Of all cores, not only of those of this process: /proc/stat does not tell processes apart.
        available = (time.perf_counter() - self._clock) * (os.cpu_count() or 1)
        return max(0.0, _busy_seconds() - self._before - own) / available


def versions(*packages: str) -> str:
    """Returns 'Python 3.11.9, jax 0.10.2, …'."""
    installed = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *installed])


def description() -> str:
    """Returns the processor, the cores in use and the memory."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = re.findall(r"model name\s*: (.+)", text)
    kilobytes = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]
    name = names[0] if names else platform.machine()
    return f"{name}, {CORES} of {os.cpu_count()} cores, {int(kilobytes) / 1e6:.0f} GB"
