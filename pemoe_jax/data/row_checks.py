"""Checks of rows, the same for every source: types of fields, token ids, and odd rows.

A field of a wrong type raises an InputError that names the file and the row. An odd row is valid,
but changes what a score means, so commands count odd rows by kind (`ODD_ROWS`, docs/rows.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

TEXT_FEATURES = ("inputs", "targets")

# Kinds of odd rows, by their keys in results.json.
ODD_ROWS = {
    "target_not_in_choices": "targets not among their choices",
    "doubled_choices": "duplicate choices",
    "equal_tokens": "choices whose texts differ but whose tokens are the same",
    "tied_scores": "ties for the best score (the first choice is the prediction)",
    "no_choices": "rows without choices in a task with choices (not scored)",
    "empty_input": "empty inputs",
    "empty_target": "empty targets",
    "unreachable_target": "targets that cannot be decoded (characters that the vocabulary lacks or"
    " changes, or too long)",
    "cut_input": "inputs truncated to TASK_FEATURE_LENGTHS",
    "cut_target": "choices truncated to TASK_FEATURE_LENGTHS",
}


class CheckedRow(NamedTuple):
    """A row whose fields have the right types."""

    texts: dict[str, str]  # by feature; rows of token ids may have none
    ids: dict[str, list[int]]  # by feature; rows of text have none
    answer_choices: list[str]  # empty if the row has none


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """Parses a line of JSON.

    Args:
      line: the line.
      where: the file and the number of the line, with which errors begin.

    Raises:
      InputError: the line is not a JSON object in UTF-8.
    """
    return _parse_object(line, where, is_file=False)


def read_object(path: file_io.AnyPath) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
      InputError: the file is not a JSON object in UTF-8.
    """
    return _parse_object(path.read_bytes(), str(path), is_file=True)


