"""Dispatch: choosing the experts of tokens, moving tokens to them, and combining their outputs.

Tokens choose experts as in Switch Transformers (arXiv 2101.03961) and GShard (arXiv 2006.16668), or
experts choose tokens (arXiv 2202.09368). The functions are pure and have no parameters.

Shapes: G groups of T tokens, K choices of a token, E experts, S slots, and the capacity C, which is
the largest number of tokens of a group that an expert computes.

- A group is a part of the batch that is dispatched by itself, by default a row (`Sparse.group`).
- An assignment is one choice of a token: the pair of the token and the chosen expert.
- The place of an assignment is its position, from 0, among the assignments of the same expert and
  group.
- The slot of an assignment is the row of the experts' input that holds its token. With a capacity,
  an assignment whose place is C or larger has no slot: it is dropped.

Tokens are copied to slots, and outputs from slots, by index. A one-hot array of tokens, experts and
places, as in Switch Transformers, would have T·E·C entries.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

COMBINE = ("probability", "normalized", "straight")  # see `combine_weights`
# With SECOND_EXPERT='random', a choice after the first is always kept if its normalized weight is
# at least this threshold, and else at random, as in Mesh TensorFlow's implementation of GShard.
SECOND_EXPERT_THRESHOLD = 0.2


class Slots(NamedTuple):
    """Which assignment is in which slot. The assignment of token t's choice k has the id t·K + k.

    Attributes:
      assignment_ids: int32 [G, S], the id of the assignment in each slot; T·K in an empty slot.
      slot_ids: int32 [G, T, K], the slot of each assignment; S if it has none.
    """

    assignment_ids: Array
    slot_ids: Array


def capacity(num_tokens: int, num_experts: int, factor: float, minimum: int = 1) -> int:
    """Returns C = max(round(factor · T / E), minimum), which does not grow with K, as in T5X.

    Halves are rounded to even, as Python's `round` does.
    """
    return max(round(factor * num_tokens / num_experts), minimum)


def group_padding(batch: int, length: int, multiple: int) -> tuple[int, int]:
    """Returns how many rows and columns to add, so that `multiple` divides the number of tokens.

    As in T5X, either rows or columns are added, whichever adds fewer tokens; columns if both add
    the same number.
    """
    if batch * length % multiple == 0:
        return 0, 0
    # The least padding that makes the rows a multiple of `multiple / gcd(multiple, length)`: rows
    # times length is then a multiple of `multiple`.
    rows = -batch % (multiple // math.gcd(multiple, length))
    columns = -length % (multiple // math.gcd(multiple, batch))
    return (rows, 0) if columns * batch > rows * length else (0, columns)


def num_groups(num_tokens: int, group_size: int, multiple: int) -> int:
    """Returns the number of groups for a desired number of tokens in a group, as in T5X.

    It is the smallest number that divides `num_tokens`, is a multiple of `multiple` (data-parallel
    size · experts) and is at least `num_tokens // group_size`. This quotient is rounded down, so a
    group may have more than `group_size` tokens: 20 tokens are 2 groups of 10 for a size of 8.

    Args:
      num_tokens: number of tokens of the padded batch, a multiple of `multiple`.
      group_size: desired number of tokens in a group.
      multiple: see above.
    """
    smallest = max(num_tokens // group_size, multiple)
    return next(
        count
        for count in range(smallest, num_tokens + 1)
        if num_tokens % count == 0 and count % multiple == 0
    )


def choose_experts(probs: Array, top_k: int) -> tuple[Array, Array]:
    """Returns each token's K most probable experts and their probabilities, both [G, T, K].

    `probs` are [G, T, E]. Of experts with equal probabilities, the first is chosen.
    """
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(probs), top_k)
    return experts, jnp.take_along_axis(probs, experts, axis=-1)


def combine_weights(chosen: Array, combine: str) -> Array:
    """Returns the weights of the chosen experts' outputs, [G, T, K].

    Args:
      chosen: probabilities of the chosen experts, [G, T, K].
      combine: 'probability' (p, as in Switch Transformers), 'normalized' (p / Σ_k p, as in GShard)
        or 'straight' (p / stop_gradient(Σ_k p), the same value as 'normalized'). For K = 1, this
        value is 1; 'straight' then has a gradient, and 'normalized' has none.
    """
    if combine == "probability":
        return chosen
    total = jnp.sum(chosen, axis=-1, keepdims=True)
    return chosen / (jax.lax.stop_gradient(total) if combine == "straight" else total)


def keep_at_random(chosen: Array, rng: Array) -> Array:
    """Draws which choices are kept, bool [G, T, K]; the first choice of a token always is.

    A choice of normalized weight g = p / Σ_k p is kept with probability min(1, g / 0.2). GShard
    keeps second experts at random; the threshold is Mesh TensorFlow's.
    """
    normalized = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    draws = jax.random.uniform(rng, chosen.shape, maxval=SECOND_EXPERT_THRESHOLD)
    is_kept = draws < jax.lax.stop_gradient(normalized)
    return is_kept.at[..., 0].set(True)


def assign_places(
    experts: Array, needs_slot: Array, num_experts: int, priority: Array | None = None
) -> tuple[Array, Array, Array]:
    """Numbers each expert's assignments in each group from 0; these numbers are their places.

    All first choices come before all second choices. Among first (or second) choices, tokens come
    from left to right, or by decreasing priority (batch-prioritized routing, arXiv 2106.05974).

    Args:
      experts: int32 [G, T, K], the chosen experts.
      needs_slot: bool, broadcasts to [G, T, K]; False for padding and for choices that are not
        kept.
      num_experts: E.
      priority: [G, T], or None.

    Returns:
      order: int32 [G, K·T], ids of the assignments, sorted by expert and place; assignments
        that need no slot come last.
      places: int32 [G, T, K], the place of each assignment; meaningless if it needs no slot.
      counts: int32 [G, E], the number of each expert's assignments.
    """
    groups, tokens, choices = experts.shape
    # Assignments that need no slot get the index E, which no expert has, so they are sorted last.
    experts = jnp.where(needs_slot, experts, num_experts)
    token_order = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
    if priority is not None:
        token_order = jnp.argsort(-jax.lax.stop_gradient(priority), axis=-1, stable=True)
        experts = jnp.take_along_axis(experts, token_order[..., None], axis=1)
    by_choice = jnp.swapaxes(experts, 1, 2).reshape(groups, choices * tokens)
    ids = token_order[:, None] * choices + jnp.arange(choices)[:, None]  # [G, K, T]
    ids = ids.reshape(by_choice.shape).astype(jnp.int32)
    # One stable sort, whose keys are the experts and whose values are the assignments' ids.
    sorted_experts, order = jax.lax.sort((by_choice, ids), num_keys=1, dimension=-1)
    find_starts = jax.vmap(lambda keys: jnp.searchsorted(keys, jnp.arange(num_experts + 1)))
    starts = find_starts(sorted_experts)  # [G, E + 1], where each expert's assignments start
    counts = jnp.diff(starts, axis=-1)
    # The place of an assignment is its distance from the start of its expert.
    sorted_places = jnp.arange(choices * tokens) - jnp.take_along_axis(
        starts, sorted_experts, axis=-1
    )
    places = _unsort(order, sorted_places)
    return order, places.reshape(groups, tokens, choices), counts


def _unsort(order: Array, values: Array) -> Array:
    """Returns an array with result[g, order[g, i]] = values[g, i]; order[g] is a permutation."""
    # On a CPU, a scatter of [16, 512] integers takes 0.2 ms and a second sort 2.0 ms.
    scatter = jax.vmap(lambda order, values: values.at[order].set(values, unique_indices=True))
    return scatter(order, values)


def slots_with_capacity(
    experts: Array, order: Array, places: Array, counts: Array, needs_slot: Array, capacity: int
) -> Slots:
    """Assigns the slots of experts with a capacity C; drops assignments whose place is C or larger.

    Args:
      experts, needs_slot: arguments of `assign_places`.
      order, places, counts: its results.
      capacity: C.

    Returns:
      Slots with S = E·C; expert e has the slots e·C to (e + 1)·C - 1.
    """
    num_experts, num_assignments = counts.shape[-1], order.shape[-1]
    num_slots = num_experts * capacity
    has_slot = needs_slot & (places < capacity)
    slot_ids = jnp.where(has_slot, experts * capacity + places, num_slots)
    # `order` is sorted by expert and place. So slot c of expert e holds order[starts[e] + c] if the
    # expert has more than c assignments.
    starts = jnp.cumsum(counts, axis=-1) - counts
    indices = starts[..., None] + jnp.arange(capacity)  # [G, E, C]
    is_filled = jnp.arange(capacity) < counts[..., None]
    indices = jnp.minimum(indices, num_assignments - 1).reshape(-1, num_slots)
    ids = jnp.take_along_axis(order, indices, axis=-1)
    assignment_ids = jnp.where(is_filled.reshape(ids.shape), ids, num_assignments)
    return Slots(assignment_ids, slot_ids.astype(jnp.int32))


class Blocks(NamedTuple):
    """Slots in blocks of equal size. Each expert has as many blocks as its assignments need.

    Attributes:
      slots: the slots, S = blocks · block size.
      experts: int32 [blocks], the expert of each block; ascending.
      used: int32 [], the number of blocks that hold a token; these blocks come first.
    """

    slots: Slots
    experts: Array
    used: Array


def block_size(num_assignments: int, num_experts: int) -> int:
    """Returns the number of slots in a block, a power of two from 8 to 128.

    It is at most half of an expert's mean number of assignments, unless this mean is below 16. On
    average, half a block of each expert is empty. So there is at most one empty slot for every four
    that are filled.
    """
    largest = num_assignments // (2 * num_experts)
    power_of_two = 1 << max(largest, 1).bit_length() - 1
    return min(max(power_of_two, 8), 128)


def slots_in_blocks(
    experts: Array, order: Array, places: Array, counts: Array, needs_slot: Array, size: int
) -> Blocks:
    """Assigns a slot to every assignment that needs one: each expert gets whole blocks of slots.

    Args:
      experts, order, places, counts, needs_slot: see `slots_with_capacity`, with G = 1.
      size: number of slots in a block.
    """
    num_assignments, num_experts = order.shape[-1], counts.shape[-1]
    # A program has fixed shapes, so this is the largest number of blocks that may be needed: each
    # expert leaves at most size - 1 slots empty.
    num_blocks = (num_assignments + num_experts * (size - 1)) // size
    expert_blocks = -(-counts[0] // size)  # [E], the number of blocks of each expert
    ends = jnp.cumsum(expert_blocks)
    block_starts = ends - expert_blocks
    no_slot = num_blocks * size
    slot_ids = jnp.where(needs_slot, block_starts[experts] * size + places, no_slot)
    # The expert of a block is the first expert whose blocks end after this block. Unused blocks
    # come last. They are given to the last expert, so that the experts of blocks ascend.
    block_experts = jnp.searchsorted(ends, jnp.arange(num_blocks), side="right")
    block_experts = jnp.minimum(block_experts, num_experts - 1).astype(jnp.int32)
    # The place of each slot among the assignments of its expert, [blocks, size].
    first_places = (jnp.arange(num_blocks) - block_starts[block_experts]) * size
    slot_places = first_places[:, None] + jnp.arange(size)
    starts = jnp.cumsum(counts[0]) - counts[0]
    is_filled = (slot_places >= 0) & (slot_places < counts[0][block_experts][:, None])
    indices = jnp.clip(starts[block_experts][:, None] + slot_places, 0, num_assignments - 1)
    assignment_ids = jnp.where(is_filled, order[0][indices], num_assignments)
    slots = Slots(assignment_ids.reshape(1, -1), slot_ids.astype(jnp.int32))
    return Blocks(slots, block_experts, ends[-1].astype(jnp.int32))


def _take(rows: Array, indices: Array) -> Array:
    """Gathers rows: [G, N, D], indices [G, M] -> [G, M, D]; zeros where an index is N."""
    take = jax.vmap(lambda rows, indices: jnp.take(rows, indices, 0, mode="fill", fill_value=0))
    return take(rows, indices)


@jax.custom_vjp
def dispatch(x: Array, slots: Slots) -> Array:
    """Copies tokens [G, T, D] to their slots [G, S, D]; empty slots hold zeros."""
    return _take(x, slots.assignment_ids // slots.slot_ids.shape[-1])


def _dispatch_fwd(x: Array, slots: Slots) -> tuple[Array, Slots]:
    return dispatch(x, slots), slots


def _dispatch_bwd(slots: Slots, grad: Array) -> tuple[Array, None]:
    # The gradient of a token is the sum over its K slots, by K gathers. JAX would derive a
    # scatter-add instead, the transpose of a gather.
    choices = range(slots.slot_ids.shape[-1])
    by_choice = [_take(grad, slots.slot_ids[..., k]) for k in choices]
    return functools.reduce(jnp.add, by_choice), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(y: Array, weights: Array, slots: Slots) -> Array:
    """Sums the outputs of each token's experts, `Σ_k w_k y_k`.

    Args:
      y: [G, S, D], outputs by slot.
      weights: [G, T, K].
      slots: the slots of the assignments; an assignment without a slot contributes zero.

    Returns:
      [G, T, D] in y's dtype; the products are summed in float32.
    """
    total = jnp.zeros((), jnp.float32)
    for k in range(weights.shape[-1]):
        total += weights[..., k, None] * _take(y, slots.slot_ids[..., k]).astype(jnp.float32)
    return total.astype(y.dtype)


_Residuals = tuple[Array, Array, Slots]


def _combine_fwd(y: Array, weights: Array, slots: Slots) -> tuple[Array, _Residuals]:
    return combine(y, weights, slots), (y, weights, slots)


def _combine_bwd(residuals: _Residuals, grad: Array) -> tuple[Array, Array, None]:
    y, weights, slots = residuals
    groups, tokens, choices = weights.shape
    flat = weights.reshape(groups, tokens * choices, 1)
    slot_weights = _take(flat, slots.assignment_ids)  # [G, S, 1]
    grad_y = slot_weights * _take(grad, slots.assignment_ids // choices).astype(jnp.float32)
    grad = grad.astype(jnp.float32)
    grad_weights = [
        jnp.sum(grad * _take(y, slots.slot_ids[..., k]).astype(jnp.float32), axis=-1)
        for k in range(choices)
    ]
    return grad_y.astype(y.dtype), jnp.stack(grad_weights, axis=-1), None


combine.defvjp(_combine_fwd, _combine_bwd)


class ChosenTokens(NamedTuple):
    """The tokens that experts chose.

    Attributes:
      tokens: int32 [G, E, C]; T in an empty slot.
      weights: float32 [G, E, C], the weight of the expert's output for each token: the router's
        probability, or the weight that `chosen_weights` computes from it; 0 in an empty slot.
    """

    tokens: Array
    weights: Array


def choose_tokens(
    probs: Array, is_token: Array, capacity: int, capacities: Array | None = None
) -> ChosenTokens:
    """Returns, for each expert, the C tokens of each group that have its largest probabilities.

    Of tokens with equal probabilities, the first is chosen. If a group has fewer tokens than C, all
    of them are chosen.

    Args:
      probs: [G, T, E].
      is_token: bool [G, T]; False for tokens that no expert may choose.
      capacity: C.
      capacities: int32 [G], the number of tokens to choose in each group if it is below C; None: C.
    """
    by_expert = jnp.swapaxes(probs, 1, 2)  # [G, E, T]
    # Tokens that may not be chosen have a key below every probability.
    keys = jnp.where(is_token[:, None], jax.lax.stop_gradient(by_expert), -1.0)
    _, tokens = jax.lax.top_k(keys, capacity)
    weights = jnp.take_along_axis(by_expert, tokens, axis=-1)
    limit = jnp.sum(is_token, axis=-1)
    if capacities is not None:
        limit = jnp.minimum(limit, capacities)
    is_filled = jnp.arange(capacity) < limit[:, None, None]
    return ChosenTokens(
        jnp.where(is_filled, tokens, probs.shape[1]), jnp.where(is_filled, weights, 0.0)
    )


def chosen_weights(chosen: ChosenTokens, num_tokens: int, combine: str) -> ChosenTokens:
    """Replaces the probabilities of chosen tokens by weights, as `combine_weights` does.

    With 'normalized' and 'straight', a token's probabilities are divided by their sum over the
    experts that chose the token.
    """
    if combine == "probability":
        return chosen
    tokens = chosen.tokens.reshape(len(chosen.tokens), -1)
    add = jax.vmap(
        lambda tokens, weights: jnp.zeros(num_tokens).at[tokens].add(weights, mode="drop")
    )
    totals = add(tokens, chosen.weights.reshape(tokens.shape))  # [G, T]
    if combine == "straight":
        totals = jax.lax.stop_gradient(totals)
    take = jax.vmap(lambda totals, tokens: jnp.take(totals, tokens, mode="fill", fill_value=1))
    return chosen._replace(weights=chosen.weights / take(totals, chosen.tokens))


def dispatch_chosen(x: Array, chosen: ChosenTokens) -> Array:
    """Copies tokens [G, T, D] to the experts that chose them [G, E·C, D]."""
    return _take(x, chosen.tokens.reshape(x.shape[0], -1))


def combine_chosen(y: Array, chosen: ChosenTokens, num_tokens: int) -> Array:
    """Sums the weighted outputs [G, E·C, D] for each token; returns [G, T, D] in y's dtype."""
    groups = y.shape[0]
    weighted = chosen.weights.reshape(groups, -1, 1) * y.astype(jnp.float32)
    # Here a token may have from 0 to E experts, so the outputs are scattered and added. In
    # `combine`, a token has K experts, whose outputs can be gathered.
    add = jax.vmap(
        lambda rows, tokens: (
            jnp.zeros((num_tokens, rows.shape[-1])).at[tokens].add(rows, mode="drop")
        )
    )
    return add(weighted, chosen.tokens.reshape(groups, -1)).astype(y.dtype)
