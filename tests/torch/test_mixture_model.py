"""`pemoe_jax.torch` by itself: errors, training, offloading, compilation, imports."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pemoe_jax.checkpoints import base_model
from pemoe_jax.core.errors import InputError
from pemoe_jax.torch import ExpertsConfig, MixtureConfig, MixtureModel, RouterConfig
from pemoe_jax.torch import base as base_lib

FORBIDDEN = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "seqio", "gin"}
MOV = MixtureConfig("mov", num_experts=3)


def tiny_t5(kind: str = "T5ForConditionalGeneration", **settings):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=6,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **{"d_ff": 20, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} | settings,
    )
    return getattr(transformers, kind)(config).eval()


def randomize(mixture: MixtureModel, scale: float = 0.3) -> MixtureModel:
    with torch.no_grad():
        for parameter in mixture.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return mixture.eval()


@pytest.fixture
def saved(tmp_path):
    """Returns a folder with a MoV of `tiny_t5()`."""
    randomize(MixtureModel(tiny_t5(), MOV)).save_pretrained(tmp_path / "mov")
    return tmp_path / "mov"


def check_refused(message: str, function, *args, **kwargs) -> None:
    with pytest.raises(InputError, match=message) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


def edit(folder, **settings) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_adapters_of_another_base_are_refused(saved):
    other = tiny_t5()
    with torch.no_grad():
        other.encoder.block[0].layer[0].SelfAttention.q.weight[0, 0] += 1
    check_refused(
        "belongs to the base .* with fingerprint", MixtureModel.from_pretrained, other, saved
    )
    assert not hasattr(other.encoder.block[0].layer[0].SelfAttention.k, "adapter")  # unchanged
    wide = tiny_t5(d_ff=24)
    check_refused("a base with mlp_dim 20, got 24", MixtureModel.from_pretrained, wide, saved)
    relu = tiny_t5(feed_forward_proj="gated-relu")
    check_refused("a base with mlp_activations", MixtureModel.from_pretrained, relu, saved)
    half = tiny_t5().to(torch.bfloat16)
    MixtureModel.from_pretrained(half, saved)  # of rounded weights the fingerprint is the same


def test_damaged_and_missing_files_are_refused(saved):
    data = (saved / "adapter.safetensors").read_bytes()
    (saved / "adapter.safetensors").write_bytes(data[:-8] + bytes(8))
    check_refused("damaged: expected the checksum", MixtureModel.from_pretrained, tiny_t5(), saved)
    (saved / "adapter.safetensors").unlink()
    check_refused("no such file", MixtureModel.from_pretrained, tiny_t5(), saved)
    edit(saved, format_version=2)
    check_refused("version 1, got .* 2", MixtureModel.from_pretrained, tiny_t5(), saved)
    check_refused("no such file", MixtureModel.from_pretrained, tiny_t5(), saved / "other")


def test_unknown_settings_are_refused(saved):
    adapters = MOV.describe()
    adapters["key"]["router"]["temperature_schedule"] = 3
    edit(saved, adapters=adapters)
    check_refused("another version", MixtureModel.from_pretrained, tiny_t5(), saved)
    check_refused("method must be one of .*, got 'prefix'", MixtureConfig, "prefix")
    check_refused("Router.temperature must be float, got", RouterConfig, temperature="hot")
    router = RouterConfig(top_k=4)
    check_refused(
        "top_k must be None or between 1 and num_experts .3., got 4",
        MixtureModel,
        tiny_t5(),
        MixtureConfig("mov", num_experts=3, router=router),
    )
    check_refused(
        "unknown adapter sites",
        MixtureConfig,
        "x",
        adapters={"keys": ExpertsConfig("VectorExperts")},
    )


def test_other_folders_are_refused(saved, tmp_path):
    """A PEFT adapter, and a run in JAX: the messages name the command that converts them."""
    load = MixtureModel.from_pretrained
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    message = f"{saved} must be an adapter .*, got a PEFT adapter: .* pemoe convert adapter"
    check_refused(message, load, tiny_t5(), saved)
    checkpoint = tmp_path / "run" / "checkpoint_8"
    (checkpoint / "record").mkdir(parents=True)
    for path in (checkpoint.parent, checkpoint):
        message = f"{path} must be an adapter .*, got a run: use pemoe convert adapter {path} "
        check_refused(message, load, tiny_t5(), path)


def test_what_trains_is_printed(capsys):
    mixture = MixtureModel(tiny_t5(), MOV)
    trainable = sum(p.numel() for p in mixture.parameters() if p.requires_grad)
    total = sum(p.numel() for p in mixture.parameters())
    mixture.print_trainable_parameters()
    assert capsys.readouterr().out == (  # as PEFT prints it
        f"trainable params: {trainable:,} || all params: {total:,}"
        f" || trainable%: {100 * trainable / total:.4f}\n"
    )
    first = repr(mixture).splitlines()[1]
    assert first == "  method='mov', num_experts={'key': 3, 'value': 3, 'gate': 3}"


def test_other_models_are_refused(saved):
    check_refused("must be a T5For.*, got Linear", MixtureModel, torch.nn.Linear(2, 2), MOV)
    mixture = MixtureModel(tiny_t5(), MOV)
    check_refused("got one that has adapters already", MixtureModel, mixture.base_model, MOV)
    with warnings.catch_warnings(action="error"):  # and nothing is said of its base
        load = MixtureModel.from_pretrained
        check_refused("got one that has adapters already", load, mixture.base_model, saved)
    check_refused("got MixtureModel", MixtureModel, mixture, MOV)
    encoder = MixtureModel(tiny_t5("T5EncoderModel"), MOV)
    check_refused("got a T5EncoderModel", encoder.save_pretrained, saved / "again")


def test_encoder_alone(saved):
    whole, encoder = tiny_t5(), tiny_t5("T5EncoderModel")
    encoder.load_state_dict(whole.state_dict(), strict=False)
    tokens = torch.arange(2, 10).reshape(2, 4)
    expected = MixtureModel.from_pretrained(whole, saved).encoder(tokens).last_hidden_state
    with pytest.warns(UserWarning, match="not compared: the T5 has no decoder"):
        mixture = MixtureModel.from_pretrained(encoder, saved)
    actual = mixture(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(actual, expected)


def test_training_changes_adapters_alone_and_resumes(tmp_path):
    router = RouterConfig(jitter_noise=0.1, balance_loss=0.1, z_loss=0.01)
    config = MixtureConfig("molora", num_experts=2, rank=2, router=router)
    mixture = MixtureModel(tiny_t5(), config).train()
    base = {name: p.clone() for name, p in mixture.named_parameters() if not p.requires_grad}
    assert base.keys() == {n for n, _ in mixture.named_parameters() if "adapter." not in n}
    optimizer = torch.optim.AdamW([p for p in mixture.parameters() if p.requires_grad], lr=0.05)
    inputs = torch.arange(2, 14).reshape(3, 4)
    labels = inputs[:, :3].contiguous()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        output = mixture(input_ids=inputs, labels=labels)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert mixture.aux_loss() > 0
    for name, parameter in mixture.named_parameters():
        assert parameter.requires_grad == (name not in base)
        assert name not in base or torch.equal(parameter, base[name])
    mixture.eval()  # without noise and auxiliary losses
    expected = mixture(input_ids=inputs, labels=labels)
    assert torch.equal(expected.loss, mixture(input_ids=inputs, labels=labels).loss)
    mixture.save_pretrained(tmp_path / "a", step=8)
    message = "path must be a new folder without overwrite=True, got .*/a, which exists"
    check_refused(message, mixture.save_pretrained, tmp_path / "a")
    mixture.save_pretrained(tmp_path / "a", step=8, overwrite=True)
    again = MixtureModel.from_pretrained(tiny_t5(), tmp_path / "a")
    torch.testing.assert_close(again(input_ids=inputs, labels=labels).logits, expected.logits)
    again.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["step"] == 8


def test_sentence_embeddings_in_beam_search(tmp_path):
    config = MixtureConfig("mov", 3, router=RouterConfig(reads="sentence"), sentence_dim=4)
    mixture = randomize(MixtureModel(tiny_t5(), config))
    inputs, sentences = torch.arange(2, 10).reshape(2, 4), torch.randn(2, 4)
    check_refused("sentence_embeddings must be passed", mixture.generate, input_ids=inputs)
    settings = {"max_new_tokens": 4, "num_beams": 3, "eos_token_id": None}
    both = mixture.generate(input_ids=inputs, sentence_embeddings=sentences, **settings)
    for i in range(2):
        one = mixture.generate(
            input_ids=inputs[i : i + 1], sentence_embeddings=sentences[i : i + 1], **settings
        )
        assert torch.equal(one[0], both[i])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"feed_forward_proj": "relu", "tie_word_embeddings": True},
        {"feed_forward_proj": "relu"},
    ],
)
def test_fingerprint_is_that_of_the_folder(tmp_path, settings):
    t5 = tiny_t5(**settings)
    t5.save_pretrained(tmp_path / "t5")
    expected = base_model.open_base(tmp_path / "t5").fingerprint()
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    assert base_lib.fingerprint(loaded) == base_lib.Fingerprint(expected)


def test_float16_base(tmp_path, saved):
    """It is compared if its checkpoint is float16 too; otherwise a line says that it is not."""
    tiny_t5().half().save_pretrained(tmp_path / "t5")
    load = transformers.T5ForConditionalGeneration.from_pretrained
    exact = load(tmp_path / "t5", dtype=torch.float32)
    half = load(tmp_path / "t5")
    assert half.dtype == torch.float16
    MixtureModel(exact, MOV).save_pretrained(tmp_path / "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture = MixtureModel.from_pretrained(half, tmp_path / "exact")
        mixture.save_pretrained(tmp_path / "again")  # the record is that of the loaded adapter
    with pytest.warns(UserWarning, match="not compared: the T5 is float16, load it with") as warned:
        MixtureModel.from_pretrained(load(tmp_path / "t5"), saved)
    assert warned[0].filename == __file__
    new = MixtureModel(load(tmp_path / "t5"), MOV)
    with pytest.warns(UserWarning, match="not saved: the T5 is float16, load it with") as warned:
        new.save_pretrained(tmp_path / "new")
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="not compared: it was saved without a fingerprint"):
        MixtureModel.from_pretrained(tiny_t5(), tmp_path / "new")


def test_offloaded_base(saved):
    accelerate = pytest.importorskip("accelerate")
    inputs = {"input_ids": torch.arange(2, 10).reshape(2, 4), "labels": torch.ones(2, 2).long()}
    expected = MixtureModel.from_pretrained(tiny_t5(), saved)(**inputs).logits
    # Before and after the adapters are added: weights are loaded for each forward pass.
    t5 = accelerate.cpu_offload(tiny_t5(), execution_device="cpu")
    assert next(t5.encoder.block.parameters()).is_meta
    with pytest.warns(UserWarning, match="not compared: the T5 is offloaded"):
        offloaded = MixtureModel.from_pretrained(t5, saved)
    assert {p.device.type for p in offloaded.parameters() if p.requires_grad} == {"cpu"}
    torch.testing.assert_close(offloaded(**inputs).logits, expected)
    whole = MixtureModel.from_pretrained(tiny_t5(), saved)
    with torch.no_grad():
        later = accelerate.cpu_offload(whole, execution_device="cpu")(**inputs).logits
    torch.testing.assert_close(later, expected)


@pytest.mark.parametrize("method", ["mov", "molora"])
def test_autocast(method):
    mixture = randomize(MixtureModel(tiny_t5(), MixtureConfig(method, num_experts=3)), 0.05)
    inputs = {"input_ids": torch.arange(2, 10).reshape(2, 4), "labels": torch.ones(2, 2).long()}
    expected = mixture(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixture(**inputs).logits
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mov", "molora"])
def test_torch_compile(method):
    mixture = randomize(MixtureModel(tiny_t5(), MixtureConfig(method, num_experts=3)))
    inputs = {"input_ids": torch.arange(2, 10).reshape(2, 4), "labels": torch.ones(2, 2).long()}
    expected = mixture(**inputs).logits
    # Without graph breaks; the compiler's own backend needs a C++ compiler.
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)


def test_no_jax_is_imported(saved):
    program = f"""
import sys, torch, transformers
from pemoe_jax.torch import MixtureModel
config = transformers.T5Config(**{tiny_t5().config.to_diff_dict()!r})
torch.manual_seed(0)
t5 = transformers.T5ForConditionalGeneration(config)
MixtureModel.from_pretrained(t5, {str(saved)!r}).save_pretrained({str(saved / "again")!r})
imported = {{name.split(".")[0] for name in sys.modules}}
print(sorted(imported & {FORBIDDEN}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    before, after = (load_file(f / "adapter.safetensors") for f in (saved, saved / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
