"""Locks of folders in buckets, which expire if the process that holds them dies.

The lock is the object `.lock`, which its owner rewrites every `RENEWAL` seconds. The processes do
not compare clocks: others watch the object's generation, which each write changes, and take the
lock over if the generation has stayed the same for `LEASE` seconds. Each write is conditional on
the generation that was read before it, so only one of two processes gets the lock.
"""

import contextlib
import os
import sys
import threading
import time
import uuid

import tensorstore as ts
from etils import epath

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

RENEWAL = 20.0  # seconds
LEASE = 90.0  # seconds; several renewals, since one may fail and be tried again

_NAME = ".lock"


class BucketLock:
    """A lock that this process holds until `release`.

    If this process does not renew the lock for `LEASE` seconds, for example because it is
    suspended, another process may take it over. This process then ends with exit code 1 at its next
    renewal.

    Args:
      folder: a `gs://` folder.
      setting: name of the setting whose value is the folder, for the message.
      owner: text that names this process in the messages of other processes.

    Raises:
      InputError: another process has the lock, or the bucket cannot be written to.
    """

    def __init__(self, folder: epath.Path, setting: str, owner: str) -> None:
        self._folder = folder
        self._content = f"{owner}\n{uuid.uuid4()}\n".encode()
        with file_io.remote_errors(folder):
            self._store = ts.KvStore.open(file_io.url(folder)).result()
            self._generation = self._acquire(setting)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Deletes the object if this process still holds the lock."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the lock expires by itself
            current = self._store.read(_NAME).result()
            if current.value == self._content:
                self._store.write(_NAME, None, if_equal=current.stamp.generation).result()

    def _acquire(self, setting: str) -> bytes:
        """Waits until this process holds the lock; returns the generation of the object."""
        watched, since = None, 0.0  # the generation that is watched, and since when
        while True:
            current = self._store.read(_NAME).result()
            if current.value == self._content:  # a write succeeded, but its response was lost
                return current.stamp.generation
            owner = current.value.decode(errors="replace").split("\n")[0] or "another process"
            if current.state != "missing" and current.stamp.generation != watched:
                if watched is not None:  # the generation has changed: the owner is alive
                    raise InputError(
                        f"{setting} must be a folder that no other command writes to, got"
                        f" {self._folder}, in use by {owner}: wait for it to end, or choose another"
                        " folder"
                    )
                watched, since = current.stamp.generation, time.monotonic()
                print(
                    f"{self._folder} is locked by {owner}: waiting up to {LEASE:.0f} s", flush=True
                )
            if current.state == "missing" or time.monotonic() - since > LEASE:
                generation = self._write(current.stamp.generation)
                if generation is not None:
                    return generation
                # Another process has just taken the lock: the next read ends in the error above.
                watched = watched or b""
            else:
                time.sleep(min(1.0, RENEWAL / 4))  # often enough to see each renewal

    def _write(self, generation: bytes) -> bytes | None:
        """Writes the object if it has this generation; returns the new one, None if it has not."""
        return (
            self._store.write(_NAME, self._content, if_equal=generation).result().generation or None
        )

    def _renew(self) -> None:
        """Rewrites the object until `release`; the work of the thread."""
        while not self._ended.wait(RENEWAL):
            # Errors are ignored: without the bucket, this process cannot write its results either.
            with contextlib.suppress(Exception):
                generation = self._write(self._generation)
                if generation is None:
                    # The lock was taken over, or the response to an earlier write was lost.
                    current = self._store.read(_NAME).result()
                    if current.value != self._content:
                        self._end_process(current.value.decode(errors="replace").split("\n")[0])
                    generation = current.stamp.generation
                self._generation = generation

    def _end_process(self, owner: str) -> None:
        print(
            f"error: {self._folder}: this process was silent for over {LEASE:.0f} s, and"
            f" {owner or 'another process'} has taken the folder over",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # sys.exit would only end this thread
