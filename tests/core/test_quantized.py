"""Frozen matrices in a byte a value: how far they are off, and that all the rest stays as it is."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jsonl_folder import write_folder, write_vocabulary
from methods import (
    CONFIG,
    METHODS,
    PEFT_METHODS,
    example_batch,
    forward,
    largest_difference,
    random_params,
    random_params_of,
)

from pemoe_jax import evaluate, train
from pemoe_jax.analysis.planning import compiled_step
from pemoe_jax.checkpoints import base_model as base_lib
from pemoe_jax.checkpoints import models, runs
from pemoe_jax.core import network, optim, params, partitioning, quantized, stacks, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.tools import convert

KINDS = ("int8", "float8_e4m3fn")


def of_tree(tree, kind: str, made=lambda matrix: matrix):
    """A tree with its matrices quantized, and what is `made` of each."""
    flat = params.flatten(tree)
    for path in filter(params.is_matrix, flat):
        flat[path] = made(quantized.quantize(flat[path], kind))
    return params.unflatten(flat)


def test_by_hand():
    """127 / 127 = 1 and 254 / 127 = 2 are the scales; halves go to the even neighbour."""
    matrix = jnp.array([[127.0, -254.0, 0.0], [0.5, 127.0, 0.0], [-1.5, 3.1, 0.0]])
    found = quantized.quantize(matrix, "int8")
    np.testing.assert_array_equal(found.values, [[127, -127, 0], [0, 64, 0], [-2, 2, 0]])
    np.testing.assert_array_equal(found.scale, [1, 2, 1])
    expected = [[127, -254, 0], [0, 128, 0], [-2, 4, 0]]
    np.testing.assert_array_equal(quantized.dequantize(found), expected)
    # 448 / 448 = 1 and 896 / 448 = 2; e4m3 has 8 steps from 16 to 32: 17.5 lies between 16 and 18,
    # 35 / 2 = 17.5 too
    found = quantized.quantize(jnp.array([[448.0, -896.0], [17.5, 35.0]]), "float8_e4m3fn")
    np.testing.assert_array_equal(found.values.astype(np.float32), [[448, -448], [18, 18]])
    np.testing.assert_array_equal(found.scale, [1, 2])


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (129, 33)])
def test_half_a_scale_off_at_most(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix *= np.geomspace(1e-6, 1e3, shape[1], dtype=np.float32)
    found = quantized.quantize(jnp.asarray(matrix), "int8")
    off = np.abs(np.asarray(quantized.dequantize(found)) - matrix)
    # float32's own rounding of 127 scales comes to 127 · 2^-24 of one
    assert (off <= np.asarray(found.scale) * (0.5 + 1e-5)).all()
    # the scale is the largest value / 127, rounded to bfloat16's 8 bits
    np.testing.assert_allclose(found.scale, np.abs(matrix).max(0) / 127, rtol=2**-8)
    as_bfloat16 = np.asarray(found.scale).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(as_bfloat16.astype(np.float32), found.scale)


@pytest.mark.parametrize("shape", [(7, 5), (129, 33)])
def test_a_sixteenth_of_a_value_off_at_most(shape):
    """Float8 has 3 bits behind the point; below 2^-6 of a scale its steps are 2^-9 wide."""
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = quantized.quantize(jnp.asarray(matrix), "float8_e4m3fn")
    scale = np.asarray(found.scale)
    off = np.abs(np.asarray(quantized.dequantize(found)) - matrix)
    assert (off <= np.maximum(np.abs(matrix) / 16, scale * 2**-10) * (1 + 1e-5)).all()
    clipped = np.clip(matrix / scale, -448, 448)
    expected = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(found.values).astype(np.float32), expected)


def test_matrices_are_those_of_attention_and_mlps():
    paths = params.flatten(random_params("molora"))
    chosen = {path for path in paths if params.is_matrix(path)}
    # encoder: 4 of attention, 3 of the MLP; decoder: 4 of cross-attention more
    assert len(chosen) == 7 + 11
    others = {path.rsplit("/", 1)[-1] for path in paths.keys() - chosen}
    assert others == {"scale", "embedding", "rel_embedding", "kernel", "lora_a", "lora_b"}
    kernels = {path for path in paths.keys() - chosen if path.endswith("kernel")}
    assert all("router" in path or path == "decoder/logits_dense/kernel" for path in kernels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_logits_and_gradients_are_those_of_the_matrices_that_they_stand_for(method, kind):
    frozen, plain = (
        params.split(of_tree(random_params(method), kind, made), METHODS[method].trainable)[1]
        for made in (lambda one: one, quantized.dequantize)
    )
    trainable = params.split(random_params(method), METHODS[method].trainable)[0]
    logits = [
        forward(method)(params.merge(trainable, half), example_batch()) for half in (frozen, plain)
    ]
    assert largest_difference(*logits) < 1e-5
    step = functools.partial(steps.loss_and_grads, _model(method), steps.Loss())
    found, expected = (
        jax.jit(step)(trainable, half, example_batch())[0] for half in (frozen, plain)
    )
    for path, gradient in params.flatten(expected).items():
        assert np.abs(gradient).max() > 0
        # scaled behind the sum in place of before it: routers' gradients cancel what is rounded
        assert largest_difference(params.flatten(found)[path], gradient) < 5e-5, path


def _model(method: str, **settings) -> network.Transformer:
    config = dataclasses.replace(CONFIG, **settings)
    return network.Transformer(config, METHODS[method].adapters())


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("float8_e4m3fn", 0.12)])
def test_logits_are_near_those_of_the_base(kind, bound):
    """By the largest logit; measured 1.6 % and 7.8 %; bfloat16 activations alone have 1.7 %."""
    batch = example_batch()
    expected = forward("mov")(random_params("mov"), batch)
    kept = of_tree(random_params("mov"), kind)
    off = largest_difference(forward("mov")(kept, batch), expected)
    assert bound / 8 < off < bound
    assert (
        largest_difference(forward("mov", dtype="bfloat16")(kept, batch), expected) < bound + 0.02
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loops_and_what_is_computed_again(kind):
    """A loop stacks values and scales alike."""
    deep = {"num_encoder_layers": 2, "num_decoder_layers": 3}
    one = _model("mov", **deep)
    trainable, frozen = params.split(of_tree(random_params_of(one), kind), METHODS["mov"].trainable)
    loss = steps.Loss()
    expected = jax.jit(functools.partial(steps.loss_and_grads, one, loss))(
        trainable, frozen, example_batch()
    )[0]
    loop = _model("mov", **deep, scan_layers=True, remat_policy="minimal")
    copies = jax.tree.map(jnp.copy, frozen)
    stacked = network.stack_layers(loop, copies, stacks.stack_and_delete)
    kernel = params.flatten(stacked)["decoder/layers/mlp/wo/kernel"]
    assert kernel.values.shape == (3, 20, 16) and kernel.scale.shape == (3, 16)
    for half in (frozen, stacked):
        found = jax.jit(functools.partial(steps.loss_and_grads, loop, loss))(
            trainable, half, example_batch()
        )[0]
        for path, gradient in params.flatten(expected).items():
            assert largest_difference(params.flatten(found)[path], gradient) < 1e-5, path


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_adapters_train_and_nothing_else_moves(method):
    trainable, frozen = params.split(
        of_tree(random_params(method), "int8"), METHODS[method].trainable
    )
    optimizer = optax.sgd(0.02)
    before = jax.tree.map(np.array, (trainable, frozen))
    state = steps.TrainState.create(jax.tree.map(jnp.copy, trainable), optimizer)
    step = steps.make_train_step(_model(method), optimizer, steps.Loss())
    losses = []
    for _ in range(5):
        state, metrics = step(state, frozen, example_batch(), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for path, leaf in params.flatten(before[0]).items():
        assert not np.array_equal(leaf, params.flatten(state.params)[path]), path
    jax.tree.map(np.testing.assert_array_equal, frozen, before[1])


# --- reading


@pytest.fixture(scope="module")
def base_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    base_lib.save_base(path, random_params("full"), CONFIG.as_dict())
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_quantized_from_what_is_stored(base_path, kind, dtype):
    transformer = network.Transformer(dataclasses.replace(CONFIG, dtype=dtype))
    plain, identity = models.load_base(transformer, base_path, 0)
    found, kept_as = models.load_base(transformer, base_path, 0, frozen_dtype=kind)
    assert kept_as == identity  # its fingerprint too: it is the same base
    expected = of_tree(random_params("full"), kind)
    for path, leaf in params.flatten(found).items():
        want = params.flatten(expected)[path]
        if params.is_matrix(path):
            assert leaf.dtype == kind and leaf.shape == want.shape and leaf.size == want.size
            jax.tree.map(np.testing.assert_array_equal, leaf, want)
        else:
            assert leaf.dtype == params.flatten(plain)[path].dtype
            np.testing.assert_array_equal(leaf, params.flatten(plain)[path])


def test_one_matrix_at_a_time_is_float32(base_path, monkeypatch):
    """The sizes are those of the matrices alone: what was read before has gone."""
    shapes = {(16, 12), (12, 16), (16, 20), (20, 16)}
    alive = []
    quantize = quantized.quantize

    def watched(matrix, dtype):
        alive.append(
            sum(one.shape in shapes and one.dtype == jnp.float32 for one in jax.live_arrays())
        )
        return quantize(matrix, dtype)

    before = sum(one.shape in shapes and one.dtype == jnp.float32 for one in jax.live_arrays())
    monkeypatch.setattr(quantized, "quantize", watched)
    for path in (base_path, None):
        kept = models.load_base(network.Transformer(CONFIG), path, 0, frozen_dtype="int8")
        assert kept
    assert len(alive) == 36 and max(alive) - before <= 1


def test_a_random_base_is_the_same_one():
    transformer = network.Transformer(CONFIG)
    plain, identity = models.load_base(transformer, None, 3)
    found, kept_as = models.load_base(transformer, None, 3, frozen_dtype="int8")
    assert kept_as == identity and identity["fingerprint"] == params.fingerprint(plain)
    jax.tree.map(np.testing.assert_array_equal, found, of_tree(plain, "int8"))


def test_what_trains_stays_float32(base_path):
    wo = "encoder/layers_0/mlp/wo/kernel"
    found, _ = models.load_base(
        network.Transformer(CONFIG), base_path, 0, wo.__eq__, frozen_dtype="int8"
    )
    assert params.flatten(found)[wo].dtype == jnp.float32
    assert params.flatten(found)[wo.replace("encoder", "decoder")].dtype == jnp.int8


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("fsdp", [False, True])
def test_it_lies_as_the_matrix_lies(base_path, from_file, fsdp):
    """Over two devices: values as the matrix, scales as its last axis; not a bit is another."""
    model_parallelism = 1 if fsdp else 2
    mesh, rules = partitioning.make_mesh(model_parallelism), partitioning.axis_rules(fsdp)
    transformer = _model("full")
    shapes = params.flatten(network.param_shapes(transformer))
    lies = partitioning.param_shardings(mesh, rules, network.param_axes(transformer), shapes)
    path = base_path if from_file else None
    spread, identity = models.load_base(transformer, path, 0, shardings=lies, frozen_dtype="int8")
    whole, expected = models.load_base(transformer, path, 0, frozen_dtype="int8")
    assert identity == expected
    jax.tree.map(np.testing.assert_array_equal, spread, whole)
    wi = params.flatten(spread)["encoder/layers_0/mlp/wi_0/kernel"]  # [D, F]
    assert wi.values.sharding == lies["encoder/layers_0/mlp/wi_0/kernel"]
    # [16, 20] over two: F by model parallelism, D by FSDP
    half = ((8, 20), (20,)) if fsdp else ((16, 10), (10,))
    shards = (wi.values.addressable_shards[0], wi.scale.addressable_shards[0])
    assert tuple(shard.data.shape for shard in shards) == half
    batch = example_batch()
    with partitioning.use_mesh(mesh, rules):
        found = steps.make_eval_step(transformer, steps.Loss())({}, spread, batch)
    alone = steps.make_eval_step(transformer, steps.Loss())({}, whole, batch)
    np.testing.assert_allclose(found["nll"], alone["nll"], rtol=1e-6)


def test_a_plan_counts_their_bytes():
    """Of 12 [out] scales and 2,496 values, beside embedding, norms, logits and biases."""

    def frozen(dtype: str, **settings) -> int:
        model = _model("mov", dtype="bfloat16", **settings)
        step = compiled_step.TrainStep(
            model, METHODS["mov"].trainable, optim.adamw(lambda _: 1.0), 4, (8, 6), 1, dtype
        )
        mesh = partitioning.make_mesh(1, jax.devices()[:1])
        return compiled_step.bytes_per_device(compiled_step.abstract_arguments(step, mesh).frozen)

    matrices = {
        path: leaf.shape
        for path, leaf in params.flatten(network.param_shapes(_model("mov"))).items()
        if params.is_matrix(path)
    }
    values = sum(rows * columns for rows, columns in matrices.values())
    scales = sum(columns for _, columns in matrices.values())
    # two bytes a value before, one now, and four a scale
    assert frozen("activations") - frozen("int8") == values - 4 * scales
    assert frozen("int8") == frozen("float8_e4m3fn") == frozen("int8", scan_layers=True)


# --- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("quantized")
    write_folder(root / "tasks")
    write_vocabulary(root / "vocab.model")
    config = dataclasses.replace(CONFIG, vocab_size=256)
    whole = network.init_params(network.Transformer(config), 0, params.is_base)
    base_lib.save_base(root / "base.safetensors", whole, config.as_dict())
    return root


def flags(folder: pathlib.Path, **macros) -> list[str]:
    settings = {
        "JSONL_DIR": folder / "tasks",
        "VOCAB_PATH": folder / "vocab.model",
        "TASK_FEATURE_LENGTHS": "{'inputs': 32, 'targets': 8}",
        "BATCH_SIZE": 8,
        **macros,
    }
    return [f"--gin.{name}={value}" for name, value in settings.items()]


def trained(folder: pathlib.Path, method: str, model_dir: pathlib.Path, **macros) -> int:
    dimensions = ("emb_dim", "num_heads", "head_dim", "mlp_dim")
    dimensions += ("num_encoder_layers", "num_decoder_layers")
    settings = {
        "MODEL_DIR": model_dir,
        "INITIAL_CHECKPOINT_PATH": folder / "base.safetensors",
        "TRAIN_STEPS": 2,
        "VOCAB_SIZE": 256,
        "FROZEN_DTYPE": "int8",
        **macros,
    }
    files = ("models/t5_1_1_tiny", f"methods/{method}", "runs/finetune")
    return train.main(
        [
            *(f"--gin_file={name}.gin" for name in files),
            *(f"--gin.network.T5Config.{name}={getattr(CONFIG, name)}" for name in dimensions),
            *flags(folder, **settings),
        ]
    )


def test_a_run_says_how_its_base_was_kept_and_is_evaluated_so(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert trained(folder, "lora", run) == 0
    assert "matrices     int8 (frozen)" in capsys.readouterr().out
    recorded = runs.read_record(str(run)).base
    assert recorded["frozen_dtype"] == "int8"
    stored = base_lib.open_base(folder / "base.safetensors")
    assert recorded["fingerprint"] == stored.fingerprint()

    # going on otherwise is refused
    assert trained(folder, "lora", run, TRAIN_STEPS=3, FROZEN_DTYPE="activations") == 1
    says = "FROZEN_DTYPE 'int8', expected the same to go on, found 'activations'"
    assert says in capsys.readouterr().err

    # bit for bit what was read before the training
    matrix = "encoder/layers_0/mlp/wo/kernel"
    kept = params.flatten(models.open_model(str(run)).load())
    expected = quantized.quantize(jnp.asarray(stored.arrays[matrix].read()), "int8")
    jax.tree.map(np.testing.assert_array_equal, kept[matrix], expected)
    opened = models.open_models(str(run), frozen_dtype="activations")[0]
    assert params.flatten(opened.load())[matrix].dtype == jnp.float32

    handed_on = tmp_path / "adapter"
    assert convert.main(["adapter", str(run), str(handed_on)]) == 0
    assert models.open_model(str(handed_on)).frozen_dtype == "int8"
    merged = tmp_path / "merged.safetensors"
    assert convert.main(["base", str(run), str(merged)]) == 0
    assert "was trained with its base kept in int8: what is written" in capsys.readouterr().out
    untouched = "encoder/layers_0/mlp/wi_1/kernel"  # LoRA has no site there
    written = base_lib.open_base(merged).arrays[untouched].read()
    np.testing.assert_array_equal(written, stored.arrays[untouched].read())

    def evaluated(name: str, **macros) -> dict:
        given = {"CHECKPOINT_PATH": run, "EVAL_OUTPUT_DIR": tmp_path / name, **macros}
        argv = ["--gin_file=runs/evaluate.gin", *flags(folder, **given)]
        assert evaluate.main(argv) == 0
        assert "(frozen" in (tmp_path / name / "results.md").read_text() or "act" in name
        return json.loads((tmp_path / name / "results.json").read_text())["runs"][0]

    assert evaluated("as_trained")["frozen"] == "int8"
    assert evaluated("float8", FROZEN_DTYPE="float8_e4m3fn")["frozen"] == "float8_e4m3fn"
    assert "frozen" not in evaluated("activations", FROZEN_DTYPE="activations")


@pytest.mark.parametrize(
    ("method", "frozen_dtype", "says"),
    [
        ("full", "int8", "FROZEN_DTYPE 'int8': full trains all matrices: expected 'activations'"),
        ("mov", "int4", "FROZEN_DTYPE must be one of ['activations', 'int8', 'float8_e4m3fn']"),
    ],
)
def test_what_cannot_be_is_one_line(folder, tmp_path, capsys, method, frozen_dtype, says):
    assert trained(folder, method, tmp_path / "run", FROZEN_DTYPE=frozen_dtype) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_whole_model_has_nothing_frozen(base_path, tmp_path):
    record = runs.Record(
        method="full",
        trainable=[".*"],
        config=CONFIG.as_dict(),
        adapters={},
        base={"path": None, "seed": 0, "fingerprint": None, "needed": False},
        counts={},
        versions={},
    )
    state = steps.TrainState.create(random_params("full"), optax.sgd(0.1))
    checkpoints = runs.RunCheckpoints(str(tmp_path / "full"))
    checkpoints.save(state, record)
    checkpoints.close()
    with pytest.raises(InputError, match="FROZEN_DTYPE must be None for"):
        models.open_models([base_path, str(tmp_path / "full")], frozen_dtype="int8")
    assert models.open_models(base_path, frozen_dtype="int8")[0].frozen_dtype == "int8"
