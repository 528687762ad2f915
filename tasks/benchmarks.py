"""`Benchmark`: a published set of tasks whose mean score is reported."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import pathlib
import statistics
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pemoe_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published set of tasks whose mean score is reported.

    A benchmark has members, which have equal weights in its mean. A member is a task, or several
    tasks whose mean is taken first.

    Attributes:
      name: its name in tables.
      noun: what a member is called, such as 'subject'.
      metric: the metric of a task that is averaged.
      members: task, by its published name -> member; all tasks, also those without data.
      areas: member -> its area, if means of areas are reported.
      tasks: name of a registered task -> published name.
    """

    name: str
    noun: str
    metric: str
    members: Mapping[str, str]
    areas: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """The published tasks that are not registered."""
        return self._without(self.tasks.values())

    def summarize(self, scores: Mapping[str, float]) -> dict[str, Any] | None:
        """Averages the scores of registered tasks.

        Tasks without a score are named, and not in the means.

        Args:
          scores: registered task -> score; tasks of others are ignored.

        Returns:
          The benchmark's entry in results.json: 'noun', 'mean', 'members' (the number of those in
          the mean), 'of' (the number of all), 'areas' (area -> 'mean', which is None without
          members, 'members' and 'of') and 'missing' (published names of the tasks without a
          score). None if no task has a score.
        """
        by_member: dict[str, list[float]] = collections.defaultdict(list)
        scored = {self.tasks[task]: score for task, score in scores.items() if task in self.tasks}
        for task, score in scored.items():
            by_member[self.members[task]].append(score)
        if not by_member:
            return None
        means = {member: statistics.fmean(values) for member, values in by_member.items()}
        members = list(dict.fromkeys(self.members.values()))
        areas = {
            area: [member for member in members if self.areas[member] == area]
            for area in dict.fromkeys(self.areas.values())
        }
        return {
            "noun": self.noun,
            **_mean(means, members),
            "areas": {area: _mean(means, inside) for area, inside in areas.items()},
            "missing": self._without(scored),
        }

    def _without(self, tasks: Iterable[str]) -> list[str]:
        present = set(tasks)
        return [task for task in self.members if task not in present]


def _mean(means: Mapping[str, float], members: list[str]) -> dict[str, Any]:
    values = [means[member] for member in members if member in means]
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "members": len(values), "of": len(members)}


def check_file_names(
    files: Mapping[str, pathlib.Path], names: Collection[str], description: str
) -> None:
    """Raises InputError for a file of none of the names, such as 'a subject of MMLU'."""
    for name in sorted(set(files) - set(names)):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{files[name]}: {name!r} is not {description}{hint}")
