"""Writes switch_files.tar.gz: folders of Switch Transformers and T5 1.0, and what they compute.

The tests read the archive only. To recreate it:

    pip install torch==2.13.0 transformers==5.24.0 safetensors numpy
    python tests/goldens/make_switch_files.py

<case>/…        a model's folder, as transformers writes it
<case>.npz      `logits` [B, L, V] and `loss` (mean over target tokens) after `from_pretrained`, and
                `grads/<name>` of the loss, where `name` is that of the parameter in transformers;
                copies of the embedding are one parameter
tokens.npz      `input_ids`, `decoder_input_ids`, `labels`
Case `switch_drops` has no folder: it is `switch` with one place for each expert in a row.
"""

import pathlib
import tempfile

import numpy as np
import torch
import transformers
from make_hf_files import HERE, pack
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

SEED = 5
# H * K = 10, D = 12, V, F and the 32 buckets all differ, so that no two axes can be confused.
SIZES = dict(
    vocab_size=40, d_model=12, d_kv=5, d_ff=18, num_heads=2, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
SPARSE = dict(
    num_layers=4, num_decoder_layers=2, num_sparse_encoder_layers=2, num_sparse_decoder_layers=1,
    num_experts=3, expert_capacity=64, router_jitter_noise=0.0,
)  # fmt: skip
ALL_SPARSE = SPARSE | dict(
    num_layers=2, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
    tie_word_embeddings=False, dense_act_fn="gelu_new",
)  # fmt: skip


def build(config, model):
    """Returns a random model whose routing is far from even and from ties."""
    torch.manual_seed(SEED)
    t5 = model(config).eval()
    with torch.no_grad():
        for name, p in t5.named_parameters():
            noise = torch.randn_like(p)
            if "layer_norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif name in ("shared.weight", "lm_head.weight") or "relative_attention" in name:
                p.copy_(noise)
            else:  # [out, in]: unit variance of outputs
                p.copy_(noise * p.shape[1] ** -0.5)
        # transformers 5 ties these to `shared` only in a model whose head is tied.
        for stack in (t5.encoder, t5.decoder):
            stack.embed_tokens.weight.copy_(t5.shared.weight)
    return t5


def compute(model, tokens: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns logits, loss and gradients."""
    model.zero_grad()
    labels = torch.where(tokens["labels"] > 0, tokens["labels"], -100)
    mask = (tokens["input_ids"] > 0).long()
    inputs = {name: tokens[name] for name in ("input_ids", "decoder_input_ids")}
    out = model(**inputs, attention_mask=mask, labels=labels, use_cache=False)
    out.loss.backward()
    result = {"logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()}
    for name, p in model.named_parameters():
        # An expert that no token reached has no gradient.
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        result[f"grads/{name}"] = grad.numpy()
    for name in ("encoder", "decoder"):  # the gradient of one embedding
        result["grads/shared.weight"] += result.pop(f"grads/{name}.embed_tokens.weight", 0.0)
    return result


def make_tokens() -> dict[str, np.ndarray]:
    """Returns two rows; the second is shorter."""
    rng = np.random.default_rng(SEED)
    inputs, labels = (rng.integers(2, SIZES["vocab_size"], (2, n)) for n in (9, 6))
    inputs[1, 6:] = 0
    labels[1, 4:] = 0
    decoder = np.pad(labels, ((0, 0), (1, 0)))[:, :-1]
    return {"input_ids": inputs, "decoder_input_ids": decoder, "labels": labels}


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        arrays = make_tokens()
        np.savez(root / "tokens.npz", **arrays)
        tokens = {name: torch.from_numpy(array) for name, array in arrays.items()}
        switch = SwitchTransformersForConditionalGeneration
        models = {
            "switch": build(SwitchTransformersConfig(**SIZES, **SPARSE), switch),
            "switch_all": build(SwitchTransformersConfig(**SIZES, **ALL_SPARSE), switch),
            "t5_1_0": build(
                T5Config(**SIZES, num_layers=1, num_decoder_layers=2), T5ForConditionalGeneration
            ),
        }
        results = {}
        for name, model in models.items():
            model.save_pretrained(root / name)
            loaded, info = type(model).from_pretrained(
                root / name, dtype=torch.float32, attn_implementation="eager",
                output_loading_info=True,
            )  # fmt: skip
            assert not any(info.values()), (name, info)
            results[name] = compute(loaded.eval(), tokens)
        config = {"expert_capacity": 1, "attn_implementation": "eager"}
        loaded = switch.from_pretrained(root / "switch", **config).eval()
        results["switch_drops"] = compute(loaded, tokens)
        moved = np.abs(results["switch_drops"]["logits"] - results["switch"]["logits"]).max()
        assert moved > 0.5
        for name, result in results.items():
            np.savez(root / f"{name}.npz", **result)
            print(f"{name}: largest logit {np.abs(result['logits']).max():.3g}")
        # As torch.save does, with the copies of a tied embedding.
        folder = root / "switch_torch"
        models["switch"].config.save_pretrained(folder)
        torch.save(models["switch"].state_dict(), folder / "pytorch_model.bin")
        assert "lm_head.weight" in models["switch"].state_dict()
        to = HERE / "switch_files.tar.gz"
        pack(root, to)
    print(f"{to.name}: {to.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
