"""Dimensions, activations and sparse layers from the shapes of a model's parameters."""

import dataclasses

import pytest
from methods import CONFIG

from pemoe_jax.checkpoints import base_model, dimensions, lazy_array
from pemoe_jax.core import network, params
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse

T5_1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}
DEEP = dataclasses.replace(CONFIG, num_encoder_layers=4, num_decoder_layers=2)


def model_shapes(config: network.T5Config, sparse: Sparse | None = None) -> dict[str, tuple]:
    shapes = network.param_shapes(network.Transformer(config, sparse=sparse))
    return {path: leaf.shape for path, leaf in params.flatten(shapes).items()}


def base(shapes: dict[str, tuple], **stored) -> base_model.BaseModel:
    arrays = {
        path: lazy_array.LazyArray(shape, None, lambda _: pytest.fail("an array is read"))
        for path, shape in shapes.items()
    }
    return base_model.BaseModel("/base", "test", arrays, stored)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, None),
        (T5_1_0, None),
        ({"num_encoder_layers": 4, "num_decoder_layers": 2, **T5_1_0}, Sparse(4)),
        (T5_1_0 | {"logits_via_embedding": False}, Sparse(3, sparse_step=1)),  # as Switch-C
        ({"num_encoder_layers": 6, "num_decoder_layers": 3}, Sparse(2, 3, extra_mlp=True)),
    ],
    ids=["t5_1_1", "t5_1_0", "switch", "layer 0 is sparse", "extra_mlp"],
)
def test_shapes_of_the_model(changes, sparse):
    config = dataclasses.replace(CONFIG, **changes)
    shapes = model_shapes(config, sparse)
    inferred = dimensions.infer(shapes)
    assert network.T5Config(**inferred) == config
    opened = base(shapes)
    if sparse is None:
        assert opened.sparse is None
    else:
        assert opened.sparse == {
            "num_experts": sparse.num_experts,
            "sparse_step": sparse.sparse_step,
            "extra_mlp": sparse.extra_mlp,
        }
    assert network.T5Config(**opened.config()) == config


@pytest.mark.parametrize(("shape", "got"), [(None, "none"), ((), r"\(\)"), ((3,), r"\(3,\)")])
def test_arrays_that_are_missing_or_no_matrices(shape, got):
    shapes = model_shapes(CONFIG) | {"token_embedder/embedding": shape}
    with pytest.raises(InputError, match=f"a matrix token_embedder/embedding, got {got}$"):
        dimensions.infer({path: shape for path, shape in shapes.items() if shape is not None})


@pytest.mark.parametrize("stored", [["gelu"], ["gelu", "linear"], 3, [[]], None])
def test_names_of_activations_are_stored(stored):
    """They are not in shapes: `wi` may be of any activation."""
    shapes = model_shapes(dataclasses.replace(CONFIG, **T5_1_0))
    opened = base(shapes) if stored is None else base(shapes, mlp_activations=stored)
    expected = ("gelu",) if stored == ["gelu"] else ("relu",)
    assert opened.model_dimensions()["mlp_activations"] == expected
    assert network.T5Config(**opened.config()).mlp_activations == expected


def test_activations_of_the_model_file_are_those_of_a_base_that_states_none():
    """As T5X's checkpoints of UL2 do, with models/ul2.gin; wi_0 and wi_1 are not one `wi`."""
    silu = dataclasses.replace(CONFIG, mlp_activations=("silu", "linear"))
    unstated = base(model_shapes(CONFIG))
    assert unstated.model_dimensions(silu)["mlp_activations"] == ("silu", "linear")
    assert unstated.config(silu)["mlp_activations"] == ("silu", "linear")
    stated = base(model_shapes(CONFIG), mlp_activations=["gelu", "linear"])
    assert stated.model_dimensions(silu)["mlp_activations"] == ("gelu", "linear")
    relu = base(model_shapes(dataclasses.replace(CONFIG, **T5_1_0)))
    assert relu.model_dimensions(silu)["mlp_activations"] == ("relu",)


def test_a_model_of_other_activations_than_its_base_states():
    shapes = model_shapes(dataclasses.replace(CONFIG, **T5_1_0))
    stated = base(shapes, mlp_activations=["gelu"])
    stated.check_activations(("gelu",))
    base(shapes).check_activations(("gelu",))  # as T5X's checkpoints, which state none
    stated.check_activations(("gelu", "linear"))  # the shapes differ, which `load` says
    with pytest.raises(InputError, match=r"mlp_activations must be \('gelu',\), as in the base mo"):
        stated.check_activations(("relu",))


def test_a_missing_head():
    shapes = model_shapes(CONFIG)
    del shapes["decoder/logits_dense/kernel"]
    with pytest.raises(InputError, match="expected decoder/logits_dense/kernel, as .* got none"):
        base(shapes, **CONFIG.as_dict()).config()


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [([1], [1]), ([1, 3], []), ([], [1]), ([0, 3], [0]), ([0, 1, 2, 3], [1]), ([1, 2, 3], [1])],
)
def test_layouts_that_no_step_has(encoder, decoder):
    """Four and two layers; Hugging Face makes layer 1 of four sparse at its step 4."""
    depths = {"encoder": 4, "decoder": 2}
    shapes = {f"{s}/layers_{i}/a/kernel": (2, 2) for s, n in depths.items() for i in range(n)}
    for stack, indices in {"encoder": encoder, "decoder": decoder}.items():
        shapes |= {f"{stack}/layers_{i}/mlp/expert/wi/kernel": (3, 2, 2) for i in indices}
    with pytest.raises(InputError) as caught:
        dimensions.infer_sparse(shapes, "/base")
    got = f"got sparse layers {encoder} of 4 in the encoder; layers {decoder} of 2 in the decoder"
    assert str(caught.value).startswith("/base: ") and got in str(caught.value)


def test_scanned_layers_are_named():
    """Flaxformer's scanned models have position biases by sub-block."""
    path = "encoder/encoder/subblock_0/relpos_bias/rel_embedding"
    with pytest.raises(InputError, match=f"expected unscanned layers .* got scanned ones .{path}"):
        dimensions.infer({"token_embedder/embedding": (8, 4), path: (2, 3, 32)})


def test_another_size_is_named():
    """The model's experts and layers against those of a base, before any array is compared."""
    config = dataclasses.replace(DEEP, **T5_1_0)
    model = {
        name: network.param_shapes(network.Transformer(config, sparse=sparse))
        for name, sparse in (("dense", None), ("sparse", Sparse(4)), ("all", Sparse(8, 1)))
    }
    opened = {
        name: base({p: leaf.shape for p, leaf in params.flatten(tree).items()})
        for name, tree in model.items()
    }
    for target, name, message in (
        ("dense", "sparse", r"expected NUM_EXPERTS none \(dense\), got 4$"),
        ("sparse", "dense", r"expected NUM_EXPERTS 4, got none \(dense\)$"),
        ("all", "sparse", "expected NUM_EXPERTS 8, got 4; SPARSE_STEP 1, got 2$"),
    ):
        with pytest.raises(InputError, match=message):
            opened[name].load(model[target])
    gated = network.param_shapes(network.Transformer(DEEP))
    message = r"mlp_activations \('gelu', 'linear'\), got \('relu',\); logits_via_embedding False"
    with pytest.raises(InputError, match=message):
        opened["dense"].load(gated)
