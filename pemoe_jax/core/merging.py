"""(IA)³ and LoRA folded into the matrices beside them: the same function without adapters."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError

KernelUpdate = Callable[[np.ndarray], np.ndarray]


def check_mergeable(description: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError where an adapter depends on its input, as routed ones do.

    Args:
      description: `adapters.describe`.
    """
    for site, record in description.items():
        if record.get("router") is not None or record.get("num_experts", 1) != 1:
            raise InputError(
                f"the adapter at {site} routes among {record.get('num_experts')} experts by its"
                " input: expected a plain (IA)³ or LoRA to merge, so keep it as an adapter"
            )
        if record["kind"] == "LoRAExperts" and site == "gate":
            raise InputError("LoRA at gate is added behind an activation: no matrix can hold it")


def kernel_updates(
    description: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Any]
) -> dict[str, KernelUpdate]:
    """What merging does to each matrix: path of a kernel -> (float32 kernel -> float32 kernel).

    Args:
      description: `adapters.describe` of the adapters.
      arrays: path -> array, of every adapter.

    Raises:
      InputError: see `check_mergeable`.
    """
    check_mergeable(description)
    added: dict[str, KernelUpdate] = {}
    scaled: dict[str, list[KernelUpdate]] = {}
    for path, array in arrays.items():
        module, site, leaf = _parts(path)
        # gelu(wi_0 x)·l · wi_1 x = gelu(wi_0 x) · (wi_1 x)·l
        kernel = f"{module}/{'wi_1' if site == 'gate' else site}/kernel"
        if leaf == "vectors":
            scaled.setdefault(kernel, []).append(_scale(np.asarray(array, np.float32)))
        elif leaf == "lora_a":
            factor = description[site]["alpha"] / description[site]["rank"]
            lora_b = arrays[path.removesuffix("lora_a") + "lora_b"]
            added[kernel] = _add(np.asarray(array), np.asarray(lora_b), factor)
    # a gate's vector scales what wi_1 and its own adapter give: sums come first
    return {
        kernel: _chain([*filter(None, [added.get(kernel)]), *scaled.get(kernel, [])])
        for kernel in {**added, **scaled}
    }


def _parts(path: str) -> tuple[str, str, str]:
    """'a/mlp/gate_adapter/vectors' -> ('a/mlp', 'gate', 'vectors')."""
    module, adapter, leaf = path.rsplit("/", 2)
    return module, adapter.removesuffix("_adapter"), leaf


def _scale(vectors: np.ndarray) -> KernelUpdate:
    """[H, 1, K] or [1, D or F], over the columns of the kernel [in, out]."""
    return lambda kernel: kernel * vectors.reshape(-1)


def _add(lora_a: np.ndarray, lora_b: np.ndarray, factor: float) -> KernelUpdate:
    """[in, 1, R] and [1, R, out]."""
    return lambda kernel: kernel + factor * (lora_a[:, 0] @ lora_b[0])


def _chain(parts: list[KernelUpdate]) -> KernelUpdate:
    def fold(kernel: np.ndarray) -> np.ndarray:
        for part in parts:
            kernel = part(kernel)
        return kernel

    return fold
