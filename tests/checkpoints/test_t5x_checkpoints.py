"""Checkpoints that T5X itself wrote (goldens/make_t5x.py): loaded by path, damaged, refused."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from archives import GOLDENS, unpack
from etils import epath
from flax import serialization
from methods import largest_difference

from pemoe_jax.checkpoints import base_model, models, t5x, tensorstore_file
from pemoe_jax.core import network, params
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse
from pemoe_jax.runtime import file_io

FORMATS = ("legacy", "orbax")
WO = "encoder/layers_0/mlp/wo/kernel"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Format -> folder with a checkpoint_7."""
    root = tmp_path_factory.mktemp("t5x")
    return {name: unpack(f"t5x_{name}", root / name) for name in FORMATS}


@pytest.fixture
def copies(checkpoints, tmp_path) -> dict[str, pathlib.Path]:
    """Format -> copy of a checkpoint_7, for tests that damage it."""
    return {
        name: pathlib.Path(shutil.copytree(path, tmp_path / name)) / "checkpoint_7"
        for name, path in checkpoints.items()
    }


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "t5x_logits.npz") as file:
        return dict(file)


@functools.cache
def model() -> network.Transformer:
    sizes = {k.removeprefix("config/"): int(v) for k, v in golden().items() if "config/" in k}
    return network.Transformer(network.T5Config(**sizes))


@pytest.mark.parametrize("name", FORMATS)
def test_logits_of_t5x(checkpoints, name):
    """Loads a folder of checkpoints, a checkpoint and, for Orbax, the folder of its arrays."""
    paths = [checkpoints[name], checkpoints[name] / "checkpoint_7"]
    if name == "orbax":
        paths.append(checkpoints[name] / "checkpoint_7" / "state")
    expected = golden()
    batch = {k: v for k, v in expected.items() if k.endswith("tokens")}
    forward = jax.jit(lambda p: model().apply({"params": p}, **batch, enable_dropout=False))
    for path in paths:
        params, identity = models.load_base(model(), str(path), 0)
        assert identity["format"] == ("T5X, legacy" if name == "legacy" else "T5X, Orbax")
        logits = forward(params)
        real = batch["decoder_target_tokens"] > 0
        assert largest_difference(logits[real], expected["logits"][real]) < 1e-6


def test_both_formats_have_one_fingerprint(checkpoints):
    identities = [models.load_base(model(), str(p), 0)[1] for p in checkpoints.values()]
    opened = [base_model.open_base(path) for path in checkpoints.values()]
    fingerprints = {identity["fingerprint"] for identity in identities}
    assert fingerprints == {opened[0].fingerprint()} == {opened[1].fingerprint()}
    sums = {identity["checksum"] for identity in identities}
    assert sums == {base.identity("float32")["checksum"] for base in opened} and len(sums) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_dimensions_are_inferred(checkpoints, name):
    expected = model().config
    config = base_model.open_base(checkpoints[name]).config()
    assert network.T5Config(**config) == expected
    (opened,) = models.open_models(str(checkpoints[name]))
    assert opened.model.config == expected and opened.load()
    assert opened.name == name  # the folder of checkpoint_7


@pytest.mark.parametrize("name", FORMATS)
def test_dtypes_and_shardings(checkpoints, name):
    """Frozen matrices have the activation dtype; trainable parameters are float32."""
    from pemoe_jax.core import partitioning

    config = {**model().config.as_dict(), "dtype": "bfloat16"}
    sharding = partitioning.replicated_sharding(partitioning.make_mesh())
    weights, _ = models.load_base(
        network.Transformer(network.T5Config(**config)),
        str(checkpoints[name]),
        0,
        is_trainable=lambda path: "layers_1" in path,
        shardings=sharding,
    )
    for path, leaf in params.flatten(weights).items():
        is_float32 = "layers_1" in path or "norm" in path or "logits" in path
        assert leaf.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), path
        assert leaf.sharding == sharding


def test_optimizer_state_is_not_read(copies):
    """Loading works with its folders deleted (legacy) and its keys overwritten (Orbax)."""
    states = list(copies["legacy"].glob("state.*"))
    assert len(states) > 10
    for folder in states:
        shutil.rmtree(folder)
    models.load_base(model(), str(copies["legacy"]), 0)

    store = tensorstore_file.orbax_state_folder(file_io.resolve(copies["orbax"]))
    kvstore = ts.KvStore.open({"driver": "ocdbt", "base": file_io.url(store)}).result()
    keys = kvstore.list().result()
    states = [key for key in keys if key.startswith(b"state.")]
    assert len(states) > 100
    for write in [kvstore.write(key, b"not zarr") for key in states]:
        write.result()
    models.load_base(model(), str(copies["orbax"]), 0)


