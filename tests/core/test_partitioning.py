"""Where things lie on a mesh of two virtual devices, and that nothing depends on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from methods import CONFIG, METHODS, example_batch, random_params

from pemoe_jax.core import network, params, partitioning, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import distributed

MESHES = {"data": (1, False), "model": (2, False), "fsdp": (1, True)}


def shardings_of(method: str, kind: str) -> tuple[network.Transformer, jax.sharding.Mesh, dict]:
    model = network.Transformer(CONFIG, METHODS[method].adapters())
    model_parallelism, fsdp = MESHES[kind]
    mesh = partitioning.make_mesh(model_parallelism)
    found = partitioning.param_shardings(
        mesh,
        partitioning.axis_rules(fsdp),
        network.param_axes(model),
        params.flatten(network.param_shapes(model)),
    )
    return model, mesh, found


def test_where_parameters_lie():
    """D 16, H·K 12, F 20, V 32 all divide by 2; E 3 is never spread."""
    _, _, found = shardings_of("molora", "model")
    layer = "encoder/layers_0"
    expected = {
        f"{layer}/attention/query/kernel": (None, "model"),
        f"{layer}/attention/out/kernel": ("model", None),
        f"{layer}/mlp/wi_0/kernel": (None, "model"),
        f"{layer}/mlp/wo/kernel": ("model", None),
        f"{layer}/mlp/wo_adapter/lora_a": ("model", None, None),
        f"{layer}/attention/query_adapter/lora_b": (None, None, "model"),
        f"{layer}/pre_mlp_layer_norm/scale": (None,),
        "token_embedder/embedding": ("model", None),
    }
    assert {path: tuple(found[path].spec) for path in expected} == expected
    _, _, spread = shardings_of("molora", "fsdp")
    assert tuple(spread[f"{layer}/attention/query/kernel"].spec) == ("data", None)
    assert tuple(spread[f"{layer}/mlp/wo/kernel"].spec) == (None, "data")


def test_what_does_not_divide_is_whole():
    mesh = partitioning.make_mesh(2)
    rules = partitioning.axis_rules()
    even = partitioning.logical_to_mesh_sharding(mesh, rules, ("heads", "kv"), (6, 5))
    odd = partitioning.logical_to_mesh_sharding(mesh, rules, ("heads", "kv"), (7, 5))
    assert (even.spec, odd.spec) == (PartitionSpec("model", None), PartitionSpec(None, None))


def test_an_axis_of_the_mesh_is_used_once():
    """vocab comes first in the rules, so that of [F, V] the vocabulary is spread."""
    mesh = partitioning.make_mesh(2)
    found = partitioning.logical_to_mesh_sharding(
        mesh, partitioning.axis_rules(), ("mlp", "vocab"), (20, 32)
    )
    assert found.spec == PartitionSpec(None, "model")


def test_a_state_lies_as_its_parameter():
    """Adam's moments as the parameters; Adafactor's rows and columns, and counts, are whole."""
    model, mesh, found = shardings_of("full", "model")
    shapes = network.param_shapes(model)
    path = "encoder/layers_0/mlp/wi_0/kernel"

    def states(optimizer):
        abstract = jax.eval_shape(optimizer.init, shapes)
        placed = partitioning.state_shardings(abstract, found, mesh)
        return {
            jax.tree_util.keystr(where): sharding.spec
            for where, sharding in jax.tree_util.tree_leaves_with_path(placed)
        }

    adam = states(optax.adam(1e-3))
    keys = "".join(f"['{part}']" for part in path.split("/"))
    assert adam[f"[0].mu{keys}"] == adam[f"[0].nu{keys}"] == PartitionSpec(None, "model")
    assert adam["[0].count"] == PartitionSpec()
    factored = states(optax.adafactor(1e-3, min_dim_size_to_factor=2))
    rows = [spec for where, spec in factored.items() if "v_row" in where]
    assert rows and not any(axis for spec in rows for axis in spec)


@pytest.mark.parametrize("method", ["full", "mov", "molora"])
def test_training_does_not_depend_on_the_mesh(method):
    """Three steps with momentum: losses and parameters of every mesh are those of one device."""

    @functools.cache
    def trained(kind: str | None):
        model, mesh, found = shardings_of(method, kind or "data")
        rules = partitioning.axis_rules(MESHES[kind or "data"][1])
        if kind is None:
            mesh = partitioning.make_mesh(1, jax.devices()[:1])
            found = {path: partitioning.replicated_sharding(mesh) for path in found}
        whole = jax.tree.map(np.asarray, random_params(method))  # a step takes its state over
        trainable, frozen = params.split(whole, METHODS[method].trainable)
        optimizer = optax.sgd(1e-3, momentum=0.9)
        state = steps.TrainState.create(trainable, optimizer)
        lies = partitioning.state_shardings(jax.eval_shape(lambda: state), found, mesh)
        state = partitioning.device_put(state, lies)
        of_frozen = {path: found[path] for path in params.flatten(frozen)}
        frozen = partitioning.device_put(frozen, params.unflatten(of_frozen))
        step = steps.make_train_step(model, optimizer, steps.Loss(), state_sharding=lies)
        losses = []
        with partitioning.use_mesh(mesh, rules):
            for _ in range(3):
                batch = partitioning.shard_batch(example_batch(), mesh)
                state, metrics = step(state, frozen, batch, jax.random.key(0))
                losses.append(float(metrics["loss"]))
        for path, leaf in params.flatten(state.params).items():
            assert leaf.sharding.is_equivalent_to(found[path], leaf.ndim), path
        return losses, jax.tree.map(np.asarray, state.params)

    alone, expected = trained(None)
    for kind in MESHES:
        losses, found = trained(kind)
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_mesh():
    target = np.stack([example_batch(seed=s)["decoder_target_tokens"] for s in (1, 2)], axis=1)
    scored = {
        "encoder_input_tokens": example_batch()["encoder_input_tokens"],
        "decoder_input_tokens": np.pad(target, ((0, 0), (0, 0), (1, 0)))[..., :-1],
        "decoder_target_tokens": target,
    }
    expected = None
    for kind in MESHES:
        model, mesh, found = shardings_of("mov", kind)
        weights = network.init_params(model, 0, lambda _: True)
        weights = partitioning.device_put(weights, params.unflatten(found))
        with partitioning.use_mesh(mesh, partitioning.axis_rules(MESHES[kind][1])):
            scores = jax.jit(functools.partial(steps.score_choices, model))(
                weights, partitioning.shard_batch(scored, mesh)
            )
        expected = np.asarray(scores) if expected is None else expected
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_shares_of_a_batch():
    """One process gives all rows, whichever way its devices lie."""
    for model_parallelism in (1, 2):
        mesh = partitioning.make_mesh(model_parallelism)
        assert partitioning.data_shard(mesh) == (0, 1)
        batch = partitioning.make_global_batch({"a": np.arange(8).reshape(4, 2)}, mesh)
        np.testing.assert_array_equal(batch["a"], np.arange(8).reshape(4, 2))


@dataclasses.dataclass(frozen=True)
class Device:
    """Of a process that is not this one."""

    process_index: int


@pytest.mark.parametrize(
    ("processes_of", "expected"),
    [
        ([[0], [0], [1], [1]], (0, 2)),  # 4 × 1: two rows each
        ([[0, 0], [1, 1]], (0, 2)),  # 2 × 2
        ([[0, 0, 1, 1]], (0, 1)),  # 1 × 4: both give every row
    ],
)
def test_shares_of_two_processes(processes_of, expected):
    grid = np.array([[Device(index) for index in row] for row in processes_of], object)

    class Mesh:
        devices = grid
        shape = {"data": grid.shape[0], "model": grid.shape[1]}

    assert partitioning.data_shard(Mesh) == expected


def test_shares_that_overlap_in_part():
    """Three devices a process on 3 × 2: the middle row is of both."""
    grid = [[Device(0), Device(0)], [Device(0), Device(1)], [Device(1), Device(1)]]

    class Mesh:
        devices = np.array(grid, object)
        shape = {"data": 3, "model": 2}

    with pytest.raises(
        InputError, match="MODEL_PARALLELISM must be a divisor or a multiple of the"
    ):
        partitioning.data_shard(Mesh)


@pytest.mark.parametrize("value", [0, 3, "2"])
def test_meshes_that_do_not_divide(value):
    with pytest.raises(InputError, match="MODEL_PARALLELISM must be a divisor of the 2 devices"):
        partitioning.make_mesh(value)


# --- processes ---


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"PEMOE_DISTRIBUTED": "1"}, {}),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
                "SLURM_STEP_NUM_TASKS": "4",
            },
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_whether_a_process_is_alone(environment, expected):
    assert distributed._arguments(environment) == expected


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID is set: expected JAX_COORDINATOR_ADDRESS"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID: expected 0 to 1, found 2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES: expected a number, found 'x'",
        ),
    ],
)
def test_environments_that_say_half(environment, says):
    with pytest.raises(InputError, match=says):
        distributed._arguments(environment)


def test_gather_gives_whole_arrays():
    mesh = partitioning.make_mesh(2)
    spread = partitioning.logical_to_mesh_sharding(mesh, partitioning.axis_rules(), ("mlp",), (4,))
    tree = {"a": jax.device_put(jnp.arange(4), spread), "b": np.ones(2)}
    found = partitioning.gather(tree)
    np.testing.assert_array_equal(found["a"], np.arange(4))
    assert isinstance(found["a"], np.ndarray)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: reset by peer\nIn call to train"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout."), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("Unknown: a word"), False),
    ],
)
def test_what_tells_of_other_processes(error, told):
    """By itself, and as what orbax's own error came of."""
    around = TimeoutError("Timed out while waiting for a barrier.")
    around.__cause__ = error
    expected = str(error).splitlines()[0] if told else None
    assert distributed._told_of_others(error) == distributed._told_of_others(around) == expected
