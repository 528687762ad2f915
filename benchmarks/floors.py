"""Lower bounds of a training step: operations, bytes moved, and the time of the larger."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

# Name of a chip, as jax and torch report it -> its published peaks: FLOP/s of dense products in
# bfloat16, and bytes/s of its memory.
CHIPS = {
    "NVIDIA H100 80GB HBM3": (989.4e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989.4e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}
# Side of the square matrices, and length of the vector, that measure a machine's rates. They are
# large enough that the start of a program takes no time, and that the vector exceeds all caches.
SIDE, SIZE = 2048, 1 << 26


def train_step_floor(
    model: Transformer,
    shapes: Mapping[str, Any],
    trainable: set[str],
    rows: int,
    lengths: Sequence[int],
    frozen_dtype: str = "activations",
    examples: int = 1,
) -> dict[str, int]:
    """Returns {'flops', 'bytes'} of one training step with `examples` packed examples per row.

    Operations are those of the matrix products (`planning.flops`): forward pass and gradients of
    activations for frozen matrices, and the weight gradient for trainable ones. Bytes:

    - every parameter is read in the forward and in the backward pass. Of the embedding, only the
      rows of the batch's tokens are read and written;
    - for trainable parameters the gradient is written and read, and the parameter and two moments
      are read and written, in float32;
    - for every product [tokens, m] x [m, n] the input is read and the output written in the forward
      pass, the output's gradient read and the input's written in the backward pass. Everything
      between two products is fused into them, and neither attention logits nor the vocabulary's
      [tokens, V] logits are stored.
    """
    from pemoe_jax.analysis.planning import flops
    from pemoe_jax.core import adapters

    described = adapters.describe(model.adapters)
    reads = {site: d["router"]["reads"] for site, d in described.items() if d.get("router")}
    counted = flops.train_step_flops(
        model.config, shapes, trainable, rows, tuple(lengths), reads, examples, model.sparse
    )
    # If tokens choose two experts and experts have few places, some choices are not computed.
    operations = min(counted.total, counted.with_places or counted.total)
    tokens = (rows * lengths[0], rows * lengths[1])
    moved = 2 * _forward_bytes(model, shapes, tokens, trainable, frozen_dtype)
    # The gradient is moved twice, and the parameter and two moments twice each: 8 times 4 bytes.
    moved += sum(8 * 4 * math.prod(shapes[path].shape) for path in trainable)
    return {"flops": operations, "bytes": moved}


def scoring_floor(
    model: Transformer,
    shapes: Mapping[str, Any],
    inputs: int,
    choices: int,
    lengths: Sequence[int],
) -> dict[str, int]:
    """Returns {'flops', 'bytes'} of scoring all choices of inputs that are each encoded once.

    Counted as in `train_step_floor`, for the forward pass only. The encoder and the keys and values
    of cross-attention process the inputs' tokens; the rest of the decoder processes the choices'
    tokens.
    """
    from pemoe_jax.analysis.planning import flops

    config, (input_length, target_length) = model.config, lengths
    tokens = (inputs * input_length, inputs * choices * target_length)
    # Pairs of a query and a key, over all layers. Each takes a product for its logit and one for
    # its value, of two operations per feature each.
    pairs = config.num_encoder_layers * tokens[0] * input_length
    pairs += config.num_decoder_layers * tokens[1] * (target_length + input_length)
    operations = 4 * pairs * config.num_heads * config.head_dim
    for path, leaf in shapes.items():
        if path.endswith("kernel") or (path.endswith("/embedding") and _has_tied_logits(shapes)):
            products = math.prod(leaf.shape) * flops.used_share(path, model.sparse)
            operations += 2 * round(products) * tokens[0 if _reads_encoder(path) else 1]
    return {"flops": operations, "bytes": _forward_bytes(model, shapes, tokens)}


def _forward_bytes(
    model: Transformer,
    shapes: Mapping[str, Any],
    tokens: tuple[int, int],
    trainable: Collection[str] = (),
    frozen_dtype: str = "activations",
) -> int:
    """Returns the bytes that a forward pass moves; `tokens`: of the encoder and of the decoder."""
    import jax.numpy as jnp

    from pemoe_jax.analysis.planning import flops
    from pemoe_jax.core import params as params_lib

    dtype, moved = model.config.dtype, 0
    for path, leaf in shapes.items():
        itemsize = 4 if path in trainable else params_lib.frozen_dtype(path, dtype).itemsize
        if frozen_dtype != "activations" and path not in trainable and params_lib.is_matrix(path):
            itemsize = 1  # int8 or float8
        if path.startswith("token_embedder"):
            moved += sum(tokens) * leaf.shape[1] * itemsize
            # Tied logits are a product with the whole embedding.
            if _has_tied_logits(shapes):
                moved += math.prod(leaf.shape) * itemsize
                moved += tokens[1] * leaf.shape[1] * jnp.dtype(dtype).itemsize
            continue
        moved += math.prod(leaf.shape) * itemsize
        # An adapter's products are fused with those of its site.
        if path.endswith("kernel") and "_adapter/" not in path:
            num_tokens = tokens[0 if _reads_encoder(path) else 1]
            inputs, outputs = leaf.shape[-2:]
            outputs = 0 if "logits_dense" in path else outputs
            if leaf.ndim == 3:  # experts [E, in, out], each with the tokens that use it
                num_tokens = round(
                    num_tokens * leaf.shape[0] * flops.used_share(path, model.sparse)
                )
            moved += num_tokens * (inputs + outputs) * jnp.dtype(dtype).itemsize
    return moved


def _has_tied_logits(shapes: Mapping[str, Any]) -> bool:
    return "decoder/logits_dense/kernel" not in shapes


def _reads_encoder(path: str) -> bool:
    cross = re.search("encoder_decoder_attention/(key|value)/", path)
    return path.startswith("encoder/") or cross is not None


def device_rates(dtype: str) -> dict[str, float]:
    """Returns {'flops', 'bytes'} per second: a chip's published peaks, or else measured ones."""
    import jax
    import jax.numpy as jnp

    kind = jax.devices()[0].device_kind
    if kind in CHIPS:
        return dict(zip(("flops", "bytes"), CHIPS[kind], strict=True))
    # A product of n x n matrices takes 2 n^3 operations; an increment reads and writes each number.
    square = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(lambda a: a @ a)
    # In place, because fresh pages of memory would take longer than the addition.
    increment = jax.jit(lambda a: a + 1, donate_argnums=0)
    vector = jnp.ones(SIZE, jnp.float32)

    def increment_vector() -> None:
        nonlocal vector
        vector = increment(vector).block_until_ready()

    return {
        "flops": 2 * SIDE**3 / fastest_time(lambda: product(square).block_until_ready()),
        "bytes": 2 * SIZE * 4 / fastest_time(increment_vector),
    }


def fastest_time(function: Callable[[], Any], tries: int = 5) -> float:
    """Returns the seconds of the fastest of `tries` calls, after one call to warm up."""
    function()
    seconds = []
    for _ in range(tries):
        clock = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - clock)
    # Not the median, because disturbances only add time.
    return min(seconds)


def floor_time(work: Mapping[str, float], *rates: Mapping[str, float]) -> dict[str, float]:
    """Returns a row's floor: the time of `work` at the highest rates that any side measured."""
    # Each side measures the machine. The higher rate is closer to what the machine can do.
    fastest = {key: max(rate[key] for rate in rates) for key in ("flops", "bytes")}
    return {
        "seconds": max(work[key] / fastest[key] for key in fastest),
        "flops": work["flops"],
        "flops a second": fastest["flops"],
        "bytes": work["bytes"],
        "bytes a second": fastest["bytes"],
    }
