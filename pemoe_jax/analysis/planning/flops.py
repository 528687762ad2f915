"""FLOPs of a train step by formula: its matrix products, from the shapes of the parameters.

For each token, a matrix [m, n] takes 2·m·n FLOPs forward, as many for the gradient of its input,
and as many for its own gradient if it trains. The two products of attention have no parameters;
they take 4·Lq·Lk·H·K FLOPs per row forward, twice that backward. Elementwise operations are not
counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pemoe_jax.analysis.counts import HasShape
    from pemoe_jax.core.network import T5Config


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over the whole batch. The fields are keys of `pemoe plan`'s JSON file.

    Attributes:
      forward: forward pass of the base's matrices and of attention.
      backward: gradients of their activations.
      weights: gradients of the base's trainable weights.
      adapters: adapters and their routers, forward and backward.
    """

    forward: int
    backward: int
    weights: int
    adapters: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.forward + self.backward + self.weights + self.adapters


def train_step_flops(
    config: T5Config,
    shapes: Mapping[str, HasShape],
    trainable: Collection[str],
    rows: int,
    lengths: tuple[int, int],
    router_reads: Mapping[str, str | None],
    examples: int = 1,
) -> StepFlops:
    """Computes the FLOPs of a train step.

    Args:
      shapes: path -> array or shape, of all parameters.
      rows: B.
      router_reads: site -> `Router.reads`: 'x', 'y', 'sentence', or None for the default of the
        expert module.
      examples: number of examples of equal length packed into a row; each attends to itself only.
    """
    tokens = (rows * lengths[0], rows * lengths[1])
    forward = weights = adapters = 0
    for path, leaf in shapes.items():
        flops = 2 * _multiplications(path, leaf.shape, shapes, tokens, rows, router_reads)
        if "_adapter/" in path:
            # Forward, gradient of the input, and gradient of the weights if they train.
            adapters += flops * (3 if path in trainable else 2)
        else:
            forward += flops
            weights += flops if path in trainable else 0
    inputs, targets = lengths
    pairs = config.num_encoder_layers * inputs * inputs
    pairs += config.num_decoder_layers * targets * (targets + inputs)
    attention = 4 * rows * pairs * config.num_heads * config.head_dim // examples
    return StepFlops(forward + attention, forward + 2 * attention, weights, adapters)


def _multiplications(
    path: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, HasShape],
    tokens: tuple[int, int],
    rows: int,
    router_reads: Mapping[str, str | None],
) -> int:
    """Returns how many multiplications with activations a parameter takes in a batch."""
    size = math.prod(shape)
    # Keys and values of cross-attention are projections of the encoder's output.
    reads_inputs = path.startswith("encoder/") or re.search(
        r"/encoder_decoder_attention/(key|value)(_adapter)?/", path
    )
    by_tokens = size * tokens[0 if reads_inputs else 1]
    if path.endswith("/router/kernel"):
        site = path.removesuffix("_adapter/router/kernel").rpartition("/")[2]
        vectors = shapes.get(path.replace("/router/kernel", "/vectors"))
        vectors_shape: tuple[int, ...] = () if vectors is None else vectors.shape
        reads = router_reads.get(site) or ("y" if vectors_shape else "x")
        if reads == "sentence":
            return size * rows
        # MoV at key and value: vectors [H, E, K], and one kernel [K, E] applied to each head.
        is_by_head = reads == "y" and len(vectors_shape) == 3
        return by_tokens * (vectors_shape[0] if is_by_head else 1)
    if path.endswith("/vectors"):
        # A single (IA)³ vector is an elementwise product; a mixture [.., E, ..] is a matrix.
        has_router = path.replace("/vectors", "/router/kernel") in shapes
        return by_tokens if has_router else 0
    if path.endswith(("/kernel", "/lora_a", "/lora_b")):
        return by_tokens
    return 0  # embedding lookups, norm scales and position biases
