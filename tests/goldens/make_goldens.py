"""Writes hf_t5.npz and hf_peft.npz: outputs of Hugging Face's T5 v1.1 and PEFT, under our names.

The tests read the .npz files only. To recreate them:

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy
    python tests/goldens/make_goldens.py

Keys: `config/<field>`, `<case>/<array>`, `params/<path>` and `<case>/grads/<path>`, where <path> is
T5X's name of the parameter and kernels are [in, out]. Weights are random, from SEED. Losses are
means over target tokens; logits are only compared at targets that are not padding.
"""

import os
import re

import numpy as np
import peft
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

SEED = 10
HERE = os.path.dirname(os.path.abspath(__file__))
# H * K = 18 differs from D = 20, so that a reshape that confuses the two fails.
CONFIG = dict(
    vocab_size=64, emb_dim=20, num_heads=3, head_dim=6, mlp_dim=28,
    num_encoder_layers=2, num_decoder_layers=3,
)  # fmt: skip
RANK, ALPHA = 4, 16.0
GREEDY_LENGTH = 12

ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
# Sublayer of an HF block -> (our module, our norm).
SUBLAYERS = {
    ("encoder", 0): ("attention", "pre_attention_layer_norm"),
    ("encoder", 1): ("mlp", "pre_mlp_layer_norm"),
    ("decoder", 0): ("self_attention", "pre_self_attention_layer_norm"),
    ("decoder", 1): ("encoder_decoder_attention", "pre_cross_attention_layer_norm"),
    ("decoder", 2): ("mlp", "pre_mlp_layer_norm"),
}
# PEFT's (IA)^3 scales the input of wo; with one vector that is our site gate.
IA3_SITES = {"k": "key_adapter", "v": "value_adapter", "wo": "gate_adapter"}
LORA_SITES = {
    "q": "query_adapter", "k": "key_adapter", "v": "value_adapter", "o": "out_adapter",
    "wi_0": "wi_0_adapter", "wo": "wo_adapter",
}  # fmt: skip


def our_name(hf_name: str) -> str:
    """`encoder.block.0.layer.1.DenseReluDense.wo.weight` -> `encoder/layers_0/mlp/wo/kernel`."""
    if hf_name == "shared.weight":
        return "token_embedder/embedding"
    if hf_name == "lm_head.weight":
        return "decoder/logits_dense/kernel"
    stack = hf_name.split(".")[0]
    if hf_name.endswith("final_layer_norm.weight"):
        return f"{stack}/{stack}_norm/scale"
    if "relative_attention_bias" in hf_name:
        return f"{stack}/relpos_bias/rel_embedding"
    block, sub, rest = re.fullmatch(
        r"\w+\.block\.(\d+)\.layer\.(\d)\.(.*)\.weight", hf_name
    ).groups()
    module, norm = SUBLAYERS[stack, int(sub)]
    if rest == "layer_norm":
        return f"{stack}/layers_{block}/{norm}/scale"
    leaf = rest.split(".")[-1]
    return f"{stack}/layers_{block}/{module}/{ATTENTION.get(leaf, leaf)}/kernel"


