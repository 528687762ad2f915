"""Files of torch.save, read without torch: those of goldens/make_hf_files.py, and malicious ones.

The malicious pickles are put together operation by operation; that each would do its mischief in
Python's own unpickler is tested too.
"""

import os
import pathlib
import pickle
import random
import struct
import zipfile

import archives
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pemoe_jax.checkpoints import torch_pickle
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io


@pytest.fixture(scope="module")
def goldens(tmp_path_factory) -> pathlib.Path:
    return archives.unpack("hf_files", tmp_path_factory.mktemp("hf_files"))


def read(path) -> dict[str, np.ndarray]:
    return {
        name: array.read() for name, array in torch_pickle.open_file(file_io.resolve(path)).items()
    }


def test_tensors_of_all_types_shapes_and_strides(goldens):
    expected = safetensors.numpy.load_file(goldens / "tensors.safetensors")
    found = torch_pickle.open_file(file_io.resolve(goldens / "tensors.bin"))
    assert found.keys() == expected.keys() and len(found) > 100
    assert {array.dtype for array in found.values()} >= {np.dtype(ml_dtypes.bfloat16)}
    draw = random.Random(0)
    for name, array in found.items():
        want = expected[name]
        assert array.dtype == want.dtype and array.shape == want.shape, name
        np.testing.assert_array_equal(array.read(), want, err_msg=name)
        np.testing.assert_array_equal(array.T.read(), want.T, err_msg=name)
        for _ in range(3):
            ends = (sorted(draw.choices(range(n + 1), k=2)) for n in want.shape)
            index = tuple(slice(*pair) for pair in ends)
            np.testing.assert_array_equal(array.read_slice(index), want[index], err_msg=name)


