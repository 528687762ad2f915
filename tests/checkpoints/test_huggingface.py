"""Folders of transformers (goldens/make_hf_files.py), read and written with equal logits."""

import functools
import json
import pathlib
import shutil
import zipfile

import archives
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from methods import largest_difference

from pemoe_jax.checkpoints import device_arrays, dimensions, huggingface, lazy_array
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

TOLERANCE = 2e-4  # of the largest logit, float32
# Folder -> weights of the logits.
HEADS = {
    "single": "lm_head.weight",
    "sharded": "lm_head.weight",
    "bfloat16": "lm_head.weight",
    "torch": "lm_head.weight",
    "torch_sharded": "lm_head.weight",
    "untied_scaled": "lm_head.weight, scaled",
    "tied": "shared.weight",
    "mt5": "shared.weight",
    "tied_scaled": "shared.weight, scaled",
    "tied_scaled_4": "shared.weight, scaled",
}


@pytest.fixture(scope="module")
def goldens(tmp_path_factory) -> pathlib.Path:
    return archives.unpack("hf_files", tmp_path_factory.mktemp("hf_files"))


@pytest.fixture
def copy(goldens, tmp_path):
    """Returns a function that copies a golden folder, for tests that damage it."""
    return lambda name: pathlib.Path(shutil.copytree(goldens / name, tmp_path / name))


def open_folder(path) -> dict[str, LazyArray]:
    return huggingface.open_checkpoint(file_io.resolve(path))


