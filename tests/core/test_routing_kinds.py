"""Kinds of routing: top-k, losses, statistics, gradients, and what routers read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pemoe_jax.core import routing
from pemoe_jax.core.adapters import LoRAExperts, VectorExperts
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router, TokenInfo

# Logits are x @ I = x, so with logarithms in x the softmax is a ratio of whole numbers.
RATIOS = np.array([[[4, 1, 3, 2], [1, 2, 3, 4]]])  # [1, 2, 4]: probabilities are tenths of these
X = np.log(RATIOS)
IDENTITY = {"params": {"kernel": np.eye(4, dtype=np.float32)}}


def route(x=X, tokens=None, **settings):
    router = Router(num_experts=4, **settings)
    probs, statistics = router.apply(IDENTITY, jnp.asarray(x), tokens)
    return np.asarray(probs), dict(zip(routing.STATISTICS, np.asarray(statistics), strict=True))


# --- top-k ---


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[4, 1, 3, 2], [1, 2, 3, 4]]),
        ({"top_k": 1}, [[4, 0, 0, 0], [0, 0, 0, 4]]),
        ({"top_k": 2}, [[4, 0, 3, 0], [0, 0, 3, 4]]),
        ({"top_k": 3}, [[4, 0, 3, 2], [0, 2, 3, 4]]),
        # 4/7, 3/7
        ({"top_k": 2, "renormalize": True}, [[40 / 7, 0, 30 / 7, 0], [0, 0, 30 / 7, 40 / 7]]),
        ({"top_k": 2, "straight_through": True}, [[4, 0, 3, 0], [0, 0, 3, 4]]),
        # temperature 1/2 squares: 16, 1, 9, 4 of 30
        ({"temperature": 0.5}, [[16 / 3, 1 / 3, 3, 4 / 3], [1 / 3, 4 / 3, 3, 16 / 3]]),
    ],
)
def test_probabilities(settings, expected):
    """Top-k is not renormalized by default: top-2 of (.4, .1, .3, .2) sums to .7."""
    probs, _ = route(**settings)
    np.testing.assert_allclose(probs, np.array([expected]) / 10, rtol=1e-5, atol=1e-7)


def test_top_k_of_all_experts_is_soft_routing():
    np.testing.assert_array_equal(route(top_k=4)[0], route()[0])


def test_ties_keep_the_first():
    """Top-k keeps exactly k experts, even if some are tied."""
    probs, _ = route(x=np.zeros((1, 1, 4)), top_k=2)
    np.testing.assert_allclose(probs, [[[0.25, 0.25, 0, 0]]])


# --- statistics and losses ---


def test_statistics_by_hand():
    """Tokens (.4, .1, .3, .2) and (.1, .2, .3, .4).

    Mean P = (.25, .15, .3, .3); largest: experts 0 and 3, f = (1/2, 0, 0, 1/2).
    Balance: 4 · (.25/2 + .3/2) = 1.1. Load: the most used has .3, an even share is .25: 1.2.
    Z = 10 for both: z-loss (ln 10)² = 5.30190.
    Entropy of either: -(.4 ln .4 + .3 ln .3 + .2 ln .2 + .1 ln .1) = 1.279854.
    """
    _, statistics = route(balance_loss=0.01, z_loss=0.001)
    expected = {
        "entropy": 1.279854,
        "load": 1.2,
        "dead": 0.0,
        "balance_loss": 1.1,
        "z_loss": 5.30190,
        "aux_loss": 0.01 * 1.1 + 0.001 * 5.30190,
    }
    assert statistics == pytest.approx(expected, rel=1e-5)


def test_load_of_top_1():
    """Top-1 of the two tokens: experts 0 and 3 share the mixture, 0.4 each; two are dead.

    Load: half of the mixture over a quarter: 2. The balance loss stays that of the softmax.
    """
    _, statistics = route(top_k=1)
    assert statistics["load"] == pytest.approx(2.0)
    assert statistics["dead"] == pytest.approx(0.5)
    assert statistics["balance_loss"] == pytest.approx(1.1, rel=1e-5)
    assert statistics["entropy"] == pytest.approx(1.279854, rel=1e-5)


def test_balance_loss_of_even_and_skewed_routing():
    """Even: all probabilities equal, or each expert certain for one token of four.

    Skewed: all four tokens certain of expert 0: f_0 = P_0 = 1, so 4 · 1 = 4, the maximum.
    """
    certain = 100.0 * np.eye(4)[None]
    assert route(x=np.zeros((1, 4, 4)))[1]["balance_loss"] == pytest.approx(1.0)
    assert route(x=certain)[1]["balance_loss"] == pytest.approx(1.0)
    skewed = route(x=np.repeat(certain[:, :1], 4, axis=1))[1]
    assert skewed["balance_loss"] == pytest.approx(4.0)
    assert skewed["load"] == pytest.approx(4.0)
    assert skewed["dead"] == pytest.approx(0.75)
    assert skewed["entropy"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}], ids=["soft", "top_1"])
@pytest.mark.parametrize("heads", [(), (3,)], ids=["joined", "heads"])
def test_padding_never_counts(settings, heads):
    """Statistics of a padded batch equal those of its real tokens, with and without heads."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, *heads, 4)) * 3
    valid = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], bool)
    _, padded = route(x, TokenInfo(valid=jnp.asarray(valid)), **settings)
    _, alone = route(x[valid][None], **settings)
    assert padded == pytest.approx(alone, rel=1e-5, abs=1e-6)
    _, other = route(np.where(valid.reshape(2, 5, *[1] * (len(heads) + 1)), x, 9.0), **settings)
    assert other["entropy"] != pytest.approx(padded["entropy"], rel=1e-3)  # padding would change it


