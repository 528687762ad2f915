"""Finds the modules of a base model at our sites, and its dimensions and fingerprint.

A site, such as 'key' or 'gate', is a kind of place in every layer; see `config.SITES`.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from etils import epath
from torch import Tensor, nn

from pemoe_jax.checkpoints.huggingface import config as config_lib
from pemoe_jax.checkpoints.huggingface import names as names_lib
from pemoe_jax.core import fingerprints
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import JsonObject

_CLASSES = ("T5ForConditionalGeneration", "T5EncoderModel")
_ATTENTION_MODULES = {"query": "q", "key": "k", "value": "v", "out": "o"}  # by site


class Place(NamedTuple):
    """One place in a model where an adapter of (x, y) is added: a site of one layer.

    Attributes:
      path: our path of the adapter, such as 'encoder/layers_0/attention/key_adapter'.
      stack: the stack whose tokens are in x; the encoder at keys and values of cross-attention.
      parent, name: the module to wrap is the attribute `name` of `parent`.
      x_features: size of x's last axis.
      y_shape: axes of y after batch and length.
    """

    path: str
    stack: str
    parent: nn.Module
    name: str
    x_features: int
    y_shape: tuple[int, ...]


def check_model(model: object) -> Any:
    """Returns the model; raises InputError unless it is a T5 to which adapters can be added."""
    name = type(model).__name__
    classes = tuple(getattr(transformers, each) for each in _CLASSES)
    if not isinstance(model, classes):
        raise InputError(f"the model must be a {' or '.join(_CLASSES)} of transformers, got {name}")
    # `check` refuses quantized checkpoints, but a quantized model in memory is a valid frozen base.
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    config_lib.check(epath.Path(name), settings)
    return model


def has_decoder(model: Any) -> bool:
    """Whether a model has a decoder: T5EncoderModel has none."""
    return hasattr(model, "decoder")


def find_places(model: Any, site: str) -> Iterator[Place]:
    """Yields the places of a site in all layers of a model, in order."""
    config = model.config
    # x is the hidden activation at wo, the heads' values at out, and [B, L, D] at the other sites.
    x_sizes = {"out": config.num_heads * config.d_kv, "wo": config.d_ff}
    x_features = x_sizes.get(site, config.d_model)
    if site in ("query", "key", "value"):
        y_shape: tuple[int, ...] = (config.num_heads, config.d_kv)
    else:
        y_shape = (config.d_model if site in ("out", "wo") else config.d_ff,)
    for stack, module, ours, _ in names_lib.SUBLAYERS:
        is_attention = ours != "mlp"
        if not hasattr(model, stack) or is_attention != (site in _ATTENTION_MODULES):
            continue
        # Keys and values of cross-attention are computed from the encoder's output.
        reads_encoder = ours == "encoder_decoder_attention" and site in ("key", "value")
        for i, block in enumerate(getattr(model, stack).block):
            path = f"{stack}/layers_{i}/{ours}/{site}_adapter"
            layer = block.get_submodule(module.rpartition(".")[0])
            parent, name = block.get_submodule(module), _ATTENTION_MODULES.get(site, site)
            if site == "gate":  # no module: the whole MLP is wrapped, see `layer.AdaptedMlp`
                parent, name = layer, module.rpartition(".")[2]
            elif site == "wi_0" and not hasattr(parent, "wi_0"):
                name = "wi"  # of T5 1.0
            elif site == "wi_1" and not hasattr(parent, "wi_1"):
                raise InputError("an adapter at wi_1 needs a T5 v1.1, got a T5 with one wi")
            if not isinstance(getattr(parent, name), nn.Module):
                raise InputError(f"expected a module at {path}, got none")
            x_stack = "encoder" if reads_encoder else stack
            yield Place(path, x_stack, parent, name, x_features, y_shape)


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes."""
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return weight.device
    # accelerate keeps the weights of an offloaded module elsewhere, and its hook has the device.
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((d for d in devices if d is not None), "cpu"))


def dimensions(model: Any) -> JsonObject:
    """Returns the fields of our `T5Config` that a model determines, as in records."""
    config = model.config
    is_gated = bool(config.is_gated_act)
    name = epath.Path(type(model).__name__)
    activations = config_lib.read_activations(name, config.to_dict(), is_gated)
    return {
        "vocab_size": model.get_input_embeddings().weight.shape[0],
        "emb_dim": config.d_model,
        "num_heads": config.num_heads,
        "num_encoder_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "head_dim": config.d_kv,
        "mlp_dim": config.d_ff,
        "mlp_activations": [*activations],
        "logits_via_embedding": has_decoder(model) and _has_tied_form(model),
    }


def _has_tied_form(model: Any) -> bool:
    """Whether the model has no matrix of logits in our form, see `huggingface._open_logits`."""
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    if not model.config.scale_decoder_outputs or model.config.is_gated_act:
        return False
    return head is embedding or (not head.is_meta and torch.equal(head, embedding))


class Fingerprint(NamedTuple):
    """The result of `core.params.fingerprint` for the arrays of a base, under our paths.

    Attributes:
      value: the fingerprint; None: unknown.
      reason: why `value` is unknown, or may not be the fingerprint of the base's checkpoint; None
        if it is that fingerprint.
    """

    value: str | None
    reason: str | None = None


def fingerprint(model: Any) -> Fingerprint:
    """Returns the fingerprint of a base, or the reason why it is unknown."""
    if not has_decoder(model):
        return Fingerprint(None, "the T5 has no decoder")
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("lm_head.")}
    if any(p.is_meta for p in weights.values()):
        return Fingerprint(None, "the T5 is offloaded")
    dtypes = {p.dtype for p in weights.values()}
    if dtypes - {torch.float32, torch.bfloat16, torch.float16}:
        return Fingerprint(None, "the T5 is quantized")
    # The result is the checkpoint's fingerprint only if the checkpoint is float16 too, which is not
    # known here.
    is_float16 = torch.float16 in dtypes
    reason = "the T5 is float16, load it with dtype=torch.float32" if is_float16 else None
    depths = {stack: len(getattr(model, stack).block) for stack in ("encoder", "decoder")}
    table = names_lib.name_table(names_lib.Layout(depths, bool(model.config.is_gated_act)))
    if weights.keys() != table.keys():
        return Fingerprint(None, "the T5 has other parameters")
    arrays = {}
    for name, path in table.items():
        is_transposed = path.endswith(("/kernel", "/rel_embedding"))
        arrays[path] = weights[name].T if is_transposed else weights[name]
    if not _has_tied_form(model):
        kernel = model.lm_head.weight.T
        if model.config.scale_decoder_outputs:
            # A product of rounded values may differ from the product of the checkpoint's values.
            if kernel.dtype != torch.float32:
                reason = "the T5 scales its output, load it with dtype=torch.float32"
                return Fingerprint(None, reason)
            arrays[names_lib.OUR_HEAD] = _Scaled(kernel, float(np.float32(kernel.shape[0] ** -0.5)))
        else:
            arrays[names_lib.OUR_HEAD] = kernel
    samples = {path: (tuple(array.shape), _sample(array)) for path, array in arrays.items()}
    return Fingerprint(fingerprints.hash_samples(samples), reason)


class _Scaled(NamedTuple):
    """A matrix times a number; only the values that are indexed are multiplied."""

    matrix: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def __getitem__(self, index: Any) -> Tensor:
        return self.matrix[index] * self.scale


def _sample(array: Any) -> np.ndarray:
    """Returns the result of `core.params.sample_array` for a tensor or a `_Scaled`."""
    indices = fingerprints.sample_indices(tuple(array.shape))
    values = array[tuple(map(torch.from_numpy, indices))].detach()
    # Through int16, because numpy has no bfloat16 and older versions of torch have no uint16.
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)


def name_of(model: Any) -> str:
    """Returns the folder that a model was loaded from, or its name on the Hugging Face Hub."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return f"<a {type(model).__name__} in memory>"
    return os.path.abspath(name) if os.path.exists(name) else name
