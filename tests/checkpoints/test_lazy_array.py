"""Lazy arrays: slices, dtypes, shardings, memory use and errors; safetensors files."""

import gc
import json
import struct
import threading
import time
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pemoe_jax.checkpoints import device_arrays, lazy_array, safetensors_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import params
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import checksums, file_io

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/kernel": RNG.standard_normal((8, 6)).astype(np.float32),
    "a/scale": RNG.standard_normal(5).astype(np.float32),
    "b/kernel": RNG.standard_normal((4, 3)).astype(np.float32).T,  # not contiguous
}


def target(**options) -> dict:
    return params.unflatten(
        {k: jax.ShapeDtypeStruct(v.shape, jnp.float32, **options) for k, v in ARRAYS.items()}
    )


def sources() -> dict[str, LazyArray]:
    return {name: lazy_array.from_numpy(array) for name, array in ARRAYS.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy_array") / "x.safetensors"
    contiguous = {k: np.ascontiguousarray(v) for k, v in ARRAYS.items()}
    half = {"half": ARRAYS["a/kernel"].astype(ml_dtypes.bfloat16), "one": np.float32(3)}
    safetensors.numpy.save_file(
        {**contiguous, **{k: np.asarray(v) for k, v in half.items()}}, path, metadata={"k": "v"}
    )
    return path


def test_slices_of_a_file(file):
    """Slices of arrays and of their transposes; scalars; bfloat16."""
    arrays, metadata = safetensors_file.open_file(file_io.resolve(file))
    assert metadata == {"k": "v"}
    array, whole = arrays["a/kernel"], ARRAYS["a/kernel"]
    np.testing.assert_array_equal(array.read(), whole)
    np.testing.assert_array_equal(array.T.read(), whole.T)
    assert array.T.shape == (6, 8) and array.nbytes == 8 * 6 * 4
    for index in ((slice(2, 5), slice(None)), (slice(None), slice(1, 4)), (slice(7, 8), slice(0))):
        np.testing.assert_array_equal(array.read_slice(index), whole[index])
        np.testing.assert_array_equal(array.T.read_slice(index[::-1]), whole[index].T)
    assert arrays["one"].read() == 3 and arrays["one"].shape == ()
    assert arrays["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(arrays["half"].read(), whole.astype(ml_dtypes.bfloat16))


def test_only_requested_rows_are_read(file, monkeypatch):
    sizes = []
    read_range = file_io.read_range
    array = safetensors_file.open_file(file_io.resolve(file))[0]["a/kernel"]
    monkeypatch.setattr(
        file_io, "read_range", lambda *args: sizes.append(args[2]) or read_range(*args)
    )
    array.read_slice((slice(3, 5), slice(0, 2)))
    assert sizes == [2 * 6 * 4]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load(dtype):
    cast = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), target())
    loaded = params.flatten(device_arrays.load_arrays(sources(), cast, "x"))
    assert loaded.keys() == ARRAYS.keys()
    for name, leaf in loaded.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, jnp.asarray(ARRAYS[name]).astype(dtype))


def test_load_onto_a_mesh():
    """Each device's part is read once, and a replicated array is read once."""
    indices: list[tuple] = []

    def counted(array: np.ndarray) -> LazyArray:
        def read_slice(index):
            indices.append(index)
            return array[index]

        return LazyArray(array.shape, array.dtype, read_slice)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 2
    for spec, parts in ((PartitionSpec(), 1), (PartitionSpec("data"), 2)):
        indices.clear()
        sharding = NamedSharding(mesh, spec)
        array = ARRAYS["a/kernel"]
        targets = {"k": jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=sharding)}
        leaf = device_arrays.load_arrays({"k": counted(array)}, targets, "x")["k"]
        assert leaf.sharding == sharding and len(indices) == parts
        np.testing.assert_array_equal(leaf, array)


