"""Checks of rows: the types that each source accepts."""

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import row_checks

CHOICES = ["True", "False"]
ROW = {"inputs": "a", "targets": "True", "answer_choices": CHOICES}
SCORED = {"idx": [3, 1], "is_correct": True}


def error(function, *args) -> str:
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.startswith("f: row 1: ") and "\n" not in message
    return message.removeprefix("f: row 1: ")


def check_p3(fields: dict):
    return row_checks.check_row(fields, "f: row 1", lambda: 20)


def test_rows_of_text_and_of_ids():
    expected = {"inputs": "a", "targets": "True"}, {}, CHOICES
    assert row_checks.check_row(ROW, "f: row 1") == check_p3(ROW) == expected
    ids = {"inputs": [5, 19], "inputs_pretokenized": b"a", "targets": [], "answer_choices": None}
    assert check_p3(ids) == ({"inputs": "a"}, {"inputs": [5, 19], "targets": []}, [])
    null = {"inputs": None, "inputs_pretokenized": "a", "targets_pretokenized": "b"}
    assert check_p3(null) == ({"inputs": "a", "targets": "b"}, {}, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_choices": "True ||| False"}, "'answer_choices' must be a list of strings, got s"),
        ({"answer_choices": {"a": "b"}}, "'answer_choices' must be a list of strings, got dict"),
        ({"answer_choices": ["True", 0]}, "'answer_choices' must be a list of strings, got list"),
        ({"targets": None}, "'targets' must be a string"),
        ({"targets": 5}, "'targets' must be a string"),
        ({"inputs": {"text": "x"}}, "'inputs' must be a string"),
        ({"inputs": ["x"]}, "'inputs' must be a string"),
        ({"inputs": [1.0]}, "'inputs' must be a string"),
        ({"inputs": [True]}, "'inputs' must be a string"),
        ({"inputs": b"\xff"}, "'inputs' is not UTF-8"),
        ({"inputs": "\ud800"}, "'inputs' has an unpaired surrogate \\ud800"),
    ],
)
def test_wrong_types_are_errors_of_every_source(change, message):
    fields = ROW | change
    assert error(check_p3, fields).startswith(message)
    assert error(row_checks.check_row, fields, "f: row 1").startswith(message)


def test_keys_of_an_object_are_unique():
    assert row_checks.parse_object(b'\xef\xbb\xbf{"a": {"b": 1}, "b": 2}\r\n', "") == {
        "a": {"b": 1},
        "b": 2,
    }
    for line in (b'{"targets": "yes", "targets": "no"}', b'{"a": [{"targets": 1, "targets": 1}]}'):
        message = error(row_checks.parse_object, line, "f: row 1")
        assert message == "not JSON: the key 'targets' occurs twice in an object"


def test_token_ids_belong_to_the_vocabulary():
    for wrong in (20, -1, 2**40, 2**70):
        assert error(check_p3, ROW | {"inputs": [5, wrong, 1]}) == (
            f"'inputs' must have token ids from 0 to 19, as the vocabulary has 20, got {wrong}"
        )
    assert error(row_checks.check_row, ROW | {"inputs": [5]}, "f: row 1") == (
        "'inputs' must be a string, got list [5]"  # a folder of JSON lines has text only
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_correct": "False"}, "'is_correct' must be true or false, got str \"False\""),
        ({"is_correct": 0.5}, "'is_correct' must be true or false, got float 0.5"),
        ({"is_correct": 2}, "'is_correct' must be true or false, got int 2"),
        ({"is_correct": None}, "expected 'idx' and 'is_correct', got idx"),
        ({"idx": 3}, "'idx' must be [example, choice], two non-negative integers, got int 3"),
        ({"idx": [3]}, "'idx' must be [example, choice], two non-negative integers, got list [3]"),
        ({"idx": [3, "1"]}, "'idx' must be [example, choice], two non-negative integers, got list"),
        ({"idx": [-1, 0]}, "'idx' must be [example, choice], two non-negative integers, got list"),
        ({"weight": "1"}, "'weight' must be a finite number, got str \"1\""),
    ],
)
def test_wrong_types_of_choice_rows(change, message):
    fields = SCORED | change
    assert error(row_checks.check_choice_fields, fields, "f: row 1").startswith(message)
    assert row_checks.check_choice_fields(SCORED, "")["is_correct"] is True
    assert row_checks.check_choice_fields(SCORED | {"is_correct": 0}, "")["is_correct"] is False


def test_odd_rows_are_counted_by_kind():
    rows = [("empty_input", "t example 4"), ("equal_tokens", "t example 1")]
    rows += [("empty_input", f"u example {number}") for number in (7, 8)]
    assert row_checks.describe_odd_rows(rows) == [
        "odd rows: choices whose texts differ but whose tokens are the same: 1 (t example 1)",
        "odd rows: empty inputs: 3 (t example 4, u example 7, … 1 more)",
    ]
    counts = {"empty_input": 1000, "equal_tokens": 1}
    assert row_checks.describe_odd_rows(rows[:1], counts) == [
        "odd rows: empty inputs: 1,000 (t example 4)"
    ]
    *_, line = row_checks.describe_odd_rows(rows, counts)  # a place may stand for several rows
    assert line == "odd rows: empty inputs: 1,000 (t example 4, u example 7, …)"
