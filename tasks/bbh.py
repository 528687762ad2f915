"""BIG-Bench Hard (arXiv 2210.09261) as decoded seqio tasks, direct and with reasoning.

The folder is the public one: `bbh/<task>.json` with {"examples": [{"input": str, "target": str}]},
and `cot-prompts/<task>.txt`: a canary (a notice that keeps the file out of training data), a line
`-----`, a description of the task, and solved examples `Q: … A: Let's think step by step. … So the
answer is X.`. `register` adds two seqio tasks for each `<task>`

- `bbh_direct_<task>`: the shots are the solved examples without their reasoning;
- `bbh_reasoning_<task>`: the shots have the reasoning, and the model reasons before it answers.

The mixtures are `bbh_direct`, `bbh_reasoning` and `bbh`, which has both. A prediction is correct if
the answer in it (`extract_answer`) equals the target.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from pemoe_jax.core.errors import InputError, check_integer, plural
from pemoe_jax.data import row_checks
from pemoe_jax.tasks import metrics
from pemoe_jax.tasks.benchmarks import Benchmark, check_file_names
from pemoe_jax.tasks.task_roles import TaskRoles, abbreviate
from pemoe_jax.tasks.vocabulary import load_vocabulary, locate_vocabulary

MIXTURE = "bbh"
_REASONING = "Let's think step by step."
_ANSWER = "the answer is"
# The last line of an input in each mode.
_INSTRUCTIONS = {"direct": "A:", "reasoning": f"A: {_REASONING}"}

# The 23 tasks, which have equal weights in the mean, and the suffixes of their files' names. Two
# tasks have a file for each number of objects.
# (Tuples in the tuple, so that the formatter keeps several names on a line.)
_OBJECTS = ("three_objects", "five_objects", "seven_objects")
_FILE_SUFFIXES = {
    **dict.fromkeys(
        (
            *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa"),
            *("dyck_languages", "formal_fallacies", "geometric_shapes", "hyperbaton"),
            *("logical_deduction", "movie_recommendation", "multistep_arithmetic_two", "navigate"),
            *("object_counting", "penguins_in_a_table", "reasoning_about_colored_objects"),
            *("ruin_names", "salient_translation_error_detection", "snarks"),
            *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects"),
            *("web_of_lies", "word_sorting"),
        ),
        ("",),
    ),
    "logical_deduction": _OBJECTS,
    "tracking_shuffled_objects": _OBJECTS,
}
# Name of each of the 27 files -> the task that it belongs to.
TASKS = {
    f"{task}_{suffix}" if suffix else task: task
    for task, suffixes in _FILE_SUFFIXES.items()
    for suffix in suffixes
}


class PromptExample(NamedTuple):
    """A solved example in a prompt file."""

    question: str
    reasoning: str  # ends in the sentence with the answer
    answer: str


class Prompt(NamedTuple):
    """A file of `cot-prompts`."""

    description: str
    examples: list[PromptExample]


def extract_answer(text: str) -> str:
    """Returns the answer in a prediction, or in the reasoning of a solved example.

    The answer is the text after the last 'the answer is', or the whole text if it does not have
    these words. A final full stop is removed.
    """
    return text.rpartition(_ANSWER)[2].strip().removesuffix(".").rstrip()


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that equal their target.

    Case counts. Any run of whitespace counts as one space.
    """
    return {"exact_match": metrics.accuracy(targets, predictions)["accuracy"]}


def read_examples(path: pathlib.Path, limit: int | None = None) -> list[tuple[str, str]]:
    """Returns (input, target) of each example in a file of `bbh/`, or of the first `limit`.

    All examples are checked, whatever the limit.

    Raises:
      InputError: the file is malformed or has no examples.
    """
    fields = row_checks.read_object(path)
    examples = fields.get("examples")
    if not isinstance(examples, list) or not examples:
        raise InputError(
            f"{path}: 'examples' must be a list of objects, got"
            f" {row_checks.describe_value(examples)}"
        )
    rows = []
    for number, example in enumerate(examples, 1):
        where = f"{path}: example {number}"
        if not isinstance(example, dict):
            raise InputError(f"{where} must be an object, got {row_checks.describe_value(example)}")
        texts = [row_checks.check_text(example.get(k), where, k) for k in ("input", "target")]
        for key, text in zip(("input", "target"), texts, strict=True):
            if not text.strip():
                raise InputError(f"{where}: {key!r} must be a text that is not blank, got {text!r}")
        rows.append((texts[0], texts[1]))
    return rows[:limit]


