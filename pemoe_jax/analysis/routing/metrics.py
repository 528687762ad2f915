"""Metrics of a trained model's routers, from the totals of `probe` (not the metrics of training).

A probe runs a trained model on examples and sums its router probabilities. This module computes
distributions over experts, entropies, distances of tasks, loads and top tokens from these sums. The
metrics that a run logs while it trains are `core.routing.STATISTICS`.

A mean distribution divides each expert's total probability by the total over all experts. It
therefore sums to one even for top-k routers, whose probabilities may sum to less.

Shapes: `T` tasks, `E` experts of a site, `N` examples. A site is a path such as
'decoder/layers_3/mlp/gate', see `probe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pemoe_jax.analysis.routing import dispatch_probe, probe
from pemoe_jax.core import routing

MAX_TOP_TOKENS = 10
# Module -> prefix of the kinds of its sites, see `RouterEntropy.kind`.
_ATTENTION = {
    "attention": "self ",
    "self_attention": "self ",
    "encoder_decoder_attention": "cross ",
}
DISTANCE_DEFINITION = (
    "square root of the Jensen-Shannon divergence (base 2, so 0 to 1) of two tasks' mean"
    " distributions over experts, with the divergence averaged over the sites"
)


@dataclass(frozen=True)
class ProbedTask:
    """A task whose examples were probed.

    Attributes:
      name, dataset: name of the task, and of the dataset that it belongs to.
      is_trained: whether the run was trained on the dataset; None if unknown.
      split: the split that examples were read from.
      examples: number of probed examples.
    """

    name: str
    dataset: str
    is_trained: bool | None
    split: str
    examples: int


@dataclass(frozen=True)
class ProbeResult:
    """The probe's totals for one run, and the names of their rows and columns.

    Attributes:
      run: the run's name, method, checkpoint, step and parameter counts.
      tasks: T tasks, in the order of the axis T of `totals`.
      totals: the totals, as NumPy arrays.
      experts: {site: E} of every router, in layer order.
      sites: the sites shown in detail: in maps, distances of tasks, and tables of tokens.
      pieces: {token id: text} of the tokens that occurred.
      min_count: how often a token must occur to be a top token.
      dispatch: {site: counts of assignments in training} of the sparse layers, see
        `dispatch_probe`; empty for a dense model.
      experts_choose: whether the encoder's experts choose tokens.
      rows: description of the batch rows, laid out as in training, that `dispatch` was measured on.
      example_probs: {site: [N, E]} probabilities summed over the tokens of each example.
      example_tasks: indices of the examples' tasks, [N].
    """

    run: dict[str, object]
    tasks: list[ProbedTask]
    totals: probe.ProbeTotals
    experts: dict[str, int]
    sites: list[str]
    pieces: dict[int, str]
    min_count: int = 5
    dispatch: dispatch_probe.Totals = field(default_factory=dict)
    experts_choose: bool = False
    rows: str = ""
    example_probs: Mapping[str, np.ndarray] = field(default_factory=dict)
    example_tasks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def trained_tasks(self) -> list[str] | None:
        """Names of the tasks that the run was trained on; None if unknown."""
        if any(task.is_trained is None for task in self.tasks):
            return None
        return [task.name for task in self.tasks if task.is_trained]

    def distributions(self, site: str) -> np.ndarray:
        """Returns each task's mean distribution over experts [T, E]; zeros without tokens."""
        return mean_distributions(self.totals, site)


