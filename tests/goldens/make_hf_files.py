"""Writes hf_files.tar.gz: folders and files written by transformers and torch, and their logits.

The tests read the archive only. To recreate it:

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/goldens/make_hf_files.py

<case>/…             a model's folder; its logits are computed after `from_pretrained`
logits.npz           `input_ids`, `decoder_input_ids`, and logits [B, L, V] by case, float32
tensors.bin          tensors of all dtypes, many shapes and strides, by torch.save
tensors.safetensors  the same tensors, contiguous
protocol_4.bin       some of the tensors with pickle protocol 4
old_format.bin       some of the tensors in the format before torch 1.6
"""

import gzip
import json
import os
import pathlib
import tarfile
import tempfile

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

SEED = 3
HERE = pathlib.Path(__file__).parent
# H * K = 10, D = 12, V, F and the 32 buckets all differ, so that no two axes can be confused.
SIZES = dict(
    vocab_size=40, d_model=12, d_kv=5, d_ff=18, num_layers=1, num_decoder_layers=2, num_heads=2,
    feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
)  # fmt: skip


def build(kind=T5Config, model=T5ForConditionalGeneration, untied=True, **config):
    """Returns a random model. Its head is untied by hand: transformers 5 always ties it."""
    torch.manual_seed(SEED)
    t5 = model(kind(**SIZES, **config)).eval()
    if untied:
        t5.lm_head.weight = torch.nn.Parameter(torch.empty_like(t5.lm_head.weight))
    with torch.no_grad():
        for name, p in t5.named_parameters():
            noise = torch.randn_like(p)
            if "layer_norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif name in ("shared.weight", "lm_head.weight") or "relative_attention" in name:
                p.copy_(noise)
            else:  # [out, in]: unit variance of outputs, so that attention is far from uniform
                p.copy_(noise * p.shape[1] ** -0.5)
    return t5


def as_transformers_4(folder: pathlib.Path, **changed) -> None:
    """Rewrites config.json with the keys of transformers 4."""
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    config |= {
        "torch_dtype": config.pop("dtype", "float32"),
        "transformers_version": "4.30.0",
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_torch(folder: pathlib.Path, model: torch.nn.Module, shards: int) -> None:
    """Writes pytorch_model.bin as transformers 4 did, with copies of the embedding."""
    model.config.save_pretrained(folder)
    as_transformers_4(folder, tie_word_embeddings=False)
    state = model.state_dict()
    assert state["encoder.embed_tokens.weight"].data_ptr() == state["shared.weight"].data_ptr()
    # An unused array in checkpoints of T5 before 2020.
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state[unused] = torch.randn(32, SIZES["num_heads"])
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = {
        n: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, n in enumerate(state)
    }
    for file in set(files.values()):
        torch.save({n: t for n, t in state.items() if files[n] == file}, folder / file)
    size = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))


