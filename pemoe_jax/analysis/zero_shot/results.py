"""Computes, checks and loads the results.json of `pemoe evaluate`, and loads its predictions.

The file holds {"runs": [run, …]}. A run is identified by "name", "checkpoint" and "step", and with
shots also by "shots" and "shots_seed". It also has "tasks" (one per prompt, see `task_result`), and
"datasets" and "average" (see `summarize`). Accuracies are fractions in the file; tables show them
in %.
"""

import collections
import io
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io
from pemoe_jax.runtime.file_io import AnyPath

RESULTS = "results.json"
# `load_results` adds the folder of a task's predictions under this key.
PREDICTIONS = "predictions"
# Keys of a run in few-shot evaluation; zero-shot runs lack them.
SHOTS_KEYS = ("shots", "shots_seed")
# Values of `SHOTS_KEYS`: the number of shots and their seed.
Shots: TypeAlias = tuple[int, ...]
NO_SHOTS: Shots = (0, 0)

# Accuracy by log-probability per unit of length (setting LENGTH_NORMALIZED) -> the unit. The first
# two names are those of lm-evaluation-harness.
NORMALIZED = {"acc_norm": "character", "acc_bytes": "byte", "acc_tokens": "token"}

# A run, or a part of one, as read from JSON.
JsonObject: TypeAlias = dict[str, Any]

_Types: TypeAlias = type | tuple[type, ...]
_RUN_KEYS: dict[str, _Types] = {"name": str, "datasets": dict, "average": dict, "tasks": dict}
_TASK_KEYS: dict[str, _Types] = {
    "dataset": str,
    "accuracy": (int, float),
    "chance": (int, float),
    "examples": int,
}
# Keys of a run whose values are text or null, and counts or null.
_TEXTS = ("checkpoint", "method", "variant", "settings")
_NUMBERS = ("step", "seed", "trainable", "total", "used", "flops", "flops_with_places")
_MAX_SECONDS = 1e9  # about 30 years; any limit would do, to reject infinity
_STEP_TIME_KEYS: dict[str, _Types] = {"seconds": (int, float), "device": str, "batch": str}
_TYPE_NAMES: dict[_Types, str] = {
    **{str: "text", dict: "an object", int: "an integer"},
    (int, float): "a number",
}
_COUNT = "a non-negative 64-bit integer"


def task_result(
    correct: Sequence[bool],
    chance: Sequence[float],
    dataset: str,
    split: str,
    odd: Sequence[str],
    same_answer: str = "",
    shots_left_out: int | None = None,
    normalized: Mapping[str, Sequence[bool]] | None = None,
) -> JsonObject:
    """Returns the result of one task, that is, of one prompt of a dataset.

    Args:
      correct: for each example, whether the chosen answer is the target.
      chance: for each example, the fraction of its choices that are the target.
      dataset: name of the prompt's dataset.
      split: name of the split that was evaluated.
      odd: kinds of odd rows (keys of `row_checks.ODD_ROWS`) and 'tied_scores'; a kind occurs once
        for each example that has it.
      same_answer: return value of the function `same_answer`.
      shots_left_out: number of shots (solved examples in front of an input) that did not fit, over
        all examples; None without shots.
      normalized: name in `NORMALIZED` -> for each example, whether the answer with the highest
        score per unit of length is the target; None: not computed.
    """
    return {
        "dataset": dataset,
        "split": split,
        "accuracy": statistics.fmean(correct),
        "chance": statistics.fmean(chance),
        "examples": len(correct),
        "odd": dict(collections.Counter(odd)),
        **({"same_answer": same_answer} if same_answer else {}),
        **({} if shots_left_out is None else {"shots_left_out": shots_left_out}),
        **{name: statistics.fmean(values) for name, values in (normalized or {}).items()},
    }


def same_answer(answers: Iterable[tuple[int, Sequence[str]]]) -> str:
    """Returns the answer that a model gives to every example of a task; '' if answers differ.

    Examples with one choice are ignored. The result is also '' if fewer than two examples remain.

    Args:
      answers: for each example, the index of the chosen answer, and all choices.

    Returns:
      The text of the answer in quotes, or such as 'choice 1' if only its index is always the same.
    """
    chosen = [(index, choices[index].strip()) for index, choices in answers if len(choices) > 1]
    if len(chosen) < 2:
        return ""
    indices, texts = map(set, zip(*chosen, strict=True))
    if len(texts) == 1:
        return repr(chosen[0][1])
    return f"choice {chosen[0][0] + 1}" if len(indices) == 1 else ""


