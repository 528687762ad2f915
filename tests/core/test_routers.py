"""Every shipped routing × {MoV, MoLORA}: trains, freezes, saves, restores, evaluates.

All in bfloat16, of packed rows, with an odd number of heads of an odd size, on two devices.
"""

import dataclasses
import functools

import gin
import jax
import numpy as np
import optax
import pytest
from methods import ADAPTER, CONFIG, example_batch, pack, rows, shift_right

from pemoe_jax import train
from pemoe_jax.checkpoints import models, runs
from pemoe_jax.core import adapters, network, params, partitioning, steps
from pemoe_jax.runtime import gin_flags

EXPERTS = 4
STEPS = 6
ROUTINGS = sorted(path.stem for path in (gin_flags.GIN_DIR / "routing").glob("*.gin"))
OPTIONS = {  # settings that no file has, on a file
    "top_2_renormalized": ("top_2", "renormalize"),
    "top_2_straight_through": ("top_2", "straight_through"),
}


def shipped_adapters(routing: str, method: str) -> adapters.Adapters:
    """As the gin files of a method and a routing make them."""
    file, option = OPTIONS.get(routing, (routing, None))
    files = ("models/t5_1_1_tiny.gin", f"methods/{method}.gin", f"routing/{file}.gin")
    flags = [*(f"--gin_file={name}" for name in files), f"--gin.NUM_EXPERTS={EXPERTS}"]
    flags += [f"--gin.routing.Router.{option}=True"] if option else []
    rest, bindings = gin_flags.split_bindings(flags)
    gin_flags.load_config(train.FLAGS.parse_args(rest), bindings)
    made = gin.get_configurable(adapters.Adapters)()
    return adapters.from_description(adapters.describe(made))  # free of gin's scope


def unpacked() -> dict[str, np.ndarray]:
    sentences = np.random.default_rng(5).standard_normal((4, 9)).astype(np.float32)
    return {**example_batch(), "sentence_embeddings": sentences}


def twice(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows that two devices can share."""
    return {name: np.concatenate([array, array]) for name, array in batch.items()}


def choices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    targets = np.stack([rows(rng, [5, 3], 6) for _ in range(4)])  # [4, 2, 6]
    return {
        "encoder_input_tokens": unpacked()["encoder_input_tokens"],
        "sentence_embeddings": unpacked()["sentence_embeddings"],
        "decoder_input_tokens": shift_right(targets),
        "decoder_target_tokens": targets,
    }


@pytest.mark.parametrize("method", ["mov", "molora"])
@pytest.mark.parametrize("routing", [*ROUTINGS, *OPTIONS])
def test_router(routing, method, tmp_path):
    settings = {"sentence_dim": 9, "num_heads": 3, "head_dim": 5, "dtype": "bfloat16"}
    model = network.Transformer(
        dataclasses.replace(CONFIG, **settings), shipped_adapters(routing, method)
    )
    mesh = partitioning.make_mesh(1, jax.devices()[:2])
    assert len(steps.router_paths(model)) == (8 if method == "mov" else 16)

    base, identity = models.load_base(model, None, seed=0)
    added = network.init_params(model, 1, params.is_adapter)
    trained, frozen = params.split(params.merge(added, base), (ADAPTER,))
    optimizer, loss = optax.adam(0.02), steps.Loss()
    state = steps.TrainState.create(trained, optimizer)
    before = jax.tree.map(np.array, (trained, frozen))
    state, frozen = partitioning.replicate((state, frozen), mesh)
    # sentences of packed rows are refused: test_embed.py
    batch = unpacked() if routing == "sentence" else twice(pack(example_batch()))

    # trains
    step = steps.make_train_step(model, optimizer, loss)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(
            state, frozen, partitioning.shard_batch(batch, mesh), jax.random.key(0)
        )
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    told = np.asarray(metrics["routers"])
    assert np.isfinite(told).all()
    assert (told[:, 0] <= np.log(EXPERTS) + 1e-5).all() and (told[:, 1] >= 1 - 1e-5).all()

    # freezes, and moves every adapter, routers included
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, frozen), before[1])
    moved = jax.tree.map(lambda a, b: bool((np.array(a) != b).any()), state.params, before[0])
    still = [path for path, has in params.flatten(moved).items() if not has]
    assert not still, still

    # saves, restores
    record = runs.Record(
        method=method,
        trainable=[ADAPTER],
        config=model.config.as_dict(),
        adapters=adapters.describe(model.adapters),
        base={**identity, "needed": True},
        counts={"trainable": params.count(trained), "total": params.count(state.params)},
        versions=runs.package_versions(),
        seed=1,
    )
    checkpoints = runs.RunCheckpoints(str(tmp_path / "run"))
    checkpoints.save(state, record)
    checkpoints.close()
    opened = models.open_model(str(tmp_path / "run"))
    restored = opened.load(partitioning.replicated_sharding(mesh))
    assert opened.model.adapters.sites() == model.adapters.sites()

    # evaluates: as what was trained, which is not as the start
    score = jax.jit(functools.partial(steps.score_choices, opened.model))
    scored = partitioning.shard_batch(choices(), mesh)
    scores = np.asarray(score(restored, scored))
    of_trained = np.asarray(score(params.merge(state.params, frozen), scored))
    np.testing.assert_array_equal(scores, of_trained)
    start = partitioning.replicate(params.merge(*before), mesh)
    assert np.abs(scores - np.asarray(score(start, scored))).max() > 1e-3
