"""The MLPs of experts, applied to the tokens that go to them, on one device and on a mesh.

With a capacity, tokens lie in slots by expert, and XLA exchanges them between devices. Without a
limit, each device sorts its own tokens by expert and multiplies blocks of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pemoe_jax.core import dispatch, layers, partitioning, quantized
from pemoe_jax.core.kernels import block_matmul
from pemoe_jax.core.params import PyTree

Array = jax.Array
# (rows by slot, kernel [E, in, out]) -> rows by slot
Product = Callable[[Array, PyTree], Array]


class ExpertMlp(NamedTuple):
    """The MLPs of all experts, with T5's activations.

    Attributes:
      kernels: matrices [E, D, F] by the names of the activations, and [E, F, D] as `wo`.
      activations: see `layers.MlpBlock`.
      dropout_mask: [G, F], the factors of a group's hidden activations; None without dropout.
    """

    kernels: dict[str, PyTree]
    activations: tuple[str, ...]
    dropout_mask: Array | None

    def __call__(self, rows: Array, product: Product, by_slot: Callable[[Array], Array]) -> Array:
        """Rows by slot [..., D] -> [..., D].

        Args:
          rows: rows by slot.
          product: multiplies rows by slot with their experts' matrices.
          by_slot: [G, F] -> an array that broadcasts to rows by slot, each having its group's row.
        """
        hidden = jnp.ones((), rows.dtype)
        for name, activation in layers.activations_by_name(self.activations).items():
            hidden *= layers.ACTIVATIONS[activation](product(rows, self.kernels[name]))
        if self.dropout_mask is not None:
            hidden *= by_slot(self.dropout_mask)
        return product(hidden, self.kernels["wo"])


# --- with a capacity ---


def apply_by_expert(mlp: ExpertMlp, rows: Array, num_experts: int) -> Array:
    """Rows in E·C slots, C of each expert, [G, E·C, D] -> [G, E·C, D]."""
    groups, slots, features = rows.shape
    capacity = slots // num_experts
    # On a mesh, groups are spread over `data` and `expert` at first, then over `data` alone and the
    # experts over `expert`: XLA exchanges the rows by an all-to-all, and their outputs by another.
    by_group = ("batch", None, None, "embed")
    by_expert = ("expert", "expert_groups", None, "embed")

    def by_slot(per_group: Array) -> Array:
        return jnp.repeat(per_group, capacity, axis=0)[None]

    rows = rows.reshape(groups, num_experts, capacity, features)
    rows = jnp.swapaxes(layers.constrain_sharding(rows, by_group), 0, 1)
    rows = layers.constrain_sharding(rows, by_expert)
    y = mlp(rows.reshape(num_experts, -1, features), _batched_product, by_slot)
    y = layers.constrain_sharding(y.reshape(rows.shape), by_expert)
    y = layers.constrain_sharding(jnp.swapaxes(y, 0, 1), by_group)
    return y.reshape(groups, slots, features)


def _batched_product(rows: Array, kernel: PyTree) -> Array:
    """[E, M, in], [E, in, out] -> [E, M, out]."""
    if isinstance(kernel, quantized.QuantizedMatrix):
        return quantized.expert_matmul(rows, kernel)
    return jnp.einsum("emd,edf->emf", rows, kernel)


# --- without a limit ---


def apply_without_limit(
    mlp: ExpertMlp, x: Array, experts: Array, weights: Array, needs_slot: Array
) -> Array:
    """Sums the weighted outputs of each token's experts, [G, T, D] -> [G, T, D].

    Args:
      mlp: the experts.
      x: [G, T, D].
      experts: int32 [G, T, K].
      weights: float32 [G, T, K].
      needs_slot: bool [G, T, K], whether an assignment is computed; others contribute zero.
    """
    tokens = (x, experts, weights, needs_slot)
    if not partitioning.divides_rows(len(x)):
        return _apply_on_device(mlp, *tokens)
    # A sort of the whole batch would gather it: each device sorts its own tokens. The experts of a
    # device are complete but for the part of F that is its own by model parallelism.
    shape, hidden = jax.sharding.get_abstract_mesh().shape, mlp.kernels["wo"].shape[1]
    model_axis = "model" if hidden % shape["model"] == 0 else None
    batch = PartitionSpec(partitioning.batch_axes())

    def spec(name: str, kernel: PyTree) -> PyTree:
        axes = ("expert", model_axis, None) if name == "wo" else ("expert", None, model_axis)
        values = PartitionSpec(*axes)
        if not isinstance(kernel, quantized.QuantizedMatrix):
            return values
        return quantized.QuantizedMatrix(values, PartitionSpec(axes[0], axes[2]))

    kernels = {name: spec(name, kernel) for name, kernel in mlp.kernels.items()}
    mask = PartitionSpec(*batch, model_axis)

    def apply(
        kernels: dict[str, PyTree],
        mask: Array | None,
        *tokens: Array,
    ) -> Array:
        local = ExpertMlp(kernels, mlp.activations, mask)
        return _apply_on_device(local, *tokens, num_peers=shape["expert"], model_axis=model_axis)

    in_specs = (kernels, None if mlp.dropout_mask is None else mask, *[batch] * len(tokens))
    run = jax.shard_map(apply, in_specs=in_specs, out_specs=batch, check_vma=False)
    return run(mlp.kernels, mlp.dropout_mask, *tokens)


def _apply_on_device(
    mlp: ExpertMlp,
    x: Array,
    experts: Array,
    weights: Array,
    needs_slot: Array,
    *,
    num_peers: int = 1,
    model_axis: str | None = None,
) -> Array:
    """`apply_without_limit` of the tokens of a device.

    Args:
      mlp: the experts of the device.
      x, experts, weights, needs_slot: see `apply_without_limit`.
      num_peers: number of devices along `expert`, each with an equal part of the experts.
      model_axis: mesh axis over which F is spread.
    """
    groups, tokens, top_k = experts.shape
    num_experts = mlp.kernels["wo"].shape[0] * num_peers
    # Groups do not matter here: all tokens are sorted by expert at once.
    flat = [a.reshape(1, -1, a.shape[-1]) for a in (x, experts, weights, needs_slot)]
    x, experts, weights, needs_slot = flat
    order, places, counts = dispatch.assign_places(experts, needs_slot, num_experts)
    size = dispatch.block_size(order.shape[-1], num_experts)
    slots, block_experts, used = dispatch.slots_in_blocks(
        experts, order, places, counts, needs_slot, size
    )
    groups_of_slots = jnp.minimum(slots.assignment_ids[0] // (tokens * top_k), groups - 1)
    rows = _Rows(dispatch.dispatch(x, slots)[0], groups_of_slots, block_experts, used)
    y = rows.apply(mlp) if num_peers == 1 else _apply_to_peers(mlp, rows, num_peers)
    if model_axis is not None:
        y = jax.lax.psum(y, model_axis)
    return dispatch.combine(y[None], weights, slots).reshape(groups, tokens, -1)


class _Rows(NamedTuple):
    """Rows of blocks.

    Attributes:
      x: [S, D].
      groups: int32 [S], the group of each row.
      experts: int32 [blocks], the expert of each block; ascending.
      used: int32 [], the number of blocks that hold a token.
    """

    x: Array
    groups: Array
    experts: Array
    used: Array

    def apply(self, mlp: ExpertMlp) -> Array:
        """Returns the outputs of the rows' experts, [S, D]; of unused blocks they are zero."""

        def product(rows: Array, kernel: PyTree) -> Array:
            return block_matmul.multiply(rows, kernel, self.experts, self.used)

        return mlp(self.x, product, lambda per_group: per_group[self.groups])


