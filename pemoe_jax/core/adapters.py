"""Adapters at a layer's sites: mixtures of vectors ((IA)³, MoV) and of LoRA pairs (LoRA, MoLORA).

A site is a projection of `x` to `y`, and its adapter maps `(x, y)` to a new y. At the site gate, x
is the MLP's input and y is the activation (such as GELU) of wi_0's output. Shapes are read from x
and y, so the same settings serve a model of any size. In formulas, p_e is the router's probability
of expert e, or 1 without a router. Sources: (IA)³ arXiv 2205.05638, LoRA arXiv 2106.09685, MoV and
MoLORA arXiv 2309.05444.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import routing, settings
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.kernels import mov, thin_matmul

Array = jax.Array

# A constant, so that draws of the same shape share one compiled program, see `params.param`.
_LORA_A_INIT = nn.initializers.normal(stddev=0.02)

# Site -> (logical name of x's last axis, logical names of y's axes after batch and length).
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


class VectorExperts(nn.Module):
    """Computes `y * Σ_e p_e l_e`: (IA)³ without a router, MoV with a router.

    MoV's router reads y by default. At query, key and value, it then returns one distribution for
    each head.

    Parameters: `vectors` l: [H, E, K] at query, key and value, [E, D] at out and wo, [E, F] at the
    other sites; initialized to ones.

    Attributes:
      num_experts: number of experts at each site, E.
      router: factory of the router; None for (IA)³, with one expert.
      fused: whether to run the fused kernels (`kernels.mov`) where they apply: on a single GPU, for
        a soft router that reads y and has no auxiliary losses, unless router probabilities are
        collected. Elsewhere, array operations compute the same function.
      x_axis, y_axes: logical axis names of the site; the layer sets them.
    """

    num_experts: int = 1
    router: routing.RouterFactory | None = None
    fused: bool = False
    x_axis: str = "embed"
    y_axes: tuple[str, ...] = ("mlp",)

    @nn.compact
    def __call__(self, x: Array, y: Array, tokens: routing.TokenInfo | None = None) -> Array:
        """x [B, L, Din], y [B, L, H, K] or [B, L, D or F] -> y's shape and dtype."""
        settings.check_experts(self)
        *heads, features = y.shape[2:]
        vectors = params_lib.param(
            self,
            "vectors",
            nn.initializers.ones_init(),
            (*heads, self.num_experts, features),
            (*self.y_axes[:-1], "adapter_expert", self.y_axes[-1]),
        )
        if self.router is None:
            return y * vectors[..., 0, :].astype(y.dtype)
        source, router = _make_router(self, default="y", y_axis=self.y_axes[-1])
        if self._can_fuse(source, router, tokens):
            return self._call_fused(y, vectors, router, tokens)
        output = router(_router_input(source, x, y, tokens), tokens)
        probs = _record_routing(self, output, x.shape[1])
        # Mixed in float32 and rounded once: near 1, bfloat16 has steps of 0.8 %.
        scale = _mix_vectors(probs, vectors)  # [B, L, H, K] or [B, L, D or F]
        return y * scale.astype(y.dtype)

    def _can_fuse(
        self, source: str, router: routing.Router, tokens: routing.TokenInfo | None
    ) -> bool:
        return (
            self.fused
            and mov.is_supported()
            and source == "y"
            and router.is_soft(tokens)
            # Auxiliary losses need gradients of the kernels' sums, and the kernels compute none.
            and not (router.balance_loss or router.z_loss)
            # `_call_fused` reads the router's kernel, which `init` has not created yet.
            and not self.is_initializing()
            # The kernels do not return the probabilities that this collection holds.
            and not self.is_mutable_collection("intermediates")
        )

    def _call_fused(
        self, y: Array, vectors: Array, router: routing.Router, tokens: routing.TokenInfo | None
    ) -> Array:
        # softmax((y W) / τ) = softmax(y (W / τ)), where W is the router's kernel. So the fused
        # kernels need no temperature.
        kernel = router.variables["params"]["kernel"] / router.temperature
        valid = None if tokens is None else tokens.valid
        weights = jnp.ones(y.shape[:2]) if valid is None else valid.astype(jnp.float32)
        out, sums = mov.route_and_scale(y, kernel, vectors, weights)
        soft, top_1, entropy, squared_log_z = jax.lax.stop_gradient(sums)
        total_weight = jnp.sum(weights) * math.prod(y.shape[2:-1])  # each head has a distribution
        statistics = routing.statistics_from_sums(
            soft, top_1, entropy[0], squared_log_z[0], mixture=soft, weight=total_weight
        )
        self.sow("routers", "statistics", jnp.append(statistics, 0.0))  # no auxiliary loss
        return out


