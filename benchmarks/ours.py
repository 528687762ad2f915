"""A worker with our training step on random rows (see `workers.Worker`).

It uses only `pemoe_jax.core`. Its spec:

- `dimensions` and other fields of T5Config (`dtype`, `scan_layers`, `remat_policy`, `attention`,
  …); `sparse`, the fields of `sparse.Sparse`; `router_scale`, by which routers are multiplied;
- `method` with `experts`, `rank` and `fused` (for MoV); `frozen_dtype`;
- `rows` and `lengths` of inputs and targets; `packed`; `microbatches`; `optimizer`;
  `gradients_only`, to compute no update;
- `gpu`; `steps` per measurement, since a single step on a GPU is too short to time.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import common
import machine
import numpy as np
import workers

if TYPE_CHECKING:
    from pemoe_jax.core.adapters import Adapters
    from pemoe_jax.core.network import Transformer

PACKED_EXAMPLES = 4  # per row
VECTOR_SITES = ("key", "value", "gate")
LORA_SITES = ("query", "key", "value", "out", "wi_0", "wo")


def make_adapters(spec: Mapping[str, Any]) -> Adapters:
    """Returns the adapters of gin/methods; none for `full`."""
    from pemoe_jax.core import adapters, routing

    method, settings = spec.get("method", "full"), {}
    if method in ("mov", "molora"):
        settings = {"num_experts": spec.get("experts", 10), "router": routing.Router}
    if method in ("ia3", "mov"):
        settings["fused"] = spec.get("fused", False)
        factory = functools.partial(adapters.VectorExperts, **settings)
        return adapters.Adapters(**dict.fromkeys(VECTOR_SITES, factory))
    if method in ("lora", "molora"):
        settings["rank"] = spec.get("rank", 4)
        factory = functools.partial(adapters.LoRAExperts, **settings)
        return adapters.Adapters(**dict.fromkeys(LORA_SITES, factory))
    return adapters.Adapters()


def make_model(spec: Mapping[str, Any]) -> Transformer:
    """Returns the network that a spec describes."""
    from pemoe_jax.core import network, sparse

    names = ("dtype", "scan_layers", "remat_policy", "attention")
    names += ("mlp_activations", "logits_via_embedding")
    settings = {name: spec[name] for name in names if name in spec}
    config = network.T5Config(**spec["dimensions"], **settings)
    settings = spec.get("sparse")
    return network.Transformer(
        config, make_adapters(spec), None if settings is None else sparse.Sparse(**settings)
    )


def random_batch(rows: int, lengths: Sequence[int], packed: bool = False) -> dict[str, np.ndarray]:
    """Returns random arrays [rows, length], int32; a packed row has `PACKED_EXAMPLES` examples."""
    # Ids begin at 3, after padding, EOS and unknown, so that no padding reduces the work.
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(3, common.VOCAB_SIZE, (rows, length)) for length in lengths)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    if packed:
        for side, length in zip(("encoder", "decoder"), lengths, strict=True):
            columns = np.arange(length)
            segments = 1 + PACKED_EXAMPLES * columns // length
            starts = np.searchsorted(segments, segments)
            batch[f"{side}_segment_ids"] = np.broadcast_to(segments, (rows, length))
            batch[f"{side}_positions"] = np.broadcast_to(columns - starts, (rows, length))
    return {name: np.asarray(array, np.int32) for name, array in batch.items()}


def random_params(
    model: Transformer,
    trainable: Collection[str],
    frozen_dtype: str = "activations",
    router_scale: float = 1.0,
) -> dict[str, Any]:
    """Returns {path: array}: trainable parameters in float32, the others in the dtype of a run."""
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import network, quantized
    from pemoe_jax.core import params as params_lib

    # Drawn array by array, each in its own dtype, so that 11 billion parameters are never all in
    # float32.
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: Any, shape: tuple[int, ...], dtype: Any, stddev: float) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(stddev, dtype)

    def draw(path: str, shape: tuple[int, ...]) -> Any:
        frozen = params_lib.frozen_dtype(path, model.config.dtype)
        dtype = jnp.dtype(jnp.float32) if path in trainable else frozen
        if path.endswith(("scale", "vectors")):
            return jnp.ones(shape, dtype)
        stddev = 1.0 if path.startswith("token_embedder") else 1 / math.sqrt(shape[-2])
        if "/router/" in path:
            stddev *= router_scale
        # Seeded by a checksum of the path. `hash` differs between processes, and the order of the
        # parameters may change.
        array = normal(jax.random.key(zlib.crc32(path.encode())), shape, dtype, stddev)
        if frozen_dtype == "activations" or path in trainable or not params_lib.is_matrix(path):
            return array
        return quantized.quantize(array, frozen_dtype)

    shapes = params_lib.flatten(network.param_shapes(model))
    return {path: draw(path, leaf.shape) for path, leaf in shapes.items()}


def main() -> None:
    """Runs the worker."""
    worker = workers.Worker()
    spec = worker.spec
    import floors
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import network, optim, stacks, steps
    from pemoe_jax.core import params as params_lib
    from pemoe_jax.runtime import host_memory

    workers.check_gpu(spec)
    rows, lengths, model = spec["rows"], spec["lengths"], make_model(spec)
    patterns = [".*"] if spec["method"] == "full" else [params_lib.ADAPTER_PATTERN]
    shapes = params_lib.flatten(network.param_shapes(model))
    trainable = params_lib.trainable_paths(shapes, patterns)
    before = machine.memory("VmRSS")
    frozen_dtype = spec.get("frozen_dtype", "activations")
    flat = random_params(model, trainable, frozen_dtype, spec.get("router_scale", 1.0))
    trainable_params, frozen = (
        params_lib.unflatten({p: a for p, a in flat.items() if (p in trainable) == is_trainable})
        for is_trainable in (True, False)
    )
    del flat  # it would keep a second copy while layers are stacked
    if spec.get("scan_layers"):
        frozen = network.stack_layers(model, frozen, stacks.stack_and_delete)
    optimizer = getattr(optim, spec.get("optimizer", "adafactor"))(
        lambda step: jnp.asarray(3e-4), param_axes=network.param_axes(model)
    )
    state = jax.jit(lambda p: steps.TrainState.create(p, optimizer))(trainable_params)
    del trainable_params
    batch = jax.device_put(random_batch(rows, lengths, spec.get("packed", False)))
    train_step: Any = steps.make_train_step(
        model, optimizer, steps.Loss(), spec.get("microbatches", 1)
    )
    if spec.get("gradients_only"):

        @jax.jit
        def train_step(state: Any, frozen: Any, batch: Any, rng: Any) -> Any:
            return steps.grads_and_metrics(model, steps.Loss(), state.params, frozen, batch, rng)

    inputs = (frozen, batch, jax.random.key(0))
    compiled = train_step.lower(state, *inputs).compile()
    host_memory.trim_heap()

    def step() -> Any:
        nonlocal state
        for _ in range(spec.get("steps", 1)):
            result, metrics = compiled(state, *inputs)
            if not spec.get("gradients_only"):
                state = result
        jax.block_until_ready((result, metrics))
        return metrics["loss"]

    examples = PACKED_EXAMPLES if spec.get("packed") else 1
    info = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "trained": sum(math.prod(shapes[path].shape) for path in trainable),
        "tokens": rows * sum(lengths),
        **workers.jax_info(spec.get("gpu", False)),
    }
    if not spec.get("gradients_only"):
        info["floor"] = floors.train_step_floor(
            model, shapes, trainable, rows, lengths, frozen_dtype, examples
        )
    worker.run(step, info, functools.partial(final_info, spec))


def final_info(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the device's peak memory and rates."""
    import floors
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "device peak": statistics.get("peak_bytes_in_use"),
        "rates": floors.device_rates(spec.get("dtype", "float32")),
    }


if __name__ == "__main__":
    main()
