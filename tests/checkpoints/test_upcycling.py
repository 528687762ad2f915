"""Sparse models from dense bases, and runs of them whose frozen parts are not in checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import example_batch, largest_difference, model_inputs, random_params_of
from sparse_models import EXPERTS, ROUTINGS, sparse_model

from pemoe_jax.analysis import sparse_layers
from pemoe_jax.checkpoints import base_model, export, models, runs, upcycling
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import freezing, network, partitioning, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core import sparse as sparse_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse

DENSE = sparse_model(None)
NOISE, SEED = 0.1, 3
# As in gin/methods/flan_*.gin, weights whose sum is one. GShard's equal ST's in this.
METHODS = {
    "switch": dataclasses.replace(ROUTINGS["switch"], combine="straight"),
    "st": dataclasses.replace(ROUTINGS["st"], combine="normalized"),
    # With as many places as tokens each token is chosen.
    "ec": dataclasses.replace(ROUTINGS["ec"], combine="normalized", capacity=8),
}


@functools.cache
def dense_params() -> dict:
    return random_params_of(DENSE)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("dense") / "base.safetensors"
    base_model.save_base(path, dense_params(), DENSE.config.as_dict())
    return str(path)


@pytest.fixture(scope="module")
def st(dense):
    """ST's model, which has all kinds of arrays, upcycled with noise."""
    model = sparse_model(METHODS["st"])
    return model, *models.load_base(model, dense, SEED, upcycle_noise=NOISE)


def logits(model: network.Transformer, params: dict) -> jax.Array:
    """Returns the logits of the targets' tokens; padding has no experts."""
    batch = model_inputs(example_batch())
    return _apply(model, params, batch)[batch["decoder_target_tokens"] > 0]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: network.Transformer, params: dict, batch: dict) -> jax.Array:
    return model.apply({"params": params}, **batch, enable_dropout=False)


@pytest.mark.parametrize("method", METHODS)
def test_an_upcycled_model_is_the_dense_function(dense, method):
    model = sparse_model(METHODS[method])
    params, identity = models.load_base(model, dense, SEED)
    difference = largest_difference(logits(model, params), logits(DENSE, dense_params()))
    assert difference < 1e-5
    assert identity["upcycled"] == {"seed": SEED, "noise": 0.0}
    assert identity["fingerprint"] == models.load_base(DENSE, dense, 0)[1]["fingerprint"]


def test_arrays_of_an_upcycled_model(dense, st):
    model, params, _ = st
    base, flat = params_lib.flatten(dense_params()), params_lib.flatten(params)
    factors = []
    for path, leaf in params_lib.flatten(network.param_shapes(model)).items():
        array = np.asarray(flat[path])
        assert array.shape == leaf.shape and array.dtype == np.float32
        if "/mlp/expert/" in path:
            factors.append((array / base[path.replace("/expert/", "/")] - 1).ravel())
        elif "/mlp/router/" in path:
            assert 0.01 < array.std() < 0.03
        elif path.endswith("/extra_mlp/wo/kernel"):
            assert not array.any()
        elif "/extra_mlp/" in path:
            assert np.array_equal(array, base[path.replace("extra_mlp", "mlp")])
        elif "pre_extra_mlp_layer_norm" in path:
            assert (array == 1).all()
        else:
            assert np.array_equal(array, base[path]), path
    noise = np.concatenate(factors)  # of 2 layers, 3 matrices and 4 experts of 16 x 20
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - NOISE) < 0.005
    assert np.unique(noise.round(5)).size > noise.size / 4  # each has noise of its own
    other = params_lib.flatten(models.load_base(model, dense, SEED + 1, upcycle_noise=NOISE)[0])
    drawn = {path for path in flat if not np.array_equal(flat[path], other[path])}
    assert drawn == {path for path in flat if "/mlp/expert/" in path or "/mlp/router/" in path}


def test_conversions_read_the_same_arrays(dense, st):
    model, params, identity = st
    made = upcycling.Upcycling(model, **identity["upcycled"])
    lazy = made.lazy_arrays(base_model.open_base(dense).arrays)
    expected = params_lib.flatten(params)
    assert lazy.keys() == expected.keys()
    for path, array in lazy.items():
        assert array.shape == expected[path].shape
        assert np.array_equal(array.read(), expected[path]), path
    expert = next(path for path in lazy if upcycling.is_expert(path))
    assert np.array_equal(
        lazy[expert].read_slice((slice(1, 3), slice(None), slice(2))), expected[expert][1:3, :, :2]
    )


def record_of(model: network.Transformer, patterns: list[str], base: dict) -> Record:
    return Record(
        method="flan_st",
        trainable=patterns,
        config=model.config.as_dict(),
        adapters={},
        sparse=sparse_lib.describe(model.sparse),
        base={**base, "needed": True},
        counts={},
        versions={},
    )


