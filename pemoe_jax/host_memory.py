"""Pages that a step has used are kept for the next one, where steps run on the CPU."""

import ctypes
import glob
import sys

# glibc's mallopt, malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 64 * 2**20


def keep() -> bool:
    """Has the C library keep freed memory, for the process's later use; before jax is imported.

    XLA asks for the temporaries of a program at each run, hundreds of MB, and as glibc comes they
    go back to the system each time: a step of T5 v1.1 Small then took 120,000 page faults and a
    seventh of its time for them. Blocks of that size are kept in the one heap that can grow, so
    all threads use it. Nothing is done where there are accelerators (their programs' memory is
    their own), or another C library.

    Returns:
      Whether it does.
    """
    if not sys.platform.startswith("linux") or accelerators():
        return False
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


def accelerators() -> list[str]:
    """Devices of GPUs and TPUs that the system has."""
    return [*glob.glob("/dev/nvidia[0-9]*"), *glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/*")]
