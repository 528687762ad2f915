"""A worker: our training step, as a run takes it, over random rows (see `common.Service`).

Its spec, beside `gpu`: `size` and `method` by their gin files, `bindings` of gin, `rows`, `lengths`
of inputs and targets, `dtype`, `optimizer`, `packed`, `microbatches`, and `steps` that one take is
made of (one step of a GPU is too short to be waited for).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import common
import numpy as np

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer


def configure(size: str, method: str | None, bindings: Sequence[str] = ()) -> None:
    """Reads the gin files of a size and a method."""
    from pemoe_jax import config, train

    config.quiet()
    files = [f"--gin_file=models/t5_1_1_{size}.gin"]
    files += [f"--gin_file=methods/{method}.gin"] if method else []
    rest, found = config.split_bindings([*files, *(f"--gin.{one}" for one in bindings)])
    config.load(train.FLAGS.parse_args(rest), found)


def transformer(
    size: str, method: str | None, bindings: Sequence[str] = (), dtype: str = "float32"
) -> Transformer:
    """The size's network with the method's adapters, through their gin files."""
    import gin

    from pemoe_jax.core import network

    configure(size, method, bindings)
    model = gin.get_configurable(network.Transformer)()
    return model.clone(config=dataclasses.replace(model.config, dtype=dtype))


def random_batch(
    rows: int, lengths: Sequence[int], packed: bool = False, vocabulary: int = common.VOCABULARY
) -> dict[str, np.ndarray]:
    """Rows without padding, [rows, length] int32; packed ones are of four examples each."""
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
            segments = 1 + 4 * place // length
            starts = np.searchsorted(segments, segments)
            batch[f"{side}_segment_ids"] = np.broadcast_to(segments, (rows, length))
            batch[f"{side}_positions"] = np.broadcast_to(place - starts, (rows, length))
    return {name: np.asarray(array, np.int32) for name, array in batch.items()}


def random_params(model: Transformer, trains: set[str]) -> dict[str, Any]:
    """Path -> array: what trains in float32, the rest in the type that a run keeps it in.

    Drawn array by array, each in its own type: 11 billion parameters never are float32.
    """
    import jax
    import jax.numpy as jnp

    from pemoe_jax.core import network
    from pemoe_jax.core import params as params_lib

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        frozen = params_lib.frozen_dtype(path, model.config.dtype)
        dtype = jnp.float32 if path in trains else frozen
        if path.endswith(("scale", "vectors")):
            return jnp.ones(shape, dtype)
        key = jax.random.key(zlib.crc32(path.encode()))
        size = 1.0 if path.endswith("embedding") else 1 / math.sqrt(shape[-2])
        return normal(key, shape, dtype, size)

    normal = jax.jit(
        lambda key, shape, dtype, size: jax.random.normal(key, shape, dtype) * size,
        static_argnums=(1, 2, 3),
    )
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

    dtype, rows, lengths = spec.get("dtype", "float32"), spec["rows"], spec["lengths"]
    model = transformer(spec["size"], spec["method"], spec.get("bindings", ()), dtype)
    patterns = [".*"] if spec["method"] == "full" else [params_lib.ADAPTER_PATTERN]
    shapes = params_lib.flatten(network.param_shapes(model))
    trains = params_lib.trainable_paths(shapes, patterns)
    before = common.memory("VmRSS")
    flat = random_params(model, trains)
    trained = params_lib.unflatten({path: flat[path] for path in flat if path in trains})
    frozen = params_lib.unflatten({path: flat[path] for path in flat if path not in trains})
    del flat
    optimizer = getattr(optim, spec.get("optimizer", "adafactor"))(lambda step: jnp.asarray(3e-4))
    state = jax.jit(lambda p: steps.TrainState.create(p, optimizer))(trained)
    del trained
    batch = jax.device_put(random_batch(rows, lengths, spec.get("packed", False)))
    function: Any = steps.make_train_step(
        model, optimizer, steps.Loss(), spec.get("microbatches", 1)
    )
    rest = (frozen, batch, jax.random.key(0))
    compiled = function.lower(state, *rest).compile()
    told = {
        "before": before,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "floor": floors.of_step(model, shapes, trains, rows, lengths),
    }
    return Step(compiled, state, rest, spec.get("steps", 1)), told


def main() -> None:
    """Serves."""
    service = common.Service()
    import floors
    import jax

    step, told = training_step(service.spec)
    told["versions"] = common.versions("jax", "jaxlib", "flax")
    device = jax.devices()[0]
    if service.spec.get("gpu"):
        told["device"] = device.device_kind

    def at_the_end() -> dict[str, Any]:
        statistics = device.memory_stats() or {}
        return {
            "device peak": statistics.get("peak_bytes_in_use"),
            "rates": floors.rates(service.spec.get("dtype", "float32")),
        }

    service.run(step, told, at_the_end)


if __name__ == "__main__":
    main()
