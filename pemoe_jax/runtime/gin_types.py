"""Checks the literals that gin binds: the types of their parameters, and the ranges of numbers."""

import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.gin_ranges import RANGES

# An annotation: a class, a generic alias, a union. Python has no common type for these.
Type: TypeAlias = Any

_TYPE_NAMES: dict[object, str] = {
    **{int: "an integer", float: "a number", str: "a string"},
    **{bool: "True or False", type(None): "None"},
    **dict.fromkeys((collections.abc.Sequence, list, tuple), "a list"),
    **dict.fromkeys((collections.abc.Mapping, dict), "a dict"),
}
_UNCHECKED = (Any, object, inspect.Parameter.empty)


def check_bindings(optional_macros: Collection[str] = ()) -> None:
    """Checks every literal of the parsed gin configuration.

    Objects and functions are bound by reference, so a literal never fits a parameter of such a
    type. The contents of lists and dicts are not checked.

    Args:
      optional_macros: macros that may be None whatever the type, as no gin file may set them.

    Raises:
      InputError: a value does not fit its parameter, or is out of its range. The message names
        its macro, if it has one.
    """
    import gin

    # gin's public interface maps a name to its value, not a binding to its function.
    bindings, registry = gin.config._CONFIG, gin.config._REGISTRY
    for (_, selector), values in bindings.items():
        if selector == "gin.macro":
            continue
        function = registry[selector].wrapped
        annotations = _parameter_types(function)
        module = getattr(function, "__module__", "").rpartition(".")[2]
        ranges = RANGES.get(f"{module}.{getattr(function, '__name__', '')}", {})
        for parameter, bound in values.items():
            name, value = _resolve_macro(f"{selector}.{parameter}", bound, bindings)
            annotation = annotations.get(parameter, Any)
            is_literal = isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))
            is_optional = value is None and name in optional_macros
            if is_literal and not is_optional and not _matches(value, annotation):
                raise InputError(f"{name} must be {_describe(annotation)}, got {value!r}")
            if parameter in ranges and isinstance(value, (int, float)):
                interval, members = ranges[parameter], _union_members(annotation)
                if value not in interval:
                    expected = interval.describe(is_integer=float not in members)
                    raise InputError(f"{name} must be {expected}, got {value!r}")


def _resolve_macro(
    name: str, value: object, bindings: Mapping[tuple[str, str], Mapping[str, object]]
) -> tuple[str, object]:
    """Follows references to macros -> (name of the last macro, its value)."""
    import gin

    visited: set[str] = set()
    while isinstance(value, gin.config.ConfigurableReference) and str(value)[0] == "%":
        name = str(value)[1:]
        macro = bindings.get((name, "gin.macro"))
        if macro is None:  # gin.REQUIRED or a constant
            break
        if name in visited:
            raise InputError(f"{name} must be a value, got a reference to itself")
        visited.add(name)
        value = macro["value"]
    return name, value


def _parameter_types(function: Callable[..., object]) -> dict[str, Type]:
    """Returns the type of each parameter; `Any` if its annotation cannot be evaluated."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    annotations = {}
    for name, parameter in parameters.items():
        annotations[name] = parameter.annotation
        if isinstance(parameter.annotation, str):
            try:
                names = dict(vars(sys.modules[function.__module__]))
                annotations[name] = eval(parameter.annotation, names)
            except NameError:  # imported under TYPE_CHECKING
                # This package imports only classes so, which gin binds by reference.
                is_ours = function.__module__.startswith("pemoe_jax.")
                annotations[name] = types.FunctionType | None if is_ours else Any
            except (AttributeError, SyntaxError, TypeError):
                annotations[name] = Any
    return annotations


def _union_members(annotation: Type) -> tuple[Type, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    return tuple(type(None) if member is None else member for member in members)


def _matches(value: object, annotation: Type) -> bool:
    for member in _union_members(annotation):
        origin = typing.get_origin(member) or member
        if not isinstance(origin, type) or origin in _UNCHECKED:
            return True
        # isinstance would accept a bool as an int and a string as a sequence.
        if isinstance(value, (bool, str)) or getattr(origin, "_is_protocol", False):
            if origin is type(value):
                return True
        elif isinstance(value, (int, float) if origin is float else origin):
            return True
    return False


def _describe(annotation: Type) -> str:
    origins = [typing.get_origin(member) or member for member in _union_members(annotation)]
    names = [_TYPE_NAMES.get(origin, "a reference (@…)") for origin in origins]
    return " or ".join(dict.fromkeys(names))
