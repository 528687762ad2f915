"""`MixtureModel`: a frozen T5 of transformers with adapters at our sites."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pemoe_jax.checkpoints import adapter_file
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.records import Record, package_versions
from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.runtime import file_io
from pemoe_jax.torch import base as base_lib
from pemoe_jax.torch import layer as layer_lib
from pemoe_jax.torch.config import SITES, MixtureConfig, parse_description
from pemoe_jax.torch.layer import AdaptedLinear, AdaptedMlp, Experts, LoRAExperts, VectorExperts

_KINDS: dict[str, type[Experts]] = {"VectorExperts": VectorExperts, "LoRAExperts": LoRAExperts}
_ADAPTER_PATTERN = ".*_adapter/.*"  # `core.params.ADAPTER_PATTERN`
_Self = TypeVar("_Self", bound="MixtureModel")


class MixtureModel(nn.Module):
    """A T5 of transformers with (IA)³, LoRA, MoV or MoLORA; only the adapters have gradients.

    Attributes that the class does not define, such as `config` and `device`, are the base's.

    Args:
      model: a `T5ForConditionalGeneration` or `T5EncoderModel`; its modules are wrapped in place,
        and its parameters frozen.
      config: method and settings. The adapters are drawn from torch's global generator.

    Raises:
      InputError: the model is not a T5 or has adapters, or a setting is out of its range.
    """

    def __init__(self, model: Any, config: MixtureConfig) -> None:
        super().__init__()
        self.base_model = _check_model(model)
        self.mixture_config = config
        self._step = 0
        self._record: Record | None = None  # the record of the loaded adapter
        # Computed first, because wrapping the modules renames the parameters.
        self._identity = base_lib.dimensions(model), base_lib.fingerprint(model)
        self._tokens = {stack: layer_lib.TokenInfo() for stack in ("encoder", "decoder")}
        self._total = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        self._adapters = _add_adapters(model, config, self._tokens)
        routers = [adapter.router for adapter in self._adapters.values() if adapter.router]
        self._has_aux_loss = any(r.config.balance_loss or r.config.z_loss for r in routers)
        self._reads_sentence = any(r.config.reads == "sentence" for r in routers)

    @classmethod
    def from_pretrained(cls: type[_Self], model: Any, path: str | os.PathLike[str]) -> _Self:
        """Adds the adapter of a folder to its base, for inference or further training.

        Warns if only the dimensions of the base can be compared, for example because it is float16.

        Args:
          model: the base, see the class.
          path: folder that `save_pretrained` or `pemoe convert adapter` wrote, local or `gs://`.

        Returns:
          The model in evaluation mode.

        Raises:
          InputError: a file is missing, damaged or of another version; the adapter belongs to
            another base; or the model is not a T5 or has adapters.
        """
        _check_model(model)
        arrays, record, step = adapter_file.open_adapter(path)
        _check_record(record, f"adapter {path}")
        config = MixtureConfig(
            record.method,
            sentence_dim=record.config.get("sentence_dim"),
            adapters=parse_description(record.adapters),
        )
        # Checked before the model is changed, so that an adapter of another base leaves it intact.
        _check_base(model, record, f"adapter {path}")
        mixture = cls(model, config)
        mixture._load_arrays(arrays, f"adapter {path}")
        mixture._record, mixture._step = record, step
        return mixture.eval()

    def save_pretrained(
        self, path: str | os.PathLike[str], step: int | None = None, overwrite: bool = False
    ) -> None:
        """Writes the adapter to a folder, for `from_pretrained` and for this package in JAX.

        Warns if the fingerprint of the base is unknown, for example because the base is float16.

        Args:
          path: the folder, local or `gs://`.
          step: number of training steps, for the record; None: that of the loaded adapter, or 0.
          overwrite: whether to replace an existing folder.

        Raises:
          InputError: the folder exists, and `overwrite` is False; or the base has no decoder.
        """
        if not base_lib.has_decoder(self.base_model):
            raise InputError(
                "save_pretrained must be called on a T5ForConditionalGeneration, got a"
                " T5EncoderModel, which lacks the adapters of the decoder"
            )
        output = file_io.resolve_output(path, "path")
        with file_io.remote_errors(output):
            if not overwrite and output.exists():
                raise InputError(
                    f"path must be a new folder without overwrite=True, got {path}, which exists"
                )
        arrays = {
            name: parameter.detach().float().cpu().numpy()
            for name, parameter in self._parameters_by_path().items()
        }
        step = self._step if step is None else step
        adapter_file.save_adapter(path, arrays, self._make_record(), step, overwrite)

    def print_trainable_parameters(self) -> None:
        """Prints the numbers of trainable and of all parameters, in PEFT's format."""
        counts = self._count_parameters()
        trainable, total = counts["trainable"], counts["total"]
        print(
            f"trainable params: {trainable:,} || all params: {total:,}"
            f" || trainable%: {100 * trainable / total:.4f}"
        )

    def extra_repr(self) -> str:
        config = self.mixture_config
        assert config.adapters is not None
        experts = {
            site: config.adapters[site].num_experts for site in SITES if site in config.adapters
        }
        return f"method={config.method!r}, num_experts={experts}"

    def forward(self, *args: Any, sentence_embeddings: Tensor | None = None, **kwargs: Any) -> Any:
        """Calls the base; `sentence_embeddings` [B, S] are for routers that read them.

        In training mode, the output's `loss` includes `aux_loss`, if a router has a coefficient of
        an auxiliary loss.
        """
        self._set_tokens(sentence_embeddings, kwargs)
        output = self.base_model(*args, **kwargs)
        if self.training and self._has_aux_loss and getattr(output, "loss", None) is not None:
            output.loss = output.loss + self.aux_loss()
        return output

    def generate(self, *args: Any, sentence_embeddings: Tensor | None = None, **kwargs: Any) -> Any:
        """Calls the base's `generate`; for `sentence_embeddings` see `forward`."""
        self._set_tokens(sentence_embeddings, kwargs)
        return self.base_model.generate(*args, **kwargs)

    def aux_loss(self) -> Tensor:
        """Returns the auxiliary loss [] of the last forward pass: the mean over all routers."""
        routers = [a.router for a in self._adapters.values() if a.router is not None]
        losses = [r.aux_loss for r in routers if r.aux_loss is not None]
        if not losses:
            return torch.zeros((), device=next(self.base_model.parameters()).device)
        # The mean is over all routers, including those without coefficients, as in JAX.
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / len(routers)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet, so the next line would recurse without end
                raise
            return getattr(self.base_model, name)

    def _set_tokens(self, sentence: Tensor | None, batch: Mapping[str, Any]) -> None:
        """Sets the inputs of routers for a forward pass, from the arguments of the base."""
        # The inputs stay set until the next call, because with gradient checkpointing the backward
        # pass computes the forward pass again.
        if not self._has_aux_loss and not self._reads_sentence:
            return
        labels = batch.get("labels")
        is_target = None if labels is None else labels != -100
        masks = {
            "encoder": batch.get("attention_mask"),
            "decoder": batch.get("decoder_attention_mask", is_target),
        }
        for stack, tokens in self._tokens.items():
            tokens.valid, tokens.sentence = masks[stack], sentence

    def _parameters_by_path(self) -> dict[str, nn.Parameter]:
        """Returns our path -> parameter of the adapters."""
        return {
            f"{path}/{name.replace('.', '/')}": parameter
            for path, adapter in self._adapters.items()
            for name, parameter in adapter.named_parameters()
        }

    def _count_parameters(self) -> dict[str, int]:
        trainable = sum(parameter.numel() for parameter in self._parameters_by_path().values())
        return {"trainable": trainable, "total": self._total + trainable}

    def _load_arrays(self, arrays: Mapping[str, LazyArray], source: str) -> None:
        """Copies an adapter's arrays to the parameters; raises InputError if they do not fit."""
        parameters = self._parameters_by_path()
        if not base_lib.has_decoder(self.base_model):
            arrays = {name: a for name, a in arrays.items() if not name.startswith("decoder/")}
        problems = [f"{path} is missing" for path in sorted(parameters.keys() - arrays.keys())]
        problems += [f"{path} is unknown" for path in sorted(arrays.keys() - parameters.keys())]
        problems += [
            f"{path}: expected {tuple(parameters[path].shape)}, got {array.shape}"
            for path, array in arrays.items()
            if path in parameters and tuple(parameters[path].shape) != array.shape
        ]
        if problems:
            raise InputError(
                f"{source} does not fit the model's {plural(len(parameters), 'adapter array')}:"
                f" {problems[0]}"
            )
        with torch.no_grad():
            for path, array in arrays.items():
                values = array.read().astype(np.float32)
                if not np.isfinite(values).all():
                    raise InputError(f"{source}: {path} holds NaN or infinity")
                parameters[path].copy_(torch.from_numpy(values))

    def _make_record(self) -> Record:
        versions = package_versions(("torch", "transformers"))
        if self._record is not None:
            return dataclasses.replace(self._record, versions=versions)
        dimensions, (fingerprint, reason) = self._identity
        if reason is not None:
            fingerprint = None
            # stacklevel 3: the caller of `save_pretrained`.
            warnings.warn(f"the fingerprint of the base is not saved: {reason}", stacklevel=3)
        dtype = "bfloat16" if self.base_model.dtype == torch.bfloat16 else "float32"
        return Record(
            method=self.mixture_config.method,
            trainable=[_ADAPTER_PATTERN],
            config={
                **dimensions,
                "dtype": dtype,
                "dropout_rate": self.base_model.config.dropout_rate,
                "sentence_dim": self.mixture_config.sentence_dim,
            },
            adapters=self.mixture_config.describe(),
            base={
                "path": base_lib.name_of(self.base_model),
                "format": "Hugging Face",
                "seed": None,
                "fingerprint": fingerprint,
                "needed": True,
            },
            counts=self._count_parameters(),
            versions=versions,
        )


