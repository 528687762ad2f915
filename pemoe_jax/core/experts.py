"""Sparse MLPs: each token goes to a few of E whole feed-forward experts (arXiv 2305.14705).

    y = Σ_k w_k MLP_e(k)(x),   p = softmax(x W)

The experts e(1), e(2), … of a token are its most probable ones (Switch Transformers, arXiv
2101.03961; GShard, 2006.16668; ST-MoE, 2202.08906), or each expert chooses its tokens (expert
choice, 2202.09368). The weight w_k is computed from the probability of e(k), see
`dispatch.combine_weights`. `core/dispatch.py` assigns tokens to experts and explains groups, slots
and capacities. `core/expert_mlp.py` computes the experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from pemoe_jax.core import dispatch, expert_mlp, layers, partitioning, quantized, routing
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.expert_mlp import ExpertMlp
from pemoe_jax.core.params import PyTree
from pemoe_jax.core.routing import TokenInfo
from pemoe_jax.core.sparse import Sparse

Array = jax.Array

# Module-level constants, see `params.param`. E is a batch axis: the fan-in is that of one expert.
_ROUTER_INIT = nn.initializers.normal(stddev=0.02)
_EXPERT_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))

# Names, in order, of the statistics that a sparse layer sows in addition to `routing.STATISTICS`:
# the share of assignments that are dropped, the share of tokens without an expert, and the share of
# slots that hold a token, which is 1 without a limit.
DISPATCH_STATISTICS = ("dropped", "without_expert", "used")


class _Router(nn.Module):
    """The router: a linear layer without bias in float32. Parameter names are T5X's."""

    num_experts: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> logits [..., E]."""
        return _RouterWeights(self.num_experts, name="router_weights")(x)


class _RouterWeights(nn.Module):
    """The only layer of `_Router`, a module by itself for T5X's path `router/router_weights/w`."""

    num_experts: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = ("embed", "unmodeled")
        dense = layers.Dense(self.num_experts, axes, jnp.float32, _ROUTER_INIT, name="w")
        return dense(x.astype(jnp.float32))


class ExpertKernel(nn.Module):
    """The matrices [E, in, out] of all experts."""

    num_experts: int
    features: int  # size of the output
    kernel_axes: tuple[str, str]  # logical names of the axes in and out
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, in_features: int) -> PyTree:
        """Returns the kernel: an array in the activation dtype, or a `QuantizedMatrix`."""
        kernel: PyTree = self.get_variable("params", "kernel")
        if isinstance(kernel, quantized.QuantizedMatrix):
            return kernel
        shape, axes = (self.num_experts, in_features, self.features), ("expert", *self.kernel_axes)
        return jnp.asarray(params_lib.param(self, "kernel", _EXPERT_INIT, shape, axes), self.dtype)


class ExpertKernels(nn.Module):
    """The matrices of all experts by name: `wi_0` and `wi_1`, or `wi`; and `wo`.

    Attributes:
      num_experts, mlp_dim: E and F.
      activations: see `layers.MlpBlock`.
      dtype: dtype of the products.
    """

    num_experts: int
    mlp_dim: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: int) -> dict[str, PyTree]:
        """Returns `ExpertMlp.kernels`; `features` is D, the size of the inputs."""

        def kernel(name: str, sizes: tuple[int, int], axes: tuple[str, str]) -> PyTree:
            module = ExpertKernel(self.num_experts, sizes[1], axes, self.dtype, name=name)
            return module(sizes[0])

        sizes = features, self.mlp_dim
        names = layers.activations_by_name(self.activations)
        kernels = {name: kernel(name, sizes, ("embed", "mlp")) for name in names}
        return kernels | {"wo": kernel("wo", sizes[::-1], ("mlp", "embed"))}


