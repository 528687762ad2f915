"""Kills trainings, resumes them, and compares their ends with uninterrupted ones, bit for bit.

    python tests/faults/kills.py [--each 6] [--methods mov lora …] [--record]

SIGKILL comes at a random moment, or right before a file in MODEL_DIR is written, renamed or
deleted. Then the same command resumes the run. In runs of two processes, one process is killed, or
suspended for 30 s.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import summary
import tiny_runs

SUSPENDED_SECONDS = 30
# Attempts per kill. A run may end before it is killed: it is compared, deleted and begun again.
_MARGIN = 3


def train(flags: Sequence[str]) -> int:
    """Trains in this process; returns the exit code."""
    from pemoe_jax import train as command

    return command.main(list(flags))


def read_end(run: pathlib.Path) -> dict[str, Any]:
    """Returns the parts of a run that must not depend on interruptions.

    They are the arrays of the last checkpoint, the position in the data, the losses, and the names
    of the files.
    """
    from etils import epath

    from pemoe_jax.checkpoints import runs, tensorstore_file

    step = runs.saved_steps(run)[-1]
    state = epath.Path(run / f"checkpoint_{step}" / "state")
    arrays = {}
    for item in ("params", "opt_state"):
        opened = tensorstore_file.open_orbax(state, item)
        arrays |= {f"{item}/{path}": array.read().tobytes() for path, array in opened.items()}
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    names = sorted(path.name for path in run.iterdir())
    return {
        "checkpoints": runs.saved_steps(run),
        "position": (run / f"checkpoint_{step}" / "feed" / "metadata").read_text(),
        "losses": [(row["step"], row["train/loss"]) for row in rows],
        "files": names,
        **arrays,
    }


def find_differences(whole: pathlib.Path, run: pathlib.Path) -> list[str]:
    """Returns a line for each part (see `read_end`) that differs between two runs."""
    expected, actual = read_end(whole), read_end(run)
    return [
        f"{name}: {expected.get(name)!r:.300} and {actual.get(name)!r:.300}"
        for name in expected | actual
        if expected.get(name) != actual.get(name)
    ]


def check_same_end(whole: pathlib.Path, run: pathlib.Path) -> None:
    """Raises RuntimeError, with the differences, unless two runs have the same end."""

    def compare() -> int:
        names = find_differences(whole, run)
        print("\n".join(names))
        return len(names) > 0

    # In a fork, because reading arrays starts JAX's threads, which would not survive later forks.
    ended = tiny_runs.run(compare, run.parent / "comparison")
    if ended.code:
        raise RuntimeError(f"{run} does not end as {whole}:\n{ended.output}")


def kill_at_file_event(flags: Sequence[str], run: pathlib.Path, number: int) -> tiny_runs.Ended:
    """Trains, and kills the process right before a file event, see `tiny_runs.watch`."""

    def on_event(count: int, event: str, path: str) -> None:
        if count == number:
            print(f"\nevent {count}: {event} {os.path.relpath(path, run)}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        tiny_runs.watch(run, on_event)
        return train(flags)

    return tiny_runs.run(work, run.parent / "log")


def kill_after(flags: Sequence[str], run: pathlib.Path, cpu_seconds: float) -> tiny_runs.Ended:
    """Trains, and kills the process when it has used `cpu_seconds`."""
    # CPU time depends less on other load of the machine than the clock.
    fork = tiny_runs.Fork(lambda: train(flags), run.parent / "log")
    deadline = time.monotonic() + tiny_runs.SECONDS
    while fork.cpu_seconds() < cpu_seconds and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(fork.pid, signal.SIGKILL)
    return fork.wait()


def count_events(flags: Sequence[str], run: pathlib.Path) -> tuple[int, float]:
    """Trains without interruption; returns the number of file events and the CPU seconds."""
    counter = run.parent / "events"

    def work() -> int:
        tiny_runs.watch(run, lambda count, *_: counter.write_text(str(count)))
        return train(flags)

    ended = tiny_runs.run(work, run.parent / "log")
    if ended.outcome != "finished":
        raise RuntimeError(ended.output)
    return int(counter.read_text()), ended.cpu_seconds


def run_method(root: pathlib.Path, method: str, num_kills: int) -> dict[str, int]:
    """Kills trainings of a method; returns the number of kills of each kind.

    Args:
      root: folder for all files.
      method: name of the method's gin file.
      num_kills: number of kills, half of them at random moments and half before file events.

    Raises:
      RuntimeError: a run printed a traceback, hung, or ended with other numbers.
    """
    rng = random.Random(f"0 {method}")
    whole, run = root / method / "whole" / "run", root / method / "killed" / "run"
    num_events, seconds = count_events(tiny_runs.train_flags(root, method, whole), whole)
    flags = tiny_runs.train_flags(root, method, run)
    kills = {"random moment": 0, "file event": 0}
    num_wanted = {"random moment": num_kills // 2, "file event": num_kills - num_kills // 2}
    for attempt in range(_MARGIN * num_kills):
        missing = [kind for kind in kills if kills[kind] < num_wanted[kind]]
        if not missing:
            break
        kind = missing[attempt % len(missing)]
        # Late moments are left out: a resumed run has less to do, and would often end before them.
        if kind == "random moment":
            ended = kill_after(flags, run, rng.uniform(0.3, 0.9) * seconds)
        else:
            ended = kill_at_file_event(flags, run, rng.randrange(1, num_events * 2 // 3))
        if ended.outcome == "killed":
            kills[kind] += 1
            last_line = (ended.output.rstrip().splitlines() or [""])[-1]
            print(
                f"{method}, {kind}, after {ended.cpu_seconds:.1f} s of CPU:", last_line, flush=True
            )
        elif ended.outcome == "finished":
            # Resumed runs find their programs in the cache, and take less time than the first run.
            seconds = min(seconds, ended.cpu_seconds)
            check_same_end(whole, run)
            shutil.rmtree(run)
        else:
            raise RuntimeError(f"{method}, {kind}: {ended.outcome}: {ended.output}")
    ended = tiny_runs.run(lambda: train(flags), run.parent / "log")
    if ended.outcome != "finished":
        raise RuntimeError(f"{method}: {ended.outcome}: {ended.output}")
    check_same_end(whole, run)
    return kills


# --- two processes ---


def start_two(flags: Sequence[str], folder: pathlib.Path) -> list[tiny_runs.Fork]:
    """Starts a training of two processes."""
    # The system chooses a free port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        tiny_runs.Fork(
            lambda: train(flags), folder / f"log_{number}", variables | {"JAX_PROCESS_ID": number}
        )
        for number in ("0", "1")
    ]


def wait_for_checkpoint(run: pathlib.Path, step: int) -> None:
    """Waits until a run has saved a step."""
    deadline = time.monotonic() + tiny_runs.SECONDS
    while not (run / f"checkpoint_{step}").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{run}: no checkpoint_{step}")
        time.sleep(0.05)


def run_two(root: pathlib.Path, method: str = "mov") -> dict[str, Any]:
    """Kills one of two processes, and in another run suspends it.

    Returns:
      For each run, the exit codes of both processes, and the seconds until both had ended.

    Raises:
      RuntimeError: a process hung or printed a traceback, or the run ended with other numbers.
    """
    steps = {"TRAIN_STEPS": 24, "PACK": False, "CHECKPOINT_PERIOD": 4, "KEEP_CHECKPOINTS": 20}

    def flags(run: pathlib.Path) -> list[str]:
        return tiny_runs.train_flags(root, method, run, **steps)

    def finish(run: pathlib.Path) -> None:
        for ended in [fork.wait() for fork in start_two(flags(run), run.parent)]:
            if ended.code != 0:
                raise RuntimeError(f"two processes: {ended.outcome}: {ended.output}")

    whole = root / "two" / "whole" / "run"
    finish(whole)
    results: dict[str, Any] = {}
    for name, signals in (("killed", ("SIGKILL",)), ("suspended", ("SIGSTOP", "SIGCONT"))):
        run = root / "two" / name / "run"
        both = start_two(flags(run), run.parent)
        wait_for_checkpoint(run, 8)
        for signal_name in signals:
            os.kill(both[1].pid, getattr(signal, signal_name))
            if signal_name == "SIGSTOP":
                time.sleep(SUSPENDED_SECONDS)
        start = time.monotonic()
        first, second = (fork.wait() for fork in both)
        results[name] = {"codes": [first.code, second.code]}
        print("two processes,", name, results[name], first.output[-600:], flush=True)
        results[name]["seconds"] = round(time.monotonic() - start)
        # JAX aborts a process that has lost the other one. Before that, our watchdog prints a line.
        ends_in_line = "error: this process was killed, or another process" in first.output
        if not (first.code == 0 or ends_in_line or first.outcome == "clear"):
            raise RuntimeError(f"two processes, {name}: {first.output}")
        finish(run)
        check_same_end(whole, run)
    return results


def main() -> int:
    """Runs the command; an exception shows a run that did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=6, help="kills of each method")
    parser.add_argument("--methods", nargs="*", default=tiny_runs.METHODS)
    parser.add_argument("--no_two", action="store_true", help="no runs of two processes")
    parser.add_argument("--record", action="store_true", help="into docs/reliability.json")
    args = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="pemoe_jax-kills-"))
    tiny_runs.prepare(root)
    results: dict[str, Any] = {}
    for method in args.methods:
        results[method] = run_method(root, method, args.each)
        print(method, results[method], flush=True)
        shutil.rmtree(root / method)
    if args.record and results:
        summary.record("kills", {"methods": results})
    if not args.no_two:
        result = run_two(root)
        print("two processes", result, flush=True)
        if args.record:
            summary.record("two processes", result)
    shutil.rmtree(root)
    print("all runs ended with the numbers of uninterrupted ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())
