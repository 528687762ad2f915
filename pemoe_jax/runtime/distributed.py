"""Several processes as one run: on a TPU pod, under Slurm or Open MPI, or started by hand."""

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
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError

if TYPE_CHECKING:
    import jax

    from pemoe_jax.core.partitioning import MeshConfig, Rules
    from pemoe_jax.runtime.file_io import AnyPath

COORDINATOR_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 30  # if a process is silent for longer, the run ends

_PEER_FAILED = (
    "another process of the run has ended or cannot be reached: start all of them again; the run"
    " resumes from its last checkpoint"
)
# Status codes of XLA's errors that another process causes. Errors with other codes
# (RESOURCE_EXHAUSTED, INVALID_ARGUMENT, …) come from this process, and their stack trace is needed.
_PEER_ERROR = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)


def initialize() -> None:
    """Joins the other processes of the run; a no-op for a single process.

    A run has several processes if JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, under Slurm or Open MPI with several tasks, and on
    a TPU pod with PEMOE_DISTRIBUTED=1 (set by `launch/tpu_pod.sh`). This function must be called
    before jax looks for devices. Afterwards only process 0 prints to stdout; every process prints
    its errors to stderr.

    Raises:
      InputError: only some of the three variables are set, or one is not a number in its range.
    """
    arguments = _jax_arguments(os.environ)
    if arguments is None or _is_initialized():  # one process may run several commands
        return
    _report_if_killed()
    import jax

    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if jax.process_index():
        # Never closed, because everything that is printed later goes to it.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def start(
    config: "MeshConfig", batch_size: int, microbatches: int = 1
) -> "tuple[jax.sharding.Mesh, Rules]":
    """Joins the processes of the run -> (mesh of all their devices, sharding rules).

    Raises:
      InputError: a setting is wrong, or the batch does not divide into the devices' microbatches.
    """
    initialize()
    from pemoe_jax.core import partitioning

    mesh = config.make_mesh()
    partitioning.check_batch_size(batch_size, mesh, microbatches)
    partitioning.connect_processes(mesh)
    return mesh, config.axis_rules()


def _jax_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a single process."""
    # Read here, because jax reads only JAX_COORDINATOR_ADDRESS.
    variables = {name: environment[name] for name in COORDINATOR_VARIABLES if environment.get(name)}
    if variables:
        for name in COORDINATOR_VARIABLES:
            if name not in variables:
                raise InputError(
                    f"{name} is not set, but {next(iter(variables))} is: set all of"
                    f" {', '.join(COORDINATOR_VARIABLES)}"
                )
            if name != "JAX_COORDINATOR_ADDRESS" and not variables[name].isdecimal():
                raise InputError(f"{name} must be a non-negative integer, got {variables[name]!r}")
        address, *numbers = (variables[name] for name in COORDINATOR_VARIABLES)
        count, index = map(int, numbers)
        if count < 1:
            raise InputError(f"JAX_NUM_PROCESSES must be at least 1, got {count}")
        if index >= count:
            raise InputError(f"JAX_PROCESS_ID must be between 0 and {count - 1}, got {index}")
        return {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
        }
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("OMPI_COMM_WORLD_SIZE")
    if (tasks and int(tasks) > 1) or environment.get("PEMOE_DISTRIBUTED") == "1":
        return {}  # jax detects the cluster from the same environment
    return None


def output_folder(folder: "AnyPath") -> "AnyPath":
    """Returns `folder` in process 0, which alone writes to it; in others a temporary folder."""
    import jax

    if jax.process_index() == 0:
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="pemoe_jax-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


_watchdog_pipes: list[int] = []  # write end of the pipe to this process's watchdog, if it has one


def _report_if_killed() -> None:
    """Prints an error line to stderr if this process is killed, by the system or by JAX.

    When another process is lost, JAX prints a stack trace and aborts this one (SIGABRT) from a C++
    thread. jax 0.10 has no callback for this, and no Python code runs any more. So a child process,
    the watchdog, prints the error when its pipe from this process closes. If this process ends by
    itself, it first writes a line to the pipe, and the watchdog prints nothing.
    """
    read_end, write_end = os.pipe()
    line = f"error: this process was killed, or {_PEER_FAILED}"
    subprocess.Popen(
        ["sh", "-c", 'read -r ended || printf "%s\\n" "$0" >&2', line],
        stdin=read_end,
        stdout=subprocess.DEVNULL,
    )
    os.close(read_end)
    _watchdog_pipes.append(write_end)
    # Called after jax's own functions at exit, because it is registered before them: they may abort
    # the process too.
    atexit.register(_dismiss_watchdog)


def _dismiss_watchdog() -> None:
    while _watchdog_pipes:
        # The watchdog may be gone: signals to a process group, such as Ctrl-C, reach it as well.
        with contextlib.suppress(BrokenPipeError):
            os.write(_watchdog_pipes.pop(), b"\n")


def exit_process(code: int) -> int:
    """Ends one of several processes at once if `code` is not 0; otherwise returns `code`.

    At a normal exit, this process would wait for the others at jax's shutdown barrier, and they
    would wait for this one in a collective operation.
    """
    if code and _is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        _dismiss_watchdog()
        os._exit(code)
    return code


def exit_on_error(error: BaseException) -> None:
    """Ends one of several processes after an error; a no-op in a single process.

    Prints one line if another process caused the error, else a stack trace.
    """
    if _is_initialized():
        if message := peer_error_message(error):
            print(f"error: {_PEER_FAILED} ({message})", file=sys.stderr)
        else:
            traceback.print_exception(error)
        exit_process(1)


def _is_initialized() -> bool:
    # jax is not imported here: a command that has not used it would wait for the import.
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def peer_error_message(error: BaseException) -> str | None:
    """Returns XLA's message if another process caused the error or one of its causes, else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (RuntimeError, ValueError)) and _PEER_ERROR.match(str(cause)):
            return str(cause).splitlines()[0][:200]
        cause = cause.__cause__ or cause.__context__
    return None
