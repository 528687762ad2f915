"""`run.json` of an output folder: describes the command that wrote it and how the command ended.

Its status is 'running' from the start of the work, and so stays 'running' after a kill.
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
_MAX_EARLIER = 100
_SUMMARY = ("status", "reason", "start", "end", "host", "process")  # of earlier commands

# The folder of this process's command, the content of its file, and whether it replaced a file.
_current: "tuple[AnyPath, dict[str, Any], bool] | None" = None


def begin(folder: "AnyPath", **facts: object) -> None:
    """Writes the file of a command that starts to write to a folder.

    The file lists the last 100 commands that wrote to the folder before under `earlier`.

    Args:
      folder: the output folder.
      facts: further JSON values: versions, devices, base, data, seed, …. They replace those of
        the same name, such as the time of the `start`.
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
        earlier.append({name: before.get(name) for name in _SUMMARY})
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

    A command that failed before it wrote anything else leaves no file.

    Args:
      status: 'finished', 'stopped' (the same command resumes) or 'failed'.
      reason: one line.
      facts: further JSON values.
    """
    global _current
    if _current is None:
        return
    from pemoe_jax.runtime import atomic_write, file_io  # import numpy, which --help does without

    (folder, content, has_replaced), _current = _current, None
    # On a full disk the command has already ended with that error.
    with contextlib.suppress(OSError, InputError), file_io.remote_errors(folder):
        others = {path.name for path in folder.iterdir()} - {NAME, ".lock"}
        if status == "failed" and not others and not has_replaced:
            (folder / NAME).unlink()
            return
        seconds = calendar.timegm(time.gmtime()) - calendar.timegm(
            time.strptime(content["start"], _FORMAT)
        )
        ended = {"status": status, "reason": reason, "end": now(), "seconds": seconds}
        atomic_write.write_json(folder / NAME, {**content, **ended, **facts})


_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def now() -> str:
    """Returns the time as the file has it: UTC, to the second."""
    return time.strftime(_FORMAT, time.gmtime())


def _commit() -> str | None:
    """Returns the commit of the package's clone, with '-dirty' if files differ; None: no clone."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
