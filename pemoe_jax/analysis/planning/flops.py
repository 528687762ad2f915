"""FLOPs of a train step by hand: those of its matrix products, from the parameters' shapes.

A matrix [m, n] takes 2·m·n a token forward, as much again for the gradient of what it read, and as
much a third time for its own gradient where it trains. The two products of attention have no
parameters: 4·Lq·Lk·H·K a row forward, twice that backward. Elementwise work is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pemoe_jax.core.network import T5Config


@dataclass(frozen=True)
class Flops:
    """Of one step over the whole batch.

    Attributes:
      forward: of the base's matrices and of attention.
      backward: gradients of activations, through the same.
      weights: gradients of what trains of the base.
      adapters: of adapters and their routers, forward and backward.
    """

    forward: int
    backward: int
    weights: int
    adapters: int

    @property
    def together(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.weights + self.adapters


def of_step(
    config: T5Config,
    shapes: Mapping[str, Any],
    trainable: Collection[str],
    rows: int,
    lengths: tuple[int, int],
    router_reads: Mapping[str, str | None],
    examples: int = 1,
) -> Flops:
    """FLOPs of a train step.

    Args:
      config: dimensions.
      shapes: path -> anything with a shape, of all parameters.
      trainable: the paths that train.
      rows: B.
      lengths: of inputs and targets.
      router_reads: site -> 'x', 'y', 'sentence' or None (the kind's own), of adapters' routers.
      examples: how many of one length are packed into a row; attention is of each to itself.
    """
    tokens = (rows * lengths[0], rows * lengths[1])
    forward = weights = adapters = 0
    for path, leaf in shapes.items():
        flops = 2 * _products(path, leaf.shape, shapes, tokens, rows, router_reads)
        if "_adapter/" in path:
            adapters += flops * (3 if path in trainable else 2)
            continue
        forward += flops
        weights += flops if path in trainable else 0
    attention = _attention(config, rows, lengths) // examples
    return Flops(forward + attention, forward + 2 * attention, weights, adapters)


def _attention(config: T5Config, rows: int, lengths: tuple[int, int]) -> int:
    inputs, targets = lengths
    pairs = config.num_encoder_layers * inputs * inputs
    pairs += config.num_decoder_layers * targets * (targets + inputs)
    return 4 * rows * pairs * config.num_heads * config.head_dim


def _products(
    path: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, Any],
    tokens: tuple[int, int],
    rows: int,
    router_reads: Mapping[str, str | None],
) -> int:
    """Multiplications of a parameter with activations, over the batch."""
    size = int(np.prod(shape, dtype=np.int64))
    of_encoder = path.startswith("encoder/") or re.search(
        r"/encoder_decoder_attention/(key|value)(_adapter)?/", path
    )
    times = size * tokens[0 if of_encoder else 1]
    if path.endswith("/router/kernel"):
        site = path.removesuffix("_adapter/router/kernel").rpartition("/")[2]
        vectors = shapes.get(path.replace("/router/kernel", "/vectors"))
        of_vectors: tuple[int, ...] = () if vectors is None else vectors.shape
        reads = router_reads.get(site) or ("y" if of_vectors else "x")
        if reads == "sentence":
            return size * rows
        by_head = reads == "y" and len(of_vectors) == 3
        return times * (of_vectors[0] if by_head else 1)
    if path.endswith("/vectors"):
        routed = path.replace("/vectors", "/router/kernel") in shapes
        return times if routed else 0
    if path.endswith(("/kernel", "/lora_a", "/lora_b")):
        return times
    return 0  # looked up, scaled or added
