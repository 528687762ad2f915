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

    The mean is over members of equal weight. A member is a task, or several tasks whose scores are
    averaged first.

    Attributes:
      name: the benchmark's name in tables.
      noun: what a member is called, such as 'subject'.
      metric: name of the tasks' metric that is averaged.
      members: published name of each task -> its member. Tasks without data are included.
      areas: member -> its area, for benchmarks that report means of areas.
      tasks: name of each registered task -> its published name.
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
        return self._other_tasks(self.tasks.values())

    def summarize(self, scores: Mapping[str, float]) -> dict[str, Any] | None:
        """Averages the scores of registered tasks.

        Tasks without a score are left out of the means and listed as missing.

        Args:
          scores: registered task -> score. Tasks of other benchmarks are ignored.

        Returns:
          The benchmark's entry in results.json: 'noun'; 'mean'; 'members', the number of members
          in the mean, and 'of', the number of all members; 'areas': area -> 'mean' (None if no
          member has a score), 'members' and 'of'; and 'missing', the published names of the tasks
          without a score. None if no task has a score.
        """
        by_member: dict[str, list[float]] = collections.defaultdict(list)
        scored = {self.tasks[task]: score for task, score in scores.items() if task in self.tasks}
        for task, score in scored.items():
            by_member[self.members[task]].append(score)
        if not by_member:
            return None
        means = {member: statistics.fmean(values) for member, values in by_member.items()}
        # Members and areas are listed once each, in published order.
        members = list(dict.fromkeys(self.members.values()))
        areas = {
            area: [member for member in members if self.areas[member] == area]
            for area in dict.fromkeys(self.areas.values())
        }
        return {
            "noun": self.noun,
            **_average(means, members),
            "areas": {area: _average(means, in_area) for area, in_area in areas.items()},
            "missing": self._other_tasks(scored),
        }

    def _other_tasks(self, tasks: Iterable[str]) -> list[str]:
        """Returns the published tasks that are not among `tasks`."""
        present = set(tasks)
        return [task for task in self.members if task not in present]


def _average(means: Mapping[str, float], members: list[str]) -> dict[str, Any]:
    """Returns the mean over those of `members` that have one, and how many these are."""
    values = [means[member] for member in members if member in means]
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "members": len(values), "of": len(members)}


def check_file_names(
    files: Mapping[str, pathlib.Path], names: Collection[str], description: str
) -> None:
    """Raises InputError if a file has an unknown name, and suggests the most similar known one.

    Args:
      files: name -> path.
      names: the known names.
      description: what a known name is, for the error, such as 'a subject of MMLU'.
    """
    for name in sorted(set(files) - set(names)):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{files[name]}: {name!r} is not {description}{hint}")
