"""Reads and writes folders of T5 and Switch Transformers in the format of Hugging Face.

    config.json               the model's settings
    model.safetensors         the weights; or shards and model.safetensors.index.json
    pytorch_model.bin         weights of torch.save; or shards and pytorch_model.bin.index.json

The module `names` converts names and layouts of arrays, `config` converts config.json.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from pemoe_jax.checkpoints import dimensions, lazy_array, safetensors_file, torch_pickle
from pemoe_jax.checkpoints.huggingface import config as config_lib
from pemoe_jax.checkpoints.huggingface import names as names_lib
from pemoe_jax.checkpoints.huggingface.names import DECODER_HEAD, EMBEDDING, HEAD, OUR_HEAD, Layout
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io
from pemoe_jax.runtime.file_io import JsonObject

if TYPE_CHECKING:
    from pemoe_jax.core.network import T5Config
    from pemoe_jax.core.sparse import Sparse

_SAFETENSORS = "model.safetensors"
_TORCH = "pytorch_model.bin"
VOCABULARY = "spiece.model"  # SentencePiece file of the tokenizer


def is_checkpoint(folder: epath.Path) -> bool:
    """Whether a folder has a config.json and weights of transformers."""
    names = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _TORCH, f"{_TORCH}.index.json")
    return (folder / config_lib.NAME).is_file() and any((folder / name).is_file() for name in names)


def open_checkpoint(folder: epath.Path) -> dict[str, LazyArray]:
    """Opens a folder as path -> array; reads only config.json and the headers of the weights.

    With these arrays, our network computes the logits of transformers 5.24; see `_open_logits`.

    Raises:
      InputError: the model is not a T5 or a Switch Transformer that this package supports, or a
        file is missing, truncated or has unexpected arrays.
    """
    path = folder / config_lib.NAME
    config = file_io.read_json(path)
    config_lib.check(path, config)
    weights = _open_weights(folder)
    names_lib.drop_copies(f"{folder}", weights)
    is_switch = config["model_type"] == config_lib.SWITCH
    layout = names_lib.find_layout(weights, is_switch)
    # Only switch-xxl-128 and switch-c-2048 have a head of this name. transformers cannot load them.
    has_decoder_head = is_switch and DECODER_HEAD in weights
    head = weights.pop(DECODER_HEAD if has_decoder_head else HEAD, None)
    arrays = names_lib.to_ours(f"{folder}", weights, layout)
    config_lib.read_activations(path, config, layout.is_gated)  # raises for unsupported ones
    if has_decoder_head:
        # Their head is never tied, although config.json may say so.
        assert head is not None
        arrays[OUR_HEAD] = _check_logits(folder, head).T
    else:
        arrays |= _open_logits(folder, config, layout, weights[EMBEDDING], head)
    shapes = {path: array.shape for path, array in arrays.items()}
    sparse_sizes = dimensions.infer_sparse(shapes, f"{folder}") or {}
    sizes = dimensions.infer(shapes, f"{folder}") | sparse_sizes
    config_lib.check_sizes(path, config, sizes, layout, not has_decoder_head)
    return arrays


def read_activations(folder: epath.Path, arrays: Mapping[str, LazyArray]) -> tuple[str, ...]:
    """Returns `T5Config.mlp_activations` of a folder that `open_checkpoint` accepted."""
    path = folder / config_lib.NAME
    is_gated = any(name.endswith("/wi_0/kernel") for name in arrays)
    return config_lib.read_activations(path, file_io.read_json(path), is_gated)


_Opener = Callable[[epath.Path], dict[str, LazyArray]]  # opens one file of weights


def _open_weights(folder: epath.Path) -> dict[str, LazyArray]:
    """Opens the weights of a folder, in one file or in shards, as transformers' name -> array."""
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
    """Opens the shards that an index file names; their arrays must be those in the index."""
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


def _open_logits(
    folder: epath.Path,
    config: JsonObject,
    layout: Layout,
    embedding: LazyArray,
    head: LazyArray | None,
) -> dict[str, LazyArray]:
    """Returns {path: kernel [D, V] of the logits}; {} if our network needs none.

    The kernel is the folder's lm_head or, without one, the embedding. transformers scales the
    decoder's output by D**-0.5 before the head in these cases:

    * T5: if `scale_decoder_outputs` is true. transformers 5 writes this key; in files without it,
      such as those of transformers 4, the output is scaled if `tie_word_embeddings` is not false.
    * Switch Transformers: if `tie_word_embeddings` is not false.
    * mT5: never, as in transformers 5. (transformers 4 scales the output if the head is tied.)

    Our network has no kernel for a T5 1.0 or a Switch Transformer that is scaled and whose head
    equals the embedding. For any other model it has one, which includes the factor D**-0.5 if the
    output is scaled.

    Raises:
      InputError: the folder has no lm_head, although `tie_word_embeddings` is false and config.json
        is not from transformers 5. transformers 4 would draw the head at random.

    Source: configuration_t5.py, modeling_t5.py, modeling_mt5.py, modeling_switch_transformers.py in
    transformers 5.24.
    """
    kind = config["model_type"]
    is_tied = config.get("tie_word_embeddings", kind != "mt5") is not False
    has_scale_key = kind != config_lib.SWITCH and "scale_decoder_outputs" in config
    if head is None and not is_tied and not has_scale_key:
        raise InputError(
            f"{folder}: {config_lib.NAME} has tie_word_embeddings false: expected {HEAD}, got none"
        )
    is_scaled = config["scale_decoder_outputs"] if has_scale_key else is_tied
    is_scaled = is_scaled and kind != "mt5"
    has_tied_form = layout.is_switch or not layout.is_gated
    # torch.save writes the head of a tied model too, as a copy of the embedding.
    if is_scaled and has_tied_form and (head is None or lazy_array.is_equal(head, embedding)):
        return {}
    kernel = _check_logits(folder, embedding if head is None else head).T
    if not is_scaled:
        return {OUR_HEAD: kernel}
    # Scaled in float32, the dtype in which the logits are computed.
    scale, dtype = np.float32(kernel.shape[0] ** -0.5), np.dtype(np.float32)
    scaled = LazyArray(
        kernel.shape, dtype, lambda index: kernel.read_slice(index).astype(dtype) * scale
    )
    return {OUR_HEAD: scaled}


