"""A run's settings as data, from the `config.gin` that it leaves beside its checkpoints."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

SEED = "SEED"

# Macros that say where a run is and what it tells, so that no result hangs on them.
_NOT_OF_THE_RESULT = {
    "MODEL_DIR",
    "LOG_PERIOD",
    "EVAL_PERIOD",
    "CHECKPOINT_PERIOD",
    "KEEP_CHECKPOINTS",
    "ROUTER_METRICS",
}


def read(text: str) -> dict[str, str]:
    """Gin's text of a configuration -> name -> value as text, of what the result hangs on."""
    joined = re.sub(r"\\\n\s*", "", text)  # gin breaks long lines
    found: dict[str, str] = {}
    for line in joined.splitlines():
        setting = re.match(r"([A-Za-z_][\w./]*) = (.*)", line)
        if setting:
            found[setting[1]] = setting[2]
            last = setting[1]
        elif found and line[:1] in (" ", "}", "]", ")"):  # of a value of several lines
            found[last] += f" {line.strip()}"
    return {name: value for name, value in found.items() if name not in _NOT_OF_THE_RESULT}


def fingerprint(settings: Mapping[str, str]) -> str:
    """Equal for runs that differ by their seed only."""
    lines = [f"{name} = {value}" for name, value in sorted(settings.items()) if name != SEED]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
