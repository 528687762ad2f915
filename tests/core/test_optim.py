"""Optimizers against numpy and numbers by hand; schedules by hand."""

import functools
import json

import archives
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pemoe_jax.core import network, optim, params
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse


def run(optimizer, start: np.ndarray, grads: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the parameter after each step."""
    params = jnp.asarray(start, jnp.float32)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    path = []
    for grad in grads:
        updates, state = update(jnp.asarray(grad, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    return path


# --- Adafactor ---


def test_adafactor_first_step_by_hand():
    """Step 1: the decay is 1 - 1^-0.8 = 0, so v = g² and u = g / sqrt(v) = sign(g).

    rms(3, 4) = sqrt((9 + 16) / 2) = 3.5355; at rate 0.01 each entry moves by 0.035355 against g.
    """
    (after,) = run(optim.adafactor(lambda _: 0.01), np.array([3.0, 4.0]), [np.array([0.2, -7.0])])
    np.testing.assert_allclose(after, [3 - 0.035355, 4 + 0.035355], rtol=1e-6)


def test_adafactor_changes_a_parameter_at_zero():
    """LoRA's B: rms 0 counts as 1e-3, so each entry moves by 0.01 * 1e-3 = 1e-5."""
    (after,) = run(optim.adafactor(lambda _: 0.01), np.zeros(2), [np.array([0.2, -7.0])])
    np.testing.assert_allclose(after, [-1e-5, 1e-5], rtol=1e-5)


def test_adafactor_without_parameter_scale_by_hand():
    """A step is the learning rate, 0.01."""
    optimizer = optim.adafactor(lambda _: 0.01, multiply_by_parameter_scale=False)
    (after,) = run(optimizer, np.array([3.0, 4.0]), [np.array([0.2, -7.0])])
    np.testing.assert_allclose(after, [2.99, 4.01], rtol=1e-6)


def adafactor_numpy(start, grads, rate, factored, clip=1.0, decay_rate=0.8):
    """arXiv 1804.04235, algorithms 4 and 5, with no momentum, in float64.

    Factored, the second moment of entry (i, j) is R_i C_j / mean(R), R and C the decayed means of
    g² over columns and over rows. The update is clipped to a root mean square of `clip` and scaled
    by that of the parameter, at least 1e-3.
    """

    def rms(a):
        return np.sqrt(np.mean(a**2))

    params = np.array(start, np.float64)
    row, column, full = 0.0, 0.0, 0.0
    path = []
    for step, grad in enumerate(grads, start=1):
        decay = 1 - step**-decay_rate
        square = np.asarray(grad, np.float64) ** 2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1) if factored else 0.0
        column = decay * column + (1 - decay) * square.mean(0) if factored else 0.0
        full = decay * full + (1 - decay) * square
        second = np.outer(row, column) / np.mean(row) if factored else full
        update = grad / np.sqrt(second)
        update = update / max(1.0, rms(update) / clip)
        params = params - rate * max(rms(params), 1e-3) * update
        path.append(params)
    return path


