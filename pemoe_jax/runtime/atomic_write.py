"""Files and folders of checkpoints: read in ranges, local or `gs://`; written whole or not."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from etils import epath

from pemoe_jax.core.errors import InputError


def at(path: str | os.PathLike[str]) -> epath.Path:
    """The path, absolute; `gs://…` stays what it is.

    Raises:
      InputError: it is no path, or of another scheme.
    """
    text = _text(path)
    scheme, found, _ = text.partition("://")
    if found and scheme != "gs":
        raise InputError(f"{text}: expected a local path or gs://…, found {scheme}://")
    return epath.Path(text if found else os.path.abspath(os.path.expanduser(text)))


def local(path: str | os.PathLike[str], what: str) -> Path:
    """A place to write to, absolute.

    Raises:
      InputError: it is no path, or remote; names `what` it is for.
    """
    text = _text(path, f"{what}: ")
    if "://" in text:
        raise InputError(f"{what}: expected a local path to write to, found {text}")
    return Path(text).expanduser().absolute()


def _text(path: Any, what: str = "") -> str:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        hint = f" (a name of digits alone needs quotes: \"'{path}'\")" if path else ""
        raise InputError(f"{what}expected a path, found {path!r}{hint}")
    return os.fspath(path)


@contextlib.contextmanager
def reaching(path: epath.Path) -> Iterator[None]:
    """Tells in one line why a remote path cannot be reached; local errors pass as they are."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries' own kinds, tensorflow's and fsspec's
        if "://" not in os.fspath(path):
            raise
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be reached: {text}") from error


def url(path: epath.Path) -> str:
    """A folder as tensorstore names it: `file:///…/` or `gs://…/`."""
    text = os.fspath(path)
    return (text if "://" in text else Path(text).as_uri()).rstrip("/") + "/"


def inside(folder: epath.Path, name: Any, index: str) -> epath.Path:
    """A file of the folder that an index names.

    Raises:
      InputError: the name is not that of a file in this very folder.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
        raise InputError(
            f"{folder / index}: expected names of files in its own folder, found {name!r}"
        )
    return folder / name


_ALIGNED = 64  # bytes; an array that starts so is not copied by jax on a CPU


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty`, aligned for jax."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)


def read_range(path: epath.Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes from `offset` on: uint8 [size], whose memory nothing else holds.

    Raises:
      InputError: the file is shorter.
    """
    data = empty((size,), np.dtype(np.uint8))
    with path.open("rb") as file:
        file.seek(offset)
        if hasattr(file, "readinto"):
            found = file.readinto(data)
        else:  # a remote file of tensorflow's
            read = file.read(size)
            found = len(read)
            data[:found] = np.frombuffer(read, np.uint8)
    if found != size:
        raise InputError(
            f"{path}: cut short: expected {size:,} bytes from {offset:,} on, found {found:,}"
        )
    return data


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; renamed to it at the end.

    What fails on the way leaves nothing behind, and what was there stays.

    Args:
      path: local.
      overwrite: replaces what is there.

    Raises:
      InputError: the path is remote, or something is there already.
    """
    final = local(path, "output")
    if final.exists() and not overwrite:
        raise InputError(f"{path} is there already: expected a new path")
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    _remove(beside)
    try:
        try:
            yield beside
        except safetensors.SafetensorError as error:  # the disk is full, say
            raise InputError(f"{path}: cannot be written: {error}") from error
        _give_usual_modes(beside)
        if final.is_dir() or beside.is_dir():
            _remove(final)  # a folder replaces nothing that is there
        beside.replace(final)
    finally:
        _remove(beside)


def write_text(path: Path, text: str) -> None:
    """A file of text, in place of what is there, so that a reader never sees half of it."""
    with writing(path, overwrite=True) as beside:
        beside.write_text(text)


def _give_usual_modes(path: Path) -> None:
    """Safetensors writes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
