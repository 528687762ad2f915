"""Loss, normalization, accumulation, steps and their random keys, with a table as the model.

Steps of the network itself, and scores against a full forward pass, are in test_methods.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pemoe_jax.core import cross_entropy, partitioning, steps
from pemoe_jax.core.errors import InputError

VOCAB = 7


class Table:
    """A model whose logits are a row of `table` [V, V] for each decoder input, plus dropout noise.

    Its hidden states are the logits; its logits matrix is the identity.
    """

    def __init__(self, noisy: bool = False):
        self.noisy = noisy

    def apply(
        self,
        variables,
        encoder,
        decoder_inputs,
        targets,
        *,
        enable_dropout,
        rngs,
        return_hidden=False,
        mutable=(),
        **packing,
    ):
        logits = variables["params"]["table"][decoder_inputs] + variables["params"]["shift"]
        if enable_dropout and self.noisy:
            logits += jax.random.normal(rngs["dropout"], logits.shape)
        return (logits, {}) if mutable else logits


def parameters() -> tuple[dict, dict]:
    """(trainable, frozen)."""
    table = np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32) * 2
    identity = {"logits_dense": {"kernel": jnp.eye(VOCAB)}}
    return {"table": jnp.asarray(table)}, {
        "shift": jnp.linspace(-1.0, 1.0, VOCAB),
        "decoder": identity,
    }


def batch() -> dict[str, np.ndarray]:
    """Four rows of 5, 2, 3 and 1 target tokens."""
    target = np.array(
        [[3, 4, 2, 6, 1], [5, 1, 0, 0, 0], [2, 3, 1, 0, 0], [1, 0, 0, 0, 0]], np.int32
    )
    return {
        "encoder_input_tokens": np.ones((4, 3), np.int32),
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": (target > 0).astype(np.int32),
    }


def grads_and_metrics(loss, data, rng=None, microbatches=1):
    """Runs `steps.grads_and_metrics` of the table, jitted, which is faster than eager."""
    run = functools.partial(
        steps.grads_and_metrics, Table(rng is not None), loss, microbatches=microbatches
    )
    return jax.jit(run)(*parameters(), data, rng)


# --- the loss of a token ---


def token_losses(logits, targets, smoothing=0.0, z_loss=0.0):
    """Returns (sum, (cross-entropy, z-loss) of each token) of logits [B, L, V] and targets [B, L].

    The identity as the logits matrix turns hidden states into logits.
    """
    kernel, weights = jnp.eye(logits.shape[-1]), jnp.ones(targets.shape)
    total, tokens = cross_entropy.chunked_cross_entropy(
        logits, kernel, targets, weights, smoothing, z_loss
    )
    return total, (tokens["nll"], tokens["z"])


def token_losses_numpy(logits, targets, smoothing, z_loss):
    """The definition, in float64: KL(smoothed target ‖ softmax) and z_loss * (log Z)²."""
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    vocab = logits.shape[-1]
    soft = np.full(logits.shape, smoothing / (vocab - 1))
    np.put_along_axis(soft, np.asarray(targets)[..., None], 1 - smoothing, -1)
    log_soft = np.log(soft, out=np.zeros_like(soft), where=soft > 0)
    return (soft * (log_soft - logits + log_z[..., None])).sum(-1), z_loss * log_z**2


def test_token_losses_by_hand():
    """Logits (0, ln 3): Z = 4. Target 1: -ln(3/4) = 0.287682; target 0: -ln(1/4) = 1.386294.

    The z-loss at 0.1 is 0.1 * (ln 4)² = 0.192181 for both.
    """
    logits = jnp.array([[[0.0, np.log(3)], [0.0, np.log(3)]]])
    _, (losses, z) = token_losses(logits, jnp.array([[1, 0]]), z_loss=0.1)
    np.testing.assert_allclose(losses, [[0.287682, 1.386294]], rtol=1e-5)
    np.testing.assert_allclose(z, [[0.192181, 0.192181]], rtol=1e-5)


def test_label_smoothing_by_hand():
    """Smoothing 0.2 over three tokens: the target has 0.8, the others 0.1 each.

    Uniform logits: cross-entropy ln 3 = 1.098612; minus the target's entropy
    -(0.8 ln 0.8 + 2 * 0.1 ln 0.1) = 0.178515 + 0.460517 = 0.639032, leaves 0.459580.
    Logits ln(0.1, 0.8, 0.1), the smoothed target itself, cost nothing.
    """
    logits = jnp.array([[[0.0, 0, 0], list(np.log([0.1, 0.8, 0.1]))]])
    _, (losses, _) = token_losses(logits, jnp.array([[1, 1]]), smoothing=0.2)
    np.testing.assert_allclose(losses, [[0.459580, 0.0]], atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_token_losses_and_gradients(smoothing, z_loss):
    """Values equal the definition in numpy; gradients equal its finite differences in float64."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, VOCAB)) * 4
    targets = rng.integers(0, VOCAB, (2, 3))

    grad, (nll, z) = jax.grad(token_losses, has_aux=True)(
        jnp.asarray(logits, jnp.float32), jnp.asarray(targets), smoothing, z_loss
    )
    expected_nll, expected_z = token_losses_numpy(logits, targets, smoothing, z_loss)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z, expected_z, rtol=1e-5)
    epsilon, differences = 1e-5, np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        for sign in (1, -1):
            moved = logits.copy()
            moved[index] += sign * epsilon
            total = np.sum(token_losses_numpy(moved, targets, smoothing, z_loss))
            differences[index] += sign * total / (2 * epsilon)
    np.testing.assert_allclose(grad, differences, atol=2e-6)


