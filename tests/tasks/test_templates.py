"""The reader of promptsource's templates, against strings worked out by hand."""

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.tasks.p3 import published, template_files
from pemoe_jax.tasks.p3.templates import Prompt, Template, TemplateError, UnlabeledError

EXAMPLE = {
    "premise": "It rains.",
    "label": 1,
    "names": ["b", "a", "b", "c", "c"],
    "a-b": "x",
    "inner": {"number": 1.0},
    "a_label": "1",
}


def apply(jinja: str, choices: str | None = None, number: int = 0, **fields) -> Prompt | None:
    template = Template("t", jinja, choices)
    return template.apply({**EXAMPLE, **fields}, number)


@pytest.mark.parametrize(
    ("jinja", "choices", "inputs", "targets"),
    [
        # both parts are stripped, but not the text within them
        ("  {{premise}}  Wet?\n ||| \n yes ", None, "It rains.  Wet?", "yes"),
        # choices: a template, split at |||; the other template sees them as a list
        (
            "{{answer_choices[1]}} ||| {{answer_choices[label]}}",
            "No ||| Yes, wet ",
            "Yes, wet",
            "Yes, wet",
        ),
        (
            '{{answer_choices | join(" or ")}}? ||| b',
            "{{names[0]}} ||| {{names[1]}}",
            "b or a?",
            "b",
        ),
        ("{{answer_choices}} ||| b", None, "None", "b"),
        # hyphens in field names become underscores
        ("{{a_b}} ||| y", None, "x", "y"),
        # a missing field is false, and an item beyond the end of a list is empty text
        ("{% if other %}a{% endif %}b{{names[9]}} ||| y", None, "b", "y"),
        # a constant index counts from the end; a computed one selects by the label
        ("{{names[-1]}}{{names[:-1][0]}} ||| {{names[label - 1]}}", None, "cb", "b"),
        # a condition that leaves the target empty: <NO LABEL>
        ("{{premise}} ||| {% if label == 0 %} no {% endif %}", None, "It rains.", "<NO LABEL>"),
        ("a ||| {% if a_label == 1 or a_label == '1' %}b{% endif %}", None, "a", "b"),
        # comparisons with a list are of any type, as in squad_v2
        ("a ||| {% if names == [] %}none{% else %}{{names[0]}}{% endif %}", None, "a", "b"),
        ("{{names | most_frequent | join(',')}} ||| y", None, "b,c", "y"),
        ("{{'it' | highlight}} ||| y", None, "<span style='color: #F08080'>it</span>", "y"),
        ("{% for x, y in zip(names, [1, 2]) %}{{x}}{{y}}{% endfor %} ||| y", None, "b1a2", "y"),
        ("{{premise.lower() | replace('.', '!')}} ||| y", None, "it rains!", "y"),
        # text is not escaped for HTML
        ("{{'<&>'}} ||| y", None, "<&>", "y"),
    ],
)
def test_rendering(jinja, choices, inputs, targets):
    prompt = apply(jinja, choices)
    assert prompt is not None
    assert (prompt.inputs, prompt.targets) == (inputs, targets)


def test_choices_are_those_of_the_example():
    assert apply("a ||| b", "x ||| {{premise}}").answer_choices == ["x", "It rains."]
    assert apply("a ||| b").answer_choices == []


def test_bars_of_the_example_do_not_cut():
    prompt = apply("{{premise}} ||| {{premise}}", "{{premise}} ||| no", premise="a ||| b")
    assert prompt == Prompt("a ||| b", "a ||| b", ["a ||| b", "no"])


@pytest.mark.parametrize(
    "jinja", ["no target", "a ||| b ||| c", " ||| b", "{% if 0 %}a ||| b{% endif %}"]
)
def test_what_is_not_an_input_and_a_target_is_no_prompt(jinja):
    assert apply(jinja) is None


def test_long_fields_are_cut_at_a_word_after_2048_characters():
    words = "word " * 1000  # 5,000 characters
    prompt = apply("{{premise}}! ||| {{premise}}", premise=words)
    # jinja's truncate: 2,045 characters, back to the last space, and three dots: 409 words
    expected = "word " * 408 + "word..."
    assert prompt.inputs == expected + "!"
    assert len(expected) == 2047 and prompt.targets == expected
    # 2,053 characters are within truncate's leeway of 5
    assert apply("{{premise}} ||| y", premise="x" * 2053).inputs == "x" * 2053
    # only the last term is truncated: a filter binds more tightly than +
    assert apply("{{premise ~ 'end'}} ||| y", premise=words).inputs == (words + "end")
    # answer choices are not truncated
    assert apply("a ||| b", "{{premise}}", premise=words).answer_choices == [words.strip()]