def test_reading_ahead_stays_within_the_largest_array():
    """Concurrent reads take at most the bytes of the largest array; small reads overlap."""
    sizes = [10, 20, 200, 30, 40, 50, 60, 200, 10, 90, 90]
    lock = threading.Lock()
    current, peak, overlaps = 0, 0, 0

    def source(size: int) -> LazyArray:
        def read_slice(index):
            nonlocal current, peak, overlaps
            with lock:
                current += 4 * size
                peak = max(peak, current)
                overlaps += current > 4 * size
            time.sleep(0.01)
            with lock:
                current -= 4 * size
            return np.full(size, size, np.float32)[index]

        return LazyArray((size,), np.dtype(np.float32), read_slice)

    arrays = {f"{i:02}": source(size) for i, size in enumerate(sizes)}
    targets = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in arrays.items()}
    loaded = device_arrays.load_arrays(arrays, targets, "x")
    assert [leaf.shape[0] for leaf in loaded.values()] == sizes
    assert [float(leaf[0]) for leaf in loaded.values()] == sizes
    assert peak <= 4 * max(sizes)
    assert overlaps > 0


def test_groups_of_arrays():
    sizes = {"a": 9, "b": 4, "c": 3, "d": 3, "e": 0, "f": 10}
    groups = list(device_arrays._group(sizes, 10))
    assert groups == [["a"], ["b", "c", "d", "e"], ["f"]]
    assert list(device_arrays._group(sizes, 0)) == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]
    assert list(device_arrays._group({}, 10)) == []


def test_host_copies_are_freed_before_the_next_read():
    """On accelerators: here `transform` drops the jax arrays, whose memory may be the host's."""
    buffers: list[weakref.ref[np.ndarray]] = []

    def source(size: int) -> LazyArray:
        def read_slice(index):
            assert not any(buffer() is not None for buffer in buffers)
            values = np.ones(size, np.float32)
            buffers.append(weakref.ref(values))
            return values[index]

        return LazyArray((size,), np.dtype(np.float32), read_slice)

    arrays = {f"{i}": source(1000 - i) for i in range(3)}
    targets = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in arrays.items()}
    device_arrays.load_arrays(arrays, targets, "x", transform=lambda *_: gc.collect())
    assert len(buffers) == 3


def test_an_error_cancels_the_other_reads():
    started = []

    def broken(index):
        raise InputError("x/b: truncated")

    def slow(index):
        started.append(index)
        time.sleep(0.01)
        return np.zeros(1000, np.float32)[index]

    shape, dtype = (1000,), np.dtype(np.float32)
    arrays = {f"{i}": LazyArray(shape, dtype, slow if i else broken) for i in range(50)}
    targets = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k in arrays}
    with pytest.raises(InputError, match="x/b: truncated"):
        device_arrays.load_arrays(arrays, targets, "x")
    assert len(started) < 25


def test_names_and_shapes_are_checked_before_reading():
    def fail(index):
        raise AssertionError("read")

    arrays = {name: LazyArray(a.shape, a.dtype, fail) for name, a in ARRAYS.items()}
    del arrays["a/scale"]
    arrays["b/kernel"] = arrays["b/kernel"].T
    arrays["c"] = arrays["a/kernel"]
    with pytest.raises(InputError) as caught:
        device_arrays.load_arrays(arrays, target(), "the file")
    assert str(caught.value) == (
        "the file does not fit the model's 3 parameters: 1 missing: a/scale. 1 extra: c."
        " 1 of another shape: b/kernel: expected (3, 4), got (4, 3)"
    )


def test_nan_is_refused():
    arrays = sources()
    bad = ARRAYS["a/kernel"].copy()
    bad[3, 2] = np.nan
    arrays["a/kernel"] = lazy_array.from_numpy(bad)
    with pytest.raises(InputError, match="the file: a/kernel holds NaN or infinity"):
        device_arrays.load_arrays(arrays, target(), "the file")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "truncated: its header describes 712 bytes, the file has 702"),
        (lambda data: data + b"x", "too long: its header describes 712 bytes"),
        (lambda data: data[:20], "truncated, or not a safetensors file"),
        (lambda data: data[:3], "got 3 bytes"),
        (lambda data: b"<html>not found</html>", "not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "not a safetensors file"),
        (lambda data: data.replace(b'"F32"', b'"C64"'), "expected a dtype of .*, got C64"),
        (
            lambda data: data.replace(b"[8,6]", b"[8,7]"),
            r"\(8, 7\): expected 224 bytes, but the header has 192",
        ),
        (lambda data: data.replace(b"[8,6]", b'"86"'), "not a safetensors file"),
    ],
)
def test_damaged_files(file, tmp_path, damage, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        safetensors_file.open_file(file_io.resolve(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"a": ([2], 0, 8), "b": ([2], 4, 12)},
            "'b': expected to start at byte 8, but the header has 4: it overlaps",
        ),
        ({"a": ([2], 0, 8), "b": ([2], 0, 8)}, "but the header has 0: it overlaps"),
        (
            {"a": ([2], 0, 8), "b": ([2], 12, 20)},
            "to start at byte 8, but the header has 12: it has a gap",
        ),
        ({"a": ([2], 4, 12)}, "but the header has 4: it has a gap"),
        ({"a": ([2**62] * 300_000, 0, 8)}, "too large"),
        ({"a": ([2**62] * 3, 0, 8)}, "too large"),
        ({"a": ([1] * 65, 0, 4)}, "too large"),
    ],
)
def test_headers_that_no_writer_makes(tmp_path, entries, message):
    """Each is refused before a product of its sizes is computed, which takes seconds."""
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
            for name, (shape, begin, end) in entries.items()
        }
    ).encode()
    end = max(end for _, _, end in entries.values())
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    with pytest.raises(InputError, match=message) as caught:
        safetensors_file.open_file(epath.Path(path))
    assert len(str(caught.value)) < 500