@dataclass(frozen=True)
class RouterEntropy:
    """Entropies of one router, with every task weighted equally.

    Attributes:
      site: e.g. 'decoder/layers_3/encoder_decoder_attention/key'.
      stack: 'encoder' or 'decoder'.
      layer: index of the layer in the stack.
      kind: last part of the site, in attention with 'self ' or 'cross ' in front: 'cross key'.
      token_entropy: mean entropy of single tokens' distributions, divided by log E; 0: each token
        uses one expert, 1: each token uses all experts equally. In sparse layers it is the entropy
        of the softmax, before experts are chosen.
      mean_entropy: entropy of the mean distribution, divided by log E; 0: one expert serves all
        tokens, 1: all experts are used equally.
      task_bits: Jensen-Shannon divergence of the distributions of all tasks, in bits, at most
        log2(min(T, E)); 0: the mixture of experts does not depend on the task.
      mass: mean sum of a token's probabilities; below 1 if only some experts are chosen and their
        probabilities are not renormalized.
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
    """Returns mean distributions over experts [T, E]; zeros for a task without tokens."""
    return _normalize(np.asarray(totals.probs[site]))


def _normalize(sums: np.ndarray) -> np.ndarray:
    # Tasks may differ in the fourth digit only. float64 keeps the differences of their entropies.
    sums = sums.astype(np.float64)
    # The lower bound keeps sums of no tokens, which are zeros, from becoming NaN.
    return sums / np.maximum(sums.sum(axis=-1, keepdims=True), 1e-30)


def entropy_bits(probs: np.ndarray) -> np.ndarray:
    """Returns the entropies in bits of distributions [..., E]."""
    # `where` skips zeros, whose logarithm stays 0: 0 log 0 = 0. Rounding may leave a sum of -1e-17.
    logs = np.log2(probs, where=probs > 0, out=np.zeros_like(probs, dtype=np.float64))
    return np.maximum(-(probs * logs).sum(axis=-1), 0.0)


def jensen_shannon(probs: np.ndarray) -> np.ndarray:
    """Returns the pairwise Jensen-Shannon divergences [T, T] in bits of distributions [T, E]."""
    entropy = entropy_bits(probs)
    midpoint = entropy_bits((probs[:, None] + probs[None]) / 2)
    divergences = np.clip(midpoint - (entropy[:, None] + entropy[None]) / 2, 0.0, 1.0)
    # Rounding leaves about 1e-16 on the diagonal, whose square root would be a distance of 1e-8.
    np.fill_diagonal(divergences, 0.0)
    return divergences


def task_distances(result: ProbeResult) -> np.ndarray:
    """Returns the distances of tasks [T, T], as `DISTANCE_DEFINITION` defines them."""
    # The square root of a divergence is a metric (Endres and Schindelin, 2003), and so is that of
    # the mean of several divergences.
    divergences = [jensen_shannon(result.distributions(site)) for site in result.sites]
    return np.sqrt(np.mean(divergences, axis=0))


def nearest_trained(result: ProbeResult) -> dict[str, tuple[str, float]]:
    """Returns {held-out task: (nearest trained task, distance)}; empty without both kinds."""
    distances, names = task_distances(result), result.task_names
    trained = [i for i, task in enumerate(result.tasks) if task.is_trained]
    held_out = [i for i, task in enumerate(result.tasks) if task.is_trained is False]
    if not trained:
        return {}
    nearest = {i: trained[int(np.argmin(distances[i, trained]))] for i in held_out}
    return {names[i]: (names[j], float(distances[i, j])) for i, j in nearest.items()}


def router_entropies(result: ProbeResult) -> list[RouterEntropy]:
    """Returns the entropies of every router, in layer order."""
    return [_router_entropy(result.totals, site, size) for site, size in result.experts.items()]


def _router_entropy(totals: probe.ProbeTotals, site: str, num_experts: int) -> RouterEntropy:
    num_tokens = np.asarray(totals.num_tokens[probe.token_stack(site)], np.float64)
    has_tokens = num_tokens > 0
    num_tokens = num_tokens[has_tokens]
    max_bits = np.log2(num_experts) or 1.0  # for a single expert, 0 / 1 instead of 0 / 0
    # Means are over tasks. In means over all tokens, tasks with long inputs would dominate.
    distributions = mean_distributions(totals, site)[has_tokens]
    token_bits = np.asarray(totals.entropy[site], np.float64)[has_tokens] / num_tokens / np.log(2)
    mean_bits = float(entropy_bits(distributions.mean(axis=0)))
    masses = np.asarray(totals.probs[site]).sum(axis=-1)[has_tokens] / num_tokens
    stack, layer, module, name = site.split("/")
    return RouterEntropy(
        site=site,
        stack=stack,
        layer=int(layer.removeprefix("layers_")),
        kind=_ATTENTION.get(module, "") + name,
        token_entropy=float(token_bits.mean() / max_bits),
        mean_entropy=mean_bits / max_bits,
        # The divergence is also the mutual information of task and expert, see `specialization`.
        task_bits=max(0.0, mean_bits - float(entropy_bits(distributions).mean())),
        mass=float(masses.mean()),
    )


@dataclass(frozen=True)
class SparseLoad:
    """Counts of a sparse layer's assignments in training, see `dispatch_probe`.

    Attributes:
      site: e.g. 'decoder/layers_1/mlp/experts'.
      experts_choose: whether experts choose tokens; then no assignment is dropped, but a token may
        have no expert.
      assigned: [E], for each expert the number of tokens that chose it, or that it chose.
      placed: [E], how many of them have a place within the expert's capacity, so that it computes
        them.
      tokens_by_experts: [E + 1], numbers of tokens that exactly 0, 1, … E experts compute.
    """

    site: str
    experts_choose: bool
    assigned: np.ndarray
    placed: np.ndarray
    tokens_by_experts: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.tokens_by_experts.sum())

    @property
    def load(self) -> np.ndarray:
        """Each expert's share of the assignments relative to an even share, [E]."""
        return len(self.assigned) * self.assigned / max(self.assigned.sum(), 1)

    @property
    def dead(self) -> int:
        """Number of experts with a load below `routing.DEAD_LOAD`."""
        return int((self.load < routing.DEAD_LOAD).sum())

    @property
    def dropped(self) -> float:
        """Share of the assignments that have no place."""
        return 1 - float(self.placed.sum() / max(self.assigned.sum(), 1))

    @property
    def shares_by_experts(self) -> np.ndarray:
        """Shares of the tokens that exactly 0, 1, … E experts compute, [E + 1]."""
        return self.tokens_by_experts / max(self.tokens, 1)

    @property
    def without_expert(self) -> float:
        """Share of the tokens that no expert computes."""
        return float(self.shares_by_experts[0])


