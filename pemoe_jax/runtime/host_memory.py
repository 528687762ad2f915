"""Makes programs on CPUs keep host memory between steps, and free it after compilation."""

import ctypes
import gc
import glob
import os
import sys
from collections.abc import MutableMapping

# Parameters of glibc's mallopt by their numbers in malloc.h, with the reasons in `configure`.
_MALLOPT = {
    -8: 1,  # M_ARENA_MAX
    -4: 0,  # M_MMAP_MAX: mmap is not used
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the heap is not trimmed
    -2: 64 * 2**20,  # M_TOP_PAD: bytes by which the heap grows beyond a request
}

# XLA splits a program into this many pieces, 32 by default, and compiles them in parallel. Pieces
# beyond the number of cores only take memory.
_CODEGEN_SPLIT_FLAG, _MAX_CODEGEN_SPLITS = "--xla_cpu_parallel_codegen_split_count", 32


def configure(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Configures XLA and glibc for steps on the CPU; must be called before jax is imported.

    Adds a flag to XLA_FLAGS in `environment`, unless the user has set it. A no-op outside of Linux,
    and on machines with accelerators, which have memory of their own.

    Returns:
      Whether freed memory is kept for reuse, which needs glibc.
    """
    if not sys.platform.startswith("linux") or accelerators():
        return False
    flags = environment.get("XLA_FLAGS", "")
    if _CODEGEN_SPLIT_FLAG not in flags:
        splits = min(_MAX_CODEGEN_SPLITS, len(os.sched_getaffinity(0)))
        environment["XLA_FLAGS"] = f"{flags} {_CODEGEN_SPLIT_FLAG}={splits}".strip()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # XLA allocates a program's temporaries, hundreds of MB, at each run. By default glibc maps
    # blocks of that size and then returns them to the system: a step of T5 v1.1 Small took 120,000
    # page faults, a seventh of its time. Without mmap the blocks stay in the heap. Only the main
    # arena can grow to that size, so all threads share it. (all() gets a list, to set every value.)
    return all([mallopt(parameter, value) for parameter, value in _MALLOPT.items()])


def disable_async_dispatch() -> None:
    """Runs CPU programs in the calling thread; must be called before jax initializes its devices.

    With asynchronous dispatch, a step frees its temporaries shortly after its results are ready. By
    then the next step has allocated its own, so the heap holds the temporaries of two or three
    steps. Accelerators are not affected.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def trim_heap() -> None:
    """Returns free memory to the system, for use after one-time work such as compilation."""
    gc.collect()  # tracing leaves reference cycles, which hold memory
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)


def accelerators() -> list[str]:
    """Returns the device files of the system's GPUs and TPUs."""
    return [*glob.glob("/dev/nvidia[0-9]*"), *glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/*")]
