"""The train step compiled ahead of time for a mesh of virtual devices, without any weights.

`estimate_cost` compiles a step and reads its memory, collectives and FLOPs. Nothing runs and no
array is allocated: all arguments are abstract arrays with shardings.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pemoe_jax.analysis.planning import flops, hlo
from pemoe_jax.analysis.planning.cost_tables import MEMORY, MeshLayout, StepCost
from pemoe_jax.core import adapters, network, partitioning, quantized, stacks, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import PyTree

# Numbers of layers with which a deep stack is compiled, to extrapolate its cost from both. In a
# sparse model, `compiled_depths` raises them to whole periods of dense and sparse layers.
SHALLOW, DEEPER = 2, 4

# Let XLA's CPU compiler allocate memory as an accelerator's compiler would. Line by line:
# - It schedules operations so that they need little memory.
# - It does not widen products to float32, and does not merge what `jax.checkpoint` recomputes with
#   the original computation.
# - It skips LLVM's optimizations (two lines), which only take time: no machine code runs.
_COMPILER_OPTIONS: dict[str, str | bool] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "change-op-data-type,cse_barrier_expander",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Configuration of a train step.

    Attributes:
      model: network with its adapters.
      trainable: patterns of the parameters that train.
      optimizer: optimizer of the trainable parameters.
      batch_size: B, the number of rows in a batch over all devices.
      lengths: numbers of input and target tokens of a packed row.
      microbatches: number of microbatches per batch.
      frozen_dtype: dtype of frozen matrices, one of `quantized.FROZEN_DTYPES`.
    """

    model: network.Transformer
    trainable: Sequence[str]
    optimizer: optax.GradientTransformation
    batch_size: int
    lengths: tuple[int, int]
    microbatches: int = 1
    frozen_dtype: str = quantized.ACTIVATIONS

    def with_layers(self, encoder: int, decoder: int) -> TrainStep:
        """Returns the same step for a model with these numbers of layers."""
        config = dataclasses.replace(
            self.model.config, num_encoder_layers=encoder, num_decoder_layers=decoder
        )
        return dataclasses.replace(self, model=self.model.clone(config=config))


@flax.struct.dataclass
class StepArguments:
    """Arguments of a train step as abstract arrays with shardings."""

    state: steps.TrainState
    frozen: PyTree
    batch: dict[str, jax.ShapeDtypeStruct]


def estimate_cost(step: TrainStep, layout: MeshLayout, every_layer: bool = False) -> StepCost:
    """Compiles a step for a mesh and reads its cost on each device.

    All layers of a stack cost the same; in a sparse model, all periods of dense and sparse layers
    do. A deep model is therefore compiled with a few layers and with twice as many (see
    `compiled_depths`), and the cost of the others is extrapolated, which saves minutes and
    gigabytes at XXL.

    Args:
      step: the train step.
      layout: the mesh, with at most as many devices as this process has (virtual CPU devices).
      every_layer: whether to compile all layers of a deep model.

    Raises:
      InputError: the mesh has too many devices, or does not divide the batch.
    """
    mesh = make_mesh(step, layout)
    arguments = abstract_arguments(step, mesh, layout.fsdp)
    config = step.model.config
    period = network.layer_period(step.model.sparse)
    depths = compiled_depths(config, every_layer, period)
    measured = [_measure(step.with_layers(*depth), mesh, layout.fsdp) for depth in depths]
    totals = extrapolate(config, depths, measured)
    state = arguments.state
    trees = (arguments.frozen, state.params, (state.opt_state, state.step), arguments.batch)
    memory = [*map(bytes_per_device, trees), totals["temporaries"]]
    compiled = "the whole model"
    if len(depths) > 1:
        layers = ", ".join(f"{encoder}+{decoder}" for encoder, decoder in depths)
        compiled = f"{layers} encoder and decoder layers, extrapolated to"
        compiled += f" {config.num_encoder_layers}+{config.num_decoder_layers}"
    return StepCost(
        layout=str(layout),
        devices=layout.devices,
        memory=dict(zip(MEMORY, memory, strict=True)),
        collectives={
            kind: (totals[f"{kind} arrays"], totals[f"{kind} bytes"])
            for kind in hlo.COLLECTIVES
            if totals.get(f"{kind} arrays")
        },
        flops=totals["flops"],
        model_flops=model_flops(step),
        tokens=step.batch_size * sum(step.lengths),
        compiled=compiled,
    )