# What FREEZE freezes, and the method that is trained with it.
FROZEN = {
    "router": (["router"], ROUTINGS["st"]),
    "experts": (["expert"], METHODS["switch"]),
    "moe": (["router", "expert"], ROUTINGS["gshard"]),
    "all_but_router": (["router"], ROUTINGS["ec"]),
    "all_but_experts": (["expert"], ROUTINGS["gshard"]),
    "all_but_moe": (["router", "expert"], METHODS["switch"]),
}


@pytest.mark.parametrize("freeze", freezing.FREEZE)
def test_a_small_checkpoint_is_the_model_of_its_run(tmp_path, freeze):
    """A checkpoint has no frozen part: its routers come by seed, its experts from the base."""
    modules, sparse = FROZEN[freeze]
    # One layer each, as compilation takes most of the time.
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    base = sparse_model(None, **layers)
    file = str(tmp_path / "base.safetensors")
    base_model.save_base(file, random_params_of(base), base.config.as_dict())
    model = sparse_model(dataclasses.replace(sparse, sparse_step=1), **layers)
    params, identity = models.load_base(model, file, SEED, upcycle_noise=NOISE)
    start = jax.device_get(params_lib.flatten(params))
    patterns = freezing.trainable_patterns([".*"], freeze)
    trained, frozen = params_lib.split(params, patterns)
    frozen_paths = {
        path
        for path in start
        if any(f"/mlp/{name}/" in path for name in modules) != freeze.startswith("all_but_")
    }
    assert params_lib.flatten(frozen).keys() == frozen_paths

    optimizer = optax.adam(0.1)
    step = steps.make_train_step(model, optimizer, steps.Loss())
    state = steps.TrainState.create(trained, optimizer)
    for _ in range(2):
        state, _ = step(state, frozen, example_batch(), jax.random.key(0))
    checkpoints = runs.RunCheckpoints(str(tmp_path / "run"))
    checkpoints.save(state, record_of(model, patterns, identity))
    checkpoints.close()
    opened = models.open_model(str(tmp_path / "run"))
    assert opened.model == model
    assert opened.trained_arrays.keys() == start.keys() - frozen_paths
    expected = jax.device_get(params_lib.flatten(params_lib.merge(state.params, frozen)))
    actual = params_lib.flatten(opened.load())
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert np.array_equal(array, actual[path]), path
        assert np.array_equal(array, start[path]) == (path in frozen_paths), path
    with pytest.raises(InputError, match="got one of method 'flan_st', which saves only what"):
        base_model.open_base(tmp_path / "run")
    if freeze == "router":
        export.write_base(opened, tmp_path / "whole.safetensors", None)
        whole = models.open_model(str(tmp_path / "whole.safetensors"))
        assert whole.model.sparse == model.sparse  # its routing too, which shapes do not show
        router = "encoder/layers_0/mlp/router/router_weights/w/kernel"
        assert np.array_equal(params_lib.flatten(whole.load())[router], expected[router])


def test_frozen_parts_have_the_dtypes_of_a_frozen_base(dense):
    """Experts are rounded once, after their noise; a dense array may become two of other dtypes."""
    model = sparse_model(METHODS["st"], dtype="bfloat16")
    frozen, _ = models.load_base(model, dense, SEED, lambda path: "/extra_mlp/" in path)
    mlp = frozen["encoder"]["layers_1"]
    assert mlp["extra_mlp"]["wi_0"]["kernel"].dtype == jnp.float32
    assert mlp["mlp"]["expert"]["wi_0"]["kernel"].dtype == jnp.bfloat16
    exact = dense_params()["encoder"]["layers_1"]["mlp"]["wi_0"]["kernel"]
    assert np.array_equal(mlp["extra_mlp"]["wi_0"]["kernel"], exact)


def test_noise_multiplies_float32_values(dense, st):
    """Also where a frozen extra MLP is made from the same array."""
    _, exact, _ = st
    model = sparse_model(METHODS["st"], dtype="bfloat16")
    frozen, _ = models.load_base(model, dense, SEED, upcycle_noise=NOISE)
    exact, frozen = params_lib.flatten(exact), params_lib.flatten(frozen)
    for path in filter(upcycling.is_expert, frozen):
        assert frozen[path].dtype == jnp.bfloat16
        assert np.array_equal(frozen[path], exact[path].astype(jnp.bfloat16)), path


