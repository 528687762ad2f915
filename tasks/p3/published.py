"""P3 as published: tasks, splits and T0's mixtures, from `tasks.csv` alone.

The table joins three public sources: the splits of the dataset `bigscience/P3`, the metadata of
promptsource's templates, and the roles of datasets in T0 (arXiv 2110.08207). Nothing here imports
seqio.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence

from pemoe_jax.tasks import metrics, score_eval

# Each task of a dataset with more examples is mixed at this rate divided by the number of the
# dataset's templates.
MAX_EXAMPLES = 500_000

TRAIN_MIXTURE = "t0_train"
SCORE_MIXTURE = "t0_eval_score_eval"
TRAIN_SCORE_MIXTURE = "t0_train_score_eval"
BIAS_MIXTURE = "bias_fairness_eval_score_eval"
# Training mixture -> the training roles of its tasks. T0+ adds the datasets that GPT-3 was
# evaluated on, and T0++ also adds SuperGLUE.
STAGES = {
    TRAIN_MIXTURE: ("BASE",),
    "t0+_train": ("BASE", "GPT_EVAL"),
    "t0++_train": ("BASE", "GPT_EVAL", "SGLUE"),
}

# Prefixes of the tasks that TRAIN_SCORE_MIXTURE lacks: T0 did not score these datasets during
# training, or could not write their caches.
_NOT_SCORED = (
    "adversarial_qa_dbert",
    "adversarial_qa_dbidaf",
    "amazon_polarity",
    "app_reviews",
    "dbpedia_14",
    "dream",
    "duorc_ParaphraseRC",
    "gigaword",
    "imdb",
    "multi_news",
    "paws_labeled_final",
    "samsum",
    "trec",
    "wiki_bio",
    "wiki_hop_original_choose_best_object",
)
_ANLI_ROUND = re.compile(r"_(r[123])$")


def task_name(dataset: str, subset: str | None, template: str, anli_round: str = "") -> str:
    """Returns the published name of a template; `anli_round` is 'r1' to 'r3' for ANLI."""
    name = re.sub(r"[^\w.]+", "_", "_".join(filter(None, (dataset, subset, template))))
    return f"{name}_{anli_round}" if anli_round else name


@dataclasses.dataclass(frozen=True)
class P3Task:
    """A published task.

    Attributes:
      name: the published name.
      dataset, subset: the dataset that the template is for; `subset` is '' if it has none.
      template: name of the template in promptsource.
      original_task: whether the prompt asks for what the dataset was made for.
      metrics: promptsource's names of the metrics of generated text.
      has_choices: whether examples have answer choices.
      has_score_eval: whether `<name>_score_eval` is published.
      do_train: T0's training role: BASE, GPT_EVAL, SGLUE or ''.
      do_eval: T0's evaluation role: BASE, BIAS_FAIRNESS or ''.
      train_size: examples of the dataset's train split, 0 if the table has none.
      splits: split -> number of published examples.
    """

    name: str
    dataset: str
    subset: str
    template: str
    original_task: bool
    metrics: tuple[str, ...]
    has_choices: bool
    has_score_eval: bool
    do_train: str
    do_eval: str
    train_size: int
    splits: dict[str, int]

    @property
    def dataset_name(self) -> str:
        """The dataset with its subset, as in the names of mixtures."""
        return re.sub(r"[^\w.]+", "_", "_".join(filter(None, (self.dataset, self.subset))))

    @property
    def label(self) -> str:
        """The dataset's name in tables. SuperGLUE's datasets go by their own names."""
        return self.subset if self.dataset == "super_glue" else self.dataset_name

    @property
    def anli_round(self) -> str:
        """'r1', 'r2' or 'r3' for ANLI's tasks, else ''."""
        match = _ANLI_ROUND.search(self.name) if self.dataset == "anli" else None
        return match[1] if match else ""

    def source_split(self, split: str) -> str:
        """Returns the dataset's own name of a split: ANLI has dev_r1 for validation."""
        if not self.anli_round:
            return split
        return f"{'dev' if split == 'validation' else split}_{self.anli_round}"


def _parse_row(row: dict[str, str]) -> P3Task:
    splits = {split: int(row[split]) for split in ("train", "validation", "test") if row[split]}
    for other in filter(None, row["other_splits"].split(";")):
        split, _, examples = other.partition("=")
        splits[split] = int(examples)
    return P3Task(
        name=row["task"],
        dataset=row["dataset"],
        subset=row["subset"],
        template=row["template"],
        original_task=row["original_task"] == "1",
        metrics=tuple(filter(None, row["metrics"].split(";"))),
        has_choices=bool(row["answer_choices"]),
        has_score_eval=row["score_eval"] == "1",
        do_train=row["do_train"],
        do_eval=row["do_eval"],
        train_size=int(row["dataset_train_size"] or 0),
        splits=splits,
    )


