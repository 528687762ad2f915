"""The setting FREEZE: names of parts of a sparse model that do not train."""

from collections.abc import Sequence

from pemoe_jax.core.errors import check_choice

# Name of a part -> pattern of its module below `mlp/`, in a sparse layer.
_PARTS = {"router": "router", "experts": "expert", "moe": "(?:router|expert)"}
# FREEZE -> pattern of the frozen parameters. Only sparse layers have modules `mlp/router` and
# `mlp/expert`: the routers of adapters are under `<site>_adapter/`.
FREEZE = {
    **{name: rf".*/mlp/{part}/.*" for name, part in _PARTS.items()},
    **{f"all_but_{name}": rf"(?!.*/mlp/{part}/).*" for name, part in _PARTS.items()},
}


def trainable_patterns(trainable: Sequence[str], freeze: str | None = None) -> list[str]:
    """Returns the patterns of trainable parameters, for `params.trainable_paths`.

    Args:
      trainable: regular expressions; each must match the path of at least one parameter in full.
      freeze: part that does not train even if `trainable` matches it: 'router', 'experts', 'moe'
        (the routers and experts of sparse layers), 'all_but_router', 'all_but_experts',
        'all_but_moe', or None.

    Returns:
      `trainable` and, with `freeze`, a pattern '!…' that excludes the frozen part; an empty list if
      `trainable` is empty.

    Raises:
      InputError: `freeze` is none of these.
    """
    check_choice("FREEZE", freeze, (None, *FREEZE))
    excluded = [] if freeze is None else [f"!{FREEZE[freeze]}"]
    return [*trainable, *excluded] if trainable else []


def parse_patterns(patterns: Sequence[str]) -> tuple[list[str], str | None]:
    """Returns (trainable, freeze), from which `trainable_patterns` made the patterns."""
    freeze = find_freeze_value(patterns[-1]) if patterns else None
    return ([*patterns[:-1]], freeze) if freeze in FREEZE else ([*patterns], None)


def find_freeze_value(pattern: str) -> str:
    """Returns the value of FREEZE that makes the pattern '!…', or else the pattern itself."""
    return next((value for value, regex in FREEZE.items() if pattern == f"!{regex}"), pattern)
