"""Infers a T5's dimensions from its parameters' shapes; T5X checkpoints do not state them."""

import re
from collections.abc import Iterable, Mapping

from pemoe_jax.core.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def infer(shapes: Shapes, source: str = "checkpoint") -> dict[str, int]:
    """Returns the dimensions under the field names of `T5Config`.

    Args:
      shapes: path ('encoder/layers_0/attention/query/kernel') -> shape.
      source: the checkpoint, for errors.

    Raises:
      InputError: an array that determines a dimension is missing or has another rank.
    """
    layer = "encoder/layers_0"
    vocab_size, emb_dim = _matrix_shape(shapes, "token_embedder/embedding", source)
    # Kernels join heads and head_dim; only the position bias has the heads as an axis.
    num_heads, _ = _matrix_shape(shapes, "encoder/relpos_bias/rel_embedding", source)
    _, joined_kv = _matrix_shape(shapes, f"{layer}/attention/query/kernel", source)
    _, mlp_dim = _matrix_shape(shapes, f"{layer}/mlp/wi_0/kernel", source)
    if joined_kv % num_heads:
        raise InputError(
            f"{source}: expected the query's {joined_kv} columns to be a multiple of the number"
            f" of heads, got {num_heads} heads"
        )
    return {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": num_layers(shapes, "encoder"),
        "num_decoder_layers": num_layers(shapes, "decoder"),
        "head_dim": joined_kv // num_heads,
        "mlp_dim": mlp_dim,
    }


def num_layers(paths: Iterable[str], stack: str) -> int:
    """Returns the number of layers of a stack: the largest index plus one."""
    # With a gap in between, the comparison of names that follows reports the missing arrays.
    matches = (re.match(rf"{stack}/layers_(\d+)/", path) for path in paths)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _matrix_shape(shapes: Shapes, path: str, source: str) -> tuple[int, ...]:
    shape = shapes.get(path)
    if shape is None or len(shape) != 2:
        raise InputError(f"{source}: expected a T5 v1.1 with a matrix {path}, got {shape}")
    return shape
