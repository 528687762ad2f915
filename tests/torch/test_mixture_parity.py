"""JAX and PyTorch compute the same from the same adapter."""

import numpy as np
import peft
import pytest
import torch
import torch_models
from methods import largest_difference
from torch_models import ADAPTERS, IS_TARGET, LOSS_WEIGHTS, SENTENCES, adapter_arrays

from pemoe_jax.checkpoints import models
from pemoe_jax.checkpoints import peft as peft_files
from pemoe_jax.core import adapters, params
from pemoe_jax.torch import MixtureConfig, MixtureModel, RouterConfig

LOGITS, GRADIENTS = 2e-5, 5e-5  # of the largest, float32
SENTENCE = {"sentence_embeddings": torch.from_numpy(SENTENCES)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Returns version -> folder for transformers."""
    folder = tmp_path_factory.mktemp("bases")
    return {v: torch_models.save_base(folder / v, v) for v in torch_models.CONFIGS}


def base_of(bases, name: str):
    return bases["1.0" if name == "T5 1.0" else "v1.1"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_and_gradients(bases, tmp_path, name):
    folder = torch_models.save_adapter(tmp_path / "a", name, base_of(bases, name))
    mixture = MixtureModel.from_pretrained(torch_models.load_t5(base_of(bases, name)), folder)
    logits, grads = torch_models.jax_result(name)
    mixture.train()  # with the auxiliary losses; the base has no dropout
    actual = mixture(**torch_models.torch_batch(), **SENTENCE).logits
    assert (
        largest_difference(actual.detach().numpy()[IS_TARGET], np.asarray(logits)[IS_TARGET])
        < LOGITS
    )
    ((actual * torch.from_numpy(LOSS_WEIGHTS)).sum() + 100 * mixture.aux_loss()).backward()
    trained = [p for p in mixture.parameters() if p.requires_grad]
    assert len(trained) == len(grads)
    largest = max(float(np.abs(g).max()) for g in grads.values())
    for path, parameter in mixture._parameters_by_path().items():
        difference = np.abs(parameter.grad.numpy() - np.asarray(grads[path])).max()
        assert difference < GRADIENTS * largest, path


@pytest.mark.parametrize("name", ["ia3", "mov", "lora", "molora"])
def test_bfloat16_is_close_to_float32(bases, tmp_path, name):
    # With the LoRA matrices of the other tests, bfloat16 differs by a tenth, in JAX too.
    values = {p: a * (0.3 if "lora_" in p else 1) for p, a in adapter_arrays(name).items()}
    folder = torch_models.save_adapter(tmp_path / "a", name, bases["v1.1"], values=values)
    t5 = torch_models.load_t5(bases["v1.1"], torch.bfloat16)
    mixture = MixtureModel.from_pretrained(t5, folder)
    assert {p.dtype for p in mixture.parameters() if p.requires_grad} == {torch.float32}
    exact = np.asarray(torch_models.jax_result(name, adapter=values)[0])[IS_TARGET]
    assert largest_difference(torch_models.torch_logits(mixture), exact) < 0.04


@pytest.mark.parametrize("name", ["mov", "molora"])
def test_generate_is_greedy_decoding_in_jax(bases, tmp_path, name):
    folder = torch_models.save_adapter(tmp_path / "a", name, bases["v1.1"])
    mixture = MixtureModel.from_pretrained(torch_models.load_t5(bases["v1.1"]), folder)
    batch, length = torch_models.torch_batch(), IS_TARGET.shape[1]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": length, "eos_token_id": None, "do_sample": False}
    with_cache = mixture.generate(**inputs, **settings).numpy()
    assert (with_cache == mixture.generate(**inputs, **settings, use_cache=False).numpy()).all()
    decoder = {
        "decoder_input_tokens": with_cache[:, :-1].astype(np.int32),
        "decoder_target_tokens": np.ones_like(with_cache[:, 1:], np.int32),
    }
    logits, _ = torch_models.jax_result(name, batch=torch_models.BATCH | decoder)
    assert (np.asarray(logits).argmax(-1) == with_cache[:, 1:]).all()
    assert len(np.unique(with_cache[:, 1:])) > 3


PEFT_CONFIGS = {
    "ia3": peft.IA3Config(
        task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"]
    ),
    "lora": peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=4,
        lora_alpha=16,
        target_modules=["q", "k", "v", "o", "wi_0", "wo"],
    ),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_peft_computes_the_same(bases, tmp_path, name):
    theirs = peft.get_peft_model(torch_models.load_t5(bases["v1.1"]), PEFT_CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "peft")
    expected = torch_models.torch_logits(theirs)
    dimensions = torch_models.model(name).config.as_dict()
    description, arrays = peft_files.load_adapter(tmp_path / "peft", dimensions)
    folder = torch_models.save_adapter(tmp_path / "ours", name, bases["v1.1"], description, arrays)
    ours = MixtureModel.from_pretrained(torch_models.load_t5(bases["v1.1"]), folder)
    assert largest_difference(torch_models.torch_logits(ours), expected) < LOGITS
    logits, _ = torch_models.jax_result(name, adapter=arrays)
    assert largest_difference(np.asarray(logits)[IS_TARGET], expected) < LOGITS


def test_jax_reads_what_torch_saves(bases, tmp_path):
    config = MixtureConfig("mov", num_experts=3, sentence_dim=torch_models.SENTENCE_DIM)
    mixture = MixtureModel(torch_models.load_t5(bases["v1.1"]), config).eval()
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    mixture.save_pretrained(tmp_path / "mov", step=3)
    opened = models.open_model(str(tmp_path / "mov"))
    assert (opened.step, opened.record.method) == (3, "mov")
    loaded = params.flatten(opened.load())  # compares the fingerprint of the base
    adapter = {path: np.asarray(a) for path, a in loaded.items() if params.is_adapter(path)}
    logits, _ = torch_models.jax_result("mov", adapter=adapter)
    difference = largest_difference(
        torch_models.torch_logits(mixture), np.asarray(logits)[IS_TARGET]
    )
    assert difference < LOGITS
    shapes = {path: a.shape for path, a in torch_models.arrays("mov").items()}
    assert opened.record.counts["total"] == sum(map(np.prod, shapes.values()))


def test_settings_are_those_of_jax():
    router = RouterConfig(top_k=2, renormalize=True, temperature=0.5)
    for method in ("ia3", "mov", "lora", "molora"):
        ours = MixtureConfig(method, num_experts=3, router=router).describe()
        rebuilt = adapters.describe(adapters.from_description(ours))
        assert rebuilt == ours
        defaults = MixtureConfig(method, num_experts=3).describe()
        assert defaults == adapters.describe(ADAPTERS[method])
