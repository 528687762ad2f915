"""Prompt templates in promptsource's YAML form: a small reader of our own, safe on files of others.

A file `<dataset>[/<subset>]/templates.yaml` holds under `templates` objects tagged `!Template`,
with `name`, `jinja`, `answer_choices` and `metadata` (`!TemplateMetadata`). What it does to an
example is what promptsource does, as T0 used it when P3 was made:

- `jinja` is rendered with the example's fields, and cut at `|||` into input and target; both are
  stripped. `answer_choices` is a template too, cut at `|||` into choices, each stripped, which
  `jinja` sees as the list `answer_choices`;
- `|||` in an example's own text does not cut;
- what stands in `{{ }}` is made a string and cut at 2048 characters, at a word's end, with `...`
  (in `jinja` only, and only its last term, as `| truncate` behind it binds);
- hyphens in names of fields are underscores;
- an example whose rendering is not two parts, or has an empty input, is left out; an empty target
  is `<NO LABEL>`.

The filter `choice` draws by the example's number, so that the same example gives the same prompt
again. Templates run in jinja's sandbox, and YAML tags other than the two are errors.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import random
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pemoe_jax.core.errors import InputError, first_line

MAX_CHARACTERS = 2048
NO_LABEL = "<NO LABEL>"
_BAR = "|||"
_HIDDEN_BAR = "\ue000bar\ue001"  # of a private use area: stands for ||| in an example's own text


class TemplateError(Exception):
    """A template cannot be rendered with an example."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a template makes of an example."""

    inputs: str
    targets: str
    answer_choices: list[str]  # empty where the template has none


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """A template of a data set."""

    name: str
    jinja: str
    answer_choices: str | None
    original_task: bool
    metrics: tuple[str, ...]

    @functools.cached_property
    def fields(self) -> set[str]:
        """The fields of an example that it reads, with hyphens as underscores.

        Raises:
          TemplateError: jinja cannot read it.
        """
        import jinja2
        from jinja2 import meta

        environment = _environment()
        found: set[str] = set()
        try:
            for text in (self.jinja, self.answer_choices or ""):
                found |= meta.find_undeclared_variables(environment.parse(text))
        except jinja2.TemplateError as error:
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from None
        return found - {"answer_choices", *environment.globals}

    def apply(self, example: Mapping[str, Any], number: int = 0) -> Prompt | None:
        """The prompt of an example, None where there is none for it.

        Args:
          example: fields by name.
          number: of the example in its split, for templates that draw.

        Raises:
          TemplateError: jinja cannot render it.
        """
        import jinja2

        fields = {key.replace("-", "_"): _hide_bars(value) for key, value in example.items()}
        if "answer_choices" in fields:
            raise TemplateError("the example has a field 'answer_choices', which templates use")
        try:
            with _draw_lock:
                _draw.seed(number)
                choices = None
                if self.answer_choices is not None:
                    rendered = _compiled(self.answer_choices).render(**fields)
                    choices = [_show_bars(choice.strip()) for choice in rendered.split(_BAR)]
                text = self.jinja.replace("}}", f" | string | truncate({MAX_CHARACTERS}) }}}}")
                rendered = _compiled(text).render(**fields, answer_choices=choices)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from None
        except Exception as error:  # whatever an expression in it does with the example
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from None
        parts = [_show_bars(part).strip() for part in rendered.split(_BAR)]
        if len(parts) != 2 or not parts[0]:
            return None
        return Prompt(parts[0], parts[1] or NO_LABEL, choices or [])


def _hide_bars(value: Any) -> Any:
    return value.replace(_BAR, _HIDDEN_BAR) if isinstance(value, str) else value


def _show_bars(text: str) -> str:
    return text.replace(_HIDDEN_BAR, _BAR)


# --- what templates may call

_draw = random.Random()
_draw_lock = threading.Lock()


def _choice(context: Any, choices: Sequence[Any]) -> Any:
    del context  # asked for so that jinja draws when it renders, not when it compiles
    return _draw.choice(list(choices))


def _most_frequent(items: Iterable[Any]) -> list[Any] | None:
    """The items that are most frequent, in the order in which they come first."""
    counts = collections.Counter(items)
    if not counts:
        return None
    return [item for item, count in counts.items() if count == max(counts.values())]


def _highlight(text: str) -> str:
    return f"<span style='color: #F08080'>{text}</span>"


@functools.cache
def _environment() -> Any:
    import jinja2
    from jinja2 import sandbox

    environment = sandbox.SandboxedEnvironment()
    environment.globals.update(zip=zip, enumerate=enumerate)
    choice = jinja2.pass_context(_choice)
    environment.filters.update(
        choice=choice, random=choice, most_frequent=_most_frequent, highlight=_highlight
    )
    return environment


@functools.lru_cache(maxsize=4096)
def _compiled(text: str) -> Any:
    return _environment().from_string(text)


# --- reading YAML


def read_templates(path: pathlib.Path) -> dict[str, Template]:
    """The templates of a file by name.

    Raises:
      InputError: it is no YAML of this form.
    """
    import yaml

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())  # a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{path}{line}: not YAML of templates: {problem}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    listed = found.get("templates") if isinstance(found, dict) else None
    if not isinstance(listed, dict):
        raise InputError(f"{path}: expected an object with 'templates', an object of !Template")
    templates: dict[str, Template] = {}
    for key, fields in listed.items():
        template = _template(path, key, fields)
        if template.name in templates:
            raise InputError(f"{path}: two templates are named {template.name!r}")
        templates[template.name] = template
    return templates


def _template(path: pathlib.Path, key: Any, fields: Any) -> Template:
    if not isinstance(fields, dict):
        raise InputError(f"{path}: template {key!r}: expected an object, found {fields!r:.40}")
    for name, types in (("name", str), ("jinja", str), ("answer_choices", str | None)):
        if not isinstance(fields.get(name), types):
            raise InputError(
                f"{path}: template {key!r}: {name!r} must be a string, found"
                f" {fields.get(name)!r:.40}"
            )
    metadata = fields.get("metadata") or {}
    return Template(
        name=fields["name"],
        jinja=fields["jinja"],
        answer_choices=fields.get("answer_choices"),
        original_task=bool(metadata.get("original_task")),
        metrics=tuple(map(str, metadata.get("metrics") or ())),
    )


@functools.cache
def _loader() -> Any:
    import yaml

    safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader: Any = type("TemplateLoader", (safe,), {})
    for tag in ("!Template", "!TemplateMetadata"):
        loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    return loader


def find_templates(folder: pathlib.Path) -> dict[tuple[str, str], pathlib.Path]:
    """(data set, subset or '') -> its templates.yaml, of the folder `<dataset>[/<subset>]`."""
    found = {}
    for path in sorted(folder.glob("*/templates.yaml")):
        found[path.parent.name, ""] = path
    for path in sorted(folder.glob("*/*/templates.yaml")):
        found[path.parent.parent.name, path.parent.name] = path
    return {key: path for key, path in found.items() if not re.match(r"\.", key[0])}
