"""Commands on a full or read-only disk, and in a folder that another command writes to.

    python tests/faults/disk_faults.py [--writes 100] [--growth 1.4] [--record]

Each command must end with exit code 1 and one line. If a checkpoint could not be saved, the line
names the one to resume from. The same command, on a disk with space, must end with the numbers of
an uninterrupted run.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import kills
import summary
import tiny_runs

_FIRST_SIZE = 8  # KiB of the disk in the first attempt


def evaluate(flags: Sequence[str]) -> int:
    """Evaluates in this process; returns the exit code."""
    from pemoe_jax import evaluate as command

    return command.main(list(flags))


@contextlib.contextmanager
def disk(folder: pathlib.Path) -> Iterator[Callable[[str], None] | None]:
    """Mounts a small disk; yields a function that mounts it again with other options.

    Yields None where mounting is not permitted.
    """
    folder.mkdir(parents=True)

    # A tmpfs has any size, and can be mounted again with another one while it is in use.
    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

    try:
        mount(f"size={_FIRST_SIZE}k")
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def check(ended: tiny_runs.Ended, what: str, run: pathlib.Path | None = None) -> str:
    """Returns the error line of a command that must have failed in one line.

    Args:
      ended: how the command ended.
      what: the fault, for errors.
      run: the run's folder, to check what the command left there.

    Raises:
      RuntimeError: the command ended in another way; its line about a failed save does not name
        the checkpoint to resume from; or it left an unfinished file.
    """
    if ended.outcome != "clear":
        raise RuntimeError(f"{what}: {ended.outcome}: {ended.output}")
    line = ended.output.rstrip().splitlines()[-1]
    if run is not None and run.is_dir():
        names = [path.name for path in run.iterdir()]
        left = [name for name in names if re.search(r"tmp|deleted|^\.(?!lock)|\.part$", name)]
        matches = [re.fullmatch(r"checkpoint_(\d+)", name) for name in names]
        steps = sorted(int(match[1]) for match in matches if match)
        # A checkpoint that the line names as not saved does not count, even if its folder exists.
        saved = [step for step in steps if f"checkpoint_{step} could not be saved" not in line]
        advice = f"resume from checkpoint_{saved[-1]}" if saved else "there is no checkpoint yet"
        if left or ("could not be saved" in line and not line.endswith(advice)):
            raise RuntimeError(f"{what}: left {left}, saved {steps}: {line}")
    return line


def fail_at(
    command: Callable[[Sequence[str]], int],
    flags: Sequence[str],
    folder: pathlib.Path,
    number: int,
    code: int,
) -> tiny_runs.Ended:
    """Runs a command in which each write to a folder fails, from the event `number` on.

    Args:
      command: returns the exit code.
      flags: flags of the command.
      folder: the folder.
      number: number of the event, as `tiny_runs.watch` counts them.
      code: the error of the system, such as `errno.ENOSPC`.
    """

    def on_event(count: int, event: str, path: str) -> None:
        if count >= number and event in ("open", "os.mkdir"):
            raise OSError(code, os.strerror(code), path)

    def work() -> int:
        tiny_runs.watch(folder, on_event)
        return command(flags)

    return tiny_runs.run(work, folder.parent / "log")


def list_events(
    command: Callable[[Sequence[str]], int], flags: Sequence[str], folder: pathlib.Path
) -> list[int]:
    """Runs a command; returns the number of the first write to each kind of file.

    Files are of one kind if their paths differ only in digits.
    """
    # Written to a file, because the command runs in another process.
    journal = folder.parent / "events"

    def on_event(count: int, event: str, path: str) -> None:
        if event in ("open", "os.mkdir"):
            kind = re.sub(r"\d+", "#", path[len(str(folder)) :])
            with journal.open("a") as file:
                file.write(f"{count} {event} {kind}\n")

    def work() -> int:
        tiny_runs.watch(folder, on_event)
        return command(flags)

    ended = tiny_runs.run(work, folder.parent / "log")
    if ended.outcome != "finished":
        raise RuntimeError(ended.output)
    # One write of each kind of file is enough: checkpoints, for example, are all written alike.
    first: dict[str, int] = {}
    for line in journal.read_text().splitlines():
        number, _, kind = line.partition(" ")
        first.setdefault(kind, int(number))
    return sorted(first.values())


def fill_disk(root: pathlib.Path, whole: pathlib.Path, growth: float) -> int:
    """Trains on a disk that grows by the factor `growth` whenever it is full.

    Returns:
      How often it was full.
    """
    folder = root / "disk"
    with disk(folder) as remount:
        if remount is None:
            return 0
        run, size = folder / "run", float(_FIRST_SIZE)
        flags = tiny_runs.train_flags(root, "mov", run)
        for count in range(40):
            ended = tiny_runs.run(lambda: kills.train(flags), root / "log")
            if ended.outcome == "finished":
                kills.check_same_end(whole, run)
                return count
            print(f"{size:.0f} KiB:", check(ended, f"disk of {size:.0f} KiB", run), flush=True)
            size *= growth
            remount(f"size={size:.0f}k")
    raise RuntimeError("the run did not finish")


def read_only(root: pathlib.Path, whole: pathlib.Path) -> int:
    """Trains and evaluates in a read-only folder; returns the number of commands, 0 if it cannot.

    The folder is on a disk that is mounted read-only. Without the permission to mount one, its
    permissions are removed.
    """
    folder = root / "read_only"
    with disk(folder) as remount:
        if remount is not None:
            remount("size=100m")
        run = folder / "run"
        shutil.copytree(whole, run)
        resumed = tiny_runs.train_flags(root, "mov", run, TRAIN_STEPS=10)
        new = tiny_runs.train_flags(root, "mov", folder / "new" / "run")
        scored = tiny_runs.evaluate_flags(root, whole, folder / "scores")
        if remount is not None:
            remount("ro")
        elif os.geteuid():  # the superuser may write in spite of permissions
            for path in (folder, *folder.rglob("*")):
                path.chmod(path.stat().st_mode & ~0o222)
        else:
            return 0
        for command, flags in ((kills.train, resumed), (kills.train, new), (evaluate, scored)):
            line = check(tiny_runs.run(lambda: command(flags), root / "log"), "read-only")  # noqa: B023
            print("read-only:", line, flush=True)
        for path in (folder, *folder.rglob("*")) if remount is None else ():
            path.chmod(path.stat().st_mode | 0o200)
    return 3


def locked(root: pathlib.Path, whole: pathlib.Path) -> int:
    """Trains and evaluates in a locked folder, as if another command wrote to it.

    Returns:
      The number of commands.
    """
    from pemoe_jax.runtime import folder_lock

    folder = root / "locked"
    folder.mkdir()
    folder_lock.TIMEOUT = 0.0  # a command would wait for the lock
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for command, flags in (
            (kills.train, tiny_runs.train_flags(root, "mov", folder)),
            (evaluate, tiny_runs.evaluate_flags(root, whole, folder)),
        ):
            ended = tiny_runs.run(lambda: command(flags), root / "log")  # noqa: B023
            print("locked:", check(ended, "locked", folder), flush=True)
    return 2


def run_all(root: pathlib.Path, num_writes: int, growth: float) -> dict[str, int]:
    """Runs all faults; returns the number of commands that failed as they must, by fault.

    Args:
      root: folder for all files.
      num_writes: number of failing writes to try for each command, each in a run of its own.
      growth: factor by which the disk that fills grows after each failure.
    """
    rng = random.Random(0)

    def sample(numbers: list[int]) -> list[int]:
        return sorted(rng.sample(numbers, min(num_writes, len(numbers))))

    whole = root / "whole" / "run"
    whole_flags = tiny_runs.train_flags(root, "mov", whole)
    numbers = sample(list_events(kills.train, whole_flags, whole))
    counts = {"locked": locked(root, whole), "read-only": read_only(root, whole)}
    counts["a disk that fills"] = fill_disk(root, whole, growth)
    run = root / "full" / "run"
    flags = tiny_runs.train_flags(root, "mov", run)
    counts["a write fails"] = 0
    for number in numbers:
        ended = fail_at(kills.train, flags, run, number, errno.ENOSPC)
        print(f"write {number}:", check(ended, f"write {number}", run), flush=True)
        counts["a write fails"] += 1
        # At the end, the run continues without a fault.
        if number == numbers[-1]:
            tiny_runs.run(lambda: kills.train(flags), root / "log")
            kills.check_same_end(whole, run)
        shutil.rmtree(run, ignore_errors=True)
    scores = root / "scored" / "scores"
    flags = tiny_runs.evaluate_flags(root, whole, scores)
    for number in sample(list_events(evaluate, flags, scores)):
        shutil.rmtree(scores, ignore_errors=True)
        ended = fail_at(evaluate, flags, scores, number, errno.ENOSPC)
        print(f"evaluation, write {number}:", check(ended, f"write {number}", scores), flush=True)
        counts["a write fails"] += 1
    return counts


def main() -> int:
    """Runs the command; an exception shows a command that did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--writes", type=int, default=100, help="failing writes per command")
    parser.add_argument("--growth", type=float, default=1.4, help="of the disk, per failure")
    parser.add_argument("--record", action="store_true", help="into docs/reliability.json")
    args = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp(prefix="pemoe_jax-disk-"))
    tiny_runs.prepare(root)
    faults = run_all(root, args.writes, args.growth)
    print(faults)
    if args.record:
        summary.record("disks", {"faults": faults})
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
