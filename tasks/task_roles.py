"""`TaskRoles`: the tasks of a run by role (training, evaluation), and their properties."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pemoe_jax.data import row_checks
from pemoe_jax.tasks.benchmarks import Benchmark


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRoles:
    """The tasks that `tasks.register` registered, by role.

    `TaskRoles()`, with every field empty, stands for tasks that a user's module registered itself:
    their roles are unknown.

    Attributes:
      folder: JSONL_DIR, P3_DIR, MMLU_DIR or BBH_DIR; "" for seqio's caches.
      datasets: task or `_score_eval` task -> name of its dataset in tables.
      train_tasks: tasks to train on.
      eval_tasks: tasks to evaluate: `_score_eval` tasks, or BBH's tasks, which are decoded.
      train_score_tasks: `_score_eval` tasks of the training tasks.
      eval_splits: task -> the name that its evaluation split has in the data; it may be registered
        as `validation`. Tasks without an evaluation split are absent.
      metrics: task -> names of its metrics of generated text (keys of `metrics.BY_NAME`), if the
        data names them.
      summary: lines that a run prints.
      counted_odd_rows: task -> kinds (keys of `row_checks.ODD_ROWS`) of the odd rows in its
        evaluation split that the summary counts. Odd rows are valid, but change what a score means.
      benchmarks: the benchmarks that the tasks belong to.
    """

    folder: str = ""
    datasets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    train_tasks: Sequence[str] = ()
    eval_tasks: Sequence[str] = ()
    train_score_tasks: Sequence[str] = ()
    eval_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    summary: Sequence[str] = ()
    counted_odd_rows: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    benchmarks: Sequence[Benchmark] = ()

    def datasets_of(self, tasks: Sequence[str]) -> list[str]:
        """Returns the sorted dataset names of `tasks`; an unknown task is its own dataset."""
        return sorted({self.datasets.get(task, task) for task in tasks})

    def training_record(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Returns the fields of `checkpoints.records.Record` that describe training on `tasks`."""
        return {
            "trained_datasets": self.datasets_of(tasks),
            "trained_tasks": [*tasks],
            "held_out": self.datasets_of(self.eval_tasks),
        }

    def print_odd_rows(self, rows: Iterable[tuple[str, int, str]]) -> None:
        """Prints the odd rows that the summary does not count.

        Args:
          rows: task, number of the example, and kind (a key of `row_checks.ODD_ROWS`) of each row.
        """
        places = [
            (kind, f"{task} example {number}")
            for task, number, kind in rows
            if kind not in self.counted_odd_rows.get(task, ())
        ]
        for line in row_checks.describe_odd_rows(places):
            print(line, flush=True)

    def print_summary(self) -> None:
        """Prints the summary, if there is one."""
        if self.summary:
            print("\n".join(self.summary), flush=True)


# The function that run files bind as `register`. One that a user wrote may return nothing.
Register = Callable[[], TaskRoles | None]


def run_register(register: Register | None) -> TaskRoles:
    """Calls the function that a run file binds; returns `TaskRoles()` if there is none."""
    return (register() if register is not None else None) or TaskRoles()


def abbreviate(names: Sequence[str], limit: int) -> str:
    """Joins the first `limit` names, followed by the number of the others."""
    others = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + others
