"""Locks of output folders: two commands that write into the same folder would lose results."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from pemoe_jax.core.errors import InputError

_NAME = ".lock"
# What flock reports on file systems without locks, such as some of clusters.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

TIMEOUT = 15.0  # seconds to wait for a lock: processes that were killed need some to end

# Folder -> its open `.lock`, and whether this process has created the folder.
_held: dict[Path, tuple[IO[str], bool]] = {}


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
    if folder not in _held:
        is_new = not folder.exists()
        file = _lock(folder, setting)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held[folder] = file, is_new
    return _held[folder][0].fileno()


def release_all() -> None:
    """Releases the locks of this process; leaves nothing in folders that nothing was written to."""
    while _held:
        folder, (file, is_new) = _held.popitem()
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [_NAME]:
            (folder / _NAME).unlink()
            if is_new:
                folder.rmdir()
        file.close()


def _lock(folder: Path, setting: str) -> IO[str]:
    """Returns the open and locked `.lock` of a folder."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _NAME).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have removed the file after it was opened.
            if os.fstat(file.fileno()).st_nlink:
                return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                owner = file.read(200).strip() or "another process"
                raise InputError(
                    f"{setting} must be a folder that no other command writes to, got {folder}, in"
                    f" use by {owner}: wait for it to end, or choose another folder"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"warning: {folder} cannot be locked: run one command in it at a time")
            return file
        file.close()
