"""Reads files of prompt templates (promptsource's templates.yaml), safely for untrusted files.

A file `<dataset>[/<subset>]/templates.yaml` has objects tagged `!Template` under the key
`templates`. Their fields `name`, `jinja` and `answer_choices` are read, and the others are ignored
(the roles of P3's tasks are in `tasks.csv`). YAML tags other than `!Template` and
`!TemplateMetadata` are errors.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.tasks.p3.templates import Template

if TYPE_CHECKING:
    import yaml

_MAX_YAML_DEPTH = 50  # a file of promptsource has 5
_MAX_YAML_NODES = 1_000_000


def read_templates(path: pathlib.Path) -> dict[str, Template]:
    """Reads the templates of a file.

    Returns:
      The templates by name.

    Raises:
      InputError: the file does not exist, or is not YAML of templates.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _check_yaml_size(path, text)
        content = yaml.load(text, Loader=_make_loader())  # a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or first_line(error)
        raise InputError(f"{path}{line}: not YAML of templates: {problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML of templates: {first_line(error)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except InputError:
        raise
    except Exception as error:  # PyYAML's constructors raise any type: KeyError for !!bool abc
        problem = f"{type(error).__name__}: {first_line(error):.200}"
        raise InputError(f"{path}: not YAML of templates: {problem}") from None
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected an object with 'templates', an object of !Template")
    templates: dict[str, Template] = {}
    for key, fields in entries.items():
        template = _make_template(f"{path}: template {key!r:.80}", fields)
        if template.name in templates:
            raise InputError(f"{path}: two templates are named {template.name!r:.80}")
        templates[template.name] = template
    return templates


def _check_yaml_size(path: pathlib.Path, text: str) -> None:
    """Raises InputError for YAML that is nested too deeply or grows too much.

    libyaml builds nodes recursively in C, so 100,000 brackets overflow the stack and end the
    process. Aliases of aliases (`b: [*a, *a]`, `c: [*b, *b]`, …) take exponential time if they are
    merged or printed.
    """
    import yaml

    # Events come without recursion, and an alias is one event, whatever the size of its value.
    sizes: dict[str, int] = {}  # anchor -> number of nodes, including those of its aliases
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and number of nodes before it
    size = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            size += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, size))
            size += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size - before
        elif isinstance(event, yaml.ScalarEvent):
            size += 1
        if len(open_nodes) > _MAX_YAML_DEPTH or size > _MAX_YAML_NODES:
            line = event.start_mark.line + 1
            raise InputError(
                f"{path}:{line}: not YAML of templates: expected at most {_MAX_YAML_DEPTH} nested"
                f" objects and {_MAX_YAML_NODES:,} values, with those of aliases"
            )


def _make_template(where: str, fields: object) -> Template:
    """Returns the template of an entry; a wrong field raises an InputError that names `where`."""
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object, got {fields!r:.40}")
    for name, types in (("name", str), ("jinja", str), ("answer_choices", str | None)):
        if not isinstance(fields.get(name), types):
            raise InputError(f"{where}: {name!r} must be a string, got {fields.get(name)!r:.40}")
    return Template(fields["name"], fields["jinja"], fields.get("answer_choices"))


@functools.cache
def _make_loader() -> type[yaml.SafeLoader]:
    """Returns a safe loader of YAML that knows the tags of templates and refuses repeated keys."""
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # not every build has libyaml

    def construct_mapping(
        loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        # PyYAML checks this too, but only in its own method, after the pairs are read below.
        if not isinstance(node, yaml.MappingNode):
            problem = f"expected an object, got a {node.id}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        # Only the mapping's own keys must differ: a key may override one that `<<` merges.
        key_nodes = [key for key, _ in node.value if key.value != "<<"]
        mapping = base.construct_mapping(loader, node, deep=deep)
        seen = set()
        for key_node in key_nodes:  # PyYAML would keep the last of equal keys
            key = loader.construct_object(key_node)
            if key in seen:
                problem = f"the key {key!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return mapping

    attributes = {"construct_mapping": construct_mapping}
    loader: type[yaml.SafeLoader] = type("TemplateLoader", (base,), attributes)
    for tag in ("!Template", "!TemplateMetadata"):
        loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    return loader


def find_templates(folder: pathlib.Path) -> dict[tuple[str, str], pathlib.Path]:
    """Lists `<dataset>[/<subset>]/templates.yaml` by (dataset, subset or '')."""
    files = {}
    for path in sorted(folder.glob("*/templates.yaml")):
        files[path.parent.name, ""] = path
    for path in sorted(folder.glob("*/*/templates.yaml")):
        files[path.parent.parent.name, path.parent.name] = path
    return {key: path for key, path in files.items() if not key[0].startswith(".")}
