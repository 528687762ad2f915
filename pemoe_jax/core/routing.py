"""Routers: from a token's features to a distribution over experts (arXiv 2309.05444, 2.2)."""

import functools
import math
import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.kernels import thin_matmul

Array = jax.Array
Initializer = jax.nn.initializers.Initializer

READS = ("x", "y", "sentence")

# What a router tells of a batch, in the order of the vector that `Router` returns.
STATISTICS = ("entropy", "load", "dead", "balance_loss", "z_loss", "objective")
# An expert is called dead where its share of the load is below this share of an even one.
DEAD_LOAD = 0.01
_WIDE = 1024  # a row's most numbers in sums over rows


@flax.struct.dataclass
class Tokens:
    """What routers know of the tokens at a site, beside their features.

    Attributes:
      valid: [B, L], False or 0 at padding, which no statistic counts; None: all count.
      sentence: [B, S], an embedding of each row's example, for routers that read it.
      deterministic: no noise.
    """

    valid: Array | None = None
    sentence: Array | None = None
    deterministic: bool = flax.struct.field(pytree_node=False, default=True)


class RouterOutput(NamedTuple):
    """What a router gives.

    Attributes:
      probs: [..., E], float32; they sum to one where `top_k` is None or `renormalize` is set.
      told: `STATISTICS` [6] of the batch's real tokens, see `statistics`.
      beside: [..., n], the features' product with the matrix `beside`, where there is one.
    """

    probs: Array
    told: Array
    beside: Array | None = None