def read_prompt(path: pathlib.Path) -> Prompt:
    """Reads a file of `cot-prompts/`.

    Raises:
      InputError: the file is missing or malformed.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: expected the task's prompt, got no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    lines = [line.rstrip() for line in text.splitlines()]
    if "-----" not in lines:
        raise InputError(f"{path}: expected a line '-----' before the prompt, got none")
    start = lines.index("-----") + 1
    questions = [i for i in range(start, len(lines)) if lines[i].startswith("Q:")]
    if not questions:
        raise InputError(f"{path}: expected solved examples that begin with 'Q:', got none")
    description = "\n".join(lines[start : questions[0]]).strip()
    examples = [
        _parse_solved_example("\n".join(lines[i:end]).strip(), f"{path}:{i + 1}")
        for i, end in zip(questions, [*questions[1:], len(lines)], strict=True)
    ]
    return Prompt(description, examples)


def _parse_solved_example(text: str, where: str) -> PromptExample:
    """Parses 'Q: … A: Let's think step by step. …'; errors begin with `where` (file and line)."""
    parts = re.fullmatch(rf"Q:(.*?)\nA: {re.escape(_REASONING)}(.*)", text, re.DOTALL)
    if parts is None:
        raise InputError(f"{where}: expected a line 'A: {_REASONING} …' in the example, got none")
    question, reasoning = (part.strip() for part in parts.groups())
    if not question:
        raise InputError(f"{where}: expected a question after 'Q:', got none")
    answer = extract_answer(reasoning)
    if _ANSWER not in reasoning or not answer:
        raise InputError(f"{where}: expected 'So {_ANSWER} …' in the example, got none")
    return PromptExample(question, reasoning, answer)


def find_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the path of each task file in the folder, by the file's name in `TASKS`.

    Raises:
      InputError: the folder or all files are missing, or a file's name is not in `TASKS`.
    """
    if not folder.is_dir():
        raise InputError(f"BBH_DIR {folder} must be a folder, got no such folder")
    # Hidden files, such as those that macOS adds to archives, are skipped.
    files = {path.stem: path for path in (folder / "bbh").glob("[!.]*.json")}
    if not files:
        raise InputError(f"BBH_DIR {folder} must hold bbh/<task>.json, got none")
    check_file_names(files, TASKS, "a task of BBH")
    return {name: files[name] for name in TASKS if name in files}


def register(
    bbh_dir: str | os.PathLike[str],
    vocab_path: str | os.PathLike[str],
    eval_examples: int | None = None,
) -> TaskRoles:
    """Registers the tasks of a folder, in place of the tasks of an earlier call.

    Args:
      bbh_dir: the folder (BBH_DIR).
      vocab_path: see `load_vocabulary` (VOCAB_PATH).
      eval_examples: maximum number of examples of each file, counted from the first
        (EVAL_EXAMPLES); None: all.

    Raises:
      InputError: an argument or a file is wrong, or a task has no prompt.
    """
    if eval_examples is not None:
        check_integer("EVAL_EXAMPLES", eval_examples)
    folder = pathlib.Path(bbh_dir).expanduser().absolute()
    locate_vocabulary(vocab_path)
    files = find_files(folder)
    examples = {name: read_examples(path, eval_examples) for name, path in files.items()}
    prompts = {name: read_prompt(folder / "cot-prompts" / f"{name}.txt") for name in files}

    # Imported here because it imports seqio, which takes about 5 s.
    from pemoe_jax.tasks import benchmark_tasks

    vocabulary = load_vocabulary(vocab_path)
    # mode -> seqio task -> name of its file
    names = {mode: {f"bbh_{mode}_{name}": name for name in files} for mode in _INSTRUCTIONS}
    tasks = []
    for mode, instruction in _INSTRUCTIONS.items():
        for task, name in names[mode].items():
            prompt = prompts[name]
            solved = [
                (
                    f"Q: {example.question}\n{instruction}",
                    example.reasoning if mode == "reasoning" else example.answer,
                )
                for example in prompt.examples
            ]
            # A partial function, because a lambda would see the `solved` of the last iteration.
            shots = benchmark_tasks.ShotsSource(
                f"{prompt.description}\n\n", functools.partial(list, solved)
            )
            rows = [(f"Q: {text}\n{instruction}", target) for text, target in examples[name]]
            tasks.append(
                benchmark_tasks.make_decoded_task(
                    task, rows, shots, vocabulary, extract_answer, exact_match
                )
            )
    datasets = {
        task: f"{TASKS[name]}_{mode}" for mode in names for task, name in names[mode].items()
    }
    mixtures = {f"{MIXTURE}_{mode}": list(names[mode]) for mode in names}
    benchmark_tasks.register(tasks, {**mixtures, MIXTURE: list(datasets)})
    benchmarks = [
        Benchmark(
            name=f"BBH, {mode}",
            noun="task",
            metric="exact_match",
            members=TASKS,
            tasks=names[mode],
        )
        for mode in names
    ]
    summary = [
        f"BBH_DIR {folder}: {len(files)} of {len(TASKS)} files,"
        f" {plural(sum(map(len, examples.values())), 'example')}"
    ]
    if missing := benchmarks[0].missing:
        summary.append(f"missing tasks, not in the means: {abbreviate(missing, 5)}")
    return TaskRoles(
        folder=str(folder),
        datasets=datasets,
        eval_tasks=list(datasets),
        eval_splits=dict.fromkeys(datasets, "test"),
        summary=summary,
        benchmarks=benchmarks,
    )