def our_array(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Converts kernels [out, in] to [in, out] and rel_embedding [32, H] to [H, 32]."""
    array = tensor.detach().to(torch.float32).numpy()
    return array.T.copy() if name.endswith(("kernel", "rel_embedding")) else array.copy()


def build() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=CONFIG["vocab_size"], d_model=CONFIG["emb_dim"], d_kv=CONFIG["head_dim"],
        d_ff=CONFIG["mlp_dim"], num_layers=CONFIG["num_encoder_layers"],
        num_decoder_layers=CONFIG["num_decoder_layers"], num_heads=CONFIG["num_heads"],
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = T5ForConditionalGeneration(config).eval()
    # transformers 5 always ties the head, and uses the flag for the scaling only.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    assert not model.config.scale_decoder_outputs and model.config.dense_act_fn == "gelu_new"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layer_norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name in ("shared.weight", "lm_head.weight") or "relative_attention" in name:
                p.copy_(torch.randn_like(p))
            else:  # [out, in]: unit variance of outputs, so that attention is far from uniform
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
    return model


def rows(rng: np.random.Generator, lengths: list[int], width: int) -> np.ndarray:
    """Returns random token rows [len(lengths), width] that end in eos (1), padded with 0."""
    out = np.zeros((len(lengths), width), np.int32)
    for row, n in zip(out, lengths, strict=True):
        row[: n - 1] = rng.integers(2, CONFIG["vocab_size"], n - 1)
        row[n - 1] = 1
    return out


def batch(rng: np.random.Generator, inputs: list[int], targets: list[int]) -> dict[str, np.ndarray]:
    """Returns a batch wider than its longest rows, so that every row has padding."""
    encoder = rows(rng, inputs, max(inputs) + 2)
    target = rows(rng, targets, max(targets) + 1)
    decoder = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    return {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": decoder,
        "decoder_target_tokens": target,
    }


def forward(model: torch.nn.Module, data: dict[str, np.ndarray]):
    """Returns (logits [B, L, V], mean loss over target tokens)."""
    tokens = {k: torch.from_numpy(v).long() for k, v in data.items()}
    target = tokens["decoder_target_tokens"]
    out = model(
        input_ids=tokens["encoder_input_tokens"],
        attention_mask=(tokens["encoder_input_tokens"] > 0).long(),
        decoder_input_ids=tokens["decoder_input_tokens"],
        labels=torch.where(target > 0, target, -100),
        use_cache=False,
    )
    return out.logits, out.loss


def greedy(model: torch.nn.Module, encoder_input_tokens: np.ndarray) -> np.ndarray:
    """Returns greedy tokens [B, GREEDY_LENGTH], 0 after eos; fails on a near tie."""
    tokens = torch.from_numpy(encoder_input_tokens).long()
    out = model.generate(
        input_ids=tokens, attention_mask=(tokens > 0).long(), do_sample=False, num_beams=1,
        max_new_tokens=GREEDY_LENGTH, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0,
        output_logits=True, return_dict_in_generate=True,
        use_cache=False,  # transformers 5.23 sizes its cache by the encoder's layers
    )  # fmt: skip
    top = torch.stack(out.logits, 1).topk(2).values
    ended = torch.nn.functional.pad((out.sequences[:, 1:] == 1).cumsum(1) > 0, (1, 0))[:, :-1]
    gap = (top[..., 0] - top[..., 1])[~ended].min().item()
    assert gap > 5e-3, f"a tie within {gap}: choose another seed"
    pads = (out.sequences[:, 1:] == 0) & ~ended
    assert not pads.any(), "pad is generated, where masks by token and by step differ: another seed"
    result = np.zeros((len(tokens), GREEDY_LENGTH), np.int32)
    result[:, : out.sequences.shape[1] - 1] = out.sequences[:, 1:].numpy()
    return result


def case(model: torch.nn.Module, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns logits, loss and greedy tokens; leaves the gradients in the parameters."""
    model.zero_grad()
    logits, loss = forward(model, data)
    loss.backward()
    return {
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "greedy": greedy(model, data["encoder_input_tokens"]),
    }


def bucket_table() -> dict[str, np.ndarray]:
    """Returns T5's bucket of every relative position (memory - query) from -200 to 200."""
    relative = torch.arange(-200, 201)
    return {
        "buckets/encoder": T5Attention._relative_position_bucket(relative, True).numpy(),
        "buckets/decoder": T5Attention._relative_position_bucket(relative, False).numpy(),
    }


def adapter_name(hf_name: str, sites: dict[str, str]) -> str:
    """PEFT's parameter name -> `<our module>/<site>_adapter`."""
    path = re.sub(r"^base_model\.model\.|\.(ia3_l|lora_[AB])\..*$", "", hf_name)
    module = our_name(path + ".weight").rsplit("/", 2)[0]
    return f"{module}/{sites[path.split('.')[-1]]}"


def adapter_array(hf_name: str, tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    """Returns (leaf, array): vectors [H, 1, K] or [1, F]; lora_a [in, 1, R]; lora_b [1, R, out]."""
    array = tensor.detach().to(torch.float32).numpy()
    if "lora_A" in hf_name:
        return "lora_a", array.T[:, None, :].copy()
    if "lora_B" in hf_name:
        return "lora_b", array.T[None].copy()
    if array.shape[0] == 1:  # feedforward: [1, F]
        return "vectors", array.copy()
    return "vectors", array.reshape(CONFIG["num_heads"], 1, CONFIG["head_dim"]).copy()


def peft_case(
    model: T5ForConditionalGeneration, config, sites: dict[str, str], data: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    wrapped = peft.get_peft_model(model, config)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("ia3_l" in n or "lora_" in n for n in trained)
    with torch.no_grad():
        for name, p in trained.items():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.4 * noise if "ia3_l" in name else 0.15 * noise)
    out = case(wrapped, data)
    for name, p in trained.items():
        leaf, array = adapter_array(name, p)
        path = f"{adapter_name(name, sites)}/{leaf}"
        out[f"params/{path}"] = array
        out[f"grads/{path}"] = adapter_array(name, p.grad)[1]
    return out


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    model = build()
    data = batch(rng, [9, 5, 2], [7, 4, 1])
    long = batch(rng, [178, 131], [158, 90])

    t5 = {f"config/{k}": np.asarray(v) for k, v in CONFIG.items()} | bucket_table()
    for name, p in model.named_parameters():
        t5[f"params/{our_name(name)}"] = our_array(our_name(name), p)
    short = case(model, data)
    for name, p in model.named_parameters():
        short[f"grads/{our_name(name)}"] = our_array(our_name(name), p.grad)
    t5 |= {f"short/{k}": v for k, v in (data | short).items()}

    with torch.no_grad():
        single = forward(model, long)[0].numpy()
        double, loss = forward(model.double(), long)
    model.float()
    assert double.dtype == torch.float64
    real = long["decoder_target_tokens"] > 0
    noise = np.abs(single - double.numpy())[real].max() / np.abs(double.numpy()[real]).max()
    print(f"long case: float32 differs from float64 by {noise:.1e} of the largest logit")
    # Computed in float64, stored in float32: that rounding (6e-8) is far below the tolerance.
    t5 |= {f"long/{k}": v for k, v in long.items()}
    t5 |= {"long/logits": double.numpy().astype(np.float32), "long/loss": loss.numpy()}

    adapters = {}
    ia3 = peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LORA_SITES)
    )
    for method, config, sites in (("ia3", ia3, IA3_SITES), ("lora", lora, LORA_SITES)):
        torch.manual_seed(SEED)
        base = build()
        assert torch.equal(base.shared.weight, model.shared.weight)
        result = peft_case(base, config, sites, data)
        moved = np.abs(result["logits"] - short["logits"]).max() / np.abs(short["logits"]).max()
        print(f"{method}: logits move by {moved:.2f} of the largest")
        adapters |= {f"{method}/{k}": v for k, v in result.items()}

    for name, arrays in (("hf_t5.npz", t5), ("hf_peft.npz", adapters)):
        path = os.path.join(HERE, name)
        np.savez_compressed(path, **arrays)
        print(f"{name}: {len(arrays)} arrays, {os.path.getsize(path):,} bytes")


if __name__ == "__main__":
    main()
