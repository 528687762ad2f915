"""Reads and writes T5 v1.1 in the format of Hugging Face transformers, a folder.

    config.json               the model's settings
    model.safetensors         the weights; or shards and model.safetensors.index.json
    pytorch_model.bin         weights of torch.save; or shards and pytorch_model.bin.index.json

Their kernels are [out, in], ours [in, out]; their relative position bias is [32, H], ours [H, 32].
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from etils import epath

from pemoe_jax.checkpoints import dimensions, safetensors_file, torch_pickle
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io
from pemoe_jax.runtime.file_io import JsonObject

_CONFIG = "config.json"
_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
_EMBEDDING, _HEAD = "shared.weight", "lm_head.weight"
# Files of transformers 4 hold copies of the embedding.
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# In checkpoints of T5 before 2020; transformers ignores it as well.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# What `core` computes; these are not options of `T5Config`.
_EXPECTED_CONFIG = {
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
# By model_type: the defaults in transformers that differ from the expected value.
_DEFAULTS: dict[str, JsonObject] = {"t5": {"feed_forward_proj": "relu"}, "mt5": {}}

# Sublayers of a block: stack, module in transformers, our module, prefix of our norm's name.
SUBLAYERS = (
    ("encoder", "layer.0.SelfAttention", "attention", "pre_attention"),
    ("encoder", "layer.1.DenseReluDense", "mlp", "pre_mlp"),
    ("decoder", "layer.0.SelfAttention", "self_attention", "pre_self_attention"),
    ("decoder", "layer.1.EncDecAttention", "encoder_decoder_attention", "pre_cross_attention"),
    ("decoder", "layer.2.DenseReluDense", "mlp", "pre_mlp"),
)
_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
_MLP = {"wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}

_DIMENSIONS = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
}


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether a folder has this format."""
    names = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _TORCH, f"{_TORCH}.index.json")
    return (folder / _CONFIG).is_file() and any((folder / name).is_file() for name in names)


def open_checkpoint(folder: epath.Path) -> dict[str, LazyArray]:
    """Opens a folder as path -> array; reads config.json and the headers of the weights.

    The logits' kernel is the one that transformers 5.23 computes with, see `_logits_kernel`.

    Raises:
      InputError: the model is not a T5 v1.1, or a file is missing, truncated or has other arrays.
    """
    config = file_io.read_json(folder / _CONFIG)
    _check_config(folder / _CONFIG, config)
    weights = _open_weights(folder)
    weights.pop(_UNUSED, None)
    for name in _EMBEDDING_COPIES:
        if name in weights:
            # Some converters keep only one of the equal arrays, under any of their names.
            weights.setdefault(_EMBEDDING, weights[name])
            del weights[name]
    table = _name_table(_num_layers(weights, "encoder"), _num_layers(weights, "decoder"))
    # An unknown array means another architecture: loading the others would give wrong outputs.
    missing = sorted(table.keys() - weights.keys() - {_HEAD})
    unknown = sorted(weights.keys() - table.keys())
    for names, problem in ((missing, "missing"), (unknown, "unknown")):
        if names:
            shown = "; ".join(f"{name:.100}" for name in names[:3])
            raise InputError(
                f"{folder}: expected the arrays of a T5 v1.1, got {len(names)} {problem}: {shown}"
            )
    arrays = {table[name]: _convert_layout(table[name], a) for name, a in weights.items()}
    arrays[table[_HEAD]] = _logits_kernel(folder, config, weights)
    dims = dimensions.infer({path: array.shape for path, array in arrays.items()}, f"{folder}")
    for key, field in _DIMENSIONS.items():
        if config.get(key) not in (None, dims[field]):
            raise InputError(
                f"{folder / _CONFIG}: {key}: expected {dims[field]}, by the shapes of the arrays,"
                f" got {config[key]!r:.80}"
            )
    return arrays