def test_large_logits_do_not_overflow():
    _, (losses, z) = token_losses(jnp.array([[[1e4, 0.0]]]), jnp.array([[1]]), z_loss=1e-4)
    np.testing.assert_allclose(losses, [[1e4]])
    np.testing.assert_allclose(z, [[1e4]], rtol=1e-5)  # 1e-4 * (1e4)²


# --- normalization ---


# Rows of 5, 2, 3, 1 tokens in an array of 4 * 5 = 20.
NORMALIZERS = [
    (None, 1, False),
    (8, 8, False),
    ("NUM_REAL_TARGET_TOKENS", 5 + 2 + 3 + 1, False),
    ("NUM_TOTAL_TARGET_TOKENS", 20, False),
    ("AVERAGE_PER_SEQUENCE", 4, True),
]


@pytest.mark.parametrize("factor, divisor, by_row", NORMALIZERS)
def test_normalization_by_hand(factor, divisor, by_row):
    """T5X's settings: a sum over tokens and its divisor, or the mean over rows of their means."""
    trainable, frozen = parameters()
    data = batch()
    weights = (data["decoder_target_tokens"] > 0) / 1.0
    if by_row:
        weights = weights / np.array([[5], [2], [3], [1]])
    logits = np.asarray(trainable["table"])[data["decoder_input_tokens"]] + frozen["shift"]
    nll, z = token_losses_numpy(logits, data["decoder_target_tokens"], 0.1, 0.01)
    expected = ((nll + z) * weights).sum() / divisor
    loss = steps.Loss(z_loss=0.01, label_smoothing=0.1, loss_normalizing_factor=factor)
    _, metrics = grads_and_metrics(loss, data)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    # the other metrics are per token, whatever the loss is divided by
    real = data["decoder_target_tokens"] > 0
    assert float(metrics["cross_ent_loss"]) == pytest.approx(nll[real].mean(), rel=1e-5)
    assert float(metrics["z_loss"]) == pytest.approx(z[real].mean(), rel=1e-5)
    hits = logits.argmax(-1) == data["decoder_target_tokens"]
    assert float(metrics["accuracy"]) == pytest.approx(hits[real].mean())
    assert float(metrics["tokens"]) == 11