class LoRAExperts(nn.Module):
    """Computes `y + (α/R) Σ_e p_e B_e A_e x`: LoRA without a router, MoLORA with a router.

    MoLORA's router reads x by default. Its probabilities multiply the low-rank activations,
    `((x @ A[Din, E·R]) * p) @ B[E·R, Dout]`, so that the experts' outputs [B, L, E, Dout] are never
    materialized.

    Parameters: `lora_a` [Din, E, R], drawn from N(0, 0.02²), and `lora_b` [E, R, Dout], initially
    zero. Dout is H·K at query, key and value.

    Attributes:
      num_experts: number of experts at each site, E.
      rank: rank of each expert, R.
      alpha: α; the product of an expert's two matrices is scaled by α / R.
      router: factory of the router; None for LoRA, with one expert.
      x_axis, y_axes: logical axis names of the site; the layer sets them.
    """

    num_experts: int = 1
    rank: int = 4
    alpha: float = 16.0
    router: routing.RouterFactory | None = None
    x_axis: str = "embed"
    y_axes: tuple[str, ...] = ("mlp",)

    @nn.compact
    def __call__(self, x: Array, y: Array, tokens: routing.TokenInfo | None = None) -> Array:
        """x [B, L, Din], y [B, L, ...] -> y's shape and dtype."""
        settings.check_experts(self)
        experts, rank, dtype = self.num_experts, self.rank, y.dtype
        x_features, y_features = x.shape[-1], math.prod(y.shape[2:])
        # lora_b joins the heads of y in one axis, as T5X's kernels do.
        y_axis = "joined_kv" if len(self.y_axes) > 1 else self.y_axes[0]
        shape, axes = (x_features, experts, rank), (self.x_axis, "adapter_expert", "rank")
        lora_a = params_lib.param(self, "lora_a", _LORA_A_INIT, shape, axes)
        shape, axes = (experts, rank, y_features), ("adapter_expert", "rank", y_axis)
        lora_b = params_lib.param(self, "lora_b", nn.initializers.zeros_init(), shape, axes)
        lora_a = lora_a.reshape(x_features, experts * rank).astype(dtype)
        lora_b = lora_b.reshape(experts * rank, y_features).astype(dtype)
        if self.router is None:
            low_rank = thin_matmul.thin_matmul(x.astype(dtype), lora_a)  # [B, L, R]
        else:
            joined_y = y.reshape(*y.shape[:2], y_features)
            probs, low_rank = self._route_and_project(x, joined_y, lora_a, y_axis, tokens)
            by_expert = low_rank.reshape(*x.shape[:2], experts, rank)
            low_rank = (probs[..., None] * by_expert).reshape(low_rank.shape)  # [B, L, E·R]
        # α/R multiplies E·R columns here; after the second product, it would multiply Dout columns.
        low_rank = (low_rank * (self.alpha / rank)).astype(dtype)
        return y + thin_matmul.thin_matmul(low_rank, lora_b).reshape(y.shape)

    def _route_and_project(
        self, x: Array, y: Array, lora_a: Array, y_axis: str, tokens: routing.TokenInfo | None
    ) -> tuple[Array, Array]:
        """Returns the probabilities [B, L or 1, E] and `x @ lora_a`, [B, L, E·R]."""
        source, router = _make_router(self, default="x", y_axis=y_axis)
        # The router computes in float32. If LoRA does too, one product serves both (see
        # `joint_matmul`). The router is then not called: its kernel is read from its variables,
        # which exist only after initialization.
        if (
            source == "x"
            and x.dtype == lora_a.dtype == jnp.float32
            and not router.has_noise(tokens)
            and not self.is_initializing()
        ):
            kernel = router.variables["params"]["kernel"]
            logits, low_rank = thin_matmul.joint_matmul(x, kernel, lora_a)
            output = router.route(logits, tokens)
        else:
            output = router(_router_input(source, x, y, tokens), tokens)
            low_rank = thin_matmul.thin_matmul(x.astype(lora_a.dtype), lora_a)
        return _record_routing(self, output, x.shape[1]), low_rank


