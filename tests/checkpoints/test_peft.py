"""PEFT's format, read and written; the goldens are adapters that PEFT saved."""

import functools
import importlib
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from archives import GOLDENS, unpack
from methods import largest_difference

from pemoe_jax.checkpoints import peft
from pemoe_jax.core import adapters, network, params
from pemoe_jax.core.adapters import Adapters, LoRAExperts, VectorExperts
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router

TOLERANCE = 2e-4  # of the largest logit, float32
ATTENTION = ("query", "key", "value", "out")


def lora(rank: int, alpha: float) -> functools.partial:
    return functools.partial(LoRAExperts, rank=rank, alpha=alpha)


# The golden adapters as our adapters.
CASES = {
    "ia3": Adapters(key=VectorExperts, value=VectorExperts, gate=VectorExperts),
    "ia3_bin": Adapters(key=VectorExperts, value=VectorExperts, gate=VectorExperts),
    "ia3_outputs": Adapters(**dict.fromkeys((*ATTENTION, "wi_0", "wi_1", "wo"), VectorExperts)),
    # rank-stabilized in PEFT: 5 / √3 = (5 · √3) / 3
    "lora_all": Adapters(
        **dict.fromkeys((*ATTENTION, "wi_0", "wi_1", "wo"), lora(3, 5 * 3**0.5)),
    ),
    "lora_paper": Adapters(**dict.fromkeys((*ATTENTION, "wi_0", "wo"), lora(4, 16.0))),
    "lora_patterns": Adapters(query=lora(1, 8.0), value=lora(2, 24.0), wo=lora(5, 8.0)),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> pathlib.Path:
    """Returns the folder of goldens."""
    return unpack("peft_files", tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="session")
def base(saved) -> dict[str, np.ndarray]:
    with np.load(saved / "base.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def config(base) -> network.T5Config:
    fields = {k.removeprefix("config/"): int(v) for k, v in base.items() if k.startswith("config/")}
    return network.T5Config(**fields, dropout_rate=0.0)


@pytest.fixture(scope="session")
def load(config):
    """Returns a function that loads an adapter's folder for the golden base."""
    return lambda folder: peft.load_adapter(folder, config.as_dict())


def select_prefix(base: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}


def tokens(base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in base.items() if k.endswith("_tokens")}


def our_logits(base, config, sites: Adapters, arrays: dict[str, np.ndarray]) -> np.ndarray:
    model = network.Transformer(config, sites)
    tree = params.unflatten(
        {k: jnp.asarray(v) for k, v in (select_prefix(base, "params/") | arrays).items()}
    )
    params.check_matches(tree, network.param_shapes(model), "test")
    forward = jax.jit(lambda p: model.apply({"params": p}, **tokens(base), enable_dropout=False))
    return np.asarray(forward(tree))


def difference(base, logits, expected) -> float:
    """Returns the largest difference at targets that are not padding."""
    mask = base["decoder_target_tokens"] > 0
    return largest_difference(logits[mask], expected[mask])


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def config_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def random_arrays(config, sites: Adapters) -> dict[str, np.ndarray]:
    shapes = params.flatten(network.param_shapes(network.Transformer(config, sites)))
    rng = np.random.default_rng(0)
    return {
        path: (0.3 * rng.standard_normal(leaf.shape) + path.endswith("vectors")).astype(np.float32)
        for path, leaf in shapes.items()
        if params.is_adapter(path)
    }


def test_goldens_are_far_from_the_base(saved, base):
    for case in CASES:
        logits = np.load(saved / case / "logits.npy")
        assert difference(base, logits, base["base/logits"]) > 0.1


@pytest.mark.parametrize("case", [case for case in CASES if case != "ia3_bin"])
def test_load(saved, base, config, case, load):
    description, arrays = load(saved / case)
    assert description == adapters.describe(CASES[case])
    assert all(array.dtype == np.float32 for array in arrays.values())
    logits = our_logits(base, config, adapters.from_description(description), arrays)
    assert difference(base, logits, np.load(saved / case / "logits.npy")) < TOLERANCE


def test_pickled_weights_are_equal(saved, load):
    description, arrays = load(saved / "ia3")
    pickled_description, pickled = load(saved / "ia3_bin")
    assert pickled_description == description and pickled.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(pickled[path], array)


def scaling(settings: dict, module: str) -> float:
    rank = settings["rank_pattern"].get(module, settings["r"])
    alpha = settings["alpha_pattern"].get(module, settings["lora_alpha"])
    return alpha / (rank**0.5 if settings["use_rslora"] else rank)


@pytest.mark.parametrize("case", [case for case in CASES if case != "ia3_bin"])
def test_save_equals_what_peft_saved(saved, load, tmp_path, case):
    peft.save_adapter(tmp_path / "out", *load(saved / case), "google/t5")
    written, golden = tensors_of(tmp_path / "out"), tensors_of(saved / case)
    assert written.keys() == golden.keys()
    for name, tensor in golden.items():
        assert written[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(written[name], tensor, err_msg=name, strict=True)
    ours, theirs = config_of(tmp_path / "out"), config_of(saved / case)
    assert ours.keys() <= theirs.keys()
    assert ours["base_model_name_or_path"] == "google/t5" == peft.base_model_name(tmp_path / "out")
    for key in ("target_modules", "feedforward_modules"):
        assert set(ours.get(key, ())) == set(theirs.get(key, ()))
    same = ("peft_type", "task_type", "inference_mode", "fan_in_fan_out", "modules_to_save", "bias")
    assert {k: ours.get(k) for k in same} == {k: theirs.get(k) for k in same}
    if ours["peft_type"] == "LORA":
        for module in ours["target_modules"]:
            assert scaling(ours, module) == pytest.approx(scaling(theirs, module), rel=1e-12)


def test_plain_alphas_are_written_as_integers(saved, load, tmp_path):
    peft.save_adapter(tmp_path / "out", *load(saved / "lora_paper"), None)
    settings = config_of(tmp_path / "out")
    assert (settings["r"], settings["rank_pattern"], settings["alpha_pattern"]) == (4, {}, {})
    assert settings["lora_alpha"] == 16 and isinstance(settings["lora_alpha"], int)


def test_format_and_method_are_detected(saved, load):
    assert peft.is_adapter(saved / "ia3") and not peft.is_adapter(saved)
    assert peft.method_name(load(saved / "ia3")[0]) == "ia3"
    assert peft.method_name(load(saved / "lora_all")[0]) == "lora"
    with pytest.raises(InputError, match="expected .* base_model_name_or_path, got None"):
        peft.base_model_name(saved / "ia3")


# -- other forms of the files, of other versions of PEFT ------------------------------------------


@pytest.fixture
def edited(saved, tmp_path):
    """Returns a function that copies a golden folder and changes its settings and tensors."""

    def edit(case: str, settings=None, tensors=None) -> pathlib.Path:
        folder = tmp_path / case
        shutil.copytree(saved / case, folder)
        if settings:
            text = json.dumps({**config_of(folder), **settings})
            (folder / "adapter_config.json").write_text(text)
        if tensors:
            changed = tensors(tensors_of(folder))
            safetensors.numpy.save_file(changed, folder / "adapter_model.safetensors")
        return folder

    return edit


def check_equal(actual, expected) -> None:
    assert actual[0] == expected[0] and actual[1].keys() == expected[1].keys()
    for path, array in expected[1].items():
        np.testing.assert_array_equal(actual[1][path], array)


@pytest.mark.parametrize(
    "case, old, new",
    [
        ("lora_paper", ".weight", ".default.weight"),
        ("ia3", ".ia3_l", ".ia3_l.default"),
    ],
)
def test_tensor_names_with_the_adapter_name(saved, load, edited, case, old, new):
    folder = edited(case, tensors=lambda t: {k.replace(old, new): v for k, v in t.items()})
    assert not tensors_of(folder).keys() & tensors_of(saved / case).keys()
    check_equal(load(folder), load(saved / case))


def module_names(saved, case: str) -> list[str]:
    names = [name.removeprefix("base_model.model.") for name in tensors_of(saved / case)]
    return sorted({name.split(".lora_")[0].removesuffix(".ia3_l") for name in names})


@pytest.mark.parametrize("case", ["ia3", "lora_patterns"])
@pytest.mark.parametrize("form", ["full names", "pattern", "exclusion"])
def test_forms_of_target_modules(saved, load, edited, case, form):
    modules = module_names(saved, case)
    settings = {
        "full names": {"target_modules": modules},
        "pattern": {"target_modules": r".*\.(q|k|v|wo)", "exclude_modules": "nothing"},
        "exclusion": {
            "target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo", "lm_head"],
            "exclude_modules": [
                *({"q", "k", "v", "o", "wi_0", "wi_1", "wo"} - {n.split(".")[-1] for n in modules}),
                "lm_head",
            ],
        },
    }[form]
    if case == "ia3" and form != "exclusion":
        wo = [name for name in modules if name.endswith("wo")]
        settings["feedforward_modules"] = wo if form == "full names" else r".*\.wo"
    check_equal(load(edited(case, settings)), load(saved / case))


def test_training_settings_are_ignored(saved, load, edited):
    settings = {
        "auto_mapping": {"base_model_class": "T5ForConditionalGeneration"},
        "base_model_name_or_path": "google/t5-large-lm-adapt",
        "inference_mode": False,
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.3,
        "peft_version": "0.6.0",
        "revision": "main",
        "a_later_setting": None,
        "another": [],
    }
    folder = edited("lora_paper", settings)
    check_equal(load(folder), load(saved / "lora_paper"))
    assert peft.base_model_name(folder) == "google/t5-large-lm-adapt"


def test_config_of_an_early_version(saved, load, edited):
    folder = edited("lora_paper")
    early = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out")
    settings = {key: value for key, value in config_of(folder).items() if key in early}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    check_equal(load(folder), load(saved / "lora_paper"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_dtypes(saved, load, edited, dtype):
    folder = edited("lora_paper", tensors=lambda t: {k: v.astype(dtype) for k, v in t.items()})
    _, arrays = load(folder)
    _, expected = load(saved / "lora_paper")
    for path, array in expected.items():
        assert arrays[path].dtype == np.float32
        np.testing.assert_array_equal(arrays[path], array.astype(dtype).astype(np.float32))


# -- refusals ------------------------------------------------------------------------------------


def check_refused(function, *parts: str) -> None:
    """Checks that a function raises one line with these parts."""
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "case, key, value",
    [
        ("ia3", "peft_type", "LOHA"),
        ("ia3", "peft_type", None),
        ("ia3", "fan_in_fan_out", True),
        ("ia3", "modules_to_save", ["lm_head"]),
        ("ia3", "feedforward_modules", ["v"]),
        ("ia3", "feedforward_modules", []),
        ("ia3", "feedforward_modules", ["k", "wo"]),
        ("ia3", "feedforward_modules", 3),
        ("ia3_outputs", "feedforward_modules", ["wo"]),
        ("ia3", "target_modules", ["k", "v"]),
        ("ia3", "target_modules", ["q", "k", "v", "wo"]),
        ("ia3", "target_modules", ["SelfAttention.k", "v", "wo"]),
        ("ia3", "target_modules", None),
        ("ia3", "target_modules", [1]),
        ("lora_paper", "exclude_modules", {"k": 1}),
        ("lora_paper", "use_dora", True),
        ("lora_paper", "bias", "lora_only"),
        ("lora_paper", "lora_bias", True),
        ("lora_paper", "layers_to_transform", [0]),
        ("lora_paper", "layers_to_transform", 0),
        ("lora_paper", "layer_replication", [[0, 2], [1, 2]]),
        ("lora_paper", "target_parameters", ["wo.weight"]),
        ("lora_paper", "trainable_token_indices", [1]),
        ("lora_paper", "alora_invocation_tokens", [1, 2]),
        ("lora_paper", "use_qalora", True),
        ("lora_paper", "use_bdlora", {"nblocks": 2}),
        ("lora_paper", "arrow_config", {"top_k": 3}),
        ("lora_paper", "kasa_config", {"beta": 1}),
        ("lora_paper", "monteclora_config", {"num_samples": 8}),
        ("lora_paper", "velora_config", {"scale": 1.0}),
        ("lora_paper", "loftq_config", {"loftq_bits": 4}),
        ("lora_paper", "megatron_config", {"hidden": 4}),
        ("lora_paper", "init_lora_weights", "pissa_niter_4"),
        ("lora_paper", "a_later_setting", 0),
        ("lora_paper", "rank_pattern", {"encoder.block.0.layer.0.SelfAttention.q": 8}),
        ("lora_paper", "alpha_pattern", {"^q": 8}),
        ("lora_paper", "alpha_pattern", ["q"]),
        ("lora_paper", "r", 4.0),
        ("lora_paper", "r", None),
        ("lora_paper", "r", 0),
        ("lora_paper", "lora_alpha", "16"),
        ("lora_paper", "lora_alpha", float("nan")),
        ("lora_paper", "lora_alpha", True),
    ],
)
def test_refused_settings(load, edited, case, key, value):
    folder = edited(case, {key: value})
    check_refused(
        lambda: load(folder),
        str(folder / "adapter_config.json"),
        f"{key}: expected",
        f"got {value!r}",
    )


K = "base_model.model.encoder.block.1.layer.0.SelfAttention.k.ia3_l"
A = "base_model.model.decoder.block.2.layer.1.EncDecAttention.o.lora_A.weight"


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_(**changed):
    return lambda tensors: {**tensors, **changed}


def with_value(name, value):
    def change(tensors):
        tensors[name].flat[-1] = value
        return tensors

    return change


@pytest.mark.parametrize(
    "case, change, part",
    [
        ("ia3", without(K), f"1 missing: {K}"),
        ("lora_paper", without(A), f"1 missing: {A}"),
        ("ia3", with_(**{f"{K}.bias": np.ones(3, np.float32)}), f"1 extra: {K}.bias"),
        (
            "lora_paper",
            with_(**{A.replace("lora_A.weight", "bias"): np.ones(3, np.float32)}),
            "1 extra: base_model.model.decoder.block.2.layer.1.EncDecAttention.o.bias",
        ),
        (
            "lora_paper",
            with_(**{A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(2, np.float32)}),
            "lora_magnitude_vector",
        ),
        (
            "ia3",
            with_(**{K.replace("block.1", "block.2"): np.ones((18, 1), np.float32)}),
            "1 extra: base_model.model.encoder.block.2",
        ),
        ("ia3", with_(**{K: np.ones((1, 18), np.float32)}), f"{K}: expected (18, 1), got (1, 18)"),
        ("lora_paper", with_(**{A: np.ones((5, 18), np.float32)}), "expected (4, 18), got (5, 18)"),
        ("lora_paper", with_(**{A: np.ones((4, 20), np.float32)}), "expected (4, 18), got (4, 20)"),
        ("ia3", with_(**{K: np.ones((18, 1), np.int32)}), f"{K}: expected floats, got int32"),
        (
            "ia3",
            with_(**{f"{K}.default": np.ones((18, 1), np.float32)}),
            f"got {K}.default twice",
        ),
        ("ia3", with_value(K, np.nan), f"{K} holds NaN or infinity"),
        ("lora_paper", with_value(A, np.inf), f"{A} holds NaN or infinity"),
        ("ia3", lambda t: {"router": np.ones(2, np.float32)}, "got router"),
        ("ia3", lambda t: {}, "got no tensor"),
    ],
)
def test_refused_tensors(load, edited, case, change, part):
    folder = edited(case, tensors=change)
    check_refused(lambda: load(folder), str(folder), part)


def test_adapters_in_some_layers_only_are_refused(load, edited):
    """A pattern of PEFT can select the modules of one stack."""
    folder = edited(
        "lora_paper",
        {"target_modules": r"encoder.*\.(q|k|v|o|wi_0|wo)"},
        lambda tensors: {k: v for k, v in tensors.items() if ".encoder." in k},
    )
    absent = "decoder.block.0.layer.0.SelfAttention.q"
    check_refused(
        lambda: load(folder),
        "target_modules: expected q in every layer",
        f"but {absent} has no tensor",
    )


def test_float64_beyond_float32_is_refused(load, edited):
    change = with_(**{K: np.full((18, 1), 1e300)})
    check_refused(lambda: load(edited("ia3", tensors=change)), "infinity", K)


def test_ranks_that_differ_within_a_site_are_refused(load, edited):
    def wider(tensors):  # a whole pair of rank 5 where the configuration says 4
        b = A.replace("lora_A", "lora_B")
        return {**tensors, A: np.ones((5, 18), np.float32), b: np.ones((20, 5), np.float32)}

    check_refused(
        lambda: load(edited("lora_paper", tensors=wider)),
        "2 of another",
    )


def test_another_base_is_refused(saved, config):
    smaller = {**config.as_dict(), "emb_dim": 24, "num_decoder_layers": 2}
    check_refused(
        lambda: peft.load_adapter(saved / "lora_paper", smaller), "of another shape", "extra"
    )


def test_damaged_files(saved, load, tmp_path, edited):
    check_refused(lambda: load(tmp_path / "none"), "no such file")
    folder = edited("ia3")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    check_refused(lambda: load(folder), str(weights), "truncated")
    weights.unlink()
    check_refused(lambda: load(folder), "adapter_model.safetensors", "neither")
    (folder / "adapter_config.json").write_text("[]")
    check_refused(lambda: load(folder), "expected a JSON object")


def routed_vectors(num_experts: int) -> functools.partial:
    return functools.partial(VectorExperts, num_experts=num_experts, router=Router)


@pytest.mark.parametrize(
    "sites, parts",
    [
        (Adapters(), ["got no adapters"]),
        (Adapters(key=routed_vectors(4)), ["at key", "num_experts 4", "pemoe convert adapter"]),
        (
            Adapters(key=VectorExperts, value=routed_vectors(1)),
            ["at value", "pemoe convert adapter"],
        ),
        (
            Adapters(wo=functools.partial(LoRAExperts, num_experts=3, router=Router)),
            ["at wo", "num_experts 3", "pemoe convert adapter"],
        ),
        (Adapters(key=VectorExperts, wi_0=LoRAExperts), ["VectorExperts", "wi_0: LoRAExperts"]),
        (Adapters(key=LoRAExperts, gate=LoRAExperts), ["LoRA at gate"]),
        (Adapters(gate=VectorExperts, wo=VectorExperts), ["at gate and at wo"]),
    ],
)
def test_adapters_that_peft_cannot_express(config, tmp_path, sites, parts):
    arrays = random_arrays(config, sites)
    check_refused(
        lambda: peft.save_adapter(tmp_path / "out", adapters.describe(sites), arrays, None), *parts
    )
    assert not list(tmp_path.iterdir())


def test_refused_arrays(config, tmp_path):
    sites = Adapters(key=VectorExperts, gate=VectorExperts)
    arrays = random_arrays(config, sites)
    path = "decoder/layers_1/encoder_decoder_attention/key_adapter/vectors"

    def save_with(**changed):
        changed = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
        return lambda: peft.save_adapter(tmp_path / "out", adapters.describe(sites), changed, None)

    check_refused(save_with(**{path: None}), f"1 missing: {path}")
    router = path.replace("vectors", "router/kernel")
    check_refused(save_with(**{router: np.ones((6, 2), np.float32)}), f"1 extra: {router}")
    check_refused(save_with(**{path: arrays[path][:, :, :-1]}), "of another shape", path)
    check_refused(save_with(**{path: arrays[path] * np.nan}), path, "holds NaN or infinity")
    lora_arrays = random_arrays(config, Adapters(key=lora(2, 8.0)))
    wrong = adapters.describe(Adapters(key=lora(3, 8.0)))
    check_refused(
        lambda: peft.save_adapter(tmp_path / "out", wrong, lora_arrays, None), "of another shape"
    )
    assert not list(tmp_path.iterdir())
    save_with()()
    check_refused(save_with(), "expected a new path")


# -- loading in PEFT, if installed -----------------------------------------------------------------


@pytest.fixture(scope="module")
def goldens_module():
    """Returns the module that made the goldens."""
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    sys.path.insert(0, str(GOLDENS))
    yield importlib.import_module("make_peft_files")
    sys.path.remove(str(GOLDENS))


PLACEMENTS = {
    **CASES,
    "ia3 at the feedforward alone": Adapters(gate=VectorExperts),
    "ia3 at query and wi_1": Adapters(query=VectorExperts, wi_1=VectorExperts),
    "lora of many ranks": Adapters(
        query=lora(1, 2.5), out=lora(3, 16.0), wi_1=lora(1, 3.0), wo=lora(7, 16.0)
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_saved_adapters_load_in_peft(goldens_module, base, config, tmp_path, placement):
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    sites = PLACEMENTS[placement]
    arrays = random_arrays(config, sites)
    peft.save_adapter(tmp_path / "out", adapters.describe(sites), arrays, None)

    model = goldens_module.base()
    with torch.no_grad():
        for name, p in model.named_parameters():
            array = base[f"params/{goldens_module.our_name(name)}"]
            p.copy_(torch.from_numpy(array.T if tuple(p.shape) != array.shape else array))
    untouched = goldens_module.logits(model, tokens(base))
    assert difference(base, untouched, base["base/logits"]) < TOLERANCE
    loaded = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    state = get_peft_model_state_dict(loaded)
    written = tensors_of(tmp_path / "out")
    assert state.keys() == written.keys()  # PEFT ignores no tensor and misses none
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensor.numpy(), written[name])
    theirs = goldens_module.logits(loaded, tokens(base))
    assert difference(base, theirs, untouched) > 0.1
    assert difference(base, our_logits(base, config, sites, arrays), theirs) < TOLERANCE
