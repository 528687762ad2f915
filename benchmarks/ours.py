"""A worker: our training step over random rows (see `common.Service`), from the core alone.

Its spec, beside `gpu`: `dimensions` by T5Config's names, and what else of T5Config is not as it is
by default (`dtype`, `scan_layers`, `remat_policy`, `attention`); `frozen_dtype`; `method` with
`experts`, `rank`, settings of its `router` and whether MoV is `fused`; `rows` and `lengths` of
inputs and targets; `optimizer`, `packed`, `microbatches`, `router_metrics`; `steps`, which one take
is made of (a step of a GPU is too short to be waited for).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import common
import numpy as np

if TYPE_CHECKING:
    from pemoe_jax.core.adapters import Adapters
    from pemoe_jax.core.network import Transformer

VECTOR_SITES = ("key", "value", "gate")
PACKED = 4  # examples in a packed row
LORA_SITES = ("query", "key", "value", "out", "wi_0", "wo")


def adapters_of(spec: Mapping[str, Any]) -> Adapters:
    """As gin/methods has them; none for `full` or where there is no method."""
    from pemoe_jax.core import adapters, routing

    method, settings = spec.get("method", "full"), {}
    if method in ("mov", "molora"):
        router = functools.partial(routing.Router, **spec.get("router", {}))
        settings = {"num_experts": spec.get("experts", 10), "router": router}
    if method in ("ia3", "mov"):
        settings["fused"] = spec.get("fused", False)
        factory = functools.partial(adapters.VectorExperts, **settings)
        return adapters.Adapters(**dict.fromkeys(VECTOR_SITES, factory))
    if method in ("lora", "molora"):
        settings["rank"] = spec.get("rank", 4)
        factory = functools.partial(adapters.LoRAExperts, **settings)
        return adapters.Adapters(**dict.fromkeys(LORA_SITES, factory))
    return adapters.Adapters()


def transformer(spec: Mapping[str, Any]) -> Transformer:
    """The network of a spec."""
    from pemoe_jax.core import network

    names = ("dtype", "scan_layers", "remat_policy", "attention")
    how = {name: spec[name] for name in names if name in spec}
    return network.Transformer(
        network.T5Config(**spec["dimensions"], **how), adapters=adapters_of(spec)
    )


def random_batch(
    rows: int, lengths: Sequence[int], packed: bool = False, vocabulary: int = common.VOCABULARY
) -> dict[str, np.ndarray]:
    """Rows without padding, [rows, length] int32; packed ones are of `PACKED` examples each."""
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(3, vocabulary, (rows, length)) for length in lengths)
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    if packed:
        for side, length in zip(("encoder", "decoder"), lengths, strict=True):
            place = np.arange(length)
            segments = 1 + PACKED * place // length
            starts = np.searchsorted(segments, segments)
            batch[f"{side}_segment_ids"] = np.broadcast_to(segments, (rows, length))
            batch[f"{side}_positions"] = np.broadcast_to(place - starts, (rows, length))
    return {name: np.asarray(array, np.int32) for name, array in batch.items()}


def random_params(
    model: Transformer, trains: Collection[str], frozen_dtype: str = "activations"
) -> dict[str, Any]:
    """Path -> array: what trains in float32, the rest in the type that a run keeps it in.

    Drawn array by array, each in its own type: 11 billion parameters never are float32.
    """
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import network, quantized
    from pemoe_jax.core import params as params_lib

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: Any, shape: tuple[int, ...], dtype: Any, size: float) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(size, dtype)

    def draw(path: str, shape: tuple[int, ...]) -> Any:
        frozen = params_lib.frozen_dtype(path, model.config.dtype)
        dtype = jnp.dtype(jnp.float32) if path in trains else frozen
        if path.endswith(("scale", "vectors")):
            return jnp.ones(shape, dtype)
        size = 1.0 if path.startswith("token_embedder") else 1 / math.sqrt(shape[-2])
        drawn = normal(jax.random.key(zlib.crc32(path.encode())), shape, dtype, size)
        if frozen_dtype == "activations" or path in trains or not params_lib.is_matrix(path):
            return drawn
        return quantized.quantize(drawn, frozen_dtype)

    shapes = params_lib.flatten(network.param_shapes(model))
    return {path: draw(path, leaf.shape) for path, leaf in shapes.items()}


@dataclasses.dataclass
class Step:
    """A compiled training step that keeps its state; called, it returns the loss."""

    compiled: Any
    state: Any
    rest: tuple[Any, ...]
    steps: int = 1

    def __call__(self) -> Any:
        import jax

        for _ in range(self.steps):
            self.state, metrics = self.compiled(self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))
        return metrics["loss"]


def training_step(spec: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The step of a spec, and what there is to tell of it."""
    import floors
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import network, optim, steps
    from pemoe_jax.core import params as params_lib
    from pemoe_jax.runtime import host_memory

    rows, lengths, model = spec["rows"], spec["lengths"], transformer(spec)
    patterns = [".*"] if spec["method"] == "full" else [params_lib.ADAPTER_PATTERN]
    shapes = params_lib.flatten(network.param_shapes(model))
    trains = params_lib.trainable_paths(shapes, patterns)
    before = common.memory("VmRSS")
    frozen_dtype = spec.get("frozen_dtype", "activations")
    flat = random_params(model, trains, frozen_dtype)
    trained = params_lib.unflatten({path: flat[path] for path in flat if path in trains})
    frozen = params_lib.unflatten({path: flat[path] for path in flat if path not in trains})
    del flat
    if spec.get("scan_layers"):
        from pemoe_jax.core import stacks

        frozen = network.stack_layers(model, frozen, stacks.stack_and_delete)
    optimizer = getattr(optim, spec.get("optimizer", "adafactor"))(lambda step: jnp.asarray(3e-4))
    state = jax.jit(lambda p: steps.TrainState.create(p, optimizer))(trained)
    del trained
    batch = jax.device_put(random_batch(rows, lengths, spec.get("packed", False)))
    function: Any = steps.make_train_step(
        model,
        optimizer,
        steps.Loss(),
        spec.get("microbatches", 1),
        spec.get("router_metrics", True),
    )
    rest = (frozen, batch, jax.random.key(0))
    compiled = function.lower(state, *rest).compile()
    host_memory.trim_heap()
    examples = PACKED if spec.get("packed") else 1
    told = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "trained": sum(math.prod(shapes[path].shape) for path in trains),
        "tokens": rows * sum(lengths),
        "floor": floors.of_step(model, shapes, trains, rows, lengths, frozen_dtype, examples),
    }
    return Step(compiled, state, rest, spec.get("steps", 1)), told


def told_of_device(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, and the chip where it is one."""
    import jax

    versions = {"versions": common.versions("jax", "jaxlib", "flax")}
    return versions | ({"device": jax.devices()[0].device_kind} if spec.get("gpu") else {})


def told_at_the_end(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The device's memory and rates."""
    import floors
    import jax

    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "device peak": statistics.get("peak_bytes_in_use"),
        "rates": floors.rates(spec.get("dtype", "float32")),
    }


def main() -> None:
    """Serves."""
    service = common.Service()
    step, told = training_step(service.spec)
    told |= told_of_device(service.spec)
    service.run(step, told, functools.partial(told_at_the_end, service.spec))


if __name__ == "__main__":
    main()
