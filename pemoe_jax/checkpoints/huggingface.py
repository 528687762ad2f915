"""Folders of Hugging Face transformers that hold a T5 v1.1, read and written.

config.json               what the model is
model.safetensors         its arrays; or shards of it and model.safetensors.index.json
pytorch_model.bin         the same by torch.save, and pytorch_model.bin.index.json

Their kernels are [out, in], ours [in, out]; their relative position bias is [32, H], ours [H, 32].
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from pemoe_jax.checkpoints import dimensions, safetensors_file, torch_pickle
from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

_CONFIG = "config.json"
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
# Old files hold copies of the embedding.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Of a T5 before 2020; transformers ignores it as well.
_LEFTOVER = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_BUCKETS = 32

_EXPECTED = {
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_num_buckets": _BUCKETS,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
# What a config that lacks a key means in transformers, where that is not what we expect.
_DEFAULTS: dict[str, dict[str, Any]] = {"t5": {"feed_forward_proj": "relu"}, "mt5": {}}

# By sublayer of a block: their module, ours, our norm before it.
_SUBLAYERS = {
    "encoder": (
        ("SelfAttention", "attention", "pre_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
    "decoder": (
        ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
}
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_MLP = {"wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether a folder is of this format."""
    names = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _TORCH, f"{_TORCH}.index.json")
    return (folder / _CONFIG).is_file() and any((folder / name).is_file() for name in names)


def open_checkpoint(folder: epath.Path) -> dict[str, LazyArray]:
    """Path -> array under our names; reads config.json and the files' headers.

    The logits' kernel is what transformers 5.23 computes with: a head of its own or the embedding,
    and scaled by D**-0.5 (then float32) where its config says so.

    Raises:
      InputError: not a T5 v1.1, or a file is missing, cut short, or of other arrays.
    """
    config = file_io.read_json(folder / _CONFIG)
    _check_config(folder / _CONFIG, config)
    found = _open_arrays(folder)
    found.pop(_LEFTOVER, None)
    for name in _COPIES:
        if name in found:
            copy = found.pop(name)
            found.setdefault(_EMBEDDING, copy)  # which some files leave out instead
    table = _names(_layers(found, "encoder"), _layers(found, "decoder"))
    missing = sorted(table.keys() - found.keys() - {_HEAD})
    unknown = sorted(found.keys() - table.keys())
    for names, what in ((missing, "missing"), (unknown, "unknown")):
        if names:
            shown = "; ".join(f"{name:.100}" for name in names[:3])
            raise InputError(
                f"{folder}: expected the arrays of a T5 v1.1, found {len(names)} {what}: {shown}"
            )
    arrays = {table[name]: _turned(table[name], array) for name, array in found.items()}
    arrays[table[_HEAD]] = _head(folder, config, found)
    _check_dimensions(folder, config, arrays)
    return arrays


_DIMENSIONS = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
}


def _check_dimensions(
    folder: epath.Path, config: Mapping[str, Any], arrays: Mapping[str, LazyArray]
) -> None:
    """What config.json says against what the arrays are."""
    dims = dimensions.infer({path: array.shape for path, array in arrays.items()}, f"{folder}")
    for key, ours in _DIMENSIONS.items():
        if config.get(key) not in (None, dims[ours]):
            raise InputError(
                f"{folder / _CONFIG}: {key}: expected {dims[ours]}, as the arrays are,"
                f" found {config[key]!r:.80}"
            )


