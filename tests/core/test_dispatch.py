"""Assignments, places and slots against loops over tokens and experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core import dispatch

# groups, tokens, experts, choices, seed
SIZES = [(2, 12, 4, 1), (3, 9, 5, 2), (1, 1, 3, 2), (2, 4, 9, 3), (1, 40, 2, 2)]


def make_probs(groups, tokens, experts, kind):
    rng = np.random.default_rng(groups * 100 + tokens)
    logits = rng.normal(size=(groups, tokens, experts)).astype(np.float32)
    if kind == "one_expert":
        logits[..., 1] += 50
    if kind == "ties":
        logits[:, ::2] = 0
    is_token = np.ones((groups, tokens), bool)
    if kind == "padding":
        is_token = rng.random((groups, tokens)) < 0.6
    if kind == "only_padding":
        is_token[:] = False
    return np.asarray(jax.nn.softmax(logits)), is_token


KINDS = ["random", "one_expert", "ties", "padding", "only_padding"]


def loop_places(experts, needs_slot, num_experts, priority=None):
    """Gives each assignment its place: first choices first, then left to right or by priority."""
    groups, tokens, choices = experts.shape
    places = np.full(experts.shape, -1)
    for g in range(groups):
        order = range(tokens)
        if priority is not None:
            order = sorted(order, key=lambda t: -priority[g, t])
        count = [0] * num_experts
        for k in range(choices):
            for t in order:
                if needs_slot[g, t, k]:
                    places[g, t, k] = count[experts[g, t, k]]
                    count[experts[g, t, k]] += 1
    return places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("by_probability", [False, True])
def test_places_are_those_of_a_loop(size, kind, by_probability):
    groups, tokens, num_experts, choices = size
    probs, is_token = make_probs(groups, tokens, num_experts, kind)
    experts, chosen = dispatch.choose_experts(jnp.asarray(probs), choices)
    np.testing.assert_array_equal(experts, np.argsort(-probs, -1, kind="stable")[..., :choices])
    np.testing.assert_array_equal(chosen, np.take_along_axis(probs, np.asarray(experts), -1))
    needs_slot = np.broadcast_to(is_token[..., None], experts.shape)
    priority = chosen[..., 0] if by_probability else None
    order, places, counts = dispatch.assign_places(experts, needs_slot, num_experts, priority)
    expected = loop_places(
        np.asarray(experts), needs_slot, num_experts, None if priority is None else probs.max(-1)
    )
    np.testing.assert_array_equal(np.where(needs_slot, places, -1), expected)
    for g in range(groups):
        of_experts = np.asarray(experts)[g][needs_slot[g]]
        np.testing.assert_array_equal(counts[g], np.bincount(of_experts, minlength=num_experts))
        assert sorted(np.asarray(order[g])) == list(range(tokens * choices))


@functools.partial(jax.jit, static_argnums=(4, 5))
def through_experts(x, weights, cotangent, routing, capacity, num_experts):
    """Sends tokens to experts that multiply by e + 1, and back; returns y and gradients."""
    experts, needs_slot, order, places, counts = routing
    arguments = experts, order, places, counts, needs_slot
    if capacity is None:
        blocks = dispatch.slots_in_blocks(*arguments, 8)
        slots, scale = blocks.slots, jnp.repeat(blocks.experts + 1.0, 8)
    else:
        slots = dispatch.slots_with_capacity(*arguments, capacity)
        scale = jnp.repeat(jnp.arange(num_experts) + 1.0, capacity)

    def apply(x, weights):
        return dispatch.combine(dispatch.dispatch(x, slots) * scale[:, None], weights, slots)

    y, vjp = jax.vjp(apply, x, weights)
    return y, vjp(cotangent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [1, 3, None])
def test_tokens_go_to_their_experts_and_back(kind, capacity):
    groups, tokens, num_experts, choices = (1, 12, 4, 2) if capacity is None else (3, 12, 4, 2)
    probs, is_token = make_probs(groups, tokens, num_experts, kind)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(groups, tokens, 3)).astype(np.float32)
    experts, chosen = dispatch.choose_experts(jnp.asarray(probs), choices)
    needs_slot = np.broadcast_to(is_token[..., None], experts.shape)
    order, places, counts = dispatch.assign_places(experts, needs_slot, num_experts)
    routing = experts, needs_slot, order, places, counts
    kept = needs_slot & (np.asarray(places) < (capacity or tokens))

    cotangent = rng.normal(size=x.shape).astype(np.float32)
    weights, scale = np.asarray(chosen), np.asarray(experts) + 1
    expected, grad_x, grad_weights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    for g, t, k in zip(*np.nonzero(kept), strict=True):
        factor = weights[g, t, k] * scale[g, t, k]
        expected[g, t] += factor * x[g, t]
        grad_x[g, t] += factor * cotangent[g, t]
        grad_weights[g, t, k] = scale[g, t, k] * (x[g, t] @ cotangent[g, t])
    y, grads = through_experts(x, weights, cotangent, routing, capacity, num_experts)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(grads[0], grad_x, atol=5e-6)
    np.testing.assert_allclose(grads[1], grad_weights, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [1, 5, 12])
def test_experts_choose_their_most_probable_tokens(kind, capacity):
    probs, is_token = make_probs(3, 12, 4, kind)
    chosen = dispatch.choose_tokens(jnp.asarray(probs), jnp.asarray(is_token), capacity)
    x = np.random.default_rng(0).normal(size=(3, 12, 2)).astype(np.float32)
    rows = dispatch.dispatch_chosen(x, chosen).reshape(3, 4, capacity, 2)
    y = np.zeros_like(x)
    for g in range(3):
        for e in range(4):
            tokens = [t for t in np.argsort(-probs[g, :, e], kind="stable") if is_token[g, t]]
            tokens = tokens[:capacity]
            # An expert is full, unless there are fewer tokens.
            np.testing.assert_array_equal(chosen.tokens[g, e, : len(tokens)], tokens)
            np.testing.assert_array_equal(chosen.tokens[g, e, len(tokens) :], 12)
            np.testing.assert_array_equal(rows[g, e, : len(tokens)], x[g, tokens])
            y[g, tokens] += (e + 1) * probs[g, tokens, e, None] * x[g, tokens]
    scale = jnp.arange(1.0, 5.0)[:, None, None]
    combined = dispatch.combine_chosen((rows * scale).reshape(3, -1, 2), chosen, 12)
    np.testing.assert_allclose(combined, y, atol=1e-6)


def test_weights_of_chosen_experts():
    chosen = jnp.array([[[0.5, 0.3], [0.2, 0.2]]])
    np.testing.assert_array_equal(dispatch.combine_weights(chosen, "probability"), chosen)
    expected = [[[0.625, 0.375], [0.5, 0.5]]]
    for combine in ("normalized", "straight"):
        np.testing.assert_allclose(dispatch.combine_weights(chosen, combine), expected, rtol=1e-6)
    top_1 = jnp.array([[[0.25]]])
    grads = {
        combine: jax.grad(lambda p, c=combine: dispatch.combine_weights(p, c).sum())(top_1).item()
        for combine in dispatch.COMBINE
    }
    # Only `straight` and `probability` let a router with one choice learn.
    assert grads == {"probability": 1.0, "normalized": 0.0, "straight": 4.0}


def test_the_second_expert_is_kept_by_its_weight():
    p = jnp.broadcast_to(jnp.array([0.45, 0.05]), (1, 20_000, 2))  # normalized: 0.9, 0.1
    is_kept = dispatch.keep_at_random(p, jax.random.key(0))
    assert is_kept[..., 0].all()
    np.testing.assert_allclose(is_kept[..., 1].mean(), 0.5, atol=0.01)  # 0.1 / 0.2
    p = jnp.broadcast_to(jnp.array([0.3, 0.1]), (1, 1000, 2))
    assert dispatch.keep_at_random(p, jax.random.key(0)).all()


def test_capacity_is_t5x_s():
    # Python's rounding: halves to even.
    assert dispatch.capacity(128, 8, 1.25, 4) == 20
    assert dispatch.capacity(32, 128, 1.25, 4) == 4
    assert dispatch.capacity(10, 4, 1.0) == 2
    assert dispatch.capacity(14, 4, 1.0) == 4


def test_groups_are_t5x_s():
    assert dispatch.num_groups(4096, 8192, 128) == 128  # at least one group for each expert
    assert dispatch.num_groups(65536, 8192, 8) == 8
    assert dispatch.num_groups(24, 6, 4) == 4
    assert dispatch.group_padding(3, 7, 4) == (0, 1)
    assert dispatch.group_padding(5, 3, 8) == (3, 0)
    assert dispatch.group_padding(4, 8, 8) == (0, 0)