class SparseMlpBlock(nn.Module):
    """A sparse MLP. The output of a token without an expert is zero.

    Attributes:
      sparse: settings of the experts and of their routing.
      mlp_dim: F.
      activations: see `layers.MlpBlock`.
      dtype: dtype of the products; routers compute in float32.
      dropout_rate: the model's dropout rate.
      is_causal: whether this is a decoder's layer. Its routing must not depend on later tokens, so
        tokens choose their experts and take places from left to right, whatever `sparse` says.
    """

    sparse: Sparse
    mlp_dim: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dtype: jax.typing.DTypeLike = jnp.float32
    dropout_rate: float = 0.0
    is_causal: bool = False

    @nn.compact
    def __call__(self, x: Array, tokens: TokenInfo | None = None) -> Array:
        """[B, L, D] -> [B, L, D]; `tokens` describes the tokens of x."""
        cfg, tokens = self.sparse, tokens or TokenInfo()
        if self.is_causal:
            cfg = dataclasses.replace(cfg, routing="tokens", priority="position")
        is_token = jnp.ones(x.shape[:2], bool)
        if tokens.valid is not None and not cfg.count_padding:
            is_token = tokens.valid.astype(bool)
        groups, is_token, ungroup = _group(x, is_token, cfg)
        logits = _Router(cfg.num_experts, name="router")(self._with_jitter(groups, tokens))
        expert_kernels = ExpertKernels(
            cfg.num_experts, self.mlp_dim, self.activations, self.dtype, name="expert"
        )
        kernels = expert_kernels(x.shape[-1])
        # Initialization needs only the parameters, which exist by now. Tracing the routing would
        # take 0.1 s, and T5X would keep the statistics as model state, since it keeps all
        # collections that `init` returns.
        if self.is_initializing():
            return x.astype(self.dtype)
        probs = jax.nn.softmax(logits, axis=-1)  # [G, T, E]
        mlp = ExpertMlp(kernels, self.activations, self._dropout_mask(len(groups), tokens))
        groups = groups.astype(self.dtype)
        arguments = cfg, mlp, groups, probs, is_token, tokens.deterministic
        if cfg.routing == "experts":
            result = _experts_choose(*arguments)
        else:
            is_random = cfg.second_expert == "random" and cfg.top_k > 1
            needs_rng = is_random and not tokens.deterministic
            result = _tokens_choose(*arguments, self.make_rng("dropout") if needs_rng else None)
        self._record(cfg, logits, probs, is_token, result, ungroup)
        return ungroup(result.y).astype(self.dtype)

    def _with_jitter(self, x: Array, tokens: TokenInfo) -> Array:
        x = x.astype(jnp.float32)
        epsilon = self.sparse.jitter
        if not epsilon or tokens.deterministic:
            return x
        rng = self.make_rng("dropout")  # T5X passes no other key
        return x * jax.random.uniform(rng, x.shape, minval=1.0 - epsilon, maxval=1.0 + epsilon)

    def _dropout_mask(self, groups: int, tokens: TokenInfo) -> Array | None:
        rate = self.sparse.expert_dropout_rate
        rate = self.dropout_rate if rate is None else rate
        if not rate or tokens.deterministic:
            return None
        # The tokens of a group share a mask, whichever experts they go to. A group is a row by
        # default, and the tokens of a row share a mask in T5's dense MLP too.
        ones = jnp.ones((groups, self.mlp_dim), self.dtype)
        return nn.Dropout(rate, deterministic=False)(ones)

    def _record(
        self,
        cfg: Sparse,
        logits: Array,
        probs: Array,
        is_token: Array,
        result: "_SparseMlpResult",
        ungroup: Callable[[Array], Array],
    ) -> None:
        """Sows statistics; also probabilities and assignments if 'intermediates' are collected."""
        statistics = _statistics(cfg, logits, probs, is_token, result)
        self.sow("routers", "statistics", statistics)
        self.sow("routers", "dispatch", jax.lax.stop_gradient(result.dispatch_statistics))
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "probs", ungroup(result.mixture()))
            self.sow("intermediates", "router_probs", ungroup(probs))
            self.sow("intermediates", "assignments", ungroup(result.assignments()))


class _SparseMlpResult(NamedTuple):
    """The output of a sparse MLP, and the assignments of tokens to experts behind it.

    The last two attributes are functions, so that arrays are computed only if they are collected.

    Attributes:
      y: the output, [G, T, D].
      choice_share: [G, E], the share f of each expert in all choices of a group's tokens, or, where
        experts choose, in all tokens chosen.
      dispatch_statistics: the `DISPATCH_STATISTICS`, float32 [3].
      mixture: function that returns the weight of each expert for each token, [G, T, E], as if no
        assignment were dropped.
      assignments: function that returns `routing.PLACED`, `DROPPED` or `NOT_ASSIGNED` for each
        token and expert, int8 [G, T, E].
    """

    y: Array
    choice_share: Array
    dispatch_statistics: Array
    mixture: Callable[[], Array]
    assignments: Callable[[], Array]