def test_a_file_that_shrinks_after_it_was_opened(file, tmp_path):
    path = tmp_path / "shrinks.safetensors"
    path.write_bytes(file.read_bytes())
    arrays, _ = safetensors_file.open_file(file_io.resolve(path))
    path.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated: expected"):
        for array in arrays.values():
            array.read()


def test_written_files_have_the_usual_mode(tmp_path):
    """The safetensors library itself makes files that only their owner can read."""
    (tmp_path / "text").write_text("")
    safetensors_file.save_file(tmp_path / "a.safetensors", {"a": np.ones(2)}, {})
    mode = (tmp_path / "text").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == mode


def test_stacked_arrays(tmp_path):
    """Experts that are stored one by one and transposed: one of them exists twice at a time."""
    experts = RNG.standard_normal((16, 48, 512)).astype(ml_dtypes.bfloat16)  # [E, out, in]
    safetensors.numpy.save_file({f"{e}": a for e, a in enumerate(experts)}, tmp_path / "x")
    opened, _ = safetensors_file.open_file(file_io.resolve(tmp_path / "x"))
    stacked = lazy_array.stack([opened[f"{e}"].T for e in range(16)])
    expected = experts.transpose(0, 2, 1)
    assert stacked.shape == expected.shape and stacked.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stacked.read(), expected)
    index = (slice(3, 9), slice(100, 300), slice(7, 8))
    np.testing.assert_array_equal(stacked.read_slice(index), expected[index])
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    for spec in (PartitionSpec(), PartitionSpec("expert"), PartitionSpec(None, None, "expert")):
        sharding = NamedSharding(mesh, spec)
        shape = jax.ShapeDtypeStruct(stacked.shape, jnp.float32, sharding=sharding)
        loaded = device_arrays.load_arrays({"a": stacked}, {"a": shape}, "x")["a"]
        np.testing.assert_array_equal(loaded, expected.astype(np.float32))
    target = {"a": jax.ShapeDtypeStruct(stacked.shape, jnp.float32)}
    tracemalloc.start()
    try:
        device_arrays.load_arrays({"a": stacked}, target, "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    final = 4 * experts.size
    # The array in its final dtype and, while one expert is read, that one as stored; then which
    # values are finite. Less than another expert for all else.
    assert final <= peak < final + experts.size + 2 * experts[0].nbytes


def test_unstacked_arrays():
    """A part of an array that is not stored in parts: it is read once for all of them."""
    reads = []
    array = RNG.standard_normal((3, 4, 2))

    def read_slice(index):
        reads.append(index)
        return array[index]

    parts = lazy_array.unstack(LazyArray(array.shape, array.dtype, read_slice))
    for _ in range(2):  # a second pass reads again
        for part, values in zip(parts, array, strict=True):
            np.testing.assert_array_equal(part.T.read(), values.T)
    assert len(reads) == 2
    stacked = lazy_array.stack(parts)
    assert lazy_array.unstack(stacked) == parts


def test_written_files_have_checksums(tmp_path, monkeypatch):
    """A flipped bit is noticed by each read of a block that has it, and by no other."""
    monkeypatch.setattr(safetensors_file, "_BLOCK_BYTES", 80)  # three rows of 24 bytes and a third
    monkeypatch.setattr(file_io, "READ_BLOCK", 40)
    path, array = tmp_path / "a.safetensors", RNG.standard_normal((12, 6)).astype(np.float32)
    arrays = {"a": array, "empty": np.empty((0, 2)), "half": array[0].astype(ml_dtypes.bfloat16)}
    safetensors_file.save_file(path, arrays, {"k": "v"})
    written = safetensors.numpy.load_file(path)
    opened, metadata = safetensors_file.open_file(file_io.resolve(path))
    assert metadata["k"] == "v"
    for name, values in arrays.items():
        np.testing.assert_array_equal(opened[name].read(), values)
        np.testing.assert_array_equal(written[name], values)
    content = bytearray(path.read_bytes())
    content[content.index(array[7].tobytes()) + 3] ^= 1
    path.write_bytes(content)
    rows = [slice(n, n + 1) for n in range(12)]
    for n, row in enumerate(rows):
        if 6 <= n <= 9:  # byte 171 is in the third block: bytes 160 to 239
            with pytest.raises(InputError, match=r"'a': damaged: expected the checksum '\w{8}'"):
                opened["a"].read_slice((row, slice(None)))
        else:
            part = opened["a"].read_slice((row, slice(1, 3)))
            np.testing.assert_array_equal(part, array[row, 1:3])
    with pytest.raises(InputError, match="damaged"):
        opened["a"].T.read()
    assert content.count(b'"half":') == 1
    path.write_bytes(content.replace(b'"half":', b'"calf":'))
    with pytest.raises(InputError, match="'calf': damaged: expected one array and one checksum"):
        safetensors_file.open_file(file_io.resolve(path))


@pytest.mark.parametrize(
    "stored",
    ["x", "5", "{}x", '{"block_bytes": 1}', '{"block_bytes": 16777216, "arrays": {"a": 1}}'],
)
def test_damaged_checksums(tmp_path, stored):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(3)}, path, metadata={"crc32c": stored})
    with pytest.raises(InputError, match="not a safetensors file"):
        safetensors_file.open_file(file_io.resolve(path))