def test_draws_are_the_same_for_the_same_example():
    jinja = "{{['a', 'b', 'c', 'd'] | choice}} ||| y"
    first = [apply(jinja, number=number).inputs for number in range(20)]
    assert [apply(jinja, number=number).inputs for number in range(20)] == first
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("jinja", "why"),
    [
        ("{{premise", "TemplateSyntaxError"),
        ("{{label + names}} ||| a", "TypeError"),
        ("{{other.more}} ||| a", "UndefinedError"),
        # promptsource prints nothing for a missing field
        ("a{{other}}b ||| y", "'other' is undefined"),
        ("{{inner.other}} ||| y", "'dict object' has no attribute 'other'"),
        ("{{other | join}} ||| y", "'other' is undefined"),
        ("a ||| {% if other == 1 %}b{% else %}c{% endif %}", "'other' is undefined"),
        ("a ||| {{names[premise]}}", "must be an integer, got 'It rains.'"),
        ("a ||| {% if label == '1' %}b{% else %}c{% endif %}", "label must be text, got 1"),
        ("a ||| {% if a_label == 1 %}b{% else %}c{% endif %}", "a_label must be a number, got '1'"),
        ("a ||| {% if 0 == a_label %}b{% else %}c{% endif %}", "a_label must be a number, got '1'"),
        ("a ||| {% if premise != 0 %}b{% endif %}", "premise must be a number, got 'It"),
        ("a ||| {{'b' if a_label in [0, 1] else 'c'}}", "a_label must be a number, got '1'"),
        ("a ||| {{'b' if inner['number'] == '1' else 'c'}}", "number must be text, got 1.0"),
        ("a ||| {{'b' if inner.number == '1' else 'c'}}", "number must be text, got 1.0"),
        ("a ||| {{'b' if names == 1 else 'c'}}", "names must be a number, got "),
        # a text is true, whatever it says
        ("a ||| {% if not a_label %}b{% else %}c{% endif %}", "a_label must be true, false or a"),
        ("a ||| {{'b' if inner.label else 'c'}}", "no attribute 'label'"),
        ("a ||| {{inner.get('other')}}", "no attribute 'other'"),
        ("a ||| {{'b' if inner.other | length == 0 else 'c'}}", "no attribute 'other'"),
        ("a ||| {{names[premise | int]}}", "expected an integer, got 'It rains.'"),
        ("{{inner.values}} ||| a", "got the method 'values'"),
        ("a ||| {{names[inner.number]}}", "must be an integer, got 1.0"),
        ("{{premise | nothing}} ||| a", "TemplateAssertionError"),
        ("{{premise.__class__.__mro__}} ||| a", "SecurityError"),
        ("{{().__class__.__base__.__subclasses__()}} ||| a", "SecurityError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %} ||| a", "OverflowError"),
    ],
)
def test_what_cannot_be_rendered(jinja, why):
    with pytest.raises(TemplateError, match=why):
        apply(jinja)


@pytest.mark.parametrize(
    "expression",
    [
        "'a' * (10**9 * 20)",
        "([1] * 10**9) | length",
        "(10**9) ** (10**9)",
        "lipsum(n=10**7) | length",
        "premise | indent(10**9)",
        "premise | center(10**9)",
        "premise.ljust(10**9)",
        "premise.zfill(10**9) | length",
        "'\t'.expandtabs(10**9)",
        "names | slice(10**8) | list",
        "'%1000000000d' | format(1)",
        "'%1000000000d' % 1",
        "'%*d' | format(10**9, 1)",
        "'{:1000000000d}'.format(1)",
        "'{:{}d}'.format(1, 10**9)",
        "('a' * 10000) | replace('a', 'b' * 100000)",
        "('a' * 10000).replace('a', 'b' * 100000)",
        "(['a' * 10000] * 10000) | join",
        "''.join(['a' * 10000] * 10000)",
        "[[[1] * 1000] * 1000] * 1000",
        "('a' * 600000) ~ ('a' * 600000)",
        "('a' * 600000) + ('a' * 600000)",
        "(" * 5000 + "1" + ")" * 5000,
        "1" + " + 1" * 20_000,
        "9" * 5000,
    ],
)
def test_expressions_of_any_size_are_refused(expression):
    with pytest.raises(TemplateError) as error:
        apply(f"{{{{ ({expression}) }}}} ||| a")
    assert len(str(error.value)) < 600
    assert "TypeError" not in str(error.value)