def _apply_to_peers(mlp: ExpertMlp, rows: _Rows, num_peers: int) -> Array:
    """Applies the experts of a device to the rows of all devices along `expert`.

    Returns the sums over these devices for the rows of this one, [S, D].
    """
    gather = functools.partial(jax.lax.all_gather, axis_name="expert")
    gathered = _Rows(*map(gather, rows))  # each with a leading axis of peers
    mask = mlp.dropout_mask
    groups_of_peer = 0
    if mask is not None:
        groups_of_peer = len(mask)
        mlp = mlp._replace(dropout_mask=gather(mask).reshape(-1, mask.shape[-1]))
    num_local, num_blocks = mlp.kernels["wo"].shape[0], len(rows.experts)
    experts = gathered.experts - jax.lax.axis_index("expert") * num_local
    is_local = (experts >= 0) & (experts < num_local)
    is_local &= jnp.arange(num_blocks) < gathered.used[:, None]
    # Blocks of this device's experts come first, so that no others are computed.
    keys = jnp.where(is_local, experts, num_local).reshape(-1)
    order = jnp.argsort(keys, stable=True)

    def by_block(array: Array, indices: Array) -> Array:
        blocks = array.reshape(num_peers * num_blocks, -1, *array.shape[2:])
        return blocks.at[indices].get(unique_indices=True).reshape(-1, *array.shape[2:])

    peers = jnp.arange(num_peers)[:, None]
    local_rows = _Rows(
        by_block(gathered.x, order),
        by_block(gathered.groups + peers * groups_of_peer, order),
        jnp.minimum(keys[order], num_local - 1),
        jnp.sum(is_local, dtype=jnp.int32),
    )
    y = local_rows.apply(mlp).reshape(gathered.x.shape)
    y = by_block(y, jnp.argsort(order)).reshape(gathered.x.shape)
    return jax.lax.psum_scatter(y, "expert")
