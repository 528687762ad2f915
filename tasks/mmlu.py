"""MMLU (arXiv 2009.03300) as seqio tasks, scored by rank classification over the letters A to D.

The folder is the public one: `dev/<subject>_dev.csv`, `val/<subject>_val.csv` and
`test/<subject>_test.csv`, without a header, with the columns question, A, B, C, D and the letter of
the answer. `register` adds a task `mmlu_<subject>_score_eval` for each subject, and the mixture
`mmlu_score_eval`. The shots of a task are its subject's questions in `dev`, in the order of the
file.
"""

from __future__ import annotations

import csv
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from pemoe_jax.core.errors import InputError, check_choice, check_integer, plural
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.benchmarks import Benchmark, check_file_names
from pemoe_jax.tasks.task_roles import TaskRoles, abbreviate
from pemoe_jax.tasks.vocabulary import load_vocabulary, locate_vocabulary

MIXTURE = f"mmlu{score_eval.SUFFIX}"
LETTERS = ("A", "B", "C", "D")
SPLITS = ("test", "val")

# The areas by which MMLU's published code groups the subjects.
# (Tuples in the tuple, so that the formatter keeps several names on a line.)
_SUBJECTS_BY_AREA = {
    "STEM": (
        *("abstract_algebra", "astronomy", "college_biology", "college_chemistry"),
        *("college_computer_science", "college_mathematics", "college_physics"),
        *("computer_security", "conceptual_physics", "electrical_engineering"),
        *("elementary_mathematics", "high_school_biology", "high_school_chemistry"),
        *("high_school_computer_science", "high_school_mathematics", "high_school_physics"),
        *("high_school_statistics", "machine_learning"),
    ),
    "humanities": (
        *("formal_logic", "high_school_european_history", "high_school_us_history"),
        *("high_school_world_history", "international_law", "jurisprudence", "logical_fallacies"),
        *("moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law"),
        "world_religions",
    ),
    "social sciences": (
        *("econometrics", "high_school_geography", "high_school_government_and_politics"),
        *("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology"),
        *("human_sexuality", "professional_psychology", "public_relations", "security_studies"),
        *("sociology", "us_foreign_policy"),
    ),
    "other": (
        *("anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts"),
        *("human_aging", "management", "marketing", "medical_genetics", "miscellaneous"),
        *("nutrition", "professional_accounting", "professional_medicine", "virology"),
    ),
}
AREAS = {subject: area for area, subjects in _SUBJECTS_BY_AREA.items() for subject in subjects}
# Subject -> name of its dataset in tables.
DATASETS = {subject: f"mmlu_{subject}" for subject in AREAS}


class Question(NamedTuple):
    """A row of a csv file."""

    text: str
    options: tuple[str, str, str, str]
    answer: str  # a letter

    def prompt(self) -> str:
        """Returns the question with its options, as a model reads it."""
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.options, strict=True)]
        return "\n".join([self.text, *options, "Answer:"])


def header(subject: str) -> str:
    """Returns the line that precedes the shots of a subject."""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def read_questions(path: pathlib.Path, limit: int | None = None) -> list[Question]:
    """Returns the rows of a file, or the first `limit` of them.

    All rows are checked, whatever the limit.

    Raises:
      InputError: a row does not have 6 columns or its answer is not one of the letters, or the file
        is not CSV in UTF-8 or has no rows.
    """
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            line = 1  # the first line of a row, which may have several
            for row in reader:
                if row:
                    questions.append(_parse_question(row, f"{path}:{line}"))
                line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not questions:
        raise InputError(f"{path}: expected at least one row, got none")
    return questions[:limit]


def _parse_question(row: Sequence[str], where: str) -> Question:
    """Returns the question in a row; errors begin with `where`, the row's file and line."""
    if len(row) != 6:
        raise InputError(
            f"{where}: expected 6 columns (question, A, B, C, D, answer), got {len(row)}"
        )
    text, a, b, c, d, answer = row
    check_choice(f"{where}: the answer", answer.strip(), LETTERS)
    return Question(text, (a, b, c, d), answer.strip())