class Router(nn.Module):
    """Softmax over experts of one dense layer without bias, in float32; soft unless `top_k` is set.

    Attributes:
      num_experts: E.
      top_k: how many of the largest probabilities are kept, the others being zero; None: all.
      renormalize: whether the kept ones are made to sum to one (the paper's code does not).
      straight_through: whether gradients are those of the soft router (arXiv 1308.3432).
      temperature: the logits are divided by it.
      jitter_noise: in training, features are multiplied by U(1 - it, 1 + it) (arXiv 2101.03961).
      balance_loss: α of the load-balance loss α·E·Σ f_i P_i (arXiv 2101.03961).
      z_loss: coefficient of the mean of log(Z)² (arXiv 2202.08906).
      reads: 'x' (the hidden state that the site's projection read), 'y' (what it produced) or
        'sentence' (an embedding of the example: one distribution for all its tokens); None: what
        the paper has for the kind of expert, y for vectors and x for low-rank pairs.
      kernel_init: the paper's code draws the kernel from N(0, 0.02).
      feature_axis: logical name of the axis that is read.

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
    def __call__(
        self, features: Array, tokens: Tokens | None = None, beside: Array | None = None
    ) -> RouterOutput:
        """Of features [B, L, ..., features] or, of a sentence, [B, features].

        Args:
          tokens: of the features.
          beside: [features, n], another matrix that the features are multiplied by: in the product
            that the router makes of them where both are float32, which saves a pass over them.
        """
        self._check()
        tokens = tokens or Tokens()
        kernel = params_lib.param(
            self,
            "kernel",
            self.kernel_init,
            (features.shape[-1], self.num_experts),
            (self.feature_axis, "expert"),
        )
        noisy = bool(self.jitter_noise) and not tokens.deterministic
        product = None
        if beside is not None and not noisy and features.dtype == beside.dtype == jnp.float32:
            both = thin_matmul.thin_matmul(features, jnp.concatenate([kernel, beside], axis=1))
            logits, product = jnp.split(both, [self.num_experts], axis=-1)
        else:
            if beside is not None:
                product = thin_matmul.thin_matmul(features.astype(beside.dtype), beside)
            features = features.astype(jnp.float32)
            if noisy:
                low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
                features *= jax.random.uniform(
                    self.make_rng("dropout"), features.shape, minval=low, maxval=high
                )
            logits = thin_matmul.thin_matmul(features, kernel)
        probs, told = _mixture(
            logits,
            tokens.valid,
            temperature=self.temperature,
            top_k=self.top_k,
            renormalize=self.renormalize,
            straight_through=self.straight_through,
            balance_loss=self.balance_loss,
            z_loss=self.z_loss,
        )
        return RouterOutput(probs, told, product)

    def is_soft(self, tokens: Tokens | None = None) -> bool:
        """Whether the probabilities are the softmax itself, of the features as they are."""
        noisy = self.jitter_noise and tokens is not None and not tokens.deterministic
        return not noisy and (self.top_k is None or self.top_k >= self.num_experts)

    def _check(self) -> None:
        top_k, num_experts = self.top_k, self.num_experts
        if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= num_experts):
            raise InputError(
                f"Router.top_k: expected None or 1 to num_experts ({num_experts}), found {top_k!r}"
            )
        if self.reads not in (None, *READS):
            raise InputError(f"Router.reads: expected one of {READS}, found {self.reads!r}")
        if not self.temperature > 0:
            raise InputError(f"Router.temperature: must be above 0, found {self.temperature!r}")
        if not 0 <= self.jitter_noise < 1:
            raise InputError(f"Router.jitter_noise: expected [0, 1), found {self.jitter_noise!r}")


_SETTINGS = ("temperature", "top_k", "renormalize", "straight_through", "balance_loss", "z_loss")


# `inline`: in the program as if it were written there
@functools.partial(jax.jit, inline=True, static_argnames=_SETTINGS)
def _mixture(
    logits: Array,
    valid: Array | None,
    *,
    temperature: float,
    top_k: int | None,
    renormalize: bool,
    straight_through: bool,
    balance_loss: float,
    z_loss: float,
) -> tuple[Array, Array]:
    """What `Router` makes of logits [..., E]: probs and told, see `Routed`.

    Traced once for all routers of a shape: dozens of operations, of hundreds of routers.
    """
    logits /= temperature
    soft = jax.nn.softmax(logits, axis=-1)
    probs = soft
    if top_k is not None and top_k < logits.shape[-1]:
        probs = _largest(soft, top_k)
        if renormalize:
            probs /= jnp.sum(probs, axis=-1, keepdims=True)
        if straight_through:
            probs = soft + jax.lax.stop_gradient(probs - soft)
    told = compute_statistics(logits, soft, probs, _weights(logits, valid))
    objective = jnp.zeros(())
    if balance_loss:  # 0 · x is no constant to XLA: x and its gradient would be computed
        objective += balance_loss * told[3]
    if z_loss:
        objective += z_loss * told[4]
    # what is told has no gradient; zeros for it would still be multiplied through the network
    return probs, jnp.append(jax.lax.stop_gradient(told), objective)


def _largest(probs: Array, k: int) -> Array:
    """The k largest of the last axis, ties to the first of them; zeros in place of the others."""
    _, indices = jax.lax.top_k(jax.lax.stop_gradient(probs), k)
    kept = jnp.sum(jax.nn.one_hot(indices, probs.shape[-1], dtype=probs.dtype), axis=-2)
    return probs * kept


def _weights(logits: Array, valid: Array | None) -> Array:
    """How much each distribution of logits [B, L, ..., E] or [B, E] counts, of shape [..., 1]."""
    if valid is None:
        return jnp.ones((*logits.shape[:-1], 1), jnp.float32)
    valid = valid.astype(jnp.float32)
    if logits.ndim == 2:  # of sentences: as often as they have tokens
        return jnp.sum(valid, axis=1, keepdims=True)
    valid = valid.reshape(*valid.shape, *([1] * (logits.ndim - 2)))
    return jnp.broadcast_to(valid, (*logits.shape[:-1], 1))


def compute_statistics(logits: Array, soft: Array, probs: Array, weights: Array) -> Array:
    """The first five of `STATISTICS`, float32: means over distributions by their weights.

    - entropy: of the softmax, in nats; log E where all experts are alike.
    - load: the most used expert's share of the mixture over an even share; 1 to E.
    - dead: the share of experts whose share of the mixture is below `DEAD` of an even one.
    - balance_loss: E·Σ f_i P_i, f_i the share of tokens whose largest probability is i's and P_i
      its mean probability; 1 where either is even (arXiv 2101.03961, eq. 4).
    - z_loss: log(Σ exp(logits))² (arXiv 2202.08906, eq. 5).

    Args:
      logits: [..., E]. soft: their softmax. probs: what mixes the experts. weights: [..., 1].
    """
    # Of parts that the softmax is made of as well, so that nothing is computed a second time; and
    # no argmax, which takes as long as all the rest, so ties share.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - largest
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
    first = jax.lax.stop_gradient((shifted >= 0).astype(jnp.float32))
    of_all = _over_rows(soft, weights)
    mixed = of_all if probs is soft else _over_rows(probs, weights)
    parts = [log_sum, jnp.square(largest + log_sum), jnp.ones_like(log_sum)]
    log_sums, z, total = jnp.split(_over_rows(jnp.concatenate(parts, axis=-1), weights), 3)
    entropy = log_sums - jnp.sum(_over_rows(soft * shifted, weights))
    return statistics_from_sums(
        StatisticSums(of_all, _over_rows(first, weights), mixed, entropy, z, total)
    )


def _over_rows(x: Array, weights: Array) -> Array:
    """Sum by weights [..., 1] over all axes but the last, [..., rows, n] -> [n]."""
    if jax.default_backend() == "cpu":
        # there a product is one operation where a sum is several, each with code of its own
        axes = string.ascii_lowercase[: x.ndim - 1]
        of = f"{axes},{axes}z->z"
        return jnp.einsum(of, weights[..., 0], x, precision=jax.lax.Precision.HIGHEST)
    x = x * weights
    *outer, rows, n = x.shape
    # Experts are few, and on GPUs sums over rows as narrow are slow: some rows are joined to one.
    # Only of the axis beside them, so that no axis that is split among devices ends up inside.
    joined = rows if rows * n <= _WIDE else math.gcd(rows, 1 << max(1, _WIDE // n).bit_length() - 1)
    x = x.reshape(*outer, rows // joined, joined * n)
    x = jnp.sum(x, axis=tuple(range(x.ndim - 1)))
    return jnp.sum(x.reshape(joined, n), axis=0)


class StatisticSums(NamedTuple):
    """Of routers' distributions by their weights, float32: what `statistics` is made of.

    Attributes:
      soft: [E], of softmaxes.
      chosen: [E], of ones where these are largest.
      mixed: [E], of what mixes the experts.
      entropy, z: [1], of the softmaxes' entropies and of log(Σ exp(logits))².
      total: [1], of the weights.
    """

    soft: Array
    chosen: Array
    mixed: Array
    entropy: Array
    z: Array
    total: Array


def statistics_from_sums(sums: StatisticSums) -> Array:
    """The first five of `STATISTICS`, see `statistics`."""
    experts = sums.soft.shape[0]
    total = jnp.maximum(sums.total[0], 1e-9)
    chosen = sums.chosen / jnp.maximum(jnp.sum(sums.chosen), 1e-9)
    load = sums.mixed * experts / jnp.maximum(jnp.sum(sums.mixed), 1e-9)  # 1 where even
    return jnp.stack(
        [
            sums.entropy[0] / total,
            jnp.max(load),
            jnp.mean((load < DEAD_LOAD).astype(jnp.float32)),
            experts * jnp.sum(chosen * sums.soft) / total,
            sums.z[0] / total,
        ]
    )


DETAIL_LEVELS = ("sites", "layers")


def summarize_statistics(paths: Sequence[str], told: np.ndarray, detail: str) -> dict[str, float]:
    """Routers' statistics by name, for metrics.

    Args:
      paths: of the routers, e.g. 'encoder/layers_3/mlp/gate_adapter'.
      told: [len(paths), 6], `STATISTICS` of each.
      detail: 'sites' (over the layers of a stack) or 'layers' (each router).

    Returns:
      'entropy', … over all routers, and 'encoder/mlp/gate/entropy', … of each site or router: the
      means, and of the load the largest.
    """
    rows: dict[str, list[int]] = {"": list(range(len(paths)))}
    for number, path in enumerate(paths):
        name = path.removesuffix("_adapter")
        rows.setdefault(name if detail == "layers" else site_name(name), []).append(number)
    found = {}
    for name, members in rows.items():
        part = told[members]
        for column, statistic in enumerate(STATISTICS):
            if name and statistic == "objective":
                continue
            of = np.max if statistic == "load" else np.mean
            found[f"{name}/{statistic}".lstrip("/")] = float(of(part[:, column]))
    return found


def site_name(path: str) -> str:
    """'encoder/layers_3/mlp/gate_adapter' -> 'encoder/mlp/gate': its name in any layer."""
    return re.sub(r"/layers_\d+/", "/", path).removesuffix("_adapter")


RouterFactory = Any  # callable(num_experts=..., feature_axis=..., name=...) -> Router
