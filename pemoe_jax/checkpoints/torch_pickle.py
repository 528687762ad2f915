"""Files of torch.save (`pytorch_model.bin`), read without torch: tensors and nothing else.

<name>/data.pkl      a pickle: names, and of each tensor its storage, offset, shape and strides
<name>/data/<key>    a storage: little-endian values, neither compressed nor padded
<name>/byteorder     'little' or 'big'; older files lack it

A pickle is a program that may call anything. Nothing here runs it: the few operations that a dict
of tensors takes are followed step by step, on values of ours, and any other is refused.
"""

import dataclasses
import functools
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.checkpoints.safetensors_file import read_rows
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

_STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {_DICT, _TENSOR, _PARAMETER, *_STORAGES}

_MOST_PICKLE = 10_000_000  # bytes; T5-XXL's has 0.1 million
_MOST = 2**63  # of sizes, offsets and strides, in values
_RESAVE = "torch.save(torch.load(path, weights_only=True), path)"


def open_file(path: epath.Path) -> dict[str, LazyArray]:
    """Name -> array; reads the zip's directory and the pickle, and no tensor.

    Raises:
      InputError: no such file, not of torch.save's zip format, cut short, holds or asks for
        anything besides tensors by name, or has a tensor that reaches out of its storage.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    archive = _open_archive(path)
    if archive.read("byteorder", default=b"little") != b"little":
        raise InputError(f"{path}: expected little-endian values, found big-endian ones")
    try:
        found = _Pickle(archive).follow(archive.read("data.pkl"))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a pickle of tensors ({error!r:.200})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected tensors by name, found {_kind(found)}")
    for name, value in found.items():
        if not name.isprintable():
            raise InputError(f"{path}: expected names of one line, found {name!r:.80}")
        if not isinstance(value, LazyArray):
            raise InputError(f"{path}: {name!r:.80}: expected a tensor, found {_kind(value)}")
    return found


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, LazyArray) else type(value).__name__.lstrip("_")


@dataclasses.dataclass(frozen=True)
class _Archive:
    """A zip whose entries are read in ranges, which the standard library cannot.

    Attributes:
      path: of the file.
      root: of all names in it, with a '/'.
      entries: by name without the root.
    """

    path: epath.Path
    root: str
    entries: dict[str, zipfile.ZipInfo]

    def entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self.entries:
            raise InputError(f"{self.path}: expected an entry {name!r:.80}, found none")
        return self.entries[name]

    def start(self, name: str) -> int:
        """Of an entry's first byte in the file: behind a header that each entry has."""
        offset = self.entry(name).header_offset
        header = file_io.read_range(self.path, offset, 30).tobytes()
        signature, name_size, extra_size = struct.unpack("<4s22x2H", header)
        if signature != b"PK\x03\x04":
            raise InputError(f"{self.path}: {name!r:.80}: expected its zip header, found none")
        return offset + 30 + name_size + extra_size

    def read(self, name: str, default: bytes | None = None) -> bytes:
        if default is not None and name not in self.entries:
            return default
        return file_io.read_range(self.path, self.start(name), self.entry(name).file_size).tobytes()


def _open_archive(path: epath.Path) -> _Archive:
    length = path.stat().length
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise InputError(f"{path}: {_no_zip(path)}") from error
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{path}: expected a file of torch.save, found a zip without its data.pkl")
    for name, info in entries.items():
        end = info.header_offset + 30 + info.compress_size
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise InputError(f"{path}: {name!r:.80}: expected an entry that is not compressed")
        if info.file_size != info.compress_size or info.header_offset < 0 or end > length:
            raise InputError(
                f"{path}: {name!r:.80}: cut short: it speaks of {info.file_size:,} bytes,"
                f" the whole file has {length:,}"
            )
    within = {name.removeprefix(roots[0]): info for name, info in entries.items()}
    if within["data.pkl"].file_size > _MOST_PICKLE:
        raise InputError(f"{path}: expected a pickle of at most {_MOST_PICKLE:,} bytes")
    return _Archive(path, roots[0], within)


def _no_zip(path: epath.Path) -> str:
    """What is wrong with a file that cannot be opened as a zip."""
    with path.open("rb") as file:
        begins = file.read(4)
    if begins == b"PK\x03\x04":
        return "cut short: a file of torch.save without its end"
    if begins[:1] == b"\x80":
        return f"torch's old format, before 1.6: save it again with a newer torch: {_RESAVE}"
    return "expected a file of torch.save, found something else"


@dataclasses.dataclass(frozen=True)
class _Global:
    """Stands for a function or class that a pickle names; it can do nothing."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Values that tensors lie in.

    Attributes:
      key: the entry `data/<key>`.
      dtype: of a value.
      size: number of values.
    """

    key: str
    dtype: np.dtype
    size: int