def _add_adapters(
    model: Any, config: MixtureConfig, tokens: Mapping[str, layer_lib.TokenInfo]
) -> dict[str, Experts]:
    """Wraps the modules of a base at the sites of `config`; returns our path -> adapter."""
    assert config.adapters is not None
    adapters = {}
    # Gate comes last, because its wrapper replaces the whole MLP, in which `find_places` could then
    # not find the modules of other sites.
    for site in sorted(config.adapters, key=lambda site: (site == "gate", SITES.index(site))):
        settings = config.adapters[site]
        for place in list(base_lib.find_places(model, site)):
            module = getattr(place.parent, place.name)
            adapter = _KINDS[settings.kind](
                settings,
                place.x_features,
                place.y_shape,
                config.sentence_dim or model.config.d_model,
                tokens[place.stack],
                base_lib.execution_device(module),
            )
            wrapper = AdaptedMlp if site == "gate" else AdaptedLinear
            setattr(place.parent, place.name, wrapper(module, adapter))
            adapters[place.path] = adapter
    return adapters


def _check_model(model: Any) -> Any:
    """Returns the model; raises InputError unless it is a T5 of transformers without adapters."""
    if any(isinstance(each, Experts) for each in base_lib.check_model(model).modules()):
        raise InputError("the model must have no adapters, got one that has adapters already")
    return model