def write_models(root: pathlib.Path) -> dict[str, type]:
    """Writes the models; returns case -> class that loads it."""
    v1_1 = build(tie_word_embeddings=False)
    v1_1.save_pretrained(root / "single")
    v1_1.save_pretrained(root / "sharded", max_shard_size="8KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    v1_1.to(torch.bfloat16).save_pretrained(root / "bfloat16")
    cases = dict.fromkeys(("single", "sharded", "bfloat16"), T5ForConditionalGeneration)
    for name, shards in (("torch", 1), ("torch_sharded", 2)):
        write_torch(root / name, build(tie_word_embeddings=False), shards)
        cases[name] = T5ForConditionalGeneration
    # transformers 5 saves `T5Config(tie_word_embeddings=False)` without a head; no scaling.
    build(untied=False, tie_word_embeddings=False).save_pretrained(root / "tied")
    # A tied and scaled head, with the keys of transformers 5 and of 4.
    build(untied=False).save_pretrained(root / "tied_scaled")
    build(untied=False).save_pretrained(root / "tied_scaled_4")
    as_transformers_4(root / "tied_scaled_4")
    # transformers 5 scales by its flag even if the head is not the embedding.
    build(tie_word_embeddings=True).save_pretrained(root / "untied_scaled")
    cases |= dict.fromkeys(
        ("tied", "tied_scaled", "tied_scaled_4", "untied_scaled"), T5ForConditionalGeneration
    )
    build(MT5Config, MT5ForConditionalGeneration, untied=False).save_pretrained(root / "mt5")
    return cases | {"mt5": MT5ForConditionalGeneration}


def write_logits(root: pathlib.Path, cases: dict[str, type]) -> None:
    rng = np.random.default_rng(SEED)
    inputs = {
        "input_ids": rng.integers(2, SIZES["vocab_size"], (2, 9)),
        "decoder_input_ids": rng.integers(2, SIZES["vocab_size"], (2, 6)),
    }
    inputs["decoder_input_ids"][:, 0] = 0
    inputs["input_ids"][1, 6:] = 0
    tokens = {name: torch.from_numpy(array) for name, array in inputs.items()}
    logits = {}
    for name, kind in cases.items():
        model, info = kind.from_pretrained(
            root / name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), (name, info)
        with torch.no_grad():
            out = model.eval()(**tokens, attention_mask=(tokens["input_ids"] > 0).long())
        logits[name] = out.logits.numpy()
        print(f"{name}: largest logit {np.abs(logits[name]).max():.3g}")
    assert np.array_equal(logits["single"], logits["torch"])
    # Far apart, so that no case is mistaken for another.
    for a, b in (("tied", "tied_scaled"), ("single", "untied_scaled"), ("single", "tied")):
        assert np.abs(logits[a] - logits[b]).max() > 0.5 * np.abs(logits[a]).max()
    np.savez(root / "logits.npz", **inputs, **logits)


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def random_view(generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Returns a view of a larger tensor: transposed, with steps and an offset."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shape = [draw(1, 6) for _ in range(draw(0, 5))]
    low, high = {torch.bool: (0, 2), torch.uint8: (0, 100)}.get(dtype, (-100, 100))
    view = torch.randint(low, high, shape, generator=generator).to(dtype)
    if dtype.is_floating_point:
        view = view / 8
    for axis in range(view.ndim):
        first = draw(0, view.shape[axis])
        step = draw(1, 3)
        view = view[(slice(None),) * axis + (slice(first, None, step),)]
    if view.ndim and draw(0, 2):
        order = torch.randperm(view.ndim, generator=generator).tolist()
        view = view.permute(order)
    return view


def write_tensors(root: pathlib.Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    views = {
        f"{str(dtype).removeprefix('torch.')}_{i}": random_view(generator, dtype)
        for dtype in DTYPES
        for i in range(10)
    }
    table = torch.randn(6, 8, generator=generator)
    views |= {  # all in one storage
        "table": table, "tied": table, "transposed": table.T, "rows": table[2:5],
        "columns": table[:, 1:7:2], "row": table[3], "parameter": torch.nn.Parameter(table),
        "empty": torch.zeros(3, 0), "scalar": torch.tensor(2.5),
    }  # fmt: skip
    torch.save(views, root / "tensors.bin")
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in views.items()}
    save_file(copies, root / "tensors.safetensors")
    some = {"table": table, "columns": table[:, 1:7:2]}
    torch.save(some, root / "protocol_4.bin", pickle_protocol=4)
    torch.save(some, root / "old_format.bin", _use_new_zipfile_serialization=False)


def pack(root: pathlib.Path, to: pathlib.Path) -> None:
    """Writes an archive whose bytes depend on the files only."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() else 0o644
        return info

    with (
        to.open("wb") as out,
        gzip.GzipFile("", "wb", 9, out, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for name in sorted(os.listdir(root)):
            archive.add(root / name, name, filter=anonymous)


def main() -> None:
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        cases = write_models(root)
        write_logits(root, cases)
        write_tensors(root)
        to = HERE / "hf_files.tar.gz"
        pack(root, to)
    print(f"{to.name}: {to.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
