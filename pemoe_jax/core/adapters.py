"""Adapters at a layer's sites: mixtures of vectors ((IA)³, MoV) and low-rank pairs (LoRA, MoLORA).

At a site some `x` produced some `y`; an adapter maps `(x, y) -> y`. Shapes are read off these two,
so the same settings serve a model of any size. Sources: (IA)³ arXiv 2205.05638, LoRA arXiv
2106.09685, MoV and MoLORA arXiv 2309.05444.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import routing
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.kernels import mov, thin_matmul

_LORA_A_INIT = nn.initializers.normal(stddev=0.02)  # a constant: see `params.param`

# A site's logical axes: of the last axis of x, and of y's axes after batch and length.
SITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "query": ("embed", ("heads", "kv")),
    "key": ("embed", ("heads", "kv")),
    "value": ("embed", ("heads", "kv")),
    "out": ("joined_kv", ("embed",)),
    "wi_0": ("embed", ("mlp",)),
    "wi_1": ("embed", ("mlp",)),
    "gate": ("embed", ("mlp",)),
    "wo": ("mlp", ("embed",)),
}


def _route(
    module: Any,
    reads: str,
    seen: dict[str, tuple[jax.Array, str]],
    tokens: routing.Tokens | None,
    of_x: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Probabilities of an expert module's router, [B, L or 1, (H,) E], and x by `of_x`, if given.

    They and the router's statistics are sown, for whoever makes these collections mutable.

    Args:
      module: inside its compact method.
      reads: what its router reads unless it says otherwise.
      seen: of x and y, the features [B, L, ...] as the router is to see them, and their axis' name.
      tokens: of the features.
      of_x: [Din, n], which x is to be multiplied by.
    """
    factory = functools.partial(module.router, num_experts=module.num_experts)
    reads = factory(parent=None).reads or reads
    if reads != "sentence":
        features, axis = seen[reads]
    elif tokens is not None and tokens.sentence is not None:
        features, axis = tokens.sentence, "embed"
    else:
        raise InputError(
            "a router reads sentence embeddings and the batch has none: expected"
            " SENTENCE_EMBEDDINGS to name a table of them (pemoe embed)"
        )
    beside = of_x if reads == "x" else None
    probs, told, product = factory(feature_axis=axis, name="router")(features, tokens, beside)
    if of_x is not None and reads != "x":
        product = thin_matmul.thin_matmul(seen["x"][0].astype(of_x.dtype), of_x)
    if not module.is_initializing():  # T5X takes what `init` makes for variables to keep
        module.sow("routers", "statistics", told)
    if reads == "sentence":
        probs = probs[:, None]
    length = seen["x"][0].shape[1]
    everywhere = (probs.shape[0], length, *probs.shape[2:])
    module.sow("intermediates", "probs", jnp.broadcast_to(probs, everywhere))
    return probs, product


def _check_experts(module: nn.Module, num_experts: int, router: Any) -> None:
    if num_experts < 1:
        raise InputError(f"{type(module).__name__}: num_experts must be >= 1, found {num_experts}")
    if router is None and num_experts != 1:
        raise InputError(
            f"{type(module).__name__}: {num_experts} experts need a router;"
            " without one num_experts must be 1"
        )


