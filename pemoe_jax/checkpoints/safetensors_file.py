"""Safetensors files, opened for reading array by array, local or `gs://`.

The library reads local files alone; writing is the library's.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from pemoe_jax.checkpoints.lazy_array import Index, Stored
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MOST_HEADER = 100_000_000  # the library's own limit


def open_file(path: epath.Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Name -> array, and the file's metadata; reads the header alone.

    Raises:
      InputError: no such file, not safetensors, or shorter than its header says.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    size = path.stat().length
    if size < 8:
        raise InputError(f"{path}: expected a safetensors file, found {size} bytes")
    (length,) = struct.unpack("<Q", atomic_write.read_range(path, 0, 8).tobytes())
    if length > min(size - 8, _MOST_HEADER):
        raise InputError(
            f"{path}: cut short, or not a safetensors file: its header has {length:,} bytes,"
            f" the file {size:,}"
        )
    try:
        header: dict[str, Any] = json.loads(atomic_write.read_range(path, 8, length).tobytes())
        metadata = header.pop("__metadata__", {})
        arrays = {name: _stored(path, name, said, 8 + length) for name, said in header.items()}
        if not isinstance(metadata, dict) or not all(name.isprintable() for name in header):
            raise ValueError("its metadata is no object, or a name no line of text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a safetensors file ({error!r:.200})") from error
    end = 8 + length + max((said["data_offsets"][1] for said in header.values()), default=0)
    if end != size:
        cut = "cut short" if end > size else "longer than it says"
        raise InputError(f"{path}: {cut}: its header speaks of {end:,} bytes, it has {size:,}")
    return arrays, metadata


def _stored(path: epath.Path, name: str, said: Mapping[str, Any], start: int) -> Stored:
    """An array by what the header says of it."""
    if said["dtype"] not in _DTYPES:
        found = ascii(said["dtype"]).strip("'")  # of one line, whatever it is
        raise InputError(
            f"{path}: {name!r:.100} is of type {found:.20}: expected one of {sorted(_DTYPES)}"
        )
    dtype = np.dtype(_DTYPES[said["dtype"]])
    shape = tuple(said["shape"])
    begin, end = said["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError("sizes are no numbers >= 0")
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise InputError(
            f"{path}: {name!r:.100} {shape!s:.80} takes {needed:,} bytes,"
            f" the header gives {end - begin:,}"
        )
    return Stored(shape, dtype, lambda index: read_rows(path, start + begin, shape, dtype, index))


def read_rows(
    path: epath.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, index: Index
) -> np.ndarray:
    """A part of an array that lies in a file row after row; of the first axis only what is asked.

    Args:
      path: of the file.
      offset: of the array's first byte.
      shape: of the whole array.
      dtype: as stored, little-endian.
      index: one slice an axis.

    Raises:
      InputError: the file is shorter.
    """
    if not shape:
        return atomic_write.read_range(path, offset, dtype.itemsize).view(dtype).reshape(())
    first, last, _ = index[0].indices(shape[0])
    row = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    data = atomic_write.read_range(path, offset + first * row, (last - first) * row)
    return data.view(dtype).reshape(last - first, *shape[1:])[(slice(None), *index[1:])]