def summarize(tasks: Mapping[str, Mapping[str, Any]]) -> JsonObject:
    """Combines the results of prompts into those of datasets, and averages the datasets.

    A dataset has the median over its prompts, as in arXiv 2110.08207 (T0), and the mean. Datasets
    have equal weights in the average.

    Args:
      tasks: task -> its `task_result`.

    Returns:
      {'datasets': {name: {median, mean, chance, prompts, examples}}, 'average': {…}}.
    """
    by_dataset: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for task in tasks.values():
        by_dataset[task["dataset"]].append(task)
    datasets = {
        name: {
            "median": statistics.median(task["accuracy"] for task in members),
            "mean": statistics.fmean(task["accuracy"] for task in members),
            "chance": statistics.fmean(task["chance"] for task in members),
            "prompts": len(members),
            "examples": sum(task["examples"] for task in members),
            **_sum_known(members, "shots_left_out"),
        }
        for name, members in sorted(by_dataset.items())
    }
    average = {
        measure: statistics.fmean(dataset[measure] for dataset in datasets.values())
        for measure in ("median", "mean", "chance")
    }
    return {"datasets": datasets, "average": average}


def _sum_known(tasks: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    values = [task[key] for task in tasks if key in task]
    return {key: sum(values)} if values else {}


def check_overwrites(
    folder: AnyPath,
    checkpoints: Collection[str],
    tasks: Collection[str] | None = None,
    shots: Shots = NO_SHOTS,
    splits: Mapping[str, str] | None = None,
) -> bool:
    """Checks that an evaluation recomputes every result that it overwrites in `folder`.

    Steps may differ: evaluating a run again after more training replaces its results.

    Args:
      folder: the output folder.
      checkpoints: paths of the models to evaluate.
      tasks: names of the tasks to evaluate; None if they are not known yet.
      shots: return value of `shots_of` for this evaluation.
      splits: task, without `_score_eval` -> the split to evaluate, for tasks where it is known.

    Returns:
      Whether the folder has results.

    Raises:
      InputError: results of another checkpoint, task, split or number of shots would be lost, or
        the results.json is not one of `pemoe evaluate` or `pemoe infer`.
    """
    file = folder / RESULTS
    if not file.exists():
        return False
    advice = "choose another EVAL_OUTPUT_DIR, or delete this one"
    try:
        runs = file_io.parse_json(file.read_text(encoding="utf-8"))["runs"]
        existing = [
            (os.fspath(run["checkpoint"]), name, task.get("split"))
            for run in runs
            for name, task in run["tasks"].items()
        ]
        other_shots = [existing_shots for run in runs if (existing_shots := shots_of(run)) != shots]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected the results of an evaluation, got another file: {advice}"
        ) from error
    if other_shots:
        raise InputError(
            f"{folder}: results with {_describe_shots(other_shots[0])} would be lost, as this"
            f" evaluation has {_describe_shots(shots)}: {advice}"
        )
    for _, task, split in existing:
        # There is no error if a result has no split, or if the current split is not known.
        current = (splits or {}).get(task.removesuffix("_score_eval"), split)
        if split not in (None, current):
            raise InputError(
                f"{folder}: results of {task} on its split {split!r} would be lost, as this"
                f" evaluation is on {current!r}: {advice}"
            )
    recomputed = {_absolute(path) for path in checkpoints}
    lost = [
        (path, task)
        for path, task, _ in existing
        if _absolute(path) not in recomputed or (tasks is not None and task not in tasks)
    ]
    if lost:
        path, task = lost[0]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(f"{folder}: results of {path} on {task}{more} would be lost: {advice}")
    return True


def _describe_shots(shots: Shots) -> str:
    return f"SHOTS={shots[0]}" + (f" and SHOTS_SEED={shots[1]}" if shots[0] else "")


