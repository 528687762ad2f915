"""Compares a step in T5X with one of `pemoe train`, from the same parameters and batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
import sparse_models
from programs import flat

from pemoe_jax.core import network, optim, params, steps
from pemoe_jax.core.adapters import Adapters
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Router

RATE = 0.02
EXACT = 1e-13  # relative, in double precision
UPDATES = 1e-9  # of the parameters' change; T5X keeps the learning rate in float32
ROUTING = {
    "soft": {},
    "top_2_balanced": {"top_k": 2, "balance_loss": 0.05, "z_loss": 0.01},
}


class Vocabulary:
    """The attributes of a seqio vocabulary that the model reads."""

    vocab_size = methods.CONFIG.vocab_size
    eos_id = 1


@functools.cache
def module(method: str, routing: str = "soft", dtype: str = "float32") -> network.Transformer:
    chosen = methods.METHODS[method]
    kwargs = {}
    if chosen.routed:
        router = functools.partial(Router, **ROUTING[routing])
        kwargs = {"num_experts": methods.EXPERTS, "router": router}
    adapters = Adapters(
        **{site: functools.partial(chosen.expert, **kwargs) for site in chosen.sites}
    )
    return methods.model("full", dtype=dtype).clone(adapters=adapters)


def model(net, optimizer=optim.adafactor, trainable=(methods.ADAPTER,), **settings):
    """Returns the network as T5X's model."""
    from pemoe_jax.t5x_bridge.model import EncoderDecoderModel
    from pemoe_jax.t5x_bridge.optimizer import FrozenBase

    definition = FrozenBase(optimizer, trainable)
    return EncoderDecoderModel(
        net, Vocabulary(), Vocabulary(), definition, trainable=trainable, **settings
    )


def batches() -> dict[str, dict]:
    plain = methods.example_batch()
    return {"plain": plain, "packed": methods.pack(plain)}


@pytest.fixture
def double_precision(monkeypatch):
    """Replaces float32 by float64, in T5X and in this package."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("method", "factor", "batch"),
    [
        ("lora", None, "plain"),
        ("molora", 7.0, "packed"),
        *(("mov", factor, batch) for factor in steps.NORMALIZERS for batch in ("plain", "packed")),
    ],
)
def test_loss_and_gradients(double_precision, method, factor, batch):
    """In double precision, so that any difference is one of the computation.

    In float32 the rounding of either program, which changes with its compilation, is up to 1e-6 of
    an array's largest magnitude, and 5e-6 for routers, whose gradients are small differences.
    """
    net, batch = module(method, "top_2_balanced", jnp.float64), batches()[batch]
    start = jax.tree.map(lambda array: array.astype(jnp.float64), methods.random_params(method))
    settings = {"z_loss": 1e-3, "label_smoothing": 0.1, "loss_normalizing_factor": factor}
    trained, frozen = params.split(start, [methods.ADAPTER])
    loss = steps.Loss(**settings)
    expected, metrics_here = jax.jit(functools.partial(steps.grads_and_metrics, net, loss))(
        trained, frozen, batch
    )

    bridged = model(net, **settings)
    theirs = jax.jit(jax.value_and_grad(bridged.loss_fn, has_aux=True), static_argnums=2)
    (loss, metrics), grads = theirs(start, batch, None)
    assert float(loss) == pytest.approx(float(metrics_here["loss"]), rel=EXACT)
    assert float(metrics["loss"].compute()) == pytest.approx(float(metrics_here["loss"]), rel=EXACT)
    actual = flat(grads)
    for path, gradient in flat(expected).items():
        assert methods.largest_difference(actual.pop(path), gradient) < EXACT, path
    assert actual and not any(gradient.any() for gradient in actual.values())  # frozen


def test_losses_and_metrics_of_sparse_layers():
    """A model with sparse layers and adapters' routers, each with its own mean."""
    net, start = sparse_models.model("switch", "mov"), sparse_models.parameters("switch", "mov")
    batch = methods.example_batch()
    _, expected = jax.jit(functools.partial(steps.grads_and_metrics, net, steps.Loss(), {}))(
        start, batch
    )
    bridged = model(net, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    loss, metrics = jax.jit(bridged.loss_fn, static_argnums=2)(start, batch, None)
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-6)
    by_name = steps.summarize_routers(steps.router_paths(net), expected, "sites")
    for name, value in by_name.items():
        assert float(metrics[f"router/{name}"].compute()) == pytest.approx(float(value), rel=1e-5)
    assert {"decoder/mlp/experts/used", "dropped", "encoder/mlp/gate/load"} < by_name.keys()


