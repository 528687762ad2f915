"""PEFT's format both ways, against adapters that PEFT saved: goldens/make_peft_files.py."""

import functools
import importlib
import json
import pathlib
import shutil
import sys

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


# What the golden adapters are in our terms.
CASES = {
    "ia3": Adapters(key=VectorExperts, value=VectorExperts, gate=VectorExperts),
    "ia3_bin": Adapters(key=VectorExperts, value=VectorExperts, gate=VectorExperts),
    "ia3_outputs": Adapters(**dict.fromkeys((*ATTENTION, "wi_0", "wi_1", "wo"), VectorExperts)),
    # rank-stabilised there: 5 / √3 = (5 · √3) / 3
    "lora_all": Adapters(
        **dict.fromkeys((*ATTENTION, "wi_0", "wi_1", "wo"), lora(3, 5 * 3**0.5)),
    ),
    "lora_paper": Adapters(**dict.fromkeys((*ATTENTION, "wi_0", "wo"), lora(4, 16.0))),
    "lora_patterns": Adapters(query=lora(1, 8.0), value=lora(2, 24.0), wo=lora(5, 8.0)),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> pathlib.Path:
    """The folder of the goldens."""
    return unpack("peft_files", tmp_path_factory.mktemp("peft"))


@pytest.fixture(scope="session")
def base(saved) -> dict[str, np.ndarray]:
    with np.load(saved / "base.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def config(base) -> network.T5Config:
    stated = {k.removeprefix("config/"): int(v) for k, v in base.items() if k.startswith("config/")}
    return network.T5Config(**stated, dropout_rate=0.0)


def under(base: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in base.items() if k.startswith(prefix)}


def tokens(base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in base.items() if k.endswith("_tokens")}


def our_logits(base, config, which: Adapters, arrays: dict[str, np.ndarray]) -> np.ndarray:
    model = network.Transformer(config, which)
    tree = params.unflatten(
        {k: jnp.asarray(v) for k, v in (under(base, "params/") | arrays).items()}
    )
    params.check_matches(
        tree, network.param_shapes(model), "test"
    )  # every adapter, and nothing else
    return np.asarray(model.apply({"params": tree}, **tokens(base), enable_dropout=False))


def difference(base, logits, expected) -> float:
    """The largest difference where the target is not padding."""
    real = base["decoder_target_tokens"] > 0
    return largest_difference(logits[real], expected[real])


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def config_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def random_arrays(config, which: Adapters) -> dict[str, np.ndarray]:
    shapes = params.flatten(network.param_shapes(network.Transformer(config, which)))
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


@pytest.mark.parametrize("case", CASES)
def test_read(saved, base, config, case):
    description, arrays = peft.load_adapter(saved / case, config.as_dict())
    assert description == adapters.describe(CASES[case])
    assert all(array.dtype == np.float32 for array in arrays.values())
    logits = our_logits(base, config, adapters.from_description(description), arrays)
    assert difference(base, logits, np.load(saved / case / "logits.npy")) < TOLERANCE


def test_pickled_is_the_same(saved, config):
    description, arrays = peft.load_adapter(saved / "ia3", config.as_dict())
    again, pickled = peft.load_adapter(saved / "ia3_bin", config.as_dict())
    assert again == description and pickled.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(pickled[path], array)


def scaling(said: dict, module: str) -> float:
    rank = said["rank_pattern"].get(module, said["r"])
    alpha = said["alpha_pattern"].get(module, said["lora_alpha"])
    return alpha / (rank**0.5 if said["use_rslora"] else rank)


@pytest.mark.parametrize("case", [case for case in CASES if case != "ia3_bin"])
def test_written_is_what_peft_wrote(saved, config, tmp_path, case):
    peft.save_adapter(
        tmp_path / "out", *peft.load_adapter(saved / case, config.as_dict()), "google/t5"
    )
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


def test_plain_alphas_are_written_as_integers(saved, config, tmp_path):
    peft.save_adapter(
        tmp_path / "out", *peft.load_adapter(saved / "lora_paper", config.as_dict()), None
    )
    said = config_of(tmp_path / "out")
    assert (said["r"], said["rank_pattern"], said["alpha_pattern"]) == (4, {}, {})
    assert said["lora_alpha"] == 16 and isinstance(said["lora_alpha"], int)


def test_what_it_is(saved, config):
    assert peft.is_adapter(saved / "ia3") and not peft.is_adapter(saved)
    assert peft.method_name(peft.load_adapter(saved / "ia3", config.as_dict())[0]) == "ia3"
    assert peft.method_name(peft.load_adapter(saved / "lora_all", config.as_dict())[0]) == "lora"
    with pytest.raises(InputError, match="base_model_name_or_path: expected .* found None"):
        peft.base_model_name(saved / "ia3")


# -- files that are not quite as PEFT writes them today -----------------------------------------


@pytest.fixture
def edited(saved, tmp_path):
    """(case, change of the settings, change of the tensors) -> a copy of the golden's folder."""

    def edit(case: str, settings=None, tensors=None) -> pathlib.Path:
        folder = tmp_path / case
        shutil.copytree(saved / case, folder)
        if settings:
            said = {**config_of(folder), **settings}
            (folder / "adapter_config.json").write_text(json.dumps(said))
        if tensors:
            changed = tensors(tensors_of(folder))
            safetensors.numpy.save_file(changed, folder / "adapter_model.safetensors")
        return folder

    return edit


def same_arrays(found, expected) -> None:
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    for path, array in expected[1].items():
        np.testing.assert_array_equal(found[1][path], array)


@pytest.mark.parametrize(
    "case, old, new",
    [
        ("lora_paper", ".weight", ".default.weight"),
        ("ia3", ".ia3_l", ".ia3_l.default"),
    ],
)
def test_names_with_the_adapters_name(saved, config, edited, case, old, new):
    folder = edited(case, tensors=lambda t: {k.replace(old, new): v for k, v in t.items()})
    assert not tensors_of(folder).keys() & tensors_of(saved / case).keys()
    same_arrays(
        peft.load_adapter(folder, config.as_dict()),
        peft.load_adapter(saved / case, config.as_dict()),
    )


def full_names(saved, case: str) -> list[str]:
    names = [name.removeprefix("base_model.model.") for name in tensors_of(saved / case)]
    return sorted({name.split(".lora_")[0].removesuffix(".ia3_l") for name in names})


@pytest.mark.parametrize("case", ["ia3", "lora_patterns"])
@pytest.mark.parametrize("form", ["full names", "pattern", "all but"])
def test_ways_to_name_the_targets(saved, config, edited, case, form):
    full = full_names(saved, case)
    settings = {
        "full names": {"target_modules": full},
        "pattern": {"target_modules": r".*\.(q|k|v|wo)", "exclude_modules": "nothing"},
        "all but": {
            "target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo", "lm_head"],
            "exclude_modules": [
                *({"q", "k", "v", "o", "wi_0", "wi_1", "wo"} - {n.split(".")[-1] for n in full}),
                "lm_head",
            ],
        },
    }[form]
    if case == "ia3" and form != "all but":
        wo = [name for name in full if name.endswith("wo")]
        settings["feedforward_modules"] = wo if form == "full names" else r".*\.wo"
    same_arrays(
        peft.load_adapter(edited(case, settings), config.as_dict()),
        peft.load_adapter(saved / case, config.as_dict()),
    )


def test_settings_of_training_do_not_matter(saved, config, edited):
    harmless = {
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
    folder = edited("lora_paper", harmless)
    same_arrays(
        peft.load_adapter(folder, config.as_dict()),
        peft.load_adapter(saved / "lora_paper", config.as_dict()),
    )
    assert peft.base_model_name(folder) == "google/t5-large-lm-adapt"


def test_an_early_config_lacks_later_settings(saved, config, edited):
    folder = edited("lora_paper")
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out")
    said = {key: value for key, value in config_of(folder).items() if key in kept}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    same_arrays(
        peft.load_adapter(folder, config.as_dict()),
        peft.load_adapter(saved / "lora_paper", config.as_dict()),
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats(saved, config, edited, dtype):
    folder = edited("lora_paper", tensors=lambda t: {k: v.astype(dtype) for k, v in t.items()})
    _, arrays = peft.load_adapter(folder, config.as_dict())
    _, expected = peft.load_adapter(saved / "lora_paper", config.as_dict())
    for path, array in expected.items():
        assert arrays[path].dtype == np.float32
        np.testing.assert_array_equal(arrays[path], array.astype(dtype).astype(np.float32))


# -- refusals ------------------------------------------------------------------------------------


def refused(call, *parts: str) -> None:
    """Refused with one line that has these parts."""
    with pytest.raises(InputError) as caught:
        call()
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
def test_settings_that_are_refused(config, edited, case, key, value):
    folder = edited(case, {key: value})
    shown = repr(value)
    refused(
        lambda: peft.load_adapter(folder, config.as_dict()),
        str(folder / "adapter_config.json"),
        f"{key}: expected",
        f"found {shown}",
    )


K = "base_model.model.encoder.block.1.layer.0.SelfAttention.k.ia3_l"
A = "base_model.model.decoder.block.2.layer.1.EncDecAttention.o.lora_A.weight"


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_(**changed):
    return lambda tensors: {**tensors, **changed}


def poisoned(name, value):
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
        ("ia3", with_(**{K: np.ones((1, 18), np.float32)}), f"{K} (1, 18), expected (18, 1)"),
        ("lora_paper", with_(**{A: np.ones((5, 18), np.float32)}), "(5, 18), expected (4, 18)"),
        ("lora_paper", with_(**{A: np.ones((4, 20), np.float32)}), "(4, 20), expected (4, 18)"),
        ("ia3", with_(**{K: np.ones((18, 1), np.int32)}), f"{K}: expected floats, found int32"),
        (
            "ia3",
            with_(**{f"{K}.default": np.ones((18, 1), np.float32)}),
            f"found {K}.default twice",
        ),
        ("ia3", poisoned(K, np.nan), f"{K} holds NaN or infinity"),
        ("lora_paper", poisoned(A, np.inf), f"{A} holds NaN or infinity"),
        ("ia3", lambda t: {"router": np.ones(2, np.float32)}, "found router"),
        ("ia3", lambda t: {}, "found no tensor"),
    ],
)
def test_tensors_that_are_refused(config, edited, case, change, part):
    folder = edited(case, tensors=change)
    refused(lambda: peft.load_adapter(folder, config.as_dict()), str(folder), part)


def test_float64_beyond_float32_is_refused(config, edited):
    change = with_(**{K: np.full((18, 1), 1e300)})
    refused(
        lambda: peft.load_adapter(edited("ia3", tensors=change), config.as_dict()), "infinity", K
    )


def test_ranks_that_differ_within_a_site_are_refused(config, edited):
    def wider(tensors):  # a whole pair of rank 5 where the configuration says 4
        b = A.replace("lora_A", "lora_B")
        return {**tensors, A: np.ones((5, 18), np.float32), b: np.ones((20, 5), np.float32)}

    refused(
        lambda: peft.load_adapter(edited("lora_paper", tensors=wider), config.as_dict()),
        "2 of another",
    )


def test_another_base_is_refused(saved, config):
    smaller = {**config.as_dict(), "emb_dim": 24, "num_decoder_layers": 2}
    refused(lambda: peft.load_adapter(saved / "lora_paper", smaller), "of another shape", "extra")


def test_files_that_are_refused(saved, config, tmp_path, edited):
    refused(lambda: peft.load_adapter(tmp_path / "none", config.as_dict()), "no such file")
    folder = edited("ia3")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    refused(lambda: peft.load_adapter(folder, config.as_dict()), str(weights), "cut short")
    weights.unlink()
    refused(
        lambda: peft.load_adapter(folder, config.as_dict()), "adapter_model.safetensors", "neither"
    )
    (folder / "adapter_config.json").write_text("[]")
    refused(lambda: peft.load_adapter(folder, config.as_dict()), "expected a JSON object")


def routed(num_experts: int) -> functools.partial:
    return functools.partial(VectorExperts, num_experts=num_experts, router=Router)


@pytest.mark.parametrize(
    "which, parts",
    [
        (Adapters(), ["found no adapters"]),
        (Adapters(key=routed(4)), ["at key", "num_experts 4", "pemoe_jax.tools.convert adapter"]),
        (
            Adapters(key=VectorExperts, value=routed(1)),
            ["at value", "pemoe_jax.tools.convert adapter"],
        ),
        (
            Adapters(wo=functools.partial(LoRAExperts, num_experts=3, router=Router)),
            ["at wo", "num_experts 3", "pemoe_jax.tools.convert adapter"],
        ),
        (Adapters(key=VectorExperts, wi_0=LoRAExperts), ["VectorExperts", "wi_0: LoRAExperts"]),
        (Adapters(key=LoRAExperts, gate=LoRAExperts), ["LoRA at gate"]),
        (Adapters(gate=VectorExperts, wo=VectorExperts), ["at gate and at wo"]),
    ],
)
def test_adapters_that_peft_cannot_express(config, tmp_path, which, parts):
    arrays = random_arrays(config, which)
    refused(
        lambda: peft.save_adapter(tmp_path / "out", adapters.describe(which), arrays, None), *parts
    )
    assert not list(tmp_path.iterdir())


def test_arrays_that_are_not_written(config, tmp_path):
    which = Adapters(key=VectorExperts, gate=VectorExperts)
    arrays = random_arrays(config, which)
    path = "decoder/layers_1/encoder_decoder_attention/key_adapter/vectors"

    def written(**changed):
        changed = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
        return lambda: peft.save_adapter(tmp_path / "out", adapters.describe(which), changed, None)

    refused(written(**{path: None}), f"1 missing: {path}")
    router = path.replace("vectors", "router/kernel")
    refused(written(**{router: np.ones((6, 2), np.float32)}), f"1 extra: {router}")
    refused(written(**{path: arrays[path][:, :, :-1]}), "of another shape", path)
    refused(written(**{path: arrays[path] * np.nan}), path, "holds NaN or infinity")
    lora_arrays = random_arrays(config, Adapters(key=lora(2, 8.0)))
    wrong = adapters.describe(Adapters(key=lora(3, 8.0)))
    refused(
        lambda: peft.save_adapter(tmp_path / "out", wrong, lora_arrays, None), "of another shape"
    )
    assert not list(tmp_path.iterdir())
    written()()
    refused(written(), "is there already")


# -- PEFT itself, where it is installed ------------------------------------------------------------


@pytest.fixture(scope="module")
def goldens_module():
    """The functions that made the goldens."""
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
def test_written_loads_in_peft(goldens_module, base, config, tmp_path, placement):
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    which = PLACEMENTS[placement]
    arrays = random_arrays(config, which)
    peft.save_adapter(tmp_path / "out", adapters.describe(which), arrays, None)

    model = goldens_module.base()
    with torch.no_grad():
        for name, p in model.named_parameters():
            array = base[f"params/{goldens_module.our_name(name)}"]
            p.copy_(torch.from_numpy(array.T if tuple(p.shape) != array.shape else array))
    untouched = goldens_module.logits(model, tokens(base))
    assert difference(base, untouched, base["base/logits"]) < TOLERANCE
    loaded = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    held = get_peft_model_state_dict(loaded)
    written = tensors_of(tmp_path / "out")
    assert held.keys() == written.keys()  # nothing that PEFT would ignore, nothing that it lacks
    for name, tensor in held.items():
        np.testing.assert_array_equal(tensor.numpy(), written[name])
    theirs = goldens_module.logits(loaded, tokens(base))
    assert difference(base, theirs, untouched) > 0.1
    assert difference(base, our_logits(base, config, which, arrays), theirs) < TOLERANCE
