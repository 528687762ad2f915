"""From predictions to accuracies: of a prompt, of a data set over its prompts, of all data sets.

And what may be written over: `results.json` of an earlier evaluation or decoding.
"""

import collections
import json
import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.core.errors import InputError


def task_result(
    correct: Sequence[bool], chance: Sequence[float], dataset: str, split: str, odd: Sequence[str]
) -> dict[str, Any]:
    """One prompt.

    Args:
      correct: of each example, whether the chosen answer is the target.
      chance: of each example, the share of its choices that are the target.
      dataset: whose prompt it is.
      split: of which the examples are.
      odd: what was odd, once for each example.
    """
    return {
        "dataset": dataset,
        "split": split,
        "accuracy": statistics.fmean(correct),
        "chance": statistics.fmean(chance),
        "examples": len(correct),
        "odd": dict(collections.Counter(odd)),
    }


def summarise(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Data sets (median and mean over prompts, arXiv 2110.08207), and their averages.

    Args:
      tasks: name -> what `task_result` gave.

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
        }
        for name, members in sorted(by_dataset.items())
    }
    average = {
        measure: statistics.fmean(dataset[measure] for dataset in datasets.values())
        for measure in ("median", "mean", "chance")
    }
    return {"datasets": datasets, "average": average}


def check_replaced(folder: Path, checkpoints: Collection[str], tasks: Collection[str]) -> bool:
    """Whether the folder holds results, all of which a run is about to make again.

    Args:
      folder: where results.json is, or will be.
      checkpoints: of the run, as in results.json; their steps may be others than before.
      tasks: of the run.

    Raises:
      InputError: some would be lost: of another checkpoint or another task; or a results.json is
        there that is not ours.
    """
    file = folder / "results.json"
    if not file.exists():
        return False
    other = "choose another EVAL_OUTPUT_DIR, or delete it"
    try:
        runs = json.loads(file.read_text())["runs"]
        found = [(run["checkpoint"], task) for run in runs for task in run["tasks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is in the way, and not of an evaluation: {other}") from error
    again = {_place(path) for path in checkpoints}
    lost = [(path, task) for path, task in found if _place(path) not in again or task not in tasks]
    if lost:
        path, task = lost[0]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"{folder} holds results that would be lost: {path} on {task}{more}: {other}"
        )
    return True


def _place(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)
