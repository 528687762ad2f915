"""Groups runs that differ only in the seed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pemoe_jax.analysis.zero_shot.results import JsonObject, shots_of

_SEED_IN_NAME = re.compile(r"[-_. ]*seed[-_= ]?\d+", re.IGNORECASE)


def group_by_seed(runs: Sequence[JsonObject]) -> list[list[JsonObject]]:
    """Groups runs that differ only in the seed: equal settings, variant, step, shots and tasks.

    If a seed occurs twice among such runs, for example in a copied run, each is a group of its own.
    Groups are in the order of their first runs.
    """
    by_key: dict[tuple, list[int]] = {}
    for number, run in enumerate(runs):
        # A run of unknown settings has a key of its own.
        by_key.setdefault(_key_without_seed(run) or (number,), []).append(number)
    groups = []
    for group in by_key.values():
        seeds = {runs[i]["seed"] for i in group if "seed" in runs[i]}
        groups += [group] if len(seeds) == len(group) else [[i] for i in group]
    return [[runs[i] for i in group] for group in sorted(groups)]


def first_run_without_seed(group: Sequence[JsonObject]) -> JsonObject:
    """Returns a group's first run, with the seed removed from its name if the group has several."""
    name = group[0]["name"]
    if len(group) > 1:
        name = _SEED_IN_NAME.sub("", name) or name
    return {**group[0], "name": name}


def _key_without_seed(run: JsonObject) -> tuple | None:
    """Returns the key that runs of one group share; None if the run lacks a seed or settings."""
    # Results of older versions have no seed or settings.
    if not isinstance(run.get("seed"), int) or not run.get("settings"):
        return None
    # The key has the numbers of examples, since accuracies over fewer examples are not comparable.
    tasks = tuple(
        sorted((name, task["dataset"], task["examples"]) for name, task in run["tasks"].items())
    )
    return run["settings"], run.get("variant"), run.get("step"), shots_of(run), tasks
