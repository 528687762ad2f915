"""PEFT's adapter_config.json: what of it our adapters can express, as a description of ours.

A setting that changes what the model computes is understood or refused; so is one of a later PEFT
that is not known here.
"""

import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.peft import names
from pemoe_jax.core.errors import InputError

# These concern training, where an adapter is loaded, or what another setting switches on.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # of embeddings, which have no site
    "inference_mode",
    "init_ia3_weights",
    "layers_pattern",  # read with layers_to_transform
    "lora_dropout",
    "megatron_core",  # read with megatron_config
    "peft_version",
    "qalora_group_size",  # read with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
_UNDERSTOOD = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "feedforward_modules",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# Others (pissa, olora, corda, loftq, lora_ga) change the base's matrices when PEFT sets them up.
_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _wrong(path: epath.Path, key: str, expected: str, found: Any) -> InputError:
    shown = repr(found)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return InputError(f"{path}: {key}: expected {expected}, found {shown}")


def check(path: epath.Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration, if nothing in it is beyond our adapters.

    Args:
      path: of the file, for errors.
      config: the file's object.

    Raises:
      InputError: names the setting, what was expected and what was found.
    """
    if config.get("peft_type") not in ("IA3", "LORA"):
        raise _wrong(path, "peft_type", "'IA3' or 'LORA'", config.get("peft_type"))
    if config.get("bias", "none") != "none":
        raise _wrong(path, "bias", "'none'", config["bias"])
    initial = config.get("init_lora_weights", True)
    if initial not in _KEEP_BASE:
        raise _wrong(
            path,
            "init_lora_weights",
            f"one that leaves the base as it is ({', '.join(map(str, _KEEP_BASE))})",
            initial,
        )
    for key, value in config.items():
        unset = value is None or value is False or value in ("", [], {})
        if key not in _HARMLESS | _UNDERSTOOD and not unset:
            raise _wrong(path, key, "none, false or empty (no adapter of ours does this)", value)
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = config.get(key)
        if not (value is None or isinstance(value, str) or _is_names(value)):
            raise _wrong(path, key, "names of modules or a pattern", value)
    if not config.get("target_modules"):
        raise _wrong(path, "target_modules", "names of modules", config.get("target_modules"))
    return config


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def describe(
    path: epath.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyArray],
    layers: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """The adapters as `core.adapters.describe` gives them.

    The tensors say which modules are adapted, and their shapes whether the input is scaled;
    settings that are lists must say the same. A pattern among them is not run.

    Args:
      path: of the file, for errors.
      config: that `check` has passed.
      tensors: name -> tensor.
      layers: of each stack of the base.

    Raises:
      InputError: the settings and the tensors differ, or a rank or an alpha is none.
    """
    kind = {"IA3": "VectorExperts", "LORA": "LoRAExperts"}[config["peft_type"]]
    adapted = {names.module_of(name) for name in tensors} & set(names.MODULES)
    if not adapted:
        found = ", ".join(list(tensors)[:3]) or "no tensor"
        raise InputError(f"{path.parent}: expected tensors at modules of a T5, found {found}")
    input_scaled = kind == "VectorExperts" and any(
        names.module_of(name) == "wo" and stored.shape[:1] == (1,)
        for name, stored in tensors.items()
    )
    every = [m for m in names.modules(layers) if _last(m) in adapted]
    _check_targets(path, config, every, list(names.modules(layers)))
    if kind == "VectorExperts":
        _check_feedforward(path, config, every, input_scaled)
    unused = "wo" if input_scaled else "gate"
    sites = [s for s, site in names.SITES.items() if site.theirs in adapted and s != unused]
    plain = {"kind": kind, "num_experts": 1, "router": None}
    if kind == "VectorExperts":
        return {site: dict(plain) for site in sites}
    return {site: {**plain, **_scaling(path, config, names.SITES[site].theirs)} for site in sites}


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _check_targets(
    path: epath.Path, config: Mapping[str, Any], adapted: list[str], every: list[str]
) -> None:
    """PEFT ignores tensors of modules that it does not target, and says nothing."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str) or isinstance(excluded, str):
        return
    if [m for m in every if _listed(m, targets) and not _listed(m, excluded)] != adapted:
        expected = ", ".join(sorted({_last(module) for module in adapted}))
        raise _wrong(
            path, "target_modules", f"{expected} in every layer, as there are tensors of", targets
        )


def _listed(module: str, targets: list[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_feedforward(
    path: epath.Path, config: Mapping[str, Any], adapted: list[str], input_scaled: bool
) -> None:
    said = config.get("feedforward_modules")
    if said is None or isinstance(said, str):
        return
    expected = [module for module in adapted if input_scaled and _last(module) == "wo"]
    if [module for module in adapted if module.endswith(tuple(said))] != expected:
        raise _wrong(
            path,
            "feedforward_modules",
            "['wo'] where wo's tensors are [1, in], else none of the targets (no other module's"
            " input is a site here)",
            said,
        )


def _scaling(path: epath.Path, config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Rank and alpha at a module; the product is scaled by alpha / rank here."""
    key, rank = _of_module(path, config, module, "r", "rank_pattern")
    if type(rank) is not int or rank < 1:
        raise _wrong(path, key, f"a rank >= 1 at {module}", rank)
    key, alpha = _of_module(path, config, module, "lora_alpha", "alpha_pattern")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise _wrong(path, key, f"a number at {module}", alpha)
    # by alpha / √rank there, if so set (arXiv 2312.03732)
    return {"rank": rank, "alpha": alpha * (math.sqrt(rank) if config.get("use_rslora") else 1.0)}


def _of_module(
    path: epath.Path, config: Mapping[str, Any], module: str, key: str, pattern: str
) -> tuple[str, Any]:
    """The setting's key and value: PEFT reads the keys of a pattern as regular expressions."""
    by_module = config.get(pattern) or {}
    if not isinstance(by_module, dict) or not by_module.keys() <= set(names.MODULES):
        raise _wrong(path, pattern, f"keys among {', '.join(names.MODULES)}", by_module)
    return (pattern, by_module[module]) if module in by_module else (key, config.get(key))
