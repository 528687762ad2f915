"""Shardings on a mesh of two virtual devices, and that no result depends on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from methods import CONFIG, METHODS, example_batch, random_params, random_params_of

from pemoe_jax.core import network, optim, params, partitioning, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse

# Of MoLORA's sites, one whose B is sharded as its kernel and one whose A is.
MOLORA = dataclasses.replace(METHODS["molora"], sites=("query", "wo"))
TESTED = METHODS | {"molora": MOLORA}
MESHES = {"data": (1, False), "model": (2, False), "fsdp": (1, True)}


def method_shardings(method: str, kind: str) -> tuple[network.Transformer, jax.sharding.Mesh, dict]:
    model = network.Transformer(CONFIG, TESTED[method].adapters())
    model_parallelism, fsdp = MESHES[kind]
    mesh = partitioning.make_mesh(model_parallelism)
    shardings = partitioning.param_shardings(
        mesh,
        partitioning.axis_rules(fsdp),
        network.param_axes(model),
        params.flatten(network.param_shapes(model)),
    )
    return model, mesh, shardings


def test_param_shardings():
    """D 16, H·K 12, F 20 and V 32 are multiples of 2; E 3 is never sharded."""
    _, _, shardings = method_shardings("molora", "model")
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
    assert {path: tuple(shardings[path].spec) for path in expected} == expected
    _, _, fsdp = method_shardings("molora", "fsdp")
    assert tuple(fsdp[f"{layer}/attention/query/kernel"].spec) == ("data", None)
    assert tuple(fsdp[f"{layer}/mlp/wo/kernel"].spec) == (None, "data")


def test_axes_that_do_not_divide_are_replicated():
    mesh = partitioning.make_mesh(2)
    rules = partitioning.axis_rules()
    even = partitioning.logical_to_mesh_sharding(mesh, rules, ("heads", "kv"), (6, 5))
    odd = partitioning.logical_to_mesh_sharding(mesh, rules, ("heads", "kv"), (7, 5))
    assert (even.spec, odd.spec) == (PartitionSpec("model", None), PartitionSpec(None, None))


def test_a_mesh_axis_is_used_once():
    """vocab comes first in the rules, so V of [F, V] is sharded."""
    mesh = partitioning.make_mesh(2)
    sharding = partitioning.logical_to_mesh_sharding(
        mesh, partitioning.axis_rules(), ("mlp", "vocab"), (20, 32)
    )
    assert sharding.spec == PartitionSpec(None, "model")


def test_states_are_sharded_as_their_parameters():
    """Adam's moments; Adafactor's rows and columns, and counts, are replicated."""
    model, mesh, shardings = method_shardings("full", "model")
    shapes = network.param_shapes(model)
    path = "encoder/layers_0/mlp/wi_0/kernel"

    def states(optimizer):
        abstract = jax.eval_shape(optimizer.init, shapes)
        tree = partitioning.state_shardings(abstract, shardings, mesh)
        return {
            jax.tree_util.keystr(key_path): sharding.spec
            for key_path, sharding in jax.tree_util.tree_leaves_with_path(tree)
        }

    adam = states(optax.adam(1e-3))
    keys = "".join(f"['{part}']" for part in path.split("/"))
    assert adam[f"[0].mu{keys}"] == adam[f"[0].nu{keys}"] == PartitionSpec(None, "model")
    assert adam["[0].count"] == PartitionSpec()
    factored = states(optax.adafactor(1e-3, min_dim_size_to_factor=2))
    rows = [spec for name, spec in factored.items() if "v_row" in name]
    assert rows and not any(axis for spec in rows for axis in spec)


def test_factored_states_of_experts_are_on_their_devices():
    """Else a step would gather Adafactor's rows and columns of all experts."""
    mesh = partitioning.make_mesh(1, jax.devices()[:2], expert_parallelism=2)
    path, axes = "encoder/layers_1/mlp/expert/wo/kernel", ("expert", "mlp", "embed")
    shapes = {path: jax.ShapeDtypeStruct((4, 256, 128), jnp.float32)}
    shardings = partitioning.param_shardings(mesh, partitioning.axis_rules(), {path: axes}, shapes)
    optimizer = optim.adafactor(lambda _: 1e-3, param_axes={path: axes})
    abstract = jax.eval_shape(optimizer.init, params.unflatten(shapes))
    states = jax.tree.leaves(abstract)
    specs = [
        s.spec for s in jax.tree.leaves(partitioning.state_shardings(abstract, shardings, mesh))
    ]
    by_shape = {leaf.shape: spec for leaf, spec in zip(states, specs, strict=True)}
    assert by_shape[4, 256] == by_shape[4, 128] == PartitionSpec("expert")
    assert by_shape[()] == PartitionSpec()


