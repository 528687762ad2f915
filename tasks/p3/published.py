"""P3 as published: its tasks, their splits and T0's mixtures, from `tasks.csv` alone.

The table joins what three public sources say: the splits of the data set `bigscience/P3`, the
metadata of promptsource's templates, and the roles that T0 gave the data sets (arXiv 2110.08207).
Nothing here needs seqio.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence

SCORE_EVAL = "_score_eval"

# T0: a data set beyond this many examples counts as this many, shared by its templates.
MAX_EXAMPLES = 500_000

# The stages of T0's training data: T0, T0+ (the data sets GPT-3 was evaluated on), T0++ (SuperGLUE)
STAGES = {
    "t0_train": ("BASE",),
    "t0+_train": ("BASE", "GPT_EVAL"),
    "t0++_train": ("BASE", "GPT_EVAL", "SGLUE"),
}
EVAL_MIXTURE = "t0_eval_score_eval"
TRAIN_EVAL_MIXTURE = "t0_train_score_eval"
BIAS_MIXTURE = "bias_fairness_eval_score_eval"

# What T0 leaves out of TRAIN_EVAL_MIXTURE: data sets that it did not follow while training, and
# prompts that its cache could not be made of.
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
    """The published name of a template of a data set ('r1' to 'r3': of ANLI's rounds)."""
    name = "_".join(filter(None, (dataset, subset, template)))
    name = re.sub(r"[^\w.]+", "_", name)
    return f"{name}_{anli_round}" if anli_round else name


@dataclasses.dataclass(frozen=True)
class P3Task:
    """A published task."""

    name: str
    dataset: str
    subset: str
    template: str
    original_task: bool  # asks what the data set was made for
    metrics: tuple[str, ...]  # promptsource's names
    has_choices: bool
    has_twin: bool  # <name>_score_eval is published
    do_train: str  # BASE, GPT_EVAL, SGLUE or ''
    do_eval: str  # BASE, BIAS_FAIRNESS or ''
    train_size: int  # examples of the data set's train split, 0 where none is given
    splits: dict[str, int]  # split -> published examples

    @property
    def dataset_name(self) -> str:
        """The data set with its subset, as the names of mixtures have it."""
        return re.sub(r"[^\w.]+", "_", "_".join(filter(None, (self.dataset, self.subset))))

    @property
    def label(self) -> str:
        """The data set's name in tables: SuperGLUE's are known by their own names."""
        return self.subset if self.dataset == "super_glue" else self.dataset_name

    @property
    def anli_round(self) -> str:
        """'r1', 'r2' or 'r3' of ANLI's tasks, else ''."""
        found = _ANLI_ROUND.search(self.name) if self.dataset == "anli" else None
        return found[1] if found else ""

    def raw_split(self, split: str) -> str:
        """What the data set itself calls a split: ANLI has dev_r1 for validation."""
        if not self.anli_round:
            return split
        return f"{'dev' if split == 'validation' else split}_{self.anli_round}"


def _count(text: str) -> int:
    return int(text) if text else 0


def _task(row: dict[str, str]) -> P3Task:
    splits = {split: _count(row[split]) for split in ("train", "validation", "test") if row[split]}
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
        has_twin=row["score_eval"] == "1",
        do_train=row["do_train"],
        do_eval=row["do_eval"],
        train_size=_count(row["dataset_train_size"]),
        splits=splits,
    )


@functools.cache
def tasks() -> dict[str, P3Task]:
    """The published tasks by name, sorted."""
    path = pathlib.Path(__file__).with_name("tasks.csv")
    with path.open(newline="") as file:
        return {row["task"]: _task(row) for row in csv.DictReader(file)}


@functools.cache
def _templates() -> dict[str, int]:
    """Templates of each data set."""
    found: dict[str, set[str]] = {}
    for task in tasks().values():
        found.setdefault(task.dataset_name, set()).add(task.template)
    return {dataset: len(templates) for dataset, templates in found.items()}


def rate(name: str) -> float:
    """T0's mixing rate of a task or its twin.

    The examples of the data set's train split; where they are more than 500,000, that number
    divided by the data set's templates, rounded down.
    """
    task = tasks()[name.removesuffix(SCORE_EVAL)]
    size = task.train_size or task.splits.get("train", 1)
    return float(size if size <= MAX_EXAMPLES else MAX_EXAMPLES // _templates()[task.dataset_name])


def _one_original_prompt() -> list[str]:
    """Of each data set of T0's, the first by its template's name that asks the original task."""
    first: dict[str, P3Task] = {}
    for task in sorted(tasks().values(), key=lambda task: task.template):
        if task.original_task and task.do_train == "BASE":
            first.setdefault(task.dataset_name, task)
    return sorted(task.name for task in first.values())


def made_twins() -> list[str]:
    """Twins that are not published, which TRAIN_EVAL_MIXTURE has: T0's choice of training tasks."""
    return [
        task.name + SCORE_EVAL
        for task in tasks().values()
        if task.do_train == "BASE"
        and task.original_task
        and task.has_choices
        and not task.has_twin
        and not task.name.startswith(_NOT_SCORED)
    ]


@functools.cache
def mixtures() -> dict[str, Sequence[str]]:
    """Name -> tasks, none empty.

    T0's (its eighth, bias and fairness, has no published task), and one for each data set and, as
    `<data set>_score_eval`, for its twins: `super_glue_rte`, `anli`, `anli_r1`, ...
    """
    everything = tasks().values()
    found: dict[str, list[str]] = {
        mixture: [task.name for task in everything if task.do_train in stages]
        for mixture, stages in STAGES.items()
    }
    base = [task for task in everything if task.do_train == "BASE"]
    found["t0_train_one_og_prompt"] = _one_original_prompt()
    found["t0_train_all_og_prompts"] = [task.name for task in base if task.original_task]
    for mixture, role in ((EVAL_MIXTURE, "BASE"), (BIAS_MIXTURE, "BIAS_FAIRNESS")):
        found[mixture] = [
            task.name + SCORE_EVAL
            for task in everything
            if task.do_eval == role and task.has_twin and task.original_task
        ]
    published = [task.name + SCORE_EVAL for task in base if task.has_twin]
    found[TRAIN_EVAL_MIXTURE] = sorted([*published, *made_twins()])
    for task in everything:
        names = [task.dataset_name]
        if task.anli_round:
            names.append(f"{task.dataset_name}_{task.anli_round}")
        for name in names:
            found.setdefault(name, []).append(task.name)
            if task.has_twin:
                found.setdefault(name + SCORE_EVAL, []).append(task.name + SCORE_EVAL)
    return {mixture: names for mixture, names in found.items() if names}
