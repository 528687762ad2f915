"""The MLPs of experts, applied to the tokens that go to them, on one device and on a mesh.

With a capacity, each expert has the same number of slots, and XLA exchanges the tokens in them
between devices. Without a limit, each device sorts its own tokens by expert and multiplies them in
blocks, each with the matrix of its expert. Groups, slots and blocks are explained in `dispatch`.
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
# (rows by slot [..., in], kernel [E, in, out]) -> rows by slot [..., out]
Product = Callable[[Array, PyTree], Array]


class ExpertMlp(NamedTuple):
    """The MLPs of all experts, with T5's activations.

    Attributes:
      kernels: name -> matrices of all experts: [E, D, F] of each input projection (`wi`, or `wi_0`
        and `wi_1`), and [E, F, D] of `wo`.
      activations: see `layers.MlpBlock`.
      dropout_mask: [G, F], the factors of a group's hidden activations; None without dropout.
    """

    kernels: dict[str, PyTree]
    activations: tuple[str, ...]
    dropout_mask: Array | None

    def __call__(self, rows: Array, product: Product, by_slot: Callable[[Array], Array]) -> Array:
        """Applies to each row the MLP of the row's expert, [..., D] -> [..., D].

        Args:
          rows: the token of each slot.
          product: multiplies each row with the matrix of its expert.
          by_slot: [G, F] -> an array that broadcasts to the rows and holds, for each row, the entry
            of the row's group.
        """
        hidden = jnp.ones((), rows.dtype)
        for name, activation in layers.activations_by_name(self.activations).items():
            hidden *= layers.ACTIVATIONS[activation](product(rows, self.kernels[name]))
        if self.dropout_mask is not None:
            hidden *= by_slot(self.dropout_mask)
        return product(hidden, self.kernels["wo"])


# --- with a capacity ---


def apply_by_expert(mlp: ExpertMlp, rows: Array, num_experts: int) -> Array:
    """Applies the experts to rows in E·C slots, C of each expert, [G, E·C, D] -> [G, E·C, D]."""
    groups, slots, features = rows.shape
    capacity = slots // num_experts
    # On a mesh, the groups are first spread over `data` and `expert`. Then they are spread over
    # `data` alone, and the experts over `expert`. So XLA exchanges the rows by one all-to-all, and
    # their outputs by another.
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
    """Multiplies M rows of each expert with its matrix: [E, M, in], [E, in, out] -> [E, M, out]."""
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
      needs_slot: bool [G, T, K], which assignments are computed; the others contribute zero.
    """
    tokens = (x, experts, weights, needs_slot)
    if not partitioning.divides_rows(len(x)):
        return _apply_on_device(mlp, *tokens)
    # Each device sorts its own tokens, since XLA would gather the whole batch to sort it. The
    # experts are divided over the mesh axis `expert`, and F is divided over `model`, if possible.
    shape, hidden = jax.sharding.get_abstract_mesh().shape, mlp.kernels["wo"].shape[1]
    model_axis = "model" if hidden % shape["model"] == 0 else None
    batch_spec = PartitionSpec(partitioning.batch_axes())

    def kernel_spec(name: str, kernel: PyTree) -> PyTree:
        axes = ("expert", model_axis, None) if name == "wo" else ("expert", None, model_axis)
        values = PartitionSpec(*axes)
        if not isinstance(kernel, quantized.QuantizedMatrix):
            return values
        return quantized.QuantizedMatrix(values, PartitionSpec(axes[0], axes[2]))

    kernel_specs = {name: kernel_spec(name, kernel) for name, kernel in mlp.kernels.items()}
    mask_spec = None if mlp.dropout_mask is None else PartitionSpec(*batch_spec, model_axis)

    def apply(
        kernels: dict[str, PyTree],
        mask: Array | None,
        *tokens: Array,
    ) -> Array:
        local = ExpertMlp(kernels, mlp.activations, mask)
        return _apply_on_device(local, *tokens, num_peers=shape["expert"], model_axis=model_axis)

    in_specs = (kernel_specs, mask_spec, *[batch_spec] * len(tokens))
    run = jax.shard_map(apply, in_specs=in_specs, out_specs=batch_spec, check_vma=False)
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
    """Computes `apply_without_limit` for the tokens of one device.

    Args:
      mlp: the experts of the device.
      x, experts, weights, needs_slot: see `apply_without_limit`.
      num_peers: number of devices along the mesh axis `expert`, which share the experts equally.
      model_axis: mesh axis that F is spread over; None if each device has all of F.
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
    # The id of an empty slot is one too large, so the slot is counted to the last group.
    groups_of_slots = jnp.minimum(slots.assignment_ids[0] // (tokens * top_k), groups - 1)
    rows = _Rows(dispatch.dispatch(x, slots)[0], groups_of_slots, block_experts, used)
    y = rows.apply(mlp) if num_peers == 1 else _apply_on_peers(mlp, rows, num_peers)
    if model_axis is not None:
        y = jax.lax.psum(y, model_axis)  # `wo` has summed over the device's part of F only
    return dispatch.combine(y[None], weights, slots).reshape(groups, tokens, -1)


class _Rows(NamedTuple):
    """The rows of a device's blocks; see `dispatch.Blocks`.

    Attributes:
      x: [S, D], the token of each row.
      groups: int32 [S], the group of each row.
      experts: int32 [blocks], the expert of each block; ascending.
      used: int32 [], the number of blocks that hold a token.
    """

    x: Array
    groups: Array
    experts: Array
    used: Array

    def apply(self, mlp: ExpertMlp) -> Array:
        """Returns the outputs of the rows' experts, [S, D]; zeros for unused blocks."""

        def product(rows: Array, kernel: PyTree) -> Array:
            return block_matmul.multiply(rows, kernel, self.experts, self.used)

        return mlp(self.x, product, lambda per_group: per_group[self.groups])