class _Pickle:
    """Follows a pickle's operations on a stack, as the standard library's machine would.

    Source: Lib/pickletools.py, which describes every operation and splits a pickle into them.
    """

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def follow(self, data: bytes) -> Any:
        """What the pickle makes: dicts, lists, tuples, numbers, strings, and `Stored`."""
        argument: Any
        for operation, argument, _ in pickletools.genops(data):
            name = operation.name
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name](argument))
            elif name in _PUTS:
                self.memo[argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name in _OPERATIONS:
                _OPERATIONS[name](self)
            elif name in ("GLOBAL", "INST"):
                self.ask_for(argument.replace(" ", "."))
                if name == "INST":
                    self.refuse("an instance")
            elif name not in ("PROTO", "FRAME", "STOP"):
                self.refuse(f"pickle's operation {name}")
        return self.stack[-1]

    def refuse(self, what: str) -> None:
        what = what if what.isprintable() else ascii(what)  # one line, whatever it names
        raise InputError(
            f"{self.archive.path}: asks for {what:.200}: expected tensors and nothing else"
        )

    def ask_for(self, name: str) -> None:
        if name not in _GLOBALS:
            self.refuse(name)
        self.stack.append(_Global(name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self.refuse("a global without a name")
        self.ask_for(f"{module}.{name}")

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def to_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def join(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError("its stack is empty")
        parts = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(parts)

    def add(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            self.refuse(f"items of a {_kind(self.stack[-1])}")
        self.stack[-1].extend(values)

    def set(self, pairs: list[Any]) -> None:
        """Strings alone as keys: hashing a tuple that is nested deeply ends the interpreter."""
        names, values = pairs[::2], pairs[1::2]
        if not isinstance(self.stack[-1], dict) or not all(type(name) is str for name in names):
            self.refuse("a dict whose keys are no strings")
        self.stack[-1].update(zip(names, values, strict=True))

    def set_one(self) -> None:
        self.join(2)
        self.set(list(self.stack.pop()))

    def add_one(self) -> None:
        self.add([self.stack.pop()])

    def build(self) -> None:
        """A state dict's attribute `_metadata`, which nobody needs."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            self.refuse(f"attributes of a {_kind(self.stack[-1])}")

    def persistent(self) -> None:
        said = self.stack.pop()
        match said:
            case ("storage", _Global(name), str(key), str(), size) if (
                name in _STORAGES and _is_size(size)
            ):
                dtype = np.dtype(_STORAGES[name])
            case _:
                self.refuse(f"an object by the id of a {_kind(said)}, not of a storage,")
        needed, found = size * dtype.itemsize, self.archive.entry(f"data/{key}").file_size
        if needed != found:
            raise InputError(
                f"{self.archive.path}: storage {key!r:.80}: expected {needed:,} bytes,"
                f" found {found:,}"
            )
        self.stack.append(_Storage(key, dtype, size))

    def reduce(self) -> None:
        arguments, asked = self.stack.pop(), self.stack.pop()
        match asked, arguments:
            case _Global(name), () if name == _DICT:
                self.stack.append({})
            case _Global(name), (_Storage() as storage, offset, shape, strides, _, _, *more) if (
                name == _TENSOR and more in ([], [None], [{}])  # else: bits for conjugate, negative
            ):
                self.stack.append(_tensor(self.archive, storage, offset, shape, strides))
            case _Global(name), (LazyArray() as tensor, _, _) if name == _PARAMETER:
                self.stack.append(tensor)
            case _Global(name), _:
                self.refuse(f"{name} of something else than a tensor's parts")
            case _:
                self.refuse(f"a call of a {_kind(asked)}")


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
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
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")
_OPERATIONS: dict[str, Callable[[_Pickle], None]] = {
    "MEMOIZE": lambda it: it.memo.update({len(it.memo): it.stack[-1]}),
    "MARK": _Pickle.mark,
    "TUPLE": lambda it: it.stack.append(tuple(it.to_mark())),
    "TUPLE1": lambda it: it.join(1),
    "TUPLE2": lambda it: it.join(2),
    "TUPLE3": lambda it: it.join(3),
    "APPEND": _Pickle.add_one,
    "APPENDS": lambda it: it.add(it.to_mark()),
    "SETITEM": _Pickle.set_one,
    "SETITEMS": lambda it: it.set(it.to_mark()),
    "BUILD": _Pickle.build,
    "STACK_GLOBAL": _Pickle.stack_global,
    "BINPERSID": _Pickle.persistent,
    "REDUCE": _Pickle.reduce,
}


def _tensor(
    archive: _Archive, storage: _Storage, offset: Any, shape: Any, strides: Any
) -> LazyArray:
    """A tensor in a storage; offset and strides count values, strides are never negative."""
    path = archive.path
    for numbers in ((offset,), shape, strides):
        if type(numbers) is not tuple or not all(map(_is_size, numbers)):
            raise InputError(f"{path}: a tensor's offset, shape or strides are no numbers >= 0")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count > storage.size or (count and last >= storage.size):
        raise InputError(
            f"{path}: a tensor {shape!s:.80} with strides {strides!s:.80} from {offset:,} on"
            f" reaches out of its storage {storage.key!r:.80} of {storage.size:,} values"
        )
    if not count:
        return LazyArray(shape, storage.dtype, lambda index: np.empty(shape, storage.dtype)[index])
    rows = functools.partial(_read_rows, archive, storage, offset)
    if _is_contiguous(shape, strides):
        return LazyArray(shape, storage.dtype, functools.partial(rows, shape))
    if _is_contiguous(shape[::-1], strides[::-1]):
        return LazyArray(shape[::-1], storage.dtype, functools.partial(rows, shape[::-1])).T
    span = last + 1 - offset
    # of an axis of one the stride may be any number, too large for numpy even
    steps = tuple(
        step * storage.dtype.itemsize if n > 1 else 0
        for n, step in zip(shape, strides, strict=True)
    )

    def read(index: Index) -> np.ndarray:
        data = rows((span,), (slice(None),))
        return np.lib.stride_tricks.as_strided(data, shape, steps, writeable=False)[index].copy()

    return LazyArray(shape, storage.dtype, read)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < _MOST


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether values lie row after row; an axis of one may have any stride."""
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _read_rows(
    archive: _Archive, storage: _Storage, offset: int, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    start = archive.start(f"data/{storage.key}") + offset * storage.dtype.itemsize
    return read_rows(archive.path, start, shape, storage.dtype, index)
