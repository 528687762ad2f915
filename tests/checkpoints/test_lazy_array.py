"""Arrays read one by one: slices, types, shardings, how much is in memory at a time, errors."""

import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pemoe_jax.checkpoints import lazy_array, safetensors_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import params
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/kernel": RNG.standard_normal((8, 6)).astype(np.float32),
    "a/scale": RNG.standard_normal(5).astype(np.float32),
    "b/kernel": RNG.standard_normal((4, 3)).astype(np.float32).T,  # not contiguous
}


def target(**given) -> dict:
    return params.unflatten(
        {k: jax.ShapeDtypeStruct(v.shape, jnp.float32, **given) for k, v in ARRAYS.items()}
    )


def sources() -> dict[str, LazyArray]:
    return {name: lazy_array.from_numpy(array) for name, array in ARRAYS.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "x.safetensors"
    contiguous = {k: np.ascontiguousarray(v) for k, v in ARRAYS.items()}
    half = {"half": ARRAYS["a/kernel"].astype(ml_dtypes.bfloat16), "one": np.float32(3)}
    safetensors.numpy.save_file(
        {**contiguous, **{k: np.asarray(v) for k, v in half.items()}}, path, metadata={"k": "v"}
    )
    return path


def test_slices_of_a_file(file):
    """A slice of the file's rows is the array's, transposed or not; scalars and bfloat16 too."""
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


def test_rows_alone_are_read(file, monkeypatch):
    asked = []
    read_range = file_io.read_range
    array = safetensors_file.open_file(file_io.resolve(file))[0]["a/kernel"]
    monkeypatch.setattr(
        file_io, "read_range", lambda *args: asked.append(args[2]) or read_range(*args)
    )
    array.read_slice((slice(3, 5), slice(0, 2)))
    assert asked == [2 * 6 * 4]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load(dtype):
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), target())
    loaded = params.flatten(lazy_array.load_arrays(sources(), wanted, "x"))
    assert loaded.keys() == ARRAYS.keys()
    for name, leaf in loaded.items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, jnp.asarray(ARRAYS[name]).astype(dtype))


def test_load_onto_a_mesh():
    """Each device's part is read once, and a replicated array once."""
    asked: list[tuple] = []

    def counted(array: np.ndarray) -> LazyArray:
        def read_slice(index):
            asked.append(index)
            return array[index]

        return LazyArray(array.shape, array.dtype, read_slice)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 2
    for spec, parts in ((PartitionSpec(), 1), (PartitionSpec("data"), 2)):
        asked.clear()
        sharding = NamedSharding(mesh, spec)
        array = ARRAYS["a/kernel"]
        wanted = {"k": jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=sharding)}
        leaf = lazy_array.load_arrays({"k": counted(array)}, wanted, "x")["k"]
        assert leaf.sharding == sharding and len(asked) == parts
        np.testing.assert_array_equal(leaf, array)


def test_reading_ahead_stays_within_the_largest_array():
    """At no time are more bytes asked for than the largest array has, and small ones overlap."""
    sizes = [10, 20, 200, 30, 40, 50, 60, 200, 10, 90, 90]
    lock = threading.Lock()
    now, most, together = 0, 0, 0

    def source(size: int) -> LazyArray:
        def read_slice(index):
            nonlocal now, most, together
            with lock:
                now += 4 * size
                most = max(most, now)
                together += now > 4 * size
            time.sleep(0.01)
            with lock:
                now -= 4 * size
            return np.full(size, size, np.float32)[index]

        return LazyArray((size,), np.dtype(np.float32), read_slice)

    arrays = {f"{i:02}": source(size) for i, size in enumerate(sizes)}
    wanted = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in arrays.items()}
    loaded = lazy_array.load_arrays(arrays, wanted, "x")
    assert [leaf.shape[0] for leaf in loaded.values()] == sizes
    assert [float(leaf[0]) for leaf in loaded.values()] == sizes
    assert most <= 4 * max(sizes)
    assert together > 0


