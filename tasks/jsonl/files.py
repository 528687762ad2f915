"""Files of a folder `<task>/<split>.jsonl`: listing them, checking their lines, reading rows.

Nothing here imports seqio or TensorFlow.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import difflib
import functools
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import row_checks
from pemoe_jax.data.row_reader import read_parts
from pemoe_jax.data.seqio_tasks import EVAL_SPLITS
from pemoe_jax.tasks import metrics
from pemoe_jax.tasks.task_roles import abbreviate

_SPLITS = ("train", *EVAL_SPLITS)


def find_files(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Lists the folder's files.

    Returns:
      Task -> split -> path.

    Raises:
      InputError: the folder does not exist or has no <task>/<split>.jsonl, or a task or a file has
        an unusable name.
    """
    if not folder.exists():
        raise InputError(f"JSONL_DIR {folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"JSONL_DIR {folder} must be a folder of <task>/<split>.jsonl, got a file")
    files: dict[str, dict[str, str]] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        paths = [path for path in sorted(entry.iterdir()) if path.is_file()]
        splits = {path.stem: str(path) for path in paths if path.suffix == ".jsonl"}
        _check_file_names(entry, paths, splits)
        if not splits:
            continue
        # seqio's registries accept no other names.
        if not re.fullmatch(r"[\w.:#]+", entry.name):
            raise InputError(f"{entry}: a task's name must have only letters, digits and _ . : #")
        files[entry.name] = splits
    if not files:
        loose = sorted(path.name for path in folder.glob("*.jsonl"))
        content = f"{abbreviate(loose, 3)} directly in it" if loose else "none"
        raise InputError(f"JSONL_DIR {folder} must hold <task>/<split>.jsonl, got {content}")
    return files


def _check_file_names(
    folder: pathlib.Path, paths: Sequence[pathlib.Path], splits: Collection[str]
) -> None:
    """Raises InputError for a misnamed file of a task, which would be left out silently.

    Args:
      folder: the task's folder.
      paths: its files.
      splits: names of its .jsonl files without the suffix.
    """
    # Files that are named like a split, whatever their suffix: train.json, validation.jsonl.gz.
    named = [path for path in paths if path.name.partition(".")[0] in (*_SPLITS, "dev")]
    if not set(splits) & set(_SPLITS) and (splits or named):
        expected = ", ".join(f"{split}.jsonl" for split in _SPLITS)
        got = abbreviate([path.name for path in named] or [f"{s}.jsonl" for s in splits], 3)
        raise InputError(f"{folder}: expected one of {expected}, got {got}")
    has_eval = not set(splits).isdisjoint(EVAL_SPLITS)
    for path in named if splits else ():
        split = path.name.partition(".")[0]
        # dev.jsonl may stay beside an evaluation split, but it is none itself.
        if split not in splits or (split == "dev" and not has_eval):
            expected = "validation" if split == "dev" else split
            raise InputError(f"{folder}: expected {expected}.jsonl, got {path.name}")


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """A task's entry in INDEX.json; the default values hold for a task without an entry.

    Attributes:
      dataset, subset: the dataset that the task is a prompt of.
      original_task: whether the prompt asks for what the dataset was made for.
      has_roles: whether the entry has `t0_do_train` or `t0_do_eval`.
      t0_do_train, t0_do_eval: T0's roles, see `jsonl`.
      t0_blacklisted: whether T0 left the task out of its training mixture.
      metrics: names of the metrics of generated text.
    """

    dataset: str | None = None
    subset: str | None = None
    original_task: bool = True
    has_roles: bool = False
    t0_do_train: str | None = None
    t0_do_eval: str | None = None
    t0_blacklisted: bool = False
    metrics: tuple[str, ...] = metrics.DEFAULT_METRICS

    @property
    def dataset_name(self) -> str:
        """The dataset's name in tables; '' if the entry has no dataset.

        SuperGLUE's datasets go by their own names, such as 'rte'.
        """
        if not self.dataset or not self.subset:
            return self.dataset or ""
        return self.subset if self.dataset == "super_glue" else f"{self.dataset}_{self.subset}"


_OPTIONAL_STRINGS = ("dataset", "subset", "t0_do_train", "t0_do_eval")
_BOOLEANS = ("original_task", "t0_blacklisted")
_KEYS = (*_OPTIONAL_STRINGS, *_BOOLEANS, "metrics")
# Keys that describe the rows, in tables of P3 and in the quickstart. They have no effect.
# (Tuples in the tuple, so that the formatter keeps several names on a line.)
_NOTES = (
    *("choices_in_prompt", "fixed_answer_choices", "has_answer_choices", "n", "row_source_split"),
    *("skipped_empty", "t0_train_size", "targets_not_in_choices", "task_type", "template"),
    *("template_id", "comment"),
)
# The values that each role may have.
_ROLES = {
    "t0_do_train": ("BASE", "GPT_EVAL", "SGLUE", ""),
    "t0_do_eval": ("BASE", "BIAS_FAIRNESS", ""),
}


def read_index(path: pathlib.Path) -> dict[str, TaskInfo] | None:
    """Reads INDEX.json.

    Returns:
      Task -> its entry; None if the file does not exist.

    Raises:
      InputError: the file is not JSON, or an entry has an unknown key, an unknown role or a value
        of a wrong type.
    """
    if not path.exists():
        return None
    index = row_checks.read_object(path)
    return {task: _parse_entry(entry, f"{path}: {task!r}") for task, entry in index.items()}


def _parse_entry(entry: object, where: str) -> TaskInfo:
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object, got {row_checks.describe_value(entry)}")
    for key in entry:
        if key not in (*_KEYS, *_NOTES):  # a misspelled role would be ignored
            near = difflib.get_close_matches(key.lower().strip(), (*_KEYS, *_NOTES), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(_KEYS)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
    known = {key: entry[key] for key in (*_OPTIONAL_STRINGS, *_BOOLEANS) if key in entry}
    for key, value in known.items():
        types, expected = (bool, "bool") if key in _BOOLEANS else (str | None, "str or null")
        if not isinstance(value, types):
            raise InputError(
                f"{where}: {key!r} must be {expected}, got {row_checks.describe_value(value)}"
            )
    for key, roles in _ROLES.items():
        if known.get(key) not in (None, *roles):
            near = difflib.get_close_matches(known[key].upper().strip(), roles, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(roles)}"
            raise InputError(f"{where}: {key!r}: unknown role {known[key]!r}; {hint}")
    names = metrics.check_names(entry.get("metrics", metrics.DEFAULT_METRICS), where)
    has_roles = "t0_do_train" in entry or "t0_do_eval" in entry
    return TaskInfo(**known, has_roles=has_roles, metrics=tuple(names))


class Example(NamedTuple):
    """The example in a line of a file."""

    inputs: str
    targets: str
    answer_choices: list[str]  # empty if the line has none


def parse_line(line: bytes, where: str, needs_targets: bool = True) -> Example:
    """Parses a line.

    Args:
      line: the line.
      where: the file and the line, for errors.
      needs_targets: whether `targets` is required; otherwise a missing one is read as ''.

    Raises:
      InputError: the line is not a JSON object with the fields of an example.
    """
    fields = row_checks.parse_object(line, where)
    if not needs_targets and fields.get("targets") is None:
        fields["targets"] = ""
    row = row_checks.check_row(fields, where)
    return Example(row.texts["inputs"], row.texts["targets"], row.answer_choices)


def has_choices(path: str) -> bool:
    """Returns whether any row of a file has answer choices; cached until the file changes.

    Reads up to the first such row, and skips malformed rows. These are an error once the file is
    used; a file that is not used may hold anything.

    Raises:
      InputError: the file has no row.
    """
    stat = os.stat(path)
    return _has_choices(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _has_choices(path: str, modified: int, size: int) -> bool:
    del modified, size  # they are arguments to be part of the cache's key
    number = 0
    for number, _, line in _lines(path):
        # A folder may hold all of P3, so only lines that seem to have the field are parsed.
        if b'"answer_choices"' in line:
            with contextlib.suppress(InputError):
                if parse_line(line, f"{path}:{number}").answer_choices:
                    return True
    if not number:
        raise InputError(f"{path}: expected at least one row, got none")
    return False


def _lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number (from 1), offset and bytes of every line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


# The kinds of odd rows that a scan counts: keys of `row_checks.ODD_ROWS`, which describes them.
ODD_KINDS = (
    "target_not_in_choices",
    "doubled_choices",
    "no_choices",
    "empty_input",
    "empty_target",
)


@dataclasses.dataclass(frozen=True, eq=False)
class FileScan:
    """The rows of a file and their statistics.

    Attributes:
      offsets: int64 [rows], the byte that each row begins at.
      odd: kind of odd row -> (number of such rows, line of the first).
      max_choices: most answer choices of a row.
      max_words: words of the longest input.
      needs_targets: whether `targets` is required, also when the rows are read again.
    """

    offsets: np.ndarray
    odd: Mapping[str, tuple[int, int]]
    max_choices: int
    max_words: int
    needs_targets: bool = True

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets)


def scan_file(path: str, limit: int | None = None, needs_targets: bool = True) -> FileScan:
    """Reads and checks a file or its first `limit` rows; cached until the file changes.

    See `parse_line` for `needs_targets`.

    Raises:
      InputError: a row is malformed, or the file has none.
    """
    stat = os.stat(path)
    return _scan(path, stat.st_mtime_ns, stat.st_size, limit, needs_targets)


@functools.cache
def _scan(path: str, modified: int, size: int, limit: int | None, needs_targets: bool) -> FileScan:
    del modified, size  # they are arguments to be part of the cache's key
    # An array takes 8 bytes a row, a list of int would take 40.
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
        example = parse_line(line, f"{path}:{number}", needs_targets)
        offsets.append(offset)
        max_words = max(max_words, len(example.inputs.split()))
        max_choices = max(max_choices, len(example.answer_choices))
        if not example.answer_choices:
            without_choices.append(number)
        for kind in row_checks.find_odd_kinds(*example):
            count(kind, number)
    if not offsets:
        raise InputError(f"{path}: expected at least one row, got none")
    # A row without choices is odd only if other rows of the file have some.
    if max_choices and without_choices:
        odd["no_choices"] = len(without_choices), without_choices[0]
    return FileScan(np.array(offsets, np.int64), odd, max_choices, max_words, needs_targets)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of several files, numbered file after file."""

    paths: Sequence[str]
    scans: Sequence[FileScan]

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Index of each file's first row: int64 [files]."""
        return np.cumsum([0, *(scan.num_rows for scan in self.scans[:-1])])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Reads rows.

        Args:
          indices: int64 [N], in any order.

        Returns:
          Indices int32 [N]; inputs and targets, bytes [N]; answer choices, bytes [N, C], padded
          with b""; numbers of choices, int32 [N].
        """
        rows = read_parts(self.starts, indices, self._read_file)
        counts = np.array([len(row.answer_choices) for row in rows], np.int32)
        choices = np.full((len(rows), max(1, counts.max())), b"", object)
        for i, row in enumerate(rows):
            choices[i, : counts[i]] = [choice.encode() for choice in row.answer_choices]
        inputs = np.array([row.inputs.encode() for row in rows], object)
        targets = np.array([row.targets.encode() for row in rows], object)
        return indices.astype(np.int32), inputs, targets, choices, counts

    def _read_file(self, index: int, rows: list[int]) -> list[Example]:
        path, scan = self.paths[index], self.scans[index]
        examples = []
        with open(path, "rb") as file:
            for offset in scan.offsets[rows].tolist():
                file.seek(offset)
                where = f"{path}, byte {offset}"
                examples.append(parse_line(file.readline(), where, scan.needs_targets))
        return examples
