"""Merging (IA)³ and LoRA into the base model's matrices, which then need no adapters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from pemoe_jax.core.errors import InputError, plural

# float32 kernel [in, out] -> float32 kernel [in, out].
KernelUpdate: TypeAlias = Callable[[np.ndarray], np.ndarray]


def check_mergeable(description: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError if a description has routed experts, or LoRA at gate.

    Args:
      description: the result of `adapters.describe`.
    """
    for site, record in description.items():
        if record.get("router") is not None or record.get("num_experts", 1) != 1:
            raise InputError(
                f"the adapter at {site} must be (IA)³ or LoRA without a router to be merged, got"
                f" {plural(record.get('num_experts', 1), 'expert')} with a router: keep it as an"
                " adapter"
            )
        if record["kind"] == "LoRAExperts" and site == "gate":
            raise InputError(
                "LoRA at gate cannot be merged: it is added to the activation, after the matrix"
            )


def kernel_updates(
    description: Mapping[str, Mapping[str, Any]],
    arrays: Mapping[str, np.ndarray],
    is_gated: bool = True,
) -> dict[str, KernelUpdate]:
    """Returns {path of a kernel: function that merges its adapters into it}.

    Kernels without an adapter are left out.

    Args:
      description: the result of `adapters.describe`.
      arrays: path -> array of every adapter parameter.
      is_gated: whether MLPs have `wi_0` and `wi_1`, as in T5 v1.1; if False, they have only `wi`.

    Raises:
      InputError: see `check_mergeable`.
    """
    check_mergeable(description)
    loras: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
    scalings: dict[str, list[np.ndarray]] = {}
    for path, array in arrays.items():  # such as encoder/layers_0/mlp/gate_adapter/vectors
        module, adapter, leaf = path.rsplit("/", 2)
        site = adapter.removesuffix("_adapter")
        # A vector l at gate moves to the columns of wi_1, or, without wi_1, to the rows of wo:
        #   (gelu(wi_0 x) · l) · wi_1 x = gelu(wi_0 x) · (wi_1 x · l)
        #   wo (relu(wi x) · l) = (wo · l) relu(wi x)
        matrix = site
        if site == "gate":
            matrix = "wi_1" if is_gated else "wo"
        elif site == "wi_0" and not is_gated:
            matrix = "wi"
        kernel = f"{module}/{matrix}/kernel"
        if leaf == "vectors":  # [H, 1, K], [1, D] or [1, F]
            shape = (-1, 1) if (site, matrix) == ("gate", "wo") else (1, -1)
            scaling = np.asarray(array, np.float32).reshape(shape)
            scalings.setdefault(kernel, []).append(scaling)
        elif leaf == "lora_a":  # together with its lora_b
            factor = description[site]["alpha"] / description[site]["rank"]
            lora_b = arrays[path.removesuffix("lora_a") + "lora_b"]
            # [in, 1, R] and [1, R, out]
            loras[kernel] = factor, np.asarray(array)[:, 0], np.asarray(lora_b)[0]
    return {
        kernel: functools.partial(_merge, loras.get(kernel), scalings.get(kernel, []))
        for kernel in {**loras, **scalings}
    }


def _merge(
    lora: tuple[float, np.ndarray, np.ndarray] | None,
    scalings: list[np.ndarray],
    kernel: np.ndarray,
) -> np.ndarray:
    # A kernel has both LoRA and a vector if gate has a vector and wi_1 (or wo) has LoRA. The vector
    # then scales the sum of the kernel and LoRA's product, so LoRA is added first.
    if lora is not None:
        factor, lora_a, lora_b = lora
        kernel = kernel + factor * (lora_a @ lora_b)
    return functools.reduce(np.multiply, scalings, kernel)
