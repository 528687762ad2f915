"""The train step compiled ahead of time, on virtual devices and without a single weight."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pemoe_jax.analysis.planning import flops, hlo, tables
from pemoe_jax.core import adapters, network, partitioning, quantized, stacks, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

SHALLOW, DEEPER = 2, 4  # layers of a stack that are compiled where it has more

# Nothing is run. So that buffers are those of an accelerator as far as they can be: scheduled to
# save memory, products not widened to float32, and recomputation kept apart from what it repeats
# (`jax.checkpoint`), which the compiler for CPUs undoes. LLVM's optimisations change no figure.
_COMPILER_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "change-op-data-type,cse_barrier_expander",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """What is trained, and on what.

    Attributes:
      model: network with its adapters.
      trainable: patterns of the parameters that train.
      optimizer: of these.
      batch_size: B, over all devices.
      lengths: of inputs and targets; rows are packed.
      microbatches: pieces that a batch is run in.
      frozen_dtype: of frozen matrices, one of `quantized.FROZEN_DTYPES`.
    """

    model: network.Transformer
    trainable: Sequence[str]
    optimizer: optax.GradientTransformation
    batch_size: int
    lengths: tuple[int, int]
    microbatches: int = 1
    frozen_dtype: str = quantized.ACTIVATIONS

    def with_layers(self, encoder: int, decoder: int) -> Step:
        """The same with so many layers."""
        config = dataclasses.replace(
            self.model.config, num_encoder_layers=encoder, num_decoder_layers=decoder
        )
        return dataclasses.replace(self, model=self.model.clone(config=config))


@flax.struct.dataclass
class Arguments:
    """What a step takes, as shapes that know where they lie."""

    state: steps.TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]


def plan(step: Step, layout: tables.Layout, every_layer: bool = False) -> tables.Plan:
    """Compiles a step in a layout, and reads off what it takes on each device.

    Layers of a stack are alike, so a deep model is compiled with 2 and with 4 of them, and what
    each further layer adds is added for the rest: minutes and gigabytes less.

    Args:
      step: what is trained.
      layout: of as many devices as jax has, or fewer.
      every_layer: compile the whole model whatever its depth.

    Raises:
      InputError: see `mesh_of`.
    """
    mesh = mesh_of(step, layout)
    whole = arguments(step, mesh, layout.fsdp)
    points = depths(step.model.config, every_layer)
    measured = [_measure(step.with_layers(*point), mesh, layout.fsdp) for point in points]
    found = extrapolate(step.model.config, points, measured)
    memory = {
        "frozen base": bytes_on_device(whole.frozen),
        "trainable": bytes_on_device(whole.state.params),
        "optimizer state": bytes_on_device((whole.state.opt_state, whole.state.step)),
        "batch": bytes_on_device(whole.batch),
        "activations and temporaries": found["temporaries"],
    }
    return tables.Plan(
        layout=str(layout),
        devices=layout.devices,
        memory={name: memory[name] for name in tables.MEMORY},
        collectives={
            kind: (found[f"{kind} arrays"], found[f"{kind} bytes"])
            for kind in hlo.COLLECTIVES
            if found.get(f"{kind} arrays")
        },
        flops=found["flops"],
        model_flops=model_flops(step),
        tokens=step.batch_size * sum(step.lengths),
        compiled=_in_words(points, step.model.config),
    )


def mesh_of(step: Step, layout: tables.Layout) -> Mesh:
    """The layout's mesh of virtual devices.

    Raises:
      InputError: the batch does not divide over the devices, or there are too few of these.
    """
    devices = jax.devices("cpu")
    if len(devices) < layout.devices:
        raise InputError(
            f"--mesh {layout} needs {layout.devices} devices: jax was started with {len(devices)}"
        )
    mesh = partitioning.make_mesh(layout.model, devices[: layout.devices])
    partitioning.check_batch_size(step.batch_size, mesh, step.microbatches)
    return mesh


def arguments(step: Step, mesh: Mesh, fsdp: bool = False) -> Arguments:
    """State, frozen parameters and a packed batch, none of them allocated."""
    model = step.model
    shapes = params_lib.flatten(network.param_shapes(model))
    lie = partitioning.param_shardings(
        mesh, partitioning.axis_rules(fsdp), network.param_axes(model), shapes
    )
    trains = params_lib.trainable_paths(shapes, step.trainable)

    def abstract(path: str) -> Any:
        frozen = params_lib.frozen_dtype(path, model.config.dtype)
        dtype = jnp.dtype(jnp.float32) if path in trains else frozen
        found = jax.ShapeDtypeStruct(shapes[path].shape, dtype, sharding=lie[path])
        if path in trains or not params_lib.is_matrix(path):
            return found
        return quantized.quantized_shape(found, step.frozen_dtype)

    trained = params_lib.unflatten({path: abstract(path) for path in shapes if path in trains})
    frozen = params_lib.unflatten({path: abstract(path) for path in shapes if path not in trains})
    if model.config.scan_layers:
        frozen = network.stack_layers(model, frozen, stacks.stack_abstract)
    state = jax.eval_shape(lambda p: steps.TrainState.create(p, step.optimizer), trained)
    state = _placed(state, partitioning.state_shardings(state, lie, mesh))
    return Arguments(state, frozen, _batch(step, mesh))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _batch(step: Step, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """As the feed packs it; rows whose routers read sentences are not packed."""
    rows, (inputs, targets) = step.batch_size, step.lengths
    names = {"encoder_input_tokens": inputs, "decoder_input_tokens": targets}
    names |= {"decoder_target_tokens": targets, "decoder_loss_weights": targets}
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    if "sentence" in _router_reads(step.model).values():
        dim = step.model.config.sentence_dim or step.model.config.emb_dim
        shapes["sentence_embeddings"] = ((rows, dim), jnp.float32)
    else:
        for side, length in (("encoder", inputs), ("decoder", targets)):
            names |= {f"{side}_segment_ids": length, f"{side}_positions": length}
    shapes |= {name: ((rows, length), jnp.int32) for name, length in names.items()}
    lie = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=lie)
        for name, (shape, dtype) in shapes.items()
    }


def _router_reads(model: network.Transformer) -> dict[str, str | None]:
    """site -> what its router reads, where it says so."""
    described = adapters.describe(model.adapters)
    return {site: one["router"]["reads"] for site, one in described.items() if one.get("router")}


def compile_step(step: Step, mesh: Mesh, fsdp: bool = False, **options: Any) -> Any:
    """The compiled step, whose `as_text`, `memory_analysis` and `cost_analysis` tell of it.

    Args:
      options: of XLA's compiler, beside those that save time.
    """
    given = jax.tree.map(_two_bytes, arguments(step, mesh, fsdp))
    model = step.model
    if jnp.dtype(model.config.dtype) == jnp.bfloat16:
        config = copy.copy(model.config)
        object.__setattr__(config, "dtype", "float16")  # which `T5Config` refuses, rightly
        model = model.clone(config=config)
    function: Any = steps.make_train_step(
        model,
        step.optimizer,
        steps.Loss(),
        step.microbatches,
        state_sharding=jax.tree.map(lambda leaf: leaf.sharding, given.state),
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(
        rng.shape, rng.dtype, sharding=partitioning.replicated_sharding(mesh)
    )
    with partitioning.use_mesh(mesh, partitioning.axis_rules(fsdp)):
        lowered = function.lower(given.state, given.frozen, given.batch, rng)
        return compile_lowered(lowered, **options)


def compile_lowered(lowered: Any, **options: Any) -> Any:
    """Compiles what is not to be run; `options` go before those of this module."""
    return lowered.compile(compiler_options={**_COMPILER_OPTIONS, **options})


def _two_bytes(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Float16 in place of bfloat16, which the compiler for CPUs widens to float32.

    Both have two bytes; nothing is computed, so that float16 would overflow does not matter.
    """
    if leaf.dtype != jnp.bfloat16:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float16, sharding=leaf.sharding)