def test_checksums_of_values():
    """They do not depend on layout or replicas, and are of arrays that are read whole."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    expected = {
        name: ("float32 as float32", checksums.checksum_of_values(array))
        for name, array in ARRAYS.items()
    }
    for options in {}, {"sharding": everywhere}:
        crcs: dict[str, tuple[str, int]] = {}
        device_arrays.load_arrays(sources(), target(**options), "x", value_checksums=crcs)
        assert crcs == expected
    parts = NamedSharding(mesh, PartitionSpec("data"))
    crcs = {}
    shape = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=parts)
    device_arrays.load_arrays({"a": sources()["a/kernel"]}, {"a": shape}, "x", value_checksums=crcs)
    assert len(crcs) == (len(jax.devices()) == 1)
    # a float32 file and its rounding are equal as bfloat16, and not compared otherwise
    rounded = ARRAYS["a/kernel"].astype(ml_dtypes.bfloat16)
    files = [lazy_array.from_numpy(array) for array in (ARRAYS["a/kernel"], rounded)]
    for dtype, is_equal in ((ml_dtypes.bfloat16, True), (np.float32, False)):
        joined = [
            checksums.join({"a": lazy_array.checksum(file, file.read().astype(dtype))})
            for file in files
        ]
        assert (joined[0] == joined[1]) == is_equal and not checksums.is_other(*joined)


@pytest.mark.parametrize("size", [3, 1 << 14, (1 << 15) + 5])
def test_checksums_notice_every_bit(size):
    values = RNG.standard_normal(size).astype(np.float32)
    before = checksums.checksum_of_values(values)
    for index in {0, 1, size // 2, size - 1}:
        for bit in (0, 31):
            changed = values.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
            after = checksums.checksum_of_values(changed)
            assert after != before and after != checksums.checksum_of_values(-changed)
            joined = [checksums.join({"a": ("float32", each)}) for each in (before, after)]
            assert checksums.is_other(*joined)


def test_a_large_header_is_not_parsed(tmp_path):
    path, size = tmp_path / "large.safetensors", 26_000_000
    path.write_bytes(struct.pack("<Q", size) + b"[" * size)
    with pytest.raises(InputError, match="a header of at most 25,000,000 bytes, got 26,000,000"):
        safetensors_file.open_file(epath.Path(path))