@functools.cache
def tasks() -> dict[str, P3Task]:
    """Returns the published tasks by name, sorted; `_score_eval` tasks are not among them."""
    path = pathlib.Path(__file__).with_name("tasks.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return {row["task"]: _parse_row(row) for row in csv.DictReader(file)}


@functools.cache
def names() -> tuple[str, ...]:
    """Returns the names of the published tasks, each followed by its `_score_eval` task's."""
    task_names = []
    for task in tasks().values():
        task_names.append(task.name)
        if task.has_score_eval:
            task_names.append(task.name + score_eval.SUFFIX)
    return tuple(task_names)


def task_of(name: str) -> P3Task:
    """Returns the published task of this name, or the task of a `_score_eval` task."""
    return tasks()[score_eval.plain_name(name)]


def metric_names(name: str) -> Sequence[str]:
    """Returns names of metrics of a task's generated text; the defaults for tasks outside of P3."""
    return tasks()[name].metrics if name in tasks() else metrics.DEFAULT_METRICS


@functools.cache
def _num_templates() -> dict[str, int]:
    # Templates are counted, not tasks, because ANLI has a task for each round of a template.
    templates = {(task.dataset_name, task.template) for task in tasks().values()}
    return collections.Counter(dataset for dataset, _ in templates)


def rate(name: str) -> float:
    """Returns T0's mixing rate of a task or its `_score_eval` task.

    The rate is the number of examples in the dataset's train split. If there are more than
    MAX_EXAMPLES, it is MAX_EXAMPLES divided by the dataset's number of templates, rounded down.
    """
    task = task_of(name)
    # Tasks without a train split have the rate 1, since mixtures for evaluation need rates too.
    size = task.train_size or task.splits.get("train", 1)
    if size <= MAX_EXAMPLES:
        return float(size)
    # Rounded down, because T0's code divides integers.
    return float(MAX_EXAMPLES // _num_templates()[task.dataset_name])


def _select_original_prompts() -> list[str]:
    """Returns one task of each training dataset of T0.

    It is the first of the dataset's original tasks, sorted by the names of their templates.
    """
    first: dict[str, P3Task] = {}
    for task in sorted(tasks().values(), key=lambda task: task.template):
        if task.original_task and task.do_train == "BASE":
            first.setdefault(task.dataset_name, task)
    return sorted(task.name for task in first.values())


def unpublished_score_tasks() -> list[str]:
    """Returns the `_score_eval` tasks of TRAIN_SCORE_MIXTURE that are not published."""
    return [
        task.name + score_eval.SUFFIX
        for task in tasks().values()
        if task.do_train == "BASE"
        and task.original_task
        and task.has_choices
        and not task.has_score_eval
        and not task.name.startswith(_NOT_SCORED)
    ]


@functools.cache
def mixtures() -> dict[str, Sequence[str]]:
    """Returns the tasks of each mixture; none is empty.

    The mixtures are T0's (the eighth, bias and fairness, has no published task), and one for each
    dataset and, as `<dataset>_score_eval`, for its `_score_eval` tasks.
    """
    published = tasks().values()
    base = [task for task in published if task.do_train == "BASE"]
    members: dict[str, list[str]] = {
        mixture: [task.name for task in published if task.do_train in roles]
        for mixture, roles in STAGES.items()
    }
    members["t0_train_one_og_prompt"] = _select_original_prompts()
    members["t0_train_all_og_prompts"] = [task.name for task in base if task.original_task]
    for mixture, role in ((SCORE_MIXTURE, "BASE"), (BIAS_MIXTURE, "BIAS_FAIRNESS")):
        members[mixture] = [
            task.name + score_eval.SUFFIX
            for task in published
            if task.do_eval == role and task.has_score_eval and task.original_task
        ]
    scored = [task.name + score_eval.SUFFIX for task in base if task.has_score_eval]
    members[TRAIN_SCORE_MIXTURE] = sorted([*scored, *unpublished_score_tasks()])
    for task in published:
        datasets = [task.dataset_name]
        if task.anli_round:
            datasets.append(f"{task.dataset_name}_{task.anli_round}")
        for dataset in datasets:
            members.setdefault(dataset, []).append(task.name)
            if task.has_score_eval:
                members.setdefault(dataset + score_eval.SUFFIX, []).append(
                    task.name + score_eval.SUFFIX
                )
    return {mixture: names for mixture, names in members.items() if names}
