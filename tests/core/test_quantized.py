"""Frozen matrices in one byte a value: their error, and that nothing else changes."""

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
    ADAPTER,
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
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import network, optim, params, partitioning, quantized, stacks, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse
from pemoe_jax.runtime import checksums
from pemoe_jax.tools import convert

KINDS = ("int8", "float8_e4m3fn")


def quantize_tree(tree, kind: str, transform=lambda matrix: matrix):
    """Quantizes the matrices of a tree and applies a function to each."""
    flat = params.flatten(tree)
    for path in filter(params.is_matrix, flat):
        flat[path] = transform(quantized.quantize(flat[path], kind))
    return params.unflatten(flat)


def test_by_hand():
    """The scales are 127 / 127 = 1 and 254 / 127 = 2; halves round to even."""
    matrix = jnp.array([[127.0, -254.0, 0.0], [0.5, 127.0, 0.0], [-1.5, 3.1, 0.0]])
    result = quantized.quantize(matrix, "int8")
    np.testing.assert_array_equal(result.values, [[127, -127, 0], [0, 64, 0], [-2, 2, 0]])
    np.testing.assert_array_equal(result.scale, [1, 2, 1])
    expected = [[127, -254, 0], [0, 128, 0], [-2, 4, 0]]
    np.testing.assert_array_equal(quantized.dequantize(result), expected)
    # 448 / 448 = 1 and 896 / 448 = 2; e4m3 has 8 steps from 16 to 32: 17.5 lies between 16 and 18,
    # 35 / 2 = 17.5 too
    result = quantized.quantize(jnp.array([[448.0, -896.0], [17.5, 35.0]]), "float8_e4m3fn")
    np.testing.assert_array_equal(result.values.astype(np.float32), [[448, -448], [18, 18]])
    np.testing.assert_array_equal(result.scale, [1, 2])


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (129, 33)])
def test_int8_error_is_at_most_half_a_scale(shape):
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    matrix *= np.geomspace(1e-6, 1e3, shape[1], dtype=np.float32)
    result = quantized.quantize(jnp.asarray(matrix), "int8")
    error = np.abs(np.asarray(quantized.dequantize(result)) - matrix)
    # Rounding 127 scales in float32 adds 127 · 2^-24 of a scale.
    assert (error <= np.asarray(result.scale) * (0.5 + 1e-5)).all()
    # The scale is the largest value / 127, rounded to the 8 bits of bfloat16.
    np.testing.assert_allclose(result.scale, np.abs(matrix).max(0) / 127, rtol=2**-8)
    as_bfloat16 = np.asarray(result.scale).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(as_bfloat16.astype(np.float32), result.scale)