def _check_record(record: Record, source: str) -> None:
    if not record.adapters or record.sparse is not None:
        kind = "a sparse model" if record.sparse is not None else "no adapters"
        raise InputError(f"{source}: expected adapters of a dense T5, got {kind}")


def _check_base(model: Any, record: Record, source: str) -> None:
    """Raises InputError if an adapter belongs to a base of other dimensions or fingerprint.

    If a fingerprint is unknown, warns that it is not compared.
    """
    actual = base_lib.dimensions(model)
    # Records of earlier versions omit these fields if they have the values of T5 v1.1.
    defaults = {"mlp_activations": ["gelu", "linear"], "logits_via_embedding": False}
    for name, value in actual.items():
        is_of_decoder = name in ("num_decoder_layers", "logits_via_embedding")
        if is_of_decoder and not base_lib.has_decoder(model):
            continue
        expected = record.config.get(name, defaults.get(name))
        if value != expected:
            raise InputError(f"{source} belongs to a base with {name} {expected}, got {value}")
    fingerprint, reason = base_lib.fingerprint(model)
    expected = record.base["fingerprint"]
    if expected is not None and fingerprint == expected:
        return
    if expected is None:
        reason = "it was saved without a fingerprint of its base"
    if reason is None:
        raise InputError(
            f"{source} belongs to the base {record.base['path']} with fingerprint {expected};"
            f" {base_lib.name_of(model)} has {fingerprint}: pass the base that it was trained on"
        )
    # stacklevel 3: the caller of `from_pretrained`.
    warnings.warn(f"{source}: the fingerprint of its base is not compared: {reason}", stacklevel=3)
