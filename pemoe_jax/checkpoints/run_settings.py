"""The settings of a run, parsed from its config.gin."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

# Macros of a run's location, logging and checkpoints, which do not change its result. NONFINITE and
# MAX_SKIPPED_STEPS matter only to a run in which a value is not finite.
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
    """Returns name -> value of the settings that affect a result, from the text of a config.gin."""
    joined = re.sub(r"\\\n\s*", "", config)  # gin wraps long lines with a backslash
    settings: dict[str, str] = {}
    for line in joined.splitlines():
        if assignment := re.match(r"([A-Za-z_][\w./]*) = (.*)", line):
            name, value = assignment.groups()
            settings[name] = value
        elif settings and line[:1] in (" ", "}", "]", ")"):  # continues the value of `name`
            settings[name] += f" {line.strip()}"
    return drop_wiring({n: v for n, v in settings.items() if n not in _MACROS_WITHOUT_EFFECT})


def read_settings(path: str) -> dict[str, str]:
    """Returns the settings of a run; {} if `path` is not a run or has no config.gin."""
    # `runs` imports jax, but `pemoe sweep` imports this module and has to start without jax.
    from pemoe_jax.checkpoints import runs
    from pemoe_jax.runtime import file_io

    config = runs.is_run(path) and runs.resolve(path)[0] / "config.gin"
    if not config or not config.is_file():
        return {}
    return parse_settings(file_io.read_text(config, "replace"))


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Returns the settings that differ as 'NAME old -> new; …'; '' if all are equal."""
    changes = []
    for name in {**before, **after}:
        old, new = (settings.get(name, "(not set)") for settings in (before, after))
        if old != new:
            changes.append(f"{name} {old:.60} -> {new:.60}")
    return "; ".join(changes)


def drop_wiring(settings: Mapping[str, str]) -> dict[str, str]:
    """Removes the bindings that only pass macros and dataclasses of options to a command.

    Such a binding repeats a macro, and its name changes with the code. Without these bindings, runs
    of different versions of the package have equal settings if their macros are equal.
    """
    return {
        name: value
        for name, value in settings.items()
        if not value.startswith("%")
        and not (name.startswith(("train.", "evaluate.", "options.")) and value.startswith("@"))
    }


def fingerprint(settings: Mapping[str, str]) -> str:
    """Returns a hash, 16 hexadecimal digits, of all settings except the seed."""
    lines = [f"{name} = {value}" for name, value in sorted(settings.items()) if name != "SEED"]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
