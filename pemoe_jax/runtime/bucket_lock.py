"""Locks of folders in buckets, which expire if the process that holds them dies.

The lock is the object `.lock`, which its owner rewrites every `RENEWAL` seconds. Other
processes do not compare clocks: they watch the object's generation, which each write changes, and
take the lock over if it has stayed the same for `LEASE` seconds. Each write is conditional on the
generation that was read before, so only one of two processes gets the lock.
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
    suspended, another may take it over. The process then ends with exit code 1 at its next renewal.

    Args:
      folder: a `gs://` folder.
      setting: name of the setting that holds the folder, for the message.
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
        watched, since = None, 0.0
        while True:
            current = self._store.read(_NAME).result()
            if current.value == self._content:  # a write succeeded, but its response was lost
                return current.stamp.generation
            owner = current.value.decode(errors="replace").split("\n")[0] or "another process"
            if current.state != "missing" and current.stamp.generation != watched:
                if watched is not None:
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
                watched = watched or b""  # another process has taken the lock
            else:
                time.sleep(min(1.0, RENEWAL / 4))

    def _write(self, generation: bytes) -> bytes | None:
        """Writes the object if it still has this generation; returns the new one, or else None."""
        return (
            self._store.write(_NAME, self._content, if_equal=generation).result().generation or None
        )

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            # A process that cannot reach the bucket cannot write its results there either.
            with contextlib.suppress(Exception):
                generation = self._write(self._generation)
                if generation is None:
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
        os._exit(1)
