"""A folder of JSON lines as seqio tasks: train and score on your own prompts without seqio code.

The folder holds `<task>/<split>.jsonl` with an example per line: `{"inputs": str, "targets": str,
"answer_choices": [str]}`; the choices are optional. `register` adds to seqio's registries

- a task `<task>` with the splits that have a file;
- for each task with choices, a task `<task>_score_eval` in P3's form (see `score_eval`). It has a
  metric, so that seqio's Evaluator and T5X can score it too;
- the mixtures `jsonl_train`, `jsonl_score_eval`, and `jsonl_train_score_eval`, which scores the
  training tasks (so its accuracy is not zero-shot);
- the mixture `jsonl_decode` for `pemoe infer`: the tasks that EVAL_TASKS matches, those without
  choices included. If EVAL_TASKS is not set, it has the training tasks, or all tasks if none is
  trained on.

A task's evaluation split is the first of validation, val and test that has a file. It is registered
as the split `validation`.

An optional `INDEX.json` maps a task to `dataset`, `subset`, `original_task`, `t0_do_train`,
`t0_do_eval`, `t0_blacklisted` and `metrics` (all optional). Roles follow P3:

- a task is trained on if `t0_do_train` is "BASE" and the task is not blacklisted;
- it is scored if `t0_do_eval` is "BASE" and it is an original task with choices;
- a task without roles is trained on, and a task without a dataset is its own dataset.

A task has choices if any row of its evaluation split has some; if it has no such split, its train
split decides. TRAIN_TASKS and EVAL_TASKS, lists of shell-style patterns (`*`, `?`, `[abc]`; the
whole name must match), override the roles.

A dataset is held out if one of its tasks has a `t0_do_eval` that is not empty, or is matched by
EVAL_TASKS, whether or not that task can be scored. No task of a held-out dataset is trained on,
unless TRAIN_TASKS names it; then the summary warns.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.jsonl import files as files_lib
from pemoe_jax.tasks.jsonl import roles
from pemoe_jax.tasks.jsonl.roles import (
    DECODE_MIXTURE,
    SCORE_MIXTURE,
    TRAIN_MIXTURE,
    TRAIN_SCORE_MIXTURE,
    JsonLinesTasks,
    OddRows,
)
from pemoe_jax.tasks.task_roles import abbreviate
from pemoe_jax.tasks.vocabulary import load_vocabulary, locate_vocabulary

if TYPE_CHECKING:
    import seqio

# A task with more training examples is mixed at this rate divided by the number of its dataset's
# tasks, as T0's tasks are.
MAX_RATE = 500_000
_MIXTURES = (TRAIN_MIXTURE, SCORE_MIXTURE, TRAIN_SCORE_MIXTURE, DECODE_MIXTURE)
_USES = ("train", "eval", "train_eval", "decode")


@dataclasses.dataclass
class _Current:
    """What is registered now: one folder at a time."""

    key: object = None  # the arguments of `register`, and the times and sizes of the files
    tasks: JsonLinesTasks | None = None  # the return value of `register`
    names: list[str] = dataclasses.field(default_factory=list)  # tasks in seqio's registry


_current = _Current()


def register(
    jsonl_dir: str | os.PathLike[str],
    vocab_path: str | os.PathLike[str],
    train_tasks: Sequence[str] | None = None,
    eval_tasks: Sequence[str] | None = None,
    eval_examples: int | None = None,
    use: Collection[str] = ("train", "eval"),
) -> JsonLinesTasks:
    """Registers a folder's tasks and mixtures, and removes those of an earlier call.

    Args:
      jsonl_dir: the folder (JSONL_DIR).
      vocab_path: see `load_vocabulary` (VOCAB_PATH).
      train_tasks: patterns of the tasks to train on (TRAIN_TASKS), instead of the training role.
      eval_tasks: patterns of the tasks to score (EVAL_TASKS), instead of the scoring role.
      eval_examples: maximum number of examples of every split but `train`, counted from its start
        (EVAL_EXAMPLES); None: all.
      use: what the tasks are used for: 'train', 'eval', 'train_eval' (scoring the training tasks),
        'decode'. The files that 'train', 'eval' and 'train_eval' read are checked now, all others
        when they are read. ('train' also reads the evaluation splits of the training tasks, for the
        validation loss.) With 'decode', rows need no `targets`, except those of train splits.

    Raises:
      InputError: an argument or a file is wrong; the tasks of an earlier call stay.
    """
    if eval_examples is not None:
        check_integer("EVAL_EXAMPLES", eval_examples)
    if isinstance(use, str) or not set(use) <= set(_USES):
        raise InputError(f"use must be a list of {', '.join(map(repr, _USES))}, got {use!r}")
    folder = pathlib.Path(jsonl_dir).expanduser().absolute()
    files = files_lib.find_files(folder)
    for task in files:
        plain = score_eval.plain_name(task)
        if task in _MIXTURES or (plain != task and plain in files):
            raise InputError(f"{folder / task}: the name {task!r} is reserved: rename the folder")
    vocabulary_file = locate_vocabulary(vocab_path)
    index_path = folder / "INDEX.json"
    paths = [pathlib.Path(path) for splits in files.values() for path in splits.values()]
    stats = {path: path.stat() for path in (*paths, index_path) if path.exists()}
    # Everything that the tasks depend on: T5X calls `register` for each of its datasets, and a
    # second registration would replace tasks that are being read.
    key = (
        str(folder),
        tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()),
        vocabulary_file,
        repr((train_tasks, eval_tasks, eval_examples, sorted(use))),
    )
    if _current.tasks and _current.key == key:
        registry = seqio_import.import_seqio().TaskRegistry.names()
        if set(_current.names) <= set(registry):
            return _current.tasks

    # The files are read and checked before seqio is imported, so that a mistake is reported at once
    # and not after 5 s.
    eval_splits = {
        task: split
        for task, splits in files.items()
        if (split := seqio_tasks.first_eval_split(splits)) is not None
    }
    # The file of each task that decides whether the task has choices.
    choices_files = {task: splits[eval_splits.get(task, "train")] for task, splits in files.items()}
    has_choices = {task: files_lib.has_choices(path) for task, path in choices_files.items()}
    index = files_lib.read_index(index_path)
    tasks = roles.assign_roles(
        folder, files, index, has_choices, eval_splits, train_tasks, eval_tasks
    )
    for task in tasks.no_choices if "eval" in use else ():
        # Malformed rows count as rows without choices above. This raises the error that they have.
        files_lib.scan_file(choices_files[task], limit=1, needs_targets=False)
    tasks = _read_files(tasks, files, use, eval_examples)

    vocabulary = load_vocabulary(vocab_path)
    seqio = seqio_import.import_seqio()
    registry = seqio.TaskRegistry.names()
    names = [*files, *(task + score_eval.SUFFIX for task in files if has_choices[task])]
    for name in names:
        if name in registry and name not in _current.names:
            raise InputError(f"{folder / name}: a seqio task named {name!r} exists already")

    # Imported here, because it imports seqio.
    from pemoe_jax.tasks.jsonl import source

    # Nothing below raises: a call that fails leaves the tasks of the earlier call as they were.
    remove()
    _current.names = names
    needs_targets = "decode" not in use
    for task, splits in files.items():
        paths_by_split = dict(splits)
        if task in eval_splits:
            paths_by_split["validation"] = splits[eval_splits[task]]
        source.add_tasks(
            task, has_choices[task], paths_by_split, vocabulary, eval_examples, needs_targets
        )
    to_decode: Sequence[str] = tasks.train_tasks or [*files]
    if eval_tasks is not None:
        matched = {*map(score_eval.plain_name, tasks.eval_tasks), *tasks.no_choices}
        to_decode = [task for task in files if task in matched]
    _add_mixtures(folder, tasks, files, to_decode)
    _current.key, _current.tasks = key, tasks
    return tasks


def _add_mixtures(
    folder: pathlib.Path, tasks: JsonLinesTasks, files: Collection[str], to_decode: Sequence[str]
) -> None:
    """Registers the mixtures that have tasks; records why the others are unavailable.

    Args:
      folder: JSONL_DIR, for messages.
      tasks: the tasks by role.
      files: names of all tasks, without `_score_eval` tasks.
      to_decode: tasks of the mixture DECODE_MIXTURE.
    """
    from pemoe_jax.tasks.jsonl import source

    registry = seqio_import.import_seqio().MixtureRegistry
    dataset_sizes = collections.Counter(tasks.datasets[task] for task in files)  # in tasks
    rates = {task: _make_rate(dataset_sizes[tasks.datasets[task]]) for task in tasks.train_tasks}
    unscored = {
        "without answer_choices": tasks.no_choices,
        f"without an evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})": tasks.no_eval_split,
    }
    for mixture, members, purpose, left_out in (
        (
            TRAIN_MIXTURE,
            tasks.train_tasks,
            "train on",
            {"held-out datasets": tasks.held_out, "without a train split": tasks.no_train_split},
        ),
        (
            SCORE_MIXTURE,
            tasks.eval_tasks,
            "score (EVAL_TASKS or roles in INDEX.json choose them)",
            unscored,
        ),
        (
            TRAIN_SCORE_MIXTURE,
            tasks.train_score_tasks,
            "train on that has answer choices and an evaluation split",
            {},
        ),
        (DECODE_MIXTURE, to_decode, "decode", {}),
    ):
        seqio_tasks.unavailable.pop(mixture, None)
        if members:
            task_rates = [(task, rates.get(task, 1.0)) for task in members]
            registry.add_provider(mixture, source.JsonLinesMixture(mixture, task_rates))
        else:
            reasons = [f"{why}: {abbreviate(names, 3)}" for why, names in left_out.items() if names]
            reason = f"{folder} has no task to {purpose}"
            seqio_tasks.unavailable[mixture] = "; ".join([reason, *reasons])


def _read_files(
    tasks: JsonLinesTasks,
    files: Mapping[str, Mapping[str, str]],
    use: Collection[str],
    eval_examples: int | None,
) -> JsonLinesTasks:
    """Reads each file that `use` asks for, and adds its statistics and the summary to `tasks`."""
    splits: list[tuple[str, str]] = []  # task, split
    if "train" in use:
        for task in tasks.train_tasks:
            splits.append((task, "train"))
            if task in tasks.eval_splits:  # for the validation loss
                splits.append((task, tasks.eval_splits[task]))
    for purpose, scored in (("eval", tasks.eval_tasks), ("train_eval", tasks.train_score_tasks)):
        if purpose in use:
            plain = map(score_eval.plain_name, scored)
            splits += [(task, tasks.eval_splits[task]) for task in plain]
    examples: dict[str, int] = {}
    odd: list[OddRows] = []
    # The longest input and the most choices of any row, for the summary.
    max_choices = max_words = 0
    for task, split in dict.fromkeys(splits):  # a task can be both trained on and scored
        path = files[task][split]
        scan = files_lib.scan_file(path, None if split == "train" else eval_examples)
        name = task if split == "train" else task + score_eval.SUFFIX
        if name in tasks.datasets:  # a task without choices has no _score_eval task
            num_unscored, _ = scan.odd.get("no_choices", (0, 0))
            examples[name] = scan.num_rows - (num_unscored if name != task else 0)
        max_choices, max_words = max(max_choices, scan.max_choices), max(max_words, scan.max_words)
        for kind, (count, line) in scan.odd.items():
            odd.append(OddRows(task, split, kind, count, path, line))
    tasks = dataclasses.replace(
        tasks, examples=examples, odd=odd, max_choices=max_choices, max_words=max_words
    )
    # Rows of an evaluation split are read under both of its tasks' names.
    counted = {
        name: files_lib.ODD_KINDS
        for task, split in splits
        if split == tasks.eval_splits.get(task)
        for name in (task, task + score_eval.SUFFIX)
    }
    return dataclasses.replace(tasks, summary=tasks.summarize(), counted_odd_rows=counted)


def _make_rate(num_tasks: int) -> Callable[[seqio.Task], float]:
    """Returns the function from a task to its mixing rate, as in T0.

    The rate is the task's number of training examples, or MAX_RATE / `num_tasks` if the task has
    more than MAX_RATE; `num_tasks` is the number of tasks of its dataset.
    """

    def rate(task: seqio.Task) -> float:
        examples = task.num_input_examples("train")
        return float(examples if examples <= MAX_RATE else MAX_RATE / num_tasks)

    return rate


def remove() -> None:
    """Removes everything that `register` added to seqio's registries."""
    if not _current.names:
        return
    seqio = seqio_import.import_seqio()
    for name in _current.names:
        seqio.TaskRegistry.remove(name)
    for mixture in _MIXTURES:
        seqio.MixtureRegistry.remove(mixture)
    _current.key, _current.tasks, _current.names = None, None, []