def test_a_batch_of_padding_does_not_divide_by_zero():
    _, statistics = route(X, TokenInfo(valid=jnp.zeros((1, 2), bool)))
    assert np.isfinite(list(statistics.values())).all()


def test_a_sentence_counts_once_per_token():
    """Sentences of 3 tokens and of 1: P = (3 · (.4, .1, .3, .2) + (.1, .2, .3, .4)) / 4."""
    valid = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    _, statistics = route(X[0], TokenInfo(valid=valid))
    _, expected = route(X[:, [0, 0, 0, 1]])
    assert statistics == pytest.approx(expected, rel=1e-6)


def test_summary_by_site_and_by_layer():
    paths = ["encoder/layers_0/mlp/gate_adapter", "encoder/layers_1/mlp/gate_adapter"]
    statistics = np.array([[1.0, 2, 0, 1, 4, 0.5], [3.0, 1, 0.5, 2, 6, 0.7]])
    by_site = routing.summarize_statistics(paths, statistics, "sites")
    expected = {"entropy": 2.0, "load": 2.0, "dead": 0.25, "balance_loss": 1.5, "z_loss": 5.0}
    assert by_site == pytest.approx(
        {**expected, "aux_loss": 0.6, **{f"encoder/mlp/gate/{k}": v for k, v in expected.items()}}
    )
    by_layer = routing.summarize_statistics(paths, statistics, "layers")
    assert by_layer["encoder/layers_1/mlp/gate/load"] == 1.0
    assert "encoder/mlp/gate/load" not in by_layer


# --- noise ---


def test_jitter_only_in_training_and_within_its_bounds():
    """Features are scaled by 1 ± 0.1, so logits ln 2 lie in 0.9 to 1.1 times ln 2."""
    router = Router(num_experts=4, jitter_noise=0.1)
    x = jnp.full((1, 2000, 4), np.log(2.0))
    plain, _ = Router(num_experts=4).apply(IDENTITY, x)

    def noisy(seed):
        rngs = {"dropout": jax.random.PRNGKey(seed)}
        probs, _ = router.apply(IDENTITY, x, TokenInfo(deterministic=False), rngs=rngs)
        return np.log(np.asarray(probs)[..., :1] / np.asarray(probs)) / np.log(2.0)

    np.testing.assert_array_equal(router.apply(IDENTITY, x, TokenInfo())[0], plain)
    differences = noisy(0)[..., 1:]  # of two factors: within 0.2 of 0
    assert np.abs(differences).max() <= 0.2 + 1e-5
    # U(-a, a) - U(-a, a) has variance 2 a² / 3: a deviation of 0.0816; 6,000 draws, within 5 %
    assert differences.std() == pytest.approx(0.0816, rel=0.05)
    assert (noisy(0) != noisy(1)).any()


# --- gradients ---

KINDS = {
    "soft": {},
    "top_1": {"top_k": 1},
    "top_2": {"top_k": 2},
    "renormalized": {"top_k": 2, "renormalize": True},
    "balanced": {"top_k": 2, "balance_loss": 0.5},
    "z_loss": {"z_loss": 0.3},
    "temperature": {"temperature": 0.7},
    "straight_through": {"top_k": 2, "straight_through": True},
}