def test_layers_as_a_loop():
    """T5X passes parameters layer by layer; they are stacked within its step."""
    net, batch, start = module("mov"), batches()["packed"], methods.random_params("mov")
    config = dataclasses.replace(net.config, scan_layers=True, remat_policy="minimal")
    (expected, expected_grads), (loss, grads) = (
        jax.jit(jax.value_and_grad(lambda p, b, net=each: model(net).loss_fn(p, b, None)[0]))(
            start, batch
        )
        for each in (net, net.clone(config=config))
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    actual = flat(grads)
    for path, gradient in flat(expected_grads).items():
        if gradient.any():
            assert methods.largest_difference(actual[path], gradient) < 1e-5, path
        else:
            assert not actual[path].any(), path


# Adam scales a gradient of mere rounding to a full step, unless eps is larger.
ADAMW = functools.partial(optim.adamw, eps=0.1)


@pytest.mark.parametrize("optimizer", [optim.adafactor, ADAMW], ids=["adafactor", "adamw"])
@pytest.mark.parametrize("method", ["full", "lora", "mov"])
def test_updates(double_precision, method, optimizer):
    """Two steps, since the states of the first are zeros."""
    from t5x import trainer

    trainable = list(methods.METHODS[method].trainable)
    net, batch = module(method, dtype=jnp.float64), methods.example_batch()
    start = jax.tree.map(lambda array: array.astype(jnp.float64), methods.random_params(method))
    trained, frozen = params.split(start, trainable)
    transformation = optimizer(lambda _: RATE, param_axes=network.param_axes(net))
    state = steps.TrainState.create(trained, transformation)
    step = jax.jit(functools.partial(_step, net, transformation, steps.Loss()))
    bridged = model(net, optimizer, trainable, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    theirs = _t5x_state(bridged, start)
    train = jax.jit(lambda state: trainer.train_with_lr(state, batch, RATE, None, bridged, None)[0])
    for _ in range(2):
        state = step(state, frozen, batch)
        theirs = train(theirs)
    actual = flat(theirs.params)
    for path, array in flat(state.params).items():
        moved = np.abs(array - flat(trained)[path]).max()
        assert moved > 0.0
        assert np.abs(actual[path] - array).max() < UPDATES * moved, path
    for path, array in flat(frozen).items():
        assert array.tobytes() == actual[path].tobytes(), path
    assert int(theirs.step) == 2


def _step(net, transformation, loss, state, frozen, batch):
    grads, _ = steps.grads_and_metrics(net, loss, state.params, frozen, batch)
    updates, opt_state = transformation.update(grads, state.opt_state, state.params)
    changed = jax.tree.map(jnp.add, state.params, updates)
    return steps.TrainState(step=state.step + 1, params=changed, opt_state=opt_state)


def _t5x_state(bridged, start):
    from flax.core import freeze
    from t5x import train_state

    variables = bridged.get_initial_variables(None, {})
    state = train_state.FlaxOptimTrainState.create(bridged.optimizer_def, variables)
    return state.replace_params(freeze(start))


@pytest.mark.parametrize("microbatches", [None, 2])
def test_no_gradient_of_the_base_is_formed(microbatches):
    """A step in T5X takes as many operations as here, and more if all parameters train."""
    from t5x import trainer

    def operations(trainable):
        bridged = model(module("lora"), trainable=trainable)
        state = _t5x_state(bridged, methods.random_params("lora"))
        step = jax.jit(
            lambda state: trainer.train_with_lr(
                state, methods.example_batch(), RATE, jax.random.key(0), bridged, microbatches
            )[0]
        )
        return step.lower(state).compile().cost_analysis()["flops"]

    net, loss = module("lora"), steps.Loss()
    trained, frozen = params.split(methods.random_params("lora"), [methods.ADAPTER])
    grads = jax.jit(
        lambda trained: steps.grads_and_metrics(
            net,
            loss,
            trained,
            frozen,
            methods.example_batch(),
            jax.random.key(0),
            microbatches or 1,
        )[0]
    )
    ours = grads.lower(trained).compile().cost_analysis()["flops"]
    assert operations([methods.ADAPTER]) < 1.15 * ours
    assert operations([".*"]) > 1.25 * ours


def test_initial_parameters_equal_those_of_pemoe_train():
    net = module("molora", dtype="bfloat16")
    bridged = model(net, seed=3)
    actual = flat(bridged.get_initial_variables(jax.random.key(7), {})["params"])
    expected = flat(network.init_params(net, 3, lambda _: True))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        dtype = jnp.float32 if params.is_adapter(path) else params.frozen_dtype(path, "bfloat16")
        assert actual[path].dtype == dtype
        np.testing.assert_array_equal(actual[path], array.astype(dtype))


def test_axes_of_states_are_those_of_their_parameters():
    from flax.core import freeze
    from jax.sharding import PartitionSpec

    definition = model(module("lora"), optim.adamw).optimizer_def
    start = methods.random_params("lora")
    axes = {
        path: PartitionSpec(*names) for path, names in network.param_axes(module("lora")).items()
    }
    optimizer = definition.create(freeze(start))
    derived = definition.derive_logical_axes(optimizer, freeze(params.unflatten(axes)))
    assert flat_axes(derived.target) == axes
    adapters = {path: names for path, names in axes.items() if params.is_adapter(path)}
    assert flat_axes(derived.state.param_states[0].mu) == adapters
    assert derived.state.param_states[0].count is None and derived.state.step is None


def flat_axes(tree):
    return params.flatten(tree)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"router_metrics": "all"},
            "ROUTER_METRICS must be one of 'sites', 'layers', None, got 'all'",
        ),
        ({"trainable": ["no_such/.*"]}, "TRAINABLE matched 0 of"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        _ = model(module("mov"), **settings).trainable_paths


def test_sentence_routers_are_rejected():
    router = functools.partial(Router, reads="sentence")
    expert = functools.partial(
        methods.METHODS["mov"].expert, num_experts=methods.EXPERTS, router=router
    )
    net = methods.model("full").clone(adapters=Adapters(key=expert))
    with pytest.raises(InputError, match="router at key reads sentence embeddings"):
        model(net)


def test_a_vocabulary_larger_than_the_embedding_is_rejected():
    from pemoe_jax.t5x_bridge.model import EncoderDecoderModel

    larger = type("Larger", (Vocabulary,), {"vocab_size": 33})()
    with pytest.raises(InputError, match="T5Config.vocab_size must be at least 33, .* got 32"):
        EncoderDecoderModel(module("ia3"), larger, larger)