@pytest.mark.parametrize("factored", [False, True], ids=["full", "factored"])
def test_adafactor_equals_the_paper(factored):
    """Five steps with gradients of very different sizes, so that clipping and decay take part."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((4, 6))
    grads = [
        rng.standard_normal((4, 6)) * np.exp(rng.standard_normal((4, 6))) * size
        for size in (1, 1, 30, 0.1, 5)
    ]
    optimizer = optim.adafactor(lambda _: 0.05, min_dim_size_to_factor=4 if factored else 5)
    expected = adafactor_numpy(start, grads, 0.05, factored)
    for ours, theirs in zip(run(optimizer, start, grads), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_adafactor_factors_from_size_128():
    """The state of a [128, 256] matrix has 128 + 256 numbers, that of [127, 256] 127 * 256."""
    optimizer = optim.adafactor(lambda _: 0.01)

    def numbers(shape):
        state = jax.eval_shape(optimizer.init, jnp.zeros(shape))
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert numbers((128, 256)) < 128 + 256 + 10
    assert numbers((127, 256)) >= 127 * 256


def test_adafactor_with_a_step_offset_by_hand():
    """As in T5X after 3 steps of a base model: step n decays by 1 - (n + 3)^-0.8.

    Step 1: decay 1 - 4^-0.8 = 0.670123, so v = 0.329877 for g = 1 and u = 1.741101, not clipped.
    Step 2: decay 1 - 5^-0.8 = 0.724054; v = 0.724054 * 0.329877 + 0.275946 * 4 = 1.342633 for
    g = 2, and u = 2 / 1.158720 = 1.726042.
    """
    settings = {"multiply_by_parameter_scale": False, "clipping_threshold": None}
    optimizer = optim.adafactor(lambda _: 0.01, step_offset=-3, **settings)
    path = run(optimizer, np.zeros(1), [np.ones(1), np.full(1, 2.0)])
    np.testing.assert_allclose(np.ravel(path), [-0.01741101, -0.01741101 - 0.01726042], rtol=1e-5)


# Names of axes and shapes, with 4 and 5 experts. Second moments are factored from size 4.
EXPERTS = {
    "a/vectors": (("heads", "expert", "kv"), (2, 4, 5)),
    "b/vectors": (("expert", "mlp"), (5, 7)),
    "c/lora_a": (("embed", "expert", "rank"), (6, 4, 4)),
    "ffn/wi": (("expert", "embed", "mlp"), (4, 6, 7)),
    "ffn/narrow": (("expert", "embed"), (4, 1)),
}
WHOLE = {
    "a/router": (("kv", "unmodeled"), (6, 5)),
    "mlp/wi": (("embed", "mlp"), (6, 7)),
    "norm": (("embed",), (6,)),
}
NAMES = {path: axes for path, (axes, _) in {**EXPERTS, **WHOLE}.items()}
LAYOUT = {path: shape for path, (_, shape) in {**EXPERTS, **WHOLE}.items()}


def expert_steps() -> list[dict[str, np.ndarray]]:
    """Returns parameters by path, and the gradients of three steps."""
    rng = np.random.default_rng(0)

    def draw() -> dict[str, np.ndarray]:
        # Experts, and columns of the router, differ a thousandfold in scale.
        arrays = {}
        for path, shape in LAYOUT.items():
            axis = next((i for i, n in enumerate(NAMES[path]) if n in ("expert", "unmodeled")), 0)
            sizes = 10.0 ** rng.uniform(-2, 1, [n if i == axis else 1 for i, n in enumerate(shape)])
            arrays[path] = np.float32(rng.standard_normal(shape) * sizes)
        return arrays

    return [draw() for _ in range(4)]


def run_tree(steps: list[dict[str, np.ndarray]], **settings) -> list[dict[str, np.ndarray]]:
    """Returns the parameters after each step of Adafactor, by path."""
    optimizer = optim.adafactor(lambda step: 0.1 / (step + 1), weight_decay_rate=0.01, **settings)
    tree = params.unflatten(steps[0])
    state, update, trees = optimizer.init(tree), jax.jit(optimizer.update), []
    for grads in steps[1:]:
        updates, state = update(params.unflatten(grads), state, tree)
        tree = optax.apply_updates(tree, updates)
        trees.append({path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()})
    return trees


def assert_trees_equal(actual: list[dict], expected: list[dict]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        for path, array in theirs.items():
            np.testing.assert_allclose(ours[path], array, rtol=2e-6, err_msg=path)


def split_experts(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns each expert of each parameter as a parameter, and the other parameters."""
    apart = {}
    for path, array in arrays.items():
        if "expert" not in NAMES[path]:
            apart[path] = array
            continue
        axis = NAMES[path].index("expert")
        apart |= {f"{path}/{e}": np.take(array, e, axis) for e in range(array.shape[axis])}
    return apart


def test_adafactor_updates_each_expert_as_a_parameter():
    """It equals an optimizer of parameters without experts; a router is one whole matrix."""
    steps = expert_steps()
    actual = run_tree(steps, min_dim_size_to_factor=4, param_axes=NAMES)
    routers = [{"a/router": arrays.pop("a/router")} for arrays in steps]
    expected = run_tree([*map(split_experts, steps)], min_dim_size_to_factor=4)
    assert_trees_equal([*map(split_experts, actual)], expected)
    assert_trees_equal(actual, run_tree(routers, min_dim_size_to_factor=99))  # not factored


def test_adafactor_with_root_mean_squares_over_experts():
    """As in the paper's code: of all experts of a parameter, with second moments by entry."""
    steps = expert_steps()
    settings = {"min_dim_size_to_factor": 4, "per_expert": False, "param_axes": NAMES}
    actual = run_tree(steps, **settings)
    paths = ("a/vectors", "b/vectors", "a/router", "norm")
    whole = [{path: arrays[path] for path in paths} for arrays in steps]
    assert_trees_equal(actual, run_tree(whole, min_dim_size_to_factor=99))


