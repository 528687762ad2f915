"""Compiled programs, kept from one process to the next by JAX's persistent compilation cache."""

import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

CACHE_DIR_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MAX_AGE_DAYS = 30


def enable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Turns the cache on by JAX's own variables; to be called before jax is imported.

    JAX_COMPILATION_CACHE_DIR names another folder or, set to nothing, turns it off. A folder that
    cannot be written to is told of on stderr, and nothing is kept. JAX's key of a program has its
    version and the processor's instructions in it, so different machines may share a home.

    Args:
      environment: is changed.
    """
    if CACHE_DIR_VARIABLE not in environment:
        try:
            folder = default_folder(environment)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it will be run
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} cannot be written to")
            _forget_old(folder)
        except (OSError, RuntimeError) as error:
            print(
                f"warning: compiled programs are not kept: {error}"
                f" ({CACHE_DIR_VARIABLE} names another folder; empty, it ends this warning)",
                file=sys.stderr,
            )
            return
        environment[CACHE_DIR_VARIABLE] = str(folder)
    if environment[CACHE_DIR_VARIABLE]:
        # jax keeps what took a second; dozens of small programs take longer than that together
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def default_folder(environment: Mapping[str, str]) -> Path:
    """Below the user's folder of caches; RuntimeError where there is no home."""
    given = environment.get("XDG_CACHE_HOME", "")  # its standard: a relative one does not count
    caches = Path(given) if os.path.isabs(given) else Path("~/.cache").expanduser()
    return caches / "pemoe_jax" / "compiled"


def _forget_old(folder: Path) -> None:
    """Deletes what has not been read for a month: each version and setting leaves its own."""
    oldest = time.time() - MAX_AGE_DAYS * 24 * 3600
    for file in folder.glob("*-cache"):
        try:
            found = file.stat()
            if max(found.st_atime, found.st_mtime) < oldest:
                file.unlink()
        except FileNotFoundError:  # another process has done it
            continue
