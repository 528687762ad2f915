"""Hugging Face PEFT's own format for T5 v1.1, both ways: (IA)³ and LoRA, never routed.

A folder of adapter_config.json and adapter_model.safetensors (or .bin). Names, shapes and what the
settings do are those of PEFT 0.21; see `peft_names` for whose module is whose.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pemoe_jax.checkpoints import safetensors_file, torch_pickle
from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.peft import config as config_lib
from pemoe_jax.checkpoints.peft import names
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

Description = Mapping[str, Mapping[str, Any]]


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with an adapter's configuration."""
    return (file_io.resolve(path) / CONFIG).exists()


def base_model_name(folder: str | os.PathLike[str]) -> str:
    """What the adapter says that its base is: a path, or a name on Hugging Face's hub.

    Raises:
      InputError: it says nothing.
    """
    config = file_io.resolve(folder) / CONFIG
    name = file_io.read_json(config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{config}: base_model_name_or_path: expected the base's path, found {name!r}:"
            " name the base (INITIAL_CHECKPOINT_PATH, or --base of convert)"
        )
    return name


def method_name(description: Description) -> str:
    """Name of the method, 'ia3' or 'lora', of a description that `read` gave."""
    kinds = {record["kind"] for record in description.values()}
    return "ia3" if kinds == {"VectorExperts"} else "lora"


