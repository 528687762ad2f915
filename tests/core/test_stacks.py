"""Stacks as loops and with rematerialization: the same results, states and checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import (
    CONFIG,
    METHODS,
    example_batch,
    largest_difference,
    pack,
    random_params_of,
)

from pemoe_jax.analysis.planning import compiled_step
from pemoe_jax.core import network, optim, params, partitioning, quantized, stacks, steps
from pemoe_jax.core.adapters import Adapters, VectorExperts
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router
from pemoe_jax.core.sparse import Sparse

# Different depths, so that the layers of one stack cannot be taken for the other's.
DEEP = dataclasses.replace(CONFIG, num_encoder_layers=2, num_decoder_layers=1)
SLOW = pytest.mark.slow
# (scan_layers, remat_policy)
UNROLLED = (False, "none")
FORMS = [(False, "minimal"), (False, "full"), (True, "none"), (True, "minimal"), (True, "full")]


def deep(method: str, form=UNROLLED, adapters: Adapters | None = None, **settings):
    scan, remat = form
    config = dataclasses.replace(DEEP, scan_layers=scan, remat_policy=remat, **settings)
    return network.Transformer(config, adapters or METHODS[method].adapters())


@functools.cache
def halves(method: str):
    """Random (trainable, frozen) parameters."""
    return params.split(random_params_of(deep(method)), METHODS[method].trainable)


def packed_batch() -> dict[str, np.ndarray]:
    """Two rows of four sequences each."""
    rows = [pack(example_batch(seed=seed)) for seed in (0, 1)]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def run(model, trainable, frozen, rng=None, microbatches=2, batch=None):
    """Returns (gradients by path, metrics) of a packed batch in two microbatches."""
    batch = packed_batch() if batch is None else batch
    grads, metrics = _step(model, microbatches, trainable, frozen, batch, rng)
    return params.flatten(grads), metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(model, microbatches, trainable, frozen, batch, rng):
    loss = steps.Loss(z_loss=1e-3)
    return steps.grads_and_metrics(model, loss, trainable, frozen, batch, rng, microbatches)


@functools.cache
def unrolled(method: str, dropout_rate: float = 0.0):
    rng = jax.random.key(0) if dropout_rate else None
    return run(deep(method, dropout_rate=dropout_rate), *halves(method), rng)


def assert_same(actual, expected, tolerance: float = 1e-5) -> None:
    """Compares gradients and metrics, relative to the largest value of each array."""
    assert actual[0].keys() == expected[0].keys()
    for path, gradient in expected[0].items():
        assert largest_difference(actual[0][path], gradient) < tolerance, path
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(actual[1][name], value, rtol=tolerance, atol=tolerance)


FAST = [("mov", (False, "full")), ("mov", (True, "none")), ("full", (True, "full"))]
# Every form with MoV and every method in a form: forms do not depend on what a layer contains.
CASES = [
    *(("mov", form) for form in FORMS),
    ("molora", (True, "minimal")),
    ("molora", (False, "minimal")),
    ("full", (True, "full")),
    ("full", (False, "minimal")),
    ("ia3", (True, "none")),
    ("lora", (False, "full")),
]


def case(method: str, form: tuple[bool, str]):
    marks = () if (method, form) in FAST else SLOW
    name = f"{method}-{'scan' if form[0] else 'layers'}-{form[1]}"
    return pytest.param(method, form, marks=marks, id=name)


@pytest.mark.parametrize(("method", "form"), [case(*each) for each in CASES])
def test_equals_the_unrolled_form(method, form):
    """Loss, gradients and each router's statistics, with packed rows and two microbatches."""
    actual = run(deep(method, form), *halves(method))
    assert_same(actual, unrolled(method))
    if METHODS[method].routed:  # each router has its own row
        rows = np.asarray(actual[1]["routers"])
        assert len({tuple(row) for row in rows.round(6).tolist()}) == len(rows) > 10