def test_a_later_pickle_protocol(goldens):
    found, expected = read(goldens / "protocol_4.bin"), read(goldens / "tensors.bin")
    assert found.keys() == {"table", "columns"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def test_nothing_is_read_but_what_is_asked_for(goldens, monkeypatch):
    array = torch_pickle.open_file(file_io.resolve(goldens / "tensors.bin"))["table"]
    sizes = []
    whole = file_io.read_range
    monkeypatch.setattr(file_io, "read_range", lambda p, o, n: sizes.append(n) or whole(p, o, n))
    array.read_slice((slice(2, 4), slice(0, 1)))
    assert sizes == [30, 2 * 8 * 4]  # the entry's header, two rows of the six


# What follows is written by hand. A pickle is a row of operations, each a letter and its argument.

PROTOCOL, STOP, MARK, REDUCE, BUILD = b"\x80\x02", b".", b"(", b"R", b"b"
VALUES = np.arange(12, dtype=np.float32)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tuple_of(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + b"t"


def named(name: str) -> bytes:
    module, _, leaf = name.rpartition(".")
    return b"c" + f"{module}\n{leaf}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + tuple_of(*arguments) + REDUCE


def storage(key: str = "0", size: int = 12, kind: str = "torch.FloatStorage") -> bytes:
    return tuple_of(text("storage"), named(kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(
    shape=(3, 4), strides=(4, 1), offset: int = 0, held: bytes | None = None, *more: bytes
) -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if held is None else held,
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, strides)),
        b"\x89",
        call("collections.OrderedDict"),
        *more,
    )


def state(value: bytes, key: bytes = text("a")) -> bytes:
    return b"}" + key + value + b"s"


def write(
    path: pathlib.Path, body: bytes, entries: dict | None = None, compression=zipfile.ZIP_STORED
) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", PROTOCOL + body + STOP)
        for name, data in {"data/0": VALUES.tobytes(), **(entries or {})}.items():
            archive.writestr(f"model/{name}", data)
    return path


def test_a_good_file_put_together_by_hand(tmp_path):
    table = VALUES.reshape(3, 4)
    for body, expected in (
        (tensor(), table),
        (tensor((4, 3), (1, 4)), table.T),
        (tensor((2, 2), (4, 2), 5), table[1:, 1::2]),
        (tensor((3, 1), (4, 2**40)), table[:, :1]),
        (tensor((3, 4), (4, 1), 0, None, b"}"), table),
        (call("torch._utils._rebuild_parameter", tensor(), b"\x88", b"}"), table),
    ):
        path = write(tmp_path / "a.bin", state(body) + state(b"}", text("_metadata")) + BUILD)
        np.testing.assert_array_equal(read(path)["a"], expected)


def refused(path: pathlib.Path, message: str) -> None:
    """Opening raises one line."""
    with pytest.raises(InputError, match=message) as error:
        torch_pickle.open_file(file_io.resolve(path))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    assert len(str(error.value)) < 600


def attacks(command: str) -> dict[str, tuple[bytes, str]]:
    """By name: what a pickle does beside its tensors, and what the error says."""
    system = f"{os.system.__module__}.system"
    python = f"__import__('os').system({command!r})"
    module, leaf = system.split(".")
    shell = text(command)
    stack_global = text("builtins") + text("eval") + b"\x93"
    return {
        "reduce": (call(system, shell), f"asks for {system}: expected tensors and nothing else"),
        "os.system": (call("os.system", shell), "asks for os.system"),
        "eval": (call("builtins.eval", text(python)), "asks for builtins.eval"),
        "stack_global": (stack_global + tuple_of(text(python)) + REDUCE, "asks for builtins.eval"),
        "stack_global from memo": (
            # put away, and taken back in another order
            text("eval")
            + b"q\x01"
            + text("builtins")
            + b"h\x01\x93"
            + tuple_of(text(python))
            + REDUCE,
            "asks for builtins.eval",
        ),
        "inst": (MARK + shell + f"i{module}\n{leaf}\n".encode(), f"asks for {system}"),
        "obj": (MARK + named(system) + shell + b"o", f"asks for {system}"),
        "newobj": (
            named("subprocess.Popen") + tuple_of(tuple_of(text("sh"), text("-c"), shell)) + b"\x81",
            "asks for subprocess.Popen",
        ),
        "by way of torch": (
            call("torch.hub.load_state_dict_from_url", shell),
            "asks for torch.hub.load_state_dict_from_url",
        ),
        "by way of attributes": (
            call("operator.attrgetter", text("system")),
            "asks for operator.attrgetter",
        ),
    }


HARMLESS = {  # to Python's unpickler without torch, but not what a file of tensors holds
    "a function of torch's": (named("torch.load"), "asks for torch.load"),
    "loaded inside": (call("torch.storage._load_from_bytes", text("x")), "asks for torch.storage"),
    "an unknown type": (tensor(held=storage(kind="torch.ComplexFloatStorage")), "ComplexFloat"),
    "a subclass": (call("torch._utils._rebuild_wrapper_subclass"), "_rebuild_wrapper_subclass"),
    "state in a function": (
        named("torch._utils._rebuild_tensor_v2") + b"}" + text("__code__") + b"Ns" + BUILD,
        "attributes of a Global",
    ),
    "state in a tensor": (tensor() + b"}" + BUILD, "attributes of a tensor"),
    "state in a class": (named("collections.OrderedDict") + b"}" + BUILD, "attributes of a Global"),
    "an instance of ours": (MARK + b"icollections\nOrderedDict\n", "an instance"),
    "obj of ours": (MARK + named("collections.OrderedDict") + b"o", "operation OBJ"),
    "newobj of ours": (named("collections.OrderedDict") + b")\x81", "operation NEWOBJ"),
    "an extension": (b"\x82\x01", "operation EXT1"),
    "an id in text": (b"P0\n", "operation PERSID"),
    "an id that is a number": (number(3) + b"Q", "an object by the id of a int"),
    "an id of ids": (
        tuple_of(storage(), named("torch.FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q",
        "an object by the id of a tuple",
    ),
    "a key that is no text": (
        tuple_of(text("storage"), named("torch.FloatStorage"), b"}", text("cpu"), number(12))
        + b"Q",
        "an object by the id of a tuple",
    ),
    "a type by name": (
        tuple_of(text("storage"), text("torch.FloatStorage"), text("0"), text("cpu"), number(12))
        + b"Q",
        "an object by the id of a tuple",
    ),
    "a dict as a storage type": (
        tensor(held=storage(kind="collections.OrderedDict")),
        "an object by the id of a tuple",
    ),
    "a tensor without a storage": (tensor(held=text("0")), "something else than a tensor's parts"),
    "a parameter of a number": (
        call("torch._utils._rebuild_parameter", number(1), b"\x88", b"}"),
        "something else than a tensor's parts",
    ),
    "a negated view": (
        tensor((3, 4), (4, 1), 0, None, b"}" + text("neg") + b"\x88s"),
        "something else than a tensor's parts",
    ),
    "a call of text": (text("os.system") + b")" + REDUCE, "a call of a str"),
    "lines and colours": (
        text("os\n\x1b[31mInputError") + text("system") + b"\x93",
        r"asks for 'os\\n\\x1b\[31mInputError.system'",
    ),
    "a long name": (text("o" * 5000) + text("system") + b"\x93", "asks for ooo"),
    "a number as a name": (number(1) + text("system") + b"\x93", "a global without a name"),
    "a name put away far off": (b"r\xff\xff\xff\xff", "not a pickle of tensors"),
    "a text beyond the end": (b"X\xff\xff\xff\x7fabc", "not a pickle of tensors"),
    "a long text beyond the end": (b"\x8d" + b"\xff" * 7 + b"\x7f", "not a pickle of tensors"),
    "an empty stack": (b"\x87", "not a pickle of tensors"),
    "no mark": (b"t", "not a pickle of tensors"),
    "no operation": (b"\xff", "not a pickle of tensors"),
    "keys nested deeply": (
        b"}" + b")" + b"\x85" * 200_000 + b"Ns",
        "a dict whose keys are no strings",
    ),
    "sizes nested deeply": (
        tensor(held=storage(), shape=()).replace(b"(t", b")" + b"\x85" * 200_000, 1),
        "offset, shape or strides",
    ),
    "no dict": (tensor(), "expected tensors by name, found tensor"),
    "a dict in it": (state(b"}"), "'a': expected a tensor, found dict"),
    "a number in it": (state(number(3)), "'a': expected a tensor, found int"),
    "a storage in it": (state(storage()), "'a': expected a tensor, found Storage"),
    "a name of two lines": (
        state(tensor(), text("a\nb")),
        r"expected names of one line, found 'a\\nb'",
    ),
    "a global in it": (state(named("torch.FloatStorage")), "'a': expected a tensor, found Global"),
}
OUTSIDE = {
    "one value too many": tensor((13,), (1,)),
    "an offset": tensor(offset=1),
    "an offset beyond": tensor((1,), (1,), 12),
    "a stride": tensor((3, 4), (5, 1)),
    "huge strides": tensor((2, 2), (2**62, 2**62)),
    "a value many times": tensor((2**40,), (0,)),
    "a huge product": tensor((2**62, 2**62), (0, 0)),
}
MALFORMED = {
    "a negative offset": tensor(offset=-1),
    "a negative size": tensor((-3, -4), (4, 1)),
    "a negative stride": tensor((3, 4), (-4, 1), 8),
    "a number beyond 64 bits": tensor((3, 4), (4, 1), 2**2000),
    "a number with a point": tensor(offset=0).replace(number(0), b"G" + b"\0" * 8, 1),
    "a truth": tensor(offset=0).replace(b"K\x00", b"\x88", 1),
}


@pytest.mark.parametrize("name", attacks(""))
def test_nothing_is_executed(name, tmp_path):
    mark = tmp_path / "executed"
    body, message = attacks(f"touch {mark}")[name]
    for path in (write(tmp_path / "a.bin", body), write(tmp_path / "b.bin", state(body))):
        refused(path, message)
        assert not mark.exists()


# The others only show what they ask for.
EXECUTED = ("reduce", "os.system", "eval", "stack_global", "stack_global from memo", "inst", "obj")


@pytest.mark.parametrize("name", EXECUTED)
def test_python_would_execute_it(name, tmp_path):
    """The test of the test: the pickles are right, and none fails for a reason of its own."""
    mark = tmp_path / "executed"
    pickle.loads(PROTOCOL + attacks(f"touch {mark}")[name][0] + STOP)
    assert mark.exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_but_tensors(name, tmp_path):
    body, message = HARMLESS[name]
    refused(write(tmp_path / "a.bin", body), message)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tensor_that_reaches_out_of_its_storage(name, tmp_path):
    refused(write(tmp_path / "a.bin", state(OUTSIDE[name])), "reaches out of its storage '0' of 12")


@pytest.mark.parametrize("name", MALFORMED)
def test_numbers_that_no_tensor_has(name, tmp_path):
    refused(write(tmp_path / "a.bin", state(MALFORMED[name])), "offset, shape or strides are no")


def test_as_many_strides_as_axes(tmp_path):
    refused(write(tmp_path / "a.bin", state(tensor((3, 4), (4,)))), "not a pickle of tensors")


@pytest.mark.parametrize("size", [11, 13, 2**62])
def test_a_storage_of_another_size(size, tmp_path):
    body = state(tensor(held=storage(size=size)))
    refused(write(tmp_path / "a.bin", body), f"storage '0': expected {4 * size:,} bytes, found 48")


@pytest.mark.parametrize("key", ["1", "../0", "/etc/passwd", "", "x\ny"])
def test_a_storage_that_is_not_there(key, tmp_path):
    refused(write(tmp_path / "a.bin", state(tensor(held=storage(key)))), "expected an entry 'data/")


def test_compressed_entries(tmp_path):
    path = write(tmp_path / "a.bin", state(tensor()), compression=zipfile.ZIP_DEFLATED)
    refused(path, "expected an entry that is not compressed")


def test_the_other_byte_order(tmp_path):
    path = write(tmp_path / "a.bin", state(tensor()), {"byteorder": b"big"})
    refused(path, "expected little-endian values")
    path = write(tmp_path / "a.bin", state(tensor()), {"byteorder": b"little"})
    np.testing.assert_array_equal(read(path)["a"], VALUES.reshape(3, 4))


def test_the_old_format(goldens):
    refused(goldens / "old_format.bin", r"before 1.6: save it again .*weights_only=True")


def test_no_file_of_torch(tmp_path):
    refused(tmp_path / "none.bin", "no such file")
    for data in (b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "a.bin").write_bytes(data)
        refused(tmp_path / "a.bin", "expected a file of torch.save, found something else")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/b", "")
    refused(tmp_path / "a.zip", "a zip without its data.pkl")


def test_an_entry_longer_than_the_file(tmp_path):
    """The directory at the file's end says how long entries are: each may lie."""
    path = write(tmp_path / "a.bin", state(tensor(held=storage(size=2**20))))
    data = path.read_bytes()
    entry = data.rindex(b"model/data/0") - 46  # in the directory: sizes at 20 and 24
    size = struct.pack("<I", 4 * 2**20)
    path.write_bytes(data[: entry + 20] + size + size + data[entry + 28 :])
    refused(path, "cut short: it speaks of 4,194,304 bytes")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short(share, goldens, tmp_path):
    data = (goldens / "tensors.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[: int(share * len(data))])
    refused(tmp_path / "a.bin", "cut short: a file of torch.save without its end")


def test_damaged_files(goldens, tmp_path):
    """Bytes at random: each file is read or refused in one line, in no other way."""
    draw = random.Random(0)
    whole = (goldens / "protocol_4.bin").read_bytes()
    path = tmp_path / "a.bin"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.choice((0, 1, 0x7F, 0xFF, draw.randrange(256)))
        path.write_bytes(data)
        try:
            read(path)
            outcomes["read"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes
