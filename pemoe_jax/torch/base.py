"""The base model: its modules at our sites, its dimensions and its identity."""

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
_MODULES = {"query": "q", "key": "k", "value": "v", "out": "o"}


class Site(NamedTuple):
    """A place for an adapter.

    Attributes:
      path: ours, such as 'encoder/layers_0/attention/key_adapter'.
      stack: whose tokens x has; the encoder's at keys and values of cross-attention.
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
    """Returns the model; raises InputError unless it is a T5 that adapters can be added to."""
    name = type(model).__name__
    classes = tuple(getattr(transformers, each) for each in _CLASSES)
    if not isinstance(model, classes):
        raise InputError(f"the model must be a {' or '.join(_CLASSES)} of transformers, got {name}")
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    config_lib.check(epath.Path(name), settings)
    return model


def has_decoder(model: Any) -> bool:
    """Whether a model is not an encoder alone."""
    return hasattr(model, "decoder")


def find_sites(model: Any, site: str) -> Iterator[Site]:
    """Yields every place of one of our eight sites in a model, in order."""
    config = model.config
    sizes = {"query": "embed", "key": "embed", "value": "embed", "out": "heads", "wo": "mlp"}
    features = {
        "embed": config.d_model,
        "mlp": config.d_ff,
        "heads": config.num_heads * config.d_kv,
    }
    x_features = features[sizes.get(site, "embed")]
    if site in ("query", "key", "value"):
        y_shape: tuple[int, ...] = (config.num_heads, config.d_kv)
    else:
        y_shape = (config.d_model if site in ("out", "wo") else config.d_ff,)
    for stack, module, ours, _ in names_lib.SUBLAYERS:
        if not hasattr(model, stack) or (ours == "mlp") != (site not in _MODULES):
            continue
        is_cross = ours == "encoder_decoder_attention" and site in ("key", "value")
        for i, block in enumerate(getattr(model, stack).block):
            path = f"{stack}/layers_{i}/{ours}/{site}_adapter"
            layer = block.get_submodule(module.rpartition(".")[0])
            parent, name = block.get_submodule(module), _MODULES.get(site, site)
            if site == "gate":
                parent, name = layer, module.rpartition(".")[2]
            elif site == "wi_0" and not hasattr(parent, "wi_0"):
                name = "wi"  # of T5 1.0
            elif site == "wi_1" and not hasattr(parent, "wi_1"):
                raise InputError("an adapter at wi_1 must have a T5 v1.1, got a T5 with one wi")
            if not isinstance(getattr(parent, name), nn.Module):
                raise InputError(f"expected a module at {path}, got none")
            yield Site(path, "encoder" if is_cross else stack, parent, name, x_features, y_shape)


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes; accelerate may keep its weights elsewhere."""
    weight = next(module.parameters())
    if weight.device.type != "meta":
        return weight.device
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((d for d in devices if d is not None), "cpu"))


def dimensions(model: Any) -> JsonObject:
    """Returns the fields of `T5Config` that define the model, under the names of our records."""
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
    """Whether our form of the model has no matrix of logits, see `huggingface`."""
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    if not model.config.scale_decoder_outputs or model.config.is_gated_act:
        return False
    return head is embedding or (not head.is_meta and torch.equal(head, embedding))


class Fingerprint(NamedTuple):
    """`params.fingerprint` of a base's arrays under our paths.

    Attributes:
      value: the fingerprint; None: unknown.
      reason: why that of the base's checkpoint is unknown or may differ; None: it is `value`.
    """

    value: str | None
    reason: str | None = None


def fingerprint(model: Any) -> Fingerprint:
    """Returns the fingerprint of a base."""
    if not has_decoder(model):
        return Fingerprint(None, "the T5 has no decoder")
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("lm_head.")}
    if any(p.is_meta for p in weights.values()):
        return Fingerprint(None, "the T5 is offloaded")
    dtypes = {p.dtype for p in weights.values()} - {torch.float32, torch.bfloat16}
    if dtypes - {torch.float16}:
        return Fingerprint(None, "the T5 is quantized")
    # float16 has the values of the checkpoint if that is float16 too.
    reason = "the T5 is float16, load it with dtype=torch.float32" if dtypes else None
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
            if kernel.dtype != torch.float32:
                reason = "the T5 scales its output, load it with dtype=torch.float32"
                return Fingerprint(None, reason)
            arrays[names_lib.OUR_HEAD] = _Scaled(kernel, float(np.float32(kernel.shape[0] ** -0.5)))
        else:
            arrays[names_lib.OUR_HEAD] = kernel
    samples = {path: (tuple(array.shape), _sample(array)) for path, array in arrays.items()}
    return Fingerprint(fingerprints.hash_samples(samples), reason)


class _Scaled(NamedTuple):
    """A matrix times a number, computed only for the values that are read."""

    matrix: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    def __getitem__(self, index: Any) -> Tensor:
        return self.matrix[index] * self.scale


def _sample(array: Any) -> np.ndarray:
    """Returns `params.sample_array` of a tensor."""
    indices = fingerprints.sample_indices(tuple(array.shape))
    values = array[tuple(map(torch.from_numpy, indices))].detach()
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)


def name_of(model: Any) -> str:
    """Returns the folder that a model was loaded from, or its name on the Hugging Face Hub."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return f"<a {type(model).__name__} in memory>"
    return os.path.abspath(name) if os.path.exists(name) else name
