"""What gin binds, held against the types of the parameters that it is bound to."""

import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

from pemoe_jax.core.errors import InputError

_SCALARS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
}
_CONTAINERS = {
    collections.abc.Sequence: "a list",
    collections.abc.Mapping: "a dict",
}


def check(unset: Collection[str] = ()) -> None:
    """Looks at every value of the parsed configuration that is a literal.

    Only annotations made of plain types and of lists and dicts are looked at: what takes anything
    else has to look itself.

    Args:
      unset: macros for which None means that no file has set them.

    Raises:
      InputError: a parameter does not take its value; named by the macro that holds it, if any.
    """
    import gin

    # gin has no public way from a binding to the function it is of
    bound, registry = gin.config._CONFIG, gin.config._REGISTRY
    for (_, selector), values in bound.items():
        if selector == "gin.macro":
            continue
        kinds = _kinds(registry[selector].wrapped)
        for parameter, given in values.items():
            name, value = _followed(f"{selector}.{parameter}", given, bound)
            kind = kinds.get(parameter)
            if kind is None or not _is_literal(value) or (value is None and name in unset):
                continue
            if not _fits(value, kind):
                raise InputError(f"{name}: expected {_words(kind)}, found {value!r}")


def _followed(name: str, value: Any, bound: Any) -> tuple[str, Any]:
    """The value that macros stand for, and the name of the last of them."""
    import gin

    while isinstance(value, gin.config.ConfigurableReference) and str(value)[0] == "%":
        name = str(value)[1:]
        macro = bound.get((name, "gin.macro"))
        if macro is None:  # gin.REQUIRED, or a constant
            break
        value = macro["value"]
    return name, value


def _is_literal(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))


def _kinds(function: Any) -> dict[str, Any]:
    """Parameter -> its type; those whose annotation cannot be read here are left out."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    names = vars(sys.modules[function.__module__])
    found = {}
    for parameter in parameters.values():
        kind = parameter.annotation
        if isinstance(kind, str):
            try:
                kind = eval(kind, dict(names))
            except NameError:  # imported for type checkers alone
                continue
        found[parameter.name] = kind
    return found


def _members(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    members = typing.get_args(kind) if is_union else (kind,)
    return tuple(type(None) if member is None else member for member in members)


def _fits(value: Any, kind: Any) -> bool:
    for member in _members(kind):
        origin = typing.get_origin(member) or member
        if origin in _CONTAINERS or origin in (list, tuple, dict):
            if isinstance(value, origin) and not isinstance(value, str):
                return True
        elif origin is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif origin is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif origin not in _SCALARS or isinstance(value, origin):
            return True
    return False


def _words(kind: Any) -> str:
    words = []
    for member in _members(kind):
        origin = typing.get_origin(member) or member
        words.append(_SCALARS.get(origin) or _CONTAINERS.get(origin) or origin.__name__)
    return " or ".join(dict.fromkeys(words))
