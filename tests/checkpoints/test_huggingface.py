"""Folders of transformers: its own (goldens/make_hf_files.py) give its logits, and so do ours."""

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

from pemoe_jax.checkpoints import dimensions, huggingface, lazy_array
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import network, params
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

TOLERANCE = 2e-4  # of the largest logit, float32
HEADS = {  # what the logits are made with, by folder
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
    """A copy of a golden folder, to be damaged."""
    return lambda name: pathlib.Path(shutil.copytree(goldens / name, tmp_path / name))


def open_folder(path) -> dict[str, LazyArray]:
    return huggingface.open_checkpoint(file_io.resolve(path))


def shapes(arrays: dict[str, LazyArray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


@functools.cache
def model(dims: tuple) -> network.Transformer:
    return network.Transformer(network.T5Config(**dict(dims), dropout_rate=0.0))


def load(arrays: dict[str, LazyArray], dims=None):
    """(model, its parameters in float32)."""
    made = model(tuple((dims or dimensions.infer(shapes(arrays))).items()))
    return made, lazy_array.load_arrays(arrays, network.param_shapes(made), "the folder")


@functools.cache
def forward(made: network.Transformer):
    return jax.jit(lambda p, batch: made.apply({"params": p}, **batch, enable_dropout=False))


def logits(arrays: dict[str, LazyArray], goldens: pathlib.Path) -> np.ndarray:
    made, weights = load(arrays)
    with np.load(goldens / "logits.npz") as file:
        encoder, decoder = file["input_ids"], file["decoder_input_ids"]
    batch = {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": decoder,
        "decoder_target_tokens": np.ones_like(decoder),
    }
    return forward(made)(weights, {name: a.astype(np.int32) for name, a in batch.items()})


def expected_logits(name: str, goldens: pathlib.Path) -> np.ndarray:
    with np.load(goldens / "logits.npz") as file:
        return file[name]


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_transformers(name, goldens):
    assert huggingface.is_checkpoint(file_io.resolve(goldens / name))
    found = logits(open_folder(goldens / name), goldens)
    assert largest_difference(found, expected_logits(name, goldens)) < TOLERANCE


def test_every_folder_is_tested(goldens):
    assert {path.name for path in goldens.iterdir() if path.is_dir()} == set(HEADS)


@pytest.mark.parametrize("name", HEADS)
def test_arrays_bit_for_bit(name, goldens):
    """The file's values under our names, turned; the logits' kernel as transformers has it."""
    arrays = open_folder(goldens / name)
    if "torch" in name:  # the same weights; the reader itself is tested in test_torch_file.py
        raw = safetensors.numpy.load_file(goldens / "single" / "model.safetensors")
    else:
        raw = {}
        for file in (goldens / name).glob("*.safetensors"):
            raw |= safetensors.numpy.load_file(file)
    key = raw["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    found = arrays["decoder/layers_1/encoder_decoder_attention/key/kernel"]
    assert found.dtype == key.dtype
    np.testing.assert_array_equal(found.read(), key.T)
    bias = raw["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    np.testing.assert_array_equal(arrays["encoder/relpos_bias/rel_embedding"].read(), bias.T)
    embedding = arrays["token_embedder/embedding"].read()
    np.testing.assert_array_equal(embedding, raw["shared.weight"])
    of, _, scaled = HEADS[name].partition(", ")
    head = raw[of].T * np.float32(12**-0.5) if scaled else raw[of].T
    np.testing.assert_array_equal(arrays["decoder/logits_dense/kernel"].read(), head)
    assert len(arrays) == len(raw) + (of == "shared.weight")


def test_a_scaled_head_is_read_in_parts(goldens):
    kernel = open_folder(goldens / "tied_scaled")["decoder/logits_dense/kernel"]
    index = (slice(2, 5), slice(10, 30))
    np.testing.assert_array_equal(kernel.read_slice(index), kernel.read()[index])


def edit(path: pathlib.Path, **changed) -> None:
    """Sets keys of a JSON file; None removes one."""
    found = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def test_an_embedding_that_is_held_as_its_copy(copy, goldens):
    """As some converters of safetensors leave it, of names for one array only the first."""
    folder = copy("single")
    raw = safetensors.numpy.load_file(folder / "model.safetensors")
    raw["decoder.embed_tokens.weight"] = raw.pop("shared.weight")
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    found = open_folder(folder)["token_embedder/embedding"].read()
    np.testing.assert_array_equal(found, raw["decoder.embed_tokens.weight"])


def test_safetensors_come_first(copy, goldens):
    folder = copy("single")
    (folder / "pytorch_model.bin").write_bytes(b"not even a file of torch.save")
    assert len(open_folder(folder)) == len(open_folder(goldens / "single"))


# --- writing


def export(path, arrays, **options) -> dict[str, np.ndarray]:
    """What `safetensors` reads of what we write."""
    huggingface.save_checkpoint(path, arrays, **options)
    found: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        held = safetensors.numpy.load_file(file)
        assert not held.keys() & found.keys()
        found |= held
        with safetensors.safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    return found


def same(found, expected) -> None:
    """Names, types and bits."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape, name
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 8_000, 100])
@pytest.mark.parametrize("name", ["single", "bfloat16"])
def test_what_is_written_is_what_was_read(name, shard_bytes, goldens, tmp_path):
    arrays = open_folder(goldens / name)
    found = export(tmp_path / "out", arrays, shard_bytes=shard_bytes)
    same(found, safetensors.numpy.load_file(goldens / name / "model.safetensors"))
    again = open_folder(tmp_path / "out")
    same({n: a.read() for n, a in again.items()}, {n: a.read() for n, a in arrays.items()})


def test_shards_as_transformers_names_them(goldens, tmp_path):
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
        held = safetensors.numpy.load_file(path)
        assert sum(array.nbytes for array in held.values()) <= 8_000


def test_rounding_to_a_type(goldens, tmp_path):
    """float32 to bfloat16 as transformers rounded the same weights: to the nearest even."""
    arrays = open_folder(goldens / "single")
    found = export(tmp_path / "out", arrays, dtype=ml_dtypes.bfloat16)
    same(found, safetensors.numpy.load_file(goldens / "bfloat16" / "model.safetensors"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_tied_head_is_written_as_one_of_its_own(goldens, tmp_path):
    arrays = open_folder(goldens / "tied_scaled")
    found = export(tmp_path / "out", arrays)
    expected = found["shared.weight"] * np.float32(12**-0.5)
    np.testing.assert_array_equal(found["lm_head.weight"], expected)
    assert (
        largest_difference(
            logits(open_folder(tmp_path / "out"), goldens), expected_logits("tied_scaled", goldens)
        )
        < TOLERANCE
    )


def test_config(goldens, tmp_path):
    export(tmp_path / "out", open_folder(goldens / "single"), dropout_rate=0.05)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((goldens / "single" / "config.json").read_text())
    theirs |= {"dropout_rate": 0.05, "tie_word_embeddings": False, "torch_dtype": "float32"}
    assert config == {key: theirs[key] for key in config}


def test_one_shard_in_memory(goldens, tmp_path):
    """Arrays are read shard by shard, each once."""
    order = []

    def noting(name: str, array: LazyArray) -> LazyArray:
        def read_slice(index):
            order.append((name, len(list(tmp_path.glob(".out.*/*.safetensors")))))
            return array.read_slice(index)

        return LazyArray(array.shape, array.dtype, read_slice)

    arrays = {n: noting(n, array) for n, array in open_folder(goldens / "single").items()}
    export(tmp_path / "out", arrays, shard_bytes=8_000)
    assert sorted(name for name, _ in order) == sorted(arrays)
    written = [count for _, count in order]
    assert written == sorted(written) and set(written) == {0, 1, 2}  # shards that are there already


def test_nothing_is_left_of_a_failure(goldens, tmp_path):
    arrays = open_folder(goldens / "single")

    def fail(index):
        raise InputError("cut short")

    last = "decoder/layers_1/mlp/wo/kernel"
    broken = arrays | {last: LazyArray(arrays[last].shape, arrays[last].dtype, fail)}
    with pytest.raises(InputError, match="cut short"):
        huggingface.save_checkpoint(tmp_path / "out", broken, shard_bytes=8_000)
    assert not list(tmp_path.iterdir())
    huggingface.save_checkpoint(tmp_path / "out", arrays)
    with pytest.raises(InputError, match="is there already"):
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
    for message, given in wrong.items():
        with pytest.raises(InputError, match=message):
            huggingface.save_checkpoint(tmp_path / "out", given)
        assert not list(tmp_path.iterdir())


# --- transformers itself, where it is installed


@pytest.mark.parametrize(
    "options", [{}, {"shard_bytes": 8_000}, {"dtype": ml_dtypes.bfloat16}], ids=str
)
def test_ours_in_transformers(options, goldens, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    arrays = open_folder(goldens / "single")
    huggingface.save_checkpoint(tmp_path / "out", arrays, dropout_rate=0.05, **options)
    loaded, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info  # missing, unexpected, of another shape, errors
    assert loaded.lm_head.weight is not loaded.shared.weight
    assert not torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    assert loaded.config.dropout_rate == 0.05
    rounded = "dtype" in options
    assert loaded.lm_head.weight.dtype == (torch.bfloat16 if rounded else torch.float32)
    with np.load(goldens / "logits.npz") as file:
        tokens = {name: torch.from_numpy(file[name]) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        mask = (tokens["input_ids"] > 0).long()
        out = loaded.float().eval()(**tokens, attention_mask=mask).logits.numpy()
        made = loaded.generate(tokens["input_ids"], max_new_tokens=3, use_cache=False)
    golden = expected_logits("bfloat16" if rounded else "single", goldens)
    assert largest_difference(out, golden) < 1e-6
    assert largest_difference(out, logits(open_folder(tmp_path / "out"), goldens)) < TOLERANCE
    assert made.shape[0] == 2 and not made[:, 0].any()  # it knows what the decoder starts with
    loaded.save_pretrained(tmp_path / "again")
    again = open_folder(tmp_path / "again")
    found = logits(again, goldens)
    assert largest_difference(found, golden) < TOLERANCE


# --- what is wrong with a folder


def refused(folder, message: str) -> None:
    """Opening raises one line."""
    with pytest.raises(InputError, match=message) as error:
        open_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "bert"}, r"model_type: expected one of \['t5', 'mt5'\], found 'bert'"),
        ({"model_type": None}, "model_type: expected one of .*, found None"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj: expected 'gated-gelu' .*found 'relu'"),
        ({"feed_forward_proj": None}, r"feed_forward_proj: .*found 'relu' \(the default\)"),
        ({"dense_act_fn": "silu"}, "dense_act_fn: expected 'gelu_new' .*found 'silu'"),
        ({"relative_attention_num_buckets": 64}, "num_buckets: expected 32 .*found 64"),
        ({"relative_attention_max_distance": 256}, "max_distance: expected 128 .*found 256"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon: expected 1e-06 .*found 1e-05"),
    ],
)
def test_other_models(changed, message, copy):
    folder = copy("single")
    edit(folder / "config.json", **changed)
    refused(folder, message)


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
def test_keys_that_older_configs_lack(key, copy, goldens):
    folder = copy("single")
    edit(folder / "config.json", **{key: None})
    assert len(open_folder(folder)) == len(open_folder(goldens / "single"))


def test_a_head_that_is_neither_there_nor_tied(copy):
    """transformers 4 would draw it at random."""
    folder = copy("tied_scaled_4")
    edit(folder / "config.json", tie_word_embeddings=False)
    refused(folder, "tie_word_embeddings false: expected lm_head.weight, found none")


def test_no_such_folder(tmp_path):
    refused(tmp_path / "none", "no such file")
    assert not huggingface.is_checkpoint(file_io.resolve(tmp_path / "none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mt5"}))
    assert not huggingface.is_checkpoint(file_io.resolve(tmp_path))
    refused(tmp_path, "expected model.safetensors, pytorch_model.bin or an index of either")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "expected JSON")


@pytest.mark.parametrize(
    "name, file",
    [
        ("single", "model.safetensors"),
        ("sharded", "model-00002-of-00003.safetensors"),
        ("torch", "pytorch_model.bin"),
        ("torch_sharded", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_a_file_cut_short(name, file, copy):
    folder = copy(name)
    data = (folder / file).read_bytes()
    for size in (len(data) - 1, len(data) // 2):
        (folder / file).write_bytes(data[:size])
        refused(folder, f"{file}: cut short")


@pytest.mark.parametrize(
    "name, file",
    [
        ("sharded", "model-00002-of-00003.safetensors"),
        ("torch_sharded", "pytorch_model-00001-of-00002.bin"),
    ],
)
def test_a_missing_shard(name, file, copy):
    folder = copy(name)
    (folder / file).unlink()
    refused(folder, f"{file}: no such file")


WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


@pytest.mark.parametrize("name", ["sharded", "torch_sharded"])
def test_an_index_and_shards_that_disagree(name, copy):
    folder = copy(name)
    (index,) = folder.glob("*.index.json")
    places = json.loads(index.read_text())["weight_map"]
    without = {n: file for n, file in places.items() if n != WO}
    edit(index, weight_map=without)
    refused(folder, f"{places[WO]}: '{WO}': the file holds it, {index.name} does not say so")
    other = next(file for file in places.values() if file != places[WO])
    edit(index, weight_map=without | {WO: other})
    refused(folder, WO)
    edit(index, weight_map=places | {"a.weight": other})
    refused(folder, f"{other}: 'a.weight': {index.name} places it there, the file lacks it")


@pytest.mark.parametrize(
    "file", ["../evil", "/etc/passwd", "..", "", "a\\b", "a\0b", 3, None, ["x"]]
)
@pytest.mark.parametrize("name", ["sharded", "torch_sharded"])
def test_an_index_that_leaves_the_folder(name, file, copy):
    folder = copy(name)
    shutil.copy(next(folder.glob("*-00001-*")), folder.parent / "evil")
    (index,) = folder.glob("*.index.json")
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {WO: file}}))
    refused(folder, "expected names of files in its own folder, found")


@pytest.mark.parametrize("contents", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(contents, copy):
    folder = copy("sharded")
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents))
    refused(folder, "expected a weight_map of names to files, found none")


def rewrite(folder: pathlib.Path, change) -> None:
    path = folder / "model.safetensors"
    raw = safetensors.numpy.load_file(path)
    change(raw)
    safetensors.numpy.save_file(raw, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda raw: raw.pop(WO), f"found 1 missing: {WO}"),
        (lambda raw: raw.update({"a.weight": raw[WO]}), "found 1 unknown: a.weight"),
        (lambda raw: raw.update({WO.replace("0", "2", 1): raw[WO]}), "block.1.layer"),
        (
            lambda raw: raw.update({"encoder.block.99999999.x": raw[WO]}),
            "missing: encoder.block.1.layer",
        ),
        (lambda raw: raw.update({"lm_head.weight": raw["lm_head.weight"][0]}), "a matrix"),
    ],
)
def test_other_arrays(change, message, copy):
    folder = copy("single")
    rewrite(folder, change)
    refused(folder, message)


def test_a_malicious_file_of_torch(copy, tmp_path):
    folder = copy("torch")
    mark = tmp_path / "executed"
    body = f"\x80\x02cos\nsystem\n(X{chr(len(f'touch {mark}'))}\0\0\0touch {mark}tR.".encode(
        "latin-1"
    )
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("model/data.pkl", body)
    refused(folder, "asks for os.system: expected tensors and nothing else")
    assert not mark.exists()


def test_values_and_shapes_are_seen_when_it_is_loaded(copy, goldens):
    folder = copy("single")
    dims = dimensions.infer(shapes(open_folder(folder)))

    def spoil(raw):
        raw[WO] = np.where(raw[WO] == raw[WO].max(), np.nan, raw[WO])

    rewrite(folder, spoil)
    with pytest.raises(InputError, match="encoder/layers_0/mlp/wo/kernel holds NaN or infinity"):
        load(open_folder(folder))
    rewrite(folder, lambda raw: raw.update({WO: raw[WO][:-1]}))
    with pytest.raises(InputError, match="of another shape: encoder/layers_0/mlp/wo/kernel"):
        load(open_folder(folder), dims)


def test_names_are_those_of_our_model(goldens):
    arrays = open_folder(goldens / "single")
    made, _ = load(arrays)
    assert set(arrays) == set(params.flatten(network.param_shapes(made)))
