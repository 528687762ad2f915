"""Commands of the package as child processes that end with their parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# On Linux the kernel kills the child when its parent dies, even by SIGKILL (PR_SET_PDEATHSIG = 1),
# so that no training continues unseen. Elsewhere the inherited lock of the folder reveals it.
# `preexec_fn` could do the same but forks with JAX's threads running, which can deadlock.
_CHILD = """\
import ctypes, os, runpy, signal, sys
parent, module, *flags = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
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
    lock: int,
    on_tick: Callable[[], None] = lambda: None,
) -> int:
    """Runs `python -m module flags` to its end and appends its output to `log`.

    The first interrupt is passed to the child, which saves a checkpoint and ends; a second one
    kills it.

    Args:
      module: e.g. 'pemoe_jax.train'.
      flags: arguments of the module.
      log: output file; its folder is created.
      lock: file descriptor that the child inherits, see `folder_lock.hold`.
      on_tick: called about once a second.

    Returns:
      The exit code; negative if a signal ended the child.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(os.getpid()), module, *flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            # A terminal interrupts its whole process group; the child must get the signal once.
            process_group=0,
        )
        try:
            while True:
                try:
                    return child.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    on_tick()
        except KeyboardInterrupt:
            message = "\nstopping after the run has saved; interrupt again to stop at once"
            print(message, file=sys.stderr, flush=True)
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def last_line(log: Path) -> str:
    """Returns the last line of a log that is not blank; '' if there is none."""
    try:
        with log.open("rb") as file:
            # Only the end: progress lines make the logs of long runs large.
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def describe_exit(code: int, log: Path) -> str:
    """Returns an exit code in words, with the error at the end of the log."""
    if code < 0:
        name = signal.Signals(-code).name
        # The kernel's out-of-memory killer sends SIGKILL and leaves no message in the log.
        hint = ", often for lack of memory" if code == -signal.SIGKILL else ""
        return f"ended by {name}{hint}"
    return f"exit code {code}: {last_line(log)}"
