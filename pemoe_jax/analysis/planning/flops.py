"""FLOPs of a train step by formula: its matrix products, from the shapes of the parameters.

For each token, a matrix [m, n] takes 2·m·n FLOPs forward, as many for the gradient of its input,
and as many for its own gradient if it trains. Attention also has two products without parameters,
of queries with keys and of probabilities with values. In a row of Lq queries and Lk keys, with H
heads of size K, they take 4·Lq·Lk·H·K FLOPs forward and twice that backward. Elementwise operations
are not counted.

Sparse layers are counted in two ways. The first counts the k of E experts that a token passes
through. The second counts the C places (capacity slots) of each of the E experts, all of which a
device computes, whether they hold a token or not.
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

_EXPERT = "/mlp/expert/"  # in the paths of stacked experts, [E, …], but not of their router
NOTE_ON_FLOPS = (
    "FLOPs: matrix products of the forward pass for an input token and a target token together,"
    " without those between tokens."
)
NOTE_ON_TOKENS = (
    "activated: the parameters that a token uses, namely k of E experts in each sparse layer (or as"
    " many as choose a token on average, if experts choose tokens) and all parameters of other"
    f" layers. {NOTE_ON_FLOPS} With places: the FLOPs if each of the E experts of a sparse layer"
    " computes all of its C places, filled or not, as in training."
)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over the whole batch. The fields are keys of `pemoe plan`'s JSON file.

    Attributes:
      forward: forward pass of the base's matrices and of attention.
      backward: gradients of the activations in this forward pass.
      weights: gradients of the base's trainable weights.
      adapters: adapters and their routers, forward and backward.
      with_places: the total if all places of the experts are counted; None for a dense model.
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
      config: dimensions of the model.
      shapes: path -> array or shape of every parameter.
      trainable: paths of the parameters that train.
      rows: B, the number of rows of a batch.
      lengths: numbers of input and target tokens of a row.
      router_reads: site -> `Router.reads`: 'x', 'y', 'sentence', or None for the default of the
        expert module.
      examples: number of examples of equal length packed into a row; each attends to itself only.
      sparse: settings of the sparse layers; None for a dense model. Tokens are grouped as on one
        device.
    """
    inputs, targets = lengths
    # Pairs of a query and a key: the decoder attends to targets and to inputs. Masked pairs are
    # computed, so they count: causal attention does not halve them.
    pairs = config.num_encoder_layers * inputs * inputs
    pairs += config.num_decoder_layers * targets * (targets + inputs)
    attention = 4 * rows * pairs * config.num_heads * config.head_dim // examples

    def step_flops(by_places: bool) -> StepFlops:
        groups = [tokens_per_group(sparse, rows, length) if sparse else 0 for length in lengths]
        forward = weights = adapters = 0
        for path, leaf in shapes.items():
            tokens = (rows * inputs, rows * targets)
            products = _multiplications(path, leaf.shape, shapes, tokens, rows, router_reads)
            # `used_share` ignores the group for parameters that are not experts.
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
    """Returns the share of a parameter that a token is multiplied by: 1, or less for experts.

    Args:
      path: path of the parameter; the experts of a layer are stacked in one.
      sparse: settings of the sparse layers; None for a dense model.
      group_tokens: T, the number of tokens of a group, to count all places of the experts; None
        counts the experts that a token uses.
    """
    if sparse is None or _EXPERT not in path:
        return 1.0
    by_choice = sparse.top_k / sparse.num_experts
    experts_choose = sparse.routing == "experts" and path.startswith("encoder/")
    if group_tokens is None and experts_choose:
        group_tokens = _large_group(sparse)
    if group_tokens is None:
        return by_choice
    places = sparse.group_capacity(group_tokens, deterministic=False)
    if places is None:
        return by_choice
    if experts_choose:  # an expert chooses each token at most once
        return min(places, group_tokens) / group_tokens
    # With a place for every token there is no limit, and only chosen places are computed.
    return by_choice if places >= group_tokens else places / group_tokens


def _large_group(sparse: Sparse) -> int | None:
    """Returns a group size for which C is not rounded; None if `Sparse.capacity` sets C."""
    return 1000 * sparse.num_experts if sparse.capacity is None else None


def token_flops(
    shapes: Mapping[str, HasShape],
    router_reads: Mapping[str, str | None],
    sparse: Sparse | None = None,
) -> tuple[int, int]:
    """Returns the forward FLOPs of an input token and a target token, without attention's products.

    Returns:
      The FLOPs with the experts that a token uses, and those with all places of the experts in
      groups so large that C is not rounded. With a fixed `Sparse.capacity`, places per token depend
      on the size of the group, so the second number is the same as the first.
    """
    by_choice = by_places = 0.0
    group = None if sparse is None else _large_group(sparse)
    for path, leaf in shapes.items():
        flops = 2 * _multiplications(path, leaf.shape, shapes, (1, 1), 1, router_reads)
        by_choice += flops * used_share(path, sparse)
        by_places += flops * used_share(path, sparse, group)
    return round(by_choice), round(by_places)


def used_parameters(shapes: Mapping[str, HasShape], sparse: Sparse | None = None) -> int:
    """Returns the number of parameters that an input token and a target token use together."""
    return round(sum(math.prod(s.shape) * used_share(p, sparse) for p, s in shapes.items()))


def describe_router_reads(adapters: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """Returns site -> `Router.reads` from a description by `core.adapters.describe`."""
    return {
        site: adapter["router"]["reads"]
        for site, adapter in adapters.items()
        if adapter.get("router")
    }


def tokens_per_group(sparse: Sparse, rows: int, length: int, devices: int = 1) -> int:
    """Returns the size of a group: the number of tokens that compete for an expert's places.

    Args:
      sparse: settings of the sparse layers.
      rows: B, over all devices.
      length: number of tokens of a row.
      devices: number of parts that the mesh divides a batch into.
    """
    if sparse.group == "row":
        return length
    from pemoe_jax.core import dispatch  # imports jax, which `cost_tables` does without

    # `core.experts` forms T5X's groups in the same way: it pads the tokens to a multiple of them.
    multiple = devices * sparse.num_experts
    more_rows, more_columns = dispatch.group_padding(rows, length, multiple)
    tokens = (rows + more_rows) * (length + more_columns)
    return tokens // dispatch.num_groups(tokens, int(sparse.group), multiple)


def _multiplications(
    path: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, HasShape],
    tokens: tuple[int, int],
    rows: int,
    router_reads: Mapping[str, str | None],
) -> int:
    """Returns the number of products of an element of a parameter and an activation in a batch."""
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
        # The defaults of VectorExperts and LoRAExperts.
        reads = router_reads.get(site) or ("y" if vectors_shape else "x")
        if reads == "sentence":
            return size * rows  # one embedding for each row
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
        return by_tokens  # T5 1.0 computes the logits with the embedding
    return 0  # embedding lookups, norm scales and position biases
