"""A folder of JSON lines as seqio tasks: train and score on your own prompts without seqio code.

The folder holds `<task>/<split>.jsonl`, a line an example: `{"inputs": str, "targets": str,
"answer_choices": [str]}`, the last only where there are choices. `register` turns it into

- a seqio task `<task>`, with the splits that have a file;
- for every task with choices a twin `<task>_score_eval` in the form of P3's: a row a choice, with
  `idx` [example, choice], `is_correct` and `weight`, and a metric, so that seqio's Evaluator and
  T5X score it too;
- the mixtures `jsonl_train`, `jsonl_score_eval` and `jsonl_train_score_eval`, the twins of the
  tasks trained on that have an evaluation split (their accuracy is not a zero-shot one).

Of both kinds of task the split `validation` is the evaluation split: the first of validation, val
and test.

An optional `INDEX.json` maps a task to `dataset`, `subset`, `original_task`, `t0_do_train`,
`t0_do_eval` and `t0_blacklisted` (all optional). With roles in it, P3's are: training `t0_do_train
== "BASE"` and not blacklisted; evaluation `t0_do_eval == "BASE"`, original task, with choices. A
task without roles in it is for training, and one without a data set is a data set of its own.
TRAIN_TASKS and EVAL_TASKS, lists of shell-style patterns (`*`, `?`, `[abc]`; the whole name must
match), override the roles.

A data set that any template has the evaluation role for, or that EVAL_TASKS takes a task of, is
held out: none of its tasks is trained on, unless TRAIN_TASKS names it, and then the summary says
so.

`jsonl_files` reads the folder, `jsonl_roles` decides who is trained on and scored, and
`jsonl_source` is what seqio sees.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.tasks.jsonl import files as files_lib
from pemoe_jax.tasks.jsonl import roles
from pemoe_jax.tasks.jsonl.roles import (
    SCORE_EVAL,
    SCORE_MIXTURE,
    TRAIN_MIXTURE,
    TRAIN_SCORE_MIXTURE,
    OddRows,
    Registered,
)

# T0: a data set beyond this many examples counts as this many, shared by its templates.
MAX_RATE = 500_000
_USES = ("train", "eval", "train_eval")


@dataclasses.dataclass
class _State:
    """What is registered now."""

    key: Any = None  # of the arguments and files that it was made from
    registered: Registered | None = None
    tasks: list[str] = dataclasses.field(default_factory=list)


_state = _State()


def register(
    jsonl_dir: str | os.PathLike[str],
    vocab_path: str | os.PathLike[str],
    train_tasks: Sequence[str] | None = None,
    eval_tasks: Sequence[str] | None = None,
    eval_examples: int | None = None,
    use: Sequence[str] = ("train", "eval"),
) -> Registered:
    """Registers a folder's tasks, twins and mixtures, in place of an earlier call's.

    Args:
      jsonl_dir: the folder (JSONL_DIR).
      vocab_path: a SentencePiece model with pad 0, eos 1, unk 2 (VOCAB_PATH).
      train_tasks: patterns of the tasks to train on (TRAIN_TASKS), instead of those with the
      training role.
      eval_tasks: patterns of the tasks to score (EVAL_TASKS), instead of those with the evaluation
      role.
      eval_examples: at most this many examples, the first, of every split but `train`
      (EVAL_EXAMPLES).
      use: which mixtures' files to read through and check now: 'train' (the evaluation splits of
      its tasks too, for the loss on them), 'eval', 'train_eval'. Others are checked when used.

    Raises InputError for whatever is wrong with the arguments or in the files, and then changes
    nothing.
    """
    if eval_examples is not None and (not isinstance(eval_examples, int) or eval_examples < 1):
        raise InputError(
            f"EVAL_EXAMPLES must be a positive integer or None, found {eval_examples!r}"
        )
    if isinstance(use, str) or not set(use) <= set(_USES):
        raise InputError(f"use must be a list of {', '.join(map(repr, _USES))}, found {use!r}")
    folder = pathlib.Path(jsonl_dir).expanduser().absolute()
    files = files_lib.find_files(folder)
    _check_names(folder, files)
    vocab = vocabulary(vocab_path)
    index_path = folder / "INDEX.json"
    paths = [path for splits in files.values() for path in splits.values()]
    stats = [(path, os.stat(path)) for path in paths]
    key = (
        str(folder),
        tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats),
        index_path.stat().st_mtime_ns if index_path.exists() else None,
        id(vocab),
        repr((train_tasks, eval_tasks, eval_examples, sorted(use))),
    )
    names = seqio_import.import_seqio().TaskRegistry.names()
    if _state.registered and _state.key == key and all(task in names for task in _state.tasks):
        return _state.registered

    eval_splits = {}
    has_choices = {}
    for task, splits in files.items():
        split = next((split for split in seqio_tasks.EVAL_SPLITS if split in splits), None)
        if split is not None:
            eval_splits[task] = split
        elif "train" in splits:
            split = "train"
        else:
            split = next(iter(splits))
        has_choices[task] = bool(files_lib.first_row(splits[split])["answer_choices"])
    registered = roles.plan(
        str(folder),
        files,
        files_lib.read_index(index_path),
        has_choices,
        eval_splits,
        train_tasks,
        eval_tasks,
    )
    registered = _read_through(registered, files, use, eval_examples)

    twins = {task: task + SCORE_EVAL for task in files if has_choices[task]}
    made = [*files, *twins.values()]
    taken = [task for task in made if task in names and task not in _state.tasks]
    if taken:
        raise InputError(
            f"{folder / taken[0]}: another seqio task {taken[0]!r} is registered already"
        )
    from pemoe_jax.tasks.jsonl import source

    _remove()
    _state.tasks = made
    for task, splits in files.items():
        split_paths = dict(splits)
        if task in eval_splits:
            split_paths["validation"] = splits[eval_splits[task]]
        source.add_task(task, twins.get(task), split_paths, vocab, eval_examples)
    templates = collections.Counter(registered.datasets[task] for task in files)
    rates = {task: _rate(templates[registered.datasets[task]]) for task in registered.train_tasks}
    _add_mixture(TRAIN_MIXTURE, rates, f"{folder} has no task to train on")
    _add_mixture(
        SCORE_MIXTURE,
        dict.fromkeys(registered.eval_tasks, 1.0),
        f"{folder} has no task to score (EVAL_TASKS, or roles in INDEX.json, choose them)",
    )
    _add_mixture(
        TRAIN_SCORE_MIXTURE,
        dict.fromkeys(registered.train_score_tasks, 1.0),
        f"{folder} has no task to train on that has answer choices and an evaluation split",
    )
    _state.key, _state.registered = key, registered
    return registered


def _check_names(folder: pathlib.Path, files: Mapping[str, Any]) -> None:
    for task in files:
        base = task.removesuffix(SCORE_EVAL)
        mixtures = (TRAIN_MIXTURE, SCORE_MIXTURE, TRAIN_SCORE_MIXTURE)
        if task in mixtures or (base != task and base in files):
            raise InputError(
                f"{folder / task}: {task!r} is the name that register gives to what it makes"
            )


def _read_through(
    registered: Registered,
    files: Mapping[str, Mapping[str, str]],
    use: Sequence[str],
    eval_examples: int | None,
) -> Registered:
    """With what is found in the files that `use` asks for, each read through once."""
    splits = registered.eval_splits
    used: list[tuple[str, str]] = []  # task, split
    if "train" in use:
        for task in registered.train_tasks:
            used.append((task, "train"))
            if task in splits:  # for the loss on it
                used.append((task, splits[task]))
    for name, twins in (
        ("eval", registered.eval_tasks),
        ("train_eval", registered.train_score_tasks),
    ):
        if name in use:
            tasks = [twin.removesuffix(SCORE_EVAL) for twin in twins]
            used += [(task, splits[task]) for task in tasks]
    examples: dict[str, int] = {}
    odd: list[OddRows] = []
    max_choices = max_words = 0
    for task, split in dict.fromkeys(used):  # one may be trained on and scored
        path = files[task][split]
        scan = files_lib.scan_file(path, None if split == "train" else eval_examples)
        name = task if split == "train" else task + SCORE_EVAL
        if name in registered.datasets:  # a task without choices has no twin
            examples[name] = scan.rows
        max_choices, max_words = max(max_choices, scan.max_choices), max(max_words, scan.max_words)
        for kind, (count, line) in scan.odd.items():
            odd.append(OddRows(task, split, kind, count, path, line))
    return dataclasses.replace(
        registered, examples=examples, odd=odd, max_choices=max_choices, max_words=max_words
    )


def _rate(templates: int) -> Callable[[Any], float]:
    """T0's: the number of examples, or beyond 500,000 that, shared by the data set's templates."""

    def rate(task: Any) -> float:
        examples = task.num_input_examples("train")
        return float(examples if examples <= MAX_RATE else MAX_RATE / templates)

    return rate


def _remove() -> None:
    seqio = seqio_import.import_seqio()
    for task in _state.tasks:
        seqio.TaskRegistry.remove(task)
    for mixture in (TRAIN_MIXTURE, SCORE_MIXTURE, TRAIN_SCORE_MIXTURE):
        seqio.MixtureRegistry.remove(mixture)
    _state.key, _state.registered, _state.tasks = None, None, []


def _add_mixture(name: str, rates: Mapping[str, Any], why_not: str) -> None:
    """Registers a mixture, or without tasks why there is none of this name."""
    from pemoe_jax.tasks.jsonl import source

    seqio_tasks.unavailable.pop(name, None)
    if rates:
        mixture = source.JsonLinesMixture(name, list(rates.items()))
        seqio_import.import_seqio().MixtureRegistry.add_provider(name, mixture)
    else:
        seqio_tasks.unavailable[name] = why_not


def vocabulary(path: str | os.PathLike[str]) -> Any:
    """The seqio vocabulary of a SentencePiece file with T5's 100 sentinels; one object a file.

    Raises:
      InputError: there is no such file, or it is no SentencePiece model with T5's special ids.
    """
    if "://" in os.fspath(path):  # the libraries below read it where it is
        return _load_vocabulary(os.fspath(path), 0)
    found = pathlib.Path(path).expanduser().absolute()
    if not found.is_file():
        raise InputError(f"VOCAB_PATH must be a SentencePiece model file; there is none at {path}")
    return _load_vocabulary(str(found), found.stat().st_mtime_ns)


@functools.cache
def _load_vocabulary(path: str, mtime: int) -> Any:
    del mtime
    seqio = seqio_import.import_seqio()
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=100)
    try:
        ids = vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id
    except Exception as error:  # protobuf's, sentencepiece's and tensorflow's own kinds
        message = str(error).strip().split("\n")[0]
        if "://" in path:
            raise InputError(
                f"VOCAB_PATH {path} cannot be read: {message}; name a local copy of the base's"
                " SentencePiece file by --gin.VOCAB_PATH or in the environment's PEMOE_VOCAB_PATH"
            ) from None
        raise InputError(f"VOCAB_PATH {path} is not a SentencePiece model: {message}") from None
    if ids != (0, 1, 2):
        raise InputError(f"VOCAB_PATH {path}: expected pad, eos, unk at ids (0, 1, 2), found {ids}")
    return vocabulary