@pytest.mark.parametrize("form", [pytest.param((False, "full"), marks=SLOW), (True, "minimal")])
def test_router_losses_reach_the_parameters(form):
    """Balance and z-losses of top-2 routers; their gradients pass through the statistics."""
    router = functools.partial(Router, top_k=2, balance_loss=0.1, z_loss=0.01)
    expert = functools.partial(VectorExperts, num_experts=3, router=router)
    adapters = Adapters(key=expert, gate=expert)
    trainable, frozen = params.split(
        random_params_of(deep("mov", adapters=adapters)), METHODS["mov"].trainable
    )
    actual, expected = (
        run(deep("mov", each, adapters), trainable, frozen, microbatches=1)
        for each in (form, UNROLLED)
    )
    assert_same(actual, expected)
    aux_loss = np.asarray(expected[1]["routers"])[:, -1]
    assert (aux_loss > 0.1).all()


@SLOW
def test_bfloat16_is_as_close_to_float32():
    """Both forms round, in different places: the gradients are 5 to 7 % from float32's."""
    exact, _ = unrolled("mov")
    size = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in exact.values()))
    distances, losses = [], []
    for form in (UNROLLED, (True, "minimal")):
        grads, metrics = run(deep("mov", form, dtype="bfloat16"), *halves("mov"))
        squares = sum(np.sum(np.square(grads[path] - exact[path])) for path in exact)
        distances.append(np.sqrt(squares) / size)
        losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert max(distances) < 0.1 and distances[1] < 1.5 * distances[0], distances


def test_dropout():
    """Rematerialization repeats the masks; a loop draws other masks."""
    rng = jax.random.key(0)
    assert_same(
        run(deep("ia3", (False, "full"), dropout_rate=0.2), *halves("ia3"), rng),
        unrolled("ia3", 0.2),
    )
    loop = deep("ia3", (True, "full"), dropout_rate=0.2)
    losses = [
        float(run(loop, *halves("ia3"), key)[1]["loss"]) for key in (rng, rng, jax.random.key(1))
    ]
    losses.append(float(unrolled("ia3", 0.2)[1]["loss"]))
    assert losses[0] == losses[1] and len(set(losses)) == 3


@SLOW
def test_layers_of_a_loop_draw_different_masks():
    """With equal layers that add nothing to the residual, only noise makes routers differ."""
    router = functools.partial(Router, jitter_noise=0.5)
    expert = functools.partial(VectorExperts, num_experts=3, router=router)
    model = deep("mov", (True, "none"), Adapters(gate=expert), dropout_rate=0.1)
    whole = params.flatten(random_params_of(model))
    equal_layers = {
        path: whole[path.replace("layers_1", "layers_0")]
        * (0 if path.endswith(("out/kernel", "wo/kernel")) else 1)
        for path in whole
    }
    trainable, frozen = params.split(params.unflatten(equal_layers), METHODS["mov"].trainable)
    _, metrics = run(model, trainable, frozen, jax.random.key(0), microbatches=1)
    entropies = np.asarray(metrics["routers"])[:, 0]
    assert len(set(entropies.round(6).tolist())) == 3


# --- sparse layers: a period of layers repeats ---

SPARSE = Sparse(num_experts=4, top_k=2, combine="normalized", balance_loss=0.1, router_z_loss=0.01)
SPARSE_PATTERNS = {"full": ["encoder/.*"], "mov": ["encoder/.*_adapter/.*", "encoder/layers_3/.*"]}


def sparse_model(method: str, form=UNROLLED, **settings) -> network.Transformer:
    """Returns a model whose encoder has four layers, the second and fourth of which are sparse."""
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=4, num_decoder_layers=2, scan_layers=form[0],
        remat_policy=form[1], **settings,
    )  # fmt: skip
    return network.Transformer(config, METHODS[method].adapters(), SPARSE)


@functools.cache
def sparse_halves(method: str):
    return params.split(random_params_of(sparse_model(method)), SPARSE_PATTERNS[method])


@functools.partial(jax.jit, static_argnums=0)
def encode_sparse(model, trainable, frozen, rng=None):
    """Returns (gradients and collections by path, loss) of the encoder with routers' losses."""
    rngs = None if rng is None else {"dropout": rng}

    def loss(trainable):
        encoded, collections = model.apply(
            {"params": params.merge(trainable, frozen)},
            example_batch()["encoder_input_tokens"],
            enable_dropout=rng is not None, rngs=rngs,
            mutable=["routers", "intermediates"], method="encode",
        )  # fmt: skip
        aux = [row[-1] for row in jax.tree.leaves(collections["routers"]) if row.shape == (6,)]
        return jnp.mean(jnp.sin(encoded)) + sum(aux), collections

    (value, collections), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
    return params.flatten({"grads": grads, **collections}), value