# Every mesh with everything trainable; adapters where their own axes are sharded.
@pytest.mark.parametrize(
    ("method", "kinds"),
    [("full", tuple(MESHES)), ("mov", ("model",)), ("molora", ("model", "fsdp"))],
)
def test_training_does_not_depend_on_the_mesh(method, kinds):
    """Two steps with momentum: losses and parameters on every mesh are those on one device."""

    def train(kind: str | None):
        model, mesh, shardings = method_shardings(method, kind or "data")
        rules = partitioning.axis_rules(MESHES[kind or "data"][1])
        if kind is None:
            mesh = partitioning.make_mesh(1, jax.devices()[:1])
            shardings = {path: partitioning.replicated_sharding(mesh) for path in shardings}
        whole = jax.tree.map(np.asarray, random_params_of(model))  # a step donates its state
        trainable, frozen = params.split(whole, METHODS[method].trainable)
        optimizer = optax.sgd(1e-3, momentum=0.9)
        state = steps.TrainState.create(trainable, optimizer)
        abstract = jax.eval_shape(lambda: state)
        state_shardings = partitioning.state_shardings(abstract, shardings, mesh)
        state = partitioning.device_put(state, state_shardings)
        frozen_shardings = {path: shardings[path] for path in params.flatten(frozen)}
        frozen = partitioning.device_put(frozen, params.unflatten(frozen_shardings))
        step = steps.make_train_step(model, optimizer, steps.Loss(), state_sharding=state_shardings)
        losses = []
        with partitioning.use_mesh(mesh, rules):
            for _ in range(2):
                batch = partitioning.shard_batch(example_batch(), mesh)
                state, metrics = step(state, frozen, batch, jax.random.key(0))
                losses.append(float(metrics["loss"]))
        for path, leaf in params.flatten(state.params).items():
            assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
        return losses, jax.tree.map(np.asarray, state.params)

    expected_losses, expected = train(None)
    for kind in kinds:
        losses, actual = train(kind)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
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
        model, mesh, shardings = method_shardings("mov", kind)
        weights = partitioning.device_put(random_params("mov"), params.unflatten(shardings))
        with partitioning.use_mesh(mesh, partitioning.axis_rules(MESHES[kind][1])):
            scores = jax.jit(functools.partial(steps.score_choices, model))(
                weights, partitioning.shard_batch(scored, mesh)
            )
        expected = np.asarray(scores) if expected is None else expected
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_one_process_reads_all_rows():
    for model_parallelism in (1, 2):
        mesh = partitioning.make_mesh(model_parallelism)
        assert partitioning.data_shard(mesh) == (0, 1)
        batch = partitioning.make_global_batch({"a": np.arange(8).reshape(4, 2)}, mesh)
        np.testing.assert_array_equal(batch["a"], np.arange(8).reshape(4, 2))


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of another process."""

    process_index: int


@pytest.mark.parametrize(
    ("process_grid", "expected"),
    [
        ([[0], [0], [1], [1]], (0, 2)),  # 4 × 1: two rows each
        ([[0, 0], [1, 1]], (0, 2)),  # 2 × 2
        ([[0, 0, 1, 1]], (0, 1)),  # 1 × 4: both read every row
    ],
)
def test_shards_of_two_processes(process_grid, expected):
    grid = np.array([[Device(index) for index in row] for row in process_grid], object)

    class Mesh:
        devices = grid
        shape = {"data": grid.shape[0], "model": grid.shape[1]}

    assert partitioning.data_shard(Mesh) == expected


def test_shards_that_overlap_in_part():
    """Three devices for each process on 3 × 2: the middle row belongs to both."""
    grid = [[Device(0), Device(0)], [Device(0), Device(1)], [Device(1), Device(1)]]

    class Mesh:
        devices = np.array(grid, object)
        shape = {"data": 3, "model": 2}

    with pytest.raises(
        InputError, match="MODEL_PARALLELISM must be a divisor or a multiple of the"
    ):
        partitioning.data_shard(Mesh)


@pytest.mark.parametrize("value", [0, 3, "2"])
def test_parallelism_divides_the_devices(value):
    with pytest.raises(InputError, match="MODEL_PARALLELISM must be a divisor of the 2 devices"):
        partitioning.make_mesh(value)
    with pytest.raises(InputError, match="EXPERT_PARALLELISM must be a divisor of the 2 devices"):
        partitioning.MeshConfig(expert_parallelism=value).make_mesh()
    message = "EXPERT_PARALLELISM must be a divisor of the 1 devices that MODEL_PARALLELISM leaves"
    with pytest.raises(InputError, match=message):
        partitioning.make_mesh(2, expert_parallelism=2)


def sparse_shardings(num_experts: int | None, devices: int, fsdp: bool = False, **sizes):
    """Returns path -> partition spec of a model with MoV of 4 experts; None: no sparse layers."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=2, num_decoder_layers=2)
    sparse = None if num_experts is None else Sparse(num_experts=num_experts)
    model = network.Transformer(config, METHODS["mov"].adapters(num_experts=4), sparse)
    axes, shapes = network.param_axes(model), params.flatten(network.param_shapes(model))
    mesh = jax.sharding.AbstractMesh((devices, *sizes.values()), ("data", *sizes))
    rules = partitioning.axis_rules(fsdp)
    shardings = partitioning.param_shardings(mesh, rules, axes, shapes)
    return {path: tuple(sharding.spec) for path, sharding in shardings.items()}


