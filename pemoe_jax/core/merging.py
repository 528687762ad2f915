"""Merging (IA)³ and LoRA into the base model's matrices: the same function without adapters."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from pemoe_jax.core.errors import InputError

# float32 kernel [in, out] -> float32 kernel [in, out].
KernelUpdate: TypeAlias = Callable[[np.ndarray], np.ndarray]


def check_mergeable(description: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError if an adapter depends on its input, as routed adapters do.

    Args:
      description: `adapters.describe`.
    """
    for site, record in description.items():
        if record.get("router") is not None or record.get("num_experts", 1) != 1:
            raise InputError(
                f"the adapter at {site} must be a plain (IA)³ or LoRA to be merged, got"
                f" {record.get('num_experts')} experts routed by the input: keep it as an adapter"
            )
        if record["kind"] == "LoRAExperts" and site == "gate":
            raise InputError(
                "LoRA at gate cannot be merged: it is added to gelu(wi_0 x), after the matrix"
            )


def kernel_updates(
    description: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, np.ndarray]
) -> dict[str, KernelUpdate]:
    """Returns what merging does to each matrix: path of a kernel -> function of the kernel.

    Args:
      description: `adapters.describe` of the adapters.
      arrays: path -> array of every adapter parameter.

    Raises:
      InputError: see `check_mergeable`.
    """
    check_mergeable(description)
    sums: dict[str, KernelUpdate] = {}
    scalings: dict[str, list[KernelUpdate]] = {}
    for path, array in arrays.items():
        module, site, leaf = _parse_path(path)
        # A vector at gate moves to wi_1: (gelu(wi_0 x) · l) · wi_1 x = gelu(wi_0 x) · (wi_1 x · l)
        kernel = f"{module}/{'wi_1' if site == 'gate' else site}/kernel"
        if leaf == "vectors":
            scalings.setdefault(kernel, []).append(_scale(np.asarray(array, np.float32)))
        elif leaf == "lora_a":
            factor = description[site]["alpha"] / description[site]["rank"]
            lora_b = arrays[path.removesuffix("lora_a") + "lora_b"]
            sums[kernel] = _add(np.asarray(array), np.asarray(lora_b), factor)
    # LoRA before vectors: a vector at gate scales the output of wi_1 with LoRA's part.
    return {
        kernel: _chain([*filter(None, [sums.get(kernel)]), *scalings.get(kernel, [])])
        for kernel in {**sums, **scalings}
    }


def _parse_path(path: str) -> tuple[str, str, str]:
    """'a/mlp/gate_adapter/vectors' -> ('a/mlp', 'gate', 'vectors')."""
    module, adapter, leaf = path.rsplit("/", 2)
    return module, adapter.removesuffix("_adapter"), leaf


def _scale(vectors: np.ndarray) -> KernelUpdate:
    """Scales the columns by vectors [H, 1, K], [1, D] or [1, F]."""
    return lambda kernel: kernel * vectors.reshape(-1)


def _add(lora_a: np.ndarray, lora_b: np.ndarray, factor: float) -> KernelUpdate:
    """Adds the product of lora_a [in, 1, R] and lora_b [1, R, out]."""
    return lambda kernel: kernel + factor * (lora_a[:, 0] @ lora_b[0])


def _chain(updates: list[KernelUpdate]) -> KernelUpdate:
    def update_kernel(kernel: np.ndarray) -> np.ndarray:
        for update in updates:
            kernel = update(kernel)
        return kernel

    return update_kernel