def test_inline_arrays_and_older_array_specs(copies):
    """The index may hold small arrays; T5X wrote several kinds of specs for the others."""
    index = copies["legacy"] / "checkpoint"
    contents = serialization.msgpack_restore(index.read_bytes())
    target = contents["optimizer"]["target"]
    expected = base_model.open_base(copies["legacy"]).load(network.param_shapes(model()))
    norm = "target.encoder.encoder_norm.scale"
    target["encoder"]["encoder_norm"]["scale"] = np.asarray(
        expected["encoder"]["encoder_norm"]["scale"]
    )
    shutil.rmtree(copies["legacy"] / norm)
    mlp = target["encoder"]["layers_0"]["mlp"]
    mlp["wi_0"]["kernel"] = "PLACEHOLDER://target.encoder.layers_0.mlp.wi_0.kernel"
    for name, kvstore in (("wi_1", {"driver": "gfile"}), ("wo", {"driver": "gcs", "bucket": "x"})):
        path = f"target.encoder.layers_0.mlp.{name}.kernel"
        mlp[name]["kernel"] = {"driver": "zarr", "kvstore": kvstore, "path": path}
    index.write_bytes(serialization.msgpack_serialize(contents))
    again = base_model.open_base(copies["legacy"]).load(network.param_shapes(model()))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, expected, again))


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_orbax_without_ocdbt(checkpoints, tmp_path, driver):
    """A folder per array, as Orbax writes with OCDBT off; zarr 2 and 3."""
    state = tmp_path / "checkpoint_3" / "state"
    for path, array in base_model.open_base(checkpoints["orbax"]).arrays.items():
        url = f"{file_io.url(file_io.resolve(state))}target.{path.replace('/', '.')}/"
        spec = {"driver": driver, "kvstore": url}
        dtype = ts.dtype(array.dtype)
        ts.open(spec, create=True, dtype=dtype, shape=array.shape).result()[...] = array.read()
    (state / "_METADATA").write_text("{}")
    _, identity = models.load_base(model(), str(tmp_path), 0)
    assert identity["fingerprint"] == base_model.open_base(checkpoints["orbax"]).fingerprint()


def write_legacy(checkpoint: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a checkpoint in T5X's legacy format: an index, and a zarr folder an array."""
    leaves = {}
    for path, array in arrays.items():
        name = f"target.{path.replace('/', '.')}"
        kvstore = {"driver": "file", "path": f"{checkpoint}/{name}"}
        # As in T5X's Switch checkpoints, a chunk holds some of the experts.
        chunks = [max(1, array.shape[0] // 2), *array.shape[1:]]
        metadata = {"chunks": chunks, "compressor": {"id": "gzip"}}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        dtype = ts.dtype(array.dtype.name)
        ts.open(spec, create=True, dtype=dtype, shape=array.shape).result()[...] = array
        leaves[path] = {**spec, "kvstore": {"driver": "file", "path": f"{name}/"}}
    optimizer = {
        "target": params.unflatten(leaves),
        "state": {"param_states": {}, "step": np.int32(3)},
    }
    contents = {"version": 3, "optimizer": optimizer}
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))


@pytest.mark.parametrize("experts", [None, 4], ids=["t5_1_0", "switch"])
def test_switch_and_t5_1_0(tmp_path, experts):
    """Read without a map: `mlp/wi`, a tied head, `mlp/expert/wi` [E, D, F], `mlp/router`."""
    config = dataclasses.replace(model().config, mlp_activations=("relu",))
    config = dataclasses.replace(config, logits_via_embedding=True, num_encoder_layers=2)
    transformer = network.Transformer(config, sparse=experts and Sparse(experts))
    shapes = params.flatten(network.param_shapes(transformer))
    rng = np.random.default_rng(0)
    arrays = {path: rng.normal(size=leaf.shape).astype("float32") for path, leaf in shapes.items()}
    write_legacy(tmp_path / "checkpoint_500100", arrays)
    opened = base_model.open_base(tmp_path)
    assert opened.format == "T5X, legacy" and opened.sparse == (
        experts and {"num_experts": 4, "sparse_step": 2, "extra_mlp": False}
    )
    assert network.T5Config(**opened.config()) == config
    loaded = params.flatten(models.load_base(transformer, str(tmp_path), 0)[0])
    assert loaded.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(loaded[path], array, path)


def chunk(checkpoint: pathlib.Path, path: str) -> pathlib.Path:
    (file,) = (checkpoint / f"target.{path.replace('/', '.')}").glob("[0-9]*")
    return file


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rewrite_index(checkpoint: pathlib.Path, change) -> None:
    index = checkpoint / "checkpoint"
    contents = serialization.msgpack_restore(index.read_bytes())
    change(contents["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"])
    index.write_bytes(serialization.msgpack_serialize(contents))


@pytest.mark.parametrize(
    "value", [b"\x81\xa1a" * 1000 + b"\xc0", b"\x81\xa1a" + b"\x91" * 1000 + b"\xc0"]
)
def test_a_deeply_nested_index(tmp_path, value):
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa6target" + value)
    with pytest.raises(InputError, match="expected an? ") as caught:
        t5x.open_checkpoint(epath.Path(tmp_path))
    assert len(str(caught.value)) < 600


def set_path_outside(leaf: dict) -> None:
    leaf["kernel"]["kvstore"]["path"] = "../../elsewhere/"


def set_absolute_path(leaf: dict) -> None:
    leaf["kernel"] = "PLACEHOLDER:///etc"


def set_number(leaf: dict) -> None:
    leaf["kernel"] = 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: truncate(chunk(c, WO)), "mlp.wo.kernel: unreadable"),
        (lambda c: chunk(c, WO).unlink(), "mlp.wo.kernel: unreadable.*missing"),
        (lambda c: shutil.rmtree(chunk(c, WO).parent), "mlp.wo.kernel: unreadable"),
        (lambda c: (chunk(c, WO).parent / ".zarray").write_text("{"), "mlp.wo.kernel: unreadable"),
        (lambda c: truncate(c / "checkpoint"), "expected a T5X index"),
        (lambda c: (c / "checkpoint").write_bytes(b""), "expected a T5X index"),
        (lambda c: (c / "checkpoint").write_bytes(b"\x80"), "expected a T5X index"),
        (lambda c: rewrite_index(c, set_path_outside), r"own folder, got '\.\./\.\./elsewhere'"),
        (lambda c: rewrite_index(c, set_absolute_path), "own folder, got '/etc'"),
        (lambda c: rewrite_index(c, set_number), "mlp/wo/kernel: expected an array, got int"),
        (lambda c: rewrite_index(c, lambda leaf: leaf.clear()), "1 missing: .*mlp/wo/kernel"),
        (lambda c: rewrite_index(c, lambda leaf: leaf.update(bias=np.ones(2))), "1 extra: .*bias"),
    ],
)
def test_damaged_legacy(copies, damage, message):
    damage(copies["legacy"])
    with pytest.raises(InputError, match=message) as caught:
        models.load_base(model(), str(copies["legacy"]), 0)
    assert str(copies["legacy"]) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_orbax(copies):
    largest = max((copies["orbax"] / "state").glob("**/d/*"), key=lambda file: file.stat().st_size)
    truncate(largest)
    with pytest.raises(InputError, match="unreadable") as caught:
        models.load_base(model(), str(copies["orbax"]), 0)
    assert "\n" not in str(caught.value)
    shutil.rmtree(copies["orbax"] / "state" / "d")
    with pytest.raises(InputError, match="unreadable"):
        models.load_base(model(), str(copies["orbax"]), 0)


