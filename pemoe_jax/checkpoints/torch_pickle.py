"""Reads files of `torch.save` (`pytorch_model.bin`) without torch, and without running the pickle.

The file is a zip archive with these entries:

    <name>/data.pkl      a pickle: for each tensor its name, storage, offset, shape and strides
    <name>/data/<key>    a storage: values in the byte order below, neither compressed nor padded
    <name>/byteorder     'little' or 'big' (refused); missing in older files

A pickle is a program, which may run any code. This module interprets the few operations that a dict
of tensors needs, and refuses all others. A `pickle.Unpickler` with a restricted `find_class` and
`persistent_load` would be shorter, but not safe: it cannot refuse a dict whose key is a deeply
nested tuple. Hashing that key overflows the C stack, which kills the process (Python 3.11).
"""

import dataclasses
import functools
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from etils import epath

from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.checkpoints.safetensors_file import is_shape, read_rows
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

_STORAGES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
# The functions and classes that a pickle may name. `_rebuild_parameter` occurs if a dict of
# `nn.Parameter` was saved instead of a state dict.
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {_DICT, _TENSOR, _PARAMETER, *_STORAGES}

_BLOCK = 1 << 24  # bytes read at a time for a checksum
# Limits for malicious files; both leave ample room for real ones.
_MAX_PICKLE_BYTES = 10_000_000  # T5-XXL's data.pkl has 0.1 MB
_MAX_OPERATIONS = 500_000  # a tensor takes about 25; a million operations take seconds
_RESAVE = "torch.save(torch.load(path, weights_only=True), path)"


def open_file(path: epath.Path) -> dict[str, LazyArray]:
    """Returns the tensors of a file as name -> array, without reading their values.

    Raises:
      InputError: the file is missing, truncated or not in torch's zip format; it holds anything
        but a dict of tensors; or a tensor exceeds its storage.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    archive = _open_archive(path)
    if "byteorder" in archive.entries and archive.read("byteorder") != b"little":
        raise InputError(f"{path}: expected little-endian values, got big-endian ones")
    try:
        state = _Interpreter(archive).run(archive.read("data.pkl"))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, InputError):  # a subclass of ValueError that has its own message
            raise
        raise InputError(f"{path}: not a pickle of tensors ({error!r:.200})") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected a dict of tensors, got {_kind(state)}")
    for name, value in state.items():
        if not name.isprintable():
            raise InputError(f"{path}: expected printable names, got {name!r:.80}")
        if not isinstance(value, LazyArray):
            raise InputError(f"{path}: {name!r:.80}: expected a tensor, got {_kind(value)}")
    return state


def _kind(value: object) -> str:
    """Returns 'tensor' or the name of a value's type, such as 'Storage' or 'list', for errors."""
    return "tensor" if isinstance(value, LazyArray) else type(value).__name__.lstrip("_")


@dataclasses.dataclass(frozen=True)
class _Archive:
    """A zip archive whose uncompressed entries are read by byte range.

    `zipfile` (Python 3.11) would read an entry from its start, whichever range is requested.
    """

    path: epath.Path
    entries: dict[str, zipfile.ZipInfo]  # by name, without the archive's top folder
    verified: set[str] = dataclasses.field(default_factory=set)  # entries with a correct checksum

    def entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self.entries:
            raise InputError(f"{self.path}: expected an entry {name!r:.80}, got none")
        return self.entries[name]

    def data_offset(self, name: str) -> int:
        """Returns the position of an entry's first byte in the file."""
        offset = self.entry(name).header_offset
        # The entry's own header must be read, because its size is not in the zip's directory: torch
        # pads the header's extra field, so that storages are aligned to 64 bytes.
        header = file_io.read_range(self.path, offset, 30).tobytes()
        signature, name_size, extra_size = struct.unpack("<4s22x2H", header)
        if signature != b"PK\x03\x04":
            raise InputError(f"{self.path}: {name!r:.80}: expected a zip header, got none")
        return offset + 30 + name_size + extra_size

    def read(self, name: str) -> bytes:
        """Returns the bytes of an entry, after verifying its checksum."""
        return self.read_range(name, 0, self.entry(name).file_size).tobytes()

    def read_range(self, name: str, offset: int, size: int) -> np.ndarray:
        """Returns `size` bytes of an entry, as uint8; the first read verifies its checksum."""
        start, entry = self.data_offset(name), self.entry(name)
        data = file_io.read_range(self.path, start + offset, size)
        if name not in self.verified:
            crc = zlib.crc32(data.data)
            # The checksum covers the whole entry, so all of it is read here.
            if size != entry.file_size:
                crc = 0
                for at in range(0, entry.file_size, _BLOCK):
                    block_size = min(_BLOCK, entry.file_size - at)
                    block = file_io.read_range(self.path, start + at, block_size)
                    crc = zlib.crc32(block.data, crc)
            self._check_crc(name, crc)
        return data

    def _check_crc(self, name: str, crc: int) -> None:
        if crc != self.entry(name).CRC:
            raise InputError(
                f"{self.path}: {name!r:.80}: damaged: its checksum is wrong (or it was saved with"
                " torch.serialization.set_crc32_options(False))"
            )
        self.verified.add(name)


