"""Checks the values that gin binds: the encoding of texts, types, and the ranges of numbers."""

import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.gin_cycles import Bindings, setting_name
from pemoe_jax.runtime.gin_ranges import RANGES

if TYPE_CHECKING:
    from gin.config import ConfigurableReference

# An annotation: a class, a generic alias, a union. Python has no common type for these.
Type: TypeAlias = Any

# Names of types in messages.
_TYPE_NAMES: dict[object, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
    **dict.fromkeys((collections.abc.Sequence, collections.abc.Collection, list, tuple), "a list"),
    **dict.fromkeys((collections.abc.Mapping, dict), "a dict"),
}
_ITEM_NAMES: dict[object, str] = {int: " of integers", float: " of numbers", str: " of strings"}
# Annotations that any value fits.
_UNCHECKED = (Any, object, inspect.Parameter.empty)


def check_texts(bindings: Bindings) -> None:
    """Raises InputError for a text without UTF-8 form, or a reference that gin cannot print."""
    settings = [
        (setting_name(scope, selector, parameter), value, leaf)
        for (scope, selector), values in bindings.items()
        for parameter, value in values.items()
        for leaf in _leaves(value)
    ]
    for name, value, leaf in settings:
        if isinstance(leaf, str):
            try:
                leaf.encode()
            except UnicodeEncodeError:
                raise InputError(f"{name} must be text in UTF-8, got {value!r}") from None
        # %MACRO is a call in the macro's scope.
        is_macro = _is_reference(leaf) and leaf.configurable.selector == "gin.macro"
        if is_macro and not (leaf.evaluate and leaf.scopes):
            raise InputError(f"{name} must be a value or %MACRO, got @gin.macro")


def check_bindings(optional_macros: Collection[str] = ()) -> None:
    """Checks every value of the parsed gin configuration.

    For a reference to a function, the function's return annotation is checked; for a reference to a
    class, the class.

    Args:
      optional_macros: macros that may be None whatever their type, because gin files need not set
        them.

    Raises:
      InputError: a value does not fit its parameter, or is out of its range. The message names
        its macro, if it has one.
    """
    import gin

    # gin's public interface can neither list the bindings nor return the function of one.
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
            is_optional = value is None and name in optional_macros
            if not is_optional and not _matches(value, annotation):
                raise InputError(f"{name} must be {_describe(annotation)}, got {value!r}")
            if parameter in ranges and isinstance(value, (int, float)):
                interval, members = ranges[parameter], _union_members(annotation)
                if value not in interval:
                    expected = interval.describe(is_integer=float not in members)
                    raise InputError(f"{name} must be {expected}, got {value!r}")


def _leaves(value: object) -> Iterator[Any]:
    """Yields the keys and values in nested lists and dicts, or the value if it is neither."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_reference(value: object) -> "typing.TypeGuard[ConfigurableReference]":
    import gin

    return isinstance(value, gin.config.ConfigurableReference)


def _resolve_macro(name: str, value: object, bindings: Bindings) -> tuple[str, object]:
    """Follows references to macros -> (name of the last macro, its value).

    Args:
      name: name of the parameter, returned if its value is no macro.
      value: value of the parameter.
      bindings: gin's bindings.
    """
    visited: set[str] = set()
    while _is_reference(value) and str(value)[0] == "%":
        name = str(value)[1:]
        macro = bindings.get((name, "gin.macro"))
        if macro is None or name in visited:  # gin.REQUIRED, a constant, or a cycle
            break
        visited.add(name)
        value = macro["value"]
    return name, value


def _parameter_types(function: Callable[..., object]) -> dict[str, Type]:
    """Returns the type of each parameter; `Any` if its annotation cannot be evaluated."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {
        name: _evaluate(parameter.annotation, function) for name, parameter in parameters.items()
    }


def _returned_type(function: Callable[..., object]) -> Type:
    """Returns the type that a call returns: a class itself, or a function's return annotation.

    `Any` if the annotation cannot be evaluated.
    """
    if inspect.isclass(function):
        return function
    try:
        return _evaluate(inspect.signature(function).return_annotation, function)
    except (TypeError, ValueError):
        return Any