def make_mesh(step: TrainStep, layout: MeshLayout) -> Mesh:
    """Returns a mesh of virtual devices.

    Raises:
      InputError: there are too few devices, or the batch cannot be divided among them.
    """
    devices = jax.devices("cpu")
    if len(devices) < layout.devices:
        raise InputError(
            f"--mesh must have at most {len(devices)} devices (those of this process), got {layout}"
        )
    mesh = partitioning.make_mesh(layout.model, devices[: layout.devices], layout.expert)
    partitioning.check_batch_size(step.batch_size, mesh, step.microbatches)
    return mesh


def abstract_arguments(step: TrainStep, mesh: Mesh, fsdp: bool = False) -> StepArguments:
    """Returns the arguments of a step: train state, frozen parameters and a packed batch."""
    model = step.model
    shapes = params_lib.flatten(network.param_shapes(model))
    shardings = partitioning.param_shardings(
        mesh, partitioning.axis_rules(fsdp), network.param_axes(model), shapes
    )
    trainable = params_lib.trainable_paths(shapes, step.trainable)

    def abstract(path: str) -> PyTree:
        frozen_dtype = params_lib.frozen_dtype(path, model.config.dtype)
        dtype = jnp.dtype(jnp.float32) if path in trainable else frozen_dtype
        array = jax.ShapeDtypeStruct(shapes[path].shape, dtype, sharding=shardings[path])
        if path in trainable or not params_lib.is_matrix(path):
            return array
        return quantized.quantized_shape(array, step.frozen_dtype)

    arrays = params_lib.unflatten({path: abstract(path) for path in shapes})
    params, frozen = params_lib.split(arrays, step.trainable)
    if model.config.scan_layers:
        # `pemoe train` also stacks frozen layers before the loop over them.
        frozen = network.stack_layers(model, frozen, stacks.stack_abstract)
    state = jax.eval_shape(lambda p: steps.TrainState.create(p, step.optimizer), params)
    # `eval_shape` drops shardings, so they are set on the result.
    state = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        state,
        partitioning.state_shardings(state, shardings, mesh),
    )
    return StepArguments(state, frozen, _abstract_batch(step, mesh))


def compile_step(
    step: TrainStep, mesh: Mesh, fsdp: bool = False, **options: str | bool
) -> jax.stages.Compiled:
    """Compiles a train step for a mesh of virtual devices, with `options` of `compile_lowered`."""
    arguments = jax.tree.map(_as_float16, abstract_arguments(step, mesh, fsdp))
    model = step.model
    if jnp.dtype(model.config.dtype) == jnp.bfloat16:
        config = copy.copy(model.config)
        # T5Config rejects float16, which overflows in training. Nothing is computed here, so the
        # check is bypassed by setting the attribute of a copy.
        object.__setattr__(config, "dtype", "float16")
        model = model.clone(config=config)
    train_step = steps.make_train_step(
        model,
        step.optimizer,
        steps.Loss(),
        step.microbatches,
        state_sharding=jax.tree.map(lambda leaf: leaf.sharding, arguments.state),
    )
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = rng.update(sharding=partitioning.replicated_sharding(mesh))
    with partitioning.use_mesh(mesh, partitioning.axis_rules(fsdp)):
        # jit adds `lower`, which the type of `make_train_step`, a plain callable, does not have.
        lowered = train_step.lower(arguments.state, arguments.frozen, arguments.batch, rng)  # type: ignore[attr-defined]
        return compile_lowered(lowered, **options)


def compile_lowered(lowered: jax.stages.Lowered, **options: str | bool) -> jax.stages.Compiled:
    """Compiles a program for analysis; XLA's `options` override those of this module."""
    return lowered.compile(compiler_options={**_COMPILER_OPTIONS, **options})


