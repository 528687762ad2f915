"""Finds settings that refer to the function that they configure."""

from collections.abc import Mapping
from typing import TypeAlias

from pemoe_jax.core.errors import InputError

# gin's bindings: (scope, function) -> parameter -> value.
Bindings: TypeAlias = Mapping[tuple[str, str], Mapping[str, object]]


def setting_name(scope: str, selector: str, parameter: str) -> str:
    """Returns the name of a macro, or 'scope/module.function.parameter'."""
    if selector == "gin.macro":
        return scope
    return f"{scope}/{selector}.{parameter}".lstrip("/")


def check_cycles(bindings: Bindings) -> None:
    """Raises InputError for a setting that refers to the function that it configures.

    gin would call the function to compute one of its own arguments, and so on until Python's stack
    is full. References without parentheses (@f) count too: the function that receives @f calls it.
    """
    finished: set[tuple[str, str]] = set()
    # The functions of commands come first (train.train: module and function have the same name), so
    # that the path leads from the command to the setting that closes the cycle.
    for node in sorted(bindings, key=lambda node: not _is_command(node[1])):
        if node not in finished:
            _visit(node, {}, finished, bindings)


def _is_command(selector: str) -> bool:
    *_, module, function = ["", *selector.split(".")]
    return module == function


def _visit(
    node: tuple[str, str],
    path: dict[tuple[str, str], str],
    finished: set[tuple[str, str]],
    bindings: Bindings,
) -> None:
    """Follows the references of a function's settings, depth first.

    Args:
      node: the scope that the function is called in, and the function.
      path: the functions that led here, each with the setting by which it refers to the next.
      finished: functions that lead to no cycle; this one is added.
      bindings: gin's bindings.
    """
    import gin

    for name, value in _settings(*node, bindings).items():
        path[node] = name
        for reference in gin.config.iterate_references([value]):
            # A reference without a scope is called in the scope of its caller.
            target = "/".join(reference.scopes) or node[0], reference.configurable.selector
            if target in path:
                cycle = [*path][[*path].index(target) :]
                # Name a macro if there is one, as users set macros rather than parameters.
                macros = [scope for scope, selector in cycle if selector == "gin.macro"]
                raise InputError(
                    f"{[name, *macros][-1]} must be a value, got a reference to itself:"
                    f" {' → '.join(path[step] for step in cycle)}"
                )
            if target not in finished:
                _visit(target, path, finished, bindings)
    path.pop(node, None)
    finished.add(node)


def _settings(scope: str, selector: str, bindings: Bindings) -> dict[str, object]:
    """Returns {setting: value} of a function that is called in a scope."""
    values: dict[str, tuple[str, object]] = {}
    # Outer scopes come first, so that the settings of an inner scope replace theirs.
    for outer in sorted(outer for outer, function in bindings if function == selector):
        if not outer or f"{scope}/".startswith(f"{outer}/"):
            for parameter, value in bindings[outer, selector].items():
                values[parameter] = setting_name(outer, selector, parameter), value
    return dict(values.values())