def test_experts_are_sharded_as_they_are_copied(dense):
    mesh = partitioning.make_mesh()
    model = sparse_model(METHODS["switch"])
    shapes = params_lib.flatten(network.param_shapes(model))
    where = partitioning.param_shardings(
        mesh, partitioning.axis_rules(fsdp=True), network.param_axes(model), shapes
    )
    sharded = params_lib.flatten(models.load_base(model, dense, SEED, shardings=where)[0])
    whole = params_lib.flatten(models.load_base(model, dense, SEED)[0])
    for path, array in sharded.items():
        assert array.sharding.is_equivalent_to(where[path], array.ndim), path
        assert np.array_equal(array, whole[path])


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        (None, r"has 4 experts in one of every 2 layers: pass a method with experts .* a dense"),
        (Sparse(8), r"NUM_EXPERTS must be 4, as in the base model .*, got 8$"),
        (Sparse(4, sparse_step=1), r"SPARSE_STEP must be 2, as in the base model .*, got 1$"),
        (Sparse(4, extra_mlp=True), r"EXTRA_MLP must be False, as in the base model .*, got True$"),
    ],
)
def test_a_sparse_base_of_another_model(tmp_path, sparse, message):
    base = sparse_model(Sparse(EXPERTS, top_k=2))
    path = tmp_path / "base.safetensors"
    description = sparse_lib.describe(base.sparse)
    base_model.save_base(path, random_params_of(base), base.config.as_dict(), sparse=description)
    with pytest.raises(InputError, match=message):
        models.load_base(sparse_model(sparse), str(path), 0)
    assert models.open_model(str(path)).model.sparse == base.sparse
    assert "upcycled" not in models.load_base(base, str(path), 0)[1]


def test_a_base_of_other_activations(dense):
    for sparse in (None, METHODS["switch"]):
        model = sparse_model(sparse, mlp_activations=("relu", "linear"))
        with pytest.raises(
            InputError, match=r"must be \('gelu', 'linear'\), as .* got \('relu', 'li"
        ):
            models.load_base(model, dense, 0)


LENGTHS = {"inputs": 128, "targets": 32}


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        (
            Sparse(8, combine="straight"),
            "2 of 4 layers|encoder: an expert takes up to 20 of 128 tokens; decoder: an expert"
            " takes up to 5 of 32 tokens",
        ),
        # C = round(1.25 · 128 / 8) = 20: 160 places for 256 assignments.
        (
            Sparse(8, top_k=2),
            "2 of 4 layers; the start is not the dense function: COMBINE='probability' multiplies"
            " outputs by about 2/8|encoder: an expert takes up to 20 of 128 tokens, at least 37.5 %"
            " of assignments are dropped; decoder: an expert takes up to 5 of 32 tokens, at least"
            " 37.5 % of assignments are dropped",
        ),
        (
            Sparse(8, combine="normalized", top_k=2, capacity_factor=None),
            "2 of 4 layers|encoder: an expert takes all of 128 tokens; decoder: an expert takes all"
            " of 32 tokens",
        ),
        (
            Sparse(8, routing="experts", combine="straight", capacity=200),
            "2 of 4 layers|encoder: an expert chooses 128 of 128 tokens (clipped from 200);"
            " decoder: an expert takes all of 32 tokens",
        ),
        # 4 rows of 128 in at least E = 8 groups, and of 32 too.
        (
            Sparse(8, combine="straight", group=256),
            "2 of 4 layers|encoder: an expert takes up to 10 of 64 tokens; decoder: an expert takes"
            " up to 4 of 16 tokens",
        ),
    ],
)
def test_lines_of_a_summary(sparse, expected):
    base = {"upcycled": {"seed": 0, "noise": 0.0}}
    lines = sparse_layers.summary_lines(sparse_model(sparse), base, LENGTHS, 4)
    experts, _, places = expected.partition("|")
    used, _, total = lines.pop("a token").partition(" parameters")[0].partition(" of ")
    # 8 - k experts of three matrices [D, F] in two blocks
    unused = 2 * 3 * DENSE.config.emb_dim * DENSE.config.mlp_dim * (8 - sparse.top_k)
    assert int(total.replace(",", "")) - int(used.replace(",", "")) == unused
    assert lines == {
        "experts": f"upcycled from a dense base: 8 experts in {experts}",
        "places": places,
    }


def test_lines_of_other_models():
    assert sparse_layers.summary_lines(DENSE, {}, LENGTHS, 4) == {}
    mov = sparse_model(Sparse(8, combine="straight"), "mov")
    lines = sparse_layers.summary_lines(mov, {}, LENGTHS, 4)
    assert lines["experts"] == "8 experts in 2 of 4 layers"
    assert lines["adapters"] == "at gate in the 2 dense layers alone"
    noisy = {"upcycled": {"seed": 0, "noise": 0.02}}
    lines = sparse_layers.summary_lines(mov, noisy, LENGTHS, 4)
    assert lines["experts"].endswith("8 experts in 2 of 4 layers, noise 0.02")
