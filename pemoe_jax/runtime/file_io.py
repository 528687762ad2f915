"""Local and `gs://` paths: checks, one-line errors, and reading text, byte ranges and JSON."""

import contextlib
import errno
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from etils import epath

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import threads

# An object as json.loads returns it; its values are checked where they are used.
JsonObject: TypeAlias = dict[str, Any]

# A path in a file system, or in a bucket (`gs://`). Both have pathlib's methods.
AnyPath: TypeAlias = Path | epath.Path


def resolve(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the absolute path; a `gs://` path is returned unchanged.

    Raises:
      InputError: `path` is not a path, or has another scheme.
    """
    text = _path_text(path)
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "gs":
        raise InputError(f"{text}: expected a local path or gs://…, got {scheme}://")
    return epath.Path(text if separator else os.path.abspath(os.path.expanduser(text)))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike[str]) -> AnyPath:
    """Returns a path as an object, without resolving it."""
    return epath.Path(path) if is_remote(path) else Path(path)


def resolve_output(path: str | os.PathLike[str], setting: str) -> AnyPath:
    """Returns the absolute path of an output; a `gs://` path is returned unchanged.

    Raises:
      InputError: `path` is not a path, or has another scheme; the message names `setting`.
    """
    text = _path_text(path, f"{setting}: ")
    if not is_remote(text):
        return Path(text).expanduser().absolute()
    if not re.match(r"gs://[^/]", text):
        raise InputError(f"{setting} must be a local path or gs://BUCKET/…, got {text}")
    return epath.Path(text)


def resolve_local(path: str | os.PathLike[str], setting: str) -> Path:
    """Returns the absolute path of an output that must be local.

    Raises:
      InputError: `path` is not a path, or is remote; the message names `setting`.
    """
    text = _path_text(path, f"{setting}: ")
    if "://" in text:
        raise InputError(f"{setting} must be a local path, got {text}")
    return Path(text).expanduser().absolute()


def resolve_output_folder(path: str | os.PathLike[str], setting: str) -> AnyPath:
    """Returns the absolute path of a folder to write to, which may not exist yet.

    Raises:
      InputError: see `resolve_output`; or the folder cannot be created or written to, or its bucket
        cannot be read.
    """
    folder = resolve_output(path, setting)
    # Commands check the folder before they start: later, the results of hours would be lost.
    if not isinstance(folder, Path):
        with remote_errors(folder):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{setting} must be a folder, got {folder}, which is an object")
        return folder
    try:
        existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
        # The limit of Linux's file systems; os.path.lexists only returns False for a longer name.
        if len(os.fsencode(folder.name)) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), folder)
    except OSError as error:
        raise InputError(f"{setting} must be a folder, got {folder}: {error.strerror}") from None
    if not existing.is_dir():
        raise InputError(f"{setting} must be a folder, got {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{setting} must be a folder to write to, got {folder}: no permission")
    return folder


def check_no_pattern(path: str | os.PathLike[str], setting: str) -> None:
    """Raises InputError for a path with a special character of shell patterns.

    Orbax and T5X use paths as patterns to find checkpoints, and such a path does not match itself.
    """
    if re.search(r"[][*?\\]", os.fspath(path)):
        raise InputError(rf"{setting} must be a path without any of []*?\, got {os.fspath(path)}")


def _path_text(path: object, prefix: str = "") -> str:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        # gin reads a name that consists of digits as a number.
        hint = f" (a name of digits alone needs quotes: \"'{path}'\")" if path else ""
        raise InputError(f"{prefix}expected a path, got {path!r}{hint}")
    return os.fspath(path)


@contextlib.contextmanager
def remote_errors(path: AnyPath) -> Iterator[None]:
    """Converts errors at a remote path to an `InputError` of one line; other errors pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # tensorflow and fsspec have exceptions of their own
        if not is_remote(path):
            raise
        raise InputError(f"{path}: cannot be reached: {first_line(error)}") from error


@contextlib.contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the path to errors of the operating system without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def url(folder: AnyPath) -> str:
    """Returns a folder's URL for tensorstore: `file:///…/` or `gs://…/`.

    Raises:
      InputError: the path has a backslash: tensorstore would find no files.
    """
    text = os.fspath(folder)
    if "\\" in text:
        raise InputError(f"{text}: expected a path without a backslash: rename the folder")
    return (text if "://" in text else Path(text).as_uri()).rstrip("/") + "/"


def child_path(folder: epath.Path, name: object, index: str) -> epath.Path:
    """Returns the path of a file that the file `index` names; both are in `folder`.

    Raises:
      InputError: the name is not that of a file in the folder: a malicious index could lead out.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
        raise InputError(
            f"{folder / index}: expected names of files in its own folder, got {name!r}"
        )
    return folder / name


# jax uses a numpy array on CPUs without a copy if it starts at a multiple of 64 bytes.
_ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns `np.empty` in memory that jax uses without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def delete_folder(folder: epath.Path) -> None:
    """Deletes all objects of a folder in a bucket, if there are any."""
    # Twice, because TensorFlow's first pass may leave objects behind if the folder itself is an
    # object.
    for _ in range(2):
        folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Yields a local file with the content of `path`: `path` itself, or a temporary copy.

    Raises:
      InputError: the bucket of `path` cannot be read, or has no such object.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pemoe_jax-") as folder:
        file = Path(folder, path.name)
        with remote_errors(path):
            if not path.exists():
                raise InputError(f"{path}: no such file")
            path.copy(file)
        yield file


def read_text(path: AnyPath, errors: str = "strict") -> str:
    """Reads a UTF-8 text; `errors` is that of `open`, which epath's `read_text` does not have."""
    return io.TextIOWrapper(io.BytesIO(path.read_bytes()), "utf-8", errors).read()


# Bytes that are read at once; a divisor of `threads.SPAN_BYTES`. With smaller blocks, threads wait
# for Python's global lock; blocks of 4 MiB gain nothing more.
READ_BLOCK = 1 << 21


def read_range(
    path: epath.Path,
    offset: int,
    size: int,
    visit: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Reads `size` bytes from `offset` on into a new uint8 array [size].

    Args:
      path: the file.
      offset: the first byte.
      size: number of bytes.
      visit: called with each block of `READ_BLOCK` bytes while it is in a cache of the processor;
        its arguments are the block's position in the range and its bytes. Blocks of one span of
        `threads.map_spans` are visited in order, different spans possibly in different threads.

    Raises:
      InputError: the file is shorter.
    """
    # A new buffer for each read, because jax keeps it as the array's memory on CPUs.
    data = aligned_empty((size,), np.dtype(np.uint8))
    if is_remote(path):
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)  # in one piece, since each read is a request
        num_read = len(content)
        data[:num_read] = np.frombuffer(content, np.uint8)
        if visit is not None:
            for start in range(0, size, READ_BLOCK):
                visit(start, data[start : start + READ_BLOCK])
    else:

        def read_span(span_start: int, span_stop: int) -> int:
            span_read = 0
            with path.open("rb") as file:
                file.seek(offset + span_start)
                for start in range(span_start, span_stop, READ_BLOCK):
                    block = data[start : min(start + READ_BLOCK, span_stop)]
                    span_read += file.readinto(block)
                    if visit is not None:
                        visit(start, block)
            return span_read

        num_read = sum(threads.map_spans(read_span, size))
    if num_read != size:
        raise InputError(
            f"{path}: truncated: expected {size:,} bytes at {offset:,}, got {num_read:,}"
        )
    return data


def parse_json(
    text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Returns the value of a JSON text. Every file that a user may pass is parsed by this function.

    Raises:
      ValueError: the text is not JSON in UTF-8, is nested too deeply, or has an integer of more
        than the 4,300 digits that Python reads; or `object_pairs_hook` raises it.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_utf8(value: Any) -> None:
    r"""Raises ValueError if a text in a JSON value has half a surrogate pair (an escape "\ud800").

    Such a text has no UTF-8, so it can be written neither to a file nor to a terminal.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise ValueError(f"unpaired surrogate \\u{code:04x}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_count(value: object) -> bool:
    """Whether a value from an untrusted file is an integer >= 0 that fits into int64."""
    return type(value) is int and 0 <= value < 2**63  # isinstance would accept True as 1


def read_json(path: str | os.PathLike[str]) -> JsonObject:
    """Reads a JSON object.

    Raises:
      InputError: the file is missing, cannot be read, is not JSON, or is JSON but not an object.
    """
    try:
        value = parse_json(epath.Path(path).read_text(encoding="utf-8"))
        check_utf8(value)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got something else ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
