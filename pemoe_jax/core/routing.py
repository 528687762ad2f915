"""Routers of adapters: soft or top-k distributions over experts (arXiv 2309.05444, section 2.2).

    p = softmax(h W / τ)

for each token, where h are the features that the router reads, and τ is the temperature. The
mixture uses all of p (soft routing) or its k largest values (top-k routing). The routers of sparse
MLPs are in `experts`, and their top-k is `dispatch.choose_experts`. This module also summarizes the
statistics of both kinds of routers.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import settings
from pemoe_jax.core.kernels import thin_matmul
from pemoe_jax.core.params import PyTree

Array = jax.Array
Initializer = jax.nn.initializers.Initializer

# The entries of `RouterOutput.statistics`, in order; see `compute_statistics`.
STATISTICS = ("entropy", "load", "dead", "balance_loss", "z_loss", "aux_loss")
# An expert is dead if its load is below this fraction of an even load.
DEAD_LOAD = 0.01
# The int8 values of the array `assignments` [..., E] that a sparse layer sows for its tokens.
NOT_ASSIGNED, DROPPED, PLACED = 0, 1, 2
# The end of a sparse layer's path in `sown_by_router`. An adapter's path ends in '<site>_adapter'.
EXPERTS_SITE = "mlp/experts"
# Router metrics are averaged over the layers of a stack ('sites'), or reported for each router.
DETAIL_LEVELS = ("sites", "layers")


@flax.struct.dataclass
class TokenInfo:
    """Information about the tokens of a batch that routers and dropout need.

    Attributes:
      valid: [B, L], False or 0 at padding, which statistics ignore; None if nothing is padding.
      sentence: [B, S], an embedding of each row's example, for routers that read it.
      deterministic: whether noise and dropout are disabled.
    """

    valid: Array | None = None
    sentence: Array | None = None
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)


class RouterOutput(NamedTuple):
    """The output of a router.

    Attributes:
      probs: float32 [..., E], the weights of the experts in the mixture. They sum to one unless
        `top_k` is set without `renormalize`.
      statistics: float32 [6], the `STATISTICS` over tokens that are not padding.
    """

    probs: Array
    statistics: Array


class Router(nn.Module):
    """A linear layer without bias and a softmax over experts, in float32.

    Attributes:
      num_experts: E.
      top_k: number of largest probabilities to keep; the others become zero. None keeps all.
      renormalize: whether the kept probabilities are rescaled to sum to one (not in the paper).
      straight_through: whether top-k routing has the gradients of soft routing (the
        straight-through estimator, arXiv 1308.3432).
      temperature: divides the logits.
      jitter_noise: ε; in training, features are multiplied by U(1 - ε, 1 + ε) (arXiv 2101.03961).
      balance_loss: α of the load-balance loss α·E·Σ f_i P_i (arXiv 2101.03961).
      z_loss: coefficient of the mean of log(Z)², where Z is the softmax's denominator
        (arXiv 2202.08906).
      reads: 'x' (the input of the site's projection), 'y' (its output) or 'sentence' (an embedding
        of the example: one distribution for all its tokens); None: as in the paper, y for vector
        experts and x for LoRA experts.
      kernel_init: initializer of the kernel, by default the N(0, 0.02²) of the paper's code.
      feature_axis: logical name of the features' last axis; the adapter sets it.

    Raises:
      InputError: a setting is out of its range.
    """

    num_experts: int
    top_k: int | None = None
    renormalize: bool = False
    straight_through: bool = False
    temperature: float = 1.0
    jitter_noise: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0
    reads: str | None = None
    kernel_init: Initializer = nn.initializers.normal(stddev=0.02)
    feature_axis: str = "embed"

    @nn.compact
    def __call__(self, features: Array, tokens: TokenInfo | None = None) -> RouterOutput:
        """Routes features [B, L, ..., D], or sentence embeddings [B, S]."""
        settings.check_router(self)
        tokens = tokens or TokenInfo()
        shape, axes = (features.shape[-1], self.num_experts), (self.feature_axis, "unmodeled")
        kernel = params_lib.param(self, "kernel", self.kernel_init, shape, axes)
        features = features.astype(jnp.float32)
        if self.has_noise(tokens):
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            rng = self.make_rng("dropout")  # T5X passes no other key
            features *= jax.random.uniform(rng, features.shape, minval=low, maxval=high)
        return self.route(thin_matmul.thin_matmul(features, kernel), tokens)

    def route(self, logits: Array, tokens: TokenInfo | None = None) -> RouterOutput:
        """Returns the output for logits [..., E], the products of the features with the kernel."""
        valid = None if tokens is None else tokens.valid
        top_k_options = self.top_k, self.renormalize, self.straight_through
        losses = self.balance_loss, self.z_loss
        return _route(logits, valid, self.temperature, *top_k_options, *losses)

    def has_noise(self, tokens: TokenInfo | None) -> bool:
        """Whether features are multiplied by noise: in training, with `jitter_noise`."""
        return bool(self.jitter_noise) and tokens is not None and not tokens.deterministic

    def is_soft(self, tokens: TokenInfo | None) -> bool:
        """Whether the probabilities are the softmax itself: no top-k, no noise."""
        keeps_all = self.top_k is None or self.top_k >= self.num_experts
        return keeps_all and not self.has_noise(tokens)


RouterFactory = Callable[..., Router]  # (num_experts=..., feature_axis=..., name=...)


# Jitted, so that it is traced once for all routers with the same shapes. A model has hundreds of
# routers, which took a third of MoLORA's tracing time. With `inline`, the compiled program is the
# same as without jit.
@functools.partial(jax.jit, inline=True, static_argnums=range(2, 8))
def _route(
    logits: Array,
    valid: Array | None,
    temperature: float,
    top_k: int | None,
    renormalize: bool,
    straight_through: bool,
    balance_loss: float,
    z_loss: float,
) -> RouterOutput:
    logits /= temperature
    soft = jax.nn.softmax(logits, axis=-1)
    probs = soft
    if top_k is not None and top_k < logits.shape[-1]:
        probs = _keep_largest(soft, top_k)
        if renormalize:
            probs /= jnp.sum(probs, axis=-1, keepdims=True)
        if straight_through:  # the value of top-k routing, the gradient of `soft`
            probs = soft + jax.lax.stop_gradient(probs - soft)
    statistics = compute_statistics(logits, soft, probs, _token_weights(logits, valid))
    aux_loss = jnp.zeros(())
    # A term with coefficient 0 is left out. XLA does not simplify `0 * x`, since x may be NaN, and
    # would compute x and its gradient.
    if balance_loss:
        aux_loss += balance_loss * statistics[STATISTICS.index("balance_loss")]
    if z_loss:
        aux_loss += z_loss * statistics[STATISTICS.index("z_loss")]
    # Of the statistics, only the auxiliary loss has a gradient. Otherwise, gradients that are zero
    # would be computed from the metrics back through the whole network.
    return RouterOutput(probs, jnp.append(jax.lax.stop_gradient(statistics), aux_loss))


def _keep_largest(probs: Array, k: int) -> Array:
    """Sets all but the k largest entries of the last axis to 0; of equal ones, keeps the first."""
    # The mask comes from the indices, since a threshold would keep more than k experts in a tie.
    _, indices = jax.lax.top_k(jax.lax.stop_gradient(probs), k)
    mask = jnp.sum(jax.nn.one_hot(indices, probs.shape[-1], dtype=probs.dtype), axis=-2)
    return probs * mask


def _token_weights(logits: Array, valid: Array | None) -> Array:
    """Returns the weight of each distribution: [B, L, ...] for logits [B, L, ..., E].

    For logits [B, E] with one distribution per row, returns [B].
    """
    if valid is None:
        return jnp.ones(logits.shape[:-1], jnp.float32)
    valid = valid.astype(jnp.float32)
    if logits.ndim == 2:  # the distribution of a row counts once for each of the row's tokens
        return jnp.sum(valid, axis=1)
    valid = valid.reshape(*valid.shape, *([1] * (logits.ndim - 3)))
    return jnp.broadcast_to(valid, logits.shape[:-1])


def compute_statistics(logits: Array, soft: Array, probs: Array, weights: Array) -> Array:
    """Returns all `STATISTICS` but aux_loss, float32 [5], as weighted means over distributions.

    - entropy: the entropy of the softmax, in nats; log E if all experts are equally likely.
    - load: the share of the most used expert in the mixture, divided by an even share; 1 to E.
    - dead: the fraction of experts with a load below `DEAD_LOAD`.
    - balance_loss: E·Σ f_i P_i, where f_i is the share of tokens whose most probable expert is i,
      and P_i is the mean probability of expert i; 1 if f or P is uniform (arXiv 2101.03961, eq. 4).
    - z_loss: log(Σ exp(logits))² (arXiv 2202.08906, eq. 5).

    Args:
      logits: [..., E].
      soft: [..., E], softmax of the logits.
      probs: [..., E], the weights of the experts in the mixture.
      weights: [...], weights of the distributions; 0 for those to ignore.
    """
    # These are the expressions of `jax.nn.softmax`, so that XLA computes them once for both. With
    # `jax.nn.logsumexp`, a MoLORA step on a CPU took 2 % longer.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - largest
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    entropy = log_sum - jnp.sum(soft * shifted, axis=-1)
    squared_log_z = jnp.square(largest[..., 0] + log_sum)
    # A comparison with the maximum, since argmax takes as long on a CPU as all other statistics. So
    # in a tie, each of the tied experts counts.
    top_1 = jax.lax.stop_gradient((shifted >= 0).astype(jnp.float32))

    def weighted_sum(x: Array) -> Array:  # [..., E] -> [E]
        return jnp.tensordot(weights, x, axes=weights.ndim, precision=jax.lax.Precision.HIGHEST)

    soft_sum = weighted_sum(soft)
    mixture_sum = soft_sum if probs is soft else weighted_sum(probs)
    # Stacked, because each sum over a sharded batch is a separate all-reduce.
    scalars = jnp.stack([entropy, squared_log_z, jnp.ones_like(entropy)], axis=-1)
    entropy_sum, squared_log_z_sum, weight = weighted_sum(scalars)
    sums = soft_sum, weighted_sum(top_1), entropy_sum, squared_log_z_sum
    return statistics_from_sums(*sums, mixture_sum, weight)


def statistics_from_sums(
    soft: Array, top_1: Array, entropy: Array, squared_log_z: Array, mixture: Array, weight: Array
) -> Array:
    """Returns all `STATISTICS` but aux_loss from weighted sums over distributions, float32.

    Args:
      soft: [E], sums of the softmax probabilities.
      top_1: [E], for each expert, the weight of the distributions in which it is the most probable.
      entropy, squared_log_z: [], sums of the entropy and of log(Z)².
      mixture: [E], sums of the experts' weights in the mixture.
      weight: [], sum of the distributions' weights.
    """
    (num_experts,) = soft.shape
    tiny = 1e-9  # the weights of a batch that is all padding sum to 0
    weight = jnp.maximum(weight, tiny)
    top_1_share = top_1 / jnp.maximum(jnp.sum(top_1), tiny)
    load = num_experts * mixture / jnp.maximum(jnp.sum(mixture), tiny)
    return jnp.stack(
        [
            entropy / weight,
            jnp.max(load),
            jnp.mean((load < DEAD_LOAD).astype(jnp.float32)),
            num_experts * jnp.sum(top_1_share * soft) / weight,
            squared_log_z / weight,
        ]
    )


def sown_by_router(collection: Mapping[str, PyTree], name: str) -> dict[str, Array]:
    """Returns router path -> the array that the router sowed as `name`, sorted by path.

    The path of a sparse layer's router is '<stack>/layers_<i>/mlp/experts'. An adapter's router has
    the path of the adapter, such as '<stack>/layers_<i>/mlp/gate_adapter'.
    """
    # The sown paths are in another order: a sparse layer sows to '…/mlp/statistics', for example,
    # but the path of its router is '…/mlp/experts'.
    by_router = {}
    for path, (value,) in params_lib.flatten(collection).items():
        module, _, ending = path.rpartition("/")
        if ending == name:
            is_adapter = module.endswith("_adapter")
            by_router[module if is_adapter else f"{module}/experts"] = value
    return dict(sorted(by_router.items()))


def is_sparse_layer(path: str) -> bool:
    """Whether the router at a path belongs to a sparse layer; if not, it belongs to an adapter."""
    return path.endswith(f"/{EXPERTS_SITE}")


def total_aux_loss(paths: Sequence[str], aux_losses: Array | np.ndarray) -> Array | np.ndarray:
    """Returns the auxiliary loss [] of a model from the losses of its routers, [len(paths)].

    It is the mean over the sparse layers of both stacks, plus the mean over the adapters' routers.
    The two kinds are not averaged together, so that a coefficient has the same effect in a model
    that has both.
    """
    is_sparse = np.array([is_sparse_layer(path) for path in paths])
    rows = [np.flatnonzero(mask) for mask in (is_sparse, ~is_sparse) if mask.any()]
    means = [aux_losses[indices].mean() for indices in rows]
    return means[0] if len(means) == 1 else means[0] + means[1]


def summarize_statistics(
    paths: Sequence[str],
    statistics: Array | np.ndarray,
    detail: str,
    names: Sequence[str] = STATISTICS,
) -> dict[str, Array | np.ndarray]:
    """Returns routers' statistics by metric name.

    Args:
      paths: paths of the routers, e.g. 'encoder/layers_3/mlp/gate_adapter'.
      statistics: [len(paths), len(names)], the statistics of each router.
      detail: 'sites' (averages over the layers of a stack) or 'layers' (each router).
      names: `STATISTICS`, or those of a sparse layer's dispatch.

    Returns:
      Scalars: 'entropy', … over all routers, and 'encoder/mlp/gate/entropy', … for each site or
      router. The load is the maximum over routers, and any other statistic is the mean. The
      auxiliary loss is only reported for the whole model, see `total_aux_loss`.
    """
    groups: dict[str, list[int]] = {"": list(range(len(paths)))}  # "" is the whole model
    for row, path in enumerate(paths):
        name = path.removesuffix("_adapter")
        if detail != "layers":  # 'encoder/layers_3/mlp/gate' -> 'encoder/mlp/gate'
            name = re.sub(r"/layers_\d+/", "/", name)
        groups.setdefault(name, []).append(row)
    metrics = {}
    for name, rows in groups.items():
        for column, statistic in enumerate(names):
            values = statistics[np.array(rows), column]
            if statistic == "aux_loss":
                if not name:
                    metrics[statistic] = total_aux_loss(paths, values)
                continue
            metric = values.max() if statistic == "load" else values.mean()
            metrics[f"{name}/{statistic}".lstrip("/")] = metric
    return metrics
