"""Memory of programs that run on the CPU: kept between steps, and no more of it than needed."""

import ctypes
import gc
import glob
import os
import sys
from collections.abc import MutableMapping

# glibc's mallopt, malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 64 * 2**20

# Pieces that code is made of side by side: those beyond the cores only take memory.
_PIECES, _MOST_PIECES = "--xla_cpu_parallel_codegen_split_count", 32


def configure(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Has freed memory kept for later, and programs compiled in less; before jax is imported.

    XLA asks for the temporaries of a program at each run, hundreds of MB, and as glibc comes they
    go back to the system each time: a step of T5 v1.1 Small then took 120,000 page faults and a
    seventh of its time for them. Blocks of that size are kept in the one heap that can grow, so
    all threads use it. Nothing is done where there are accelerators (their programs' memory is
    their own), nor to memory where there is another C library.

    Args:
      environment: XLA_FLAGS are added to; what they say already counts.

    Returns:
      Whether freed memory is kept.
    """
    if not sys.platform.startswith("linux") or accelerators():
        return False
    flags = environment.get("XLA_FLAGS", "")
    if _PIECES not in flags:
        pieces = min(_MOST_PIECES, len(os.sched_getaffinity(0)))
        environment["XLA_FLAGS"] = f"{flags} {_PIECES}={pieces}".strip()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_ARENA_MAX, 1),
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, 2**31 - 1),
        (_TOP_PAD, _TOP_PAD_BYTES),
    )
    return all([mallopt(*setting) for setting in settings])


def disable_async_dispatch() -> None:
    """Has a program of the CPU run in the thread that calls it; before jax has its devices.

    In a thread of its own, as it comes, a step gives its temporaries back a moment after its
    results are there, when the next has asked for as much again: the heap then held two or three
    times the temporaries of a step. Nothing changes for accelerators.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def trim_heap() -> None:
    """What is free goes back to the system now: after what is done once, as compilation."""
    gc.collect()  # what traced a program hangs together in cycles
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def accelerators() -> list[str]:
    """Devices of GPUs and TPUs that the system has."""
    return [*glob.glob("/dev/nvidia[0-9]*"), *glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/*")]
