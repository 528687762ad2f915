"""Trains, evaluates and resumes in one process for a given time; memory must stay flat.

    python tests/faults/soak.py [--minutes 60] [--output soak] [--record]

Writes soak.json and soak.png: memory and open files after each cycle.

JAX's caches are not cleared, as in a user's process: `jax.clear_caches()` would hide programs that
the package compiles anew in each cycle. JAX 0.10 keeps the newest 2,048 traces of `jnp.einsum`, and
a cycle adds 19, so memory grows in the first 110 cycles or so. Of a run of an hour these are the
warm-up, which is not counted. Shorter runs may exceed the limit of growth.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

import summary
import tiny_runs

COLUMNS = ("minutes", "memory in MiB", "open files", "threads")
_WARM_UP = 0.3  # share of the cycles in which caches fill
_MAX_MEMORY = 6000  # MiB; a process that grows must not take the memory of others
_MAX_GROWTH = (0.3, 0.05)  # MiB and open files per cycle


def measure(start: float) -> tuple[float, ...]:
    """Returns the values of `COLUMNS` of this process now, without memory that is free."""
    from pemoe_jax.runtime import host_memory

    # glibc keeps freed memory for reuse: up to 64 MiB at the end of its heap, for some cycles.
    host_memory.trim_heap()
    status = pathlib.Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    memory = int(fields["VmRSS"].split()[0]) / 1024
    files = len(os.listdir("/proc/self/fd"))
    return (time.monotonic() - start) / 60, memory, files, int(fields["Threads"])


def run_cycle(root: pathlib.Path, steps: int) -> None:
    """Resumes a run until a step, and evaluates it."""
    from pemoe_jax import evaluate, train

    # What the commands print is shown only if one fails.
    run, output = root / "run", io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        codes = [train.main(tiny_runs.train_flags(root, "mov", run, TRAIN_STEPS=steps))]
        codes.append(evaluate.main(tiny_runs.evaluate_flags(root, run, root / "scores")))
    if any(codes):
        raise RuntimeError(output.getvalue())


def compute_growth(rows: list[tuple[float, ...]], column: int) -> float:
    """Returns a column's growth per cycle after the warm-up, by a least-squares line."""
    import numpy as np

    values = [row[column] for row in rows[int(_WARM_UP * len(rows)) :]]
    return float(np.polyfit(range(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


def draw(rows: list[tuple[float, ...]], path: pathlib.Path) -> None:
    """Plots each column over the minutes."""
    from pemoe_jax.analysis import plots

    figure = plots.import_pyplot().figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(len(COLUMNS) - 1, 1, sharex=True)
    for column, axis in enumerate(axes, 1):
        axis.plot([row[0] for row in rows], [row[column] for row in rows], ".-")
        axis.set_ylabel(COLUMNS[column])
        axis.set_ylim(0, 1.1 * max(row[column] for row in rows))
    axes[-1].set_xlabel(f"minutes ({len(rows)} cycles of training, evaluating and resuming)")
    figure.savefig(path)


def main() -> int:
    """Runs the command; returns 1 if memory or the number of open files grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("soak"))
    parser.add_argument("--record", action="store_true", help="into docs/reliability.json")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(tempfile.mkdtemp(prefix="pemoe_jax-soak-"))
    tiny_runs.prepare(root)
    rows: list[tuple[float, ...]] = []
    start = time.monotonic()
    while time.monotonic() - start < 60 * args.minutes:
        if rows and rows[-1][1] > _MAX_MEMORY:
            print(f"stopped: more than {_MAX_MEMORY} MiB")
            break
        # Each cycle continues the same run by four steps.
        run_cycle(root, steps=4 * len(rows) + 4)
        rows.append(measure(start))
        print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    # The number of threads is recorded, but not limited.
    slopes = [compute_growth(rows, 1), compute_growth(rows, 2)]
    result = {"cycles": len(rows), "minutes": round(rows[-1][0], 1)}
    result |= {"MiB per cycle": round(slopes[0], 3), "files per cycle": round(slopes[1], 3) or 0.0}
    for name, column in (("MiB", 1), ("files", 2)):
        rest = [row[column] for row in rows[int(_WARM_UP * len(rows)) :]]
        result[name] = [round(min(rest)), round(max(rest))]
    (args.output / "soak.json").write_text(json.dumps({**result, "rows": rows}) + "\n")
    draw(rows, args.output / "soak.png")
    shutil.rmtree(root)
    if args.record:
        summary.record("soak", result)
    print(json.dumps(result))
    return int(any(slope > most for slope, most in zip(slopes, _MAX_GROWTH, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
