"""Parity with Hugging Face's T5 v1.1 and PEFT; goldens/make_goldens.py writes the goldens."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import LORA_SITES, VECTOR_SITES, largest_difference

from pemoe_jax.core import decoding, layers, network, params
from pemoe_jax.core.adapters import Adapters, LoRAExperts, VectorExperts

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
TOLERANCE = 2e-4  # of the largest logit or gradient, float32

ADAPTERS = {
    "base": Adapters(),
    "ia3": Adapters(**dict.fromkeys(VECTOR_SITES, VectorExperts)),
    "lora": Adapters(
        **dict.fromkeys(LORA_SITES, functools.partial(LoRAExperts, rank=4, alpha=16.0))
    ),
}


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def group(name: str, prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays(name).items() if k.startswith(prefix)}


@functools.cache
def config() -> network.T5Config:
    return network.T5Config(
        **{k: int(v) for k, v in group("hf_t5", "config/").items()}, dropout_rate=0.0
    )


class Case:
    """A model with a golden's weights; `trainable` are the arrays with golden gradients."""

    def __init__(self, name: str):
        self.golden = group("hf_t5", "short/") if name == "base" else group("hf_peft", f"{name}/")
        self.model = network.Transformer(config(), ADAPTERS[name])
        base = group("hf_t5", "params/")
        adapter = {
            k.removeprefix("params/"): v for k, v in self.golden.items() if k.startswith("params/")
        }
        self.grads = {
            k.removeprefix("grads/"): v for k, v in self.golden.items() if k.startswith("grads/")
        }
        shapes = network.param_shapes(self.model)
        flat = {k: jnp.asarray(v) for k, v in (base | adapter).items()}
        # All names and shapes: the tree of T5X is that of Hugging Face, renamed.
        assert {k: v.shape for k, v in params.flatten(shapes).items()} == {
            k: v.shape for k, v in flat.items()
        }
        self.params = params.unflatten(flat)
        self.trainable = {k: flat[k] for k in self.grads}

    @functools.cached_property
    def batch(self) -> dict[str, np.ndarray]:
        golden = group("hf_t5", "short/")
        return {k: v for k, v in golden.items() if k.endswith("_tokens")}

    @functools.cached_property
    def result(self):
        """((mean loss, logits), gradients by path), compiled once."""

        def loss_fn(trainable, batch):
            flat = params.flatten(self.params) | trainable
            logits = self.model.apply(
                {"params": params.unflatten(flat)}, **batch, enable_dropout=False
            )
            target = batch["decoder_target_tokens"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return jnp.sum(losses * (target > 0)) / jnp.sum(target > 0), logits

        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(self.trainable, self.batch)


@pytest.fixture(scope="module", params=list(ADAPTERS))
def case(request) -> Case:
    return Case(request.param)


def test_logits(case):
    (_, logits), _ = case.result
    real = case.batch["decoder_target_tokens"] > 0
    assert logits.dtype == jnp.float32
    assert largest_difference(logits[real], case.golden["logits"][real]) < TOLERANCE


def test_loss(case):
    (loss, _), _ = case.result
    np.testing.assert_allclose(loss, case.golden["loss"], rtol=2e-5)


def test_gradients(case):
    _, grads = case.result
    assert sorted(grads) == sorted(case.grads)
    largest = max(np.abs(g).max() for g in case.grads.values())
    for path, expected in case.grads.items():
        error = np.abs(np.asarray(grads[path]) - expected).max()
        assert error < TOLERANCE * largest, f"{path}: {error / largest:.1e}"
        # Relative to its own size too, so that small arrays have the golden's direction.
        assert largest_difference(grads[path], expected) < 10 * TOLERANCE, path


def test_greedy_tokens(case):
    expected = case.golden["greedy"]
    tokens = decoding.greedy_decode(
        case.model, case.params, case.batch["encoder_input_tokens"], expected.shape[1]
    )
    np.testing.assert_array_equal(tokens, expected)


def test_adapters_matter():
    """The goldens with adapters differ from the base's, so that comparisons mean something."""
    base = group("hf_t5", "short/")
    for name in ("ia3", "lora"):
        assert largest_difference(group("hf_peft", f"{name}/")["logits"], base["logits"]) > 0.1


def test_long_rows_against_float64():
    """Inputs of 178 and targets of 158 tokens: distances beyond 128 share the last bucket."""
    golden = group("hf_t5", "long/")
    batch = {k: v for k, v in golden.items() if k.endswith("_tokens")}
    model = network.Transformer(config())
    weights = params.unflatten(group("hf_t5", "params/"))
    logits = jax.jit(lambda p, b: model.apply({"params": p}, **b, enable_dropout=False))(
        weights, batch
    )
    real = batch["decoder_target_tokens"] > 0
    assert real.shape[1] > 128
    assert largest_difference(logits[real], golden["logits"][real]) < TOLERANCE


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_position_buckets(stack):
    """All distances from -200 to 200, which include all edges of the logarithmic buckets."""
    buckets = layers.relative_position_bucket(
        np.arange(-200, 201), bidirectional=stack == "encoder"
    )
    np.testing.assert_array_equal(buckets, arrays("hf_t5")[f"buckets/{stack}"])
