"""Safetensors files, local or `gs://`: opened for reading array by array, and written.

The safetensors library reads local files only, so the header is parsed here. Format:
https://github.com/huggingface/safetensors#format
"""

import collections
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import checksums, file_io

# Metadata key of files that this package writes: the CRC-32C of each block of each array's bytes.
# Checksums are per block, because a process may read only some rows of an array.
CHECKSUMS_KEY = "crc32c"
# `threads.SPAN_BYTES` must be a multiple of it, so that one thread computes a whole checksum.
_BLOCK_BYTES = 1 << 24

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The library allows headers of four times this size, which take seconds and gigabytes to parse.
# Switch-C in one file, with its 100,000 expert matrices, would have a header of 15 MB.
_MAX_HEADER_BYTES = 25_000_000
_MAX_RANK = 32  # the limit of numpy before version 2


def open_file(path: epath.Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Opens a file as (name -> array, metadata of the file), reading only its header.

    Raises:
      InputError: the file is missing, is not a safetensors file, is truncated, or its arrays
        overlap or have gaps.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    file_bytes = path.stat().length
    if file_bytes < 8:
        raise InputError(f"{path}: expected a safetensors file, got {file_bytes} bytes")
    (header_bytes,) = struct.unpack("<Q", file_io.read_range(path, 0, 8).tobytes())
    # Lengths are checked before the header is read: a damaged one must not allocate terabytes.
    if _MAX_HEADER_BYTES < header_bytes <= file_bytes - 8:
        raise InputError(
            f"{path}: expected a header of at most {_MAX_HEADER_BYTES:,} bytes, got"
            f" {header_bytes:,}"
        )
    if header_bytes > file_bytes - 8:
        raise InputError(
            f"{path}: truncated, or not a safetensors file: its header claims {header_bytes:,}"
            f" bytes, the file has {file_bytes:,}"
        )
    # The header is untrusted JSON, whose values may have any type. Using a value of a wrong type
    # raises one of the errors below, so only the checks whose messages help a user are written out.
    try:
        text = file_io.read_range(path, 8, header_bytes).tobytes()
        header = file_io.parse_json(text, lambda pairs: _unique_keys(path, pairs))
        metadata = header.pop("__metadata__", {})
        data_start = 8 + header_bytes
        crcs = _parse_checksums(metadata)
        if crcs and (different := sorted(crcs.keys() ^ header.keys())):
            raise InputError(
                f"{path}: {different[0]!r:.100}: damaged: expected one array and one checksum of"
                " this name"
            )
        arrays = {
            name: _parse_entry(path, name, entry, data_start, crcs.get(name))
            for name, entry in header.items()
        }
        if not isinstance(metadata, dict) or not all(name.isprintable() for name in header):
            raise ValueError("metadata that is not an object, or an unprintable name")
        data_end = data_start + _check_contiguous(path, header)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):  # a subclass of ValueError that has its own message
            raise
        raise InputError(f"{path}: not a safetensors file ({error!r:.200})") from error
    if data_end != file_bytes:
        problem = "truncated" if data_end > file_bytes else "too long"
        raise InputError(
            f"{path}: {problem}: its header describes {data_end:,} bytes, the file has"
            f" {file_bytes:,}"
        )
    return arrays, metadata


