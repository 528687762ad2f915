"""From predictions to accuracies: of a prompt, of a data set over its prompts, of all data sets."""

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


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
