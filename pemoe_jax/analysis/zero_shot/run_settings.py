"""Parses the settings of runs from `config.gin`, and groups runs that differ only in the seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from pemoe_jax.analysis.zero_shot.results import JsonObject

# Macros of a run's location and logging, which do not change its result.
_MACROS_WITHOUT_EFFECT = {
    "MODEL_DIR",
    "LOG_PERIOD",
    "EVAL_PERIOD",
    "EVAL_BATCHES",
    "CHECKPOINT_PERIOD",
    "KEEP_CHECKPOINTS",
    "ROUTER_METRICS",
}
_SEED_IN_NAME = re.compile(r"[-_. ]*seed[-_= ]?\d+", re.IGNORECASE)


def parse_settings(config: str) -> dict[str, str]:
    """Parses gin's text of a configuration into name -> value, of settings that affect a result."""
    joined = re.sub(r"\\\n\s*", "", config)  # gin wraps long lines with a backslash
    settings: dict[str, str] = {}
    for line in joined.splitlines():
        if assignment := re.match(r"([A-Za-z_][\w./]*) = (.*)", line):
            name, value = assignment.groups()
            settings[name] = value
        elif settings and line[:1] in (" ", "}", "]", ")"):  # a value of several lines
            settings[name] += f" {line.strip()}"
    return drop_wiring({n: v for n, v in settings.items() if n not in _MACROS_WITHOUT_EFFECT})


def read_settings(path: str) -> dict[str, str]:
    """Returns the parsed settings of a run, or nothing if `path` is no run or has no config.gin."""
    from pemoe_jax.checkpoints import runs  # imports jax, which reports do without

    config = runs.is_run(path) and runs.resolve(path)[0] / "config.gin"
    if not config or not config.is_file():
        return {}
    return parse_settings(config.read_text(errors="replace"))


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Returns 'NAME old -> new; …' of the settings that differ, '' if none does."""
    changes = []
    for name in {**before, **after}:
        old, new = (settings.get(name, "(not set)") for settings in (before, after))
        if old != new:
            changes.append(f"{name} {old:.60} -> {new:.60}")
    return "; ".join(changes)


def warn_of_other_eos(paths: Sequence[str]) -> None:
    """Warns of each run that was trained with another P3_INPUTS_EOS than gin has now."""
    from pemoe_jax.data import seqio_tasks
    from pemoe_jax.runtime import gin_flags

    current = gin_flags.macro_value("P3_INPUTS_EOS")
    for path in paths:
        trained = read_settings(path).get("P3_INPUTS_EOS", str(current))
        if current is not None and trained != str(current):
            seqio_tasks.warn_once(
                f"{path} was trained with P3_INPUTS_EOS={trained}, and P3_INPUTS_EOS is"
                f" {current}: pass --gin.P3_INPUTS_EOS={trained} for equal inputs"
            )


def drop_wiring(settings: Mapping[str, str]) -> dict[str, str]:
    """Removes bindings that only pass macros and option records to a command.

    They repeat the macros and change with the code. Without them, runs of different versions with
    equal macros have equal settings.
    """
    return {
        name: value
        for name, value in settings.items()
        if not value.startswith("%")
        and not (name.startswith(("train.", "evaluate.", "options.")) and value.startswith("@"))
    }


def fingerprint(settings: Mapping[str, str]) -> str:
    """Returns a hash of all settings but the seed."""
    lines = [f"{name} = {value}" for name, value in sorted(settings.items()) if name != "SEED"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def group_by_seed(runs: Sequence[JsonObject]) -> list[list[JsonObject]]:
    """Groups runs that differ only in the seed: equal settings, variant, step and tasks.

    If a seed occurs twice, say in a copied run, these runs are not grouped. Groups are in the order
    of their first run.
    """
    by_key: dict[tuple, list[int]] = {}
    for number, run in enumerate(runs):
        by_key.setdefault(_key_without_seed(run) or (number,), []).append(number)
    groups = []
    for group in by_key.values():
        seeds = {runs[i]["seed"] for i in group if "seed" in runs[i]}
        groups += [group] if len(seeds) == len(group) else [[i] for i in group]
    return [[runs[i] for i in group] for group in sorted(groups)]


def representative(group: Sequence[JsonObject]) -> JsonObject:
    """Returns the first run of a group; if there are more, its name is without the seed."""
    name = group[0]["name"]
    if len(group) > 1:
        name = _SEED_IN_NAME.sub("", name) or name
    return {**group[0], "name": name}


def _key_without_seed(run: JsonObject) -> tuple | None:
    # Results of older versions have no seed or settings.
    if not isinstance(run.get("seed"), int) or not run.get("settings"):
        return None
    tasks = tuple(sorted((name, task["examples"]) for name, task in run["tasks"].items()))
    return run["settings"], run.get("variant"), run.get("step"), tasks