def router_numpy(kernel, x, valid, top_k=None, renormalize=False, balance_loss=0.0, z_loss=0.0,
                 temperature=1.0, straight_through=False):  # fmt: skip
    """The definition in float64 -> (probabilities, aux_loss)."""
    logits = x @ kernel / temperature
    z = np.exp(logits).sum(-1, keepdims=True)
    soft = np.exp(logits) / z
    probs = soft
    if top_k is not None and not straight_through:  # that has the soft router's gradients
        least = np.sort(soft, axis=-1)[..., -top_k:].min(-1, keepdims=True)
        probs = np.where(soft >= least, soft, 0)
        if renormalize:
            probs = probs / probs.sum(-1, keepdims=True)
    experts = kernel.shape[1]
    real = soft[valid]
    share = np.eye(experts)[real.argmax(-1)].mean(0)
    balance = experts * (share * real.mean(0)).sum()
    return probs, balance_loss * balance + z_loss * (np.log(z[..., 0]) ** 2)[valid].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind):
    """Central differences of the definition in float64; a step that changes no argmax."""
    rng = np.random.default_rng(1)
    kernel, x = rng.standard_normal((5, 4)), rng.standard_normal((2, 3, 5))
    valid = np.array([[1, 1, 0], [1, 1, 1]], bool)
    cotangent = rng.standard_normal((2, 3, 4))  # of the probabilities
    settings = KINDS[kind]

    def value(kernel, x):
        probs, statistics = Router(num_experts=4, **settings).apply(
            {"params": {"kernel": kernel}}, x, TokenInfo(valid=jnp.asarray(valid))
        )
        return jnp.sum(probs * cotangent) + statistics[-1]

    def definition(kernel, x):
        probs, aux_loss = router_numpy(kernel, x, valid, **settings)
        return (probs * cotangent).sum() + aux_loss

    def numeric(f, at):
        gradient = np.zeros_like(at)
        for index in np.ndindex(at.shape):
            step = np.zeros_like(at)
            step[index] = 1e-6
            gradient[index] = (f(at + step) - f(at - step)) / 2e-6
        return gradient

    if kind != "straight_through":
        assert float(value(*map(jnp.float32, (kernel, x)))) == pytest.approx(
            definition(kernel, x), rel=1e-5
        )
    by_kernel, by_x = jax.jit(jax.grad(value, (0, 1)))(jnp.float32(kernel), jnp.float32(x))
    np.testing.assert_allclose(
        by_kernel, numeric(lambda k: definition(k, x), kernel), rtol=2e-4, atol=2e-5
    )
    np.testing.assert_allclose(
        by_x, numeric(lambda x: definition(kernel, x), x), rtol=2e-4, atol=2e-5
    )


# --- what routers read ---


def adapted(expert, reads, x, y, tokens=None):
    """(output, kernel, probabilities) of an expert module with random parameters."""
    module = expert(num_experts=3, router=functools.partial(Router, reads=reads))
    variables = module.init(jax.random.PRNGKey(0), x, y, tokens)
    noise = np.random.default_rng(2)
    weights = jax.tree.map(
        lambda a: jnp.asarray(noise.standard_normal(a.shape), jnp.float32), variables["params"]
    )
    out, sown = module.apply({"params": weights}, x, y, tokens, mutable=["intermediates"])
    return out, weights, np.asarray(sown["intermediates"]["probs"][0])


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


X4, Y4 = (
    np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    for shape in [(2, 5, 7), (2, 5, 2, 3)]
)
SENTENCE = np.random.default_rng(4).standard_normal((2, 6)).astype(np.float32)


@pytest.mark.parametrize("expert", [VectorExperts, LoRAExperts])
@pytest.mark.parametrize("reads", ["x", "y", "sentence"])
def test_router_input(expert, reads):
    """x [B, L, D]; y [B, L, H, K] for vectors, with heads joined for LoRA pairs; a sentence."""
    tokens = TokenInfo(sentence=jnp.asarray(SENTENCE))
    out, weights, probs = adapted(expert, reads, X4, Y4, tokens)
    features = {
        "x": X4,
        "y": Y4 if expert is VectorExperts else Y4.reshape(2, 5, 6),
        "sentence": np.repeat(SENTENCE[:, None], 5, axis=1),
    }[reads]
    expected = softmax(features @ np.asarray(weights["router"]["kernel"]))
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-6)
    if expert is VectorExperts:
        mixed = expected if expected.ndim == 4 else expected[:, :, None]
        scale = np.einsum(
            "blhe,hek->blhk", np.broadcast_to(mixed, (2, 5, 2, 3)), weights["vectors"]
        )
        expected_out = Y4 * scale
    else:
        low = np.einsum("bld,der->bler", X4, weights["lora_a"]) * expected[..., None]
        delta = np.einsum("bler,ero->blo", low, weights["lora_b"])
        expected_out = Y4 + 16 / 4 * delta.reshape(Y4.shape)
    np.testing.assert_allclose(out, expected_out, rtol=2e-4, atol=2e-4)


def test_default_router_input():
    """As in the paper: y for vectors, x for LoRA pairs."""
    assert adapted(VectorExperts, None, X4, Y4)[1]["router"]["kernel"].shape == (3, 3)  # K
    assert adapted(LoRAExperts, None, X4, Y4)[1]["router"]["kernel"].shape == (7, 3)  # D


def test_missing_sentence_embeddings():
    with pytest.raises(InputError, match="SENTENCE_EMBEDDINGS is not set, but a router reads"):
        adapted(VectorExperts, "sentence", X4, Y4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, r"top_k must be None or between 1 and num_experts \(4\), got 0"),
        ({"top_k": 5}, "got 5"),
        ({"reads": "z"}, r"reads must be None or one of \('x', 'y', 'sentence'\), got 'z'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"jitter_noise": 1.0}, r"jitter_noise must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        route(**settings)
