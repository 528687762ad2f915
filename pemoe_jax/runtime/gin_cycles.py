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

    gin would call the function to call the function, until Python's stack is full. References
    without parentheses count too: the function that has them calls them.
    """
    finished: set[tuple[str, str]] = set()
    # From the commands (train.train) on, the last setting of a cycle is the one that leads back.
    for node in sorted(bindings, key=lambda node: len({*node[1].split(".")[-2:]})):
        if node not in finished:
            _visit(node, {}, finished, bindings)


def _visit(
    node: tuple[str, str],
    path: dict[tuple[str, str], str],
    finished: set[tuple[str, str]],
    bindings: Bindings,
) -> None:
    """Follows the references of a function's settings, depth first.

    Args:
      node: the scope that the function is called in, and the function.
      path: the functions before this one -> their setting that leads here.
      finished: functions that lead to no cycle; this one is added.
      bindings: those of gin.
    """
    import gin

    for name, value in _settings(*node, bindings).items():
        path[node] = name
        for reference in gin.config.iterate_references([value]):
            # Without a scope of its own, a function is called in that of its caller.
            target = "/".join(reference.scopes) or node[0], reference.configurable.selector
            if target in path:
                cycle = [*path][[*path].index(target) :]
                # Users set macros; the others are in gin files.
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
    # Settings of an inner scope replace those of an outer one.
    for outer, bound in sorted({key for key in bindings if key[1] == selector}):
        if not outer or f"{scope}/".startswith(f"{outer}/"):
            for parameter, value in bindings[outer, bound].items():
                values[parameter] = setting_name(outer, selector, parameter), value
    return dict(values.values())
