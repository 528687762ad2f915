"""Paths, masks, splitting and merging, strict placing, identity of a base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import ADAPTER, PEFT_METHODS, random_params

from pemoe_jax.core import params
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


def test_everything_trains():
    trainable, frozen = params.split(TREE, [".*"])
    assert params.flatten(trainable).keys() == set(PATHS) and not params.flatten(frozen)
    assert params.flatten(params.merge(trainable, frozen)).keys() == set(PATHS)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_one_pattern_serves_every_method(method):
    trainable, frozen = params.split(random_params(method), [ADAPTER])
    assert all("_adapter/" in path for path in params.flatten(trainable))
    assert not any("_adapter/" in path for path in params.flatten(frozen))
    assert params.flatten(frozen).keys() == params.flatten(random_params("full")).keys()


def test_patterns_match_whole_paths_and_add_up():
    assert params.trainable_paths(PATHS, [".*/key/kernel", ".*scale"]) == {PATHS[0], PATHS[2]}
    with pytest.raises(InputError):
        params.trainable_paths(PATHS, ["key"])  # part of a path only


@pytest.mark.parametrize(
    "patterns, message",
    [
        ([".*/mov_.*"], r"TRAINABLE matched 0 of 3 parameters: \['.*mov_.*'\]"),
        # one good pattern does not hide one that matches nothing
        ([".*scale", ".*/mov_.*"], r"TRAINABLE matched 0 of 3 parameters: \['.*mov_.*'\]"),
        ([], "TRAINABLE matched 0 of 3 parameters"),
        (["("], "no regular expression"),
    ],
    ids=["none", "one of two", "empty", "broken"],
)
def test_a_mask_that_matches_nothing(patterns, message):
    with pytest.raises(InputError, match=message) as caught:
        params.split(TREE, patterns)
    assert "\n" not in str(caught.value)


def test_merge_refuses_a_parameter_in_both():
    with pytest.raises(ValueError, match="both trainable and frozen.*key_adapter/vectors"):
        params.merge({"key_adapter": {"vectors": 1}}, {"key_adapter": {"vectors": 2}})


def test_place_names_every_misfit():
    """Missing, extra and misshapen arrays are told in one line; a full fit comes back as it was."""
    target = jax.eval_shape(lambda: TREE)
    placed = params.place(TREE, target, "base.npz")
    assert params.flatten(placed).keys() == set(PATHS)
    flat = params.flatten(TREE)
    wrong = {
        PATHS[0]: flat[PATHS[0]].T,
        PATHS[1]: flat[PATHS[1]],
        "encoder/stray": np.zeros(1),
    }
    with pytest.raises(InputError) as caught:
        params.place(params.unflatten(wrong), target, "base.npz")
    message = str(caught.value)
    for part in (
        "base.npz does not fit the model's 3 parameters",
        "1 missing: encoder/encoder_norm/scale",
        "1 extra: encoder/stray",
        "1 of another shape: encoder/layers_0/key/kernel (3, 2), expected (2, 3)",
    ):
        assert part in message
    assert "\n" not in message


def test_cast_frozen():
    """Matrices go to the activation dtype; what the network uses in float32 stays there."""
    cast = params.flatten(params.cast_frozen(random_params("molora"), jnp.bfloat16))
    for path, leaf in cast.items():
        in_float32 = path.endswith("norm/scale") or "logits_dense" in path or "_adapter/" in path
        assert leaf.dtype == (jnp.float32 if in_float32 else jnp.bfloat16), path


# --- the base's identity ---


def changed(path: str, index: tuple[int, ...], value: float) -> dict:
    flat = {k: v.copy() for k, v in params.flatten(TREE).items()}
    flat[path][index] = value
    return params.unflatten(flat)


def test_fingerprint():
    """Tells values, places and names apart; ignores order of keys and bfloat16 rounding."""
    name = params.fingerprint(TREE)
    assert len(name) == 16 and int(name, 16) >= 0
    assert params.fingerprint(jax.tree.map(jnp.asarray, TREE)) == name
    reordered = params.unflatten(dict(reversed(params.flatten(TREE).items())))
    assert params.fingerprint(reordered) == name
    assert params.fingerprint(params.cast_frozen(TREE, jnp.bfloat16)) == name
    others = [
        changed(PATHS[0], (0, 0), 1.5),
        changed(PATHS[0], (0, 1), 1.5),
        changed(PATHS[2], (1,), 1e-3),
        {"encoder": TREE["encoder"]["layers_0"]},
    ]
    names = {params.fingerprint(tree) for tree in others}
    assert len(names) == len(others) and name not in names
