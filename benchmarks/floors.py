"""The least that a training step costs: operations, bytes moved, and the time of the larger."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

# Published peaks: (dense bfloat16 FLOP/s, bytes/s of memory), by what jax and torch call the chip.
CHIPS = {
    "NVIDIA H100 80GB HBM3": (989.4e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989.4e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}


def of_step(
    model: Transformer,
    shapes: Mapping[str, Any],
    trains: set[str],
    rows: int,
    lengths: Sequence[int],
    frozen_dtype: str = "activations",
    examples: int = 1,
) -> dict[str, int]:
    """Operations and bytes of one training step, of so many packed `examples` a row.

    Operations are those of the matrix products (`reports.flops`): of what is frozen the forward
    pass and the gradients of activations, of what trains its own gradient too. Bytes:

    - every parameter is read forward and again backward; of the embedding the batch's rows are
      read and written;
    - what trains: its gradient is written and read, and it and two moments are read and written,
      float32;
    - of every product [tokens, m] x [m, n] forward the input is read and the output written, and
      backward the output's gradient is read and the input's written: everything between two
      products is fused into them. Of attention so too: no logits of it are stored, and none of the
      vocabulary's [tokens, V].

    Returns:
      {'flops', 'bytes'}.
    """
    import jax.numpy as jnp

    from pemoe_jax.analysis.planning import flops
    from pemoe_jax.core import adapters
    from pemoe_jax.core import params as params_lib

    config = model.config
    described = adapters.describe(model.adapters)
    reads = {site: one["router"]["reads"] for site, one in described.items() if one.get("router")}
    found = flops.train_step_flops(config, shapes, trains, rows, tuple(lengths), reads, examples)
    operations = found.total
    width = jnp.dtype(config.dtype).itemsize
    tokens = {"encoder": rows * lengths[0], "decoder": rows * lengths[1]}
    moved = 0
    for path, leaf in shapes.items():
        size = math.prod(leaf.shape)
        own = 4 if path in trains else params_lib.frozen_dtype(path, config.dtype).itemsize
        if frozen_dtype != "activations" and path not in trains and params_lib.is_matrix(path):
            own = 1
        if path in trains:
            moved += size * 4 * (2 + 6)
        if path.startswith("token_embedder"):
            moved += 2 * sum(tokens.values()) * leaf.shape[1] * own
            continue
        moved += 2 * size * own
        if path.endswith("kernel") and "_adapter/" not in path:
            many = tokens["encoder" if _reads_encoder(path) else "decoder"]
            outputs = 0 if "logits_dense" in path else leaf.shape[1]
            moved += 2 * many * (leaf.shape[0] + outputs) * width
    return {"flops": operations, "bytes": moved}


def of_scoring(
    model: Transformer,
    shapes: Mapping[str, Any],
    inputs: int,
    choices: int,
    lengths: Sequence[int],
) -> dict[str, int]:
    """Operations and bytes of scoring every choice of some inputs, each encoded once.

    As in `of_step`, forward alone: the encoder and the keys and values that the decoder reads of it
    go over the inputs' tokens, all else of the decoder over the choices'.
    """
    import jax.numpy as jnp

    from pemoe_jax.core import params as params_lib

    config, (length, of_target) = model.config, lengths
    width = jnp.dtype(config.dtype).itemsize
    tokens = {True: inputs * length, False: inputs * choices * of_target}
    pairs = config.num_encoder_layers * inputs * length**2
    pairs += config.num_decoder_layers * tokens[False] * (of_target + length)
    operations = 4 * pairs * config.num_heads * config.head_dim
    moved = 0
    for path, leaf in shapes.items():
        own = params_lib.frozen_dtype(path, config.dtype).itemsize
        if path.startswith("token_embedder"):
            moved += sum(tokens.values()) * leaf.shape[1] * own
            continue
        moved += math.prod(leaf.shape) * own
        if path.endswith("kernel"):
            many = tokens[_reads_encoder(path)]
            operations += 2 * math.prod(leaf.shape) * many
            outputs = 0 if "logits_dense" in path else leaf.shape[1]
            moved += many * (leaf.shape[0] + outputs) * width
    return {"flops": operations, "bytes": moved}


def _reads_encoder(path: str) -> bool:
    of_cross = re.search("encoder_decoder_attention/(key|value)/", path)
    return path.startswith("encoder/") or of_cross is not None


def rates(dtype: str) -> dict[str, float]:
    """What this device does a second: published where it is known, else the best of some tries."""
    import jax
    import jax.numpy as jnp

    kind = jax.devices()[0].device_kind
    if kind in CHIPS:
        return dict(zip(("flops", "bytes"), CHIPS[kind], strict=True))
    side, many = 2048, 1 << 26
    square = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    raised = jax.jit(lambda a: a + 1, donate_argnums=0)  # in place: no page is made for it
    line = [jnp.ones(many, jnp.float32)]

    def raise_line() -> None:
        line[0] = raised(line[0]).block_until_ready()

    return {
        "flops": 2 * side**3 / _fastest(lambda: product(square).block_until_ready()),
        "bytes": 2 * many * 4 / _fastest(raise_line),
    }


def _fastest(work: Any, tries: int = 5) -> float:
    work()
    taken = []
    for _ in range(tries):
        clock = time.perf_counter()
        work()
        taken.append(time.perf_counter() - clock)
    return min(taken)


def together(of: Mapping[str, float], *found: Mapping[str, float]) -> dict[str, float]:
    """The floor of a row, at the highest rates that any side found."""
    fastest = {key: max(one[key] for one in found) for key in ("flops", "bytes")}
    return {
        "seconds": max(of[key] / fastest[key] for key in fastest),
        "flops": of["flops"],
        "flops a second": fastest["flops"],
        "bytes": of["bytes"],
        "bytes a second": fastest["bytes"],
    }
