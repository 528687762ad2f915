"""Paths, trainable patterns, splitting and merging, strict comparison, fingerprints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import ADAPTER, PEFT_METHODS, model

from pemoe_jax.core import fingerprints, network, params
from pemoe_jax.core.errors import InputError

TREE = {
    "encoder": {
        "layers_0": {
            "key": {"kernel": np.ones((2, 3), np.float32)},
            "key_adapter": {"vectors": np.full((1, 3), 2.0, np.float32)},
        },
        "encoder_norm": {"scale": np.zeros(2, np.float32)},
    }
}
PATHS = [
    "encoder/layers_0/key/kernel",
    "encoder/layers_0/key_adapter/vectors",
    "encoder/encoder_norm/scale",
]


def changed(path: str, index: tuple[int, ...], value: float) -> dict:
    flat = {k: v.copy() for k, v in params.flatten(TREE).items()}
    flat[path][index] = value
    return params.unflatten(flat)


def test_flatten_and_back():
    flat = params.flatten(TREE)
    assert list(flat) == PATHS
    assert jax.tree.structure(params.unflatten(flat)) == jax.tree.structure(TREE)


def test_count():
    """2 * 3 + 1 * 3 + 2 = 11, of arrays or of shapes alike."""
    assert params.count(TREE) == 11
    assert params.count(jax.eval_shape(lambda: TREE)) == 11
    assert params.count({}) == 0


def test_split_and_merge():
    trainable, frozen = params.split(TREE, [ADAPTER])
    assert list(params.flatten(trainable)) == [PATHS[1]]
    assert list(params.flatten(frozen)) == [PATHS[0], PATHS[2]]
    merged = params.flatten(params.merge(trainable, frozen))
    assert {k: id(v) for k, v in merged.items()} == {
        k: id(v) for k, v in params.flatten(TREE).items()
    }


def test_everything_is_trainable():
    trainable, frozen = params.split(TREE, [".*"])
    assert params.flatten(trainable).keys() == set(PATHS) and not params.flatten(frozen)
    assert params.flatten(params.merge(trainable, frozen)).keys() == set(PATHS)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_one_pattern_serves_every_method(method):
    trainable, frozen = params.split(network.param_shapes(model(method)), [ADAPTER])
    assert all("_adapter/" in path for path in params.flatten(trainable))
    assert not any("_adapter/" in path for path in params.flatten(frozen))
    base = network.param_shapes(model("full"))
    assert params.flatten(frozen).keys() == params.flatten(base).keys()


def test_patterns_match_whole_paths_and_add_up():
    assert params.trainable_paths(PATHS, [".*/key/kernel", ".*scale"]) == {PATHS[0], PATHS[2]}
    with pytest.raises(InputError):
        params.trainable_paths(PATHS, ["key"])  # part of a path only


@pytest.mark.parametrize(
    "patterns, message",
    [
        ([".*/mov_.*"], r"TRAINABLE matched 0 of 3 parameters: \['.*mov_.*'\]"),
        # a matching pattern does not hide one that matches nothing
        ([".*scale", ".*/mov_.*"], r"TRAINABLE matched 0 of 3 parameters: \['.*mov_.*'\]"),
        ([], "TRAINABLE must hold at least one pattern"),
        (["("], "must hold regular expressions, got"),
    ],
    ids=["none", "one of two", "empty", "broken"],
)
def test_patterns_that_match_nothing(patterns, message):
    with pytest.raises(InputError, match=message) as caught:
        params.split(TREE, patterns)
    assert "\n" not in str(caught.value)


def test_merge_rejects_a_parameter_in_both():
    with pytest.raises(ValueError, match="both trainable and frozen.*key_adapter/vectors"):
        params.merge({"key_adapter": {"vectors": 1}}, {"key_adapter": {"vectors": 2}})


def test_check_matches_names_every_difference():
    """Missing, extra and misshapen arrays are named in one line; a match is returned unchanged."""
    target = jax.eval_shape(lambda: TREE)
    matched = params.check_matches(TREE, target, "base.npz")
    assert params.flatten(matched).keys() == set(PATHS)
    flat = params.flatten(TREE)
    wrong = {
        PATHS[0]: flat[PATHS[0]].T,
        PATHS[1]: flat[PATHS[1]],
        "encoder/stray": np.zeros(1),
    }
    with pytest.raises(InputError) as caught:
        params.check_matches(params.unflatten(wrong), target, "base.npz")
    message = str(caught.value)
    for part in (
        "base.npz does not fit the model's 3 parameters",
        "1 missing: encoder/encoder_norm/scale",
        "1 extra: encoder/stray",
        "1 of another shape: encoder/layers_0/key/kernel: expected (2, 3), got (3, 2)",
    ):
        assert part in message
    assert "\n" not in message


def test_dtypes_of_frozen_parameters():
    """Matrices have the activation dtype; what the network uses in float32 stays float32."""
    for path in params.flatten(network.param_shapes(model("molora"))):
        in_float32 = path.endswith("norm/scale") or "logits_dense" in path or "_adapter/" in path
        expected = jnp.float32 if in_float32 else jnp.bfloat16
        assert params.frozen_dtype(path, "bfloat16") == expected, path


def test_check_finite():
    params.check_finite(TREE, "x")
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match=f"x: {PATHS[1]} holds NaN or infinity$"):
            params.check_finite(changed(PATHS[1], (0, 0), value), "x")


def test_is_array_finite(monkeypatch):
    """In chunks; transposed, sliced, empty and bfloat16 arrays."""
    monkeypatch.setattr(params, "_FINITE_CHUNK", 7)
    array = np.arange(60, dtype=np.float32).reshape(6, 10)
    for form in (array, array.T, array[:, 2:5], array[:0], array.astype(jnp.bfloat16)):
        assert params.is_array_finite(form)
    for index in ((0, 0), (3, 3), (5, 9)):
        bad = array.copy()
        bad[index] = np.nan
        assert not params.is_array_finite(bad) and not params.is_array_finite(bad.T)
        assert not params.is_array_finite(bad.astype(jnp.bfloat16))
    bits = np.arange(1 << 16, dtype=np.uint16)  # every bfloat16
    finite = np.isfinite((bits.astype(np.uint32) << 16).view(np.float32))
    np.testing.assert_array_equal(params._is_finite(bits.view(jnp.bfloat16)), finite)


# --- fingerprints ---


def test_fingerprint():
    """Depends on values, positions, shapes and paths, but not on key order or bfloat16 rounding."""
    name = params.fingerprint(TREE)
    assert len(name) == 16 and int(name, 16) >= 0
    assert params.fingerprint(jax.tree.map(jnp.asarray, TREE)) == name
    reordered = params.unflatten(dict(reversed(params.flatten(TREE).items())))
    assert params.fingerprint(reordered) == name
    assert params.fingerprint(jax.tree.map(lambda a: a.astype(jnp.bfloat16), TREE)) == name
    others = [
        changed(PATHS[0], (0, 0), 1.5),
        changed(PATHS[0], (0, 1), 1.5),
        changed(PATHS[2], (1,), 1e-3),
        {"encoder": TREE["encoder"]["layers_0"]},
        params.unflatten({**params.flatten(TREE), PATHS[0]: np.ones((3, 2), np.float32)}),
    ]
    names = {params.fingerprint(tree) for tree in others}
    assert len(names) == len(others) and name not in names


def test_fingerprint_reads_a_sample():
    """Of a large array it reads 64 values, the last among them, on a device as on the host."""
    large = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    samples = {"a": (large.shape, params.sample_array(large))}
    assert params.sample_array(large).shape == (64,)
    name = params.fingerprint({"a": jnp.asarray(large)})
    assert fingerprints.hash_samples(samples) == params.fingerprint({"a": large}) == name
    large[-1, -1] += 1
    assert params.fingerprint({"a": large}) != name
