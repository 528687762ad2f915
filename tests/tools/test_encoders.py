"""Sentence encoders: mean pooling over a base model's encoder, and functions of texts."""

import functools

import jax
import numpy as np
import pytest
from test_train import CONFIG

from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.tools import encoders


def make_inputs(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 200, n).astype(np.int32) for n in lengths]


@functools.cache
def base_params() -> dict:
    return network.init_params(network.Transformer(CONFIG), 0, params_lib.is_base)


@jax.jit
def encoded(params: dict, ids: np.ndarray) -> jax.Array:
    model = network.Transformer(CONFIG)
    return model.apply({"params": params}, ids, enable_dropout=False, method=model.encode)


def mean_embedding(ids: np.ndarray) -> np.ndarray:
    """Returns the mean of the encoder's outputs for an input alone, without padding."""
    return np.asarray(encoded(base_params(), ids[None]), np.float64)[0].mean(axis=0)


@pytest.fixture(scope="module")
def encoder() -> encoders.MeanPooledEncoder:
    return encoders.MeanPooledEncoder(network.Transformer(CONFIG), None)


def test_mean_pooling_ignores_padding(encoder):
    """Batched embeddings equal numpy's mean over the tokens of each input encoded alone."""
    inputs = make_inputs([1, 3, 32, 33, 70, 3, 3, 3])
    vectors = encoder.encode([encoders.EncoderInput(ids, None) for ids in inputs], 2)
    assert vectors.shape == (8, CONFIG.emb_dim) and vectors.dtype == np.float32
    for ids, vector in zip(inputs, vectors, strict=True):
        expected = mean_embedding(ids)
        np.testing.assert_allclose(vector, expected, atol=1e-6 * np.abs(expected).max())
    assert len({vector.tobytes() for vector in vectors}) == 8


def test_mean_of_an_empty_input_is_zero(encoder):
    vectors = encoder.encode([encoders.EncoderInput(np.zeros(0, np.int32), None)], 2)
    np.testing.assert_array_equal(vectors, np.zeros((1, CONFIG.emb_dim)))


def letters(texts: list[str]) -> list[list[float]]:
    """Counts some letters of each text."""
    assert all(isinstance(text, str) for text in texts)
    return [[text.count(letter) + 0.5 for letter in "aeioscw"] for text in texts]


def test_functions_of_texts_are_encoders():
    texts = ["a", "see the grass", "snow", "ice is cool", "see"]
    inputs = [encoders.EncoderInput(np.arange(len(text)), text) for text in texts]
    for value in (letters, f"{__name__}.letters", f"{__name__}:letters"):
        encoder = encoders.resolve_encoder(value)
        np.testing.assert_array_equal(encoder.encode(inputs, 2), np.float32(letters(texts)))
        info = encoder.describe()
        assert (info["name"], info["dim"]) == (f"{__name__}.letters", 7)
        assert len(info["probe"]) == 7

    class Named:
        name, fingerprint = "mine", "v1"

        def __call__(self, texts):
            return np.ones((len(texts), 2))

    assert encoders.resolve_encoder(Named()).describe() == {
        "name": "mine",
        "dim": 2,
        "fingerprint": "v1",
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no.such.module", "must be a dotted name 'module.function'"),
        ("letters", "must be a dotted name 'module.function'"),
        (3, "or a function of texts, got 3"),
        (lambda texts: np.ones(3), r"for 1 texts, got \(3,\)"),
        (lambda texts: np.ones((2, 3)), r"for 1 texts, got \(2, 3\)"),
        (lambda texts: ["a"], "from a list of texts to an array"),
        (lambda: 3, "from a list of texts to an array"),
    ],
)
def test_invalid_encoders_raise(value, message):
    with pytest.raises(InputError, match=message):
        encoders.resolve_encoder(value).describe()
