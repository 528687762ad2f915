"""Several processes as one run: on a TPU pod, under Slurm or Open MPI, or by hand."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pemoe_jax.core.errors import InputError

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 30  # after as long without a sign of life of one, the others end


def start() -> None:
    """Joins the other processes of the run, where there are any; before any device is touched.

    A run has several processes where JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say so, under Slurm or Open MPI with several tasks, and on
    a TPU pod where PEMOE_DISTRIBUTED=1 (`launch/tpu_pod.sh` sets it). From then on only the first
    process prints to stdout; errors of each go to its stderr.

    Raises:
      InputError: some of the three variables are set, or one is no number.
    """
    arguments = _arguments(os.environ)
    if arguments is None:
        return
    import jax

    jax.distributed.initialize(
        **arguments,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it lives as long as the process


def _arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """For `jax.distributed.initialize`; None: a process by itself."""
    given = {name: environment[name] for name in BY_HAND if environment.get(name)}
    if given:
        missing = [name for name in BY_HAND if name not in given]
        if missing:
            raise InputError(f"{next(iter(given))} is set: expected {missing[0]} beside it")
        count, number = (_number(name, given[name]) for name in BY_HAND[1:])
        if not 0 <= number < count:
            raise InputError(f"JAX_PROCESS_ID: expected 0 to {count - 1}, found {number}")
        return {
            "coordinator_address": given[BY_HAND[0]],
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


def folder_to_write(folder: Path) -> Path:
    """Where this process writes what a run writes once: the folder, or one that is thrown away.

    All but the first process have the second.
    """
    import jax

    if jax.process_index() == 0:
        return folder
    elsewhere = Path(tempfile.mkdtemp(prefix="pemoe_jax-"))
    atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    return elsewhere


def end(code: int) -> int:
    """Ends a process of several at once, so that the others notice; one by itself returns."""
    jax = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # else it would wait for the others, and they for it
    return code


def told_of_others(error: BaseException) -> str | None:
    """One line where an error says that another process has gone; else None."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return None
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    return (
        "another process of the run has ended or cannot be reached: start all of them again; the"
        f" run goes on from its last checkpoint ({str(error).splitlines()[0][:200]})"
    )
