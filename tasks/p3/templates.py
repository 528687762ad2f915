"""Applies promptsource's prompt templates to examples, safely for untrusted templates.

A template is applied to an example as promptsource did when P3 was generated:

- `jinja` is rendered with the example's fields and split at `|||` into input and target, both
  stripped. `answer_choices` is a template too. It is split at `|||` into choices, each stripped,
  and `jinja` sees them as the list `answer_choices`;
- `|||` in a text of the example does not split (in a list of texts it does);
- the value of `{{ }}` becomes a string. In `jinja`, a value of more than 2,053 characters is cut to
  at most 2,048, at the end of a word, with `...`. In `{{ a + b }}` only `b` is cut, because a
  filter binds more tightly than `+`;
- hyphens in names of fields become underscores;
- an example whose rendering does not have two parts, or has an empty input, has no prompt. An
  empty target becomes `<NO LABEL>`.

Unlike promptsource, this module refuses an example

- if the template prints, measures or compares a field that the example does not have, or that one
  of its objects does not have (`x.y`, `x['y']`, `x.get('y')`). promptsource prints nothing;
- if the template compares a value with constants of another type, such as '0' with 0. promptsource
  takes the branch `else`;
- if its label is -1, '' or None, as in splits whose answers are not public. In promptsource,
  `answer_choices[-1]` is the last choice;
- if its target or a choice prints None.

The filter `choice` draws by the example's index, so that an example always has the same prompt.
promptsource itself is not used: it needs Python below 3.10 and a web framework.

Templates run in jinja's sandbox on a copy of the example, with limits (`template_limits`) and
without the filters and methods whose output may be of any size. `_compile` inserts the checks above
into the syntax tree of a template.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import random
import re
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pemoe_jax.core.errors import first_line
from pemoe_jax.tasks.p3 import template_limits
from pemoe_jax.tasks.p3.template_limits import TemplateError

if TYPE_CHECKING:
    import jinja2.sandbox

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

MAX_CHARACTERS = 2048  # promptsource's limit of a printed value
NO_LABEL = "<NO LABEL>"
_BAR = "|||"
# Marks of private use characters, which no text has: they stand for ||| in a text of the example,
# and for a None that a template prints.
_HIDDEN_BAR = "\ue000bar\ue001"
_HIDDEN_NULL = "\ue000null\ue001"
_LABEL = re.compile("(^|_)labels?($|_)")  # names of fields that hold labels


class UnlabeledError(TemplateError):
    """An example has no label."""


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
        from jinja2 import meta, nodes

        environment = _environment()
        names: set[str] = set()
        try:
            for text in (self.jinja, self.answer_choices or ""):
                tree = environment.parse(text)
                # jinja counts x as undeclared in `{% if … %}{% set x = … %}{% endif %}{{x}}`, since
                # only one branch declares it. But x is no field of the example.
                declared = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
                names |= meta.find_undeclared_variables(tree) - declared
        except Exception as error:  # also RecursionError, for thousands of parentheses
            if not isinstance(error, jinja2.TemplateError | RecursionError | ValueError):
                raise
            raise TemplateError(f"{type(error).__name__}: {first_line(error):.300}") from None
        return names - {"answer_choices", *environment.globals}

    @functools.cached_property
    def _label_fields(self) -> list[str]:
        return sorted(filter(_LABEL.search, self.fields))

    def apply(self, example: Mapping[str, object], index: int = 0) -> Prompt | None:
        """Renders an example.

        Args:
          example: fields by name.
          index: the example's index in its split, for templates that draw.

        Returns:
          The prompt; None if the template has none for this example.

        Raises:
          UnlabeledError: the example has no label.
          TemplateError: jinja cannot render the template.
        """
        # Copied, because a template may change a list (`x.append(y)`) that all templates share.
        copies = {
            key: copy.deepcopy(value) if isinstance(value, list | dict) else value
            for key, value in example.items()
        }
        fields = {key.replace("-", "_"): _hide_bars(value) for key, value in copies.items()}
        if "answer_choices" in fields:
            raise TemplateError("the example has a field 'answer_choices', which templates use")
        for name in self._label_fields:
            if _is_unlabeled(fields.get(name, 0)):
                raise UnlabeledError(f"{name} is {fields[name]!r}")
        try:
            # All threads share the random generator and the budget, so one renders at a time.
            with _random_lock:
                _random.seed(index)
                template_limits.budget.reset()
                choices = None
                if self.answer_choices is not None:
                    rendered = _compile(self.answer_choices).render(**fields)
                    if _HIDDEN_NULL in rendered:
                        raise TemplateError("an answer choice prints None")
                    choices = [_show_bars(choice.strip()) for choice in rendered.split(_BAR)]
                # Text is replaced, as in promptsource: a "}}" in a string literal changes too.
                text = self.jinja.replace("}}", f" | string | truncate({MAX_CHARACTERS}) }}}}")
                rendered = _compile(text).render(**fields, answer_choices=choices)
        except TemplateError:
            raise
        except Exception as error:  # of jinja, or any that an expression of the template raises
            raise TemplateError(f"{type(error).__name__}: {first_line(error):.300}") from None
        # A None in the input is printed, as in promptsource; in the target it is a missing label.
        if _HIDDEN_NULL in rendered.partition(_BAR)[2]:
            raise UnlabeledError("its target prints None")
        rendered = rendered.replace(_HIDDEN_NULL, "None")
        parts = [_show_bars(part).strip() for part in rendered.split(_BAR)]
        if len(parts) != 2 or not parts[0]:
            return None
        return Prompt(parts[0], parts[1] or NO_LABEL, choices or [])


def _hide_bars(value: object) -> object:
    """Returns a field as templates see it: `|||` is replaced by a mark, and bytes are decoded.

    In a list, only bytes are changed, because promptsource leaves texts in lists as they are.
    """
    if isinstance(value, list):
        return [_hide_bars(item) if isinstance(item, bytes) else item for item in value]
    if isinstance(value, bytes):
        # Parquet may hold text as bytes. Other bytes, such as those of an image, stay as they are,
        # and `_finalize` refuses to print them.
        with contextlib.suppress(UnicodeDecodeError):
            value = value.decode()
    return value.replace(_BAR, _HIDDEN_BAR) if isinstance(value, str) else value


def _show_bars(text: str) -> str:
    return text.replace(_HIDDEN_BAR, _BAR)


# --- limits

# Filters of jinja and methods of str whose output may be much larger than their input. They are
# removed: none of promptsource's 2,085 templates uses one.
# (Tuples in the tuple, so that the formatter keeps several names on a line.)
_UNBOUNDED_FILTERS = (
    *("batch", "center", "indent", "pprint", "slice", "sum", "tojson", "urlize", "wordwrap"),
    "xmlattr",
)
_UNBOUNDED_METHODS = ("center", "expandtabs", "ljust", "rjust", "translate", "zfill")


# These replace jinja's filters of the same names: each checks the size of its result first.


def _format(text: object, *args: object, **kwargs: object) -> str:
    from jinja2 import filters

    template_limits.check_format(text, (*args, *kwargs.values()))
    return filters.do_format(str(text), *args, **kwargs)


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    text, old, new = str(_finalize(text)), str(_finalize(old)), str(_finalize(new))
    template_limits.check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(
    environment: jinja2.Environment, items: Any, separator: str = "", attribute: str | None = None
) -> str:
    from jinja2 import filters

    if attribute is not None:
        items = map(filters.make_attrgetter(environment, attribute), items)
    texts, size = [], 0
    for item in items:
        size += template_limits.text_size(item) + len(separator)
        template_limits.check_size(size)
        texts.append(str(item))
    return str(separator).join(texts)


def _concat(items: Sequence[object]) -> str:
    template_limits.check_size(sum(map(template_limits.text_size, items)))
    return "".join(map(str, items))


def _count_step(context: object, value: T) -> T:
    """Counts a step of the budget. `_compile` inserts this filter into loops and macros."""
    del context  # a filter that takes the context is not evaluated once, at compile time
    template_limits.budget.count_step()
    return value


# --- filters and globals of templates

_random = random.Random()
_random_lock = threading.Lock()


def _choice(context: object, choices: Sequence[T]) -> T:
    del context  # a filter that takes the context is not evaluated once, at compile time
    return _random.choice(list(choices))


def _most_frequent(items: Iterable[H]) -> list[H] | None:
    """Returns the most frequent items, in the order of their first occurrence."""
    counts = collections.Counter(items)
    return [item for item in counts if counts[item] == max(counts.values())] or None


def _highlight(text: str) -> str:
    return f"<span style='color: #F08080'>{text}</span>"


def _is_unlabeled(value: object) -> bool:
    # -1 may be an integer, a float or a text.
    return _is_null(value) or value in (-1, "-1", "")


def _is_null(value: object) -> bool:
    # The missing value is None in JSON and NaN in pandas. Only NaN differs from itself.
    return value is None or value != value


def _finalize(value: Any) -> Any:
    """Returns a value as jinja prints it; jinja calls this `finalize` for each printed value.

    Raises:
      TemplateError: the value is a method, bytes, or text beyond the budget.
    """
    import jinja2

    if isinstance(value, jinja2.Undefined):
        return str(value)
    # In x.values and x.items jinja prefers the method of a dict to its item of that name.
    if callable(value):
        raise TemplateError(f"expected a value to print, got the method {value.__name__!r}")
    if isinstance(value, bytes):
        raise TemplateError("expected a value to print, got bytes that are not UTF-8")
    template_limits.budget.count_printed(template_limits.text_size(value))
    return _HIDDEN_NULL if _is_null(value) else value


def _to_int(value: object, default: int | None = None, base: int = 10) -> int:
    """Replaces jinja's filter `int`, which returns 0 for a value that is not an integer.

    Raises:
      UnlabeledError: the value is missing.
      TemplateError: the value is not an integer.
    """
    if default is not None:
        from jinja2 import filters

        return filters.do_int(value, default, base)
    if _is_null(value) or value == "":
        raise UnlabeledError(f"the value of its label is {value!r}")
    try:
        number = int(value, base) if isinstance(value, str) else int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        number = None
    if number is None or (not isinstance(value, str) and number != value):
        raise TemplateError(f"expected an integer, got {value!r}")
    return int(number)


def _check_compared(value: Any, constants: Sequence[object], name: str) -> Any:
    """Checks a value that a template compares with constants, which are all text or all numbers.

    Raises:
      UnlabeledError: the value is a missing label.
      TemplateError: the value has another type than the constants. It would differ from all of
        them, so that the template would print the label of its branch `else`.
    """
    import jinja2

    if isinstance(value, jinja2.Undefined) or value in constants:
        return value
    is_text = isinstance(constants[0], str)
    if _is_unlabeled(value) and (not is_text or _LABEL.search(name)):
        raise UnlabeledError(f"{name} is {value!r}")
    types = str if is_text else int | float
    if not isinstance(value, types) and value is not None:
        raise TemplateError(f"{name} must be {'text' if is_text else 'a number'}, got {value!r}")
    return value


def _check_label_test(value: Any, name: str) -> Any:
    """Checks a label that a template tests for truth.

    Raises:
      UnlabeledError: the label is missing.
      TemplateError: the label is a text, which would always be true.
    """
    import jinja2

    if isinstance(value, jinja2.Undefined):
        return str(value)
    if _is_unlabeled(value):
        raise UnlabeledError(f"{name} is {value!r}")
    if isinstance(value, str):
        raise TemplateError(f"{name} must be true, false or a number, got {value!r}")
    return value


def _get_item(environment: jinja2.Environment, items: object, index: Any) -> Any:
    """Returns `items[index]` for an index that a template computes, usually from a label.

    Raises:
      UnlabeledError: the index of a list is negative or missing.
      TemplateError: the index of a list is not an integer.
    """
    if isinstance(items, list | tuple | str):
        if _is_unlabeled(index) or (isinstance(index, int) and index < 0):
            raise UnlabeledError(f"the index of its label is {index!r}")
        if not isinstance(index, int):
            raise TemplateError(f"the index of a list must be an integer, got {index!r}")
    return environment.getitem(items, index)


@functools.cache
def _environment() -> jinja2.sandbox.SandboxedEnvironment:
    """Returns jinja's sandbox with the limits and filters of this module."""
    import jinja2
    from jinja2 import sandbox

    class MissingField(jinja2.Undefined):
        """A field that an example does not have: any use but a test for truth fails.

        The test `{% if x %}` is how promptsource's templates ask whether a field exists.
        """

        def _read(self, *unused: object) -> Any:
            # An item beyond the end of a list, such as the first of an empty list of answers, is
            # no missing field: it reads as ''.
            if not isinstance(self._undefined_name, int):
                self._fail_with_undefined_error()
            return ""

        __str__ = _read

        def __iter__(self) -> Iterator[object]:
            return iter(self._read())

        def __eq__(self, other: object) -> bool:
            return bool(self._read() == other)

        __hash__ = jinja2.Undefined.__hash__

        def __len__(self) -> int:
            return len(self._read())

    class Environment(sandbox.SandboxedEnvironment):
        """A sandbox with limits."""

        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            template_limits.check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str) and attr in _UNBOUNDED_METHODS:
                return False
            return super().is_safe_attribute(obj, attr, value)

        # Checks the sizes of results of str's methods, as the filters above do.
        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            text = getattr(function, "__self__", None)
            if isinstance(text, str):
                method = function.__name__
                if method == "replace" and all(isinstance(arg, str) for arg in args[:2]):
                    growth = text.count(args[0]) * len("".join(args[1:2]))
                    template_limits.check_size(len(text) + growth)
                if method == "join" and args:
                    args = ([*args[0]], *args[1:])  # an iterator can be read once
                    sizes = [template_limits.text_size(item) + len(text) for item in args[0]]
                    template_limits.check_size(sum(sizes))
                if method in ("format", "format_map"):
                    template_limits.check_format(text, (*args, *kwargs.values()))
            return super().call(context, function, *args, **kwargs)

    environment = Environment(undefined=MissingField, finalize=_finalize)
    environment.globals.update(zip=zip, enumerate=enumerate)  # as in promptsource
    del environment.globals["lipsum"]  # makes texts of any length
    for name in _UNBOUNDED_FILTERS:
        del environment.filters[name]
    choice = jinja2.pass_context(_choice)
    environment.filters.update(
        choice=choice,
        random=choice,
        most_frequent=_most_frequent,
        highlight=_highlight,
        get_item=jinja2.pass_environment(_get_item),
        check_compared=_check_compared,
        check_label_test=_check_label_test,
        string=lambda value: str(_finalize(value)),
        int=_to_int,
        format=_format,
        replace=_replace,
        join=jinja2.pass_environment(_join),
        concat=_concat,
        count_step=jinja2.pass_context(_count_step),
    )
    return environment


