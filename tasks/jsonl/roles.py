"""Roles of the tasks of a folder of JSON lines: training, scoring, held out."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.data import row_checks, seqio_tasks
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.jsonl.files import TaskInfo
from pemoe_jax.tasks.task_roles import TaskRoles, abbreviate

TRAIN_MIXTURE = "jsonl_train"
SCORE_MIXTURE = "jsonl_score_eval"
TRAIN_SCORE_MIXTURE = "jsonl_train_score_eval"
DECODE_MIXTURE = "jsonl_decode"


@dataclasses.dataclass(frozen=True)
class OddRows:
    """Odd rows of one kind in a file: they are valid, but change what a score means."""

    task: str
    split: str
    kind: str  # a key of `row_checks.ODD_ROWS`
    count: int
    path: str
    line: int  # number of the first one


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLinesTasks(TaskRoles):
    """The tasks of a folder of JSON lines, and those that were left out.

    Attributes:
      has_index: whether the folder has an INDEX.json.
      held_out: datasets with a task to evaluate; they are not trained on.
      held_out_skipped: tasks with the training role whose dataset is held out.
      held_out_trained: tasks of held-out datasets that TRAIN_TASKS names.
      named_like_held_out: tasks to train on that may belong to a held-out dataset. Either they have
        no dataset in INDEX.json, and their name begins like that of a held-out task or dataset; or
        they have the dataset of a held-out task, and one of the two names no subset.
      no_train_split: tasks with the training role but no train split.
      no_eval_split: tasks with a role but no evaluation split.
      no_choices: tasks to score that have no answer choices.
      not_in_index: tasks without an entry in INDEX.json.
      examples: numbers of rows of the files that were read: for a task, the train split; for a
        `_score_eval` task, the evaluation split.
      odd: odd rows of the files that were read.
      max_choices: most answer choices of a row in these files.
      max_words: words of the longest input in these files.
    """

    has_index: bool
    held_out: list[str]
    held_out_skipped: list[str]
    held_out_trained: list[str]
    named_like_held_out: list[str]
    no_train_split: list[str]
    no_eval_split: list[str]
    no_choices: list[str]
    not_in_index: list[str]
    examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    odd: Sequence[OddRows] = ()
    max_choices: int = 0
    max_words: int = 0

    def summarize(self) -> list[str]:
        """Returns the lines of the summary, with warnings and odd rows at the end."""
        tasks = [task for task in self.datasets if not self._is_score_eval(task)]
        names = {self.datasets[task] for task in tasks}
        source = "datasets from INDEX.json" if self.has_index else "no INDEX.json"
        counts = f"{plural(len(tasks), 'task')}, {plural(len(names), 'dataset')}"
        lines = [f"{self.folder}: {counts} ({source})"]
        lines.append(self._describe_role("training", self.train_tasks, TRAIN_MIXTURE))
        lines.append(self._describe_role("scoring", self.eval_tasks, SCORE_MIXTURE))
        if self.train_score_tasks:
            role = "scoring of training tasks"
            lines.append(self._describe_role(role, self.train_score_tasks, TRAIN_SCORE_MIXTURE))
        if self.held_out:
            lines.append(f"held out: {abbreviate(self.held_out, 12)}")
        for tasks, message in (
            (self.held_out_trained, "WARNING: held out, but trained on because of TRAIN_TASKS"),
            (
                self.named_like_held_out,
                "WARNING: trained on, but named like a held-out dataset (if a task is a prompt of"
                " that dataset, set its 'dataset' in INDEX.json)",
            ),
            (self.held_out_skipped, "held out, so not trained on"),
            (self.no_train_split, "no train split, so not trained on"),
            (self.no_eval_split, f"no evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"),
            (self.no_choices, "no answer choices, so not scored"),
            (self.not_in_index, "not in INDEX.json"),
        ):
            if tasks:
                lines.append(f"{message}: {plural(len(tasks), 'task')} ({abbreviate(tasks, 3)})")
        odd_counts: collections.Counter[str] = collections.Counter()
        for odd in self.odd:
            odd_counts[odd.kind] += odd.count
        places = [(o.kind, f"{o.task}/{pathlib.Path(o.path).name}:{o.line}") for o in self.odd]
        lines += row_checks.describe_odd_rows(places, odd_counts)
        if self.max_words:
            choices = f"; up to {self.max_choices} choices" if self.max_choices else ""
            lines.append(f"longest input: {self.max_words:,} words{choices}")
        return lines

    def _describe_role(self, role: str, names: Sequence[str], mixture: str) -> str:
        """Returns '<role>: <numbers of tasks, datasets, examples> (<mixture>): <datasets>'."""
        if not names:
            return f"{role}: no task"
        datasets = self.datasets_of(names)
        examples = ""
        # Only files that this run reads are counted.
        if all(name in self.examples for name in names):
            examples = ", " + plural(sum(self.examples[name] for name in names), "example")
        return (
            f"{role}: {plural(len(names), 'task')} of {plural(len(datasets), 'dataset')}{examples}"
            f" ({mixture}): {abbreviate(datasets, 8)}"
        )

    def _is_score_eval(self, name: str) -> bool:
        # A task of the folder may have a name that ends in `_score_eval` by chance.
        return score_eval.is_score_eval(name) and score_eval.plain_name(name) in self.datasets


def _check_patterns(macro: str, value: object) -> list[str]:
    # A single pattern need not be a list, as users pass it on the command line.
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"{macro} must be a list of name patterns, got {value!r}")
    return list(patterns)


def _match_patterns(
    macro: str,
    patterns: Sequence[str],
    tasks: Collection[str],
    describe_missing: Callable[[str], str] = lambda task: "",
) -> list[str]:
    """Returns the tasks that match any of the patterns, in the order of `tasks`.

    Args:
      macro: the setting that holds the patterns, for errors.
      patterns: shell-style patterns.
      tasks: names to choose from.
      describe_missing: returns what a task lacks for the role, such as 'no train split'; "" if it
        lacks nothing.

    Raises:
      InputError: a pattern matches no task, or only tasks that lack something.
    """
    matched = set()
    for pattern in patterns:
        names = [task for task in tasks if fnmatch.fnmatchcase(task, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern.strip("*"), tasks, n=2)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise InputError(
                f"{macro} pattern {pattern!r} matched none of {len(tasks)} tasks{hint}"
            )
        reasons = [describe_missing(task) for task in names]
        if all(reasons):
            subject = f"pattern {pattern!r}: each of {len(names)} tasks"
            if names == [pattern]:
                subject = f"names {pattern!r}, which"
            raise InputError(f"{macro} {subject} has {reasons[0]}")
        matched.update(names)
    return [task for task in tasks if task in matched]


def _may_share_rows(info: TaskInfo, held_out: Sequence[TaskInfo]) -> bool:
    """Returns whether a held-out task has the same dataset and one of the two names no subset."""
    return any(
        info.dataset == other.dataset and not (info.subset and other.subset) for other in held_out
    )


def _is_named_like(task: str, datasets: Collection[str], tasks: Collection[str]) -> bool:
    """Returns whether a task seems to belong to a dataset, judged by its name.

    Its name, or the words that it begins with, must be the name of a dataset or the first word of
    another task's name.

    Args:
      task: the task, such as `reviews_hated`.
      datasets: names of datasets, such as `reviews`.
      tasks: names of tasks, such as `reviews_liked`, whose first word may be that of a dataset.
    """
    words = {*datasets, *(name.split("_")[0] for name in tasks if "_" in name)}
    return any(task == word or task.startswith(f"{word}_") for word in words)


def assign_roles(
    folder: str | os.PathLike[str],
    files: Mapping[str, Mapping[str, str]],
    index: Mapping[str, TaskInfo] | None,
    has_choices: Mapping[str, bool],
    eval_splits: Mapping[str, str],
    train_tasks: Sequence[str] | None,
    eval_tasks: Sequence[str] | None,
) -> JsonLinesTasks:
    """Decides which tasks are trained on, scored and held out; `jsonl` has the rules.

    Args:
      folder: JSONL_DIR.
      files: task -> split -> path.
      index: entries of INDEX.json; None without the file.
      has_choices: task -> whether its examples have answer choices.
      eval_splits: task -> its evaluation split; tasks without one are absent.
      train_tasks: TRAIN_TASKS, patterns or None.
      eval_tasks: EVAL_TASKS, patterns or None.

    Raises:
      InputError: a setting is not a list of patterns, a pattern matches no task, or one of
        TRAIN_TASKS matches only tasks without a train split.
    """
    train_patterns = None if train_tasks is None else _check_patterns("TRAIN_TASKS", train_tasks)
    eval_patterns = None if eval_tasks is None else _check_patterns("EVAL_TASKS", eval_tasks)
    infos = {task: (index or {}).get(task, TaskInfo()) for task in files}
    datasets = {task: info.dataset_name or task for task, info in infos.items()}

    def has_train_role(task: str) -> bool:
        info = infos[task]
        # GPT_EVAL and SGLUE are roles of T0+ and T0++, which also train on datasets scored here.
        return not info.has_roles or (info.t0_do_train == "BASE" and not info.t0_blacklisted)

    def missing_to_train(task: str) -> str:
        """Returns what a task lacks for training, for a message; "" if it lacks nothing."""
        return "" if "train" in files[task] else "no train split"

    def can_score(task: str) -> bool:
        return has_choices[task] and task in eval_splits

    to_score = [
        task for task in files if infos[task].t0_do_eval == "BASE" and infos[task].original_task
    ]
    if eval_patterns is not None:
        plain = [score_eval.plain_name(pattern) for pattern in eval_patterns]
        to_score = _match_patterns("EVAL_TASKS", plain, files)
    # A dataset is held out even if its evaluation tasks cannot be scored here: they may be
    # generative, or have no files in this folder.
    evaluated = {task: info for task, info in (index or {}).items() if info.t0_do_eval}
    held_out = {info.dataset_name or task for task, info in evaluated.items()}
    held_out |= {datasets[task] for task in to_score}
    held_out_infos = [*evaluated.values(), *(infos[task] for task in to_score)]

    skipped = []
    if train_patterns is not None:
        to_train = _match_patterns("TRAIN_TASKS", train_patterns, files, missing_to_train)
    else:
        candidates = [task for task in files if has_train_role(task)]
        to_train = [task for task in candidates if datasets[task] not in held_out]
        # The summary explains why a task is not trained on, unless it is scored instead.
        skipped = [
            task for task in candidates if datasets[task] in held_out and task not in to_score
        ]
    # A pattern must match a task that can be used. Others that it matches are reported.
    train = [task for task in to_train if not missing_to_train(task)]
    used = {*train, *(task for task in to_score if has_choices[task])}
    # Tasks to train on whose names suggest that they belong to a held-out dataset.
    held_out_tasks = {name for name in held_out if name in files}
    named_like_held_out = [
        task
        for task in train
        if datasets[task] not in held_out
        and (
            _may_share_rows(infos[task], held_out_infos)
            if infos[task].dataset
            else _is_named_like(task, held_out, held_out_tasks)
        )
    ]
    score_datasets = {
        task + score_eval.SUFFIX: dataset for task, dataset in datasets.items() if has_choices[task]
    }
    return JsonLinesTasks(
        folder=str(folder),
        datasets=datasets | score_datasets,
        train_tasks=train,
        eval_tasks=[task + score_eval.SUFFIX for task in to_score if can_score(task)],
        train_score_tasks=[task + score_eval.SUFFIX for task in train if can_score(task)],
        eval_splits=eval_splits,
        metrics={task: info.metrics for task, info in infos.items()},
        has_index=index is not None,
        held_out=sorted(held_out),
        held_out_skipped=skipped,
        held_out_trained=[task for task in train if datasets[task] in held_out],
        named_like_held_out=named_like_held_out,
        no_train_split=[task for task in to_train if missing_to_train(task)],
        no_eval_split=[task for task in files if task in used and task not in eval_splits],
        no_choices=[task for task in to_score if not has_choices[task]],
        not_in_index=[task for task in files if index is not None and task not in index],
    )
