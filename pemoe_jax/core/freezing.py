"""Parts of a sparse model that do not train, by name: the setting FREEZE."""

from collections.abc import Sequence

from pemoe_jax.core.errors import check_choice

_PARTS = {"router": "router", "experts": "expert", "moe": "(?:router|expert)"}
# FREEZE -> pattern of the frozen parameters. Routers of adapters are under `<site>_adapter/`.
FREEZE = {
    **{name: rf".*/mlp/{part}/.*" for name, part in _PARTS.items()},
    **{f"all_but_{name}": rf"(?!.*/mlp/{part}/).*" for name, part in _PARTS.items()},
}


def trainable_patterns(trainable: Sequence[str], freeze: str | None = None) -> list[str]:
    """Returns the patterns of trainable parameters, for `params.trainable_paths`.

    Args:
      trainable: regular expressions of the paths of trainable parameters; each must match at least
        one.
      freeze: part that does not train although it matches: 'router', 'experts', 'moe' (both, of
        sparse layers), 'all_but_router', 'all_but_experts', 'all_but_moe', or None.

    Raises:
      InputError: another part.
    """
    check_choice("FREEZE", freeze, (None, *FREEZE))
    excluded = [] if freeze is None else [f"!{FREEZE[freeze]}"]
    return [*trainable, *excluded] if trainable else []


def parse_patterns(patterns: Sequence[str]) -> tuple[list[str], str | None]:
    """Returns the arguments of `trainable_patterns` from its result."""
    freeze = part_of(patterns[-1]) if patterns else None
    return ([*patterns[:-1]], freeze) if freeze in FREEZE else ([*patterns], None)


def part_of(pattern: str) -> str:
    """Returns the value of FREEZE that added a pattern '!…'; the pattern itself if none did."""
    return next((part for part, regex in FREEZE.items() if pattern == f"!{regex}"), pattern)
