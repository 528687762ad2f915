"""Reading files of torch.save without torch: files from goldens/make_hf_files.py, malicious files.

The malicious pickles are assembled operation by operation. A test checks that Python's unpickler
does execute them.
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
    arrays = torch_pickle.open_file(file_io.resolve(goldens / "tensors.bin"))
    assert arrays.keys() == expected.keys() and len(arrays) > 100
    assert {array.dtype for array in arrays.values()} >= {np.dtype(ml_dtypes.bfloat16)}
    rng = random.Random(0)
    for name, array in arrays.items():
        tensor = expected[name]
        assert array.dtype == tensor.dtype and array.shape == tensor.shape, name
        np.testing.assert_array_equal(array.read(), tensor, err_msg=name)
        np.testing.assert_array_equal(array.T.read(), tensor.T, err_msg=name)
        for _ in range(3):
            bounds = (sorted(rng.choices(range(n + 1), k=2)) for n in tensor.shape)
            index = tuple(slice(*pair) for pair in bounds)
            np.testing.assert_array_equal(array.read_slice(index), tensor[index], err_msg=name)


def test_pickle_protocol_4(goldens):
    arrays, expected = read(goldens / "protocol_4.bin"), read(goldens / "tensors.bin")
    assert arrays.keys() == {"table", "columns"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


def test_only_requested_rows_are_read(goldens, monkeypatch):
    array = torch_pickle.open_file(file_io.resolve(goldens / "tensors.bin"))["table"]
    array.read_slice((slice(0, 1), slice(0, 1)))  # the first read compares the storage's checksum
    sizes = []
    read_range = file_io.read_range
    monkeypatch.setattr(
        file_io, "read_range", lambda path, start, n: sizes.append(n) or read_range(path, start, n)
    )
    array.read_slice((slice(2, 4), slice(0, 1)))
    assert sizes == [30, 2 * 8 * 4]  # the entry's zip header, two of six rows


# --- Files assembled by hand. A pickle is a sequence of operations: a byte and its argument.

PROTOCOL, STOP, MARK, REDUCE, BUILD = b"\x80\x02", b".", b"(", b"R", b"b"
VALUES = np.arange(12, dtype=np.float32)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tuple_op(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + b"t"


def global_op(name: str) -> bytes:
    module, _, leaf = name.rpartition(".")
    return b"c" + f"{module}\n{leaf}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return global_op(name) + tuple_op(*arguments) + REDUCE


def storage(key: str = "0", size: int = 12, kind: str = "torch.FloatStorage") -> bytes:
    return tuple_op(text("storage"), global_op(kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(
    shape=(3, 4), strides=(4, 1), offset: int = 0, storage_op: bytes | None = None, *more: bytes
) -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if storage_op is None else storage_op,
        number(offset),
        tuple_op(*map(number, shape)),
        tuple_op(*map(number, strides)),
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


def test_valid_file_assembled_by_hand(tmp_path):
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


def check_refused(path: pathlib.Path, message: str) -> None:
    """Checks that opening a file raises a short message of one line that names the file."""
    with pytest.raises(InputError, match=message) as error:
        torch_pickle.open_file(file_io.resolve(path))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    assert len(str(error.value)) < 600


def attacks(command: str) -> dict[str, tuple[bytes, str]]:
    """Returns name -> (pickle that runs a command, expected message)."""
    system = f"{os.system.__module__}.system"
    python = f"__import__('os').system({command!r})"
    module, leaf = system.split(".")
    shell = text(command)
    stack_global = text("builtins") + text("eval") + b"\x93"
    return {
        "reduce": (call(system, shell), f"expected a pickle of tensors only, got {system}$"),
        "os.system": (call("os.system", shell), "got os.system"),
        "eval": (call("builtins.eval", text(python)), "got builtins.eval"),
        "stack_global": (stack_global + tuple_op(text(python)) + REDUCE, "got builtins.eval"),
        "stack_global from memo": (
            # stored in the memo, and loaded in another order
            text("eval")
            + b"q\x01"
            + text("builtins")
            + b"h\x01\x93"
            + tuple_op(text(python))
            + REDUCE,
            "got builtins.eval",
        ),
        "inst": (
            MARK + shell + f"i{module}\n{leaf}\n".encode(),
            f"got pickle operation INST of {module} {leaf}",
        ),
        "obj": (MARK + global_op(system) + shell + b"o", f"got {system}"),
        "newobj": (
            global_op("subprocess.Popen")
            + tuple_op(tuple_op(text("sh"), text("-c"), shell))
            + b"\x81",
            "got subprocess.Popen",
        ),
        "through torch": (
            call("torch.hub.load_state_dict_from_url", shell),
            "got torch.hub.load_state_dict_from_url",
        ),
        "through attributes": (
            call("operator.attrgetter", text("system")),
            "got operator.attrgetter",
        ),
    }


# Pickles that do no harm in Python's unpickler without torch, but are not dicts of tensors.
HARMLESS = {
    "a function of torch": (global_op("torch.load"), "got torch.load"),
    "a nested pickle": (call("torch.storage._load_from_bytes", text("x")), "got torch.storage"),
    "an unknown dtype": (
        tensor(storage_op=storage(kind="torch.ComplexFloatStorage")),
        "ComplexFloat",
    ),
    "a subclass": (call("torch._utils._rebuild_wrapper_subclass"), "_rebuild_wrapper_subclass"),
    "state in a function": (
        global_op("torch._utils._rebuild_tensor_v2") + b"}" + text("__code__") + b"Ns" + BUILD,
        "attributes of a Global",
    ),
    "state in a tensor": (tensor() + b"}" + BUILD, "attributes of a tensor"),
    "state in a class": (
        global_op("collections.OrderedDict") + b"}" + BUILD,
        "attributes of a Global",
    ),
    "INST of an allowed class": (MARK + b"icollections\nOrderedDict\n", "operation INST"),
    "OBJ of an allowed class": (
        MARK + global_op("collections.OrderedDict") + b"o",
        "operation OBJ",
    ),
    "NEWOBJ of an allowed class": (
        global_op("collections.OrderedDict") + b")\x81",
        "operation NEWOBJ",
    ),
    "an extension": (b"\x82\x01", "operation EXT1"),
    "a persistent id in text": (b"P0\n", "operation PERSID"),
    "a persistent id that is a number": (number(3) + b"Q", r"a persistent id \(a int\)"),
    "a persistent id of a persistent id": (
        tuple_op(storage(), global_op("torch.FloatStorage"), text("0"), text("cpu"), number(1))
        + b"Q",
        r"a persistent id \(a tuple\) that is not a known storage",
    ),
    "a key that is not a string": (
        tuple_op(text("storage"), global_op("torch.FloatStorage"), b"}", text("cpu"), number(12))
        + b"Q",
        r"a persistent id \(a tuple\) that is not a known storage",
    ),
    "a dtype by name": (
        tuple_op(text("storage"), text("torch.FloatStorage"), text("0"), text("cpu"), number(12))
        + b"Q",
        r"a persistent id \(a tuple\) that is not a known storage",
    ),
    "a dict as a storage type": (
        tensor(storage_op=storage(kind="collections.OrderedDict")),
        r"a persistent id \(a tuple\) that is not a known storage",
    ),
    "a tensor without a storage": (tensor(storage_op=text("0")), "unexpected arguments of"),
    "a parameter of a number": (
        call("torch._utils._rebuild_parameter", number(1), b"\x88", b"}"),
        "unexpected arguments of",
    ),
    "a negated view": (
        tensor((3, 4), (4, 1), 0, None, b"}" + text("neg") + b"\x88s"),
        "unexpected arguments of",
    ),
    "a call of a string": (text("os.system") + b")" + REDUCE, "a call of a str"),
    "newlines and terminal colors": (
        text("os\n\x1b[31mInputError") + text("system") + b"\x93",
        r"got 'os\\n\\x1b\[31mInputError.system'",
    ),
    "a long name": (text("o" * 5000) + text("system") + b"\x93", "got ooo"),
    "a number as a name": (number(1) + text("system") + b"\x93", "a global without a name"),
    "a huge memo index": (b"r\xff\xff\xff\xff", "not a pickle of tensors"),
    "a string that exceeds the file": (b"X\xff\xff\xff\x7fabc", "not a pickle of tensors"),
    "a long string that exceeds the file": (
        b"\x8d" + b"\xff" * 7 + b"\x7f",
        "not a pickle of tensors",
    ),
    "an empty stack": (b"\x87", "not a pickle of tensors"),
    "no mark": (b"t", "not a pickle of tensors"),
    "an unknown operation": (b"\xff", "not a pickle of tensors"),
    "an item of a list by key": (
        b"]" + text("a") + b"Ns",
        "an item set in a list",
    ),
    "an item appended to a dict": (b"}Na", "an item appended to a dict"),
    "keys nested deeply": (
        b"}" + b")" + b"\x85" * 200_000 + b"Ns",
        "a dict whose keys are not strings",
    ),
    "sizes nested deeply": (
        tensor(storage_op=storage(), shape=()).replace(b"(t", b")" + b"\x85" * 200_000, 1),
        "offset, shape or strides",
    ),
    "no dict": (tensor(), "expected a dict of tensors, got tensor"),
    "a dict in it": (state(b"}"), "'a': expected a tensor, got dict"),
    "a number in it": (state(number(3)), "'a': expected a tensor, got int"),
    "a storage in it": (state(storage()), "'a': expected a tensor, got Storage"),
    "a name with a newline": (
        state(tensor(), text("a\nb")),
        r"expected printable names, got 'a\\nb'",
    ),
    "a global in it": (
        state(global_op("torch.FloatStorage")),
        "'a': expected a tensor, got Global",
    ),
}
EXCEEDING = {
    "one value too many": tensor((13,), (1,)),
    "an offset": tensor(offset=1),
    "an offset beyond": tensor((1,), (1,), 12),
    "a stride": tensor((3, 4), (5, 1)),
    "huge strides": tensor((2, 2), (2**62, 2**62)),
    "a value many times": tensor((2**40,), (0,)),
}
MALFORMED = {
    "a negative offset": tensor(offset=-1),
    "a negative size": tensor((-3, -4), (4, 1)),
    "a negative stride": tensor((3, 4), (-4, 1), 8),
    "a huge product": tensor((2**62, 2**62), (0, 0)),
    "too many axes": tensor((1,) * 100, (1,) * 100),
    "an integer beyond 64 bits": tensor((3, 4), (4, 1), 2**2000),
    "a float": tensor(offset=0).replace(number(0), b"G" + b"\0" * 8, 1),
    "a boolean": tensor(offset=0).replace(b"K\x00", b"\x88", 1),
}


@pytest.mark.parametrize("name", attacks(""))
def test_nothing_is_executed(name, tmp_path):
    marker = tmp_path / "executed"
    body, message = attacks(f"touch {marker}")[name]
    for path in (write(tmp_path / "a.bin", body), write(tmp_path / "b.bin", state(body))):
        check_refused(path, message)
        assert not marker.exists()


# The other attacks only name a function; they need packages or arguments to run it.
EXECUTED = ("reduce", "os.system", "eval", "stack_global", "stack_global from memo", "inst", "obj")


@pytest.mark.parametrize("name", EXECUTED)
def test_python_unpickler_executes_it(name, tmp_path):
    """Checks the tests above: the pickles are valid, and would run the command."""
    marker = tmp_path / "executed"
    pickle.loads(PROTOCOL + attacks(f"touch {marker}")[name][0] + STOP)
    assert marker.exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_refused_pickles(name, tmp_path):
    body, message = HARMLESS[name]
    check_refused(write(tmp_path / "a.bin", body), message)


@pytest.mark.parametrize("name", EXCEEDING)
def test_tensor_exceeds_its_storage(name, tmp_path):
    check_refused(
        write(tmp_path / "a.bin", state(EXCEEDING[name])), "exceeds its storage '0' of 12"
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_invalid_sizes(name, tmp_path):
    check_refused(
        write(tmp_path / "a.bin", state(MALFORMED[name])),
        "offset, shape or strides: expected integers",
    )


def test_a_damaged_pickle_is_not_read(tmp_path):
    """A flipped bit in a name or an offset would be a pickle of other tensors."""
    path = write(tmp_path / "a.bin", state(tensor()))
    data = path.read_bytes()
    position = data.index(PROTOCOL + state(tensor())[:1]) + len(PROTOCOL)
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    check_refused(path, "'data.pkl': damaged: its checksum is wrong")


def test_strides_and_axes_differ_in_number(tmp_path):
    check_refused(write(tmp_path / "a.bin", state(tensor((3, 4), (4,)))), "not a pickle of tensors")


@pytest.mark.parametrize("size", [11, 13, 2**62])
def test_storage_of_wrong_size(size, tmp_path):
    body = state(tensor(storage_op=storage(size=size)))
    check_refused(
        write(tmp_path / "a.bin", body), f"storage '0': expected {4 * size:,} bytes, got 48"
    )


@pytest.mark.parametrize("key", ["1", "../0", "/etc/passwd", "", "x\ny"])
def test_missing_storage(key, tmp_path):
    check_refused(
        write(tmp_path / "a.bin", state(tensor(storage_op=storage(key)))),
        "expected an entry 'data/",
    )


def test_compressed_entries(tmp_path):
    path = write(tmp_path / "a.bin", state(tensor()), compression=zipfile.ZIP_DEFLATED)
    check_refused(path, "expected an uncompressed, unencrypted entry")


def test_big_endian(tmp_path):
    path = write(tmp_path / "a.bin", state(tensor()), {"byteorder": b"big"})
    check_refused(path, "expected little-endian values")
    path = write(tmp_path / "a.bin", state(tensor()), {"byteorder": b"little"})
    np.testing.assert_array_equal(read(path)["a"], VALUES.reshape(3, 4))


def test_format_before_torch_1_6(goldens):
    check_refused(goldens / "old_format.bin", r"before 1.6: save it again .*weights_only=True")


def test_other_files(tmp_path):
    check_refused(tmp_path / "none.bin", "no such file")
    for data in (b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "a.bin").write_bytes(data)
        check_refused(tmp_path / "a.bin", "expected a file of torch.save, got something else")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/b", "")
    check_refused(tmp_path / "a.zip", "a file of torch.save with one data.pkl, got 0")


def test_entry_longer_than_the_file(tmp_path):
    """The zip directory at the end of the file may claim any size."""
    path = write(tmp_path / "a.bin", state(tensor(storage_op=storage(size=2**20))))
    data = path.read_bytes()
    entry = data.rindex(b"model/data/0") - 46  # in the directory: sizes at 20 and 24
    size = struct.pack("<I", 4 * 2**20)
    path.write_bytes(data[: entry + 20] + size + size + data[entry + 28 :])
    check_refused(path, "damaged: the entry at byte .* with 4,194,304 bytes is not within the file")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(fraction, goldens, tmp_path):
    data = (goldens / "tensors.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[: int(fraction * len(data))])
    check_refused(tmp_path / "a.bin", "truncated: a file of torch.save without its end")


def test_damaged_files(goldens, tmp_path):
    """With random bytes changed, a file is read or refused with one line; nothing else happens."""
    rng = random.Random(0)
    original = (goldens / "protocol_4.bin").read_bytes()
    path = tmp_path / "a.bin"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            read(path)
            outcomes["read"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 40, outcomes


def test_a_changed_value_is_noticed(tmp_path):
    """By the zip's checksum, whichever rows are read."""
    path = write(tmp_path / "a.bin", state(tensor()))
    content = bytearray(path.read_bytes())
    content[content.index(VALUES.tobytes()) + 1] ^= 1
    path.write_bytes(content)
    array = torch_pickle.open_file(file_io.resolve(path))["a"]
    for index in ((slice(0, 3), slice(0, 4)), (slice(2, 3), slice(0, 4))):
        with pytest.raises(InputError, match=r"a\.bin: 'data/0': damaged: its checksum is wrong"):
            array.read_slice(index)


def test_a_pickle_of_many_operations(tmp_path):
    path = write(tmp_path / "a.bin", b"}" + b"N" * 600_000)
    check_refused(path, "tensors only, got more than 500,000 operations")
