"""CRC-32C checksums of bytes and of the files of a folder.

They detect damage, not deliberate changes: whoever changes a file can change its checksum.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io, threads
from pemoe_jax.runtime.file_io import AnyPath

FILE = "checksums.json"

# `checksum_of_values` sums each block of this many bytes. One call of numpy sums all blocks of a
# part, whose size is a multiple of theirs.
_BLOCK_BYTES = 1 << 15
_PART_BYTES = 1 << 22


def crc32c(data: np.ndarray, crc: int = 0) -> int:
    """Returns the CRC-32C of a uint8 array [bytes]; `crc` is that of the bytes before it."""
    view = data[:]
    view.flags.writeable = False  # google_crc32c reads only immutable buffers without a copy
    return google_crc32c.extend(crc, view)


def crc32c_of_file(path: str | os.PathLike[str]) -> str:
    """Returns the CRC-32C of a file as 8 hexadecimal digits."""
    return _size_and_crc32c(file_io.to_path(path))[1]


def _size_and_crc32c(path: AnyPath) -> tuple[int, str]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(file_io.READ_BLOCK):
            size, crc = size + len(block), google_crc32c.extend(crc, block)
    return size, f"{crc:08x}"


def checksum_of_values(array: np.ndarray, visit: Callable[[np.ndarray], None] | None = None) -> int:
    """Returns a checksum of an array in row-major order: the CRC-32C of the sums of its blocks.

    Summing bytes takes less than half the time of their CRC. A block has 32 KiB and is summed as
    64-bit integers, modulo 2^64, so that a change of one value always changes its block's sum.

    Args:
      array: the array.
      visit: called with parts of the values [<= 4 MiB] while they are in a cache of the processor;
        in several threads if the array is large (`threads.map_spans`).
    """
    values = np.ascontiguousarray(array).reshape(-1)
    data = values.view(np.uint8)

    def sum_span(span_start: int, span_stop: int) -> bytes:
        content = b""
        for start in range(span_start, span_stop, _PART_BYTES):
            part = data[start : min(start + _PART_BYTES, span_stop)]
            end = len(part) // _BLOCK_BYTES * _BLOCK_BYTES
            sums = part[:end].view(np.uint64).reshape(-1, _BLOCK_BYTES // 8).sum(axis=1)
            # An incomplete block at the end of the array enters the CRC without a sum.
            content += sums.tobytes() + part[end:].tobytes()
            if visit is not None:
                visit(part.view(values.dtype))
        return content

    crc = 0
    for content in threads.map_spans(sum_span, len(data)):
        crc = google_crc32c.extend(crc, content)
    return crc


def join(checksums: Mapping[str, tuple[str, int]]) -> str:
    """Joins the checksums of a model's arrays into one.

    Args:
      checksums: name of the array -> (kind, checksum). The kind is a text such as the dtype, since
        equal values of another dtype have another checksum.

    Returns:
      8 hexadecimal digits, ':' and 16 digits, independent of the order of `checksums`. The first 8
      digits hash only names and kinds; `is_other` compares only results that agree in them.
    """
    rows = sorted((name, kind, f"{crc:08x}") for name, (kind, crc) in checksums.items())
    kinds, values = (
        hashlib.sha256("".join(f"{' '.join(row[:n])}\n" for row in rows).encode()).hexdigest()
        for n in (2, 3)
    )
    return f"{kinds[:8]}:{values[:16]}"


def is_other(first: str | None, second: str | None) -> bool:
    """Whether two results of `join` are comparable and differ.

    Comparable results have the same names and kinds. None, an unknown result, is not comparable.
    """
    if first is None or second is None:
        return False
    return first != second and first.partition(":")[0] == second.partition(":")[0]


def write_checksums(folder: Path) -> None:
    """Writes the sizes and checksums of all files in a folder to its `checksums.json`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    files = {str(path.relative_to(folder)): [*_size_and_crc32c(path)] for path in paths}
    atomic_write.write_json(folder / FILE, {"format": "pemoe_jax crc32c", "files": files})


def verify_checksums(folder: AnyPath, part: tuple[int, int] = (0, 1)) -> Sequence[str] | None:
    """Compares the files of a folder with its `checksums.json`.

    Args:
      folder: the folder.
      part: (index, count): only every count-th file is read, from `index` on, so that several
        processes can share the work.

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
        # The folder may come from anyone: a name must not make this read a file outside of it.
        if isinstance(path, Path) and isinstance(folder, Path):
            is_inside = path.resolve().is_relative_to(folder.resolve())
        else:  # a bucket has no links to resolve
            is_inside = path.is_relative_to(folder) and ".." not in path.parts
        if not is_inside:
            raise InputError(f"{folder / FILE}: expected files in its folder, got {name!r:.80}")
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected by {FILE}")
        actual = [*_size_and_crc32c(path)]
        if actual != files[name]:
            raise InputError(
                f"{path}: damaged: expected the size and checksum {files[name]!s:.60}, got {actual}"
            )
    return names
