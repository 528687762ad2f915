"""Atomic writes: files and folders are written under another name, then renamed.

Buckets cannot rename: a file is written to a local folder and uploaded as one object, which appears
as a whole. The files of a folder appear one by one. JSON files, which describe the others, are
uploaded last, so that a process that finds them finds the others too.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io


@contextlib.contextmanager
def temporary_path(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a path next to `path` to write a file or a folder to; renames it at the end.

    For a `gs://` path, the yielded path is in the system's temporary folder and is uploaded at the
    end. If the block raises, the temporary path is removed and `path` stays as it was.

    Args:
      path: the final path, local or `gs://`.
      overwrite: whether a file or folder at `path` is replaced; otherwise it is an error.

    Raises:
      InputError: the path exists and `overwrite` is False, or its bucket cannot be written to.
    """
    path = file_io.resolve_output(path, "output")
    with file_io.remote_errors(path):
        if not overwrite and path.exists():
            raise InputError(f"{path}: expected a new path, got one that exists")
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="pemoe_jax-") as folder:
            yield Path(folder, path.name)
            with file_io.remote_errors(path):
                _upload(epath.Path(folder) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system. The process id
    # separates two processes that write the same path. It also tells `folder_lock` which temporary
    # files belong to processes that have died, and can be deleted.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(temporary)
    try:
        with file_io.named_errors(path):
            yield temporary
        if path.is_dir() or temporary.is_dir():
            _remove(path)  # os.replace cannot replace a folder that is not empty
        temporary.replace(path)
    finally:
        _remove(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8, replacing an existing one."""
    with temporary_path(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike[str], value: Mapping[str, object], indent: int | None = 2
) -> None:
    """Writes a JSON file that ends in a newline, replacing an existing one."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def _upload(source: epath.Path, target: epath.Path) -> None:
    """Uploads a file, or a folder without subfolders, in place of an existing one."""
    if not source.is_dir():
        source.copy(target, overwrite=True)
        return
    file_io.delete_folder(target)
    for file in sorted(source.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
        file.copy(target / file.name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