def shapes(arrays: dict[str, LazyArray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


@functools.cache
def model(dims: tuple) -> network.Transformer:
    return network.Transformer(network.T5Config(**dict(dims), dropout_rate=0.0))


def load(arrays: dict[str, LazyArray], dims=None):
    """Returns (model, parameters in float32)."""
    t5 = model(tuple((dims or dimensions.infer(shapes(arrays))).items()))
    return t5, device_arrays.load_arrays(arrays, network.param_shapes(t5), "the folder")


@functools.cache
def forward(t5: network.Transformer):
    return jax.jit(lambda p, batch: t5.apply({"params": p}, **batch, enable_dropout=False))


def logits(arrays: dict[str, LazyArray], goldens: pathlib.Path) -> np.ndarray:
    t5, params = load(arrays)
    with np.load(goldens / "logits.npz") as file:
        encoder, decoder = file["input_ids"], file["decoder_input_ids"]
    batch = {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": decoder,
        "decoder_target_tokens": np.ones_like(decoder),
    }
    return forward(t5)(params, {name: a.astype(np.int32) for name, a in batch.items()})


def expected_logits(name: str, goldens: pathlib.Path) -> np.ndarray:
    with np.load(goldens / "logits.npz") as file:
        return file[name]


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_transformers(name, goldens):
    assert huggingface.is_checkpoint(file_io.resolve(goldens / name))
    actual = logits(open_folder(goldens / name), goldens)
    assert largest_difference(actual, expected_logits(name, goldens)) < TOLERANCE


def test_all_golden_folders_are_tested(goldens):
    assert {path.name for path in goldens.iterdir() if path.is_dir()} == set(HEADS)


@pytest.mark.parametrize("name", HEADS)
def test_arrays_are_exact(name, goldens):
    """Values of the files under our names and in our layout; the logits' kernel of transformers."""
    arrays = open_folder(goldens / name)
    if "torch" in name:  # same weights; test_torch_pickle.py tests the reader
        raw = safetensors.numpy.load_file(goldens / "single" / "model.safetensors")
    else:
        raw = {}
        for file in (goldens / name).glob("*.safetensors"):
            raw |= safetensors.numpy.load_file(file)
    key = raw["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    kernel = arrays["decoder/layers_1/encoder_decoder_attention/key/kernel"]
    assert kernel.dtype == key.dtype
    np.testing.assert_array_equal(kernel.read(), key.T)
    bias = raw["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    np.testing.assert_array_equal(arrays["encoder/relpos_bias/rel_embedding"].read(), bias.T)
    embedding = arrays["token_embedder/embedding"].read()
    np.testing.assert_array_equal(embedding, raw["shared.weight"])
    source, _, scaled = HEADS[name].partition(", ")
    head = raw[source].T * np.float32(12**-0.5) if scaled else raw[source].T
    np.testing.assert_array_equal(arrays["decoder/logits_dense/kernel"].read(), head)
    assert len(arrays) == len(raw) + (source == "shared.weight")


def test_scaled_head_is_read_in_slices(goldens):
    kernel = open_folder(goldens / "tied_scaled")["decoder/logits_dense/kernel"]
    index = (slice(2, 5), slice(10, 30))
    np.testing.assert_array_equal(kernel.read_slice(index), kernel.read()[index])


def edit(path: pathlib.Path, **changed) -> None:
    """Sets keys of a JSON file; removes those set to None."""
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_embedding_under_the_name_of_its_copy(copy, goldens):
    """Some converters to safetensors keep only the first name of a shared array."""
    folder = copy("single")
    raw = safetensors.numpy.load_file(folder / "model.safetensors")
    raw["decoder.embed_tokens.weight"] = raw.pop("shared.weight")
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    embedding = open_folder(folder)["token_embedder/embedding"].read()
    np.testing.assert_array_equal(embedding, raw["decoder.embed_tokens.weight"])


def test_safetensors_are_preferred(copy, goldens):
    folder = copy("single")
    (folder / "pytorch_model.bin").write_bytes(b"not a file of torch.save")
    assert len(open_folder(folder)) == len(open_folder(goldens / "single"))


# --- writing


def export(path, arrays, **options) -> dict[str, np.ndarray]:
    """Writes a folder and returns its arrays as the safetensors library reads them."""
    huggingface.save_checkpoint(path, arrays, **options)
    written: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        shard = safetensors.numpy.load_file(file)
        assert not shard.keys() & written.keys()
        written |= shard
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata()["format"] == "pt"
    return written


def to_bfloat16(arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
    return {
        n: lazy_array.from_numpy(a.read().astype(ml_dtypes.bfloat16)) for n, a in arrays.items()
    }


def check_identical(actual, expected) -> None:
    """Checks names, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape, name
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 8_000, 100])
@pytest.mark.parametrize("name", ["single", "bfloat16"])
def test_write_what_was_read(name, shard_bytes, goldens, tmp_path):
    arrays = open_folder(goldens / name)
    written = export(tmp_path / "out", arrays, shard_bytes=shard_bytes)
    check_identical(written, safetensors.numpy.load_file(goldens / name / "model.safetensors"))
    again = open_folder(tmp_path / "out")
    check_identical(
        {n: a.read() for n, a in again.items()}, {n: a.read() for n, a in arrays.items()}
    )


def test_shard_names_of_transformers(goldens, tmp_path):
    export(tmp_path / "out", open_folder(goldens / "single"), shard_bytes=8_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    theirs = json.loads((goldens / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for path in (tmp_path / "out").glob("*.safetensors"):
        shard = safetensors.numpy.load_file(path)
        assert sum(array.nbytes for array in shard.values()) <= 8_000


def test_rounding_to_bfloat16(goldens, tmp_path):
    """transformers rounded the same float32 weights, to the nearest even."""
    arrays = open_folder(goldens / "single")
    written = export(tmp_path / "out", to_bfloat16(arrays))
    check_identical(
        written, safetensors.numpy.load_file(goldens / "bfloat16" / "model.safetensors")
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tied_head_is_written_as_an_array(goldens, tmp_path):
    arrays = open_folder(goldens / "tied_scaled")
    written = export(tmp_path / "out", arrays)
    expected = written["shared.weight"] * np.float32(12**-0.5)
    np.testing.assert_array_equal(written["lm_head.weight"], expected)
    actual = logits(open_folder(tmp_path / "out"), goldens)
    assert largest_difference(actual, expected_logits("tied_scaled", goldens)) < TOLERANCE


def test_config(goldens, tmp_path):
    export(tmp_path / "out", open_folder(goldens / "single"), dropout_rate=0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((goldens / "single" / "config.json").read_text())
    theirs |= {"dropout_rate": 0.05, "tie_word_embeddings": False, "torch_dtype": "float32"}
    assert config == {key: theirs[key] for key in config}


def test_one_shard_in_memory(goldens, tmp_path):
    """Arrays are read shard by shard, each once."""
    order = []

    def recorded(name: str, array: LazyArray) -> LazyArray:
        def read_slice(index):
            order.append((name, len(list(tmp_path.glob(".out.*/*.safetensors")))))
            return array.read_slice(index)

        return LazyArray(array.shape, array.dtype, read_slice)

    arrays = {n: recorded(n, array) for n, array in open_folder(goldens / "single").items()}
    export(tmp_path / "out", arrays, shard_bytes=8_000)
    assert sorted(name for name, _ in order) == sorted(arrays)
    num_written = [count for _, count in order]  # shards on disk before each read
    assert num_written == sorted(num_written) and set(num_written) == {0, 1, 2}


def test_a_failed_write_leaves_nothing(goldens, tmp_path):
    arrays = open_folder(goldens / "single")

    def fail(index):
        raise InputError("truncated")

    last = "decoder/layers_1/mlp/wo/kernel"
    broken = arrays | {last: LazyArray(arrays[last].shape, arrays[last].dtype, fail)}
    with pytest.raises(InputError, match="truncated"):
        huggingface.save_checkpoint(tmp_path / "out", broken, shard_bytes=8_000)
    assert not list(tmp_path.iterdir())
    huggingface.save_checkpoint(tmp_path / "out", arrays)
    with pytest.raises(InputError, match="expected a new path"):
        huggingface.save_checkpoint(tmp_path / "out", arrays)


def test_only_whole_models_are_written(goldens, tmp_path):
    arrays = open_folder(goldens / "single")
    vectors = lazy_array.from_numpy(np.ones((2, 1, 5), np.float32))
    wrong = {
        "1 extra: encoder/layers_0/attention/key_adapter/vectors": (
            arrays | {"encoder/layers_0/attention/key_adapter/vectors": vectors}
        ),
        "1 missing: encoder/layers_0/mlp/wo/kernel": {
            n: a for n, a in arrays.items() if n != "encoder/layers_0/mlp/wo/kernel"
        },
        r"1 of another shape: .*layers_0/mlp/wo/kernel: expected \(18, 12\), got \(12, 18\)": {
            n: a.T if n == "encoder/layers_0/mlp/wo/kernel" else a for n, a in arrays.items()
        },
    }
    for message, wrong_arrays in wrong.items():
        with pytest.raises(InputError, match=message):
            huggingface.save_checkpoint(tmp_path / "out", wrong_arrays)
        assert not list(tmp_path.iterdir())


# --- loading in transformers, if installed


@pytest.mark.parametrize("form", ["float32", "shards", "bfloat16"])
def test_written_folders_load_in_transformers(form, goldens, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    arrays = open_folder(goldens / "single")
    rounded = form == "bfloat16"
    huggingface.save_checkpoint(
        tmp_path / "out",
        to_bfloat16(arrays) if rounded else arrays,
        dropout_rate=0.05,
        shard_bytes=8_000 if form == "shards" else 5_000_000_000,
    )
    loaded, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info  # missing, unexpected, of another shape, errors
    assert loaded.lm_head.weight is not loaded.shared.weight
    assert not torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    assert loaded.config.dropout_rate == 0.05
    assert loaded.lm_head.weight.dtype == (torch.bfloat16 if rounded else torch.float32)
    with np.load(goldens / "logits.npz") as file:
        tokens = {name: torch.from_numpy(file[name]) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        mask = (tokens["input_ids"] > 0).long()
        out = loaded.float().eval()(**tokens, attention_mask=mask).logits.numpy()
        tokens_out = loaded.generate(tokens["input_ids"], max_new_tokens=3, use_cache=False)
    golden = expected_logits("bfloat16" if rounded else "single", goldens)
    assert largest_difference(out, golden) < 1e-6
    assert largest_difference(out, logits(open_folder(tmp_path / "out"), goldens)) < TOLERANCE
    assert tokens_out.shape[0] == 2 and not tokens_out[:, 0].any()  # decoder_start_token_id
    loaded.save_pretrained(tmp_path / "again")
    again = open_folder(tmp_path / "again")
    assert largest_difference(logits(again, goldens), golden) < TOLERANCE


# --- damaged and unsupported folders


def check_refused(folder, message: str) -> None:
    """Checks that opening a folder raises one line that names the folder."""
    with pytest.raises(InputError, match=message) as error:
        open_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "bert"}, r"model_type: expected one of \['t5', 'mt5', 's.*'\], got 'bert'"),
        ({"model_type": None}, "model_type: expected one of .*, got None"),
        (
            {"feed_forward_proj": "relu"},
            "feed_forward_proj: expected one of 'gated-relu', .*got 'relu'",
        ),
        ({"feed_forward_proj": None}, r"feed_forward_proj: .*got 'relu' \(the default\)"),
        ({"dense_act_fn": "silu"}, "dense_act_fn: expected 'gelu_new', as .*got 'silu'"),
        ({"relative_attention_num_buckets": 64}, "num_buckets: only 32 is supported, got 64"),
        ({"relative_attention_max_distance": 256}, "max_distance: only 128 is supported, got 256"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon: only 1e-06 is supported, got 1e-05"),
    ],
)
def test_unsupported_models(changed, message, copy):
    folder = copy("single")
    edit(folder / "config.json", **changed)
    check_refused(folder, message)


@pytest.mark.parametrize(
    "key",
    [
        "dense_act_fn",
        "is_gated_act",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
    ],
)
def test_keys_missing_in_older_configs(key, copy, goldens):
    folder = copy("single")
    edit(folder / "config.json", **{key: None})
    assert len(open_folder(folder)) == len(open_folder(goldens / "single"))


def test_missing_untied_head(copy):
    """Refused: transformers 4 draws a missing head at random."""
    folder = copy("tied_scaled_4")
    edit(folder / "config.json", tie_word_embeddings=False)
    check_refused(folder, "tie_word_embeddings false: expected lm_head.weight, got none")


def test_missing_files(tmp_path):
    check_refused(tmp_path / "none", "no such file")
    assert not huggingface.is_checkpoint(file_io.resolve(tmp_path / "none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mt5"}))
    assert not huggingface.is_checkpoint(file_io.resolve(tmp_path))
    check_refused(tmp_path, "expected model.safetensors, pytorch_model.bin or an index of either")
    (tmp_path / "config.json").write_text("{")
    check_refused(tmp_path, "expected JSON")


@pytest.mark.parametrize(
    "name, file",
    [
        ("single", "model.safetensors"),
        ("sharded", "model-00002-of-00003.safetensors"),
        ("torch", "pytorch_model.bin"),
        ("torch_sharded", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_truncated_file(name, file, copy):
    folder = copy(name)
    data = (folder / file).read_bytes()
    for size in (len(data) - 1, len(data) // 2):
        (folder / file).write_bytes(data[:size])
        check_refused(folder, f"{file}: truncated")


@pytest.mark.parametrize(
    "name, file",
    [
        ("sharded", "model-00002-of-00003.safetensors"),
        ("torch_sharded", "pytorch_model-00001-of-00002.bin"),
    ],
)
def test_missing_shard(name, file, copy):
    folder = copy(name)
    (folder / file).unlink()
    check_refused(folder, f"{file}: no such file")


WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize("name", ["sharded", "torch_sharded"])
def test_index_and_shards_disagree(name, copy):
    folder = copy(name)
    (index,) = folder.glob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    without = {n: file for n, file in weight_map.items() if n != WO}
    edit(index, weight_map=without)
    check_refused(folder, f"{weight_map[WO]}: '{WO}': in the file, but not in {index.name}")
    other = next(file for file in weight_map.values() if file != weight_map[WO])
    edit(index, weight_map=without | {WO: other})
    check_refused(folder, WO)
    edit(index, weight_map=weight_map | {"a.weight": other})
    check_refused(folder, f"{other}: 'a.weight': in {index.name}, but not in the file")


@pytest.mark.parametrize(
    "file", ["../evil", "/etc/passwd", "..", "", "a\\b", "a\0b", 3, None, ["x"]]
)
@pytest.mark.parametrize("name", ["sharded", "torch_sharded"])
def test_index_with_paths_outside_the_folder(name, file, copy):
    folder = copy(name)
    shutil.copy(next(folder.glob("*-00001-*")), folder.parent / "evil")
    (index,) = folder.glob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {WO: file}}))
    check_refused(folder, "expected names of files in its own folder, got")


@pytest.mark.parametrize("contents", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_weight_map(contents, copy):
    folder = copy("sharded")
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents))
    check_refused(folder, "expected a weight_map of names to files, got none")


def rewrite(folder: pathlib.Path, change) -> None:
    path = folder / "model.safetensors"
    raw = safetensors.numpy.load_file(path)
    change(raw)
    safetensors.numpy.save_file(raw, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.pop(WO), f"got 1 missing: {WO}"),
        (lambda raw: raw.update({"a.weight": raw[WO]}), "got 1 unknown: a.weight"),
        (lambda raw: raw.update({WO.replace("0", "2", 1): raw[WO]}), "block.1.layer"),
        (
            lambda raw: raw.update({"encoder.block.99999999.x": raw[WO]}),
            "missing: encoder.block.1.layer",
        ),
        (lambda raw: raw.update({"lm_head.weight": raw["lm_head.weight"][0]}), "a matrix"),
    ],
)
def test_wrong_arrays(change, message, copy):
    folder = copy("single")
    rewrite(folder, change)
    check_refused(folder, message)


def test_malicious_torch_file(copy, tmp_path):
    folder = copy("torch")
    marker = tmp_path / "executed"
    body = f"\x80\x02cos\nsystem\n(X{chr(len(f'touch {marker}'))}\0\0\0touch {marker}tR.".encode(
        "latin-1"
    )
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("model/data.pkl", body)
    check_refused(folder, "expected a pickle of tensors only, got os.system")
    assert not marker.exists()


def test_nan_and_shapes_are_refused_on_loading(copy, goldens):
    folder = copy("single")
    dims = dimensions.infer(shapes(open_folder(folder)))

    def add_nan(raw):
        raw[WO] = np.where(raw[WO] == raw[WO].max(), np.nan, raw[WO])

    rewrite(folder, add_nan)
    with pytest.raises(InputError, match="encoder/layers_0/mlp/wo/kernel holds NaN or infinity"):
        load(open_folder(folder))
    rewrite(folder, lambda raw: raw.update({WO: raw[WO][:-1]}))
    with pytest.raises(InputError, match="of another shape: encoder/layers_0/mlp/wo/kernel"):
        load(open_folder(folder), dims)


def test_names_are_those_of_the_model(goldens):
    arrays = open_folder(goldens / "single")
    t5, _ = load(arrays)
    assert set(arrays) == set(params_lib.flatten(network.param_shapes(t5)))