def load_results(path: str) -> JsonObject:
    """Loads a results.json, or the one in a folder.

    Returns:
      {'runs': […]} as in the file; each task also has the folder of its predictions, under the key
      `PREDICTIONS`.

    Raises:
      InputError: the file is missing, or is not a results.json of `pemoe evaluate`.
    """
    file = file_io.to_path(path)
    with file_io.remote_errors(file):
        if file.is_dir():
            file /= RESULTS
    try:
        results = file_io.parse_json(file.read_text(encoding="utf-8"))
        file_io.check_utf8(results)
    except OSError as error:
        raise InputError(
            f"{file}: expected a {RESULTS} of `pemoe evaluate`, or a folder with one, got"
            f" {error.strerror or 'none'}"
        ) from None
    except ValueError as error:
        raise InputError(f"{file}: expected JSON, got {error}") from None
    runs = results.get("runs") if isinstance(results, dict) else None
    if not isinstance(runs, list) or not runs:
        raise InputError(f'{file}: expected {{"runs": [...]}} with at least one run, got none')
    # Only keys that tables need are required, because results of older versions lack the others.
    for number, run in enumerate(runs):
        _check_not_decoded(run, file)
        _check_object(run, _RUN_KEYS, f"{file}, run {number}")
        _check_run(run, f"{file}, run {run['name']!r}")
        for task in run["tasks"].values():
            task[PREDICTIONS] = str(file.parent / "predictions" / run["name"])
    return results


def shots_of(run: JsonObject) -> Shots:
    """Returns a run's number of shots and their seed; zeros if it is zero-shot."""
    return tuple(run.get(key, 0) for key in SHOTS_KEYS)


def merge_runs(results: Iterable[JsonObject]) -> list[JsonObject]:
    """Returns all runs, after joining those of equal name, checkpoint, step and shots.

    A joined run has the tasks of all its parts. For a task that several of them have, the last
    result counts.

    Raises:
      InputError: results on the same task are of different splits.
    """
    runs: dict[tuple[Any, ...], JsonObject] = {}
    for run in (run for result in results for run in result["runs"]):
        identity = (run["name"], run.get("checkpoint"), run.get("step"), shots_of(run))
        runs[identity] = _join(runs[identity], run) if identity in runs else run
    return list(runs.values())


def _join(before: JsonObject, run: JsonObject) -> JsonObject:
    """Returns a run with the tasks of both, whose datasets and average are computed anew."""
    for name in before["tasks"].keys() & run["tasks"].keys():
        splits = [r["tasks"][name].get("split") for r in (before, run)]
        if None not in splits and splits[0] != splits[1]:
            raise InputError(
                f"{run['name']}: expected one split of {name!r}, got results on {splits[0]!r} and"
                f" {splits[1]!r}: pass only one of these results"
            )
    tasks = {**before["tasks"], **run["tasks"]}
    joined = {**run, "tasks": tasks, **summarize(tasks)}
    # Each part only knows which of its own datasets the run was trained on. If one part knows
    # nothing, the list for both is unknown.
    trained = [known for r in (before, run) if (known := r.get("trained_datasets")) is not None]
    joined["trained_datasets"] = sorted(set().union(*trained)) if len(trained) == 2 else None
    return joined


def load_predictions(
    folder: str, task: str, result: JsonObject
) -> tuple[np.ndarray, np.ndarray] | None:
    """Loads the predictions of one task from the folder of its run.

    Returns:
      Indices of the examples and whether each answer is correct, both [N]; None if there is no
      file.

    Raises:
      InputError: the predictions do not match `result`, the task's entry in results.json, or a
        line is not a prediction.
    """
    file = file_io.to_path(folder) / f"{task}.jsonl"
    try:
        if not file.is_file():
            return None
    except OSError as error:  # such as a task's name, from results.json, too long for a file
        raise InputError(f"{file!s:.200}: cannot be read: {error.strerror}") from None
    indices, correct = [], []
    # Invalid UTF-8 must not abort reading. Outside of JSON strings, it is reported as a bad line;
    # inside, it does not matter, since no text is used here.
    with io.StringIO(file_io.read_text(file, "surrogateescape")) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = file_io.parse_json(line)
                indices.append(row["idx"])
                correct.append(row["correct"])
                is_prediction = file_io.is_count(row["idx"]) and isinstance(row["correct"], bool)
            except (ValueError, KeyError, TypeError):
                is_prediction = False
            if not is_prediction:
                raise InputError(
                    f'{file}, line {number}: expected an object with "idx" and "correct", got'
                    f" {line.strip()[:60]!r}"
                )
    if len(set(indices)) < len(indices):
        raise InputError(f"{file}: expected a line for each example, got two with the same 'idx'")
    # If the predictions were of another evaluation, intervals would be around its accuracy.
    accuracy = sum(correct) / max(1, len(correct))
    if len(correct) != result["examples"] or abs(accuracy - result["accuracy"]) > 1e-9:
        raise InputError(
            f"{file}: expected {result['examples']} predictions with accuracy"
            f" {result['accuracy']:.4f}, as in {RESULTS}, got {len(correct)} with {accuracy:.4f}:"
            " evaluate again, or pass --draws=0 for a report without intervals"
        )
    return np.array(indices), np.array(correct, float)


def _check_run(run: JsonObject, where: str) -> None:
    """Raises InputError unless the values that reports read are of the right type and range."""
    if not run["tasks"]:
        raise InputError(f"{where}: expected at least one task, got none")
    for name, task in run["tasks"].items():
        _check_task(task, f"{where}, task {name!r}")
    for key in _TEXTS:
        if not isinstance(run.get(key), str | None):
            raise InputError(f"{where}: expected {key!r} to be text, got {run[key]!r:.60}")
    for key in _NUMBERS:
        if run.get(key) is not None and not file_io.is_count(run[key]):
            raise InputError(f"{where}: expected {key!r} to be {_COUNT}, got {run[key]!r:.60}")
    for key in SHOTS_KEYS:
        if not file_io.is_count(run.get(key, 0)):
            raise InputError(f"{where}: expected {key!r} to be {_COUNT}, got {run[key]!r:.60}")
    _check_step_times(run.get("step_times", []), where)
    evaluation = run.get("evaluation_seconds", 0.0)
    if type(evaluation) not in (int, float) or not 0 <= evaluation < _MAX_SECONDS:
        raise InputError(
            f"{where}: expected 'evaluation_seconds' to be a time, got {evaluation!r:.60}"
        )
    trained = run.get("trained_datasets")
    is_list = isinstance(trained, list) and all(isinstance(name, str) for name in trained)
    if trained is not None and not is_list:
        raise InputError(
            f"{where}: expected 'trained_datasets' to be a list of names, got {trained!r}"
        )


def _check_task(task: JsonObject, where: str) -> None:
    _check_object(task, _TASK_KEYS, where)
    if not 0 <= task["accuracy"] <= 1 or task["examples"] < 1:
        raise InputError(
            f"{where}: expected an accuracy of 0 to 1 over at least one example, got"
            f" {task['accuracy']} over {task['examples']}"
        )
    for key in NORMALIZED.keys() & task.keys():
        # `type`, because bool is a subclass of int.
        if type(task[key]) not in (int, float) or not 0 <= task[key] <= 1:
            raise InputError(f"{where}: expected {key!r} to be 0 to 1, got {task[key]!r:.60}")
    if not 0 <= task["chance"] <= 1:
        raise InputError(f"{where}: expected a chance of 0 to 1, got {task['chance']}")
    if not file_io.is_count(task.get("shots_left_out", 0)):
        raise InputError(
            f"{where}: expected 'shots_left_out' to be {_COUNT}, got {task['shots_left_out']!r:.60}"
        )


def _check_step_times(step_times: object, where: str) -> None:
    if not isinstance(step_times, list):
        raise InputError(f"{where}: expected 'step_times' to be a list, got {step_times!r:.60}")
    for step_time in step_times:
        _check_object(step_time, _STEP_TIME_KEYS, f"{where}, step_times")
        seconds = step_time["seconds"]
        if not 0 < seconds < _MAX_SECONDS:
            raise InputError(
                f"{where}, step_times: expected positive 'seconds', got {seconds!r:.60}"
            )
        if not file_io.is_count(step_time.get("memory", 0)):
            raise InputError(
                f"{where}, step_times: expected 'memory' in bytes, got {step_time['memory']!r:.60}"
            )


def _check_not_decoded(run: object, file: AnyPath) -> None:
    """Raises InputError if a run is one of `pemoe infer`, which has metrics and no accuracy."""
    tasks = run.get("tasks") if isinstance(run, dict) else None
    for task in tasks.values() if isinstance(tasks, dict) else ():
        if isinstance(task, dict) and "metrics" in task and "accuracy" not in task:
            raise InputError(
                f"{file}: expected results of `pemoe evaluate`, got those of `pemoe infer`"
            )


def _check_object(value: object, keys: Mapping[str, _Types], where: str) -> None:
    """Raises InputError unless a JSON value is an object with members of these types."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, got {value!r:.60}")
    for key, types in keys.items():
        member = value.get(key)
        # In Python bool is an int; in JSON true is not a number.
        if not isinstance(member, types) or isinstance(member, bool):
            raise InputError(
                f"{where}: expected {key!r} to be {_TYPE_NAMES[types]}, got {member!r:.60}"
            )


def _absolute(path: str) -> str:
    # One evaluation may name a checkpoint by a relative path, another by the absolute one.
    return path if "://" in path else os.path.abspath(path)
