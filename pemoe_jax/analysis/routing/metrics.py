"""What routers did, in numbers: shares of experts, entropies, distances of tasks, top tokens.

An expert's share of a mixture is its probability as a part of the sum of all: the same for soft
routers, whose probabilities sum to one, and comparable for a top-k router that keeps less.

Shapes: `T` tasks, `E` experts. A site is 'decoder/layers_3/mlp/gate'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pemoe_jax.analysis.routing import probe

MAX_TOP_TOKENS = 10
DISTANCE_DEFINITION = (
    "square root of the Jensen-Shannon divergence (base 2, so 0 to 1) of two tasks' mean"
    " distributions over experts, the divergence being the mean over the sites"
)


@dataclass(frozen=True)
class ProbedTask:
    """A task that was looked at; `seen`: trained on; None: not known."""

    name: str
    dataset: str
    seen: bool | None
    split: str
    examples: int


@dataclass(frozen=True)
class ProbeResult:
    """What the routers of one run did.

    Attributes:
      about: of the run: name, method, checkpoint, step, …
      tasks: T of them, in the order of the rows of `totals`.
      totals: as numpy arrays.
      experts: {site: E} of every router, in the order of layers.
      sites: those that tables, maps, distances and tokens are of.
      pieces: the text of the token ids that were met.
      min_count: tokens met less often are no top tokens.
    """

    about: dict[str, Any]
    tasks: list[ProbedTask]
    totals: probe.ProbeTotals
    experts: dict[str, int]
    sites: list[str]
    pieces: dict[int, str]
    min_count: int = 5

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return [task.name for task in self.tasks]

    @property
    def seen(self) -> list[str] | None:
        """The names of tasks that were trained on; None: not known."""
        if any(task.seen is None for task in self.tasks):
            return None
        return [task.name for task in self.tasks if task.seen]


@dataclass(frozen=True)
class RouterEntropy:
    """A router's entropies as shares of log E, each task counting alike.

    Attributes:
      site, stack, layer, kind: 'decoder/layers_3/mlp/gate', 'decoder', 3, 'gate'.
      token_entropy: the mean of single distributions' entropies: 0 decided, 1 undecided.
      mean_entropy: the entropy of their mean: 0 one expert does it all, 1 all are used alike.
      task_bits: what of it is lost within tasks, in bits: 0 where the mixture does not hang on
        the task, at most log2 of the lesser of T and E (the Jensen-Shannon divergence of all).
      mass: the mean sum of the probabilities; 1 but for a top-k router that does not renormalise.
    """

    site: str
    stack: str
    layer: int
    kind: str
    token_entropy: float
    mean_entropy: float
    task_bits: float
    mass: float


def mean_distributions(totals: probe.ProbeTotals, site: str) -> np.ndarray:
    """[T, E] each task's mean distribution over experts; of a task without tokens zeros."""
    return _scaled(totals.probs[site])


def _scaled(totals: np.ndarray) -> np.ndarray:
    totals = np.asarray(totals, np.float64)
    return totals / np.maximum(totals.sum(axis=-1, keepdims=True), 1e-30)


def entropy_bits(probs: np.ndarray) -> np.ndarray:
    """Distributions [..., E] -> [...] in bits."""
    logs = np.log2(probs, where=probs > 0, out=np.zeros_like(probs, dtype=np.float64))
    return np.maximum(-(probs * logs).sum(axis=-1), 0.0)


def jensen_shannon(probs: np.ndarray) -> np.ndarray:
    """[T, E] -> [T, T] Jensen-Shannon divergences in bits, 0 to 1."""
    middle = entropy_bits((probs[:, None] + probs[None]) / 2)
    own = entropy_bits(probs)
    found = np.clip(middle - (own[:, None] + own[None]) / 2, 0.0, 1.0)
    np.fill_diagonal(found, 0.0)
    return found


def task_distances(routing: ProbeResult) -> np.ndarray:
    """[T, T], see `DISTANCE`; it is a metric."""
    parts = [jensen_shannon(mean_distributions(routing.totals, site)) for site in routing.sites]
    return np.sqrt(np.mean(parts, axis=0))


def nearest_trained(routing: ProbeResult) -> dict[str, tuple[str, float]]:
    """{unseen task: (the nearest seen one, its distance)}; empty where one kind is missing."""
    found = task_distances(routing)
    seen = [i for i, task in enumerate(routing.tasks) if task.seen]
    unseen = [i for i, task in enumerate(routing.tasks) if task.seen is False]
    if not seen:
        return {}
    nearest = {i: min(seen, key=lambda j, i=i: found[i, j]) for i in unseen}  # type: ignore[misc]
    names = routing.names
    return {names[i]: (names[j], float(found[i, j])) for i, j in nearest.items()}


def router_entropies(routing: ProbeResult) -> list[RouterEntropy]:
    """Entropies of every router, in the order of layers."""
    return [_layer(routing, site, size) for site, size in routing.experts.items()]


def _layer(routing: ProbeResult, site: str, experts: int) -> RouterEntropy:
    totals, stack = routing.totals, probe.token_stack(site)
    tokens = np.asarray(totals.num_tokens[stack], np.float64)
    there = tokens > 0
    most = np.log2(experts) or 1.0  # of one expert all entropies are 0
    probs = mean_distributions(totals, site)[there]
    single = np.asarray(totals.entropy[site], np.float64)[there] / tokens[there] / np.log(2)
    mean_entropy = float(entropy_bits(probs.mean(axis=0)))
    place, layer, kind = split_site(site)
    return RouterEntropy(
        site=site,
        stack=place,
        layer=layer,
        kind=kind,
        token_entropy=float(single.mean() / most),
        mean_entropy=mean_entropy / most,
        task_bits=max(0.0, mean_entropy - float(entropy_bits(probs).mean())),
        mass=float((np.asarray(totals.probs[site]).sum(axis=-1)[there] / tokens[there]).mean()),
    )


def split_site(site: str) -> tuple[str, int, str]:
    """'decoder/layers_3/encoder_decoder_attention/key' -> ('decoder', 3, 'cross key')."""
    stack, layer, module, name = site.split("/")
    prefix = "cross " if module == "encoder_decoder_attention" else "self "
    prefix = prefix if module.endswith("attention") else ""
    return stack, int(re.sub(r"\D", "", layer)), f"{prefix}{name}"


@dataclass(frozen=True)
class TopToken:
    """A token that an expert has more of than an even share; `ratio` is its share times E."""

    id: int
    piece: str
    count: int
    ratio: float


def top_tokens(routing: ProbeResult, site: str, most: int = MAX_TOP_TOKENS) -> list[list[TopToken]]:
    """Of each of E experts the tokens with its largest share, where that is above an even one.

    Tokens met less often than `min_count` are left out.
    """
    counts = np.asarray(routing.totals.token_counts[probe.token_stack(site)])
    ids = np.flatnonzero(counts >= routing.min_count)
    ratios = _scaled(np.asarray(routing.totals.token_probs[site])[ids]) * routing.experts[site]
    found = []
    for column in ratios.T:
        order = np.lexsort((-counts[ids], -column))[:most]
        order = order[column[order] > 1]
        found.append(
            [
                TopToken(int(ids[i]), _piece(routing.pieces, int(ids[i])), int(counts[ids[i]]), r)
                for i, r in zip(order, column[order].tolist(), strict=True)
            ]
        )
    return found


def _piece(pieces: Mapping[int, str], token: int) -> str:
    return pieces.get(token, f"<{token}>")