def compiled_depths(
    config: network.T5Config, every_layer: bool = False, period: int = 1
) -> list[tuple[int, int]]:
    """Returns (encoder, decoder) numbers of layers to compile: the whole model, or small models.

    Args:
      config: dimensions of the whole model.
      every_layer: whether to compile the whole model at any depth.
      period: number of layers after which layers repeat, see `network.layer_period`.
    """
    encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
    shallow = -(-SHALLOW // period) * period  # rounded up to whole periods
    deeper = max(DEEPER, 2 * shallow)
    # Scanned layers are one loop, which compiles equally fast at any depth.
    if every_layer or config.scan_layers or max(encoder, decoder) <= deeper:
        return [(encoder, decoder)]
    first = (min(encoder, shallow), min(decoder, shallow))
    # Equal stacks grow together: their summed cost is linear in the depth, one compilation less.
    if encoder == decoder:
        return [first, (deeper, deeper)]
    last = (min(encoder, deeper), min(decoder, deeper))
    # One stack is deepened at a time. For a stack of at most `shallow` layers, this is `first`
    # again, and the dict drops the duplicate.
    return list(dict.fromkeys([first, (last[0], first[1]), (first[0], last[1])]))


def extrapolate(
    config: network.T5Config,
    depths: Sequence[tuple[int, int]],
    measured: Sequence[Mapping[str, float]],
) -> dict[str, int]:
    """Extrapolates measurements (name -> value at each of `compiled_depths`) to the whole model."""
    goal = (config.num_encoder_layers, config.num_decoder_layers)
    start = depths[0]
    totals = {}
    for name in dict.fromkeys(name for values in measured for name in values):
        total = base = measured[0].get(name, 0)  # a program may lack a kind of collectives
        for depth, values in zip(depths[1:], measured[1:], strict=True):
            # Each further depth differs from the first in one stack, or equally in both stacks.
            stack = 0 if depth[0] != start[0] else 1
            per_layer = (values.get(name, 0) - base) / (depth[stack] - start[stack])
            total += per_layer * (goal[stack] - start[stack])
        totals[name] = round(total)
    return totals


def model_flops(step: TrainStep) -> flops.StepFlops:
    """Returns the FLOPs of the model for the whole batch, by the formulas of `flops`."""
    shapes = params_lib.flatten(network.param_shapes(step.model))
    return flops.train_step_flops(
        step.model.config,
        shapes,
        params_lib.trainable_paths(shapes, step.trainable),
        step.batch_size,
        step.lengths,
        _router_reads(step.model),
        sparse=step.model.sparse,
    )


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes of a tree of (abstract) arrays on one device, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _abstract_batch(step: TrainStep, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch as `data.packing` packs it."""
    inputs, targets = step.lengths
    widths = {"encoder_input_tokens": inputs, "decoder_input_tokens": targets}
    widths |= {"decoder_target_tokens": targets, "decoder_loss_weights": targets}
    if "sentence" in _router_reads(step.model).values():
        # A row has one sentence embedding, so it holds one example and needs no segments.
        widths["sentence_embeddings"] = step.model.config.sentence_dim or step.model.config.emb_dim
    else:
        for stack, length in (("encoder", inputs), ("decoder", targets)):
            widths |= {f"{stack}_segment_ids": length, f"{stack}_positions": length}
    sharding = partitioning.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            (step.batch_size, width),
            jnp.float32 if name == "sentence_embeddings" else jnp.int32,
            sharding=sharding,
        )
        for name, width in widths.items()
    }


def _router_reads(model: network.Transformer) -> dict[str, str | None]:
    """Returns site -> `Router.reads`."""
    return flops.describe_router_reads(adapters.describe(model.adapters))


def _as_float16(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Replaces bfloat16, which the CPU compiler would widen, by float16, which is as large."""
    return leaf.update(dtype=jnp.float16) if leaf.dtype == jnp.bfloat16 else leaf


def _measure(step: TrainStep, mesh: Mesh, fsdp: bool) -> dict[str, float]:
    """Compiles a step and returns the quantities that grow linearly with the number of layers."""
    compiled = compile_step(step, mesh, fsdp)
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    # jax returns None on backends without an analysis; the CPU backend has all of them.
    assert text is not None and memory is not None and cost is not None
    program = hlo.parse(text)
    product_flops_once, product_flops = hlo.matrix_product_flops(program)
    measured: dict[str, float] = {
        # Outputs that do not reuse the memory of a donated argument are temporaries too.
        "temporaries": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        # XLA's analysis counts the body of a loop once, also in a loop over layers or microbatches.
        "flops": cost["flops"] + product_flops - product_flops_once,
    }
    for kind, (arrays, size) in hlo.collectives(program).items():
        measured |= {f"{kind} arrays": arrays, f"{kind} bytes": size}
    return measured