def test_adafactor_states_of_experts():
    """From 128 experts on the state of MoV's vectors is still a number for each entry.

    A whole-FFN expert [D, F] = [128, 256] has D + F numbers; no state has another layout than its
    parameter or its parameter's factored moments, so that meshes shard it as the parameter.
    """
    axes = {
        "vectors": ("heads", "expert", "kv"), "gate": ("expert", "mlp"),
        "router": ("mlp", "unmodeled"), "wi": ("expert", "embed", "mlp"),
    }  # fmt: skip
    shapes = {
        "vectors": (2, 128, 128), "gate": (128, 256), "router": (256, 128), "wi": (3, 128, 256)
    }  # fmt: skip
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    optimizer = optim.adafactor(lambda _: 0.01, param_axes=axes)
    moments = jax.eval_shape(optimizer.init, tree)[0]
    states = {
        path: [getattr(moments, name)[path].shape for name in ("v_row", "v_col", "v")]
        for path in shapes
    }
    whole = ("vectors", "gate", "router")
    assert {path: states.pop(path) for path in whole} == {
        path: [(1,), (1,), shapes[path]] for path in whole
    }
    assert states == {"wi": [(3, 128), (3, 256), (1,)]}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_whole_experts_are_updated_as_parameters_of_their_own(name):
    """E = 256 is larger than D = 192, yet moments are those of an expert's matrix [D, F].

    The update of an expert that is 100 times smaller is that much smaller with Adafactor.
    """
    config = network.T5Config(vocab_size=8, emb_dim=192, num_heads=1, mlp_dim=384)
    axes = network.param_axes(network.Transformer(config, sparse=Sparse(num_experts=256)))
    path = "encoder/layers_1/mlp/expert/wi_0/kernel"
    optimizer = getattr(optim, name)(lambda _: 0.01, param_axes=axes)
    alone = getattr(optim, name)(lambda _: 0.01)
    rng = np.random.default_rng(0)
    start, *grads = rng.standard_normal((3, 256, 192, 384), np.float32)
    start[1] *= 0.01

    @functools.partial(jax.jit, static_argnums=0)
    def last_update(optimizer, start, grads):
        tree = params.unflatten({path: start})
        state = optimizer.init(tree)
        for grad in grads:
            updates, state = optimizer.update(params.unflatten({path: grad}), state, tree)
            tree = optax.apply_updates(tree, updates)
        return params.flatten(updates)[path]

    joined = np.asarray(last_update(optimizer, start, grads))
    for e in (0, 1, 255):
        expected = last_update(alone, start[e], [grad[e] for grad in grads])
        np.testing.assert_allclose(joined[e], expected, rtol=2e-6, atol=1e-9)
    ratio = np.abs(joined[1]).mean() / np.abs(joined[0]).mean()
    assert ratio == pytest.approx(0.01 if name == "adafactor" else 1.0, rel=0.05)


def test_adafactor_needs_the_axes_of_all_parameters():
    optimizer = optim.adafactor(lambda _: 0.01, param_axes={"a": ("expert", "mlp")})
    with pytest.raises(KeyError, match="b"):
        optimizer.init({"a": jnp.ones((2, 3)), "b": jnp.ones(3)})


def test_adafactor_follows_the_schedule():
    """Step n uses rate(n - 1): rates 0, 1, 2 hundredths."""
    path = run(
        optim.adafactor(lambda step: 0.01 * step, multiply_by_parameter_scale=False),
        np.zeros(1),
        [np.ones(1)] * 3,
    )
    np.testing.assert_allclose(np.ravel(path), [0, -0.01, -0.03], rtol=1e-5)


# --- AdamW ---


def test_adamw_by_hand():
    """Step 1: m / (1 - b1) = g and v / (1 - b2) = g², so the move is rate * sign(g) = 0.1.

    Step 2, g = (1, 0) after (1, 1), second entry: m = 0.9 * 0.1 = 0.09, over 1 - 0.81: 0.473684;
    v = 0.999 * 0.001 = 0.000999, over 1 - 0.998001 = 0.001999: 0.499750, root 0.706930;
    0.473684 / 0.706930 = 0.670058, so it moves by 0.0670058; the first by 0.1 again.
    """
    path = run(
        optim.adamw(lambda _: 0.1), np.array([3.0, 4]), [np.array([1.0, 1]), np.array([1.0, 0])]
    )
    np.testing.assert_allclose(path[0], [2.9, 3.9], rtol=1e-6)
    np.testing.assert_allclose(path[1], [2.8, 3.9 - 0.0670058], rtol=1e-6)