def _unique_keys(path: epath.Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises InputError for equal keys, of which `json` keeps the last."""
    keys = collections.Counter(key for key, _ in pairs)
    if len(keys) != len(pairs):
        name = keys.most_common(1)[0][0]
        raise InputError(f"{path}: {name!r:.100}: expected every name once, got it twice")
    return dict(pairs)


def _check_contiguous(path: epath.Path, header: Mapping[str, Any]) -> int:
    """Returns the end of the last array; raises InputError if arrays overlap or have gaps."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, next_end = entry["data_offsets"]
        if begin != end:
            problem = "overlaps another array" if begin < end else "has a gap before it"
            raise InputError(
                f"{path}: {name!r:.100}: expected to start at byte {end:,}, but the header has"
                f" {begin:,}: it {problem}"
            )
        end = next_end
    return end


def is_shape(sizes: object) -> bool:
    """Whether a value of an untrusted file is a shape that numpy can represent."""
    # The rank is checked first: a product of 300,000 sizes takes seconds.
    return (
        isinstance(sizes, tuple)
        and len(sizes) <= _MAX_RANK
        and all(map(file_io.is_count, sizes))
        and file_io.is_count(math.prod(sizes))
    )


def _parse_entry(
    path: epath.Path, name: str, entry: Mapping[str, Any], data_start: int, crcs: str | None
) -> LazyArray:
    """Returns the array of a header entry {"dtype", "shape", "data_offsets"}.

    Args:
      path: the file.
      name: name of the array.
      entry: the header's value for the name.
      data_start: position in the file from which `data_offsets` count.
      crcs: 8 hexadecimal digits for each block of the array; None: no checksums.

    Raises:
      InputError: the dtype is not supported, or does not fit the shape and the offsets.
      ValueError, TypeError, KeyError: the entry is malformed.
    """
    if entry["dtype"] not in _DTYPES:
        dtype_text = ascii(entry["dtype"]).strip("'")  # keeps the message on one line
        raise InputError(
            f"{path}: {name!r:.100}: expected a dtype of {sorted(_DTYPES)}, got {dtype_text:.20}"
        )
    dtype = _DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not is_shape(shape) or not file_io.is_count(begin) or not file_io.is_count(end):
        raise ValueError("sizes that are not integers >= 0, or too large")
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise InputError(
            f"{path}: {name!r:.100} {shape!s:.80}: expected {num_bytes:,} bytes, but the header has"
            f" {end - begin:,}"
        )
    offset = data_start + begin
    bounds = offset, offset + num_bytes
    # 8 digits for each block; the last block may be shorter.
    if crcs is not None and len(crcs) != 8 * -(-num_bytes // _BLOCK_BYTES):
        raise ValueError(f"the checksums of {name!r:.80} are for another number of bytes")

    def read(start: int, size: int) -> np.ndarray:
        if crcs is None:
            return file_io.read_range(path, start, size)
        return _read_verified(path, name, bounds, crcs, start, size)

    return LazyArray(shape, dtype, lambda index: read_rows(read, offset, shape, dtype, index))


def _parse_checksums(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> 8 hexadecimal digits for each block; {} for files of other programs."""
    stored = file_io.parse_json(metadata.get(CHECKSUMS_KEY, "{}"))
    if not stored:
        return {}
    if stored["block_bytes"] != _BLOCK_BYTES:
        raise ValueError(f"the checksums are not for blocks of {_BLOCK_BYTES:,} bytes")
    if not all(isinstance(crcs, str) for crcs in stored["arrays"].values()):
        raise ValueError("checksums that are not strings")
    return dict(stored["arrays"])


def _make_checksums(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the metadata that `_parse_checksums` reads; the arrays must be row-major."""
    crcs = {}
    for name, array in arrays.items():
        data = array.reshape(-1).view(np.uint8)
        starts = range(0, data.size, _BLOCK_BYTES)
        crcs[name] = "".join(f"{checksums.crc32c(data[i : i + _BLOCK_BYTES]):08x}" for i in starts)
    return json.dumps({"block_bytes": _BLOCK_BYTES, "arrays": crcs})


def _read_verified(
    path: epath.Path, name: str, bounds: tuple[int, int], crcs: str, offset: int, size: int
) -> np.ndarray:
    """Reads a range of an array's bytes, and verifies the checksums of all blocks in it.

    Blocks that are partly in the range are read in full, since a checksum covers a whole block.

    Args:
      path: the file.
      name: name of the array, for errors.
      bounds: start and end of the array in the file.
      crcs: 8 hexadecimal digits for each block of the array.
      offset: position of the range in the file.
      size: number of bytes of the range.

    Raises:
      InputError: the file is truncated, or a checksum is wrong.
    """
    begin, end = bounds
    first, last = (offset - begin) // _BLOCK_BYTES, -(-(offset + size - begin) // _BLOCK_BYTES)
    start, stop = begin + first * _BLOCK_BYTES, min(end, begin + last * _BLOCK_BYTES)
    actual = [0] * (last - first)

    # `part` is never in two checksum blocks, because _BLOCK_BYTES is a multiple of its size. No two
    # threads read the same checksum block.
    def visit(position: int, part: np.ndarray) -> None:
        block = position // _BLOCK_BYTES
        actual[block] = checksums.crc32c(part, actual[block])

    data = file_io.read_range(path, start, stop - start, visit)
    for block, crc in enumerate(actual):
        expected = crcs[8 * (first + block) : 8 * (first + block + 1)]
        if f"{crc:08x}" != expected:
            raise InputError(
                f"{path}: {name!r:.100}: damaged: expected the checksum {expected!r} of its bytes"
                f" from {start + block * _BLOCK_BYTES:,} on, got '{crc:08x}'"
            )
    return data[offset - start : offset - start + size]


def read_rows(
    read: Callable[[int, int], np.ndarray],
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: Index,
) -> np.ndarray:
    """Reads a slice of a row-major, little-endian array whose first byte is at `offset`.

    Only the rows (indices of the first axis) of the slice are read; other axes are sliced in
    memory, since their parts are not contiguous in the file.

    Args:
      read: function (offset, size) -> bytes, uint8 [size]; the offset is in the file.
      offset, shape, dtype: position, shape and dtype of the whole array.
      index: a slice of step 1 for each axis.

    Raises:
      InputError: the file is truncated.
    """
    if not shape:
        return read(offset, dtype.itemsize).view(dtype).reshape(())
    first, last, _ = index[0].indices(shape[0])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    data = read(offset + first * row_bytes, (last - first) * row_bytes)
    return data.view(dtype).reshape(last - first, *shape[1:])[(slice(None), *index[1:])]


def save_file(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file with the permissions that the umask allows, and checksums in its metadata.

    Raises:
      InputError: the file cannot be written, because the disk is full for example.
    """
    # The library writes an array's memory as it is: a transposed view would be saved transposed.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {**metadata, CHECKSUMS_KEY: _make_checksums(contiguous)}
    try:
        safetensors.numpy.save_file(contiguous, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    # The library creates files that only their owner can read. The umask can be read only by
    # setting a new one.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