def _open_archive(path: epath.Path) -> _Archive:
    """Reads a zip's directory, and checks that each entry is stored plainly within the file."""
    file_bytes = path.stat().length
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        problem = "expected a file of torch.save, got something else"
        if start == b"PK\x03\x04":
            problem = "truncated: a file of torch.save without its end"
        elif start[:1] == b"\x80":
            problem = f"torch's format before 1.6: save it again with a newer torch: {_RESAVE}"
        raise InputError(f"{path}: {problem}") from error
    # All entries are in a top folder, which torch.save named after the file it wrote.
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InputError(
            f"{path}: expected a file of torch.save with one data.pkl, got {len(roots)}"
        )
    # The directory is untrusted: sizes are checked before anything is allocated.
    for name, info in entries.items():
        is_encrypted = info.flag_bits & 1
        if info.compress_type != zipfile.ZIP_STORED or is_encrypted:
            raise InputError(f"{path}: {name!r:.80}: expected an uncompressed, unencrypted entry")
        end = info.header_offset + 30 + info.compress_size  # 30: the smallest header
        if info.file_size != info.compress_size or info.header_offset < 0 or end > file_bytes:
            raise InputError(
                f"{path}: {name!r:.80}: damaged: the entry at byte {info.header_offset:,} with"
                f" {info.file_size:,} bytes is not within the file of {file_bytes:,} bytes"
            )
    entries = {name.removeprefix(roots[0]): info for name, info in entries.items()}
    if entries["data.pkl"].file_size > _MAX_PICKLE_BYTES:
        raise InputError(f"{path}: expected a pickle of at most {_MAX_PICKLE_BYTES:,} bytes")
    return _Archive(path, entries)


