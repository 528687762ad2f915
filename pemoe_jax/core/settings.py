"""Checks of the settings of adapters and routers.

This module imports no jax, so that `pemoe_jax.torch`, which needs no jax, can use it.
"""

import typing
from typing import Any

from pemoe_jax.core.errors import InputError, check_integer

# What a router can read; see `reads` of `routing.Router`.
READS = ("x", "y", "sentence")


def check_experts(module: Any) -> None:
    """Raises InputError unless the fields of `VectorExperts` or `LoRAExperts` are in range."""
    kind, num_experts = type(module).__name__, module.num_experts
    if num_experts < 1:
        raise InputError(f"{kind}.num_experts must be at least 1, got {num_experts}")
    if module.router is None and num_experts != 1:
        raise InputError(f"{kind}.num_experts must be 1 without a router, got {num_experts}")
    if getattr(module, "rank", 1) < 1:
        raise InputError(f"{kind}.rank must be at least 1, got {module.rank}")


def check_router(router: Any) -> None:
    """Raises InputError unless the fields of a `Router` are in range."""
    top_k, num_experts = router.top_k, router.num_experts
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= num_experts):
        raise InputError(
            f"Router.top_k must be None or between 1 and num_experts ({num_experts}), got {top_k!r}"
        )
    if router.reads not in (None, *READS):
        raise InputError(f"Router.reads must be None or one of {READS}, got {router.reads!r}")
    if not router.temperature > 0:
        raise InputError(f"Router.temperature must be positive, got {router.temperature!r}")
    if not 0 <= router.jitter_noise < 1:
        raise InputError(f"Router.jitter_noise must be in [0, 1), got {router.jitter_noise!r}")


def check_type(name: str, value: object, annotation: object) -> None:
    """Raises InputError if the value of a setting does not have its field's type.

    Only fields of type int, float, bool, str or None, or of a union of these, are checked. An
    integer must be positive.

    Args:
      name: name of the setting, for the error.
      value: value of the setting.
      annotation: type of the field.
    """
    types = typing.get_args(annotation) or (annotation,)  # the members of a union, or the type
    is_checked = set(types) <= {int, float, bool, str, type(None)}
    is_allowed_none = value is None and type(None) in types
    if not is_checked or is_allowed_none:
        return
    if int in types:
        check_integer(name, value)
    elif type(value) not in ((float, int) if float in types else types):  # JSON may hold 1 for 1.0
        expected = " or ".join(getattr(each, "__name__", "") for each in types)
        raise InputError(
            f"{name} must be {expected.replace('NoneType', 'None')}, got {value!r:.60}"
        )
