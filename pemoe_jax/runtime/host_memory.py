"""Host memory of programs on the CPU: reused between steps, freed after compilation."""

import ctypes
import gc
import glob
import os
import sys
from collections.abc import MutableMapping

# Parameters of glibc's mallopt, by their numbers in malloc.h: M_ARENA_MAX, M_MMAP_MAX,
# M_TRIM_THRESHOLD and M_TOP_PAD (64 MiB).
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 64 * 2**20}

# XLA splits a module into this many pieces to compile in parallel, 32 by default. Pieces beyond the
# number of cores only take memory.
_CODEGEN_SPLIT_FLAG, _MAX_CODEGEN_SPLITS = "--xla_cpu_parallel_codegen_split_count", 32


def configure(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Configures XLA and glibc for steps on the CPU; must be called before jax is imported.

    Extends XLA_FLAGS in `environment`, except for flags that the user set. A no-op on machines with
    accelerators, which have memory of their own. Returns whether freed memory is kept for reuse,
    which needs glibc.
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
    # blocks of that size and returns them to the system: a step of T5 v1.1 Small took 120,000 page
    # faults, a seventh of its time. Without mmap the blocks stay in the heap; only the main arena
    # can grow to that size, so all threads share it.
    return all([mallopt(parameter, value) for parameter, value in _MALLOPT.items()])


def disable_async_dispatch() -> None:
    """Runs CPU programs in the calling thread; must be called before jax initializes its devices.

    With asynchronous dispatch a step frees its temporaries shortly after its results are ready,
    when the next step has allocated its own: the heap then holds the temporaries of two or three
    steps. Accelerators are not affected.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def trim_heap() -> None:
    """Returns free memory to the system, for use after one-time work such as compilation."""
    gc.collect()  # tracing leaves reference cycles
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc alone has it
        trim(0)


def accelerators() -> list[str]:
    """Returns the device files of the system's GPUs and TPUs."""
    return [*glob.glob("/dev/nvidia[0-9]*"), *glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/*")]