def _group(x: Array, is_token: Array, cfg: Sparse) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Divides x [B, L, D] and is_token [B, L] into groups of tokens.

    Returns:
      x [G, T, D], is_token [G, T], and the inverse of the division, [G, T, ...] -> [B, L, ...].
    """
    if cfg.group == "row":
        return x, is_token, lambda y: y
    assert isinstance(cfg.group, int)
    batch, length, features = x.shape
    # As in T5X, the number of groups is a multiple of data-parallel size · experts. The groups can
    # then be divided evenly over the devices.
    replicas = partitioning.data_parallelism()
    rows, columns = dispatch.group_padding(batch, length, replicas * cfg.num_experts)
    x = jnp.pad(x, ((0, rows), (0, columns), (0, 0)))
    is_token = jnp.pad(is_token, ((0, rows), (0, columns)), constant_values=cfg.count_padding)
    num_groups = dispatch.num_groups(is_token.size, cfg.group, replicas * cfg.num_experts)

    def ungroup(y: Array) -> Array:
        y = y.reshape(batch + rows, length + columns, *y.shape[2:])
        return y[:batch, :length]

    return x.reshape(num_groups, -1, features), is_token.reshape(num_groups, -1), ungroup


def _tokens_choose(
    cfg: Sparse,
    mlp: ExpertMlp,
    x: Array,
    probs: Array,
    is_token: Array,
    deterministic: bool,
    rng: Array | None,
) -> _SparseMlpResult:
    """Computes the MLP with each token choosing its top-k experts.

    With a key `rng`, second experts are kept at random; None keeps all.
    """
    groups, tokens, num_experts = probs.shape
    choose = functools.partial(dispatch.choose_experts, top_k=cfg.top_k)
    experts, chosen = partitioning.map_rows(choose, probs)
    weights = dispatch.combine_weights(chosen, cfg.combine)
    needs_slot = jnp.broadcast_to(is_token[..., None], experts.shape)
    if rng is not None:
        needs_slot &= dispatch.keep_at_random(chosen, rng)
    capacity = cfg.group_capacity(tokens, deterministic)
    # The experts of a token are distinct, so none is chosen more often than there are tokens.
    if capacity is None or capacity >= tokens:
        y = expert_mlp.apply_without_limit(mlp, x, experts, weights, needs_slot)
        has_slot, used = needs_slot, jnp.ones(())
    else:
        priority = chosen[..., 0] if cfg.priority == "probability" else None
        order, places, counts = dispatch.assign_places(experts, needs_slot, num_experts, priority)
        has_slot = needs_slot & (places < capacity)
        used = jnp.mean(jnp.sum(has_slot, axis=(1, 2)) / (num_experts * capacity))
        if _should_skip_empty_slots(num_experts * capacity, tokens * cfg.top_k):
            y = expert_mlp.apply_without_limit(mlp, x, experts, weights, has_slot)
        else:
            slots = dispatch.slots_with_capacity(
                experts, order, places, counts, needs_slot, capacity
            )
            rows = expert_mlp.apply_by_expert(mlp, dispatch.dispatch(x, slots), num_experts)
            y = dispatch.combine(rows, weights, slots)

    def mixture() -> Array:
        one_hot = jax.nn.one_hot(experts, num_experts) * needs_slot[..., None]
        return jnp.sum(weights[..., None] * one_hot, axis=2)

    def assignments() -> Array:
        kinds = jnp.where(has_slot, routing.PLACED, routing.DROPPED)
        kinds = jnp.where(needs_slot, kinds, routing.NOT_ASSIGNED).astype(jnp.int8)
        one_hot = jax.nn.one_hot(experts, num_experts, dtype=jnp.int8)
        return jnp.sum(kinds[..., None] * one_hot, axis=2, dtype=jnp.int8)

    choices = jnp.sum(jax.nn.one_hot(experts, num_experts) * is_token[..., None, None], axis=(1, 2))
    choice_share = choices / jnp.maximum(jnp.sum(choices, axis=-1, keepdims=True), 1.0)
    statistics = jnp.stack(
        [
            1.0 - _share(has_slot, needs_slot),
            1.0 - _share(jnp.any(has_slot, axis=-1), is_token),
            used,
        ]
    )
    return _SparseMlpResult(y, choice_share, statistics, mixture, assignments)


def _should_skip_empty_slots(num_slots: int, num_assignments: int) -> bool:
    """Whether it is faster to compute only the filled slots, in blocks, than all slots.

    This is so on one CPU, if more than half of the slots must be empty.
    """
    # MIN_CAPACITY leaves most slots of short groups empty: with a minimum of 4, 128 experts have
    # 512 slots for a group of 32 tokens. Blocks were not measured on GPUs, which would wait for the
    # host at each block. A mesh of several CPU devices stands for accelerators: `pemoe plan`
    # compiles on it.
    is_one_cpu = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    return is_one_cpu and num_slots > 2 * num_assignments


def _experts_choose(
    cfg: Sparse,
    mlp: ExpertMlp,
    x: Array,
    probs: Array,
    is_token: Array,
    deterministic: bool,
) -> _SparseMlpResult:
    """Computes the MLP with each expert choosing its C tokens."""
    groups, tokens, num_experts = probs.shape
    # The capacity in a group follows from the number of its tokens that are not padding, which is
    # known only when the program runs. So the capacities of all possible numbers are computed here.
    capacity_by_count = [
        min(cfg.group_capacity(count, deterministic) or count, count) for count in range(tokens + 1)
    ]
    capacities = jnp.asarray(capacity_by_count)[jnp.sum(is_token, axis=-1)]  # [G]

    def choose(probs: Array, is_token: Array, capacities: Array) -> dispatch.ChosenTokens:
        return dispatch.choose_tokens(probs, is_token, max(capacity_by_count), capacities)

    chosen = partitioning.map_rows(choose, probs, is_token, capacities)
    chosen = dispatch.chosen_weights(chosen, tokens, cfg.combine)
    rows = expert_mlp.apply_by_expert(mlp, dispatch.dispatch_chosen(x, chosen), num_experts)
    y = dispatch.combine_chosen(rows, chosen, tokens)

    def mixture() -> Array:
        one_hot = jax.nn.one_hot(chosen.tokens, tokens)  # zeros for an empty slot
        return jnp.einsum("gect,gec->gte", one_hot, chosen.weights)

    def assignments() -> Array:
        one_hot = jax.nn.one_hot(chosen.tokens, tokens, dtype=jnp.int8)
        return routing.PLACED * jnp.swapaxes(jnp.sum(one_hot, axis=2, dtype=jnp.int8), 1, 2)

    is_filled = chosen.tokens < tokens
    mark = jax.vmap(lambda indices: jnp.zeros(tokens, bool).at[indices].set(True, mode="drop"))
    has_expert = mark(chosen.tokens.reshape(groups, -1))  # [G, T]
    counts = jnp.sum(is_filled, axis=-1).astype(jnp.float32)
    choice_share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    without_expert = 1.0 - _share(has_expert, is_token)
    statistics = jnp.stack([jnp.zeros(()), without_expert, jnp.mean(is_filled.astype(jnp.float32))])
    return _SparseMlpResult(y, choice_share, statistics, mixture, assignments)


def _share(part: Array, whole: Array) -> Array:
    """Returns the share of `whole`'s True entries that are True in `part`; 1 if it has none."""
    count = jnp.sum(whole).astype(jnp.float32)
    return jnp.where(count > 0, jnp.sum(part & whole) / jnp.maximum(count, 1.0), 1.0)