def _evaluate(annotation: Type, function: Callable[..., object]) -> Type:
    """Evaluates an annotation, if it is a string, with the names of its function's module."""
    if not isinstance(annotation, str):
        return annotation
    # Modules that import a module of `core` only under TYPE_CHECKING lack its name at runtime.
    core = {
        name.rpartition(".")[2]: module
        for name, module in [*sys.modules.items()]
        if name.startswith("pemoe_jax.core.") and name.count(".") == 2
    }
    try:
        return eval(annotation, {**core, **vars(sys.modules[function.__module__])})
    except (NameError, AttributeError, SyntaxError, TypeError, KeyError):
        return Any


def _union_members(annotation: Type) -> tuple[Type, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    return tuple(type(None) if member is None else member for member in members)


def _matches(value: object, annotation: Type) -> bool:
    """Whether a value, or the value that a reference stands for, fits an annotation."""
    if not _is_reference(value):
        return any(_matches_member(value, member) for member in _union_members(annotation))
    function = value.configurable.wrapped
    returned = _returned_type(function)
    if value.evaluate:  # @function(): the value is what the call returns
        return _may_fit(returned, annotation)
    # @function: the value is the function itself
    for member in _union_members(annotation):
        arguments = typing.get_args(member)
        is_callable = typing.get_origin(member) is collections.abc.Callable
        if is_callable and arguments:
            if _may_fit(returned, arguments[-1]):
                return True
        elif _may_fit(type(function), member):
            return True
    return False


def _matches_member(value: object, member: Type) -> bool:
    """Whether a value that is no reference fits a type that is no union."""
    origin = typing.get_origin(member) or member
    if not isinstance(origin, type) or origin in _UNCHECKED:
        return True
    # isinstance would accept a bool as an int and a string as a sequence.
    if isinstance(value, (bool, str)) or _is_protocol(origin):
        return origin is type(value)
    if not isinstance(value, (int, float) if origin is float else origin):
        return False
    items = _item_types(member)
    if isinstance(value, dict) and len(items) == 2:
        return all(_matches(k, items[0]) and _matches(v, items[1]) for k, v in value.items())
    if isinstance(value, (list, tuple)) and len(items) == 1:
        return all(_matches(item, items[0]) for item in value)
    return True


def _may_fit(returned: Type, annotation: Type) -> bool:
    """Whether a value whose type is known to be `returned` may fit `annotation`.

    The value itself is unknown, so it may fit if `returned` is more general than the annotation, or
    if one of the two is not a class. None, the type of functions without a value, never fits.
    """
    if returned is None:
        return annotation in _UNCHECKED
    return any(
        _may_fit_member(typing.get_origin(kind) or kind, typing.get_origin(member) or member)
        for kind in _union_members(returned)
        for member in _union_members(annotation)
    )


def _may_fit_member(kind: Type, member: Type) -> bool:
    """Whether a value of the type `kind` may fit `member`; neither is a union."""
    for cls in (kind, member):
        if not isinstance(cls, type) or cls in _UNCHECKED or _is_protocol(cls):
            return True
    # issubclass would accept a bool as an int and a string as a sequence.
    if kind in (bool, str):
        return kind is member
    classes = (int, float) if member is float else member
    return issubclass(kind, classes) or issubclass(member, kind)


def _item_types(member: Type) -> list[Type]:
    """Returns the types of a list's items, [T], or of a dict's keys and values, [K, V]."""
    return [item for item in typing.get_args(member) if item is not Ellipsis]


def _is_protocol(origin: type) -> bool:
    return bool(getattr(origin, "_is_protocol", False))


def _describe(annotation: Type) -> str:
    """Returns what a parameter must be, for messages: 'an integer or None'."""
    return " or ".join(dict.fromkeys(map(_describe_member, _union_members(annotation))))


def _describe_member(member: Type) -> str:
    origin, items = typing.get_origin(member) or member, _item_types(member)
    if origin in _TYPE_NAMES:
        return _TYPE_NAMES[origin] + (_ITEM_NAMES.get(items[-1], "") if items else "")
    if origin is collections.abc.Callable:
        returned = items[-1] if items else Any
        suffix = f" that returns {returned.__name__}" if inspect.isclass(returned) else ""
        return f"a function or class (@… without parentheses){suffix}"
    if getattr(origin, "__module__", "").startswith("pemoe_jax."):
        return f"@{origin.__module__.rpartition('.')[2]}.{origin.__name__}()"
    return "a reference (@…)"
