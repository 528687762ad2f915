"""Which runs of several evaluations differ by their seed only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_OF_A_SEED = re.compile(r"[-_. ]*seed[-_= ]?\d+", re.IGNORECASE)


def groups(runs: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Indices of the runs, those together that differ by seed only, in the order of the first.

    Alike are settings, base and method, the step, and what was scored. A seed that is there twice
    (the same run from two places) leaves its runs apart.
    """
    found: dict[tuple, list[int]] = {}
    for number, run in enumerate(runs):
        found.setdefault(_key(run) or (number,), []).append(number)
    result = []
    for group in found.values():
        numbers = {runs[i]["seed"] for i in group if "seed" in runs[i]}
        result += [group] if len(numbers) == len(group) else [[i] for i in group]
    return sorted(result)


def named(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run that stands for the group in tables: the first, by the name that they share."""
    names = list(dict.fromkeys(_OF_A_SEED.sub("", run["name"]) for run in group))
    if len(group) == 1:
        return group[0]
    return {**group[0], "name": names[0] or group[0]["name"]}


def _key(run: dict[str, Any]) -> tuple | None:
    if not isinstance(run.get("seed"), int) or not run.get("settings"):
        return None
    scored = tuple(sorted((name, task["examples"]) for name, task in run["tasks"].items()))
    return run["settings"], run.get("variant"), run.get("step"), scored