Experts = VectorExperts | LoRAExperts


def _make_router(module: Experts, default: str, y_axis: str) -> tuple[str, routing.Router]:
    """Returns what the router reads, 'x', 'y' or 'sentence', and the router.

    Call it inside the module's compact method.

    Args:
      module: the adapter.
      default: what the router reads if its `reads` is None.
      y_axis: logical name of y's last axis.
    """
    assert module.router is not None
    factory = functools.partial(module.router, num_experts=module.num_experts)
    # This instance serves only to look up `reads`. Without a parent, it is not a submodule.
    reads = factory(parent=None).reads or default
    axis = {"x": module.x_axis, "y": y_axis}.get(reads, "embed")
    return reads, factory(feature_axis=axis, name="router")


def _router_input(source: str, x: Array, y: Array, tokens: routing.TokenInfo | None) -> Array:
    """Returns the features that a router reads: x, y or sentence embeddings [B, S].

    Raises:
      InputError: the router reads sentence embeddings, and the batch has none.
    """
    if source != "sentence":
        return {"x": x, "y": y}[source]
    if tokens is None or tokens.sentence is None:
        raise InputError(
            "SENTENCE_EMBEDDINGS is not set, but a router reads sentence embeddings: pass"
            " --gin.SENTENCE_EMBEDDINGS=… (a table written by `pemoe embed`)"
        )
    return tokens.sentence


def _record_routing(module: Experts, output: routing.RouterOutput, length: int) -> Array:
    """Sows statistics and probabilities; returns probabilities [B, L or 1, (H,) E]."""
    # `init` must not return statistics, since T5X keeps every collection that it returns as model
    # state. Flax's `init` leaves out 'intermediates' by itself.
    if not module.is_initializing():
        module.sow("routers", "statistics", output.statistics)
    probs = output.probs
    if probs.ndim == 2:  # one distribution for a sentence, [B, E]
        probs = probs[:, None]
    shape = (probs.shape[0], length, *probs.shape[2:])
    module.sow("intermediates", "probs", jnp.broadcast_to(probs, shape))
    return probs


def _mix_vectors(probs: Array, vectors: Array) -> Array:
    """Returns `Σ_e p_e l_e`, [B, L or 1, (H,) K], for vectors [(H,) E, K].

    Without heads, K stands for D or F.

    Args:
      probs: [B, L or 1, E], or [B, L, H, E] if each head has its own distribution.
      vectors: the experts' vectors.
    """
    if probs.ndim == 4:
        return thin_matmul.mix_vectors(probs, vectors)
    # Either all heads share a distribution (the router reads x or a sentence), or the site has no
    # heads. Heads and features can then be joined into one axis.
    *heads, experts, features = vectors.shape
    joined = jnp.moveaxis(vectors, -2, 0).reshape(experts, -1)  # [E, H·K]
    scale = thin_matmul.thin_matmul(probs, joined)
    return scale.reshape(*probs.shape[:2], *heads, features)