def _parse_object(content: bytes, where: str, is_file: bool) -> dict[str, Any]:
    """Parses a line or a whole file; errors in a file also name the line."""
    try:
        # Windows editors begin a file with a byte order mark, which utf-8-sig skips.
        fields = file_io.parse_json(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if is_file else ""
        raise InputError(f"{where}{line}: not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # too deep, an integer of too many digits, a key that occurs twice
        raise InputError(f"{where}: {'' if is_file else 'not JSON: '}{error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object, got {describe_value(fields)}")
    return fields


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object from its pairs; a hook for `json.loads` that refuses repeated keys.

    Raises:
      ValueError: a key occurs twice.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return fields


def check_row(
    fields: Mapping[str, Any], where: str, vocab_size: Callable[[], int] | None = None
) -> CheckedRow:
    """Returns the inputs, targets and answer choices of a row.

    Args:
      fields: `inputs` and `targets` (text), and optionally `answer_choices` (null: none).
      where: the file and the row, for errors.
      vocab_size: returns the number of token ids. If set, `inputs` and `targets` may also be
        token ids, or be absent if `<feature>_pretokenized` holds the text, as in P3.

    Raises:
      InputError: a field is missing or has a wrong type, or an id is not in the vocabulary.
    """
    texts, ids = {}, {}
    for key in TEXT_FEATURES:
        value, text_key = fields.get(key), f"{key}_pretokenized"
        text = fields.get(text_key) if vocab_size is not None else None
        if text is not None:
            texts[key] = check_text(text, where, text_key)
        if vocab_size is not None and isinstance(value, list):
            ids[key] = _check_ids(value, where, key, vocab_size())
        # A null raises the error of a wrong type, unless the row has the text under `text_key`.
        elif value is not None or (key in fields and text is None):
            expected = "a string" if vocab_size is None else "a string or a list of token ids"
            texts[key] = check_text(value, where, key, expected)
        elif text is None:
            names = ", ".join(fields) or "none"
            raise InputError(f"{where}: expected a field {key!r}, got {names}")
    choices = fields.get("answer_choices")
    choices = [] if choices is None else choices  # exporters write null for a missing list
    if not isinstance(choices, list) or not all(
        isinstance(choice, str | bytes) for choice in choices
    ):
        raise InputError(
            f"{where}: 'answer_choices' must be a list of strings, got {describe_value(choices)}"
        )
    choices = [check_text(choice, where, "answer_choices") for choice in choices]
    return CheckedRow(texts, ids, choices)


def check_text(value: object, where: str, key: str, expected: str = "a string") -> str:
    """Returns a text; Parquet may hold it as bytes.

    Raises:
      InputError: the value is not a text, or cannot be encoded as UTF-8.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: {key!r} is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be {expected}, got {describe_value(value)}")
    try:
        # JSON can escape half a surrogate pair, which has no UTF-8 and would fail in TensorFlow.
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InputError(f"{where}: {key!r} has an unpaired surrogate \\u{code:04x}") from None
    return value


def _check_ids(ids: list[Any], where: str, key: str, size: int) -> list[int]:
    # isinstance would accept a bool as an int.
    if not set(map(type, ids)) <= {int}:
        raise InputError(
            f"{where}: {key!r} must be a string or a list of token ids, got {describe_value(ids)}"
        )
    check_token_ids(ids, where, key, size)
    return ids


def check_token_ids(ids: Sequence[int] | np.ndarray, where: str, key: str, size: int) -> None:
    """Raises InputError if a token id is not in [0, size), the ids of the vocabulary."""
    values = np.asarray(ids)
    if values.size and (values.min() < 0 or values.max() >= size):
        wrong = values[(values < 0) | (values >= size)]
        raise InputError(
            f"{where}: {key!r} must have token ids from 0 to {size - 1}, as the vocabulary has"
            f" {size}, got {wrong[0]}"
        )


def check_block_ids(
    ids: np.ndarray, row_splits: np.ndarray, name: str, key: str, size: int, start: int = 0
) -> None:
    """Raises InputError if a token id of a block of rows is not in [0, size).

    Args:
      ids: the ids of all rows, one after the other.
      row_splits: int [rows + 1], boundaries of the rows in `ids`, as in `tf.RaggedTensor`.
      name: the task or mixture of the examples, for errors.
      key: the feature.
      size: number of ids in its vocabulary.
      start: index of the first row; errors number rows from 1.
    """
    # One comparison for the block; rows are visited only to name the wrong one.
    if ids.size and (ids.min() < 0 or ids.max() >= size):
        for number, row in enumerate(np.split(ids, row_splits[1:-1]), start + 1):
            check_token_ids(row, f"{name}: example {number}", key, size)


def check_choice_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns `idx`, `is_correct` and `weight` of a row of a `_score_eval` task.

    Raises:
      InputError: `idx` or `is_correct` is missing, or a field has a wrong type.
    """
    idx, is_correct, weight = (fields.get(key) for key in ("idx", "is_correct", "weight"))
    if idx is None or is_correct is None:
        names = ", ".join(key for key, value in fields.items() if value is not None) or "none"
        raise InputError(f"{where}: expected 'idx' and 'is_correct', got {names}")
    is_pair = isinstance(idx, list) and len(idx) == 2 and set(map(type, idx)) == {int}
    # Pipelines cast `idx` to int32.
    if not is_pair or not all(0 <= i < 2**31 for i in idx):
        raise InputError(
            f"{where}: 'idx' must be [example, choice], two non-negative integers, got"
            f" {describe_value(idx)}"
        )
    if not isinstance(is_correct, int) or is_correct not in (0, 1):
        raise InputError(
            f"{where}: 'is_correct' must be true or false, got {describe_value(is_correct)}"
        )
    weight = 1.0 if weight is None else weight  # all weights in the published P3 are 1
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"{where}: 'weight' must be a finite number, got {describe_value(weight)}")
    return {"idx": idx, "is_correct": bool(is_correct), "weight": float(weight)}


def find_odd_kinds(inputs: str, targets: str, choices: Sequence[str]) -> list[str]:
    """Returns the keys of `ODD_ROWS` that apply to a row's texts; `choices` may be empty."""
    # Choices and targets are compared stripped, as `is_correct` is.
    target, stripped = targets.strip(), [choice.strip() for choice in choices]
    kinds = {
        "empty_input": not inputs.strip(),
        "empty_target": not target,
        "target_not_in_choices": stripped and target not in stripped,
        "doubled_choices": len(set(stripped)) < len(stripped),
    }
    return [kind for kind, applies in kinds.items() if applies]


def describe_odd_rows(
    rows: Iterable[tuple[str, str]], counts: Mapping[str, int] | None = None
) -> list[str]:
    """Returns a line for each kind of odd row, in the order of `ODD_ROWS`.

    Args:
      rows: (kind, location) of all odd rows, or with `counts` of some of them.
      counts: number of odd rows of each kind; None: those in `rows`.
    """
    places: dict[str, list[str]] = {}
    for kind, place in rows:
        places.setdefault(kind, []).append(place)
    lines = []
    for kind, text in ODD_ROWS.items():
        if kind in places:
            count = len(places[kind]) if counts is None else counts[kind]
            shown = ", ".join(places[kind][:2])
            if len(places[kind]) > 2:
                # With `counts`, the number of the other places is not that of the other rows.
                shown += ", …" if counts is not None else f", … {len(places[kind]) - 2} more"
            lines.append(f"odd rows: {text}: {count:,} ({shown})")
    return lines


def describe_value(value: object) -> str:
    """Returns a value's type and its first 40 characters as JSON, for messages."""
    text = json.dumps(value, default=repr)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:39] + '…'}"
