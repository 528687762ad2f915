"""Folders of Switch Transformers and T5 1.0 (goldens/make_switch_files.py), read and written."""

import functools
import json
import pathlib
import shutil

import archives
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from methods import largest_difference

from pemoe_jax.checkpoints import base_model, huggingface, lazy_array
from pemoe_jax.checkpoints.base_model import BaseModel
from pemoe_jax.checkpoints.huggingface import names
from pemoe_jax.core import network, params
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse

FOLDERS = ("switch", "switch_all", "t5_1_0", "switch_torch")
EXPERT = "encoder.block.3.layer.1.mlp.experts.expert_1.wo.weight"
ROUTER = "decoder.block.1.layer.2.mlp.router.classifier.weight"


@pytest.fixture(scope="module")
def goldens(tmp_path_factory) -> pathlib.Path:
    return archives.unpack("switch_files", tmp_path_factory.mktemp("switch_files"))


@pytest.fixture
def copy(goldens, tmp_path):
    """Returns a function that copies a golden folder, for tests that change it."""
    return lambda name: pathlib.Path(shutil.copytree(goldens / name, tmp_path / name))


def build(opened: BaseModel, **sparse) -> network.Transformer:
    config = network.T5Config(**opened.config(), dropout_rate=0.0)
    layers = opened.sparse
    return network.Transformer(config, sparse=layers and Sparse(**layers, **sparse))


def layout(model: network.Transformer) -> names.Layout:
    return huggingface._make_layout(model.config, model.sparse)


@pytest.mark.parametrize("case", ["switch", "switch_drops", "switch_all", "t5_1_0"])
def test_logits_and_gradients_of_transformers(case, goldens):
    opened = base_model.open_base(goldens / case.removesuffix("_drops"))
    model = build(opened, **({"capacity": 1} if case == "switch_drops" else {}))
    weights = opened.load(network.param_shapes(model))
    with np.load(goldens / f"{case}.npz") as file:
        golden = dict(file)
    with np.load(goldens / "tokens.npz") as file:
        encoder, decoder, target = (
            file[name].astype(np.int32) for name in ("input_ids", "decoder_input_ids", "labels")
        )

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_fn(weights):
        logits = model.apply({"params": weights}, encoder, decoder, target, enable_dropout=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.sum(losses * (target > 0)) / jnp.sum(target > 0), logits

    (loss, logits), grads = jax.jit(loss_fn)(weights)
    real = target > 0
    assert largest_difference(logits[real], golden["logits"][real]) < 2e-5
    np.testing.assert_allclose(loss, golden["loss"], rtol=2e-6)
    flat = {p: lazy_array.from_numpy(np.asarray(g)) for p, g in params.flatten(grads).items()}
    theirs = names.to_theirs(flat, layout(model))
    theirs = {name: g for name, g in theirs.items() if name not in names.EMBEDDING_COPIES}
    expected = {n.removeprefix("grads/"): g for n, g in golden.items() if "grads/" in n}
    assert theirs.keys() == expected.keys()
    largest = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        assert np.abs(theirs[name].read() - grad).max() < 5e-5 * largest, name


def test_the_capacity_of_a_row_matters(goldens):
    with np.load(goldens / "switch.npz") as a, np.load(goldens / "switch_drops.npz") as b:
        assert largest_difference(a["logits"], b["logits"]) > 0.1


def raw_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    raw: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        raw |= safetensors.numpy.load_file(file)
    return raw


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 4_000])
@pytest.mark.parametrize("name", FOLDERS)
def test_write_what_was_read(name, shard_bytes, goldens, tmp_path):
    """Every array bit for bit; torch.save's copies of a tied embedding are left out."""
    opened = base_model.open_base(goldens / name)
    model = build(opened)
    arrays = opened.arrays
    if shard_bytes == 4_000:  # as arrays of a run: not stored by expert
        arrays = {path: lazy_array.from_numpy(array.read()) for path, array in arrays.items()}
    huggingface.save_checkpoint(
        tmp_path / "out",
        arrays,
        activations=model.config.mlp_activations,
        sparse=model.sparse,
        shard_bytes=shard_bytes,
    )
    written, expected = (raw_arrays(f) for f in (tmp_path / "out", goldens / FOLDERS[0]))
    if "torch" not in name:
        expected = raw_arrays(goldens / name)
    assert written.keys() == expected.keys()
    for key, array in written.items():
        assert array.tobytes() == expected[key].tobytes() and array.dtype == expected[key].dtype
    again = base_model.open_base(tmp_path / "out")
    assert again.config() == opened.config() and again.sparse == opened.sparse
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((goldens / name / "config.json").read_text())
    # What is not a setting of the model, and the places of an expert: none may be dropped.
    free = {"dropout_rate", "torch_dtype", "use_cache", "expert_capacity"}
    theirs |= {"tie_word_embeddings": name != "switch_all"}
    for key in config.keys() & theirs.keys() - free:
        assert config[key] == theirs[key], key
    assert config.get("expert_capacity", 1 << 20) == 1 << 20