def _check_config(path: epath.Path, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in tuple(_DEFAULTS):
        raise InputError(f"{path}: model_type: expected one of {list(_DEFAULTS)}, found {kind!r}")
    if config.get("quantization_config"):
        raise InputError(f"{path}: quantization_config: expected floats, found a quantised model")
    found = {**_EXPECTED, **_DEFAULTS[kind], **config}
    for key, expected in _EXPECTED.items():
        if found[key] != expected:
            said = "" if key in config else " (the default)"
            raise InputError(
                f"{path}: {key}: expected {expected!r} (a T5 v1.1), found {found[key]!r:.80}{said}"
            )


def _open_arrays(folder: epath.Path) -> dict[str, LazyArray]:
    """Their name -> array, from the first of the four forms that is there."""
    for name, open_one in ((_SAFETENSORS, _open_safetensors), (_TORCH, torch_pickle.open_file)):
        if (folder / name).is_file():
            return open_one(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _open_shards(folder, f"{name}.index.json", open_one)
    raise InputError(f"{folder}: expected {_SAFETENSORS}, {_TORCH} or an index of either")


def _open_safetensors(path: epath.Path) -> dict[str, LazyArray]:
    return safetensors_file.open_file(path)[0]


def _open_shards(
    folder: epath.Path, index: str, open_one: Callable[[epath.Path], dict[str, LazyArray]]
) -> dict[str, LazyArray]:
    places = file_io.read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{folder / index}: expected a weight_map of names to files, found none")
    named: dict[str, set[str]] = {}
    for name, file in places.items():
        named.setdefault(file_io.child_path(folder, file, index).name, set()).add(name)
    arrays: dict[str, LazyArray] = {}
    for file, names in sorted(named.items()):
        held = open_one(folder / file)
        for lacks, where in (
            (names - held.keys(), f"{index} places it there, the file lacks it"),
            (held.keys() - names, f"the file holds it, {index} does not say so"),
        ):
            if lacks:
                raise InputError(f"{folder / file}: {min(lacks)!r:.100}: {where}")
        arrays |= held
    return arrays


def _layers(names: Mapping[str, Any], stack: str) -> int:
    """How many different layers are named: a gap shows as one that is missing."""
    found = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def _names(encoder_layers: int, decoder_layers: int) -> dict[str, str]:
    """Their name -> ours, of all arrays."""
    names = {_EMBEDDING: "token_embedder/embedding", _HEAD: "decoder/logits_dense/kernel"}
    for stack, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[bias] = f"{stack}/relpos_bias/rel_embedding"
        names[f"{stack}.final_layer_norm.weight"] = f"{stack}/{stack}_norm/scale"
        for layer in range(layers):
            for i, (module, ours, norm) in enumerate(_SUBLAYERS[stack]):
                above, our_layer = f"{stack}.block.{layer}.layer.{i}", f"{stack}/layers_{layer}"
                names[f"{above}.layer_norm.weight"] = f"{our_layer}/{norm}/scale"
                for leaf, our_leaf in (_MLP if ours == "mlp" else _ATTENTION).items():
                    names[f"{above}.{module}.{leaf}.weight"] = (
                        f"{our_layer}/{ours}/{our_leaf}/kernel"
                    )
    return names


def _turned(path: str, array: LazyArray) -> LazyArray:
    """From one layout to the other, either way."""
    return array.T if path.endswith(("/kernel", "/rel_embedding")) else array


def _head(
    folder: epath.Path, config: Mapping[str, Any], found: Mapping[str, LazyArray]
) -> LazyArray:
    """The logits' kernel [D, V].

    transformers 5 ties lm_head to the embedding where a folder lacks it, whatever the config says,
    and scales by `scale_decoder_outputs`, a key of its own. transformers 4 knows
    `tie_word_embeddings` alone: tied and scaled, or neither; a head that is missing and not tied it
    draws at random. Its mT5 scales likewise, that of transformers 5 never.

    Source: configuration_t5.py, modeling_t5.py, modeling_mt5.py in transformers 5.23.
    """
    tied = config.get("tie_word_embeddings", config["model_type"] == "t5") is not False
    if _HEAD not in found and not tied and "scale_decoder_outputs" not in config:
        raise InputError(
            f"{folder}: {_CONFIG} says tie_word_embeddings false: expected {_HEAD}, found none"
        )
    scaled = config["model_type"] == "t5" and config.get("scale_decoder_outputs", tied)
    array = found.get(_HEAD, found[_EMBEDDING])
    if len(array.shape) != 2 or 0 in array.shape:
        raise InputError(f"{folder}: logits: expected a matrix [V, D], found {array.shape}")
    return _scaled(array.T) if scaled else array.T


def _scaled(kernel: LazyArray) -> LazyArray:
    """A kernel [D, V] times D**-0.5, in float32."""
    factor = np.float32(kernel.shape[0] ** -0.5)

    def read_slice(index: Index) -> np.ndarray:
        return kernel.read_slice(index).astype(np.float32) * factor

    return LazyArray(kernel.shape, np.dtype(np.float32), read_slice)


def save_checkpoint(
    path: str | os.PathLike[str],
    arrays: Mapping[str, LazyArray],
    *,
    dropout_rate: float = 0.1,
    dtype: Any = None,
    shard_bytes: int = 5_000_000_000,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a whole model for `T5ForConditionalGeneration.from_pretrained`, of any 4.x or 5.x.

    Host memory: one shard and one array. Tokenizers are not written.

    Args:
      path: of the folder; local, and not there yet.
      arrays: path -> array under our names, of a model without adapters.
      dropout_rate: that training in transformers starts with.
      dtype: of the arrays; None: as they are stored.
      shard_bytes: the most of one file, unless one array takes more.
      report: called with the number of arrays that are written.

    Raises:
      InputError: an array is missing, extra or of another shape, or `path` is there already.
    """
    dims = dimensions.infer({name: array.shape for name, array in arrays.items()}, f"{path}")
    table = _names(dims["num_encoder_layers"], dims["num_decoder_layers"])
    expected = {
        ours: jax.ShapeDtypeStruct(_shape(ours, dims), np.float32) for ours in table.values()
    }
    params_lib.check_matches(
        params_lib.unflatten(arrays), params_lib.unflatten(expected), f"what is written to {path}"
    )
    types = {
        ours: np.dtype(array.dtype if dtype is None else dtype) for ours, array in arrays.items()
    }
    sizes = {
        name: int(np.prod(arrays[ours].shape, dtype=np.int64)) * types[ours].itemsize
        for name, ours in table.items()
    }
    shards = _split(sizes, shard_bytes)
    with atomic_write.temporary_path(path) as folder:
        folder.mkdir()
        widest = max(types.values(), key=lambda found: found.itemsize)
        atomic_write.write_json(folder / _CONFIG, _config(dims, dropout_rate, widest.name))
        written = 0
        for file, names in shards.items():
            shard = {name: _read(table[name], arrays, types) for name in names}
            safetensors_file.save_file(folder / file, shard, {"format": "pt"})
            del shard  # before the next is read
            written += len(names)
            report(written)
        if len(shards) > 1:
            places = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            atomic_write.write_json(folder / f"{_SAFETENSORS}.index.json", index)


def _shape(ours: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """Of an array of a model of these dimensions, under our name."""
    embed, mlp, vocab = dims["emb_dim"], dims["mlp_dim"], dims["vocab_size"]
    joined = dims["num_heads"] * dims["head_dim"]
    return {
        "token_embedder": (vocab, embed),
        "logits_dense": (embed, vocab),
        "relpos_bias": (dims["num_heads"], _BUCKETS),
        **dict.fromkeys(("query", "key", "value"), (embed, joined)),
        "out": (joined, embed),
        **dict.fromkeys(("wi_0", "wi_1"), (embed, mlp)),
        "wo": (mlp, embed),
    }.get(ours.split("/")[-2], (embed,))


def _split(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """File -> names, in order, under transformers' names for one file and for several."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {_SAFETENSORS: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


def _read(ours: str, arrays: Mapping[str, LazyArray], types: Mapping[str, np.dtype]) -> np.ndarray:
    # the library writes memory as it lies: of a transposed view it would write another array
    array = _turned(ours, arrays[ours]).read().astype(types[ours], copy=False)
    return np.ascontiguousarray(array)


def _config(dims: Mapping[str, int], dropout_rate: float, dtype: str) -> dict[str, Any]:
    """config.json: `torch_dtype` and `tie_word_embeddings` are what 4.x and 5.x both read.

    transformers 5.23's own config would say tied, whatever it is given.
    """
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": dims["vocab_size"],
        "d_model": dims["emb_dim"],
        "d_kv": dims["head_dim"],
        "d_ff": dims["mlp_dim"],
        "num_heads": dims["num_heads"],
        "num_layers": dims["num_encoder_layers"],
        "num_decoder_layers": dims["num_decoder_layers"],
        "feed_forward_proj": _EXPECTED["feed_forward_proj"],
        "relative_attention_num_buckets": _BUCKETS,
        "relative_attention_max_distance": _EXPECTED["relative_attention_max_distance"],
        "layer_norm_epsilon": _EXPECTED["layer_norm_epsilon"],
        "dropout_rate": dropout_rate,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": dtype,
    }