def _check_config(path: epath.Path, config: JsonObject) -> None:
    model_type = config.get("model_type")
    if model_type not in tuple(_DEFAULTS):
        raise InputError(
            f"{path}: model_type: expected one of {list(_DEFAULTS)}, got {model_type!r}"
        )
    if config.get("quantization_config"):
        raise InputError(f"{path}: quantization_config: expected none, got a quantized model")
    values = {**_EXPECTED_CONFIG, **_DEFAULTS[model_type], **config}
    for key, expected in _EXPECTED_CONFIG.items():
        if values[key] != expected:
            suffix = "" if key in config else " (the default)"
            raise InputError(
                f"{path}: {key}: expected {expected!r} (a T5 v1.1), got {values[key]!r:.80}{suffix}"
            )


_Opener = Callable[[epath.Path], dict[str, LazyArray]]


def _open_weights(folder: epath.Path) -> dict[str, LazyArray]:
    openers: dict[str, _Opener] = {  # safetensors before torch, as in transformers
        _SAFETENSORS: lambda path: safetensors_file.open_file(path)[0],
        _TORCH: torch_pickle.open_file,
    }
    for name, open_file in openers.items():
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _open_shards(folder, f"{name}.index.json", open_file)
    raise InputError(f"{folder}: expected {_SAFETENSORS}, {_TORCH} or an index of either")


def _open_shards(folder: epath.Path, index: str, open_file: _Opener) -> dict[str, LazyArray]:
    weight_map = file_io.read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / index}: expected a weight_map of names to files, got none")
    names_by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        names_by_file.setdefault(file_io.child_path(folder, file, index).name, set()).add(name)
    arrays: dict[str, LazyArray] = {}
    for file, names in sorted(names_by_file.items()):
        shard = open_file(folder / file)
        for different, problem in (
            (names - shard.keys(), f"in {index}, but not in the file"),
            (shard.keys() - names, f"in the file, but not in {index}"),
        ):
            if different:
                raise InputError(f"{folder / file}: {min(different)!r:.100}: {problem}")
        arrays |= shard
    return arrays


def _num_layers(names: Iterable[str], stack: str) -> int:
    # Counts different indices: an index of 99999999 must not create a table of as many layers.
    matches = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in names)
    return len({match[1] for match in matches if match})


def _name_table(encoder_layers: int, decoder_layers: int) -> dict[str, str]:
    """Returns name in transformers -> our path, for every array."""
    names = {_EMBEDDING: "token_embedder/embedding", _HEAD: "decoder/logits_dense/kernel"}
    for stack, num_layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[bias] = f"{stack}/relpos_bias/rel_embedding"
        names[f"{stack}.final_layer_norm.weight"] = f"{stack}/{stack}_norm/scale"
        sublayers = [sublayer for sublayer in SUBLAYERS if sublayer[0] == stack]
        for i, (_, module, ours, norm) in itertools.product(range(num_layers), sublayers):
            prefix, our_prefix = f"{stack}.block.{i}.{module}", f"{stack}/layers_{i}"
            names[f"{prefix.rpartition('.')[0]}.layer_norm.weight"] = (
                f"{our_prefix}/{norm}_layer_norm/scale"
            )
            for leaf, our_leaf in (_MLP if ours == "mlp" else _ATTENTION).items():
                names[f"{prefix}.{leaf}.weight"] = f"{our_prefix}/{ours}/{our_leaf}/kernel"
    return names


def _convert_layout(path: str, array: LazyArray) -> LazyArray:
    """Converts an array between the layouts of transformers and this package, either way."""
    return array.T if path.endswith(("/kernel", "/rel_embedding")) else array