def sparse_loads(result: ProbeResult) -> list[SparseLoad]:
    """Returns the loads of all sparse layers, in layer order; empty for a dense model."""
    loads = []
    for site in result.experts:
        if totals := result.dispatch.get(site):
            by_task = totals.assigned, totals.placed, totals.tokens_by_experts
            # In the decoder tokens always choose, see `Sparse.routing`.
            choose = result.experts_choose and site.startswith("encoder/")
            sums = (np.asarray(array, np.float64).sum(axis=0) for array in by_task)
            loads.append(SparseLoad(site, choose, *sums))
    return loads


@dataclass(frozen=True)
class TopToken:
    """A token that has a mean probability of an expert above the uniform 1/E.

    Attributes:
      id, piece: its id in the vocabulary and its text.
      count: how often it occurs.
      ratio: this probability as a multiple of 1/E.
    """

    id: int
    piece: str
    count: int
    ratio: float


def top_tokens(result: ProbeResult, site: str, limit: int = MAX_TOP_TOKENS) -> list[list[TopToken]]:
    """Returns, for each of E experts, the tokens with the largest ratios above 1.

    Tokens that occur fewer than `min_count` times are left out, since rare tokens have extreme
    ratios by chance.
    """
    counts = np.asarray(result.totals.token_counts[probe.token_stack(site)])
    ids = np.flatnonzero(counts >= result.min_count)
    probs = _normalize(np.asarray(result.totals.token_probs[site])[ids])  # [ids, E]
    tokens_by_expert = []
    for ratios in (probs * result.experts[site]).T:
        order = np.lexsort((-counts[ids], -ratios))[:limit]  # ties: the more frequent token first
        tokens_by_expert.append(
            [
                TopToken(token, result.pieces.get(token, f"<{token}>"), int(counts[token]), ratio)
                for token, ratio in zip(ids[order].tolist(), ratios[order].tolist(), strict=True)
                if ratio > 1
            ]
        )
    return tokens_by_expert
