"""The files behind `jsonl`: finding `<task>/<split>.jsonl`, checking its lines, reading its rows.

Nothing here needs seqio or TensorFlow.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError


def find_files(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """The folder's files: task -> split -> path."""
    if not folder.exists():
        raise InputError(f"JSONL_DIR {folder} does not exist")
    if not folder.is_dir():
        raise InputError(
            f"JSONL_DIR {folder} must be a folder of <task>/<split>.jsonl, found a file"
        )
    files: dict[str, dict[str, str]] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        splits = {path.stem: str(path) for path in sorted(entry.glob("*.jsonl")) if path.is_file()}
        if not splits:
            continue
        if not re.fullmatch(r"[\w.:#]+", entry.name):
            raise InputError(f"{entry}: a task's name may hold letters, digits and _ . : # only")
        files[entry.name] = splits
    if not files:
        loose = sorted(path.name for path in folder.glob("*.jsonl"))
        found = f"found {few(loose, 3)} directly in it" if loose else "found none"
        raise InputError(f"JSONL_DIR {folder} must hold <task>/<split>.jsonl; {found}")
    return files


_INDEX_TYPES: dict[str, tuple[type, ...]] = {
    "dataset": (str, type(None)),
    "subset": (str, type(None)),
    "original_task": (bool,),
    "t0_do_train": (str, type(None)),
    "t0_do_eval": (str, type(None)),
    "t0_blacklisted": (bool,),
}


def read_index(path: pathlib.Path) -> dict[str, dict[str, Any]] | None:
    """INDEX.json: task -> entry; None where there is no such file."""
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(index, dict):
        raise InputError(f"{path}: expected an object of tasks, found {_short(index)}")
    for task, entry in index.items():
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {task!r} must be an object, found {_short(entry)}")
        for key, types in _INDEX_TYPES.items():
            if key in entry and not isinstance(entry[key], types):
                expected = " or ".join(
                    "null" if kind is type(None) else kind.__name__ for kind in types
                )
                raise InputError(
                    f"{path}: {task!r}: {key!r} must be {expected}, found {_short(entry[key])}"
                )
    return index


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """One line's `inputs`, `targets` and `answer_choices` (a list, empty where there are none)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where}: not an example: nested too deeply") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, found {_short(row)}")
    for key in ("inputs", "targets"):
        if key not in row:
            raise InputError(f"{where}: no field {key!r} (found: {', '.join(row) or 'none'})")
        if not isinstance(row[key], str):
            raise InputError(f"{where}: {key!r} must be a string, found {_short(row[key])}")
    choices = row.get("answer_choices")
    choices = [] if choices is None else choices
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(
            f"{where}: 'answer_choices' must be a list of strings, found {_short(choices)}"
        )
    try:
        "".join((row["inputs"], row["targets"], *choices)).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InputError(
            f"{where}: half a surrogate pair, \\u{code:04x}, is no character"
        ) from None
    return {"inputs": row["inputs"], "targets": row["targets"], "answer_choices": choices}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:39] + '…'}"


def first_row(path: str) -> dict[str, Any]:
    """The first row of a file; InputError where it has none."""
    for number, _, line in _lines(path):
        return parse_row(line, f"{path}:{number}")
    raise InputError(f"{path}: no rows in it")


def _lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Line number, offset and bytes of every line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


@dataclasses.dataclass(frozen=True, eq=False)
class FileScan:
    """What reading a file through once has found."""

    offsets: np.ndarray  # int64 [rows]: where each row begins
    odd: Mapping[str, tuple[int, int]]  # kind -> number of rows, line of the first
    max_choices: int
    max_words: int  # of the longest input

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(self.offsets)


def scan_file(path: str, limit: int | None = None) -> FileScan:
    """Reads and checks a file (its first `limit` rows); remembered until the file changes.

    Raises InputError with file and line for a row that is malformed.
    """
    stat = os.stat(path)
    return _scan(path, stat.st_mtime_ns, stat.st_size, limit)


@functools.cache
def _scan(path: str, mtime: int, size: int, limit: int | None) -> FileScan:
    del mtime, size  # part of what is remembered
    offsets = array.array("q")
    odd: dict[str, tuple[int, int]] = {}
    max_choices = max_words = 0
    without_choices = []

    def count(kind: str, line: int) -> None:
        number, first = odd.get(kind, (0, line))
        odd[kind] = number + 1, first

    for number, offset, line in _lines(path):
        if limit is not None and len(offsets) >= limit:
            break
        row = parse_row(line, f"{path}:{number}")
        offsets.append(offset)
        max_words = max(max_words, len(row["inputs"].split()))
        if not row["inputs"].strip():
            count("empty_input", number)
        if not row["targets"].strip():
            count("empty_target", number)
        choices = [choice.strip() for choice in row["answer_choices"]]
        max_choices = max(max_choices, len(choices))
        if not choices:
            without_choices.append(number)
            continue
        if row["targets"].strip() not in choices:
            count("target_not_in_choices", number)
        if len(set(choices)) < len(choices):
            count("doubled_choices", number)
    if not offsets:
        raise InputError(f"{path}: no rows in it")
    if max_choices and without_choices:
        odd["no_choices"] = len(without_choices), without_choices[0]
    return FileScan(np.array(offsets, np.int64), odd, max_choices, max_words)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of some files under one numbering: file after file."""

    paths: Sequence[str]
    scans: Sequence[FileScan]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The number of each file's first row: int64 [files]."""
        return np.cumsum([0, *(scan.rows for scan in self.scans[:-1])])

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """The numbers, inputs, targets [N], choices [N, C] filled up with '', and how many [N]."""
        files = np.searchsorted(self.starts, numbers, side="right") - 1
        in_file = numbers - self.starts[files]
        rows: list[dict[str, Any]] = [{}] * len(numbers)
        order = np.argsort(files, kind="stable")
        for index, members in itertools.groupby(order, key=lambda i: files[i]):
            with open(self.paths[index], "rb") as file:
                for i in members:
                    offset = self.scans[index].offsets[in_file[i]]
                    file.seek(offset)
                    rows[i] = parse_row(file.readline(), f"{self.paths[index]}, byte {offset}")
        counts = np.array([len(row["answer_choices"]) for row in rows], np.int32)
        choices = np.full((len(rows), max(1, counts.max())), b"", object)
        for i, row in enumerate(rows):
            choices[i, : counts[i]] = [choice.encode() for choice in row["answer_choices"]]
        inputs, targets = (
            np.array([row[key].encode() for row in rows], object) for key in ("inputs", "targets")
        )
        return numbers.astype(np.int32), inputs, targets, choices, counts


def few(names: Sequence[str], most: int) -> str:
    """At most so many of the names, and how many more there are."""
    more = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
