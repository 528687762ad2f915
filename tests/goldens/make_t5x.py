"""Writes t5x_legacy.tar.gz, t5x_orbax.tar.gz and t5x_logits.npz: checkpoints written by T5X.

A small T5 v1.1 with random weights takes one step of Adafactor, so that there is an optimizer
state, and is saved by T5X in both of its formats. The logits are computed by T5X's own network
from the saved parameters. The tests read the data only. To recreate it, in a separate environment
(T5X, airio and jestimator are on GitHub only, and their requirements do not resolve):

    pip install -c constraints.txt jax flax optax orbax-checkpoint gin-config clu seqio tensorflow \
        fiddle jaxtyping cached_property chex tensorboard grain cloudpickle portpicker \
        array-record more-itertools
    pip install --no-deps <clones of google-research/t5x, google/airio, google-research/jestimator>
    python tests/goldens/make_t5x.py
"""

import pathlib
import tarfile
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from t5x import adafactor, checkpoints, partitioning, train_state
from t5x.examples.t5 import network

HERE = pathlib.Path(__file__).parent
STEP = 7
# H * K = 10 differs from D = 12, and the stacks differ in depth.
CONFIG = dict(
    vocab_size=40, emb_dim=12, num_heads=2, head_dim=5, mlp_dim=16,
    num_encoder_layers=1, num_decoder_layers=2,
)  # fmt: skip


def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns two rows; the second is shorter."""
    encoder = rng.integers(2, CONFIG["vocab_size"], (2, 6)).astype(np.int32)
    target = rng.integers(2, CONFIG["vocab_size"], (2, 5)).astype(np.int32)
    encoder[1, 4:] = 0
    target[1, 3:] = 0
    return {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
    }


def trained(model: network.Transformer, tokens: dict[str, np.ndarray]) -> train_state.TrainState:
    """Returns the state after a step with random gradients, its step set to STEP."""
    variables = model.init(jax.random.key(0), **tokens, enable_dropout=False)
    optimizer = adafactor.Adafactor(
        0.01,
        decay_rate=0.8,
        step_offset=0,
        logical_factor_rules=adafactor.standard_logical_factor_rules(),
        min_dim_size_to_factor=4,  # so that small arrays have factored states too
    )
    state = train_state.FlaxOptimTrainState.create(optimizer, variables)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), state.params)
    state = state.apply_gradient(grads, learning_rate=0.1)
    return state.replace_step(jnp.int32(STEP))


def pack(folder: pathlib.Path, archive: pathlib.Path) -> None:
    """Packs everything in a folder; the checkpoint's folder is at the top."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:gz") as tar:
        for child in sorted(folder.iterdir()):
            tar.add(child, child.name, filter=anonymous)
    print(f"{archive.name}: {archive.stat().st_size:,} bytes")


def main() -> None:
    """Trains, saves twice, and writes the logits."""
    model = network.Transformer(
        network.T5Config(
            **CONFIG, dropout_rate=0.0, mlp_activations=("gelu", "linear"),
            logits_via_embedding=False, dtype=jnp.float32,
        )
    )  # fmt: skip
    tokens = batch(np.random.default_rng(0))
    state = trained(model, tokens)
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    with tempfile.TemporaryDirectory() as temporary:
        legacy, orbax = (pathlib.Path(temporary) / name for name in ("legacy", "orbax"))
        legacy.mkdir()
        orbax.mkdir()
        checkpoints.Checkpointer(state, partitioner, str(legacy)).save(state)
        manager = checkpoints.OrbaxCheckpointManagerInterface(str(orbax), state, partitioner)
        manager.save(state)
        manager.close()
        pack(legacy, HERE / "t5x_legacy.tar.gz")
        pack(orbax, HERE / "t5x_orbax.tar.gz")
    logits = model.apply({"params": state.params}, **tokens, enable_dropout=False)
    config = {f"config/{name}": value for name, value in CONFIG.items()}
    np.savez_compressed(HERE / "t5x_logits.npz", logits=np.asarray(logits), **tokens, **config)


if __name__ == "__main__":
    main()
