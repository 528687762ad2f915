"""Writes `run.json`, which describes the command that fills an output folder, and how it ended.

Its `status` is 'running' from the start of the work, and stays so if the process is killed.
"""

import calendar
import contextlib
import hashlib
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError

if TYPE_CHECKING:
    from pemoe_jax.runtime.file_io import AnyPath

NAME = "run.json"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_MAX_EARLIER = 100
# Fields of earlier commands that are kept.
_EARLIER_FIELDS = ("status", "reason", "start", "end", "host", "process")

# This process's command: its folder, the content of `run.json`, and whether it replaced another.
_current: "tuple[AnyPath, dict[str, Any], bool] | None" = None


def begin(folder: "AnyPath", **facts: object) -> None:
    """Writes `run.json` for a command that starts to write to a folder.

    Its field `earlier` lists the last 100 commands that wrote to the folder before.

    Args:
      folder: the output folder.
      facts: further fields as JSON values: versions, devices, base, data, seed, …. They replace
        fields of the same name, such as `start`.
    """
    import gin

    from pemoe_jax.runtime import atomic_write, file_io

    global _current
    path = folder / NAME
    earlier: list[object] = []
    try:
        before = file_io.read_json(path)
        listed = before.get("earlier")
        earlier = [*(listed if isinstance(listed, list) else [])]
        earlier.append({name: before.get(name) for name in _EARLIER_FIELDS})
    except InputError:  # the first command, or a damaged file
        pass
    config = gin.config_str().encode()
    content = {
        "status": "running",
        "reason": None,
        "start": now(),
        "end": None,
        "seconds": None,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": sys.argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "config": hashlib.sha256(config).hexdigest()[:16],
        **facts,
        "earlier": earlier[-_MAX_EARLIER:],
    }
    _current = folder, content, path.exists()
    atomic_write.write_json(path, content)


def finish(status: str, reason: str, **facts: object) -> None:
    """Writes how the command ended; a no-op if it has not begun, or has finished.

    If the command failed before it wrote another file, `run.json` is deleted, unless it replaced
    that of an earlier command.

    Args:
      status: 'finished', 'stopped' (the same command resumes) or 'failed'.
      reason: one line.
      facts: further fields as JSON values.
    """
    global _current
    if _current is None:
        return
    # Imported here because they import numpy, which `--help` does not need.
    from pemoe_jax.runtime import atomic_write, file_io

    (folder, content, has_replaced), _current = _current, None
    # Errors are ignored: if the disk is full, the command has already reported it.
    with contextlib.suppress(OSError, InputError), file_io.remote_errors(folder):
        others = {path.name for path in folder.iterdir()} - {NAME, ".lock"}
        if status == "failed" and not others and not has_replaced:
            (folder / NAME).unlink()
            return
        start = calendar.timegm(time.strptime(content["start"], _TIME_FORMAT))
        seconds = int(time.time()) - start
        ended = {"status": status, "reason": reason, "end": now(), "seconds": seconds}
        atomic_write.write_json(folder / NAME, {**content, **ended, **facts})


def now() -> str:
    """Returns the current time in the format of the file: UTC, to the second."""
    return time.strftime(_TIME_FORMAT, time.gmtime())


def _commit() -> str | None:
    """Returns the commit of the package's clone, with '-dirty' if files differ.

    None if the package is not in a clone, or git fails.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
