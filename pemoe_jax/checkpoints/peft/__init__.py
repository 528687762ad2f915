"""Reads and writes (IA)³ and LoRA adapters of a T5 in the format of Hugging Face PEFT.

An adapter is a folder with adapter_config.json and adapter_model.safetensors (or .bin). Names,
shapes and the meaning of settings follow PEFT 0.21. PEFT has no adapters with routers.
"""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pemoe_jax.checkpoints import dimensions as dimensions_lib
from pemoe_jax.checkpoints import safetensors_file, torch_pickle
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.peft import config as config_lib
from pemoe_jax.checkpoints.peft import names
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.network import T5Config
from pemoe_jax.runtime import atomic_write, file_io
from pemoe_jax.runtime.file_io import JsonObject

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLED_WEIGHTS = "adapter_model.bin"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with an adapter_config.json."""
    return (file_io.resolve(path) / _CONFIG).exists()


def base_model_name(folder: str | os.PathLike[str]) -> str:
    """Returns the base model that an adapter names: a path, or a name on the Hugging Face Hub.

    Raises:
      InputError: the adapter does not name a base.
    """
    config = file_io.resolve(folder) / _CONFIG
    name = file_io.read_json(config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{config}: expected a path in base_model_name_or_path, got {name!r}: pass the base"
            " (INITIAL_CHECKPOINT_PATH, or --base of pemoe convert)"
        )
    return name


def method_name(description: names.Description) -> str:
    """Returns the method, 'ia3' or 'lora', given a description from `load_adapter`."""
    kinds = {settings["kind"] for settings in description.values()}
    return "ia3" if kinds == {"VectorExperts"} else "lora"


def load_adapter(
    folder: str | os.PathLike[str], dimensions: JsonObject
) -> tuple[dict[str, JsonObject], dict[str, np.ndarray]]:
    """Loads a folder that PEFT's `save_pretrained` wrote.

    Args:
      folder: local or `gs://`.
      dimensions: dimensions of the base, under the field names of `T5Config`. If `mlp_activations`
        is missing, they are those of T5 v1.1.

    Returns:
      (adapters as `core.adapters.describe` returns them, parameter path -> float32 array). With
      `use_rslora`, PEFT scales by alpha / √rank. Our alpha is then PEFT's alpha times √rank, so
      that our factor alpha / rank is the same.

    Raises:
      InputError: our adapters cannot express a setting; a tensor is missing in a layer, extra, of
        another shape, unreadable or not finite.
    """
    resolved = file_io.resolve(folder)
    config = file_io.read_json(resolved / _CONFIG)
    config_lib.check_config(resolved / _CONFIG, config)
    tensors = _open_tensors(resolved)
    num_layers = {stack: dimensions[f"num_{stack}_layers"] for stack in names.STACKS}
    # The names and shapes of the tensors determine the adapters; no tensor is read yet.
    is_gated = len(dimensions.get("mlp_activations", T5Config.mlp_activations)) > 1
    description = config_lib.describe(resolved / _CONFIG, config, tensors, num_layers, is_gated)
    arrays = names.adapter_arrays(description, num_layers, is_gated)
    sizes = {
        "embed": dimensions["emb_dim"],
        "heads": dimensions["num_heads"],
        "kv": dimensions["head_dim"],
        "joined_kv": dimensions["num_heads"] * dimensions["head_dim"],
        "mlp": dimensions["mlp_dim"],
    }
    target = {a.peft_name: jax.ShapeDtypeStruct(a.peft_shape(sizes), jnp.float32) for a in arrays}
    params_lib.check_matches(tensors, target, f"adapter {resolved}")
    values = {}
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"adapter {resolved}: {name}: expected floats, got {tensor.dtype}")
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which raises below
            values[name] = tensor.read().astype(np.float32)
    params_lib.check_finite(values, f"adapter {resolved}")
    return description, {a.path: a.from_peft(values[a.peft_name], sizes) for a in arrays}


def _open_tensors(folder: epath.Path) -> dict[str, LazyArray]:
    """Opens the weights as name -> array, under PEFT's names without the adapter's name."""
    # If both files exist, the safetensors file is read, as PEFT does.
    if (folder / _WEIGHTS).exists():
        tensors, _ = safetensors_file.open_file(folder / _WEIGHTS)
    elif (folder / _PICKLED_WEIGHTS).exists():
        tensors = torch_pickle.open_file(folder / _PICKLED_WEIGHTS)
    else:
        raise InputError(f"{folder}: expected {_WEIGHTS} or {_PICKLED_WEIGHTS}, got neither")
    # A damaged file may hold a tensor twice, with and without the adapter's name.
    stripped = {names.strip_adapter_name(name): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        duplicate = next(name for name in tensors if name not in stripped)
        raise InputError(f"adapter {folder}: expected every tensor once, got {duplicate} twice")
    return stripped


def save_adapter(
    path: str | os.PathLike[str],
    description: names.Description,
    arrays: Mapping[str, np.ndarray],
    base_model_name: str | None,
    is_gated: bool = True,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads onto a T5.

    Args:
      path: the folder.
      description: `core.adapters.describe` of the adapters.
      arrays: parameter path -> array, of every adapter.
      base_model_name: path or Hub name of the base, for programs that open the base together with
        the adapter; None: not recorded.
      is_gated: whether the base's MLPs have wi_0 and wi_1, as in T5 v1.1. The MLP of T5 1.0 has one
        module `wi`, which is our site wi_0.

    Raises:
      InputError: PEFT cannot express the adapters, for example because they have routers; an array
        is missing in a layer, extra, of another shape or not finite; `path` exists.
    """
    _check_expressible(description)
    # At least one layer per stack, so that `check_matches` names the arrays of a missing stack.
    num_layers = {stack: max(1, dimensions_lib.num_layers(arrays, stack)) for stack in names.STACKS}
    expected = names.adapter_arrays(description, num_layers, is_gated)
    # The base is not known, so the size of an axis is taken from the first array that has the axis.
    sizes: dict[str, int] = {}
    for array in expected:
        shape = arrays[array.path].shape if array.path in arrays else ()
        # Not strict, because `check_matches` reports a shape of another rank below.
        for axis, size in zip(array.axes(), shape, strict=False):
            if isinstance(axis, str):
                sizes.setdefault(axis, size)
    target = {a.path: jax.ShapeDtypeStruct(a.shape(sizes), jnp.float32) for a in expected}
    params_lib.check_matches(arrays, target, "adapter to write")
    params_lib.check_finite(arrays, "adapter to write")
    tensors = {a.peft_name: a.to_peft(np.asarray(arrays[a.path], np.float32)) for a in expected}
    with atomic_write.temporary_path(path) as folder:
        folder.mkdir()
        safetensors_file.save_file(folder / _WEIGHTS, tensors, {"format": "pt"})
        config = _make_config(description, base_model_name, is_gated)
        atomic_write.write_json(folder / _CONFIG, config)