@functools.cache
def unrolled_sparse(method: str):
    return encode_sparse(sparse_model(method), *sparse_halves(method))[0]


def assert_same_encoder(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for path in expected:
        value = np.asarray(expected[path])
        tolerance = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=tolerance, err_msg=path)
    for name in ("dispatch", "probs"):
        assert {path[-len(name) :] for path in expected if "/mlp/" + name in path} == {name}


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("full", (True, "minimal")),
        *(pytest.param("full", form, marks=SLOW) for form in ((True, "none"), (True, "full"))),
        *(pytest.param("mov", form, marks=SLOW) for form in ((True, "none"), (False, "full"))),
    ],
)
def test_sparse_layers_equal_the_unrolled_form(method, form):
    """Gradients, statistics and probabilities of each layer."""
    actual, _ = encode_sparse(sparse_model(method, form), *sparse_halves(method))
    assert_same_encoder(actual, unrolled_sparse(method))


@SLOW
def test_dropout_of_sparse_layers():
    """Each layer of a period and each period has its own masks; a repeated key repeats them."""
    loop = sparse_model("full", (True, "full"), dropout_rate=0.5)
    keys = (jax.random.key(0), jax.random.key(0), jax.random.key(1))
    values = [float(encode_sparse(loop, *sparse_halves("full"), key)[1]) for key in keys]
    assert values[0] == values[1] != values[2]


def test_frozen_sparse_parameters_are_stacked_by_period():
    """[N / P, …] under 'layers/<j>', but not where a layer of the same j trains."""
    model = sparse_model("mov", (True, "minimal"))
    trainable, frozen = sparse_halves("mov")
    flat = params.flatten(frozen)
    wi = [np.asarray(flat[f"encoder/layers_{i}/mlp/wi_0/kernel"]) for i in (0, 2)]
    copies = jax.tree.map(jnp.array, frozen)
    stacked = params.flatten(network.stack_layers(model, copies, stacks.stack_and_delete))
    np.testing.assert_array_equal(stacked["encoder/layers/0/mlp/wi_0/kernel"], np.stack(wi))
    assert stacked["encoder/layers/0/attention/query/kernel"].shape == (2, 16, 12)
    assert stacked["decoder/layers/1/mlp/expert/wo/kernel"].shape == (1, 4, 20, 16)
    assert "encoder/layers_1/mlp/expert/wo/kernel" in stacked
    assert params.count(stacked) == params.count(frozen)
    stacked = params.unflatten(stacked)
    again = network.stack_layers(model, stacked, stacks.stack_abstract)
    assert jax.tree.structure(again) == jax.tree.structure(stacked)
    actual, _ = encode_sparse(model, trainable, stacked)
    assert_same_encoder(actual, unrolled_sparse("mov"))


@pytest.mark.parametrize(
    ("depths", "step", "stack"),
    [((3, 2), 2, "3 layers of the encoder"), ((4, 2), 4, "2 layers of the decoder")],
)
def test_sparse_step_divides_the_layers(depths, step, stack):
    config = dataclasses.replace(CONFIG, num_encoder_layers=depths[0], num_decoder_layers=depths[1])
    model = network.Transformer(config, sparse=Sparse(sparse_step=step))
    with pytest.raises(InputError, match=f"SPARSE_STEP must divide the {stack}, got {step}"):
        network.param_shapes(model)


# --- parameters ---


