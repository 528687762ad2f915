"""A reader of promptsource's prompt templates in YAML, safe on files from elsewhere.

A file `<dataset>[/<subset>]/templates.yaml` has under `templates` objects tagged `!Template`, with
`name`, `jinja` and `answer_choices`; the rest is ignored (the roles of P3's tasks are in
`tasks.csv`). A template is applied to an example as promptsource did when P3 was generated:

- `jinja` is rendered with the example's fields and split at `|||` into input and target, both
  stripped. `answer_choices` is a template too, split at `|||` into choices, each stripped, which
  `jinja` sees as the list `answer_choices`;
- `|||` in an example's own text does not split;
- the value of `{{ }}` becomes a string of at most 2048 characters, cut at the end of a word, with
  `...` (in `jinja` only; of `{{ a + b }}` only `b` is cut, because a filter binds more tightly);
- hyphens in names of fields are underscores;
- an example whose rendering does not have two parts, or has an empty input, has no prompt; an
  empty target is `<NO LABEL>`.

The filter `choice` draws by the example's index, so that an example always has the same prompt.
promptsource itself is not used: it needs Python below 3.10 and a web framework.
Templates run in jinja's sandbox, and YAML tags other than `!Template` and `!TemplateMetadata` are
errors.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import random
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pemoe_jax.core.errors import InputError, first_line

if TYPE_CHECKING:
    import jinja2.sandbox
    import yaml

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

MAX_CHARACTERS = 2048
NO_LABEL = "<NO LABEL>"
_BAR = "|||"
_HIDDEN_BAR = "\ue000bar\ue001"  # private use characters, in place of ||| in an example's own text


class TemplateError(Exception):
    """A template cannot be rendered with an example."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered example."""

    inputs: str
    targets: str
    answer_choices: list[str]  # empty if the template has none


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """A template of a dataset."""

    name: str
    jinja: str
    answer_choices: str | None

    @functools.cached_property
    def fields(self) -> set[str]:
        """Fields of an example that the template reads, with hyphens as underscores.

        Raises:
          TemplateError: jinja cannot parse the template.
        """
        import jinja2
        from jinja2 import meta

        environment = _environment()
        names: set[str] = set()
        try:
            for text in (self.jinja, self.answer_choices or ""):
                names |= meta.find_undeclared_variables(environment.parse(text))
        except jinja2.TemplateError as error:
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from None
        return names - {"answer_choices", *environment.globals}

    def apply(self, example: Mapping[str, object], index: int = 0) -> Prompt | None:
        """Renders an example.

        Args:
          example: fields by name.
          index: the example's index in its split, for templates that draw.

        Returns:
          The prompt; None if the template has none for this example.

        Raises:
          TemplateError: jinja cannot render the template.
        """
        fields = {key.replace("-", "_"): _hide_bars(value) for key, value in example.items()}
        if "answer_choices" in fields:
            raise TemplateError("the example has a field 'answer_choices', which templates use")
        try:
            # one generator serves all threads, so drawing and rendering must not be interleaved
            with _random_lock:
                _random.seed(index)
                choices = None
                if self.answer_choices is not None:
                    rendered = _compile(self.answer_choices).render(**fields)
                    choices = [_show_bars(choice.strip()) for choice in rendered.split(_BAR)]
                # as promptsource does, on the text: "}}" inside a string would be hit as well
                text = self.jinja.replace("}}", f" | string | truncate({MAX_CHARACTERS}) }}}}")
                rendered = _compile(text).render(**fields, answer_choices=choices)
        except Exception as error:  # jinja's, or whatever an expression in it does to the example
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from None
        parts = [_show_bars(part).strip() for part in rendered.split(_BAR)]
        if len(parts) != 2 or not parts[0]:
            return None
        return Prompt(parts[0], parts[1] or NO_LABEL, choices or [])


def _hide_bars(value: object) -> object:
    return value.replace(_BAR, _HIDDEN_BAR) if isinstance(value, str) else value


def _show_bars(text: str) -> str:
    return text.replace(_HIDDEN_BAR, _BAR)


# --- filters and globals of templates

_random = random.Random()
_random_lock = threading.Lock()


def _choice(context: object, choices: Sequence[T]) -> T:
    del context  # a filter that takes it is not folded when jinja compiles, but draws each time
    return _random.choice(list(choices))


def _most_frequent(items: Iterable[H]) -> list[H] | None:
    """Returns the most frequent items, in the order of their first occurrence."""
    counts = collections.Counter(items)
    return [item for item in counts if counts[item] == max(counts.values())] or None


def _highlight(text: str) -> str:
    return f"<span style='color: #F08080'>{text}</span>"


@functools.cache
def _environment() -> jinja2.sandbox.SandboxedEnvironment:
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
def _compile(text: str) -> jinja2.Template:
    return _environment().from_string(text)


# --- reading YAML


def read_templates(path: pathlib.Path) -> dict[str, Template]:
    """Reads the templates of a file.

    Returns:
      The templates by name.

    Raises:
      InputError: the file is not YAML of templates.
    """
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())  # a SafeLoader
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
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected an object with 'templates', an object of !Template")
    templates: dict[str, Template] = {}
    for key, fields in entries.items():
        template = _template(f"{path}: template {key!r}", fields)
        if template.name in templates:
            raise InputError(f"{path}: two templates are named {template.name!r}")
        templates[template.name] = template
    return templates


def _template(where: str, fields: object) -> Template:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object, got {fields!r:.40}")
    for name, types in (("name", str), ("jinja", str), ("answer_choices", str | None)):
        if not isinstance(fields.get(name), types):
            raise InputError(f"{where}: {name!r} must be a string, got {fields.get(name)!r:.40}")
    return Template(fields["name"], fields["jinja"], fields.get("answer_choices"))


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # not every build has libyaml
    loader: type[yaml.SafeLoader] = type("TemplateLoader", (base,), {})
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
