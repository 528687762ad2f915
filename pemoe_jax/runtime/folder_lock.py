"""Locks output folders, because two commands that write into the same one would lose results."""

import errno
import fcntl
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pemoe_jax.core.errors import InputError

if TYPE_CHECKING:
    from pemoe_jax.runtime.bucket_lock import BucketLock
    from pemoe_jax.runtime.file_io import AnyPath

_NAME = ".lock"
# Errors of flock on file systems without locks, such as some network file systems of clusters.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

TIMEOUT = 15.0  # seconds to wait for a lock: a process that was killed may take some to end

# Folder -> its open file `.lock`, and whether this process has created the folder.
_held: dict[Path, tuple[IO[str], bool]] = {}
_held_in_buckets: "dict[AnyPath, BucketLock]" = {}


def hold(folder: "AnyPath", setting: str) -> int:
    """Creates a folder if it does not exist, and locks it until `release_all`.

    If the process dies, the kernel releases the lock, so none is left behind. A no-op if this
    process already holds the lock. For a `gs://` folder see `bucket_lock`.

    Args:
      folder: the folder; its file `.lock` names the owner.
      setting: name of the setting whose value is the folder, for the message.

    Returns:
      The file descriptor of the lock, -1 in a bucket. Child processes that inherit it share the
      lock.

    Raises:
      InputError: another process has the lock.
    """
    if not isinstance(folder, Path):
        if folder not in _held_in_buckets:
            # Imported here because it imports tensorstore, which takes long.
            from pemoe_jax.runtime import bucket_lock

            _held_in_buckets[folder] = bucket_lock.BucketLock(folder, setting, _owner())
        return -1
    if folder not in _held:
        is_new = not folder.exists()
        file = _lock(folder, setting)
        file.truncate(0)
        file.write(f"{_owner()}\n")
        file.flush()
        _held[folder] = file, is_new
        _remove_unfinished(folder)
    return _held[folder][0].fileno()


def release_all() -> None:
    """Releases the locks; deletes lock files and new folders where nothing else was written."""
    while _held_in_buckets:
        _held_in_buckets.popitem()[1].release()
    while _held:
        folder, (file, is_new) = _held.popitem()
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [_NAME]:
            (folder / _NAME).unlink()
            if is_new:
                folder.rmdir()
        file.close()


def _remove_unfinished(folder: Path) -> None:
    """Deletes temporary files and folders of `atomic_write` whose processes were killed."""
    for path in folder.glob(".*.*"):
        _, _, process = path.name.rpartition(".")
        if not process.isdecimal():
            continue
        try:
            os.kill(int(process), 0)  # sends no signal, but raises if there is no such process
        except ProcessLookupError:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except (OSError, OverflowError):  # another user's process, or no process id
            continue


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock(folder: Path, setting: str) -> IO[str]:
    """Returns the open file `.lock` of a folder, locked if the file system has locks."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have removed the file after it was opened here: then try again.
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