def test_frozen_parameters_are_stacked_once():
    """[N, …] under 'layers', except where some layers train; the stacked arrays are deleted."""
    model = deep("mov", (True, "none"))
    whole = jax.tree.map(jnp.array, random_params_of(model))
    _, frozen = params.split(whole, [r"encoder/layers_1/mlp/.*", r"decoder/.*_adapter/.*"])
    flat = params.flatten(frozen)
    queries = [np.asarray(flat[f"encoder/layers_{i}/attention/query/kernel"]) for i in range(2)]
    stacked = params.flatten(network.stack_layers(model, frozen, stacks.stack_and_delete))
    np.testing.assert_array_equal(
        stacked["encoder/layers/attention/query/kernel"], np.stack(queries)
    )
    assert stacked["decoder/layers/self_attention/query/kernel"].shape == (1, 16, 12)
    assert stacked["encoder/layers_0/mlp/wo/kernel"] is flat["encoder/layers_0/mlp/wo/kernel"]
    assert params.count(stacked) == params.count(frozen)
    for path, leaf in flat.items():
        assert leaf.is_deleted() == ("/layers_" in path and path not in stacked), path
    abstract = params.flatten(
        network.stack_layers(model, params.unflatten(stacked), stacks.stack_abstract)
    )
    assert abstract.keys() == stacked.keys()  # stacking again changes nothing


def test_stacked_parameters_equal_unrolled_ones():
    model = deep("mov", (True, "minimal"))
    trainable, frozen = halves("mov")
    copied = jax.tree.map(jnp.array, frozen)
    stacked = network.stack_layers(model, copied, stacks.stack_and_delete)
    assert_same(run(model, trainable, stacked), unrolled("mov"))


def test_quantized_matrices_are_stacked():
    """Values and scales are stacked; with a trainable matrix in a layer, all are float32."""
    matrix = jnp.asarray([[127.0, -2.0], [3.0, 4.0]])  # scales 1 and 4 / 127
    quantized_matrix = quantized.quantize(matrix, "int8")
    layers = {f"layers_{i}": {"kernel": quantized_matrix} for i in (0, 1)}
    both = stacks.stack_layers(layers, lambda _: 2)["layers"]["kernel"]
    assert both.values.shape == (2, 2, 2) and both.scale.shape == (2, 2)
    layers["layers_1"] = {"kernel": matrix}
    mixed = stacks.stack_layers(layers, lambda _: 2)["layers"]["kernel"]
    np.testing.assert_array_equal(mixed, np.stack([quantized.dequantize(quantized_matrix), matrix]))
    np.testing.assert_allclose(mixed[0], mixed[1], atol=0.02)


@SLOW
def test_a_part_of_a_stack_trains():
    patterns = [r"encoder/layers_1/.*_adapter/.*"]
    trainable, frozen = params.split(random_params_of(deep("ia3")), patterns)
    expected = run(deep("ia3"), trainable, frozen)
    assert_same(run(deep("ia3", (True, "full")), trainable, frozen), expected)
    assert all(path.startswith("encoder/layers_1/") for path in expected[0])