def _name_of(node: object) -> str:
    """Returns the name of the field that an expression reads; '' for other expressions."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return ""


def _find_constants(node: jinja2.nodes.Compare) -> tuple[Any, list[object]]:
    """Returns the operand that a comparison compares with constants, and these constants.

    `x == 1` and `1 != x` compare x with [1], `x in (1, 2)` compares it with [1, 2]. Returns
    (None, []) for other comparisons.
    """
    from jinja2 import nodes

    operator = node.ops[0]
    for operand, other in ((node.expr, operator.expr), (operator.expr, node.expr)):
        with contextlib.suppress(nodes.Impossible):
            value = other.as_const()
            if operator.op in ("eq", "ne"):
                return operand, [value]
            if operator.op in ("in", "notin") and isinstance(value, list | tuple):
                return operand, list(value)
    return None, []


@functools.lru_cache(maxsize=4096)
def _compile(text: str) -> jinja2.Template:
    """Compiles a template with checks of `items[index]`, comparisons and tests of labels.

    The checks are filters of `_environment` that two passes insert into the syntax tree.
    """
    from jinja2 import nodes, visitor

    def call_filter(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
        """Returns the expression `node | name(*args)`."""
        return nodes.Filter(
            node, name, [*args], [], None, None, lineno=node.lineno, environment=environment
        )

    # jinja's compiler needs both attributes, which the parser sets on nodes of its own.
    def located(node: Any, origin: nodes.Node) -> Any:
        """Returns a new node with the line of the one that it stems from."""
        node.lineno, node.environment = origin.lineno, environment
        return node

    def count_steps(node: Any) -> Any:
        """Makes the body of a loop or macro begin with a step of the budget."""
        step = call_filter(located(nodes.Const(True), node), "count_step")
        node.body.insert(0, located(nodes.ExprStmt(step), node))
        return node

    class CheckItems(visitor.NodeTransformer):
        """Inserts checks of computed indices, of the sizes of `a ~ b`, and of steps."""

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                return node
            try:
                node.arg.as_const()  # a constant -1 does mean the last item
            except nodes.Impossible:
                return call_filter(node.node, "get_item", node.arg)
            return node

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            # The condition of a loop is tested for items that the body never sees: it counts too.
            if node.test is not None:
                step = call_filter(located(nodes.Const(True), node), "count_step")
                node.test = located(nodes.And(step, node.test), node)
            return count_steps(node)

        def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
            self.generic_visit(node)
            return count_steps(node)

        def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
            self.generic_visit(node)
            return call_filter(located(nodes.List(node.nodes), node), "concat")

        def visit_Call(self, node: nodes.Call) -> nodes.Expr:
            # x.get(key) would be None for a missing key, so it becomes x[key].
            method = node.node
            if isinstance(method, nodes.Getattr) and method.attr == "get" and len(node.args) == 1:
                item = nodes.Getitem(
                    method.node,
                    node.args[0],
                    "load",
                    lineno=node.lineno,
                    environment=environment,
                )
                return self.visit_Getitem(item)
            self.generic_visit(node)
            return node

    class CheckComparisons(visitor.NodeTransformer):
        """Inserts checks of values that are compared with constants, and of tests of labels."""

        def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
            self.generic_visit(node)
            operand, _ = _find_constants(node)
            constants = compared.get(repr(operand), [])
            # A template that compares with both '1' and 1 provides for either type.
            are_texts = {isinstance(constant, str) for constant in constants}
            if len(are_texts) == 1 and all(isinstance(c, str | int | float) for c in constants):
                checked = call_filter(
                    operand,
                    "check_compared",
                    nodes.Const(tuple(constants)),
                    nodes.Const(_name_of(operand)),
                )
                if operand is node.expr:
                    node.expr = checked
                else:
                    node.ops[0].expr = checked
            return node

        def visit_If(self, node: nodes.If) -> nodes.If:
            self.generic_visit(node)
            node.test = check_test(node.test)
            return node

        def visit_CondExpr(self, node: nodes.CondExpr) -> nodes.CondExpr:
            self.generic_visit(node)
            node.test = check_test(node.test)
            return node

    def check_test(node: Any) -> Any:
        """Inserts checks of the labels in a condition, which may be joined by not, and, or."""
        if isinstance(node, nodes.Not):
            node.node = check_test(node.node)
        elif isinstance(node, nodes.And | nodes.Or):
            node.left, node.right = check_test(node.left), check_test(node.right)
        elif _name_of(node).split("_")[-1] == "label":
            return call_filter(node, "check_label_test", nodes.Const(_name_of(node)))
        return node

    environment = _environment()
    tree = CheckItems().visit(environment.parse(text))
    # Expression, as its repr -> all constants that the template compares it with. Comparisons are
    # checked in a second pass, because a later one may provide for another type of value.
    compared: dict[str, list[object]] = collections.defaultdict(list)
    for node in tree.find_all(nodes.Compare):
        if len(node.ops) == 1:
            operand, constants = _find_constants(node)
            compared[repr(operand)] += [value for value in constants if value is not None]
    tree = CheckComparisons().visit(tree)
    return environment.from_string(tree.set_environment(environment))
