"""Several processes as one run: on a TPU pod, under Slurm or Open MPI, or by hand."""

import atexit
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pemoe_jax.core.errors import InputError

COORDINATOR_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 30  # after as long without a sign of life of one, the others end

_OTHERS = (
    "another process of the run has ended or cannot be reached: start all of them again; the run"
    " goes on from its last checkpoint"
)
# What XLA says, in a JaxRuntimeError or a ValueError, where processes work together. Of other codes
# (RESOURCE_EXHAUSTED, INVALID_ARGUMENT, …) a process is guilty by itself.
_OF_OTHERS = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)


def initialize() -> None:
    """Joins the other processes of the run, where there are any; before any device is touched.

    A run has several processes where JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, under Slurm or Open MPI with several tasks, and on
    a TPU pod where PEMOE_DISTRIBUTED=1 (`launch/tpu_pod.sh` sets it). From then on only the first
    process prints to stdout; errors of each go to its stderr.

    Raises:
      InputError: some of the three variables are set, or one is no number.
    """
    arguments = _arguments(os.environ)
    if arguments is None or _is_one_of_several():  # a command called after another, say
        return
    _leave_last_words()
    import jax

    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it lives as long as the process


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """For `jax.distributed.initialize`; None: a process by itself."""
    given = {name: environment[name] for name in COORDINATOR_VARIABLES if environment.get(name)}
    if given:
        missing = [name for name in COORDINATOR_VARIABLES if name not in given]
        if missing:
            raise InputError(f"{next(iter(given))} is set: expected {missing[0]} beside it")
        count, number = (_number(name, given[name]) for name in COORDINATOR_VARIABLES[1:])
        if not 0 <= number < count:
            raise InputError(f"JAX_PROCESS_ID: expected 0 to {count - 1}, found {number}")
        return {
            "coordinator_address": given[COORDINATOR_VARIABLES[0]],
            "num_processes": count,
            "process_id": number,
        }
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("OMPI_COMM_WORLD_SIZE")
    if (tasks and int(tasks) > 1) or environment.get("PEMOE_DISTRIBUTED") == "1":
        return {}  # jax finds the rest in the same environment
    return None


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name}: expected a number, found {text!r}")
    return int(text)


def output_folder(folder: Path) -> Path:
    """Where this process writes what a run writes once: the folder, or one that is thrown away.

    All but the first process have the second.
    """
    import jax

    if jax.process_index() == 0:
        return folder
    elsewhere = Path(tempfile.mkdtemp(prefix="pemoe_jax-"))
    atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    return elsewhere


_last_words: list[int] = []  # of this process, if it is one of several: a pipe's end to write to


def _leave_last_words() -> None:
    """Has a line said if this process is ended from outside, or by JAX.

    JAX ends a process from a thread of its own, with signal SIGABRT and a stack trace, where its
    service says that another has gone. No code of ours runs then: a shell waits for it.
    """
    read, write = os.pipe()
    line = f"error: this process was killed, or {_OTHERS}"
    subprocess.Popen(
        ["sh", "-c", 'read -r ended || printf "%s\\n" "$0" >&2', line],
        stdin=read,
        stdout=subprocess.DEVNULL,
    )
    os.close(read)
    _last_words.append(write)
    atexit.register(_ends_by_itself)  # before those of jax, so called after them: they may fail


def _ends_by_itself() -> None:
    while _last_words:
        with contextlib.suppress(BrokenPipeError):  # a signal to the whole group: the shell is gone
            os.write(_last_words.pop(), b"\n")


def exit_process(code: int) -> int:
    """Ends a process of several at once, so that the others notice; one by itself returns."""
    if code and _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        _ends_by_itself()
        os._exit(code)  # else it would wait for the others, and they for it
    return code


def exit_on_error(error: BaseException) -> None:
    """Ends one of several processes at an error; one by itself returns.

    With one line where it tells that another has gone, else with a stack trace.
    """
    if not _is_one_of_several():
        return
    told = _told_of_others(error)
    if told is None:
        traceback.print_exception(error)
    else:
        print(f"error: {_OTHERS} ({told})", file=sys.stderr)
    exit_process(1)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _told_of_others(error: BaseException) -> str | None:
    """What XLA says of other processes in an error, or in what that came of; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (RuntimeError, ValueError)) and _OF_OTHERS.match(str(cause)):
            return str(cause).splitlines()[0][:200]
        cause = cause.__cause__ or cause.__context__
    return None