def test_average_per_sequence_tells_packed_sequences_apart():
    """Segments of 2 and 3 tokens and some padding: weights 1/2, 1/2, 1/3, 1/3, 1/3, 0; sum 2."""
    data = {
        "decoder_target_tokens": np.array([[4, 1, 5, 2, 1, 0]]),
        "decoder_loss_weights": np.array([[1, 1, 1, 1, 1, 0]]),
        "decoder_segment_ids": np.array([[1, 1, 2, 2, 2, 0]]),
    }
    weights, normalizer = steps.weights_and_normalizer(data, "AVERAGE_PER_SEQUENCE")
    np.testing.assert_allclose(weights, [[1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-6)
    assert float(normalizer) == pytest.approx(2)


def test_default_weights_are_the_targets():
    data = {"decoder_target_tokens": np.array([[4, 1, 0], [1, 0, 0]])}
    weights, normalizer = steps.weights_and_normalizer(data, "NUM_REAL_TARGET_TOKENS")
    np.testing.assert_array_equal(weights, [[1, 1, 0], [1, 0, 0]])
    assert float(normalizer) == 3


def test_loss_weights_of_zero_exclude_tokens():
    """Only weighted tokens count; the prefix of T5X's prefix LM has weight 0."""
    data = batch()
    data["decoder_loss_weights"] = data["decoder_loss_weights"] * np.array([0, 1, 1, 1])[:, None]
    rest = {k: v[1:] for k, v in batch().items()}
    a = grads_and_metrics(steps.Loss(), data)
    b = grads_and_metrics(steps.Loss(), rest)
    assert float(a[1]["tokens"]) == 6
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_a_batch_of_padding_does_not_divide_by_zero():
    data = {k: np.zeros_like(v) for k, v in batch().items()}
    for factor, _, _ in NORMALIZERS:
        loss = steps.Loss(loss_normalizing_factor=factor)
        grads, metrics = grads_and_metrics(loss, data)
        for leaf in jax.tree.leaves((grads, metrics)):
            np.testing.assert_array_equal(leaf, 0)


def test_unknown_normalizer():
    with pytest.raises(InputError, match="LOSS_NORMALIZING_FACTOR must be .* got 'TOKENS'"):
        steps.Loss(loss_normalizing_factor="TOKENS")


# --- accumulation ---


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("factor", [row[0] for row in NORMALIZERS])
def test_accumulation_equals_the_whole_batch(factor, microbatches):
    loss = steps.Loss(0.01, 0.1, factor)
    whole = grads_and_metrics(loss, batch())
    pieces = grads_and_metrics(loss, batch(), microbatches=microbatches)
    assert jax.tree.structure(whole) == jax.tree.structure(pieces)
    for a, b in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_microbatches_must_divide_the_batch():
    with pytest.raises(InputError, match="MICROBATCHES must divide the batch of 4 rows, got 3"):
        grads_and_metrics(steps.Loss(), batch(), microbatches=3)


# --- steps ---


def test_train_step_by_hand():
    """SGD at 0.1 moves the table by -0.1 times the gradient, whose norm is reported."""
    trainable, frozen = parameters()
    optimizer = optax.sgd(0.1)
    grads, _ = grads_and_metrics(steps.Loss(), batch())
    step = steps.make_train_step(Table(), optimizer, steps.Loss())
    state = steps.TrainState.create({"table": jnp.array(trainable["table"])}, optimizer)
    assert int(state.step) == 0
    state, metrics = step(state, frozen, batch(), jax.random.PRNGKey(0))
    np.testing.assert_allclose(
        state.params["table"], trainable["table"] - 0.1 * grads["table"], rtol=1e-6, atol=1e-6
    )
    assert int(state.step) == 1
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(grads["table"]), rel=1e-5)


@pytest.mark.parametrize("damaged", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(damaged):
    """Parameters and moments stay as they were; the step is counted."""
    optimizer = optax.adam(0.1)
    trainable, frozen = parameters()
    state = steps.TrainState.create(trainable, optimizer)
    step = steps.make_train_step(
        Table(), optimizer, steps.Loss(), skip_nonfinite=True, donate=False
    )
    rng = jax.random.key(0)
    taken, _ = step(state, frozen, batch(), rng)
    bad = batch()
    bad["decoder_loss_weights"] = bad["decoder_loss_weights"].astype(np.float32)
    if damaged == "loss":
        bad["decoder_loss_weights"][0, 0] = np.nan
    else:  # the norm of the gradient overflows, the loss does not
        bad["decoder_loss_weights"] *= 3e30
        step = steps.make_train_step(
            Table(),
            optimizer,
            steps.Loss(loss_normalizing_factor=None),
            skip_nonfinite=True,
            donate=False,
        )
    skipped, metrics = step(taken, frozen, bad, rng)
    assert np.isfinite(metrics["loss"]) == (damaged == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert int(skipped.step) == 2
    kept = (taken.params, taken.opt_state), (skipped.params, skipped.opt_state)
    jax.tree.map(np.testing.assert_array_equal, *kept)
    resumed, _ = step(skipped, frozen, batch(), rng)
    assert not np.array_equal(resumed.params["table"], skipped.params["table"])


def test_dropout_keys():
    """Noise differs between steps and runs; a step that is repeated has the same noise."""
    trainable, frozen = parameters()
    optimizer = optax.sgd(0.0)  # nothing moves: only the noise differs
    step = steps.make_train_step(Table(noisy=True), optimizer, steps.Loss())

    def loss(number, seed):
        state = steps.TrainState.create({"table": jnp.array(trainable["table"])}, optimizer)
        state = state.replace(step=jnp.array(number, jnp.int32))
        return float(step(state, frozen, batch(), jax.random.PRNGKey(seed))[1]["loss"])

    losses = [loss(0, 0), loss(1, 0), loss(2, 0), loss(0, 1)]
    assert len(set(losses)) == 4
    assert loss(1, 0) == losses[1]


def test_microbatches_draw_different_dropout():
    """Four equal rows in four microbatches: each folds its index into the key."""
    data = {k: np.repeat(v[:1], 4, axis=0) for k, v in batch().items()}
    row = {k: v[:1] for k, v in data.items()}
    key = jax.random.PRNGKey(0)
    _, metrics = grads_and_metrics(steps.Loss(), data, key, microbatches=4)
    run = jax.jit(functools.partial(steps.grads_and_metrics, Table(noisy=True), steps.Loss()))
    losses = [
        float(run(*parameters(), row, jax.random.fold_in(key, i))[1]["loss"]) for i in range(4)
    ]
    assert len(set(losses)) == 4
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_eval_step_sums_without_dropout():
    """Sums, not means, so that batches add up; they are those of training without dropout."""
    trainable, frozen = parameters()
    loss = steps.Loss(z_loss=0.01)
    sums = steps.make_eval_step(Table(noisy=True), loss)(trainable, frozen, batch())
    _, metrics = grads_and_metrics(loss, batch())
    assert float(sums["tokens"]) == 11
    assert float(sums["nll"]) / 11 == pytest.approx(float(metrics["cross_ent_loss"]), rel=1e-5)
    assert float(sums["correct"]) / 11 == pytest.approx(float(metrics["accuracy"]), rel=1e-5)


# --- two devices ---


@pytest.mark.parametrize("microbatches", [1, 2])
def test_two_devices_equal_one(microbatches):
    """Rows split over two devices, parameters replicated: the step equals that on one device."""
    mesh = partitioning.make_mesh()
    assert mesh.shape["data"] == 2
    optimizer = optax.sgd(0.1)
    loss = steps.Loss(loss_normalizing_factor="AVERAGE_PER_SEQUENCE")

    def run(place_state, place_batch):
        trainable, frozen = parameters()
        step = steps.make_train_step(Table(), optimizer, loss, microbatches)
        state = place_state(steps.TrainState.create(trainable, optimizer))
        return step(state, place_state(frozen), place_batch(batch()), jax.random.PRNGKey(0))

    expected = run(lambda tree: tree, lambda data: data)
    actual = run(
        lambda tree: partitioning.replicate(tree, mesh),
        lambda data: partitioning.shard_batch(data, mesh),
    )
    assert len(actual[0].params["table"].sharding.device_set) == 2
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "size, microbatches, message",
    [
        (3, 1, "BATCH_SIZE must be a positive multiple of 2 .data-parallel size 2., got 3"),
        (6, 2, "BATCH_SIZE must be a .* of 4 .data-parallel size 2 × 2 microbatches., got 6"),
        (0, 1, "BATCH_SIZE must be a positive multiple of 2 .*, got 0"),
    ],
)
def test_batch_sizes_that_do_not_divide(size, microbatches, message):
    mesh = partitioning.make_mesh()
    partitioning.check_batch_size(4, mesh, 2)
    with pytest.raises(InputError, match=message):
        partitioning.check_batch_size(size, mesh, microbatches)
    sharded = partitioning.make_mesh(model_parallelism=2)  # devices do not count, batch shards do
    with pytest.raises(InputError, match="positive multiple of 1 .data-parallel size 1., got 0"):
        partitioning.check_batch_size(0, sharded)