def _apply_on_peers(mlp: ExpertMlp, rows: _Rows, num_peers: int) -> Array:
    """Applies experts that are spread over the mesh axis `expert` to the rows of one device.

    A peer is a device along this axis. Each peer gathers the rows of all peers and applies its own
    experts to them; the outputs of other experts' rows are zero. A sum over the peers then returns
    to each peer the outputs of its own rows, [S, D].
    """
    gather = functools.partial(jax.lax.all_gather, axis_name="expert")
    gathered = _Rows(*map(gather, rows))  # each with a leading axis of peers
    mask = mlp.dropout_mask
    groups_per_peer = 0  # groups serve only to look up dropout masks
    if mask is not None:
        groups_per_peer = len(mask)
        mlp = mlp._replace(dropout_mask=gather(mask).reshape(-1, mask.shape[-1]))
    num_local, num_blocks = mlp.kernels["wo"].shape[0], len(rows.experts)
    experts = gathered.experts - jax.lax.axis_index("expert") * num_local
    is_local = (experts >= 0) & (experts < num_local)
    is_local &= jnp.arange(num_blocks) < gathered.used[:, None]
    # Blocks of this device's experts come first: `_Rows.apply` computes the first `used` blocks.
    keys = jnp.where(is_local, experts, num_local).reshape(-1)
    order = jnp.argsort(keys, stable=True)

    def reorder_blocks(array: Array, indices: Array) -> Array:
        blocks = array.reshape(num_peers * num_blocks, -1, *array.shape[2:])
        return blocks.at[indices].get(unique_indices=True).reshape(-1, *array.shape[2:])

    peers = jnp.arange(num_peers)[:, None]
    local_rows = _Rows(
        reorder_blocks(gathered.x, order),
        reorder_blocks(gathered.groups + peers * groups_per_peer, order),
        jnp.minimum(keys[order], num_local - 1),
        jnp.sum(is_local, dtype=jnp.int32),
    )
    y = local_rows.apply(mlp).reshape(gathered.x.shape)
    y = reorder_blocks(y, jnp.argsort(order)).reshape(gathered.x.shape)  # back in the peers' order
    return jax.lax.psum_scatter(y, "expert")
