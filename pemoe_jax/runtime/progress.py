"""What a run tells while it goes: a progress bar or lines, JSON lines and TensorBoard."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def format_duration(seconds: float) -> str:
    """Seconds -> '1:02:03' or '2:03'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(number: float) -> str:
    """12345 -> '12.3k'."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


class MetricWriter:
    """Scalars by step, to `metrics.jsonl` and to TensorBoard, both under `model_dir`.

    A run goes on from step `first`: lines of later steps, which a killed run had told after its
    last checkpoint, are left out, and so is a line that it did not finish.
    """

    def __init__(self, model_dir: Path, first: int = 0) -> None:
        from clu import metric_writers

        from pemoe_jax.runtime import atomic_write

        file = model_dir / "metrics.jsonl"
        if file.exists():
            told = file.read_text()
            kept = "".join(f"{line}\n" for line in told.splitlines() if _is_of(line, first))
            if kept != told:
                atomic_write.write_text(file, kept)
        self._file = file.open("a")
        self._tensorboard = metric_writers.SummaryWriter(str(model_dir / "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        self._tensorboard.write_scalars(step, scalars)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _is_of(line: str, last: int) -> bool:
    """Whether a line of metrics is whole and of a step up to `last`."""
    try:
        return json.loads(line)["step"] <= last
    except json.JSONDecodeError:
        return False


class Progress:
    """A bar on a terminal, a line at each report elsewhere; both with speed and time left."""

    def __init__(self, label: str, total: int, done: int = 0, note: str = "compiling") -> None:
        self._label, self._total, self._first = label, total, done
        self._start = self._said = time.monotonic()
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[note]}"),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note=note)

    def advance(self, done: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report_if_due(self, done: int, note: str) -> None:
        """Says how it goes where nothing was said for ten seconds, or at the end."""
        now = time.monotonic()
        if done == self._total or now - self._said >= 10:
            self._said = now
            self.report(done, note)
        else:
            self.advance(done)

    def report_if_slow(self, done: int, note: str) -> None:
        """As `report_if_due`, and not at the end: of what is quick nothing is said."""
        if done < self._total:
            self.report_if_due(done, note)
        else:
            self.advance(done)

    def report(self, done: int, note: str) -> None:
        """Says how far the run is and how it goes."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        pace = (time.monotonic() - self._start) / max(done - self._first, 1)
        left = format_duration(pace * (self._total - done))
        print(f"{self._label} {done}/{self._total}  {note}  left {left}", flush=True)

    def print_line(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