def _check_expressible(description: names.Description) -> None:
    """Raises InputError if PEFT has no equivalent of the adapters."""
    if not description:
        raise InputError("adapter to write: expected (IA)3 or LoRA at some site, got no adapters")
    for site, settings in description.items():
        num_experts = settings.get("num_experts", 1)
        if settings.get("router") is not None or num_experts != 1:
            raise InputError(
                f"the adapter at {site} is routed (num_experts {num_experts}): PEFT would silently"
                " drop its router; write our own format instead (pemoe convert adapter …)"
            )
    kinds = {settings["kind"] for settings in description.values()}
    if len(kinds) > 1:
        shown = ", ".join(f"{site}: {settings['kind']}" for site, settings in description.items())
        raise InputError(f"adapter to write: expected only (IA)3 or only LoRA, got {shown}")
    # PEFT's LoRA changes the output of one module; gate is the product of two modules' outputs.
    if kinds == {"LoRAExperts"} and "gate" in description:
        raise InputError("adapter to write: LoRA at gate has no equivalent module in PEFT")
    if {"gate", "wo"} <= description.keys():
        raise InputError(
            "(IA)3 at gate and at wo: expected one of them, as PEFT scales either wo's input or its"
            " output"
        )


def _make_config(
    description: names.Description, base_model_name: str | None, is_gated: bool
) -> JsonObject:
    """Returns the contents of adapter_config.json."""
    sites = names.sites_of(is_gated)
    by_module = {
        sites[site].name: settings for site, settings in description.items() if site in sites
    }
    common: JsonObject = {
        "base_model_name_or_path": base_model_name,
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": True,
        "target_modules": sorted(by_module),
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    if method_name(description) == "ia3":
        feedforward = ["wo"] if "gate" in description else []
        return {"peft_type": "IA3", **common, "feedforward_modules": feedforward}
    ranks = {module: settings["rank"] for module, settings in by_module.items()}
    # PEFT declares lora_alpha as an integer, so whole numbers are written as integers. It computes
    # correctly with other numbers too.
    alphas = {
        module: int(alpha) if float(alpha := settings["alpha"]).is_integer() else alpha
        for module, settings in by_module.items()
    }
    # `r` and `lora_alpha` are the values of the first module. The patterns have the modules with
    # other values; the name of a module matches it in every layer.
    first = next(iter(by_module))
    return {
        "peft_type": "LORA",
        **common,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {module: r for module, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alphas[first]},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }
