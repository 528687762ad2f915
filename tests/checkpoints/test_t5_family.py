"""The T5 family as it is published on the Hub, tiny: our logits equal those of transformers."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from pemoe_jax.checkpoints import huggingface, models
from pemoe_jax.core import network
from pemoe_jax.runtime import file_io
from pemoe_jax.tasks import vocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other

TEXTS = ("the voices of the market", "which line comes next")
TOLERANCE = 2e-4  # of the largest logit, float32

# What the published config.json files have in common, as written by transformers 4.
COMMON = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    **{"d_model": 12, "d_kv": 5, "d_ff": 18, "num_heads": 2, "num_layers": 1},
    **{"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    **{"dropout_rate": 0.1, "initializer_factor": 1.0, "layer_norm_epsilon": 1e-06},
    **{"is_encoder_decoder": True, "relative_attention_num_buckets": 32, "vocab_size": 608},
}
T5_1_1 = {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1, "tie_word_embeddings": False}
UL2 = T5_1_1 | {"feed_forward_proj": "gated-silu", "n_positions": 512, "output_past": True}
# Model -> (keys of its config.json in addition, our activations, whether its weights are a pickle).
FAMILY = {
    "google/t5-v1_1-large": (T5_1_1 | {"output_past": True}, ("gelu", "linear"), True),
    "google/t5-large-lm-adapt": (T5_1_1 | {"output_past": True}, ("gelu", "linear"), True),
    "google/flan-t5-large": (
        T5_1_1 | {"n_positions": 512, "relative_attention_max_distance": 128},
        ("gelu", "linear"),
        False,
    ),
    "bigscience/T0_3B": (T5_1_1 | {"gradient_checkpointing": False}, ("gelu", "linear"), True),
    # No feed_forward_proj and no tie_word_embeddings: relu and tied by default.
    "google-t5/t5-small": ({"n_positions": 512, "output_past": True}, ("relu",), False),
    "google/mt5-small": (
        T5_1_1 | {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"},
        ("gelu", "linear"),
        True,
    ),
    "google/byt5-small": (
        T5_1_1 | {"num_layers": 3, "vocab_size": 384, "tokenizer_class": "ByT5Tokenizer"},
        ("gelu", "linear"),
        True,
    ),
    "google/ul2": (UL2 | {"torch_dtype": "bfloat16"}, ("silu", "linear"), True),
    "google/flan-ul2": (
        UL2 | {"torch_dtype": "bfloat16", "dense_act_fn": "silu", "is_gated_act": True},
        ("silu", "linear"),
        False,
    ),
}


def write_published(name: str, folder: pathlib.Path) -> None:
    """Writes random weights and the config.json as they are published."""
    changed, _, is_pickle = FAMILY[name]
    config = COMMON | changed
    torch.manual_seed(0)
    kind = getattr(transformers, config["architectures"][0])
    t5 = kind(kind.config_class(**config))
    if not config.get("tie_word_embeddings", True):  # transformers 5 always ties
        t5.lm_head.weight = torch.nn.Parameter(torch.empty_like(t5.lm_head.weight))
    with torch.no_grad():
        for path, p in t5.named_parameters():
            scale = 1.0 if p.ndim == 1 or "shared" in path else p.shape[-1] ** -0.5
            p.copy_(torch.randn_like(p) * scale)
    if config.get("torch_dtype") == "bfloat16":
        t5 = t5.to(torch.bfloat16)
    t5.save_pretrained(folder)
    if is_pickle:  # with copies of the embedding, as transformers 4 wrote it
        (folder / "model.safetensors").unlink()
        torch.save(t5.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


def their_logits(folder: pathlib.Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    t5 = kind.from_pretrained(folder, dtype=torch.float32).eval()
    inputs, decoder_inputs = (torch.from_numpy(batch[k]).long() for k in ("inputs", "decoder"))
    with torch.no_grad():
        out = t5(
            input_ids=inputs, attention_mask=(inputs > 0).long(), decoder_input_ids=decoder_inputs
        )
    return out.logits.numpy()


@pytest.mark.parametrize("name", FAMILY)
def test_logits_and_tokens_of_transformers(name, tmp_path):
    write_published(name, tmp_path)
    # The tokenizer: the quickstart's SentencePiece file as the model's, or bytes.
    if "byt5" in name:
        tokenizer, vocab_path = transformers.ByT5Tokenizer(), "bytes"
    else:
        vocab_path = str(tmp_path / "spiece.model")
        shutil.copy("tasks/quickstart/vocab.model", vocab_path)
        tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    ours = vocabulary.load_vocabulary(vocab_path)
    tokens = [[*ours.encode(text), ours.eos_id] for text in TEXTS]
    assert tokens == tokenizer([*TEXTS])["input_ids"]
    length = max(map(len, tokens))
    batch = {
        "inputs": np.array([row + [0] * (length - len(row)) for row in tokens], np.int32),
        "decoder": np.array([[0, 5, 9], [0, 7, 1]], np.int32),
    }

    opened = models.open_model(str(tmp_path))
    assert opened.model.config.mlp_activations == FAMILY[name][1]
    assert opened.model.config.logits_via_embedding == (name == "google-t5/t5-small")
    params = opened.load()
    actual = jax.jit(network.Transformer.apply, static_argnums=0, static_argnames="enable_dropout")(
        opened.model,
        {"params": params},
        batch["inputs"],
        batch["decoder"],
        np.ones_like(batch["decoder"]),
        enable_dropout=False,
    )
    expected = their_logits(tmp_path, batch)
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_gated_silu_is_written_as_in_ul2(tmp_path):
    write_published("google/flan-ul2", tmp_path / "in")
    arrays = huggingface.open_checkpoint(file_io.resolve(tmp_path / "in"))
    huggingface.save_checkpoint(tmp_path / "out", arrays, activations=("silu", "linear"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["feed_forward_proj"] == "gated-silu" and not config["tie_word_embeddings"]
    read = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert read.config.dense_act_fn == "silu" and read.config.is_gated_act