def _statistics(
    cfg: Sparse, logits: Array, probs: Array, is_token: Array, result: _SparseMlpResult
) -> Array:
    """Returns the `routing.STATISTICS` of a sparse layer, float32."""
    weights = is_token.astype(jnp.float32)  # [G, T]
    total = jnp.maximum(jnp.sum(weights), 1.0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    entropy = jnp.sum((log_z - jnp.sum(probs * logits, axis=-1)) * weights) / total
    z_loss = jnp.sum(jnp.square(log_z) * weights) / total
    # The balance loss is computed in each group and averaged over the groups, as in T5X. Unlike in
    # T5X, groups that hold only padding are left out.
    group_tokens = jnp.sum(weights, axis=-1, keepdims=True)  # [G, 1]
    mean_probs = jnp.einsum("gte,gt->ge", probs, weights) / jnp.maximum(group_tokens, 1.0)
    balances = cfg.num_experts * jnp.sum(result.choice_share * mean_probs, axis=-1)  # [G]
    has_tokens = (group_tokens[:, 0] > 0).astype(jnp.float32)
    balance_loss = jnp.sum(balances * has_tokens) / jnp.maximum(jnp.sum(has_tokens), 1.0)
    shares = jnp.sum(result.choice_share * group_tokens, axis=0) / total
    load = cfg.num_experts * shares  # 1 for an expert with an even share
    aux_loss = cfg.router_z_loss * z_loss
    if cfg.routing == "tokens":  # experts that choose are balanced by construction
        aux_loss += cfg.balance_loss * balance_loss
    dead = jnp.mean((load < routing.DEAD_LOAD).astype(jnp.float32))
    statistics = jnp.stack([entropy, jnp.max(load), dead, balance_loss, z_loss])
    return jnp.append(jax.lax.stop_gradient(statistics), aux_loss)
