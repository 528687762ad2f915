"""FLOPs of a train step by formula: its matrix products, from the shapes of the parameters.

For each token, a matrix [m, n] takes 2·m·n FLOPs forward, as many for the gradient of its input,
and as many for its own gradient if it trains. The two products of attention have no parameters;
they take 4·Lq·Lk·H·K FLOPs per row forward, twice that backward. Elementwise operations are not
counted.

A token of a sparse layer passes through k of its E experts. What a device computes is another
number: E experts have C places each, whether they hold a token or not. Both are given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pemoe_jax.analysis.counts import HasShape
    from pemoe_jax.core.network import T5Config
    from pemoe_jax.core.sparse import Sparse

_EXPERT = "/mlp/expert/"
NOTE_ON_FLOPS = (
    "FLOPs: matrix products of an input token and of a target token together, forward, without"
    " those between tokens."
)
NOTE_ON_TOKENS = (
    "activated: the parameters that a token uses, k of E experts in each sparse layer and all"
    " others (for experts that choose tokens, as many as choose a token on average)."
    f" {NOTE_ON_FLOPS} With places: what sparse layers compute in training, E experts with C places"
    " each, filled or not."
)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over the whole batch. The fields are keys of `pemoe plan`'s JSON file.

    Attributes:
      forward: forward pass of the base's matrices and of attention.
      backward: gradients of their activations.
      weights: gradients of the base's trainable weights.
      adapters: adapters and their routers, forward and backward.
      with_places: the sum of all parts where the experts of sparse layers compute all their places;
        None for a dense model.
    """

    forward: int
    backward: int
    weights: int
    adapters: int
    with_places: int | None = None

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
    sparse: Sparse | None = None,
) -> StepFlops:
    """Computes the FLOPs of a train step.

    Args:
      shapes: path -> array or shape, of all parameters.
      rows: B.
      router_reads: site -> `Router.reads`: 'x', 'y', 'sentence', or None for the default of the
        expert module.
      examples: number of examples of equal length packed into a row; each attends to itself only.
      sparse: settings of the sparse layers; their groups are those of one device.
    """
    inputs, targets = lengths
    pairs = config.num_encoder_layers * inputs * inputs
    pairs += config.num_decoder_layers * targets * (targets + inputs)
    attention = 4 * rows * pairs * config.num_heads * config.head_dim // examples

    def step_flops(by_places: bool) -> StepFlops:
        groups = [_group_tokens(sparse, rows, length) if sparse else 0 for length in lengths]
        forward = weights = adapters = 0
        for path, leaf in shapes.items():
            tokens = (rows * inputs, rows * targets)
            products = _multiplications(path, leaf.shape, shapes, tokens, rows, router_reads)
            group = groups[0 if path.startswith("encoder/") else 1]
            flops = round(2 * products * used_share(path, sparse, group if by_places else None))
            if "_adapter/" in path:
                # Forward, gradient of the input, and gradient of the weights if they train.
                adapters += flops * (3 if path in trainable else 2)
            else:
                forward += flops
                weights += flops if path in trainable else 0
        return StepFlops(forward + attention, forward + 2 * attention, weights, adapters)

    with_places = step_flops(by_places=True).total if sparse else None
    return dataclasses.replace(step_flops(by_places=False), with_places=with_places)


def used_share(path: str, sparse: Sparse | None, group_tokens: int | None = None) -> float:
    """Returns the share of a parameter that a token uses: 1, or its experts / E.

    Args:
      group_tokens: the number of tokens of a group, for what is computed in all places of the
        experts; None for the experts that a token uses.
    """
    if sparse is None or _EXPERT not in path:
        return 1.0
    experts_choose = sparse.routing == "experts" and path.startswith("encoder/")
    tokens = group_tokens
    if tokens is None and experts_choose and sparse.capacity is None:
        tokens = 1000 * sparse.num_experts  # so many that C is not rounded
    places = None if tokens is None else sparse.group_capacity(tokens, deterministic=False)
    if experts_choose and places is not None and tokens is not None:
        return min(places, tokens) / tokens
    if places is None or tokens is None or places >= tokens:  # no limit: only tokens are computed
        return sparse.top_k / sparse.num_experts
    return places / tokens


def token_flops(
    shapes: Mapping[str, HasShape],
    router_reads: Mapping[str, str | None],
    sparse: Sparse | None = None,
) -> tuple[int, int]:
    """Returns the forward FLOPs of an input token and a target token, without attention's products.

    The second number counts all places of the experts, for groups so large that C is not rounded.
    """
    totals = [0.0, 0.0]
    group = None
    if sparse is not None and sparse.capacity is None:
        group = 1000 * sparse.num_experts
    for path, leaf in shapes.items():
        flops = 2 * _multiplications(path, leaf.shape, shapes, (1, 1), 1, router_reads)
        totals[0] += flops * used_share(path, sparse)
        totals[1] += flops * used_share(path, sparse, group)
    return round(totals[0]), round(totals[1])


def used_parameters(shapes: Mapping[str, HasShape], sparse: Sparse | None = None) -> int:
    """Returns the number of parameters that a token uses, an input token and a target token."""
    return round(sum(math.prod(s.shape) * used_share(p, sparse) for p, s in shapes.items()))


def describe_router_reads(adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Returns site -> `Router.reads` from a description by `core.adapters.describe`."""
    return {site: a["router"]["reads"] for site, a in adapters.items() if a.get("router")}


def _group_tokens(sparse: Sparse, rows: int, length: int) -> int:
    """Returns the number of tokens of a group on one device."""
    if sparse.group == "row":
        return length
    from pemoe_jax.core import dispatch

    more_rows, more_columns = dispatch.group_padding(rows, length, sparse.num_experts)
    tokens = (rows + more_rows) * (length + more_columns)
    return tokens // dispatch.num_groups(tokens, int(sparse.group), sparse.num_experts)


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
    if path == "token_embedder/embedding" and "decoder/logits_dense/kernel" not in shapes:
        return by_tokens  # the logits layer too
    return 0  # embedding lookups, norm scales and position biases
