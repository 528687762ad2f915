"""Mutual information of task and expert: how much the use of experts differs between tasks.

Tasks have equal weights, and p(expert | task) is the mean distribution over the task's tokens. The
mutual information is the entropy of the tasks' mean distribution minus the mean of their entropies:
I = H(mean_t p_t) - mean_t H(p_t). It is 0 if all tasks use the experts alike. For T tasks and E
experts, it is at most log2(min(T, E)) bits. T <= E tasks reach this maximum if no two of them share
an expert.

Because the examples of a task are a sample, the measured value is above 0 even if routing does not
depend on the task. It is therefore compared with chance: the values after permuting the task labels
of the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pemoe_jax.analysis.routing.metrics import ProbeResult, entropy_bits
from pemoe_jax.analysis.tables import Table

SHUFFLES = 200  # ten of them exceed the 95 % quantile
_QUANTILE = 0.95
_GROUPS = {True: "trained on", False: "held out"}
_NOTE = (
    "Information: mutual information of task and expert, with equal weights of the tasks; 0 if"
    " routing does not depend on the task. Normalized: as a fraction of its maximum, log2 of the"
    " number of tasks or of experts, whichever is smaller. Shuffled: the information with the tasks"
    f" of the examples shuffled, mean and 95 % quantile of {SHUFFLES} shuffles; information below"
    " this quantile may be due to chance. A layer's row is the mean over its sites; the last"
    " rows are means over the sites shown in detail."
)


@dataclass(frozen=True)
class Specialization:
    """Mutual information of task and expert, averaged over sites.

    Attributes:
      sites: the sites.
      group: the tasks that were measured: 'trained on', 'held out', or 'all' if it is unknown which
        tasks the run was trained on.
      tasks: T, the number of tasks in the group.
      bits: the mutual information.
      normalized: the mutual information as a fraction of log2(min(T, E)).
      shuffled_mean, shuffled_high: mean and 95 % quantile of `bits` over permutations of the tasks.
    """

    sites: tuple[str, ...]
    group: str
    tasks: int
    bits: float
    normalized: float
    shuffled_mean: float
    shuffled_high: float


def mutual_information(sums: np.ndarray) -> np.ndarray:
    """Returns the mutual information in bits [...] of task and expert.

    Args:
      sums: probabilities summed over the tokens of each task [..., T, E].
    """
    distributions = sums / np.maximum(sums.sum(axis=-1, keepdims=True), 1e-30)
    mean_bits = entropy_bits(distributions.mean(axis=-2))
    return np.maximum(mean_bits - entropy_bits(distributions).mean(axis=-1), 0.0)


def measure(result: ProbeResult, shuffles: int = SHUFFLES) -> list[Specialization]:
    """Returns the specialization of each layer and, as the last entries, of `result.sites`.

    Each has one entry for the tasks that the run was trained on and one for the held-out tasks, or
    one for all tasks if it is unknown which were trained on. A group of fewer than two tasks has no
    entry. The list is empty if the result has no probabilities per example.
    """
    if not result.example_probs:
        return []
    layers: dict[str, list[str]] = {}
    for site in result.experts:
        layers.setdefault(site.rsplit("/", 2)[0], []).append(site)
    site_groups = [*map(tuple, layers.values()), tuple(result.sites)]
    entries: list[list[Specialization]] = [[] for _ in site_groups]
    for group, tasks in _task_groups(result).items():
        bits, shuffled = _measure_sites(result, tasks, shuffles)
        for sites, site_entries in zip(site_groups, entries, strict=True):
            max_bits = [np.log2(min(len(tasks), result.experts[site])) for site in sites]
            shuffled_bits = np.mean([shuffled[site] for site in sites], axis=0)
            mean_bits = float(np.mean([bits[site] for site in sites]))
            site_entries.append(
                Specialization(
                    sites=sites,
                    group=group,
                    tasks=len(tasks),
                    bits=mean_bits,
                    # With a single expert, the information and its maximum are 0.
                    normalized=mean_bits / (float(np.mean(max_bits)) or 1.0),
                    shuffled_mean=float(shuffled_bits.mean()),
                    shuffled_high=float(np.quantile(shuffled_bits, _QUANTILE)),
                )
            )
    return [entry for site_entries in entries for entry in site_entries]


def _task_groups(result: ProbeResult) -> dict[str, list[int]]:
    """Returns {group: indices of its tasks} for the groups of at least two tasks."""
    if any(task.is_trained is None for task in result.tasks):
        groups = {"all": list(range(len(result.tasks)))}
    else:
        groups = {
            name: [i for i, task in enumerate(result.tasks) if task.is_trained is is_trained]
            for is_trained, name in _GROUPS.items()
        }
    return {name: tasks for name, tasks in groups.items() if len(tasks) > 1}


def _measure_sites(
    result: ProbeResult, tasks: Sequence[int], shuffles: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns, for the given tasks, {site: bits} and {site: [shuffles] bits after each shuffle}."""
    chosen = np.isin(result.example_tasks, tasks)
    # Renumbers the chosen tasks as 0, 1, …
    labels = np.searchsorted(tasks, result.example_tasks[chosen])
    rng = np.random.default_rng(0)
    # All sites use the same permutations: entry k averaged over sites is then the value of
    # permutation k.
    orders = [labels, *(rng.permutation(labels) for _ in range(shuffles))]
    one_hot = np.stack(orders)[:, None] == np.arange(len(tasks))[:, None]  # [1 + shuffles, T, N]
    one_hot = one_hot.astype(np.float64)
    # For the true labels and for each shuffle, the product sums the probabilities of each task's
    # examples.
    values = {
        site: mutual_information(one_hot @ np.asarray(probs[chosen], np.float64))
        for site, probs in result.example_probs.items()
    }
    return {site: float(v[0]) for site, v in values.items()}, {s: v[1:] for s, v in values.items()}


def to_table(entries: Sequence[Specialization]) -> Table | None:
    """Returns a table with a row for each layer and group of tasks; None without entries."""
    if not entries:
        return None
    rows = []
    for entry in entries:
        rows.append(
            [
                _name(entry.sites),
                entry.group,
                str(entry.tasks),
                f"{entry.bits:.4f}",
                f"{entry.normalized:.4f}",
                f"{entry.shuffled_mean:.4f}",
                f"{entry.shuffled_high:.4f}",
            ]
        )
    columns = ["sites", "group", "tasks", "information (bits)", "normalized"]
    columns += ["shuffled (bits)", "95 %"]
    title = "Specialization: mutual information of task and expert"
    return Table(title, columns, rows, notes=[_NOTE], num_text=2)


def _name(sites: Sequence[str]) -> str:
    """Returns the layers of the sites and the number of sites: 'decoder/layers_3 (8 sites)'."""
    layers = list(dict.fromkeys(site.rsplit("/", 2)[0] for site in sites))
    return f"{', '.join(layers)} ({len(sites)} site{'s' * (len(sites) > 1)})"


def to_json(entries: Sequence[Specialization]) -> list[Mapping[str, object]]:
    """Returns the entries of routes.json, with six decimals."""
    return [
        {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in vars(entry).items()
        }
        for entry in entries
    ]
