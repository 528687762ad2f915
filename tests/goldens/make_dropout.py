"""Writes dropout.npz: logits of T5X's minimal T5 and of flaxformer's T5 v1.1 under known masks.

The n-th mask that a network draws comes from numpy's generator with seed n, so that a network with
the same masks has the same logits. `shapes` has the masks' shapes in order. The tests read the data
only. To recreate it, in the environment of make_t5x.py with the copy of flaxformer that the paper's
code installs (ahmetustun/flaxformer on GitHub), which does not need aqt:

    PYTHONPATH=<clone of ahmetustun/flaxformer> python tests/goldens/make_dropout.py
"""

import functools
import pathlib
import zlib
from collections.abc import Sequence

import jax
import jax.experimental.pjit
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from t5x.examples.t5 import network

# Flaxformer was written for an older jax.
jax.experimental.pjit.with_sharding_constraint = jax.lax.with_sharding_constraint
from flaxformer.architectures.t5 import t5_architecture, t5_common_layers  # noqa: E402
from flaxformer.components import dense  # noqa: E402

RATE = 0.25
CONFIG = dict(
    vocab_size=40, emb_dim=12, num_heads=2, head_dim=5, mlp_dim=16,
    num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


def batch() -> dict[str, np.ndarray]:
    """Returns two rows; the second is shorter."""
    rng = np.random.default_rng(0)
    encoder = rng.integers(2, CONFIG["vocab_size"], (2, 6)).astype(np.int32)
    target = rng.integers(2, CONFIG["vocab_size"], (2, 5)).astype(np.int32)
    encoder[1, 4:] = 0
    target[1, 3:] = 0
    return {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
    }


def flaxformer() -> nn.Module:
    """Returns T5 v1.1 with the dropout of flaxformer's t5_1_1_flaxformer.gin."""
    sizes = dict(
        num_heads=CONFIG["num_heads"], head_dim=CONFIG["head_dim"], mlp_dim=CONFIG["mlp_dim"],
        activations=("gelu", "linear"), dropout_rate=RATE, dtype=jnp.float32,
    )  # fmt: skip
    logits = functools.partial(
        dense.DenseGeneral, features=CONFIG["vocab_size"], use_bias=False, dtype=jnp.float32,
        kernel_init=nn.initializers.lecun_normal(), bias_init=nn.initializers.zeros,
        kernel_axis_names=("embed", "vocab"),
    )  # fmt: skip
    return t5_architecture.EncoderDecoder(
        shared_token_embedder_factory=lambda: t5_common_layers.embedding(
            CONFIG["vocab_size"], CONFIG["emb_dim"], jnp.float32
        ),
        encoder_factory=functools.partial(
            t5_common_layers.encoder, num_layers=CONFIG["num_encoder_layers"], **sizes
        ),
        decoder_factory=functools.partial(
            t5_common_layers.decoder,
            num_layers=CONFIG["num_decoder_layers"],
            output_logits_factory=logits,
            **sizes,
        ),
        dtype=jnp.float32,
    )


def minimal() -> nn.Module:
    """Returns T5X's minimal T5 in the form of v1.1."""
    settings = dict(mlp_activations=("gelu", "linear"), dropout_rate=RATE, dtype=jnp.float32)
    return network.Transformer(network.T5Config(**CONFIG, **settings))


def params(shapes: dict) -> dict:
    """Returns parameters that depend on their paths alone."""
    arrays = {
        path: np.random.default_rng(zlib.crc32(path.encode())).normal(0.0, 0.4, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }
    return traverse_util.unflatten_dict(arrays, sep="/")


def main() -> None:
    """Applies both networks, and writes logits and shapes of masks."""
    shapes: list[tuple[int, ...]] = []

    def bernoulli(key: jax.Array, p: float, shape: Sequence[int]) -> np.ndarray:
        shapes.append(tuple(shape))
        return jnp.asarray(np.random.default_rng(len(shapes)).random(shape) < p)

    tokens, arrays = batch(), {}
    for name, model in (("t5x", minimal()), ("flaxformer", flaxformer())):
        init = functools.partial(model.init, enable_dropout=False)
        tree = jax.eval_shape(init, jax.random.key(0), **tokens)["params"]
        shapes.clear()
        drawn, jax.random.bernoulli = jax.random.bernoulli, bernoulli
        rngs = {"dropout": jax.random.key(0)}
        logits = model.apply({"params": params(tree)}, **tokens, enable_dropout=True, rngs=rngs)
        jax.random.bernoulli = drawn
        padded = [(*shape, *[1] * (4 - len(shape))) for shape in shapes]
        arrays |= {f"{name}/logits": np.asarray(logits), f"{name}/shapes": np.array(padded)}
    config = {f"config/{key}": value for key, value in CONFIG.items()}
    np.savez_compressed(
        pathlib.Path(__file__).with_name("dropout.npz"), rate=RATE, **tokens, **config, **arrays
    )


if __name__ == "__main__":
    main()