@dataclasses.dataclass(frozen=True)
class _Global:
    """Placeholder for a function or class that a pickle names; never called."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage: `size` values in the archive's entry `data/<key>`, which tensors are views of."""

    archive: _Archive
    key: str
    dtype: np.dtype
    size: int

    def read(self, offset: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
        """Reads a slice of a row-major array that starts `offset` values into the storage."""
        read = functools.partial(self.archive.read_range, f"data/{self.key}")
        return read_rows(read, offset * self.dtype.itemsize, shape, self.dtype, index)


class _Interpreter:
    """Executes the allowed operations of a pickle on a stack; see Lib/pickletools.py for each."""

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[int] = []
        # A dict, not a list: the index 2**32 of a malicious pickle must not allocate memory.
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        """Returns the pickled object: dicts, lists, tuples, scalars and `LazyArray`s."""
        argument: Any
        for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if number == _MAX_OPERATIONS:
                self.refuse(f"more than {_MAX_OPERATIONS:,} operations")
            name = operation.name
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name](argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name in _OPERATIONS:
                _OPERATIONS[name](self)
            elif name == "GLOBAL":
                self.push_global(argument.replace(" ", "."))  # genops joins module and name by ' '
            elif name not in ("PROTO", "FRAME", "STOP"):
                detail = f" of {argument}" if name == "INST" else ""
                self.refuse(f"pickle operation {name}{detail}")
        return self.stack[-1]

    def refuse(self, actual: str) -> NoReturn:
        """Raises an InputError that names what the pickle has besides tensors."""
        shown = actual if actual.isprintable() else ascii(actual)  # keeps the message on one line
        raise InputError(
            f"{self.archive.path}: expected a pickle of tensors only, got {shown:.200}"
        )

    def push_global(self, name: str) -> None:
        """Pushes a placeholder for a function or class; refuses all but `_GLOBALS`."""
        if name not in _GLOBALS:
            self.refuse(name)
        self.stack.append(_Global(name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self.refuse("a global without a name")
        self.push_global(f"{module}.{name}")

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            self.refuse(f"an item appended to a {_kind(self.stack[-1])}")
        self.stack[-1].extend(values)

    def set_items(self, pairs: list[Any]) -> None:
        keys, values = pairs[::2], pairs[1::2]
        if not isinstance(self.stack[-1], dict):
            self.refuse(f"an item set in a {_kind(self.stack[-1])}")
        # Only strings, because hashing a deeply nested tuple would overflow the C stack.
        if not all(type(key) is str for key in keys):
            self.refuse("a dict whose keys are not strings")
        for key, value in zip(keys, values, strict=True):
            if key in self.stack[-1]:
                self.refuse(f"the key {key!r:.100} twice")
            self.stack[-1][key] = value

    def build(self) -> None:
        """Drops the attributes of a dict, such as the `_metadata` of a state dict."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            self.refuse(f"attributes of a {_kind(self.stack[-1])}")

    def load_persistent(self) -> None:
        """Replaces a persistent id, ('storage', type, key, device, size), by its storage."""
        match self.stack.pop():
            case ("storage", _Global(name), str(key), str(), size) if (
                name in _STORAGES and file_io.is_count(size)
            ):
                dtype = _STORAGES[name]
            case other:
                self.refuse(f"a persistent id (a {_kind(other)}) that is not a known storage")
        num_bytes, entry = size * dtype.itemsize, self.archive.entry(f"data/{key}")
        if num_bytes != entry.file_size:
            raise InputError(
                f"{self.archive.path}: storage {key!r:.80}: expected {num_bytes:,} bytes,"
                f" got {entry.file_size:,}"
            )
        self.stack.append(_Storage(self.archive, key, dtype, size))

    def reduce(self) -> None:
        """Replaces a function and its arguments by the result; refuses all but three functions."""
        arguments, function = self.stack.pop(), self.stack.pop()
        match function, arguments:
            case _Global(name), () if name == _DICT:
                self.stack.append({})
            # The two arguments after the strides are `requires_grad` and hooks. A further argument
            # that is not empty marks a view that negates or conjugates its storage.
            case _Global(name), (_Storage() as storage, offset, shape, strides, _, _, *more) if (
                name == _TENSOR and more in ([], [None], [{}])
            ):
                self.stack.append(_make_tensor(storage, offset, shape, strides))
            case _Global(name), (LazyArray() as tensor, _, _) if name == _PARAMETER:
                self.stack.append(tensor)
            case _Global(name), _:
                self.refuse(f"unexpected arguments of {name}")
            case _:
                self.refuse(f"a call of a {_kind(function)}")


_CONSTANTS: dict[str, Callable[[Any], object]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        lambda argument: argument,
    ),
}
_OPERATIONS: dict[str, Callable[[_Interpreter], None]] = {
    "MEMOIZE": lambda it: it.memo.update({len(it.memo): it.stack[-1]}),
    "MARK": lambda it: it.marks.append(len(it.stack)),
    "TUPLE": lambda it: it.stack.append(tuple(it.pop_to_mark())),
    "TUPLE1": lambda it: it.stack.append(tuple(it.pop(1))),
    "TUPLE2": lambda it: it.stack.append(tuple(it.pop(2))),
    "TUPLE3": lambda it: it.stack.append(tuple(it.pop(3))),
    "APPEND": lambda it: it.append(it.pop(1)),
    "APPENDS": lambda it: it.append(it.pop_to_mark()),
    "SETITEM": lambda it: it.set_items(it.pop(2)),
    "SETITEMS": lambda it: it.set_items(it.pop_to_mark()),
    "BUILD": _Interpreter.build,
    "STACK_GLOBAL": _Interpreter.stack_global,
    "BINPERSID": _Interpreter.load_persistent,
    "REDUCE": _Interpreter.reduce,
}


def _make_tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> LazyArray:
    """Returns a tensor: a view of a storage, with offset and strides counted in values.

    Raises:
      InputError: an argument is not, or does not hold, integers >= 0; or the view exceeds the
        storage.
    """
    path, dtype = storage.archive.path, storage.dtype
    is_valid = (
        is_shape(shape)
        and type(strides) is tuple
        and all(map(file_io.is_count, (offset, *strides)))
    )
    if not is_valid:
        raise InputError(
            f"{path}: a tensor's offset, shape or strides: expected integers >= 0 that numpy can"
            " represent"
        )
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    # `count` is limited too, because a stride of 0 repeats values: a small storage could be
    # expanded to any amount of memory.
    if count > storage.size or (count and last >= storage.size):
        raise InputError(
            f"{path}: a tensor {shape!s:.80} with strides {strides!s:.80} and offset {offset:,}"
            f" exceeds its storage {storage.key!r:.80} of {storage.size:,} values"
        )
    if not count:
        return LazyArray(shape, dtype, lambda index: np.empty(shape, dtype)[index])
    # Of a contiguous tensor, only the requested rows are read; of a transposed one, only the
    # requested indices of the last axis. Of any other view, all values from its first to its last
    # are read.
    read = functools.partial(storage.read, offset)
    if _is_row_major(shape, strides):
        return LazyArray(shape, dtype, functools.partial(read, shape))
    if _is_row_major(shape[::-1], strides[::-1]):
        return LazyArray(shape[::-1], dtype, functools.partial(read, shape[::-1])).T
    span = last + 1 - offset
    # An axis of size 1 may have any stride, even one that overflows numpy's integers.
    byte_strides = tuple(
        stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)
    )

    def read_strided(index: Index) -> np.ndarray:
        data = read((span,), (slice(None),))
        view = np.lib.stride_tricks.as_strided(data, shape, byte_strides, writeable=False)
        return view[index].copy()

    return LazyArray(shape, dtype, read_strided)


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides, counted in values, are those of a contiguous row-major array."""
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True
