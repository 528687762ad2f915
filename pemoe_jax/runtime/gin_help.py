"""Describes the macros of gin files for `--help`.

A macro's default is read from the gin file that sets it, and its description from the docstring of
the parameter that it is bound to. Modules are parsed and not imported, so that `--help` answers at
once.
"""

import ast
import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
GIN_DIR = PACKAGE / "gin"

_REQUIRED = "%gin.REQUIRED"
_WIDTH, _INDENT = 100, 34  # columns of the help, and of the first column with the macros


@dataclasses.dataclass
class Macro:
    """A macro of gin files.

    Attributes:
      name: e.g. BATCH_SIZE.
      default: its value as gin text; '%gin.REQUIRED' if the user must set it.
      description: the entry of its parameter in a docstring, else the comment after the default.
    """

    name: str
    default: str
    description: str = ""


def describe_macros(texts: Iterable[str]) -> str:
    """Returns one or more lines for each macro of gin texts, the required ones first.

    Args:
      texts: gin texts, or names of files in the package's `gin/`. Later values replace earlier
        ones, as in gin.
    """
    lines = []
    for macro in sorted(read_macros(texts), key=lambda macro: macro.default != _REQUIRED):
        default = "(required)" if macro.default == _REQUIRED else f"= {macro.default}"
        head = f"  {macro.name} {default}"
        body = textwrap.wrap(macro.description, _WIDTH - _INDENT) or [""]
        if len(head) >= _INDENT:  # a long head has its own line, as in argparse
            lines.append(head)
            head = ""
        lines.append(f"{head:<{_INDENT}}{body[0]}".rstrip())
        lines += [" " * _INDENT + line for line in body[1:]]
    return "\n".join(lines)


def read_macros(texts: Iterable[str]) -> list[Macro]:
    """Returns the macros that gin texts both set and read; see `describe_macros`."""
    macros: dict[str, Macro] = {}  # those that are set
    # (function, its parameter) -> macro, or "" for another value. As in gin, a later one counts.
    bindings: dict[tuple[str, str], str] = {}
    modules: dict[str, str] = {}  # name in gin -> full name
    selector = ""  # the last 'module.function:', whose parameters the next lines bind
    # Only the forms of lines that this package's gin files use are recognized.
    for line in (line for text in texts for line in _lines(text)):
        if match := re.match(r"from (\S+) import (\w+)", line):  # an import
            modules[match[2]] = f"{match[1]}.{match[2]}"
        # A macro: NAME = value  # comment
        elif match := re.match(r"([A-Z][A-Z0-9_]*) = (.*?)(?:\s+# (.*))?$", line):
            macro = macros.setdefault(match[1], Macro(match[1], ""))
            macro.default, macro.description = match[2], match[3] or macro.description
        elif match := re.match(r"([\w./]+):$", line):  # module.function:
            selector = match[1]
        # A binding: 'module.function.parameter = value', or '  parameter = value' after `selector`.
        elif match := re.match(r"(?:  |([\w./]+)\.)(\w+) = (?:%([A-Z][A-Z0-9_]*)\b)?", line):
            bindings[match[1] or selector, match[2]] = match[3] or ""
    descriptions: dict[str, str] = {}  # of the macros that are read
    for (function, parameter), name in bindings.items():
        if not name:
            continue
        alias, _, attribute = function.rpartition("/")[2].rpartition(".")
        documented = _documented(modules.get(alias, "")).get(attribute, {})
        names = {p: macro for (f, p), macro in bindings.items() if f == function and macro}
        text = _write_for_users(documented.get(parameter, ""), names)
        # The first binding with a description describes the macro.
        descriptions[name] = descriptions.get(name) or text
    for name, macro in macros.items():
        macro.description = descriptions.get(name) or macro.description
    return [macro for macro in macros.values() if macro.name in descriptions]


def _write_for_users(description: str, macros: Mapping[str, str]) -> str:
    """Replaces names of code in a parameter's description, which users of gin files do not know.

    Args:
      description: the entry of a docstring. References such as "; see `module.name`" are left out.
      macros: parameter of the same function -> the macro that it is bound to, its name for users.
    """
    text = re.sub(r"[;,]? see `\w+(\.\w+)+`| \(`\w+(\.\w+)+`\)", "", description)
    # Without backquotes or an underscore, the name may be a common word, such as `group`.
    return re.sub(r"`(\w+)`|\b\w+_\w+\b", lambda m: macros.get(m[1] or m[0], m[0]), text)


def find_macro_owners(name: str) -> list[str]:
    """Returns the package's gin files that set a macro, e.g. ['methods/mov.gin'].

    If a folder has more than three, the files of a family are listed as one ('methods/flan_*.gin');
    if more than three remain, the folder stands for its files ('a file of runs/'). Files for T5X
    are listed only if no others set the macro. Experiments are never listed: they only combine the
    macros of other files.
    """
    folders = [["methods", "models", "routing", "runs"], ["runs_t5x"]]
    for group in folders:
        owners: list[str] = []
        for folder in group:
            paths = sorted((GIN_DIR / folder).glob("*.gin"))
            files = [f"{folder}/{path.name}" for path in paths]
            files = [
                file
                for file in files
                if any(line.startswith(f"{name} = ") for line in _lines(file))
            ]
            if len(files) > 3:  # flan_ec.gin, flan_st.gin, … -> flan_*.gin
                files = sorted({re.sub(r"_\w+\.gin", "_*.gin", file) for file in files})
            owners += files if len(files) <= 3 else [f"a file of {folder}/"]
        if owners:
            return owners
    return []


def _lines(text: str) -> Iterable[str]:
    """Yields the lines of a gin text or a named file, with included files in place of includes."""
    if "\n" not in text:
        text = (GIN_DIR / text).read_text(encoding="utf-8")
    for line in text.splitlines():
        match = re.match(r"include '(.*)'", line)
        if match is None:
            yield line
        elif (GIN_DIR / match[1]).is_file():  # T5X's own files are not in the package
            yield from _lines(match[1])


@functools.cache
def _documented(module: str) -> dict[str, dict[str, str]]:
    """Returns {function or class: {parameter: description}} of a module of this package."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not module.startswith("pemoe_jax.") or not path.is_file():
        return {}
    return {
        node.name: _parameters(ast.get_docstring(node) or "")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def _parameters(docstring: str) -> dict[str, str]:
    """Returns the entries of a docstring's section `Args:` or `Attributes:`."""
    section = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    # An entry begins at an indentation of two spaces; its further lines have four.
    entries = re.split(r"^  (?=[\w*])", section[1], flags=re.MULTILINE)[1:]
    return {
        name.strip("*"): " ".join(text.split())
        for names, _, text in (entry.partition(": ") for entry in entries)
        for name in names.split(", ")
    }
