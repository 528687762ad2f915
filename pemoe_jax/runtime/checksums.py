"""CRC-32C checksums of bytes and of the files of a folder.

They detect damage, not deliberate changes: whoever changes a file can change its checksum.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

FILE = "checksums.json"
# The library copies what it gets: blocks that fit into a core's cache take a third of the time.
_BLOCK = 1 << 18


def crc32c(data: np.ndarray, crc: int = 0) -> int:
    """Returns the CRC-32C of a uint8 array [bytes]; `crc` is that of the bytes before it."""
    for start in range(0, len(data), _BLOCK):
        crc = google_crc32c.extend(crc, data[start : start + _BLOCK].tobytes())
    return crc


def crc32c_of_file(path: str | os.PathLike[str]) -> str:
    """Returns the CRC-32C of a file as 8 hexadecimal digits."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            crc = google_crc32c.extend(crc, block)
    return f"{crc:08x}"


def write_checksums(folder: Path) -> None:
    """Writes the sizes and checksums of all files in a folder to its `checksums.json`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, crc32c_of_file(path)] for path in paths
    }
    atomic_write.write_json(folder / FILE, {"format": "pemoe_jax crc32c", "files": files})


def verify_checksums(folder: Path, part: tuple[int, int] = (0, 1)) -> Sequence[str] | None:
    """Compares the files of a folder with its `checksums.json`.

    Args:
      folder: the folder.
      part: (i, n): only every n-th file is read, from the i-th on.

    Returns:
      The names of the files that were compared; None if there is no `checksums.json`.

    Raises:
      InputError: a file is missing, of another size or damaged.
    """
    if not (folder / FILE).exists():
        return None
    files = file_io.read_json(folder / FILE).get("files")
    if not isinstance(files, dict):
        raise InputError(f"{folder / FILE}: files: expected an object, got {files!r:.80}")
    names = sorted(files)[part[0] :: part[1]]
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder / FILE}: expected files in its folder, got {name!r:.80}")
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected by {FILE}")
        actual = [path.stat().st_size, crc32c_of_file(path)]
        if actual != files[name]:
            raise InputError(
                f"{path}: damaged: expected the size and checksum {files[name]!s:.60}, got {actual}"
            )
    return names
