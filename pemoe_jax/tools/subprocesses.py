"""Runs commands of the package as child processes, which on Linux end with their parent."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# The program of a child. On Linux it asks the kernel to kill it when its parent dies, even by
# SIGKILL (PR_SET_PDEATHSIG = 1), so that no training continues unseen. Elsewhere a child may
# outlive its parent. It then still holds the folder's lock, so the next command there fails.
# `preexec_fn` of `Popen` could do the same, but runs Python in a fork of a process with JAX's
# threads, which can deadlock.
_CHILD = """\
import ctypes, os, runpy, signal, sys
parent, cores, module, *flags = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent died before the call above
        sys.exit(1)
    if cores:  # XLA, TensorFlow and NumPy start a thread for each core that they may use
        os.sched_setaffinity(0, map(int, cores.split(",")))
sys.argv = [module, *flags]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def end_children() -> Iterator[list[subprocess.Popen]]:
    """Yields a list to which the caller adds children; at the end of the block, none is left.

    Children that still run at the end are killed. The first interrupt is passed to the children,
    which save checkpoints and end; a second one kills them.
    """
    children: list[subprocess.Popen] = []
    try:
        yield children
    except KeyboardInterrupt:
        message = "\nstopping after the runs have saved; interrupt again to stop at once"
        print(message, file=sys.stderr, flush=True)
        for child in children:
            child.send_signal(signal.SIGINT)
        for child in children:
            child.wait()
        raise
    finally:
        for child in children:
            child.kill()
            child.wait()


def start_module(
    module: str, flags: Sequence[str], log: Path, lock: int, cores: Sequence[int] = ()
) -> subprocess.Popen:
    """Starts `python -m module flags` as a child, and appends its output to `log`.

    Args:
      module: e.g. 'pemoe_jax.train'.
      flags: arguments of the module.
      log: output file; its folder is created.
      lock: file descriptor that the child inherits, see `folder_lock.hold`.
      cores: CPUs that the child may use (on Linux); empty: all.
    """
    command = [sys.executable, "-c", _CHILD, str(os.getpid()), ",".join(map(str, cores)), module]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            # A terminal interrupts its whole process group, and `end_children` passes the signal
            # on. In a group of its own, the child gets it only once.
            process_group=0,
        )


def last_line(log: Path) -> str:
    """Returns the last non-blank line of a log; '' if there is none."""
    try:
        with log.open("rb") as file:
            # Only the end is read: progress lines make the logs of long runs large.
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def describe_exit(code: int, log: Path) -> str:
    """Describes an exit code that is not 0, with the last line of the log, which has the error."""
    if code < 0:
        name = signal.Signals(-code).name
        # The kernel's out-of-memory killer sends SIGKILL and leaves no message in the log.
        hint = ", often for lack of memory" if code == -signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    line = last_line(log)
    return f"exit code {code}: {line}" if line else f"exit code {code}"


def split_cores(jobs: int) -> list[list[int]]:
    """Divides the CPUs among `jobs` processes that run at the same time.

    Returns:
      The CPUs of each process; empty if it may use all of them.
    """
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):  # only on Linux
        return [[] for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    # With more processes than cores, several share a core.
    return [cores[job::jobs] or [cores[job % len(cores)]] for job in range(jobs)]