def load_adapter(
    folder: str | os.PathLike[str], dimensions: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """An adapter as data of ours.

    Args:
      folder: that PEFT's `save_pretrained` wrote.
      dimensions: of the base, under the names of `T5Config`.

    Returns:
      (adapters as `core.adapters.describe` gives them, path -> float32 array). With
      `use_rslora` alpha is PEFT's times √rank, so that alpha / rank is the same factor.

    Raises:
      InputError: a setting that our adapters cannot express; a tensor that is missing in some
        layer, left over, of another shape, unreadable or not finite.
    """
    place = file_io.resolve(folder)
    config = config_lib.check(place / CONFIG, file_io.read_json(place / CONFIG))
    found = _open_tensors(place)
    layers = {stack: dimensions[f"num_{stack}_layers"] for stack in names.STACKS}
    description = config_lib.describe(place / CONFIG, config, found, layers)
    listed = names.arrays(description, layers)
    sizes = {
        "embed": dimensions["emb_dim"],
        "heads": dimensions["num_heads"],
        "kv": dimensions["head_dim"],
        "joined_kv": dimensions["num_heads"] * dimensions["head_dim"],
        "mlp": dimensions["mlp_dim"],
    }
    shapes = {array.theirs: array.their_shape(sizes) for array in listed}
    params_lib.check_matches(found, _targets(shapes), f"adapter {place}")
    read_arrays = {name: _read(place, name, stored) for name, stored in found.items()}
    params_lib.check_finite(read_arrays, f"adapter {place}")
    arrays = {a.ours: a.to_ours(read_arrays[a.theirs], sizes) for a in listed}
    return description, arrays


def _open_tensors(folder: epath.Path) -> dict[str, LazyArray]:
    """Name -> tensor; the safetensors file where there are both, as PEFT does."""
    if (folder / WEIGHTS).exists():
        found, _ = safetensors_file.open_file(folder / WEIGHTS)
    elif (folder / PICKLED).exists():
        found = torch_pickle.open_file(folder / PICKLED)
    else:
        raise InputError(f"{folder}: expected {WEIGHTS} or {PICKLED}, found neither")
    plain = {names.without_adapter_name(name): stored for name, stored in found.items()}
    if len(plain) != len(found):
        twice = next(name for name in found if name not in plain)
        raise InputError(f"adapter {folder}: expected every tensor once, found {twice} twice")
    return plain


def _targets(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _read(folder: epath.Path, name: str, stored: LazyArray) -> np.ndarray:
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise InputError(f"adapter {folder}: {name}: expected floats, found {stored.dtype}")
    with np.errstate(over="ignore"):  # infinity is refused with the tensor's name
        return stored.read().astype(np.float32)


def save_adapter(
    path: str | os.PathLike[str],
    description: Description,
    arrays: Mapping[str, Any],
    base_name: str | None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads on a T5 v1.1.

    Args:
      path: of the folder; it must not exist.
      description: `core.adapters.describe` of the adapters.
      arrays: path -> array, of every adapter.
      base_name: path or name of the base, for whoever loads it.

    Raises:
      InputError: adapters that PEFT cannot express, routed ones above all; an array that is
        missing in some layer, left over, of another shape or not finite; `path` exists.
    """
    _check_expressible(description)
    listed = names.arrays(description, _depths(arrays))
    sizes = _sizes(listed, arrays)
    shapes = {array.ours: array.our_shape(sizes) for array in listed}
    params_lib.check_matches(arrays, _targets(shapes), "adapter to write")
    params_lib.check_finite(arrays, "adapter to write")
    converted = {a.theirs: a.to_theirs(np.asarray(arrays[a.ours], np.float32)) for a in listed}
    with atomic_write.temporary_path(path) as beside:
        beside.mkdir()
        safetensors_file.save_file(beside / WEIGHTS, converted, {"format": "pt"})
        atomic_write.write_json(beside / CONFIG, _config(description, base_name))


def _depths(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Layers of each stack, one at least: what lacks in them is for `place` to name."""
    return {stack: names.depth(stack, arrays) for stack in names.STACKS}


def _sizes(listed: list[names.Array], arrays: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the axes, each by the first array that has it."""
    sizes: dict[str, int] = {}
    for array in listed:
        shape = arrays[array.ours].shape if array.ours in arrays else ()
        for axis, size in zip(array.axes(), shape, strict=False):  # `place` compares their number
            if isinstance(axis, str):
                sizes.setdefault(axis, size)
    return sizes


def _check_expressible(description: Description) -> None:
    if not description:
        raise InputError("adapter to write: expected (IA)3 or LoRA at some site, found no adapters")
    for site, record in description.items():
        experts = record.get("num_experts", 1)
        if record.get("router") is not None or experts != 1:
            raise InputError(
                f"the adapter at {site} is routed (num_experts {experts}), and PEFT"
                " would leave its router out without a word: write our own file instead"
                " (pemoe convert adapter …)"
            )
    kinds = {record["kind"] for record in description.values()}
    if len(kinds) > 1:
        at = ", ".join(f"{site}: {record['kind']}" for site, record in description.items())
        raise InputError(f"adapter to write: PEFT expects (IA)3 or LoRA at all sites, found {at}")
    if kinds == {"LoRAExperts"} and "gate" in description:
        raise InputError("LoRA at gate: PEFT has no module there: expected other sites")
    if {"gate", "wo"} <= description.keys():
        raise InputError(
            "(IA)3 at gate and at wo: PEFT scales wo's input or its output: expected one of them"
        )


def _config(description: Description, base_name: str | None) -> dict[str, Any]:
    """What adapter_config.json says."""
    modules = {names.SITES[site].theirs: record for site, record in description.items()}
    common = {
        "base_model_name_or_path": base_name,
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": True,
        "target_modules": sorted(modules),
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    if method_name(description) == "ia3":
        feedforward = ["wo"] if "gate" in description else []
        return {"peft_type": "IA3", **common, "feedforward_modules": feedforward}
    ranks = {name: record["rank"] for name, record in modules.items()}
    alphas = {name: _plain(record["alpha"]) for name, record in modules.items()}
    first = next(iter(modules))
    return {
        "peft_type": "LORA",
        **common,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: r for name, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alphas[first]},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _plain(alpha: float) -> float | int:
    """16 rather than 16.0: PEFT declares an integer, and computes with either."""
    return int(alpha) if math.isfinite(alpha) and alpha == int(alpha) else alpha
