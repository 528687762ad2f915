"""Progress of a run: a bar or lines on stdout, metrics as JSON lines and in TensorBoard."""

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.core.errors import InputError, first_line, plural
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import AnyPath

if TYPE_CHECKING:
    from rich import progress as rich_progress


_UPLOAD_SECONDS = 10.0  # between two uploads of metrics to a bucket
_REPORT_SECONDS = 10.0  # minimum time between two lines of `report_if_due`


def format_duration(seconds: float) -> str:
    """Formats seconds as '1:02:03' or '2:03'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(number: float) -> str:
    """Formats 12345 as '12.3k', and 1234567 as '1.2M'."""
    if number < 1e3:
        return f"{number:.0f}"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"


class MetricWriter:
    """Writes scalars by step to `metrics.jsonl` and to TensorBoard, both in `model_dir`.

    A run that resumes from step `first_step` first deletes the lines of later steps. Nothing can be
    appended to an object in a bucket, so there the object is replaced by one with all lines: by
    `write` every `_UPLOAD_SECONDS`, and by each `flush`.
    """

    def __init__(self, model_dir: AnyPath, first_step: int = 0) -> None:
        from clu import metric_writers

        file = model_dir / "metrics.jsonl"
        with file_io.remote_errors(file):
            text = truncate_metrics(file, first_step)
        self._path = file
        if isinstance(file, Path):
            self._file: IO[str] = file.open("a", encoding="utf-8")
        else:
            self._file = io.StringIO()
            self._file.write(text)
        self._last_upload = -float("inf")  # the first `write` uploads at once
        with self._errors():
            self._tensorboard = metric_writers.SummaryWriter(str(model_dir / "tensorboard"))

    def write(
        self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str] | None = None
    ) -> None:
        """Writes the scalars of a step.

        Args:
          step: the step.
          scalars: name -> value.
          texts: name -> text, written only to `metrics.jsonl`, such as the devices.
        """
        line = {"step": step, **scalars, **(texts or {})}
        with self._errors():
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            # TensorFlow keeps a tensor of each Python number that it converts, 700 bytes, until the
            # process ends; of numpy's numbers it keeps none.
            values = {name: np.float32(value) for name, value in scalars.items()}
            self._tensorboard.write_scalars(step, values)
        if time.monotonic() - self._last_upload > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Uploads all lines to a bucket; a no-op for a local file, which has them already."""
        from pemoe_jax.runtime import atomic_write

        if isinstance(self._file, io.StringIO):
            atomic_write.write_text(self._path, self._file.getvalue())
            self._last_upload = time.monotonic()

    def close(self) -> None:
        """Uploads all lines to a bucket, and closes the files."""
        self.flush()
        with self._errors():
            self._file.close()
            self._tensorboard.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Names the folder in errors about its files; converts TensorFlow's to an InputError."""
        import tensorflow as tf

        folder = self._path.parent
        try:
            with file_io.remote_errors(folder), file_io.named_errors(folder):
                yield
        except tf.errors.OpError as error:
            # The first line reads 'FILE; No space left on device'.
            reason = first_line(error).rpartition(";")[2].strip()
            raise InputError(f"{folder / 'tensorboard'}: {reason}") from error


def truncate_metrics(file: AnyPath, last_step: int) -> str:
    """Deletes the lines of steps after `last_step`; returns the remaining text.

    A killed run wrote them after its last checkpoint. An unfinished last line is deleted too. Lines
    without a record are deleted with a warning.
    """
    from pemoe_jax.runtime import atomic_write

    # "replace", because a crash may leave bytes that are not UTF-8. Their line is then damaged.
    text = file_io.read_text(file, "replace") if file.exists() else ""
    lines = text.splitlines()
    steps = [*map(_step_of, lines)]
    damaged = steps.count(None)
    if not text.endswith("\n") and steps[-1:] == [None]:
        damaged -= 1  # a killed run was writing it
    if damaged:
        print(f"warning: {file}: deleted {plural(damaged, 'line')} without a record", flush=True)
    rest = "".join(
        f"{line}\n"
        for line, step in zip(lines, steps, strict=True)
        if step is not None and step <= last_step
    )
    if rest != text:
        atomic_write.write_text(file, rest)
    return rest


def best_step(file: AnyPath, metric: str, steps: Collection[int]) -> tuple[int, float] | None:
    """Returns the step with the best value of a metric, and the value; None if no step has one.

    Only `steps` are compared. A loss is best when it is lowest, another metric when it is highest.
    Of steps with equal values, the first counts.
    """
    lines = file_io.read_text(file, "replace").splitlines() if file.exists() else []
    values = {}
    for line in lines:
        row = parse_metrics(line)
        value = row.get(metric)
        if row and row["step"] in steps and isinstance(value, float) and math.isfinite(value):
            values[row["step"]] = value
    if not values:
        return None
    sign = 1 if metric.endswith("loss") else -1
    best = min(values, key=lambda step: (sign * values[step], step))
    return best, values[best]


def parse_metrics(line: str) -> dict[str, Any]:
    """Parses a line of `metrics.jsonl`, a record with an integer 'step'; {} for any other line."""
    try:
        row = file_io.parse_json(line)
    except ValueError:
        return {}
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return {}
    # isinstance would accept a bool as an int; larger integers would not fit into numpy's.
    is_record = all(
        isinstance(value, (float, str)) or (type(value) is int and abs(value) < 2**63)
        for value in row.values()
    )
    return row if is_record else {}


def _step_of(line: str) -> int | None:
    """Returns the step of a line of metrics; None if the line is no record."""
    return parse_metrics(line).get("step")


class Progress:
    """Shows the progress of work, with the remaining time: a bar on a terminal, else lines.

    The pace is measured from the first update (`advance` or a report) on, because the work before
    it includes compiling.

    Args:
      label: name of the thing that is counted, e.g. 'step'.
      total: count at the end of the work.
      done: count at the start.
      note: text next to the bar before the first report.
    """

    def __init__(self, label: str, total: int, done: int = 0, note: str = "compiling") -> None:
        self._label, self._total = label, total
        self._last_report = time.monotonic()
        self._first: tuple[int, float] | None = None  # count and time of the first update
        self._bar: rich_progress.Progress | None = None
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
        """Moves the bar; prints nothing without a terminal."""
        self._first = self._first or (done, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report_if_due(self, done: int, note: str) -> None:
        """Reports at the end, and before it at most every ten seconds."""
        now = time.monotonic()
        if done == self._total or now - self._last_report >= _REPORT_SECONDS:
            self._last_report = now
            self.report(done, note)
        else:
            self.advance(done)

    def report_if_slow(self, done: int, note: str) -> None:
        """Reports at most every ten seconds, not at the end, so that quick work prints nothing."""
        if done < self._total:
            self.report_if_due(done, note)
        else:
            self.advance(done)

    def report(self, done: int, note: str) -> None:
        """Shows the count, the note and, from the second update on, the remaining time."""
        now = time.monotonic()
        first, start = self._first = self._first or (done, now)
        if self._bar is not None:  # `rich` measures the pace itself, over the last 30 seconds
            self._bar.update(self._task, completed=done, note=note)
            return
        left = ""
        if done > first or done == self._total:
            pace = (now - start) / max(done - first, 1)
            left = f"  left {format_duration(pace * (self._total - done))}"
        print(f"{self._label} {done}/{self._total}  {note}{left}", flush=True)

    def print_line(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Ends the bar, which then stays on the terminal."""
        if self._bar is not None:
            self._bar.stop()