def test_init_and_decoding_are_unrolled():
    """A model with scan_layers has the same initial parameters, and fills the same caches."""
    loop, plain = deep("ia3", (True, "full")), deep("ia3")
    tokens = jnp.ones((1, 4), jnp.int32)
    initial = [
        jax.jit(model.init)(jax.random.key(0), tokens, tokens, tokens) for model in (loop, plain)
    ]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *initial))
    weights = random_params_of(plain)

    @functools.partial(jax.jit, static_argnums=0)
    def decode(model):
        encoded = model.apply({"params": weights}, tokens, enable_dropout=False, method="encode")
        return model.apply(
            {"params": weights}, encoded, tokens, tokens, tokens, enable_dropout=False,
            decode=True, max_decode_length=4, mutable=["cache", "cross_cache"], method="decode",
        )  # fmt: skip

    for a, b in zip(jax.tree.leaves(decode(loop)), jax.tree.leaves(decode(plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# --- on a mesh, and memory ---


def planned_step(form, method="ia3", layers=4, dtype="float32"):
    scan, remat = form
    config = dataclasses.replace(
        CONFIG,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        dtype=dtype,
        scan_layers=scan,
        remat_policy=remat,
    )
    model = network.Transformer(config, METHODS[method].adapters())
    return compiled_step.TrainStep(
        model, METHODS[method].trainable, optim.adamw(lambda _: 1e-3), 4, (64, 32)
    )


def test_shapes_of_a_planned_loop():
    """Frozen parameters are stacked, with the new axis replicated; states stay the same."""
    mesh = partitioning.make_mesh(2)
    loop, plain = (
        compiled_step.abstract_arguments(planned_step((s, "none")), mesh) for s in (True, False)
    )
    query = loop.frozen["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert query.shape == (4, 16, 12)
    assert tuple(query.sharding.spec) == (None, None, "model")
    assert loop.state == plain.state
    assert compiled_step.bytes_per_device(loop.frozen) == compiled_step.bytes_per_device(
        plain.frozen
    )


def test_a_loop_keeps_no_copy_of_its_weights():
    """No array with the shape of stacked weights is written, as residuals of the loop are."""
    text = compiled_step.compile_step(
        planned_step((True, "none")), partitioning.make_mesh(2)
    ).as_text()
    written = [line for line in text.splitlines() if "dynamic-update-slice(" in line]
    assert any("f32[4,4,64,10]" in line for line in written)  # [N, B, L, F/2]: activations are
    assert not any("f32[4,16,10]" in line for line in written)  # [N, D, F/2]: weights are not


@pytest.mark.parametrize("scan", [pytest.param(False, marks=SLOW), True])
def test_memory_of_activations_falls(scan):
    """none > minimal > full; and none takes at least twice as much as full."""
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    none, minimal, full = (
        compiled_step.compile_step(planned_step((scan, policy), layers=2 if scan else 3), mesh)
        .memory_analysis()
        .temp_size_in_bytes
        for policy in stacks.REMAT_POLICIES
    )
    assert none > minimal > full and none > 2 * full


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=SLOW) for k in ("data", "model")), "fsdp"]
)
def test_training_on_a_mesh(kind):
    """Two steps of a loop on two devices equal those of the unrolled form on one device."""
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def trained(model, mesh, rules):
        axes, shapes = network.param_axes(model), params.flatten(network.param_shapes(model))
        shardings = partitioning.param_shardings(mesh, rules, axes, shapes)
        trainable, frozen = (jax.tree.map(np.asarray, half) for half in halves("mov"))
        state = steps.TrainState.create(trainable, optimizer)
        abstract = jax.eval_shape(lambda: state)
        state_shardings = partitioning.state_shardings(abstract, shardings, mesh)
        state = partitioning.device_put(state, state_shardings)
        frozen_shardings = {path: shardings[path] for path in params.flatten(frozen)}
        frozen = partitioning.device_put(frozen, params.unflatten(frozen_shardings))
        if model.config.scan_layers:
            frozen = network.stack_layers(model, frozen, stacks.stack_and_delete)
            kernel = frozen["encoder"]["layers"]["mlp"]["wo"]["kernel"]
            layer_spec = shardings["encoder/layers_0/mlp/wo/kernel"].spec
            assert tuple(kernel.sharding.spec) == (None, *layer_spec)
        step = steps.make_train_step(model, optimizer, steps.Loss(), state_sharding=state_shardings)
        losses = []
        with partitioning.use_mesh(mesh, rules):
            for _ in range(2):
                batch = partitioning.shard_batch(packed_batch(), mesh)
                state, metrics = step(state, frozen, batch, jax.random.key(0))
                losses.append(float(metrics["loss"]))
        return losses, jax.tree.map(np.asarray, state.params)

    one_device = partitioning.make_mesh(1, jax.devices()[:1])
    expected = trained(deep("mov"), one_device, partitioning.axis_rules())
    mesh = partitioning.make_mesh(2 if kind == "model" else 1)
    rules = partitioning.axis_rules(kind == "fsdp")
    losses, state_params = trained(deep("mov", (True, "minimal")), mesh, rules)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state_params), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# --- settings ---


def test_execution_fields_are_not_part_of_the_model():
    """So a run may resume in another form, and evaluation does not depend on it."""
    loop = dataclasses.replace(DEEP, scan_layers=True, remat_policy="full")
    assert loop.as_dict() == DEEP.as_dict()
    assert network.T5Config(**loop.as_dict()) == DEEP


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scan_layers": 1}, "SCAN_LAYERS must be True or False, got 1"),
        (
            {"remat_policy": "some"},
            r"REMAT_POLICY must be one of \['none', 'minimal', 'full'\], got 'some'",
        ),
        ({"remat_policy": None}, "REMAT_POLICY must be one of .*, got None"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(DEEP, **settings)