class VectorExperts(nn.Module):
    """`y * Σ_e p_e l_e`: (IA)³ without a router, MoV with one, which reads `y` head by head.

    Attributes:
      num_experts: E.
      router: factory of the router, or None for the plain method.
      fused: whether soft routing by y without losses of its own runs in the kernels of `fused_mov`
        where those can run, on a GPU that is the only device, and nobody asks for probabilities.
      x_axis, y_axes: logical axis names of the site; the layer sets them.

    Parameters: `vectors` [H, E, K] at query, key and value, else [E, D or F]; ones at the start.
    """

    num_experts: int = 1
    router: routing.RouterFactory | None = None
    fused: bool = False
    x_axis: str = "embed"
    y_axes: tuple[str, ...] = ("mlp",)

    @nn.compact
    def __call__(
        self, x: jax.Array, y: jax.Array, tokens: routing.Tokens | None = None
    ) -> jax.Array:
        """x [B, L, Din], y [B, L, H, K] or [B, L, D or F] -> y's shape and dtype."""
        _check_experts(self, self.num_experts, self.router)
        *heads, features = y.shape[2:]
        vectors = params_lib.param(
            self,
            "vectors",
            nn.initializers.ones_init(),
            (*heads, self.num_experts, features),
            (*self.y_axes[:-1], "expert", self.y_axes[-1]),
        )
        if self.router is None:
            return y * vectors[..., 0, :].astype(y.dtype)
        seen = {"x": (x, self.x_axis), "y": (y, self.y_axes[-1])}
        factory = functools.partial(self.router, num_experts=self.num_experts)
        if self.fused and self._fits_kernels(factory(parent=None), tokens):
            return self._scaled(y, vectors, factory(name="router"), tokens)
        probs, _ = _route(self, "y", seen, tokens)
        if probs.ndim == y.ndim and heads:
            scale = thin_matmul.mix_vectors(probs, vectors)
        else:  # one distribution for all of them
            joined = jnp.moveaxis(vectors, -2, 0).reshape(self.num_experts, -1)  # [E, H·K or F]
            scale = thin_matmul.thin_matmul(probs, joined).reshape(*probs.shape[:2], *y.shape[2:])
        return y * scale.astype(y.dtype)

    def _fits_kernels(self, router: routing.Router, tokens: routing.Tokens | None) -> bool:
        """Whether the kernels do what is asked for: no losses of routers, no probabilities told."""
        return (
            router.reads in (None, "y")
            and router.is_soft(tokens)
            and not (router.balance_loss or router.z_loss)
            and not self.is_initializing()
            and not self.is_mutable_collection("intermediates")
            and mov.is_supported()
        )

    def _scaled(
        self,
        y: jax.Array,
        vectors: jax.Array,
        router: routing.Router,
        tokens: routing.Tokens | None,
    ) -> jax.Array:
        """As in `__call__`, by the kernels, which sum up the router's statistics as well."""
        kernel = router.variables["params"]["kernel"] / router.temperature
        valid = None if tokens is None else tokens.valid
        weights = jnp.ones(y.shape[:2]) if valid is None else valid.astype(jnp.float32)
        out, sums = mov.route_and_scale(y, kernel, vectors, weights)
        soft, chosen, entropy, z = jax.lax.stop_gradient(sums)
        total = jnp.sum(weights, keepdims=True)[0] * math.prod(y.shape[2:-1])
        told = routing.statistics_from_sums(
            routing.StatisticSums(soft, chosen, soft, entropy, z, total)
        )
        self.sow("routers", "statistics", jnp.append(told, 0.0))  # no objective
        return out


class LoRAExperts(nn.Module):
    """`y + (α/R) Σ_e p_e B_e A_e x`: LoRA without a router, MoLORA with one, which reads `x`.

    The probabilities are folded into the rank axis, `((x @ A[D, E·R]) * p) @ B[E·R, D]`, so no
    tensor of an expert's output ([B, L, E, D]) is ever formed.

    Attributes:
      num_experts: E.
      rank: R of one expert.
      alpha: α; the product is scaled by α / R.
      router: factory of the router, or None for the plain method.
      x_axis, y_axes: logical axis names of the site; the layer sets them.

    Parameters: `lora_a` [Din, E, R] ~ N(0, 0.02), `lora_b` [E, R, Dout] = 0 (heads joined).
    """

    num_experts: int = 1
    rank: int = 4
    alpha: float = 16.0
    router: routing.RouterFactory | None = None
    x_axis: str = "embed"
    y_axes: tuple[str, ...] = ("mlp",)

    @nn.compact
    def __call__(
        self, x: jax.Array, y: jax.Array, tokens: routing.Tokens | None = None
    ) -> jax.Array:
        """x [B, L, Din], y [B, L, ...] -> y's shape and dtype."""
        _check_experts(self, self.num_experts, self.router)
        if self.rank < 1:
            raise InputError(f"LoRAExperts: rank must be >= 1, found {self.rank}")
        experts, rank = self.num_experts, self.rank
        x_features = x.shape[-1]
        y_features = 1
        for size in y.shape[2:]:
            y_features *= size
        y_axis = "joined_kv" if len(self.y_axes) > 1 else self.y_axes[0]
        lora_a = params_lib.param(
            self,
            "lora_a",
            _LORA_A_INIT,
            (x_features, experts, rank),
            (self.x_axis, "expert", "rank"),
        )
        lora_b = params_lib.param(
            self,
            "lora_b",
            nn.initializers.zeros_init(),
            (experts, rank, y_features),
            ("expert", "rank", y_axis),
        )
        dtype = y.dtype
        first = lora_a.reshape(x_features, experts * rank).astype(dtype)
        if self.router is None:
            low = thin_matmul.thin_matmul(x.astype(dtype), first)
        else:
            joined = y.reshape(*y.shape[:2], y_features)
            seen = {"x": (x, self.x_axis), "y": (joined, y_axis)}
            probs, product = _route(self, "x", seen, tokens, of_x=first)
            assert product is not None
            of_experts = product.reshape(*product.shape[:-1], experts, rank)
            low = (of_experts * probs[..., None]).reshape(product.shape)
        scale = self.alpha / rank
        low = (low * scale).astype(dtype)  # [B, L, E·R]
        delta = thin_matmul.thin_matmul(
            low, lora_b.reshape(experts * rank, y_features).astype(dtype)
        )
        return y + delta.reshape(y.shape)