def test_adamw_decays_weights_independently_of_the_gradient():
    """With a zero gradient only the decay is left: 4 - 0.1 * 0.5 * 4 = 3.8."""
    (after,) = run(optim.adamw(lambda _: 0.1, weight_decay=0.5), np.array([4.0]), [np.zeros(1)])
    np.testing.assert_allclose(after, [3.8], rtol=1e-6)


def test_clip_norm_by_hand():
    """With eps = 1 Adam's first step depends on the gradient's size: rate g / (|g| + 1).

    (3, 4) has norm 5, clipped to 1 it is (0.6, 0.8): 0.1 * 0.6 / 1.6 = 0.0375, 0.1 * 0.8 / 1.8.
    """
    optimizer = optim.adamw(lambda _: 0.1, eps=1.0, clip_norm=1.0)
    (after,) = run(optimizer, np.zeros(2), [np.array([3.0, 4.0])])
    np.testing.assert_allclose(after, [-0.0375, -0.0444444], rtol=1e-5)


def test_adafactor_clips_the_gradient_to_a_norm():
    """Equal gradients after clipping: each update is the rate times their sign."""
    settings = {"clipping_threshold": None, "multiply_by_parameter_scale": False}
    grads = [np.array([0.6, 0.8]), np.array([30.0, 40.0])]
    clipped = run(optim.adafactor(lambda _: 0.1, clip_norm=1.0, **settings), np.zeros(2), grads)
    np.testing.assert_allclose(clipped, [[-0.1, -0.1], [-0.2, -0.2]], rtol=1e-5)


# --- schedules ---


@pytest.mark.parametrize(
    "factors, warmup, total, expected",
    [
        # without a warm-up its factor is 1 from the first step
        ("constant * linear_warmup", 0, None, {0: 0.5, 1: 0.5}),
        # without a warm-up 1 / sqrt(max(step, 1))
        ("constant * rsqrt_decay", 0, None, {0: 0.5, 1: 0.5, 4: 0.25}),
        # from step 10 (1) to step 50 (0): at 20 three quarters are left
        ("constant * linear_to_zero", 10, 50, {5: 0.5, 10: 0.5, 20: 0.375, 50: 0, 60: 0}),
        # half a cosine: a third of the way (1 + cos 60°) / 2 = 3/4, halfway 1/2
        ("constant * cosine_to_zero", 0, 30, {0: 0.5, 10: 0.375, 15: 0.25, 30: 0, 40: 0}),
    ],
)
def test_schedule_by_hand(factors, warmup, total, expected):
    schedule = optim.create_learning_rate_scheduler(factors, 0.5, warmup, total)
    rates = {step: float(schedule(jnp.array(step))) for step in expected}
    # As in T5X, a rate is at least 1e-8.
    assert rates == pytest.approx({k: max(v, 1e-8) for k, v in expected.items()}, rel=1e-6, abs=0)


with (archives.GOLDENS / "t5x_schedules.json").open() as file:
    T5X_SCHEDULES = json.load(file)


@pytest.mark.parametrize(("settings", "rates"), T5X_SCHEDULES["schedules"])
def test_schedules_equal_those_of_t5x(settings, rates):
    """Goldens of T5X (goldens/make_t5x_schedules.py): all its factors, offset and lower bound."""
    schedule = optim.create_learning_rate_scheduler(**settings)
    steps = jnp.array(T5X_SCHEDULES["steps"])
    np.testing.assert_allclose(schedule(steps), rates, rtol=1e-6)


@pytest.mark.parametrize(
    "factors, message",
    [
        (
            "constant * linear_warmpu",
            "SCHEDULE must be a product of .*linear_warmup.*, got factor 'linear_warmpu'",
        ),
        ("constant * cosine_to_zero", "'cosine_to_zero' needs total_steps, got None"),
        ("rsqrt_normalized_decay", "WARMUP_STEPS must be at least 1 .*, got 0"),
    ],
)
def test_wrong_schedule(factors, message):
    with pytest.raises(InputError, match=message):
        optim.create_learning_rate_scheduler(factors)