def _measure(step: Step, mesh: Mesh, fsdp: bool) -> dict[str, float]:
    """Figures that grow by the same amount with each layer."""
    compiled = compile_step(step, mesh, fsdp)
    memory = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    once, whole = hlo.products(program)
    found: dict[str, float] = {
        # what of the results has no place among the arguments is a temporary too
        "temporaries": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        # XLA counts what is in a loop once
        "flops": compiled.cost_analysis()["flops"] + whole - once,
    }
    for kind, (arrays, moved) in hlo.collectives(program).items():
        found |= {f"{kind} arrays": arrays, f"{kind} bytes": moved}
    return found


def depths(config: network.T5Config, every_layer: bool = False) -> list[tuple[int, int]]:
    """(encoder, decoder layers) of the models to compile: one, or as many as tell of each stack."""
    encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
    # a loop over layers is compiled at once, however many there are
    if every_layer or config.scan_layers or max(encoder, decoder) <= DEEPER:
        return [(encoder, decoder)]
    shallow = (min(encoder, SHALLOW), min(decoder, SHALLOW))
    if encoder == decoder:
        return [shallow, (DEEPER, DEEPER)]
    found = [shallow]
    if encoder > SHALLOW:
        found.append((min(encoder, DEEPER), shallow[1]))
    if decoder > SHALLOW:
        found.append((shallow[0], min(decoder, DEEPER)))
    return found


def extrapolate(
    config: network.T5Config,
    points: Sequence[tuple[int, int]],
    measured: Sequence[Mapping[str, float]],
) -> dict[str, int]:
    """The first of the measurements, with what each of the others says of a layer more."""
    goal = (config.num_encoder_layers, config.num_decoder_layers)
    start = points[0]
    found = {}
    for name in dict.fromkeys(name for one in measured for name in one):
        total = base = measured[0].get(name, 0)
        for point, one in zip(points[1:], measured[1:], strict=True):
            stack = 0 if point[0] != start[0] else 1
            of_layer = (one.get(name, 0) - base) / (point[stack] - start[stack])
            total += of_layer * (goal[stack] - start[stack])
        found[name] = round(total)
    return found


def _in_words(points: Sequence[tuple[int, int]], config: network.T5Config) -> str:
    if len(points) == 1:
        return "the whole model"
    layers = ", ".join(f"{encoder}+{decoder}" for encoder, decoder in points)
    whole = f"{config.num_encoder_layers}+{config.num_decoder_layers}"
    return f"{layers} encoder and decoder layers, and from these reckoned up to {whole}"


def model_flops(step: Step) -> flops.Flops:
    """FLOPs of the whole batch, by hand."""
    shapes = params_lib.flatten(network.param_shapes(step.model))
    return flops.of_step(
        step.model.config,
        shapes,
        params_lib.trainable_paths(shapes, step.trainable),
        step.batch_size,
        step.lengths,
        _router_reads(step.model),
    )


def bytes_on_device(tree: Any) -> int:
    """Of arrays or abstract ones that know where they lie, on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
