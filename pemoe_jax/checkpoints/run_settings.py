"""The settings of a run, parsed from its config.gin."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

# Macros of a run's location and logging, which do not change its result.
_MACROS_WITHOUT_EFFECT = {
    "MODEL_DIR",
    "LOG_PERIOD",
    "EVAL_PERIOD",
    "EVAL_BATCHES",
    "CHECKPOINT_PERIOD",
    "KEEP_CHECKPOINTS",
    "KEEP_BEST",
    "NONFINITE",
    "MAX_SKIPPED_STEPS",
    "ROUTER_METRICS",
}


def parse_settings(config: str) -> dict[str, str]:
    """Returns name -> value of the settings that affect a result, from gin's text."""
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
    from pemoe_jax.checkpoints import runs  # imports jax, which `pemoe sweep` does without
    from pemoe_jax.runtime import file_io

    config = runs.is_run(path) and runs.resolve(path)[0] / "config.gin"
    if not config or not config.is_file():
        return {}
    return parse_settings(file_io.read_text(config, "replace"))


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Returns 'NAME old -> new; …' of the settings that differ, '' if none does."""
    changes = []
    for name in {**before, **after}:
        old, new = (settings.get(name, "(not set)") for settings in (before, after))
        if old != new:
            changes.append(f"{name} {old:.60} -> {new:.60}")
    return "; ".join(changes)


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
