"""Settings whose values a sweep chooses, such as `+LEARNING_RATE=best(1e-3,3e-3)`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pemoe_jax.analysis.tables import MISSING, Table
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import file_io

# As flags: --gin.SETTING=best(value,…) and --gin.SETTING=best_of(experiment).
_BEST = re.compile(r"--gin\.([\w./]+)=best\((.*)\)")
_BEST_OF = re.compile(r"--gin\.([\w./]+)=best_of\((.*)\)")
_NOTE = (
    "Scores: accuracy in % by rank classification, with one seed, mean over prompts and then over"
    " datasets, on validation splits of training tasks (or the mixture of --choose_on). The value"
    " with the highest score is chosen; of equal ones, the first."
)


class Chosen(TypedDict):
    """An entry of `choices.json`: the value chosen for an experiment's setting.

    `scores` has the accuracy of each candidate in %, None for a training that failed.
    """

    experiment: str
    setting: str
    scores: dict[str, float | None]
    value: str


@dataclass(frozen=True)
class Choice:
    """A setting of an experiment whose value is chosen.

    Attributes:
      setting: name of the setting, such as LEARNING_RATE.
      values: the candidates of best(); empty for best_of().
      source: name of the experiment in best_of(), whose value is used; '' for best().
    """

    setting: str
    values: tuple[str, ...] = ()
    source: str = ""


def split_choice(settings: Sequence[str], experiment: str) -> tuple[list[str], Choice | None]:
    """Splits settings --gin.SETTING=value into those with a fixed value and the one to choose.

    Raises:
      InputError: there are several best() or best_of(); or a best() has fewer than two values, an
        empty one or equal ones, or is in an experiment with FROM.
    """
    fixed, choices = [], []
    for setting in settings:
        if match := _BEST_OF.fullmatch(setting):
            choices.append(Choice(match[1], source=match[2].strip()))
        elif match := _BEST.fullmatch(setting):
            values = tuple(value.strip() for value in match[2].split(","))
            are_different = len(set(values)) == len(values)
            if len(values) < 2 or not are_different or not all(values):
                raise InputError(
                    f"{experiment}: best() must have two or more different values, got {values}"
                )
            choices.append(Choice(match[1], values))
        else:
            fixed.append(setting)
    if len(choices) > 1:
        raise InputError(f"{experiment}: expected a single best(), got {len(choices)}")
    # Trials are planned without the other experiments, and so without the one that FROM names.
    if choices and choices[0].values and any(s.startswith("--gin.FROM=") for s in settings):
        raise InputError(f"{experiment}: best() must not be in an experiment with FROM")
    return fixed, choices[0] if choices else None


def choose(experiment: str, choice: Choice, folders: Mapping[str, Path]) -> Chosen:
    """Chooses the value with the highest score; among equal scores, the first value.

    Args:
      experiment: name of the experiment.
      choice: the setting and the values of its best().
      folders: value -> folder with the results of its trial, for the trials that succeeded.

    Raises:
      InputError: all trials failed.
    """
    scores: dict[str, float | None] = dict.fromkeys(choice.values)
    for value, folder in folders.items():
        (run,) = file_io.read_json(folder / "results.json")["runs"]
        scores[value] = 100 * run["average"]["mean"]
    # In the order of the candidates, so that `max` takes the first of equal scores.
    known = {value: score for value, score in scores.items() if score is not None}
    if not known:
        raise InputError(f"{experiment}: no training with one of the values of best() succeeded")
    return Chosen(
        experiment=experiment,
        setting=choice.setting,
        scores=scores,
        value=max(known, key=lambda value: known[value]),
    )


def choices_table(chosen: Sequence[Chosen]) -> Table:
    """Returns a table with a row for each experiment, the chosen value in bold."""
    rows = []
    for entry in chosen:
        cells = [
            f"{value}: {MISSING if score is None else f'{score:.1f}'}"
            for value, score in entry["scores"].items()
        ]
        rows.append([entry["experiment"], entry["setting"], entry["value"], "  ".join(cells)])
    columns = ["experiment", "setting", "chosen", "scores"]
    return Table("Values chosen on training tasks", columns, rows, notes=[_NOTE], num_text=4)
