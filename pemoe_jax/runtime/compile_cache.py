"""JAX's persistent compilation cache, shared by all runs of a user."""

import os
import sys
import time
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path

CACHE_DIR_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MAX_AGE_DAYS = 30


def enable(environment: MutableMapping[str, str] = os.environ) -> None:
    """Turns the cache on by JAX's variables in `environment`; call it before jax is imported.

    JAX_COMPILATION_CACHE_DIR selects another folder than the default one; if it is empty, the cache
    stays off. If the default folder is not writable, a warning is printed and nothing is cached.
    JAX's cache keys include its version and the CPU's features, so different machines can share a
    home directory. Several processes may fill the folder at the same time.
    """
    if CACHE_DIR_VARIABLE not in environment:
        try:
            folder = default_folder(environment)
            # Private, because jax runs the code in it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is not writable")
            _delete_old_programs(folder)
        except (OSError, RuntimeError) as error:
            print(
                f"warning: compiled programs are not cached: {error}"
                f" ({CACHE_DIR_VARIABLE} selects another folder; an empty value silences this)",
                file=sys.stderr,
            )
            return
        environment[CACHE_DIR_VARIABLE] = str(folder)
    if environment[CACHE_DIR_VARIABLE]:
        # By default jax caches only programs that take over a second to compile. A start also
        # compiles dozens of small ones, which together take longer.
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        # JAX does not write its files atomically, so a file that another process is writing may be
        # incomplete. JAX then warns and compiles the program: there is nothing for the user to do.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")


def enable_in_process() -> None:
    """Turns the cache on even if jax is imported; a no-op if a cache is configured already."""
    if "jax" not in sys.modules:
        enable()
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    configured: str | None = getattr(jax.config, "jax_compilation_cache_dir", None)
    if CACHE_DIR_VARIABLE in os.environ or configured is not None:
        return
    environment = dict(os.environ)
    enable(environment)
    if folder := environment.get(CACHE_DIR_VARIABLE):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        # jax looks for the folder only at its first compilation, which may be over.
        compilation_cache.reset_cache()


def default_folder(environment: Mapping[str, str]) -> Path:
    """Returns `pemoe_jax/compiled` in the user's cache folder.

    Raises:
      RuntimeError: the user has no home directory.
    """
    xdg = environment.get("XDG_CACHE_HOME", "")  # the XDG standard ignores relative paths
    caches = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache").expanduser()
    return caches / "pemoe_jax" / "compiled"


def _delete_old_programs(folder: Path) -> None:
    # JAX can limit the size of its cache but not the age of files. Each version of a program adds a
    # file. Files that no run has read for `MAX_AGE_DAYS` belong to old versions.
    oldest = time.time() - MAX_AGE_DAYS * 24 * 3600
    for file in folder.glob("*-cache"):
        try:
            stat = file.stat()
            if max(stat.st_atime, stat.st_mtime) < oldest:
                file.unlink()
        except FileNotFoundError:  # deleted by another process
            continue