def _logits_kernel(
    folder: epath.Path, config: JsonObject, weights: Mapping[str, LazyArray]
) -> LazyArray:
    """Returns the logits' kernel [D, V], scaled by D**-0.5 if the model scales its output.

    transformers 5 ties lm_head to the embedding if the folder has no lm_head, whatever the
    configuration says, and scales by `scale_decoder_outputs`, a separate key. transformers 4 has
    only `tie_word_embeddings`: tied and scaled, or neither; it draws a missing, untied head at
    random. Its mT5 scales likewise; that of transformers 5 never does.

    Source: configuration_t5.py, modeling_t5.py, modeling_mt5.py in transformers 5.23.
    """
    is_tied = config.get("tie_word_embeddings", config["model_type"] == "t5") is not False
    if _HEAD not in weights and not is_tied and "scale_decoder_outputs" not in config:
        raise InputError(
            f"{folder}: {_CONFIG} has tie_word_embeddings false: expected {_HEAD}, got none"
        )
    is_scaled = config["model_type"] == "t5" and config.get("scale_decoder_outputs", is_tied)
    array = weights.get(_HEAD, weights[_EMBEDDING])
    if len(array.shape) != 2 or 0 in array.shape:
        raise InputError(f"{folder}: logits: expected a matrix [V, D], got {array.shape}")
    kernel = array.T
    if not is_scaled:
        return kernel
    scale, dtype = np.float32(kernel.shape[0] ** -0.5), np.dtype(np.float32)
    return LazyArray(
        kernel.shape, dtype, lambda index: kernel.read_slice(index).astype(dtype) * scale
    )


def save_checkpoint(
    path: str | os.PathLike[str],
    arrays: Mapping[str, LazyArray],
    *,
    dropout_rate: float = 0.1,
    shard_bytes: int = 5_000_000_000,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a model for `T5ForConditionalGeneration.from_pretrained` of transformers 4 and 5.

    Host memory holds one shard at a time. Tokenizer files are not written.

    Args:
      path: the folder.
      arrays: path -> array, of a model without adapters.
      dropout_rate: rate in config.json, for training in transformers.
      shard_bytes: maximum size of a file, unless a single array is larger.
      report: called with the number of arrays written so far.

    Raises:
      InputError: an array is missing, extra or of another shape, or `path` exists.
    """
    dims = dimensions.infer({name: array.shape for name, array in arrays.items()}, f"{path}")
    table = _name_table(dims["num_encoder_layers"], dims["num_decoder_layers"])
    # Before anything is written. Adapters are extra arrays, and so refused here.
    config: JsonObject = dict(dims)
    expected = network.param_shapes(network.Transformer(network.T5Config(**config)))
    params_lib.check_matches(arrays, expected, f"model to write to {path}")
    theirs = {name: _convert_layout(ours, arrays[ours]) for name, ours in table.items()}
    sizes = {name: array.nbytes for name, array in theirs.items()}
    shards = _split_into_shards(sizes, shard_bytes)
    # config.json has one dtype for all arrays: the widest.
    widest = max((array.dtype for array in arrays.values()), key=lambda dtype: dtype.itemsize)
    with atomic_write.temporary_path(path) as folder:
        folder.mkdir()
        atomic_write.write_json(folder / _CONFIG, _make_config(dims, dropout_rate, widest.name))
        num_written = 0
        for file, names in shards.items():
            # Made contiguous here, so that only one array exists twice at a time.
            shard = {name: np.ascontiguousarray(theirs[name].read()) for name in names}
            safetensors_file.save_file(folder / file, shard, {"format": "pt"})
            del shard  # frees the memory before the next shard is read
            num_written += len(names)
            report(num_written)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            atomic_write.write_json(folder / f"{_SAFETENSORS}.index.json", index)


def _split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Returns file name -> names of its arrays, in order; file names as in transformers."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, size in sizes.items():
        if shards[-1] and num_bytes + size > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size
    if len(shards) == 1:
        return {_SAFETENSORS: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


def _make_config(dims: Mapping[str, int], dropout_rate: float, dtype: str) -> JsonObject:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{key: dims[field] for key, field in _DIMENSIONS.items()},
        # transformers derives the two settings that are left out from feed_forward_proj.
        **{k: v for k, v in _EXPECTED_CONFIG.items() if k not in ("dense_act_fn", "is_gated_act")},
        "dropout_rate": dropout_rate,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        # Written by hand: T5Config of transformers 5.23 always saves true.
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        # transformers 5 calls it `dtype`, and reads this name of transformers 4 as well.
        "torch_dtype": dtype,
    }
