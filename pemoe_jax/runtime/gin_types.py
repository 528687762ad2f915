"""What gin binds, held against the types of the parameters that it is bound to."""

import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

from pemoe_jax.core.errors import InputError

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
    collections.abc.Sequence: "a list",
    collections.abc.Mapping: "a dict",
    list: "a list",
    tuple: "a list",
    dict: "a dict",
}
_ANY = (Any, object, inspect.Parameter.empty)


def check_bindings(unset: Collection[str] = ()) -> None:
    """Looks at every value of the parsed configuration that is a literal.

    A literal is never an object or a function, which are given by reference. What is in lists and
    dicts is not looked at.

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

    seen: set[str] = set()
    while isinstance(value, gin.config.ConfigurableReference) and str(value)[0] == "%":
        name = str(value)[1:]
        macro = bound.get((name, "gin.macro"))
        if macro is None:  # gin.REQUIRED, or a constant
            break
        if name in seen:
            raise InputError(f"{name}: expected a value, found itself")
        seen.add(name)
        value = macro["value"]
    return name, value


def _is_literal(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))


def _kinds(function: Any) -> dict[str, Any]:
    """Parameter -> its type, where that can be known.

    Ours of modules that are loaded later are all of objects and functions: as good as a function's.
    """
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
                if not function.__module__.startswith("pemoe_jax."):
                    continue
                kind = types.FunctionType | None
            except (AttributeError, SyntaxError, TypeError):
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
        if not isinstance(origin, type) or origin in _ANY:
            return True
        if isinstance(value, (bool, str)) or getattr(origin, "_is_protocol", False):
            fits = origin is type(value)  # neither a number nor a list of letters
        else:
            fits = isinstance(value, (int, float) if origin is float else origin)
        if fits:
            return True
    return False


def _words(kind: Any) -> str:
    origins = [typing.get_origin(member) or member for member in _members(kind)]
    return " or ".join(dict.fromkeys(_WORDS.get(origin, "a reference (@…)") for origin in origins))