def find_files(folder: pathlib.Path, split: str) -> dict[str, pathlib.Path]:
    """Returns the files of a split by subject, in the order of `AREAS`.

    Raises:
      InputError: the folder or all files are missing, or a file's name is not that of a subject.
    """
    if not folder.is_dir():
        raise InputError(f"MMLU_DIR {folder} must be a folder, got no such folder")
    suffix = f"_{split}.csv"
    # Hidden files, such as those that macOS adds to archives, are skipped.
    paths = (folder / split).glob(f"[!.]*{suffix}")
    files = {path.name.removesuffix(suffix): path for path in paths}
    if not files:
        raise InputError(f"MMLU_DIR {folder} must hold {split}/<subject>{suffix}, got none")
    check_file_names(files, AREAS, "a subject of MMLU")
    return {subject: files[subject] for subject in AREAS if subject in files}


def register(
    mmlu_dir: str | os.PathLike[str],
    vocab_path: str | os.PathLike[str],
    eval_examples: int | None = None,
    split: str = "test",
) -> TaskRoles:
    """Registers the subjects of a folder, in place of the tasks of an earlier call.

    Args:
      mmlu_dir: the folder (MMLU_DIR).
      vocab_path: see `load_vocabulary` (VOCAB_PATH).
      eval_examples: maximum number of questions of each subject, counted from the first
        (EVAL_EXAMPLES); None: all.
      split: 'test' or 'val' (MMLU_SPLIT).

    Raises:
      InputError: an argument or a file is wrong.
    """
    if eval_examples is not None:
        check_integer("EVAL_EXAMPLES", eval_examples)
    check_choice("MMLU_SPLIT", split, SPLITS)
    folder = pathlib.Path(mmlu_dir).expanduser().absolute()
    locate_vocabulary(vocab_path)
    files = find_files(folder, split)
    questions = {subject: read_questions(path, eval_examples) for subject, path in files.items()}

    # The shots are read at their first use, since `dev` is not needed without shots.
    def read_shots(subject: str) -> list[tuple[str, str]]:
        path = folder / "dev" / f"{subject}_dev.csv"
        if not path.is_file():
            raise InputError(f"SHOTS of {subject} are read from {path}, got no such file")
        return [(question.prompt(), question.answer) for question in read_questions(path)]

    # Imported here because it imports seqio, which takes about 5 s.
    from pemoe_jax.tasks import benchmark_tasks

    tasks = {DATASETS[subject] + score_eval.SUFFIX: subject for subject in files}
    vocabulary = load_vocabulary(vocab_path)
    benchmark_tasks.register(
        [
            benchmark_tasks.make_score_task(
                name,
                [(question.prompt(), question.answer) for question in questions[subject]],
                LETTERS,
                benchmark_tasks.ShotsSource(
                    header(subject), functools.partial(read_shots, subject)
                ),
                vocabulary,
            )
            for name, subject in tasks.items()
        ],
        {MIXTURE: list(tasks)},
    )
    benchmark = Benchmark(
        name="MMLU",
        noun="subject",
        metric="accuracy",
        members={subject: subject for subject in AREAS},
        areas=AREAS,
        tasks=tasks,
    )
    summary = [
        f"MMLU_DIR {folder}: {len(files)} of {len(AREAS)} subjects,"
        f" {plural(sum(map(len, questions.values())), 'question')} of {split}"
    ]
    if benchmark.missing:
        summary.append(f"missing subjects, not in the means: {abbreviate(benchmark.missing, 5)}")
    return TaskRoles(
        folder=str(folder),
        datasets={name: DATASETS[subject] for name, subject in tasks.items()},
        eval_tasks=list(tasks),
        eval_splits={score_eval.plain_name(name): split for name in tasks},
        summary=summary,
        benchmarks=[benchmark],
    )
