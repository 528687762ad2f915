"""Checkpoints that a real T5X wrote (goldens/make_t5x.py): loaded by path, damaged, refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from archives import GOLDENS, unpack
from flax import serialization
from methods import largest_difference

from pemoe_jax.checkpoints import base_model, models, t5x, tensorstore_file
from pemoe_jax.core import network, params
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

FORMATS = ("legacy", "orbax")
WO = "encoder/layers_0/mlp/wo/kernel"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Format -> its folder, with one checkpoint_7 in it."""
    root = tmp_path_factory.mktemp("t5x")
    return {name: unpack(f"t5x_{name}", root / name) for name in FORMATS}


@pytest.fixture
def copies(checkpoints, tmp_path) -> dict[str, pathlib.Path]:
    """Format -> a checkpoint_7 that a test may damage."""
    return {
        name: pathlib.Path(shutil.copytree(path, tmp_path / name)) / "checkpoint_7"
        for name, path in checkpoints.items()
    }


def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "t5x_logits.npz") as file:
        return dict(file)


def model() -> network.Transformer:
    sizes = {k.removeprefix("config/"): int(v) for k, v in golden().items() if "config/" in k}
    return network.Transformer(network.T5Config(**sizes))


@pytest.mark.parametrize("name", FORMATS)
def test_gives_the_logits_of_t5x(checkpoints, name):
    """The folder of checkpoints, the checkpoint, and for Orbax the folder of its arrays."""
    paths = [checkpoints[name], checkpoints[name] / "checkpoint_7"]
    if name == "orbax":
        paths.append(checkpoints[name] / "checkpoint_7" / "state")
    expected = golden()
    batch = {k: v for k, v in expected.items() if k.endswith("tokens")}
    for path in paths:
        weights, identity = models.load_base(model(), str(path), 0)
        assert identity["format"] == ("T5X, legacy" if name == "legacy" else "T5X, Orbax")
        logits = model().apply({"params": weights}, **batch, enable_dropout=False)
        real = batch["decoder_target_tokens"] > 0
        assert largest_difference(logits[real], expected["logits"][real]) < 1e-6


def test_both_formats_hold_the_same_base(checkpoints):
    identities = [models.load_base(model(), str(p), 0)[1] for p in checkpoints.values()]
    opened = [base_model.open_base(path) for path in checkpoints.values()]
    names = {identity["fingerprint"] for identity in identities}
    assert names == {opened[0].fingerprint()} == {opened[1].fingerprint()}


@pytest.mark.parametrize("name", FORMATS)
def test_dimensions_are_read_off(checkpoints, name):
    expected = model().config
    found = base_model.open_base(checkpoints[name]).config()
    assert network.T5Config(**found) == expected
    (opened,) = models.open_models(str(checkpoints[name]))
    assert opened.model.config == expected and opened.load()
    assert opened.name == name  # of the folder that checkpoint_7 is in


@pytest.mark.parametrize("name", FORMATS)
def test_types_and_shardings(checkpoints, name):
    """Frozen matrices in the activation dtype, what trains in float32, on every device."""
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
        float32 = "layers_1" in path or "norm" in path or "logits" in path
        assert leaf.dtype == (jnp.float32 if float32 else jnp.bfloat16), path
        assert leaf.sharding == sharding


def test_the_optimisers_state_is_not_read(copies):
    """Legacy: its folders are gone. Orbax: its keys are written over."""
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
    for key in states:  # written over: reading one would be an error
        kvstore.write(key, b"not zarr").result()
    models.load_base(model(), str(copies["orbax"]), 0)


def test_arrays_inline_in_the_index_and_older_descriptions(copies):
    """Small arrays may lie in the index; of the others there were several descriptions."""
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
    """Arrays in folders of their own, as Orbax writes where OCDBT is off; zarr 2 and 3."""
    state = tmp_path / "checkpoint_3" / "state"
    for path, array in base_model.open_base(checkpoints["orbax"]).arrays.items():
        url = f"{file_io.url(file_io.resolve(state))}target.{path.replace('/', '.')}/"
        spec = {"driver": driver, "kvstore": url}
        dtype = ts.dtype(array.dtype)
        ts.open(spec, create=True, dtype=dtype, shape=array.shape).result()[...] = array.read()
    (state / "_METADATA").write_text("{}")
    _, identity = models.load_base(model(), str(tmp_path), 0)
    assert identity["fingerprint"] == base_model.open_base(checkpoints["orbax"]).fingerprint()


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


