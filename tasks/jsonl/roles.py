"""Who is trained on, who is scored, who is held out: the roles that `jsonl` gives to tasks."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks.jsonl.files import few

TRAIN_MIXTURE = "jsonl_train"
SCORE_MIXTURE = "jsonl_score_eval"
TRAIN_SCORE_MIXTURE = "jsonl_train_score_eval"
SCORE_EVAL = "_score_eval"

_ODD = {
    "target_not_in_choices": "targets not among their choices",
    "doubled_choices": "doubled choices",
    "no_choices": "rows without choices in a task with choices (not scored)",
    "empty_input": "empty inputs",
    "empty_target": "empty targets",
}


@dataclasses.dataclass(frozen=True)
class OddRows:
    """Rows that are not wrong but that a reader of the results should know of."""

    task: str
    split: str
    kind: str
    count: int
    path: str
    line: int  # of the first


@dataclasses.dataclass(frozen=True)
class Registered:
    """What `register` has registered, and what it left out."""

    folder: str
    has_index: bool
    train_tasks: list[str]
    eval_tasks: list[str]  # the twins' names
    train_score_tasks: list[str]  # twins of those of train_tasks that can be scored
    datasets: dict[str, str]  # every task's and twin's data set
    eval_splits: dict[str, str]  # task -> the split whose file is behind its `validation`
    held_out: list[str]  # data sets
    held_out_skipped: list[str]  # tasks with the training role that are not trained on
    held_out_trained: list[str]  # tasks trained on although held out
    no_train_split: list[str]  # tasks with the training role
    no_eval_split: list[str]  # tasks trained on or with the evaluation role
    no_choices: list[str]  # tasks that EVAL_TASKS takes and that cannot be scored
    not_in_index: list[str]
    # Of the files that were read: rows of tasks (train) and of twins (their evaluation split).
    examples: dict[str, int] = dataclasses.field(default_factory=dict)
    odd: list[OddRows] = dataclasses.field(default_factory=list)
    max_choices: int = 0
    max_words: int = 0  # of the longest input

    def lines(self) -> list[str]:
        """The summary that a run prints."""
        tasks = [task for task in self.datasets if not self._is_twin(task)]
        labels = {self.datasets[task] for task in tasks}
        source = "data sets from INDEX.json" if self.has_index else "no INDEX.json"
        lines = [f"{self.folder}: {len(tasks)} tasks, {len(labels)} data sets ({source})"]
        lines.append(self._line("training", self.train_tasks, TRAIN_MIXTURE))
        lines.append(self._line("scoring", self.eval_tasks, SCORE_MIXTURE))
        if self.train_score_tasks:
            what = "scoring of training tasks"
            lines.append(self._line(what, self.train_score_tasks, TRAIN_SCORE_MIXTURE))
        if self.held_out:
            lines.append(f"held out: {few(self.held_out, 12)}")
        for names, text in (
            (
                self.held_out_trained,
                "WARNING: held out, yet trained on because TRAIN_TASKS asks for it",
            ),
            (self.held_out_skipped, "held out, so not trained on"),
            (self.no_train_split, "no train split, so not trained on"),
            (self.no_eval_split, f"no evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"),
            (self.no_choices, "no answer choices, so not scored"),
            (self.not_in_index, "not in INDEX.json"),
        ):
            if names:
                lines.append(f"{text}: {len(names)} tasks ({few(names, 3)})")
        for kind, text in _ODD.items():
            found = [odd for odd in self.odd if odd.kind == kind]
            if found:
                where = few(
                    [f"{odd.task}/{pathlib.Path(odd.path).name}:{odd.line}" for odd in found], 2
                )
                lines.append(f"odd rows: {sum(odd.count for odd in found):,} {text} ({where})")
        if self.max_words:
            choices = f"; up to {self.max_choices} choices" if self.max_choices else ""
            lines.append(f"longest input: {self.max_words:,} words{choices}")
        return lines

    def _line(self, what: str, names: Sequence[str], mixture: str) -> str:
        if not names:
            return f"{what}: no task"
        labels = sorted({self.datasets[name] for name in names})
        examples = ""
        if all(name in self.examples for name in names):
            examples = f", {sum(self.examples[name] for name in names):,} examples"
        return (
            f"{what}: {len(names)} tasks of {len(labels)} data sets{examples} ({mixture}): "
            f"{few(labels, 8)}"
        )

    def _is_twin(self, name: str) -> bool:
        return name.endswith(SCORE_EVAL) and name.removesuffix(SCORE_EVAL) in self.datasets


def _label(task: str, entry: Mapping[str, Any]) -> str:
    """The data set's name in tables: SuperGLUE's are known by their own names."""
    dataset, subset = entry.get("dataset"), entry.get("subset")
    if not dataset:
        return task
    if not subset:
        return dataset
    return subset if dataset == "super_glue" else f"{dataset}_{subset}"


def _patterns(macro: str, value: Any) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise InputError(f"{macro} must be a list of name patterns, found {value!r}")
    return [
        pattern.removesuffix(SCORE_EVAL) if macro == "EVAL_TASKS" else pattern
        for pattern in patterns
    ]


def _match(
    macro: str, patterns: Sequence[str], files: Mapping[str, Any], usable: Callable[[str], str]
) -> list[str]:
    """The tasks that match; each pattern must match one that lacks nothing (`usable` gives '')."""
    matched = set()
    for pattern in patterns:
        names = [task for task in files if fnmatch.fnmatchcase(task, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern.strip("*"), files, n=2)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise InputError(
                f"{macro} pattern {pattern!r} matched none of {len(files)} tasks{hint}"
            )
        lacks = [usable(task) for task in names]
        if all(lacks):
            which = (
                f"names {pattern!r}, which"
                if names == [pattern]
                else f"pattern {pattern!r}: each of {len(names)} tasks"
            )
            raise InputError(f"{macro} {which} has {lacks[0]}")
        matched.update(names)
    return [task for task in files if task in matched]


def plan(
    folder: str | os.PathLike[str],
    files: Mapping[str, Mapping[str, str]],
    index: Mapping[str, Mapping[str, Any]] | None,
    has_choices: Mapping[str, bool],
    eval_splits: dict[str, str],
    train_tasks: Sequence[str] | None,
    eval_tasks: Sequence[str] | None,
) -> Registered:
    """Who is trained on, who is scored, who is held out.

    Args:
      folder: JSONL_DIR.
      files: task -> split -> path.
      index: task -> entry of INDEX.json; None where there is none.
      has_choices: task -> whether its examples have answer choices.
      eval_splits: task -> its evaluation split, of the tasks that have one.
      train_tasks: TRAIN_TASKS, patterns or None.
      eval_tasks: EVAL_TASKS, patterns or None.
    """
    train_patterns = None if train_tasks is None else _patterns("TRAIN_TASKS", train_tasks)
    eval_patterns = None if eval_tasks is None else _patterns("EVAL_TASKS", eval_tasks)
    entries = {task: (index or {}).get(task, {}) for task in files}
    labels = {task: _label(task, entry) for task, entry in entries.items()}

    def may_train(task: str) -> bool:
        entry = entries[task]
        if "t0_do_train" not in entry and "t0_do_eval" not in entry:
            return True
        return entry.get("t0_do_train") == "BASE" and not entry.get("t0_blacklisted", False)

    def may_score(task: str) -> bool:
        entry = entries[task]
        return (
            entry.get("t0_do_eval") == "BASE"
            and entry.get("original_task", True)
            and has_choices[task]
        )

    def lacks_to_score(task: str) -> str:
        if not has_choices[task]:
            return "no answer_choices and cannot be scored"
        return (
            ""
            if task in eval_splits
            else f"no evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})"
        )

    by_index = [task for task in files if may_score(task)]
    to_score = by_index
    if eval_patterns is not None:
        to_score = _match("EVAL_TASKS", eval_patterns, files, lacks_to_score)
    # EVAL_TASKS may pick a few of the tasks to score; that sets no other free to train on.
    held_out = {labels[task] for task in (*by_index, *to_score)}

    if train_patterns is not None:
        wanted = _match(
            "TRAIN_TASKS",
            train_patterns,
            files,
            lambda task: "" if "train" in files[task] else "no train split",
        )
        skipped = []
    else:
        role = [task for task in files if may_train(task)]
        wanted = [task for task in role if labels[task] not in held_out]
        # A task that is scored is where it belongs; one left out for its data set's sake is news.
        skipped = [task for task in role if labels[task] in held_out and task not in to_score]
    train = [task for task in wanted if "train" in files[task]]
    concerned = {*train, *(task for task in to_score if has_choices[task])}
    return Registered(
        folder=str(folder),
        has_index=index is not None,
        train_tasks=train,
        eval_tasks=[task + SCORE_EVAL for task in to_score if not lacks_to_score(task)],
        train_score_tasks=[task + SCORE_EVAL for task in train if not lacks_to_score(task)],
        datasets={
            **labels,
            **{task + SCORE_EVAL: label for task, label in labels.items() if has_choices[task]},
        },
        eval_splits=eval_splits,
        held_out=sorted(held_out),
        held_out_skipped=skipped,
        held_out_trained=[task for task in train if labels[task] in held_out],
        no_train_split=[task for task in wanted if "train" not in files[task]],
        no_eval_split=[task for task in files if task in concerned and task not in eval_splits],
        no_choices=[task for task in to_score if not has_choices[task]],
        not_in_index=[task for task in files if index is not None and task not in index],
    )
