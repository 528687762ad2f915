"""Checks PEFT's adapter_config.json, and converts it to a description of our adapters.

A setting that changes what the model computes is converted or refused. A setting that this module
does not know, as a later PEFT may have, is refused unless it is null, false or empty.
"""

import math
from collections.abc import Collection, Mapping
from typing import NoReturn

from etils import epath

from pemoe_jax.checkpoints.lazy_array import LazyArray
from pemoe_jax.checkpoints.peft import names
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import JsonObject

# Settings that do not change what the model computes, or change it only together with a refused
# setting.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # concerns adapters of embeddings, which are refused
    "inference_mode",
    "init_ia3_weights",
    "layers_pattern",  # used with layers_to_transform
    "lora_dropout",
    "megatron_core",  # used with megatron_config
    "peft_version",
    "qalora_group_size",  # used with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
_SUPPORTED = {
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
# The values of init_lora_weights that leave the base's matrices as they are. The others (pissa,
# olora, corda, loftq, lora_ga) change these matrices, so that the adapter does not fit the original
# base.
_INITIALIZERS_THAT_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _refuse(path: epath.Path, key: str, expected: str, value: object) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    raise InputError(f"{path}: {key}: expected {expected}, got {shown}")


def check_config(path: epath.Path, config: JsonObject) -> None:
    """Raises `InputError` if our adapters cannot express a setting.

    Args:
      path: the file, for errors.
      config: its settings.
    """
    if config.get("peft_type") not in ("IA3", "LORA"):
        _refuse(path, "peft_type", "'IA3' or 'LORA'", config.get("peft_type"))
    if config.get("bias", "none") != "none":
        _refuse(path, "bias", "'none'", config["bias"])
    initializer = config.get("init_lora_weights", True)
    if initializer not in _INITIALIZERS_THAT_KEEP_BASE:
        allowed = ", ".join(map(str, _INITIALIZERS_THAT_KEEP_BASE))
        expected = f"an initializer that does not change the base ({allowed})"
        _refuse(path, "init_lora_weights", expected, initializer)
    for key, value in config.items():
        is_unset = value is None or value is False or value in ("", [], {})
        if key not in _IGNORED | _SUPPORTED and not is_unset:
            _refuse(path, key, "null, false or empty (pemoe_jax has no equivalent)", value)
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = config.get(key)
        is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (value is None or isinstance(value, str) or is_list):
            _refuse(path, key, "a list of modules or a pattern", value)
    if not config.get("target_modules"):
        _refuse(path, "target_modules", "a list of modules", config.get("target_modules"))


def describe(
    path: epath.Path,
    config: JsonObject,
    tensors: Mapping[str, LazyArray],
    num_layers: Mapping[str, int],
    is_gated: bool,
) -> dict[str, JsonObject]:
    """Returns the adapters as `core.adapters.describe` does.

    The names of the tensors determine which modules have an adapter. The shape of an (IA)³ tensor
    at `wo` determines whether it scales the input or the output. Settings that are lists of modules
    must agree with the tensors. If a setting is a regular expression, each adapted module must have
    tensors in every layer.

    Args:
      path: the file, for errors.
      config: its settings, accepted by `check_config`.
      tensors: PEFT's name -> tensor.
      num_layers: stack -> number of layers of the base.
      is_gated: whether the base's MLPs have wi_0 and wi_1, instead of one wi.

    Raises:
      InputError: settings and tensors disagree, or a rank or an alpha is invalid.
    """
    kind = {"IA3": "VectorExperts", "LORA": "LoRAExperts"}[config["peft_type"]]
    adapted = {names.module_of(name) for name in tensors} & set(names.MODULES)
    if not adapted:
        shown = ", ".join(list(tensors)[:3]) or "no tensor"
        raise InputError(f"{path.parent}: expected tensors at modules of a T5, got {shown}")
    # PEFT's (IA)³ vectors are [1, in] if they scale the input, and [out, 1] if the output.
    is_input_scaled = kind == "VectorExperts" and any(
        names.module_of(name) == "wo" and tensor.shape[:1] == (1,)
        for name, tensor in tensors.items()
    )
    modules = names.module_names(num_layers, is_gated)
    adapted_modules = [module for module in modules if _leaf(module) in adapted]
    _check_targets(path, config, adapted_modules, modules, tensors)
    feedforward = config.get("feedforward_modules")
    if kind == "VectorExperts" and isinstance(feedforward, list):
        input_scaled = [m for m in adapted_modules if is_input_scaled and _leaf(m) == "wo"]
        # `endswith` without a '.', because PEFT itself compares in this way.
        if [m for m in adapted_modules if m.endswith(tuple(feedforward))] != input_scaled:
            expected = "['wo'] if the tensors of wo are [1, in], otherwise no target module"
            _refuse(path, "feedforward_modules", expected, feedforward)
    # Two sites share PEFT's module wo: gate is its input, wo its output.
    unused = "wo" if is_input_scaled else "gate"
    by_site = {s: module.name for s, module in names.sites_of(is_gated).items() if s != unused}
    sites = {site: name for site, name in by_site.items() if name in adapted}
    plain = {"kind": kind, "num_experts": 1, "router": None}
    if kind == "VectorExperts":
        return {site: dict(plain) for site in sites}
    return {site: plain | _rank_and_alpha(path, config, module) for site, module in sites.items()}


def _leaf(module: str) -> str:
    """Returns the last part of a module's name: 'encoder.block.0.layer.1.mlp.wo' -> 'wo'."""
    return module.rpartition(".")[2]


def _check_targets(
    path: epath.Path,
    config: JsonObject,
    adapted: list[str],
    modules: list[str],
    tensors: Collection[str],
) -> None:
    """Raises InputError unless the targeted modules are those with tensors, in every layer.

    PEFT itself silently ignores the tensors of modules that it does not target.

    Args:
      path: the file, for errors.
      config: its settings.
      adapted: the modules that have an adapter, in all layers of the base.
      modules: all modules of the base that may have one.
      tensors: names of the tensors.
    """
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if isinstance(targets, str) or isinstance(excluded, str):
        # Only a pattern can leave out layers. With lists of names, a missing tensor means a damaged
        # file, which is reported later.
        present = [name.removeprefix(names.PREFIX) for name in tensors]
        for module in adapted:
            if not any(name.startswith(f"{module}.") for name in present):
                key = "target_modules" if isinstance(targets, str) else "exclude_modules"
                expected = (
                    f"{_leaf(module)} in every layer (pemoe_jax cannot adapt only some layers), but"
                    f" {module} has no tensor"
                )
                _refuse(path, key, expected, config[key])
        return
    if [m for m in modules if _is_in(m, targets) and not _is_in(m, excluded)] != adapted:
        expected = ", ".join(sorted({_leaf(module) for module in adapted}))
        _refuse(path, "target_modules", f"{expected} in every layer, as in the tensors", targets)


def _is_in(module: str, targets: Collection[str]) -> bool:
    """Whether a list of modules names a module, in full or by its last parts."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _rank_and_alpha(path: epath.Path, config: JsonObject, module: str) -> JsonObject:
    """Returns our rank and alpha for a LoRA module, from its patterns or the common settings."""
    key, rank = _setting_of(path, config, module, "r", "rank_pattern")
    if type(rank) is not int or rank < 1:
        _refuse(path, key, f"a rank >= 1 at {module}", rank)
    key, alpha = _setting_of(path, config, module, "lora_alpha", "alpha_pattern")
    # A bool is an int in Python. The last comparison is negated, so that NaN fails it too.
    if not isinstance(alpha, (int, float)) or type(alpha) is bool or not abs(alpha) < 1e30:
        _refuse(path, key, f"a number at {module}", alpha)
    # Our adapters scale by alpha / rank, rank-stabilized LoRA by alpha / √rank (arXiv 2312.03732).
    return {"rank": rank, "alpha": alpha * (math.sqrt(rank) if config.get("use_rslora") else 1.0)}


def _setting_of(
    path: epath.Path, config: JsonObject, module: str, key: str, pattern: str
) -> tuple[str, object]:
    """Returns the value of a module's setting, and the key of config.json that has it.

    The key is `pattern` if that has a value for the module, or else `key`, whose value is common to
    all modules. Returns (key, value).
    """
    by_module = config.get(pattern) or {}
    # PEFT reads the keys as regular expressions; only plain module names are accepted here.
    if not isinstance(by_module, dict) or not by_module.keys() <= set(names.MODULES):
        _refuse(path, pattern, f"keys among {', '.join(names.MODULES)}", by_module)
    return (pattern, by_module[module]) if module in by_module else (key, config.get(key))
