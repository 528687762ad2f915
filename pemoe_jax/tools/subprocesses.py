"""A command of ours in a process of its own, which ends with the process that started it."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from pemoe_jax.core.errors import InputError

# Linux ends the child with its parent (PR_SET_PDEATHSIG = 1), however that one ended, so that no
# training goes on unseen. Elsewhere the folder's lock, which children hold too, tells of it.
# A shell's background jobs ignore the interrupt, and hand that on.
_CHILD = """\
import ctypes, os, runpy, signal, sys
parent, module, *flags = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)
sys.argv = [module, *flags]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_module(
    module: str,
    flags: Sequence[str],
    log: Path,
    held: int,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Runs `python -m module flags` to its end, what it prints appended to `log`.

    An interrupt of this process is handed on once, and the child's end waited for, so that it can
    save what it has; a second one ends it.

    Args:
      module: e.g. 'pemoe_jax.train'.
      flags: its arguments.
      log: a file; its folder is made.
      held: a file descriptor that the child keeps open, that of a lock.
      tick: called about once a second.

    Returns:
      The exit code, negative where a signal ended it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(os.getpid()), module, *flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(held,),
            process_group=0,  # a terminal's interrupt would reach it beside ours
        )
        try:
            while True:
                try:
                    return child.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    tick()
        except KeyboardInterrupt:
            print("\nstopping when the run has saved; again: at once", file=sys.stderr, flush=True)
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


@contextlib.contextmanager
def exclusive_lock(folder: Path, patience: float = 15.0) -> Iterator[int]:
    """Holds a lock on a folder, which is made; gives its file descriptor.

    Args:
      folder: whose `.lock` it is.
      patience: seconds to wait for it: children of what was killed need some to end.

    Raises:
      InputError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        start = time.monotonic()
        while not _lock(file):
            if time.monotonic() - start > patience:
                raise InputError(f"{folder}: another sweep, or a run of one, is at work there")
            time.sleep(0.2)
        yield file.fileno()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_line(log: Path) -> str:
    """What a log ends with, '' where there is nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def describe_exit(code: int, log: Path) -> str:
    """An exit code in words, with the error that the log ends with."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", often for want of memory" if code == -signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    return f"exit {code}: {last_line(log)}"