def test_an_error_ends_the_reading():
    started = []

    def broken(index):
        raise InputError("x/b: cut short")

    def slow(index):
        started.append(index)
        time.sleep(0.01)
        return np.zeros(1000, np.float32)[index]

    shape, dtype = (1000,), np.dtype(np.float32)
    arrays = {f"{i}": LazyArray(shape, dtype, slow if i else broken) for i in range(50)}
    wanted = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k in arrays}
    with pytest.raises(InputError, match="x/b: cut short"):
        lazy_array.load_arrays(arrays, wanted, "x")
    assert len(started) < 25


def test_names_and_shapes_come_before_the_reading():
    def never(index):
        raise AssertionError("read")

    arrays = {name: LazyArray(a.shape, a.dtype, never) for name, a in ARRAYS.items()}
    del arrays["a/scale"]
    arrays["b/kernel"] = arrays["b/kernel"].T
    arrays["c"] = arrays["a/kernel"]
    with pytest.raises(InputError) as caught:
        lazy_array.load_arrays(arrays, target(), "the file")
    assert str(caught.value) == (
        "the file does not fit the model's 3 parameters: 1 missing: a/scale. 1 extra: c."
        " 1 of another shape: b/kernel: expected (3, 4), got (4, 3)"
    )


def test_values_that_are_not_finite():
    arrays = sources()
    bad = ARRAYS["a/kernel"].copy()
    bad[3, 2] = np.nan
    arrays["a/kernel"] = lazy_array.from_numpy(bad)
    with pytest.raises(InputError, match="the file: a/kernel holds NaN or infinity"):
        lazy_array.load_arrays(arrays, target(), "the file")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-10], "cut short: its header speaks of"),
        (lambda data: data + b"x", "longer than it says"),
        (lambda data: data[:20], "cut short, or not a safetensors file"),
        (lambda data: data[:3], "found 3 bytes"),
        (lambda data: b"<html>not found</html>", "not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "not a safetensors file"),
        (lambda data: data.replace(b'"F32"', b'"C64"'), "is of type C64: expected one of"),
        (lambda data: data.replace(b"[8,6]", b"[8,7]"), r"\(8, 7\) takes 224 bytes"),
        (lambda data: data.replace(b"[8,6]", b'"86"'), "not a safetensors file|takes"),
    ],
)
def test_damaged_files(file, tmp_path, damage, says):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=says) as caught:
        safetensors_file.open_file(file_io.resolve(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_it_was_opened(file, tmp_path):
    path = tmp_path / "shrinks.safetensors"
    path.write_bytes(file.read_bytes())
    arrays, _ = safetensors_file.open_file(file_io.resolve(path))
    path.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="cut short: expected"):
        for array in arrays.values():
            array.read()


def test_writing_leaves_nothing_behind(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_write.temporary_path(path) as beside:
        beside.mkdir()
        (beside / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_write.temporary_path(path) as beside:
        beside.write_text("one")
    with pytest.raises(InputError, match="is there already"), atomic_write.temporary_path(path):
        raise AssertionError
    with atomic_write.temporary_path(path, overwrite=True) as beside:
        beside.mkdir()
    assert path.is_dir() and list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(InputError, match="expected a local path"),
        atomic_write.temporary_path("gs://b/x"),
    ):
        raise AssertionError


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0", 3])
def test_names_outside_a_folder(tmp_path, name):
    with pytest.raises(InputError, match="expected names of files in its own folder"):
        file_io.child_path(file_io.resolve(tmp_path), name, "index.json")


def test_written_files_have_the_usual_mode(tmp_path):
    """The safetensors library makes them readable by their owner alone."""
    (tmp_path / "usual").write_text("")
    with atomic_write.temporary_path(tmp_path / "out") as beside:
        beside.mkdir()
        safetensors.numpy.save_file({"a": np.ones(2)}, beside / "a.safetensors")
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "out" / "a.safetensors").stat().st_mode == usual