def test_orbax_checkpoint_without_the_item(copies, tmp_path):
    state = tensorstore_file.orbax_state_folder(file_io.resolve(copies["orbax"]))
    with pytest.raises(InputError, match="expected arrays named weights.…, got none"):
        tensorstore_file.open_orbax(state, "weights")
    with pytest.raises(InputError, match="expected a T5X checkpoint, got none"):
        t5x.open_checkpoint(file_io.resolve(tmp_path))


@pytest.mark.parametrize("name", FORMATS)
def test_nan_is_refused(copies, name):
    url = file_io.url(file_io.resolve(copies[name] / "state" if name == "orbax" else copies[name]))
    kvstore = {"driver": "ocdbt", "base": url} if name == "orbax" else {"driver": "file"}
    folder = "" if name == "orbax" else f"{copies[name]}/"
    spec = {**kvstore, "path": f"{folder}target.{WO.replace('/', '.')}/"}
    array = ts.open({"driver": "zarr", "kvstore": spec}, open=True).result()
    array[2, 3].write(np.nan).result()
    with pytest.raises(InputError, match=f"{WO} holds NaN or infinity"):
        models.load_base(model(), str(copies[name]), 0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_of_another_size(checkpoints, name):
    larger = network.T5Config(**{**model().config.as_dict(), "mlp_dim": 32, "num_heads": 5})
    with pytest.raises(InputError) as caught:
        models.load_base(network.Transformer(larger), str(checkpoints[name]), 0)
    message = "has another size: expected num_heads 5, got 2; mlp_dim 32, got 16"
    assert message in str(caught.value)


def test_paths_that_are_not_a_base(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    (other / "things").mkdir(parents=True)
    for path, message in (
        (tmp_path, "got a config.json without model.safetensors"),
        (empty, "got an empty folder"),
        (other, "got a folder with things"),
        (tmp_path / "notes.txt", "got a file"),
        (tmp_path / "absent", "no such file or folder$"),
        ("google/t5-xl-lm-adapt", "hf download google/t5-xl-lm-adapt"),
        (tmp_path / "absent.safetensors", "no such file"),
        (2024, "expected a path, got 2024 .*quotes"),
        ("s3://bucket/x", "expected a local path or gs://…, got s3://"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            models.load_base(model(), path, 0)
        assert "\n" not in str(caught.value)


def test_unreachable_paths_are_one_line(monkeypatch):
    """Opening a base, or a model to evaluate or convert."""
    from etils import epath

    class RemoteError(Exception):
        """Not a subclass of OSError, as tensorflow's errors."""

    def fail(self):
        raise RemoteError("no network\nat all")

    monkeypatch.setattr(type(epath.Path("gs://bucket/x")), "exists", fail)
    for open_path in (base_model.open_base, models.open_models):
        with pytest.raises(InputError) as caught:
            open_path("gs://bucket/x")
        assert str(caught.value) == "gs://bucket/x: cannot be reached: no network"