AdapterFactory = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Which adapter sits at which site: factories, never instances; None leaves a site alone.

    One module instance handed to two layers would silently share its parameters, hence factories.
    """

    query: AdapterFactory | None = None
    key: AdapterFactory | None = None
    value: AdapterFactory | None = None
    out: AdapterFactory | None = None
    wi_0: AdapterFactory | None = None
    wi_1: AdapterFactory | None = None
    gate: AdapterFactory | None = None
    wo: AdapterFactory | None = None

    def __post_init__(self) -> None:
        for site in SITES:
            factory = getattr(self, site)
            if isinstance(factory, nn.Module) or not (factory is None or callable(factory)):
                raise InputError(
                    f"Adapters.{site}: expected a factory (a class or a partial of one),"
                    f" found an instance of {type(factory).__name__}"
                )

    def sites(self) -> tuple[str, ...]:
        """The sites that carry an adapter."""
        return tuple(site for site in SITES if getattr(self, site) is not None)

    def adapt(
        self, site: str, x: jax.Array, y: jax.Array, tokens: routing.Tokens | None = None
    ) -> jax.Array:
        """Applies the site's adapter; call it inside a layer's compact method.

        Args:
          site: its name.
          x, y: what the site's projection read, and what it produced.
          tokens: of x and y.
        """
        factory = getattr(self, site)
        if factory is None:
            return y
        x_axis, y_axes = SITES[site]
        return factory(x_axis=x_axis, y_axes=y_axes, name=f"{site}_adapter")(x, y, tokens)


_KINDS: dict[str, type[nn.Module]] = {
    "VectorExperts": VectorExperts,
    "LoRAExperts": LoRAExperts,
    "Router": routing.Router,
}
# What layers set, how parameters start, how it is computed: not what an adapter is.
_UNDESCRIBED = ("x_axis", "y_axes", "feature_axis", "kernel_init", "fused", "parent", "name")


def _describe_factory(factory: Callable[..., nn.Module], **given: Any) -> dict[str, Any]:
    module = factory(**given)
    kind = next((k for k, cls in _KINDS.items() if isinstance(module, cls)), None)
    if kind is None:
        raise ValueError(
            f"cannot describe {type(module).__name__}: expected one of {sorted(_KINDS)}"
        )
    record: dict[str, Any] = {"kind": kind}
    for field in dataclasses.fields(module):
        if field.name in _UNDESCRIBED or field.name in given:
            continue
        value = getattr(module, field.name)
        if field.name == "router" and value is not None:
            value = _describe_factory(value, num_experts=getattr(module, "num_experts", 1))
        record[field.name] = value
    return record


def describe(adapters: Adapters) -> dict[str, dict[str, Any]]:
    """The record as plain data by site, for checkpoints; `from_description` reads it back."""
    return {site: _describe_factory(getattr(adapters, site)) for site in adapters.sites()}


def _factory_from(record: dict[str, Any]) -> Callable[..., nn.Module]:
    fields = dict(record)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise InputError(f"unknown adapter kind {kind!r}: expected one of {sorted(_KINDS)}")
    known = {field.name for field in dataclasses.fields(_KINDS[kind])}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise InputError(f"{kind} has no settings {unknown}: written by another version?")
    if fields.get("router") is not None:
        fields["router"] = _factory_from(fields["router"])
    return functools.partial(_KINDS[kind], **fields)


def from_description(description: dict[str, dict[str, Any]]) -> Adapters:
    """The inverse of `describe`; InputError where it names what does not exist."""
    unknown = sorted(description.keys() - SITES.keys())
    if unknown:
        raise InputError(f"unknown adapter sites {unknown}: expected some of {list(SITES)}")
    return Adapters(**{site: _factory_from(record) for site, record in description.items()})
