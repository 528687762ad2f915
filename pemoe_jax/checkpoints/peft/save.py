"""Saving of adapters in PEFT's format."""

import math
import os
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pemoe_jax.checkpoints import dimensions, safetensors_file
from pemoe_jax.checkpoints.peft import names
from pemoe_jax.checkpoints.peft.load import CONFIG, WEIGHTS, method_name
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write
from pemoe_jax.runtime.file_io import JsonObject


def save_adapter(
    path: str | os.PathLike[str],
    description: names.Description,
    arrays: Mapping[str, np.ndarray],
    base_model_name: str | None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads onto a T5 v1.1.

    Args:
      path: the folder; must not exist.
      description: `core.adapters.describe` of the adapters.
      arrays: path -> array, of every adapter.
      base_model_name: path or name of the base, as information for users of the adapter.

    Raises:
      InputError: PEFT cannot express the adapters, routed ones for example; an array is missing
        in a layer, extra, of another shape or not finite; `path` exists.
    """
    _check_expressible(description)
    # At least one layer, so that the comparison below names what is missing.
    num_layers = {stack: max(1, dimensions.num_layers(arrays, stack)) for stack in names.STACKS}
    expected = names.adapter_arrays(description, num_layers)
    sizes = _axis_sizes(expected, arrays)
    target = {a.path: jax.ShapeDtypeStruct(a.shape(sizes), jnp.float32) for a in expected}
    params_lib.check_matches(arrays, target, "adapter to write")
    params_lib.check_finite(arrays, "adapter to write")
    tensors = {a.peft_name: a.to_peft(np.asarray(arrays[a.path], np.float32)) for a in expected}
    with atomic_write.temporary_path(path) as folder:
        folder.mkdir()
        safetensors_file.save_file(folder / WEIGHTS, tensors, {"format": "pt"})
        atomic_write.write_json(folder / CONFIG, _make_config(description, base_model_name))


def _axis_sizes(
    expected: Iterable[names.AdapterArray], arrays: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Returns the size of each axis, by the first array that has it."""
    sizes: dict[str, int] = {}
    for array in expected:
        shape = arrays[array.path].shape if array.path in arrays else ()
        for axis, size in zip(array.axes(), shape, strict=False):  # ranks are compared later
            if isinstance(axis, str):
                sizes.setdefault(axis, size)
    return sizes


def _check_expressible(description: names.Description) -> None:
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
        raise InputError(f"adapter to write: expected (IA)3 or LoRA at all sites, got {shown}")
    # gate is the product of two modules; PEFT adapts the output of single modules.
    if kinds == {"LoRAExperts"} and "gate" in description:
        raise InputError("LoRA at gate: PEFT has no module there: expected other sites")
    if {"gate", "wo"} <= description.keys():
        raise InputError(
            "(IA)3 at gate and at wo: PEFT scales wo's input or its output: expected one of them"
        )


def _make_config(description: names.Description, base_model_name: str | None) -> JsonObject:
    by_module = {names.SITES[site].module: settings for site, settings in description.items()}
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
    alphas = {module: _as_integer(settings["alpha"]) for module, settings in by_module.items()}
    # Patterns name the modules that differ from the first; PEFT matches them in every layer.
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


def _as_integer(alpha: float) -> float | int:
    # PEFT declares lora_alpha as an integer, but computes with a float just as well.
    return int(alpha) if math.isfinite(alpha) and alpha == int(alpha) else alpha
