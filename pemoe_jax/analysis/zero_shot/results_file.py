"""Reads back what `evaluate` wrote: results.json and the predictions beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError

RESULTS = "results.json"
PREDICTIONS = "predictions"  # key of a run: the folder of its predictions

_OF_A_RUN = {"name": str, "datasets": dict, "average": dict, "tasks": dict}
_OF_A_TASK = {"dataset": str, "accuracy": (int, float), "chance": (int, float), "examples": int}


def load(path: str) -> dict[str, Any]:
    """The results of one evaluation.

    Args:
      path: of a results.json, or of a folder with one.

    Returns:
      {'runs': […]} as written, and with every run the folder of its predictions as `PREDICTIONS`.

    Raises:
      InputError: there is none, or it is not what `evaluate` writes.
    """
    file = Path(path)
    if file.is_dir():
        file /= RESULTS
    try:
        results = json.loads(file.read_text())
    except OSError as error:
        raise InputError(
            f"{file}: expected a {RESULTS} that `pemoe evaluate` wrote, or a folder"
            f" with one, found {error.strerror}"
        ) from None
    except ValueError as error:
        raise InputError(f"{file}: expected JSON, found {error}") from None
    runs = results.get("runs") if isinstance(results, dict) else None
    if not isinstance(runs, list) or not runs:
        raise InputError(f'{file}: expected {{"runs": [...]}} with at least one run, found none')
    for number, run in enumerate(runs):
        _check(run, _OF_A_RUN, f"{file}, run {number}")
        where = f"{file}, run {run['name']!r}"
        _check_run(run, where)
        run[PREDICTIONS] = str(file.parent / "predictions" / run["name"])
    return results


def answers(folder: str, task: str, result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """The predictions of one prompt: examples' numbers and whether each is right, both [N].

    Args:
      folder: of a run's predictions.
      task: the prompt.
      result: what results.json has of it.

    Returns:
      None where the file is absent.

    Raises:
      InputError: it is not of this result, or a line is not a prediction.
    """
    file = Path(folder) / f"{task}.jsonl"
    if not file.is_file():
        return None
    numbers, correct = [], []
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                numbers.append(int(row["idx"]))
                correct.append(bool(row["correct"]))
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f'{file}, line {number}: expected an object with "idx" and "correct", found'
                    f" {line.strip()[:60]!r}"
                ) from None
    accuracy = sum(correct) / max(1, len(correct))
    if len(correct) != result["examples"] or abs(accuracy - result["accuracy"]) > 1e-9:
        raise InputError(
            f"{file}: expected the predictions of {RESULTS}, {result['examples']} with accuracy"
            f" {result['accuracy']:.4f}, found {len(correct)} with {accuracy:.4f}; evaluate again,"
            " or --draws=0 for a report without intervals"
        )
    return np.array(numbers), np.array(correct, float)


def _check_run(run: dict[str, Any], where: str) -> None:
    if not run["tasks"]:
        raise InputError(f"{where}: expected at least one task, found none")
    for name, task in run["tasks"].items():
        _check(task, _OF_A_TASK, f"{where}, task {name!r}")
        if not 0 <= task["accuracy"] <= 1 or task["examples"] < 1:
            raise InputError(
                f"{where}, task {name!r}: expected an accuracy of 0 to 1 over at least one"
                f" example, found {task['accuracy']} over {task['examples']}"
            )
    for key in ("trainable", "total"):
        if not isinstance(run.get(key), int | None):
            raise InputError(f"{where}: expected {key!r} to be a number, found {run[key]!r}")
    if not isinstance(run.get("seed"), int | None):
        raise InputError(f"{where}: expected 'seed' to be a number, found {run['seed']!r}")
    trained = run.get("trained_datasets")
    is_list = isinstance(trained, list) and all(isinstance(name, str) for name in trained)
    if trained is not None and not is_list:
        raise InputError(
            f"{where}: expected 'trained_datasets' to be a list of names, found {trained!r}"
        )


def _check(value: Any, keys: dict[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {value!r:.60}")
    for key, kind in keys.items():
        found = value.get(key)
        if not isinstance(found, kind) or isinstance(found, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = {"str": "text", "dict": "an object", "int": "a number", "float": "a number"}
            expected = names[kinds[0].__name__]
            raise InputError(f"{where}: expected {key!r} to be {expected}, found {found!r:.60}")
