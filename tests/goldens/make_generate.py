"""Writes hf_generate.npz: what Hugging Face's `generate` decodes by beam search and may sample.

The tests read the .npz file only. To recreate it, after make_goldens.py, with the environment of
benchmarks/environments/torch.txt:

    .venv-torch/bin/python tests/goldens/make_generate.py

The weights are those of hf_t5.npz, with another matrix of the logits for each model. Keys:
`inputs`; `<model>/kernel` and `<model>/eos_id`, which is a common token, so that rows end at
different times; `<model>/greedy` and `<model>/beams <K> penalty <α> early <0 or 1>`, tokens with 0
after the end; `logits` and `filtered/top_k <k> top_p <p>`, what remains of them.
"""

import itertools
import os
import re

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTH = 12
SCALES = {"flat": 0.3, "middle": 0.6, "sharp": 1.0}
BEAMS, PENALTIES = (2, 3, 4), (0.5, 1.0, 2.0)
FILTERS = ((5, 1.0), (64, 0.6), (10, 0.5), (1, 1.0), (64, 1e-6))

ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
# (stack, our module or norm) -> sublayer of an HF block
SUBLAYERS = {
    ("encoder", "attention"): (0, "SelfAttention"),
    ("encoder", "mlp"): (1, "DenseReluDense"),
    ("encoder", "pre_attention_layer_norm"): (0, "layer_norm"),
    ("encoder", "pre_mlp_layer_norm"): (1, "layer_norm"),
    ("decoder", "self_attention"): (0, "SelfAttention"),
    ("decoder", "encoder_decoder_attention"): (1, "EncDecAttention"),
    ("decoder", "mlp"): (2, "DenseReluDense"),
    ("decoder", "pre_self_attention_layer_norm"): (0, "layer_norm"),
    ("decoder", "pre_cross_attention_layer_norm"): (1, "layer_norm"),
    ("decoder", "pre_mlp_layer_norm"): (2, "layer_norm"),
}


def hf_name(path: str) -> str:
    """`encoder/layers_0/mlp/wo/kernel` -> `encoder.block.0.layer.1.DenseReluDense.wo.weight`."""
    if path == "token_embedder/embedding":
        return "shared.weight"
    if path == "decoder/logits_dense/kernel":
        return "lm_head.weight"
    stack, rest = path.split("/", 1)
    if rest == f"{stack}_norm/scale":
        return f"{stack}.final_layer_norm.weight"
    if rest == "relpos_bias/rel_embedding":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    layer, module, *leaf = re.fullmatch(r"layers_(\d+)/(\w+)/(?:(\w+)/)?\w+", rest).groups()
    number, name = SUBLAYERS[stack, module]
    leaves = [ATTENTION.get(part, part) for part in leaf if part]
    return ".".join((f"{stack}.block.{layer}.layer.{number}.{name}", *leaves, "weight"))


def load(arrays: dict[str, np.ndarray]) -> T5ForConditionalGeneration:
    config = {k.removeprefix("config/"): int(v) for k, v in arrays.items() if "config/" in k}
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=config["vocab_size"], d_model=config["emb_dim"], d_kv=config["head_dim"],
            d_ff=config["mlp_dim"], num_layers=config["num_encoder_layers"],
            num_decoder_layers=config["num_decoder_layers"], num_heads=config["num_heads"],
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    # transformers 5 always ties the head.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    parameters = dict(model.named_parameters())
    for path, array in arrays.items():
        if path.startswith("params/"):
            path = path.removeprefix("params/")
            is_transposed = path.endswith(("kernel", "rel_embedding"))
            tensor = torch.from_numpy(array.T.copy() if is_transposed else array)
            parameters.pop(hf_name(path)).data.copy_(tensor)
    assert not parameters, list(parameters)
    return model


def generate(model: T5ForConditionalGeneration, inputs: np.ndarray, **options) -> np.ndarray:
    """Returns tokens [B, LENGTH], 0 after the end; equal in float32 and float64."""
    tokens = torch.from_numpy(inputs).long()
    results = []
    for dtype in (torch.float64, torch.float32):
        out = model.to(dtype).generate(
            input_ids=tokens, attention_mask=(tokens > 0).long(), do_sample=False,
            max_new_tokens=LENGTH, pad_token_id=0, decoder_start_token_id=0, use_cache=False,
            **options,
        )  # fmt: skip
        result = np.zeros((len(inputs), LENGTH), np.int32)
        result[:, : out.shape[1] - 1] = out[:, 1:].numpy()
        # Beam search fills with the end token where padding is 0.
        ended = np.cumsum(result == options["eos_token_id"], axis=1) > 0
        result[:, 1:][ended[:, :-1]] = 0
        results.append(result)
    assert (results[0] == results[1]).all(), f"a near tie with {options}: choose another seed"
    return results[0]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(3)
    with np.load(os.path.join(HERE, "hf_t5.npz")) as file:
        arrays = dict(file)
    model = load(arrays)
    inputs = np.zeros((6, 11), np.int32)
    for row, length in zip(inputs, (9, 5, 2, 11, 7, 4), strict=True):
        row[: length - 1] = rng.integers(2, 64, length - 1)
        row[length - 1] = 1
    goldens = {"inputs": inputs}
    kernel = arrays["params/decoder/logits_dense/kernel"]
    for name, scale in SCALES.items():
        own = (scale * (kernel + 0.3 * rng.normal(size=kernel.shape))).astype(np.float32)
        model.float().lm_head.weight.data.copy_(torch.from_numpy(own.T.copy()))
        endless = generate(model, inputs, num_beams=1, eos_token_id=63)
        # The token that ends most rows, at most different positions.
        ends = {
            token: {tuple(row).index(token) for row in endless if token in row}
            for token in range(2, 63)
        }
        eos_id = max(ends, key=lambda token: len(ends[token]))
        print(f"{name}: end token {eos_id}, greedy rows end at {sorted(ends[eos_id])}")
        goldens |= {f"{name}/kernel": own, f"{name}/eos_id": np.asarray(eos_id)}
        goldens[f"{name}/greedy"] = generate(model, inputs, num_beams=1, eos_token_id=eos_id)
        for beams, penalty, early in itertools.product(BEAMS, PENALTIES, (False, True)):
            goldens[f"{name}/beams {beams} penalty {penalty} early {int(early)}"] = generate(
                model, inputs, num_beams=beams, length_penalty=penalty, early_stopping=early,
                eos_token_id=eos_id,
            )  # fmt: skip
    cases = [array for key, array in goldens.items() if "/beams" in key]
    lengths = [(array > 0).sum(1) for array in cases]
    print(f"{len({a.tobytes() for a in cases})} different results; lengths {np.unique(lengths)}")

    logits = torch.from_numpy(2 * rng.normal(size=(4, 64)).astype(np.float32))
    goldens["logits"] = logits.numpy()
    for top_k, top_p in FILTERS:
        filtered = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits.clone()))
        goldens[f"filtered/top_k {top_k} top_p {top_p}"] = filtered.numpy()
    path = os.path.join(HERE, "hf_generate.npz")
    np.savez_compressed(path, **goldens)
    print(f"{len(goldens)} arrays, {os.path.getsize(path):,} bytes")


if __name__ == "__main__":
    main()