@pytest.mark.parametrize(
    ("jinja", "why"),
    [
        (
            "{% set ns = namespace(x='a') %}{% for i in range(40) %}"
            "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "characters or items",
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}"
            "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "characters or items",
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "100,000 steps",
        ),
        (
            "{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}",
            "100,000 steps",
        ),
        ("{% macro a(n) %}{{ a(n) }}{% endmacro %}{{ a(1) }}", "RecursionError"),
        ("{% for i in range(99999) %}{{ ('a' * 2000) }}{% endfor %}", "10,000,000 characters"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError"),
    ],
)
def test_templates_of_any_size_are_refused(jinja, why):
    with pytest.raises(TemplateError, match=why):
        apply(f"{jinja} ||| a")


def test_fields_of_deeply_nested_templates():
    with pytest.raises(TemplateError, match="RecursionError"):
        _ = Template("x", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", None).fields


def test_methods_of_text_in_loops():
    jinja = (
        "{% for name in names %}{{ name.replace('a', '-') }}{{ '+'.join([name, name]) }}"
        "{{ '{}'.format(name) }}{% endfor %} ||| x"
    )
    prompt = Template("x", jinja, None).apply({"names": ["ab", "b"]})
    assert prompt is not None and prompt.inputs == "-bab+ababbb+bb"


def test_templates_do_not_change_their_example():
    example = {"names": ["a"], "inner": {"b": 1}}
    jinja = (
        "{{ names.append('c') }}{{ inner.update({'b': 2}) }}{{ names | join('~') ~ inner.b }}|||x"
    )
    prompt = Template("x", jinja, None).apply(example)
    assert prompt is not None and prompt.inputs == "NoneNonea~c2"
    assert example == {"names": ["a"], "inner": {"b": 1}}


@pytest.mark.parametrize("value", [-1, -1.0, "-1", "", None, float("nan")])
def test_examples_without_a_label(value):
    for jinja in (
        "a ||| {{names[label]}}",
        "a ||| {% if label == 1 %}yes{% else %}no{% endif %}",
        "a ||| {{names[label | int]}}",
    ):
        with pytest.raises(UnlabeledError):
            apply(jinja, label=value)
    with pytest.raises(UnlabeledError, match="the index of its label"):
        apply("a ||| {{names[answer]}}", answer=value)
    for jinja in (
        "{{'b' if inner.number == 1 else 'c'}}",
        "{% if inner.get('number') in [0, 1] %}b{% endif %}",
    ):
        with pytest.raises(UnlabeledError, match="number is"):
            apply(f"a ||| {jinja}", inner={"number": value})
    # the answer of winogrande is '1' or '2', and '' in the test split
    with pytest.raises(UnlabeledError, match="value of its label is ''"):
        apply("a ||| {{names[answer | int - 1]}}", answer="")


@pytest.mark.parametrize("value", [None, float("nan")])
def test_null_is_no_target_and_no_choice(value):
    assert apply("{{premise}}? ||| b", premise=value).inputs == "None?"  # as published
    with pytest.raises(UnlabeledError, match="its target prints None"):
        apply("a ||| {{premise}}", premise=value)
    with pytest.raises(TemplateError, match="an answer choice prints None"):
        apply("a ||| b", "b ||| {{premise}}", premise=value)


def test_an_example_may_not_have_a_field_answer_choices():
    with pytest.raises(TemplateError, match="answer_choices"):
        apply("a ||| b", answer_choices=["x"])


YAML = """\
dataset: super_glue
subset: rte
templates:
  abc: !Template
    answer_choices: Yes ||| No
    id: abc
    jinja: 'Say {{premise}}

      |||

      {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages:
      - en
      metrics:
      - Accuracy
      - BLEU
      original_task: true
    name: "what's it? (new)"
    reference: ''
  abd: !Template
    answer_choices: null
    jinja: a ||| b
    metadata: !TemplateMetadata {}
    name: plain
"""


def yaml_bomb(form: str) -> str:
    """Returns YAML whose each anchor has nine aliases of the one before."""
    anchors = "abcdefghi"
    lines = ["a: &a {x: 1}"]
    lines += [
        f"{name}: &{name} {form.format(*[f'*{before}'] * 9)}"
        for before, name in zip(anchors, anchors[1:], strict=False)
    ]
    return "\n".join([*lines, "templates:", "  t: *i", ""])


def test_reading_yaml(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(YAML)
    templates_by_name = template_files.read_templates(path)
    template = templates_by_name["what's it? (new)"]
    assert template.apply(EXAMPLE) == Prompt("Say It rains.", "No", ["Yes", "No"])
    assert templates_by_name["plain"].answer_choices is None
    assert (
        published.task_name("super_glue", "rte", template.name) == "super_glue_rte_what_s_it_new_"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("templates: [", "templates.yaml:2: not YAML"),
        ("templates:\n  a: !!python/object/apply:os.system ['true']\n", "could not determine"),
        ("templates:\n  a: !Other {}\n", "could not determine a constructor"),
        ("- a\n", "expected an object with 'templates'"),
        ("templates:\n  a: 3\n", "template 'a': expected an object"),
        ("templates:\n  a: !Template {name: x}\n", "'jinja' must be a string, got None"),
        (
            "templates:\n  a: !Template {name: x, jinja: y, answer_choices: [z]}\n",
            "'answer_choices'",
        ),
        (
            "templates:\n  a: !Template {name: x, jinja: y}\n  b: !Template {name: x, jinja: z}\n",
            "two templates are named 'x'",
        ),
        (
            "templates:\n  a: !Template {name: x, jinja: y}\n  a: !Template {name: z, jinja: z}\n",
            "templates.yaml:3: not YAML of templates: the key 'a' occurs twice",
        ),
        (
            "templates:\n  a: !Template\n    name: x\n    jinja: y\n    jinja: z\n",
            "templates.yaml:5: not YAML of templates: the key 'jinja' occurs twice",
        ),
        ("x: 2001-99-99\n", "not YAML of templates: ValueError: month must be in 1..12"),
        ("x: !!int abc\n", "not YAML of templates: ValueError: invalid literal for int()"),
        ("x: !!bool abc\n", "not YAML of templates: KeyError"),
        ('x: !!int ""\n', "not YAML of templates: IndexError"),
        ("x: !!timestamp abc\n", "not YAML of templates: AttributeError"),
        (f"x: 1{':59' * 20_000}.5\n", "not YAML of templates: OverflowError"),
        (f"x: {'9' * 5000}\n", "not YAML of templates: ValueError: Exceeds the limit"),
        ("x: !!set [1]\n", "templates.yaml:1: not YAML of templates: expected an object"),
        (
            "templates:\n  a: !Template [1]\n",
            "templates.yaml:2: not YAML of templates: expected an",
        ),
        ("templates:\n  a: !Template b\n", "templates.yaml:2: not YAML of templates: expected an"),
        ("x: " + "[" * 100_000, "expected at most 50 nested"),
        ("x: " + "[" * 800 + "]" * 800, "expected at most 50 nested"),
        ("x: " + "{a: " * 5000 + "}" * 5000, "expected at most 50 nested"),
        ("".join(f"{' ' * n}a:\n" for n in range(100)), "expected at most 50 nested"),
        (yaml_bomb("[{}, {}, {}, {}, {}, {}, {}, {}, {}]"), "with those of aliases"),
        (yaml_bomb("{{<<: [{}, {}, {}, {}, {}, {}, {}, {}, {}]}}"), "with those of aliases"),
    ],
)
def test_what_is_wrong_in_yaml_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "templates.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        template_files.read_templates(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_folders(tmp_path):
    for name in ("imdb", "super_glue/rte", "anli"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "templates.yaml").touch()
    files = template_files.find_templates(tmp_path)
    assert set(files) == {("imdb", ""), ("super_glue", "rte"), ("anli", "")}


def test_fields_are_those_that_are_read():
    jinja = (
        "{% set x = premise %}{% for n in names %}{{n}}{% endfor %}{{x}}{{range(2)}} ||| {{c-d}}"
    )
    jinja += "{% if e %}{% set y = 1 %}{% endif %}{{y}}"
    template = Template("t", jinja, "{{ zip(a, [1]) | choice }} ||| {{answer}}")
    assert template.fields == {"premise", "names", "c", "d", "a", "answer", "e"}
    with pytest.raises(TemplateError, match="unexpected"):
        _ = Template("t", "{{ ", None).fields


def test_bytes_of_parquet_are_text():
    template = Template("a", "{{text}} {{names | join(', ')}} ||| {{label}}", None)
    example = {"text": b"it rains", "names": [b"a", "b"], "label": b"no"}
    assert template.apply(example) == Prompt("it rains a, b", "no", [])
    with pytest.raises(TemplateError, match="a value to print, got bytes that are not UTF-8"):
        template.apply(example | {"text": b"\xff"})