@pytest.mark.parametrize("shape", [(7, 5), (129, 33)])
def test_float8_error_is_at_most_a_sixteenth(shape):
    """Float8 has 3 fraction bits; below 2^-6 of a scale its steps are 2^-9 wide."""
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    result = quantized.quantize(jnp.asarray(matrix), "float8_e4m3fn")
    scale = np.asarray(result.scale)
    error = np.abs(np.asarray(quantized.dequantize(result)) - matrix)
    assert (error <= np.maximum(np.abs(matrix) / 16, scale * 2**-10) * (1 + 1e-5)).all()
    clipped = np.clip(matrix / scale, -448, 448)
    expected = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(result.values).astype(np.float32), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_quantized_by_itself(kind):
    """An expert 100 times smaller keeps its precision, as scales are by expert and output."""
    experts = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)
    experts[1] *= 0.01
    joined = quantized.quantize(jnp.asarray(experts), kind)
    each = [quantized.quantize(jnp.asarray(expert), kind) for expert in experts]
    np.testing.assert_array_equal(joined.values, np.stack([matrix.values for matrix in each]))
    np.testing.assert_array_equal(joined.scale, np.stack([matrix.scale for matrix in each]))
    dequantized = np.stack([quantized.dequantize(matrix) for matrix in each])
    np.testing.assert_array_equal(quantized.dequantize(joined), dequantized)
    mesh = partitioning.make_mesh(2)
    spec = jax.sharding.PartitionSpec(None, None, "model")
    shape = jax.ShapeDtypeStruct(
        (3, 8, 6), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    abstract = quantized.quantized_shape(shape, kind)
    actual = quantized.quantize(jax.device_put(jnp.ones(shape.shape), shape.sharding), kind)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    assert abstract.scale.sharding.spec == jax.sharding.PartitionSpec(None, "model")


@pytest.mark.parametrize("factor", [None, 1.0])
def test_quantized_sparse_layers(factor):
    """Logits and gradients are those of dequantized experts; routers stay in float32."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=2, num_decoder_layers=2)
    cfg = Sparse(num_experts=3, top_k=2, eval_capacity_factor=factor, min_capacity=1)
    model = network.Transformer(config, sparse=cfg)
    router = "encoder/layers_1/mlp/router/router_weights/w/kernel"
    whole = random_params_of(model)
    assert not params.is_matrix(router) and params.is_matrix(
        "decoder/layers_1/mlp/expert/wo/kernel"
    )
    assert params.frozen_dtype(router, jnp.bfloat16) == jnp.float32

    @jax.jit
    def encode(trainable, frozen):
        tokens = example_batch()["encoder_input_tokens"]
        variables = {"params": params.merge(trainable, frozen)}
        encoded = model.apply(variables, tokens, enable_dropout=False, method="encode")
        return jnp.mean(jnp.sin(encoded)), encoded

    results = []
    for transform in (lambda matrix: matrix, quantized.dequantize):
        halves = params.split(
            quantize_tree(whole, "int8", transform), [router, "token_embedder/.*"]
        )
        grads, encoded = jax.grad(encode, has_aux=True)(*halves)
        results.append([encoded, *jax.tree.leaves(grads)])
    for actual, expected in zip(*results, strict=True):
        assert largest_difference(actual, expected) < 5e-5


def test_matrices_are_those_of_attention_and_mlps():
    paths = params.flatten(random_params("molora"))
    chosen = {path for path in paths if params.is_matrix(path)}
    # Encoder: 4 in attention, 3 in the MLP. Decoder: 4 more in cross-attention.
    assert len(chosen) == 7 + 11
    others = {path.rsplit("/", 1)[-1] for path in paths.keys() - chosen}
    assert others == {"scale", "embedding", "rel_embedding", "kernel", "lora_a", "lora_b"}
    kernels = {path for path in paths.keys() - chosen if path.endswith("kernel")}
    assert all("router" in path or path == "decoder/logits_dense/kernel" for path in kernels)


@pytest.mark.parametrize(("method", "kind"), [*zip(PEFT_METHODS, 2 * KINDS, strict=True)])
def test_loss_and_gradients_equal_those_of_dequantized_matrices(method, kind):
    frozen, plain = (
        params.split(quantize_tree(random_params(method), kind, transform), [ADAPTER])[1]
        for transform in (lambda matrix: matrix, quantized.dequantize)
    )
    trainable = params.split(random_params(method), [ADAPTER])[0]
    grad_fn = jax.jit(functools.partial(steps.grads_and_metrics, _model(method), steps.Loss()))
    (actual, metrics), (expected, plain_metrics) = (
        grad_fn(trainable, half, example_batch()) for half in (frozen, plain)
    )
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)
    actual, expected = params.flatten(actual), params.flatten(expected)
    for path, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        # The scale comes after the sum, not before it: the gradients of routers are differences
        # in which that rounding shows.
        assert largest_difference(actual[path], gradient) < 5e-5, path


def _model(method: str, **settings) -> network.Transformer:
    config = dataclasses.replace(CONFIG, **settings)
    return network.Transformer(config, METHODS[method].adapters())


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("float8_e4m3fn", 0.12)])
def test_logits_are_close_to_those_of_the_base(kind, bound):
    """Relative to the largest logit: measured 1.6 % and 7.8 %; bfloat16 activations have 1.7 %."""
    batch = example_batch()
    expected = forward("mov")(random_params("mov"), batch)
    weights, plain = (
        quantize_tree(random_params("mov"), kind, transform)
        for transform in (lambda matrix: matrix, quantized.dequantize)
    )
    logits = forward("mov")(weights, batch)
    assert largest_difference(logits, forward("mov")(plain, batch)) < 1e-5
    assert bound / 8 < largest_difference(logits, expected) < bound
    in_bfloat16 = forward("mov", dtype="bfloat16")(weights, batch)
    assert largest_difference(in_bfloat16, expected) < bound + 0.02


def test_loops_and_rematerialization():
    """A loop stacks values and scales; int8 and float8 differ in the dtype of the values alone."""
    depths = {"num_encoder_layers": 1, "num_decoder_layers": 2}
    plain = _model("mov", **depths)
    trainable, frozen = params.split(
        quantize_tree(random_params_of(plain), "int8"), METHODS["mov"].trainable
    )
    loop = _model("mov", **depths, scan_layers=True, remat_policy="minimal")
    copies = jax.tree.map(jnp.copy, frozen)
    stacked = network.stack_layers(loop, copies, stacks.stack_and_delete)
    kernel = params.flatten(stacked)["decoder/layers/mlp/wo/kernel"]
    assert kernel.values.shape == (2, 20, 16) and kernel.scale.shape == (2, 16)

    def grads(model, half):
        step = jax.jit(functools.partial(steps.grads_and_metrics, model, steps.Loss()))
        return params.flatten(step(trainable, half, example_batch())[0])

    expected = grads(plain, frozen)
    for half in (frozen, stacked):
        actual = grads(loop, half)
        for path, gradient in expected.items():
            assert largest_difference(actual[path], gradient) < 1e-5, path


@pytest.mark.parametrize("method", ["mov", "lora"])
def test_only_adapters_change_in_training(method):
    trainable, frozen = params.split(
        quantize_tree(random_params(method), "int8"), METHODS[method].trainable
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


def is_same_base(first, second):
    """Whether fingerprints are equal, and checksums unless they are of other values or unknown."""
    is_other = checksums.is_other(first.get("checksum"), second.get("checksum"))
    return {**first, "checksum": None} == {**second, "checksum": None} and not is_other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_quantized_from_stored_values(base_path, kind, dtype):
    transformer = network.Transformer(dataclasses.replace(CONFIG, dtype=dtype))
    plain, identity = models.load_base(transformer, base_path, 0)
    loaded, loaded_identity = models.load_base(transformer, base_path, 0, frozen_dtype=kind)
    assert is_same_base(loaded_identity, identity)
    expected = quantize_tree(random_params("full"), kind)
    for path, leaf in params.flatten(loaded).items():
        matrix = params.flatten(expected)[path]
        if params.is_matrix(path):
            assert leaf.dtype == kind and leaf.shape == matrix.shape and leaf.size == matrix.size
            jax.tree.map(np.testing.assert_array_equal, leaf, matrix)
        else:
            assert leaf.dtype == params.flatten(plain)[path].dtype
            np.testing.assert_array_equal(leaf, params.flatten(plain)[path])


def test_one_matrix_at_a_time_is_float32(base_path, monkeypatch):
    """Counts live arrays of the matrices' shapes whenever a matrix is quantized."""
    shapes = {(16, 12), (12, 16), (16, 20), (20, 16)}
    alive = []
    quantize = quantized.quantize

    def count_alive():
        return sum(a.shape in shapes and a.dtype == jnp.float32 for a in jax.live_arrays())

    def count_and_quantize(matrix, dtype):
        alive.append(count_alive())
        return quantize(matrix, dtype)

    before = count_alive()
    monkeypatch.setattr(quantized, "quantize", count_and_quantize)
    for path in (base_path, None):
        # Bound to a name: an array that is not referenced is not alive.
        base = models.load_base(network.Transformer(CONFIG), path, 0, frozen_dtype="int8")
        assert base
    assert len(alive) == 36 and max(alive) - before <= 1


def test_a_random_base_has_the_same_identity():
    transformer = network.Transformer(CONFIG)
    plain, identity = models.load_base(transformer, None, 3)
    loaded, loaded_identity = models.load_base(transformer, None, 3, frozen_dtype="int8")
    assert loaded_identity == identity and identity["fingerprint"] == params.fingerprint(plain)
    jax.tree.map(np.testing.assert_array_equal, loaded, quantize_tree(plain, "int8"))


def test_trainable_parameters_stay_float32(base_path):
    wo = "encoder/layers_0/mlp/wo/kernel"
    loaded, _ = models.load_base(
        network.Transformer(CONFIG), base_path, 0, wo.__eq__, frozen_dtype="int8"
    )
    assert params.flatten(loaded)[wo].dtype == jnp.float32
    assert params.flatten(loaded)[wo.replace("encoder", "decoder")].dtype == jnp.int8


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize("fsdp", [False, True])
def test_sharding_is_that_of_the_matrix(base_path, from_file, fsdp):
    """On two devices values are sharded as the matrix, scales as its last axis; bits are equal."""
    model_parallelism = 1 if fsdp else 2
    mesh, rules = partitioning.make_mesh(model_parallelism), partitioning.axis_rules(fsdp)
    transformer = _model("full")
    shapes = params.flatten(network.param_shapes(transformer))
    shardings = partitioning.param_shardings(mesh, rules, network.param_axes(transformer), shapes)
    path = base_path if from_file else None
    sharded, identity = models.load_base(
        transformer, path, 0, shardings=shardings, frozen_dtype="int8"
    )
    whole, expected = models.load_base(transformer, path, 0, frozen_dtype="int8")
    assert is_same_base(identity, expected)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    wi = params.flatten(sharded)["encoder/layers_0/mlp/wi_0/kernel"]  # [D, F]
    assert wi.values.sharding == shardings["encoder/layers_0/mlp/wi_0/kernel"]
    # [16, 20] over two: F by model parallelism, D by FSDP
    half = ((8, 20), (20,)) if fsdp else ((16, 10), (10,))
    shards = (wi.values.addressable_shards[0], wi.scale.addressable_shards[0])
    assert tuple(shard.data.shape for shard in shards) == half
    if not from_file:
        return  # arrays and shardings are equal, so the loss need not be computed again
    batch = example_batch()
    with partitioning.use_mesh(mesh, rules):
        actual = steps.make_eval_step(transformer, steps.Loss())({}, sharded, batch)
    expected = steps.make_eval_step(transformer, steps.Loss())({}, whole, batch)
    np.testing.assert_allclose(actual["nll"], expected["nll"], rtol=1e-6)


def test_a_plan_counts_the_bytes_of_quantized_matrices():

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
    # Two bytes a value in bfloat16; one in int8, and four for each scale.
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


def test_a_run_records_its_frozen_dtype_and_is_evaluated_with_it(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert trained(folder, "lora", run) == 0
    assert "matrices     int8 (frozen)" in capsys.readouterr().out
    recorded = runs.read_record(str(run)).base
    assert recorded["frozen_dtype"] == "int8"
    stored = base_lib.open_base(folder / "base.safetensors")
    assert recorded["fingerprint"] == stored.fingerprint()

    # resuming with another type is an error
    assert trained(folder, "lora", run, TRAIN_STEPS=3, FROZEN_DTYPE="activations") == 1
    assert "FROZEN_DTYPE int8 -> activations: change" in capsys.readouterr().err

    # bit for bit as read before training
    matrix = "encoder/layers_0/mlp/wo/kernel"
    loaded = params.flatten(models.open_model(str(run)).load())
    expected = quantized.quantize(jnp.asarray(stored.arrays[matrix].read()), "int8")
    jax.tree.map(np.testing.assert_array_equal, loaded[matrix], expected)
    opened = models.open_models(str(run), frozen_dtype="activations")[0]
    assert params.flatten(opened.load())[matrix].dtype == jnp.float32

    adapter = tmp_path / "adapter"
    assert convert.main(["adapter", str(run), str(adapter)]) == 0
    assert models.open_model(str(adapter)).frozen_dtype == "int8"
    merged = tmp_path / "merged.safetensors"
    assert convert.main(["base", str(run), str(merged)]) == 0
    assert "was trained with its base in int8; the output" in capsys.readouterr().out
    untouched = "encoder/layers_0/mlp/wi_1/kernel"  # LoRA has no site there
    written = base_lib.open_base(merged).arrays[untouched].read()
    np.testing.assert_array_equal(written, stored.arrays[untouched].read())

    def evaluated(name: str, **macros) -> dict:
        settings = {"CHECKPOINT_PATH": run, "EVAL_OUTPUT_DIR": tmp_path / name, **macros}
        argv = ["--gin_file=runs/evaluate.gin", *flags(folder, **settings)]
        assert evaluate.main(argv) == 0
        assert "(frozen" in (tmp_path / name / "results.md").read_text() or "act" in name
        return json.loads((tmp_path / name / "results.json").read_text())["runs"][0]

    assert evaluated("as_trained")["frozen"] == "int8"
    assert evaluated("float8", FROZEN_DTYPE="float8_e4m3fn")["frozen"] == "float8_e4m3fn"
    assert "frozen" not in evaluated("activations", FROZEN_DTYPE="activations")


@pytest.mark.parametrize(
    ("method", "frozen_dtype", "message"),
    [
        ("full", "int8", "FROZEN_DTYPE must be 'activations' for full, which trains all"),
        ("mov", "int4", "FROZEN_DTYPE must be one of ['activations', 'int8', 'float8_e4m3fn']"),
    ],
)
def test_wrong_settings(folder, tmp_path, capsys, method, frozen_dtype, message):
    assert trained(folder, method, tmp_path / "run", FROZEN_DTYPE=frozen_dtype) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_whole_model_has_nothing_frozen(base_path, tmp_path):
    record = Record(
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