def test_experts_are_spread_over_their_axis():
    """F is sharded over `model`, with FSDP D over `data`; experts of adapters are replicated."""
    specs = sparse_shardings(8, 2, fsdp=True, expert=4, model=2)
    layer = "encoder/layers_1"
    assert specs[f"{layer}/mlp/expert/wi_0/kernel"] == ("expert", "data", "model")
    assert specs[f"{layer}/mlp/expert/wo/kernel"] == ("expert", "model", "data")
    assert specs[f"{layer}/mlp/router/router_weights/w/kernel"] == ("data", None)
    vectors = {spec for path, spec in specs.items() if path.endswith("key_adapter/vectors")}
    assert vectors == {("model", None, None)}
    assert "expert" not in specs["encoder/layers_0/mlp/gate_adapter/vectors"]


@pytest.mark.parametrize(
    ("num_experts", "message"),
    [
        (6, r"EXPERT_PARALLELISM must be a divisor of NUM_EXPERTS \(6\), got 4"),
        (None, "EXPERT_PARALLELISM must be 1 for a model without sparse layers, got 4"),
    ],
)
def test_experts_that_cannot_be_spread(num_experts, message):
    with pytest.raises(InputError, match=message):
        sparse_shardings(num_experts, 1, expert=4, model=1)


def test_gather_returns_whole_arrays():
    mesh = partitioning.make_mesh(2)
    sharding = partitioning.logical_to_mesh_sharding(
        mesh, partitioning.axis_rules(), ("mlp",), (4,)
    )
    tree = {"a": jax.device_put(jnp.arange(4), sharding), "b": np.ones(2)}
    gathered = partitioning.gather(tree)
    np.testing.assert_array_equal(gathered["a"], np.arange(4))
    assert isinstance(gathered["a"], np.ndarray)