@pytest.mark.parametrize("name", ["switch", "switch_all", "t5_1_0"])
def test_written_folders_load_in_transformers(name, goldens, tmp_path):
    """They load without a complaint, and compute what the folders that were read compute."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    opened = base_model.open_base(goldens / name)
    activations = opened.model_dimensions()["mlp_activations"]
    huggingface.save_checkpoint(tmp_path / "out", opened.arrays, activations=activations)
    kind = "T5" if name == "t5_1_0" else "SwitchTransformers"
    with np.load(goldens / "tokens.npz") as file:
        tokens = {key: torch.from_numpy(file[key]) for key in ("input_ids", "decoder_input_ids")}
    # A written model drops no token.
    capacity = {} if kind == "T5" else {"expert_capacity": 1 << 20}
    logits = []
    for folder in (goldens / name, tmp_path / "out"):
        model, info = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **capacity
        )
        assert not any(info.values()), info
        with torch.no_grad():
            mask = (tokens["input_ids"] > 0).long()
            logits.append(model.eval()(**tokens, attention_mask=mask).logits.numpy())
    assert largest_difference(*logits) < 1e-6


def test_copies_of_the_embedding_are_no_head(goldens, copy):
    """A head that is equal to the embedding is tied; another is used and, if tied, scaled."""
    folder = copy("switch")
    raw = raw_arrays(folder)
    embedding = raw["shared.weight"]
    for head, scale in ((embedding.copy(), None), (embedding + 1, np.float32(12**-0.5))):
        raw["lm_head.weight"] = head
        safetensors.numpy.save_file(raw, folder / "model.safetensors")
        arrays = base_model.open_base(folder).arrays
        assert ("decoder/logits_dense/kernel" in arrays) == (scale is not None)
    kernel = arrays["decoder/logits_dense/kernel"].read()
    np.testing.assert_array_equal(kernel, head.T * scale)


def test_stacks_with_embeddings_of_their_own(copy):
    """As transformers 5 trains them, if the head is not tied: not a model that we have."""
    folder = copy("switch_all")
    raw = raw_arrays(folder)
    raw["decoder.embed_tokens.weight"][-1, -1] += 1
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    check_refused(folder, "decoder.embed_tokens.weight: expected a copy of shared.weight")


def edit(path: pathlib.Path, **changed) -> None:
    """Sets keys of a JSON file; removes those set to None."""
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("activation", ["gelu", "gated-gelu", None])
def test_names_and_config_of_switch_xxl(goldens, copy, activation):
    """Gated experts, a head in the decoder, and other depths in config.json than in the arrays."""
    folder = copy("switch")
    raw = {}
    for name, array in raw_arrays(folder).items():
        if name.endswith(".wi.weight"):
            raw[name.replace(".wi.", ".wi_1.")] = array + 1
            name = name.replace(".wi.", ".wi_0.")
        raw[name] = array
    raw["decoder.lm_head.weight"] = raw["shared.weight"] * 2
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    depths = {"num_layers": 48, "num_decoder_layers": 12, "num_sparse_encoder_layers": 24}
    edit(folder / "config.json", dense_act_fn=activation, **depths)
    opened = base_model.open_base(folder)
    config = network.T5Config(**opened.config())
    assert config.mlp_activations == ("gelu", "linear") and not config.logits_via_embedding
    assert (config.num_encoder_layers, config.num_decoder_layers) == (4, 2)
    weights = params.flatten(opened.load(network.param_shapes(build(opened))))
    np.testing.assert_array_equal(  # untied and not scaled
        weights["decoder/logits_dense/kernel"], raw["decoder.lm_head.weight"].T
    )
    wi_1 = weights["encoder/layers_3/mlp/expert/wi_1/kernel"]
    np.testing.assert_array_equal(wi_1[1], raw[EXPERT.replace(".wo.", ".wi_1.")].T)
    with pytest.raises(InputError, match="experts whose MLP is gated .*use `pemoe convert base`"):
        huggingface.save_checkpoint(folder / "out", opened.arrays)


# --- refused


def rename(raw: dict, old: str, new: str) -> None:
    raw[new] = raw.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop(EXPERT), f"got 1 missing: {EXPERT}"),
        (
            lambda raw: [raw.pop(name) for name in [*raw] if "expert_2." in name],
            "got 6 missing: decoder.block.1.layer.2.mlp.experts.expert_2.wi.weight; ",
        ),
        (lambda raw: rename(raw, EXPERT, EXPERT.replace("_1", "_01")), f"1 missing: {EXPERT}"),
        (
            lambda raw: raw.update({EXPERT.replace("_1", "_01"): raw[EXPERT]}),
            "got 1 unknown: .*expert_01.wo.weight",
        ),
        (
            lambda raw: raw.update({EXPERT.replace("_1", "_3"): raw[EXPERT]}),
            "got 1 unknown: .*expert_3.wo.weight",
        ),
        (
            lambda raw: raw.update({EXPERT: raw[EXPERT][:-1]}),
            rf"{EXPERT}: expected \(12, 18\) float32, got \(11, 18\) float32",
        ),
        (
            lambda raw: raw.update({EXPERT: raw[EXPERT].T.copy()}),
            rf"{EXPERT}: expected \(12, 18\) float32, got \(18, 12\) float32",
        ),
        (
            lambda raw: raw.update({EXPERT: raw[EXPERT].astype(np.float16)}),
            rf"{EXPERT}: expected \(12, 18\) float32, got \(12, 18\) float16",
        ),
        (
            lambda raw: raw.update({ROUTER.replace("weight", "bias"): raw[ROUTER][:, 0].copy()}),
            "router.classifier.bias: expected routers without biases, got one",
        ),
        (lambda raw: raw.pop(ROUTER), f"got 1 missing: {ROUTER}"),
    ],
)
def test_wrong_experts(change, message, copy):
    folder = copy("switch")
    raw = raw_arrays(folder)
    change(raw)
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    check_refused(folder, message)


def check_refused(folder, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        base_model.open_base(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_expert_that_a_header_names_twice(copy):
    """`json` keeps the last of two equal keys."""
    folder = copy("switch")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    other = EXPERT.replace("_1", "_2").encode()
    assert data.count(other) == 1
    path.write_bytes(data.replace(other, EXPERT.encode()))
    check_refused(folder, f"model.safetensors: .*{EXPERT}.* twice")


def test_a_router_of_another_size(copy):
    folder = copy("switch")
    raw = raw_arrays(folder)
    raw[ROUTER] = raw[ROUTER][:2].copy()
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    opened = base_model.open_base(folder)
    message = r"decoder/layers_1/mlp/router/router_weights/w/kernel: expected \(12, 3\), got"
    with pytest.raises(InputError, match=message):
        opened.load(network.param_shapes(build(opened)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 8}, r"num_experts: expected 3 \(from the shapes of the arrays\), got 8"),
        ({"num_layers": 6}, r"num_layers: expected 4 \(from the shapes of the arrays\), got 6"),
        (
            {"num_sparse_encoder_layers": 1},
            r"num_sparse_encoder_layers: 1 does not give the .*, \[1, 3\] of 4 layers",
        ),
        (
            {"num_sparse_decoder_layers": 2},
            r"num_sparse_decoder_layers: 2 does not give .*, \[1\] of 2 layers",
        ),
        ({"router_bias": True}, "router_bias: only False is supported, got True"),
        ({"router_dtype": "bfloat16"}, "router_dtype: only 'float32' is supported"),
        (
            {"dense_act_fn": "gelu"},
            r"dense_act_fn: expected one of 'relu', .*\(the arrays have one wi\), got 'gelu'",
        ),
        ({"dense_act_fn": ["relu"]}, r"dense_act_fn: .* got \['relu'\]"),
        ({"d_ff": 20}, "d_ff: expected 18"),
        ({"model_type": "t5"}, "expected the arrays of a T5, got"),
    ],
)
def test_wrong_configs(changed, message, copy):
    folder = copy("switch")
    edit(folder / "config.json", **changed)
    check_refused(folder, message)


def test_gated_arrays_contradict_relu(copy):
    folder = copy("switch")
    raw = raw_arrays(folder)
    for name in [*raw]:
        if name.endswith(".wi.weight"):
            raw[name.replace(".wi.", ".wi_1.")] = raw[name]
            rename(raw, name, name.replace(".wi.", ".wi_0."))
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    check_refused(
        folder, r"expected one of 'gelu', 'gated-gelu', 'gelu_new' \(.* wi_0 and wi_1\), got 'relu'"
    )


def test_layouts_of_transformers_that_are_not_ours(copy):
    """At its step 4 transformers has sparse layers 1, 5, …; asymmetric stacks."""
    folder = copy("switch")
    raw = raw_arrays(folder)
    dense = {n.replace("block.3", "block.0"): a for n, a in raw.items() if ".mlp.w" in n}
    sparse = [name for name in raw if name.startswith("encoder.block.3.layer.1.mlp.")]
    for name in sparse:
        del raw[name]
    raw |= {
        name.replace("block.0", "block.3"): array
        for name, array in dense.items()
        if name.startswith("encoder.block.0")
    }
    safetensors.numpy.save_file(raw, folder / "model.safetensors")
    edit(folder / "config.json", num_sparse_encoder_layers=1)
    check_refused(folder, r"got sparse layers \[1\] of 4 in the encoder; layers \[1\] of 2")


@pytest.mark.parametrize(
    ("sparse", "reason"),
    [
        ({"top_k": 2}, "TOP_K 2"),
        ({"routing": "experts"}, "ROUTING 'experts'"),
        ({"combine": "straight"}, "COMBINE 'straight'"),
    ],
)
def test_methods_that_transformers_lacks(sparse, reason, goldens, tmp_path):
    opened = base_model.open_base(goldens / "switch")
    model = build(opened, **sparse)
    with pytest.raises(InputError, match=f"cannot represent {reason} .*use `pemoe convert base`"):
        huggingface.save_checkpoint(tmp_path / "out", opened.arrays, sparse=model.sparse)
    assert not list(tmp_path.iterdir())


def test_layouts_that_transformers_lacks(tmp_path):
    config = network.T5Config(
        8,
        emb_dim=4,
        num_heads=1,
        head_dim=2,
        mlp_dim=3,
        num_encoder_layers=4,
        num_decoder_layers=4,
        mlp_activations=("relu",),
    )
    for sparse, message in (
        (
            Sparse(2, sparse_step=4),
            r"SPARSE_STEP must be 1 or 2 .*, got 4 \(encoder: .* \[3\] of 4\)",
        ),
        (Sparse(2, extra_mlp=True), "cannot represent EXTRA_MLP True"),
    ):
        shapes = network.param_shapes(network.Transformer(config, sparse=sparse))
        arrays = {
            path: lazy_array.from_numpy(np.zeros(leaf.shape, np.float32))
            for path, leaf in params.flatten(shapes).items()
        }
        with pytest.raises(InputError, match=message):
            huggingface.save_checkpoint(tmp_path / "out", arrays, sparse=sparse)
