"""Infers a T5's dimensions from its parameters' shapes, since T5X checkpoints do not state them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pemoe_jax.core.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

_STACKS = ("encoder", "decoder")
# Name of an MLP's first projection -> activations, those of T5 v1.1 (wi_0) and T5 1.0 (wi). They
# are defaults, since shapes do not determine activations.
_DEFAULT_ACTIVATIONS = {"wi_0": ("gelu", "linear"), "wi": ("relu",)}


def infer(shapes: Shapes, source: str = "checkpoint") -> dict[str, Any]:
    """Returns the dimensions of a model, under the field names of `T5Config`.

    Args:
      shapes: path ('encoder/layers_0/attention/query/kernel') -> shape.
      source: the checkpoint, for errors.

    Raises:
      InputError: an array that determines a dimension is missing or has another rank, the layers
        are scanned, or the query's columns are not a multiple of the number of heads.
    """
    layer = "encoder/layers_0"
    scanned = next((path for path in shapes if path.startswith("encoder/encoder/")), None)
    if scanned is not None:
        # Unstacking and renaming the arrays would not suffice: each scanned layer has its own
        # position bias, while the layers of a stack share one here.
        raise InputError(
            f"{source}: expected unscanned layers ({layer}/…), got scanned ones ({scanned})"
        )
    vocab_size, emb_dim = _array_shape(shapes, "token_embedder/embedding", source)
    # Kernels join heads and head_dim in one axis. Only the position bias has an axis of heads.
    num_heads, _ = _array_shape(shapes, "encoder/relpos_bias/rel_embedding", source)
    _, joined_kv = _array_shape(shapes, f"{layer}/attention/query/kernel", source)
    if joined_kv % num_heads:
        raise InputError(
            f"{source}: expected the query's {joined_kv} columns to be a multiple of the number"
            f" of heads, got {num_heads} heads"
        )
    # The MLP of layer 0 is sparse if every layer is, as in Switch-C: its kernels are [E, D, F].
    is_sparse = any(path.startswith(f"{layer}/mlp/expert/") for path in shapes)
    mlp, rank = (f"{layer}/mlp/expert", 3) if is_sparse else (f"{layer}/mlp", 2)
    wi = "wi" if f"{mlp}/wi/kernel" in shapes else "wi_0"
    return {
        "vocab_size": vocab_size,
        "emb_dim": emb_dim,
        "num_heads": num_heads,
        "num_encoder_layers": num_layers(shapes, "encoder"),
        "num_decoder_layers": num_layers(shapes, "decoder"),
        "head_dim": joined_kv // num_heads,
        "mlp_dim": _array_shape(shapes, f"{mlp}/{wi}/kernel", source, rank)[-1],
        "mlp_activations": _DEFAULT_ACTIVATIONS[wi],
        "logits_via_embedding": "decoder/logits_dense/kernel" not in shapes,
    }


def infer_sparse(shapes: Shapes, source: str = "checkpoint") -> dict[str, Any] | None:
    """Returns the fields of `Sparse` that shapes determine; None for a dense model.

    Raises:
      InputError: no `sparse_step` gives these sparse layers, or the experts' first kernel is
        missing or is not [E, D, F].
    """
    layers: dict[str, set[int]] = {stack: set() for stack in _STACKS}
    for path in shapes:
        if match := re.match(r"(encoder|decoder)/layers_(\d+)/mlp/(expert|router)/", path):
            layers[match[1]].add(int(match[2]))
    if not any(layers.values()):
        return None
    # Layer i is sparse if i % step == step - 1, so the first sparse layer is step - 1.
    step = 1 + min(i for indices in layers.values() for i in indices)
    depths = {stack: num_layers(shapes, stack) for stack in _STACKS}
    for stack, indices in layers.items():
        # The expected layers are counted, not listed: a damaged name may have an index of 99999999.
        if len(indices) != depths[stack] // step or any(i % step != step - 1 for i in indices):
            text = "; ".join(
                f"layers {sorted(indices)} of {depths[stack]} in the {stack}"
                for stack, indices in layers.items()
            )
            raise InputError(
                f"{source}: expected layer i of both stacks to be sparse where i % step == step - 1"
                f" (SPARSE_STEP), got sparse {text}"
            )
    expert = f"encoder/layers_{step - 1}/mlp/expert"
    wi = "wi" if f"{expert}/wi/kernel" in shapes else "wi_0"
    return {
        "num_experts": _array_shape(shapes, f"{expert}/{wi}/kernel", source, 3)[0],
        "sparse_step": step,
        "extra_mlp": any("/extra_mlp/" in path for path in shapes),
    }


def num_layers(paths: Iterable[str], stack: str) -> int:
    """Returns the number of layers of a stack: the largest index plus one."""
    # A missing index in between is found later, when names are compared with those of the model.
    matches = (re.match(rf"{stack}/layers_(\d+)/", path) for path in paths)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _array_shape(shapes: Shapes, path: str, source: str, rank: int = 2) -> tuple[int, ...]:
    """Returns the shape of an array; raises InputError if it is missing or has another rank."""
    shape = shapes.get(path)
    if shape is None or len(shape) != rank:
        kind = "a matrix" if rank == 2 else "matrices [E, in, out]"
        got = "none" if shape is None else shape
        raise InputError(f"{source}: expected a T5 with {kind} {path}, got {got}")
    return shape