def outside(leaf: dict) -> None:
    leaf["kernel"]["kvstore"]["path"] = "../../elsewhere/"


def absolute(leaf: dict) -> None:
    leaf["kernel"] = "PLACEHOLDER:///etc"


def nonsense(leaf: dict) -> None:
    leaf["kernel"] = 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda c: truncate(chunk(c, WO)), "mlp.wo.kernel: unreadable"),
        (lambda c: chunk(c, WO).unlink(), "mlp.wo.kernel: unreadable.*missing"),
        (lambda c: shutil.rmtree(chunk(c, WO).parent), "mlp.wo.kernel: unreadable"),
        (lambda c: (chunk(c, WO).parent / ".zarray").write_text("{"), "mlp.wo.kernel: unreadable"),
        (lambda c: truncate(c / "checkpoint"), "expected an index of T5X"),
        (lambda c: (c / "checkpoint").write_bytes(b""), "expected an index of T5X"),
        (lambda c: (c / "checkpoint").write_bytes(b"\x80"), "expected an index of T5X"),
        (lambda c: rewrite_index(c, outside), r"own folder, found '\.\./\.\./elsewhere'"),
        (lambda c: rewrite_index(c, absolute), "own folder, found '/etc'"),
        (lambda c: rewrite_index(c, nonsense), "mlp/wo/kernel: expected an array, found 3"),
        (lambda c: rewrite_index(c, lambda leaf: leaf.clear()), "1 missing: .*mlp/wo/kernel"),
        (lambda c: rewrite_index(c, lambda leaf: leaf.update(bias=np.ones(2))), "1 extra: .*bias"),
    ],
)
def test_damaged_legacy(copies, damage, says):
    damage(copies["legacy"])
    with pytest.raises(InputError, match=says) as caught:
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


def test_an_orbax_checkpoint_of_something_else(copies):
    state = tensorstore_file.orbax_state_folder(file_io.resolve(copies["orbax"]))
    with pytest.raises(InputError, match="expected arrays named weights.…, found none"):
        tensorstore_file.open_orbax(state, "weights")
    with pytest.raises(InputError, match="expected an Orbax checkpoint"):
        t5x.open_orbax(file_io.resolve(copies["legacy"]))


@pytest.mark.parametrize("name", FORMATS)
def test_not_finite(copies, name):
    """A NaN in one place of one array."""
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
    says = "is of another size: expected num_heads 5, found 2; mlp_dim 32, found 16"
    assert says in str(caught.value)


def test_what_is_no_base(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    (other / "things").mkdir(parents=True)
    for path, says in (
        (tmp_path, "found a config.json without model.safetensors"),
        (empty, "found an empty folder"),
        (other, r"found none of them \(things\)"),
        (tmp_path / "notes.txt", "found a file"),
        (tmp_path / "absent", "no such file or folder$"),
        ("google/t5-xl-lm-adapt", "hf download google/t5-xl-lm-adapt"),
        (tmp_path / "absent.safetensors", "no such file"),
        (2024, "expected a path, found 2024 .*quotes"),
        ("s3://bucket/x", "expected a local path or gs://…, found s3://"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            models.load_base(model(), path, 0)
        assert "\n" not in str(caught.value)


def test_remote_paths(checkpoints):
    """A store is named alike wherever it lies; one that is not reached is told in one line."""
    assert (
        file_io.url(file_io.resolve("gs://bucket/a/checkpoint_1")) == "gs://bucket/a/checkpoint_1/"
    )
    assert file_io.url(file_io.resolve("/tmp/a b")) == "file:///tmp/a%20b/"
    spec = ts.KvStore.Spec("gs://bucket/a/checkpoint_1/").to_json()
    assert spec == {"driver": "gcs", "bucket": "bucket", "path": "a/checkpoint_1/"}


def test_what_is_not_reached_is_one_line(monkeypatch):
    """Of a base, of a checkpoint to evaluate, of a source of `convert`."""
    from etils import epath

    class Unreached(Exception):
        """As tensorflow's errors are: of no kind that the standard library knows."""

    def fail(self):
        raise Unreached("no network\nat all")

    monkeypatch.setattr(type(epath.Path("gs://bucket/x")), "exists", fail)
    for call in (base_model.open_base, models.open_models):
        with pytest.raises(InputError) as caught:
            call("gs://bucket/x")
        assert str(caught.value) == "gs://bucket/x: cannot be reached: no network"
