"""Locks of output folders: two commands that write into the same folder would lose results."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from pemoe_jax.core.errors import InputError

# What flock reports on file systems without locks, such as some of clusters.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

TIMEOUT = 15.0  # seconds to wait for a lock: processes that were killed need some to end

_held: dict[Path, IO[str]] = {}


def hold(folder: Path, setting: str) -> int:
    """Locks a folder, which is created, until the command ends (`release_all`).

    The kernel releases the lock of a process that dies, so that none is left behind. A no-op if
    this process has the lock.

    Args:
      folder: the folder; its file `.lock` names the owner.
      setting: name of the setting that it comes from, for the message.

    Returns:
      The file descriptor of the lock. Children that inherit it share the lock.

    Raises:
      InputError: another process has the lock.
    """
    if folder in _held:
        return _held[folder].fileno()
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+")
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                owner = file.read(200).strip() or "another process"
                file.close()
                raise InputError(
                    f"{setting} must be a folder that no other command writes to, got {folder}, in"
                    f" use by {owner}: wait for it to end, or choose another folder"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"warning: {folder} cannot be locked: run one command in it at a time")
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder] = file
    return file.fileno()


def release_all() -> None:
    """Releases the locks of this process."""
    while _held:
        _held.popitem()[1].close()
