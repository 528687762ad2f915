"""A folder of JSON lines as seqio tasks: train and score on your own prompts without seqio code.

The folder holds `<task>/<split>.jsonl` with an example per line: `{"inputs": str, "targets": str,
"answer_choices": [str]}`; the choices are optional. `register` adds to seqio's registries

- a task `<task>` with the splits that have a file;
- for each task with choices a `<task>_score_eval` in P3's form (see `score_eval`), with a metric,
  so that seqio's Evaluator and T5X score it too;
- the mixtures `jsonl_train`, `jsonl_score_eval`, and `jsonl_train_score_eval`, which scores the
  training tasks (so its accuracy is not zero-shot);
- the mixture `jsonl_decode` for `pemoe infer`: the tasks that EVAL_TASKS matches, with or without
  choices, or else the training tasks, or without any of these all tasks.

The split `validation` of a task is its evaluation split: the first of validation, val and test.

An optional `INDEX.json` maps a task to `dataset`, `subset`, `original_task`, `t0_do_train`,
`t0_do_eval`, `t0_blacklisted` and `metrics` (all optional). Roles follow P3: training if
`t0_do_train` is "BASE" and the task is not blacklisted; scoring if `t0_do_eval` is "BASE" and the
task is an original one with choices. A task has choices if a row of its evaluation split has some
(without one, of its train split). A task without roles is trained on, and a task without a dataset
is its own dataset. TRAIN_TASKS and EVAL_TASKS, lists of shell-style patterns (`*`, `?`, `[abc]`;
the whole name must match), override the roles.

A dataset is held out if one of its tasks has a `t0_do_eval` or is matched by EVAL_TASKS, whether or
not that task can be scored: none of its tasks is trained on, unless TRAIN_TASKS names it, and then
the summary warns.
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

# A task of a larger dataset is mixed at this rate, divided by the number of the dataset's tasks.
MAX_RATE = 500_000
_MIXTURES = (TRAIN_MIXTURE, SCORE_MIXTURE, TRAIN_SCORE_MIXTURE, DECODE_MIXTURE)
_USES = ("train", "eval", "train_eval", "decode")


@dataclasses.dataclass
class _Current:
    """The registered folder."""

    key: object = None  # arguments and file times that it was registered with
    tasks: JsonLinesTasks | None = None  # what `register` returned
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
      eval_examples: use only the first examples of every split but `train` (EVAL_EXAMPLES).
      use: mixtures whose files are read and checked now: 'train' (with the evaluation splits of its
        tasks, for the validation loss), 'eval', 'train_eval'. Other files are checked when they
        are read. With 'decode', rows of evaluation splits need no `targets`.

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

    # The files are read and checked before seqio, about 5 s, is imported.
    eval_splits: dict[str, str] = {}
    choices_files: dict[str, str] = {}  # the file of a task that decides whether it has choices
    for task, splits in files.items():
        split = seqio_tasks.first_eval_split(splits)
        if split is not None:
            eval_splits[task] = split
        else:
            split = "train" if "train" in splits else next(iter(splits))
        choices_files[task] = splits[split]
    has_choices = {task: files_lib.has_choices(path) for task, path in choices_files.items()}
    index = files_lib.read_index(index_path)
    tasks = roles.assign_roles(
        folder, files, index, has_choices, eval_splits, train_tasks, eval_tasks
    )
    for task in tasks.no_choices if "eval" in use else ():
        # Not left out as a task without choices where the rows are malformed.
        files_lib.scan_file(choices_files[task], limit=1, needs_targets=False)
    tasks = _read_files(tasks, files, use, eval_examples)

    vocabulary = load_vocabulary(vocab_path)
    seqio = seqio_import.import_seqio()
    registry = seqio.TaskRegistry.names()
    names = [*files, *(task + score_eval.SUFFIX for task in files if has_choices[task])]
    for name in names:
        if name in registry and name not in _current.names:
            raise InputError(f"{folder / name}: a seqio task named {name!r} exists already")

    # here, because importing `source` imports seqio
    from pemoe_jax.tasks.jsonl import source

    # Nothing below raises: a call that fails leaves the tasks of the earlier call as they were.
    remove()
    _current.names = names
    for task, splits in files.items():
        paths_by_split = dict(splits)
        if task in eval_splits:
            paths_by_split["validation"] = splits[eval_splits[task]]
        needs_targets = "decode" not in use
        source.add_tasks(
            task, has_choices[task], paths_by_split, vocabulary, eval_examples, needs_targets
        )
    sizes = collections.Counter(tasks.datasets[task] for task in files)
    rates = {task: _rate(sizes[tasks.datasets[task]]) for task in tasks.train_tasks}
    to_decode: Sequence[str] = tasks.train_tasks or [*files]
    if eval_tasks is not None:
        held_out = {*map(score_eval.plain_name, tasks.eval_tasks), *tasks.no_choices}
        to_decode = [task for task in files if task in held_out]
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
            provider = source.JsonLinesMixture(mixture, task_rates)
            seqio.MixtureRegistry.add_provider(mixture, provider)
        else:
            reasons = [f"{why}: {abbreviate(names, 3)}" for why, names in left_out.items() if names]
            reason = f"{folder} has no task to {purpose}"
            seqio_tasks.unavailable[mixture] = "; ".join([reason, *reasons])
    _current.key, _current.tasks = key, tasks
    return tasks


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
    for name, scored in (("eval", tasks.eval_tasks), ("train_eval", tasks.train_score_tasks)):
        if name in use:
            plain = map(score_eval.plain_name, scored)
            splits += [(task, tasks.eval_splits[task]) for task in plain]
    examples: dict[str, int] = {}
    odd: list[OddRows] = []
    max_choices = max_words = 0
    for task, split in dict.fromkeys(splits):  # a task can be both trained on and scored
        path = files[task][split]
        scan = files_lib.scan_file(path, None if split == "train" else eval_examples)
        name = task if split == "train" else task + score_eval.SUFFIX
        if name in tasks.datasets:  # a task without choices has no _score_eval task
            unscored, _ = scan.odd.get("no_choices", (0, 0))
            examples[name] = scan.num_rows - (unscored if name != task else 0)
        max_choices, max_words = max(max_choices, scan.max_choices), max(max_words, scan.max_words)
        for kind, (count, line) in scan.odd.items():
            odd.append(OddRows(task, split, kind, count, path, line))
    tasks = dataclasses.replace(
        tasks, examples=examples, odd=odd, max_choices=max_choices, max_words=max_words
    )
    counted = {
        name: files_lib.ODD_KINDS
        for task, split in splits
        if split == tasks.eval_splits.get(task)
        for name in (task, task + score_eval.SUFFIX)
    }
    return dataclasses.replace(tasks, summary=tasks.summarize(), counted_odd_rows=counted)


def _rate(tasks: int) -> Callable[[seqio.Task], float]:
    """Returns T0's mixing rate: the number of examples, capped if a dataset of `tasks` is large."""

    def rate(task: seqio.Task) -> float:
        examples = task.num_input_examples("train")
        return float(examples if examples <= MAX_RATE else MAX_RATE / tasks)

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