def _check_logits(folder: epath.Path, array: LazyArray) -> LazyArray:
    if len(array.shape) != 2 or 0 in array.shape:
        raise InputError(f"{folder}: logits: expected a matrix [V, D], got {array.shape}")
    return array


def save_checkpoint(
    path: str | os.PathLike[str],
    arrays: Mapping[str, LazyArray],
    *,
    activations: tuple[str, ...] | None = None,
    sparse: "Sparse | None" = None,
    dropout_rate: float = 0.1,
    vocabulary: epath.Path | None = None,
    shard_bytes: int = 5_000_000_000,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a model for `from_pretrained` of transformers 4 and 5.

    The class is `T5ForConditionalGeneration`, or `SwitchTransformersForConditionalGeneration` if
    layers are sparse. Host memory holds one shard and one array of experts at a time.

    Args:
      path: the folder.
      arrays: path -> array of a model without adapters.
      activations: `T5Config.mlp_activations`; None: those of T5 v1.1 if the MLPs have two input
        projections, else those of T5 1.0.
      sparse: settings of the sparse layers; None: the defaults of `Sparse`, which are those of
        Switch Transformers. Ignored for a dense model.
      dropout_rate: rate in config.json, for training in transformers.
      vocabulary: SentencePiece file of the tokenizer; None: none is written.
      shard_bytes: maximum size of a file, unless a single array is larger.
      report: called with the number of arrays written so far.

    Raises:
      InputError: an array is missing, extra or of another shape; transformers cannot represent the
        model; or `path` exists.
    """
    # Imported here, because these modules import jax, which `pemoe_jax.torch` must not import.
    from pemoe_jax.core import network
    from pemoe_jax.core import params as params_lib
    from pemoe_jax.core.network import T5Config
    from pemoe_jax.core.sparse import Sparse

    shapes = {name: array.shape for name, array in arrays.items()}
    fields = dimensions.infer(shapes, f"{path}")
    fields["mlp_activations"] = activations or fields["mlp_activations"]
    config, sparse_fields = T5Config(**fields), dimensions.infer_sparse(shapes, f"{path}")
    sparse = None if sparse_fields is None else sparse or Sparse(**sparse_fields)
    layout = _make_layout(config, sparse)
    expected = network.param_shapes(network.Transformer(config, sparse=sparse))
    # The arrays are checked before anything is written. Adapters are refused as extra arrays.
    params_lib.check_matches(arrays, expected, f"model to write to {path}")
    config_lib.check_writable(f"{path}", config, sparse)
    theirs = names_lib.to_theirs(arrays, layout)
    num_bytes = {name: array.nbytes for name, array in theirs.items()}
    shards = _split_into_shards(num_bytes, shard_bytes)
    # config.json states one dtype for all arrays; the widest one loses no precision.
    widest = max((array.dtype for array in arrays.values()), key=lambda dtype: dtype.itemsize)
    with atomic_write.temporary_path(path) as folder:
        folder.mkdir()
        contents = config_lib.make(config, sparse, dropout_rate, widest.name)
        atomic_write.write_json(folder / config_lib.NAME, contents)
        if vocabulary is not None:
            (folder / VOCABULARY).write_bytes(vocabulary.read_bytes())
        num_written = 0
        for file, names in shards.items():
            # `save_file` needs row-major arrays. They are copied one by one here, so that only one
            # is in memory twice.
            shard = {name: np.ascontiguousarray(theirs[name].read()) for name in names}
            safetensors_file.save_file(folder / file, shard, {"format": "pt"})
            del shard  # frees the memory before the next shard is read
            num_written += len(names)
            report(num_written)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
            atomic_write.write_json(folder / f"{_SAFETENSORS}.index.json", index)


def _make_layout(config: "T5Config", sparse: "Sparse | None") -> Layout:
    """Returns the layout in which transformers names the arrays of a model."""
    depths = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    is_gated = len(config.mlp_activations) > 1
    if sparse is None:
        return Layout(depths, is_gated)
    layers = {stack: frozenset(filter(sparse.is_sparse, range(n))) for stack, n in depths.items()}
    return Layout(depths, is_gated, True, layers, sparse.num_experts)


def _split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Returns file name -> names of its arrays; files are named as transformers names them.

    Args:
      sizes: name of an array -> bytes.
      max_bytes: maximum size of a file, unless a single array is larger.
    """
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