AdapterFactory = Callable[..., nn.Module]  # (x_axis=..., y_axes=..., name=...)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a layer by site: factories, or None for a site without an adapter.

    Layers need factories, because two layers with the same instance would silently share its
    parameters.
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
                    f"Adapters.{site} must be a factory (a class or a partial of one),"
                    f" got an instance of {type(factory).__name__}"
                )

    def sites(self) -> tuple[str, ...]:
        """Returns the sites that have an adapter."""
        return tuple(site for site in SITES if getattr(self, site) is not None)

    def adapt(
        self, site: str, x: Array, y: Array, tokens: routing.TokenInfo | None = None
    ) -> Array:
        """Applies a site's adapter to the input x and the output y of the site's projection.

        Returns y if the site has no adapter. Call it inside a layer's compact method.
        """
        factory = getattr(self, site)
        if factory is None:
            return y
        x_axis, y_axes = SITES[site]
        return factory(x_axis=x_axis, y_axes=y_axes, name=f"{site}_adapter")(x, y, tokens)


Description = dict[str, Any]  # the kind of an adapter or a router, and its settings

# Checkpoints hold these names, so they must not change even if a class is renamed.
_KINDS: dict[str, type[nn.Module]] = {
    "VectorExperts": VectorExperts,
    "LoRAExperts": LoRAExperts,
    "Router": routing.Router,
}
# Fields that descriptions leave out: layers set them, or they affect only initialization or speed.
_OMITTED = ("x_axis", "y_axes", "feature_axis", "kernel_init", "fused", "parent", "name")


def _describe_factory(
    name: str, kinds: Sequence[str], factory: Callable[..., nn.Module], **arguments: object
) -> Description:
    """Describes the module that a factory makes.

    Args:
      name: name of the setting, for the error.
      kinds: allowed keys of `_KINDS`.
      factory: the factory.
      arguments: keyword arguments for the factory; the description leaves them out.

    Raises:
      InputError: the module is of none of the `kinds`.
    """
    module = factory(**arguments)
    kind = next((k for k in kinds if isinstance(module, _KINDS[k])), None)
    if kind is None:
        raise InputError(f"{name} must make {' or '.join(kinds)}, got {type(module).__name__}")
    description: Description = {"kind": kind}
    for field in dataclasses.fields(module):
        if field.name in _OMITTED or field.name in arguments:
            continue
        value = getattr(module, field.name)
        if field.name == "router" and value is not None:
            num_experts = getattr(module, "num_experts", 1)
            value = _describe_factory(f"{kind}.router", ["Router"], value, num_experts=num_experts)
        description[field.name] = value
    return description


def describe(adapters: Adapters) -> dict[str, Description]:
    """Returns site -> plain data that describes the site's adapter, for checkpoints."""
    kinds = ("VectorExperts", "LoRAExperts")
    return {
        site: _describe_factory(f"Adapters.{site}", kinds, getattr(adapters, site))
        for site in adapters.sites()
    }


def _factory_from(description: object) -> Callable[..., nn.Module]:
    """Returns a factory of the module that a description, possibly read from a file, describes."""
    if not isinstance(description, Mapping):
        raise InputError(
            f"an adapter or router must be described by an object, got {description!r:.60}"
        )
    fields = dict(description)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"unknown adapter kind {kind!r}: expected one of {sorted(_KINDS)}")
    known = {field.name for field in dataclasses.fields(_KINDS[kind])}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise InputError(f"{kind} has no settings {unknown}: written by another version?")
    for field in dataclasses.fields(_KINDS[kind]):
        if field.name in fields:
            settings.check_type(f"{kind}.{field.name}", fields[field.name], field.type)
    if fields.get("router") is not None:
        fields["router"] = _factory_from(fields["router"])
    return functools.partial(_KINDS[kind], **fields)


def from_description(description: Mapping[str, Description]) -> Adapters:
    """Returns the adapters of a description; the inverse of `describe`.

    Raises:
      InputError: a site, a kind or a setting is unknown, or a setting has the wrong type.
    """
    unknown = sorted(description.keys() - SITES.keys())
    if unknown:
        raise InputError(f"unknown adapter sites {unknown}: expected some of {list(SITES)}")
    return Adapters(**{site: _factory_from(fields) for site, fields in description.items()})
