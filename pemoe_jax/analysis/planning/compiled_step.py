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

# Depths at which a deeper stack is compiled, to extrapolate from; whole periods of sparse models.
SHALLOW, DEEPER = 2, 4

# These make the CPU compiler allocate as an accelerator's would: its schedule saves memory, it does
# not widen products to float32, and it does not merge the recomputation of `jax.checkpoint` with
# the original computation. LLVM's optimizations affect none of these and only take time.
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
      batch_size: B, over all devices.
      lengths: lengths of inputs and targets in packed rows.
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

    The layers of a stack repeat: all are alike, or every period of a sparse model is. A deep model
    is compiled with 2 and with 4 layers, and the cost of the others is extrapolated, which saves
    minutes and gigabytes at XXL.

    Args:
      step: the train step.
      layout: the mesh, with at most as many devices as jax has.
      every_layer: whether to compile all layers of a deep model.

    Raises:
      InputError: see `make_mesh`.
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
    """Returns a mesh of virtual devices; raises InputError if it does not fit them or the batch."""
    devices = jax.devices("cpu")
    if len(devices) < layout.devices:
        raise InputError(
            f"--mesh must have at most {len(devices)} devices, those of this process, got {layout}"
        )
    mesh = partitioning.make_mesh(layout.model, devices[: layout.devices], layout.expert)
    partitioning.check_batch_size(step.batch_size, mesh, step.microbatches)
    return mesh


def abstract_arguments(step: TrainStep, mesh: Mesh, fsdp: bool = False) -> StepArguments:
    """Returns the train state, frozen parameters and a packed batch as abstract arrays."""
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
        frozen = network.stack_layers(model, frozen, stacks.stack_abstract)
    state = jax.eval_shape(lambda p: steps.TrainState.create(p, step.optimizer), params)
    # eval_shape drops shardings.
    state = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        state,
        partitioning.state_shardings(state, shardings, mesh),
    )
    return StepArguments(state, frozen, _abstract_batch(step, mesh))


def compile_step(
    step: TrainStep, mesh: Mesh, fsdp: bool = False, **options: str | bool
) -> jax.stages.Compiled:
    """Compiles a train step for a mesh of virtual devices; for `options` see `compile_lowered`."""
    arguments = jax.tree.map(_as_float16, abstract_arguments(step, mesh, fsdp))
    model = step.model
    if jnp.dtype(model.config.dtype) == jnp.bfloat16:
        config = copy.copy(model.config)
        # Assigning bypasses the check of T5Config, which rejects float16: it overflows in training.
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
        lowered = train_step.lower(arguments.state, arguments.frozen, arguments.batch, rng)  # type: ignore[attr-defined]
        return compile_lowered(lowered, **options)


def compile_lowered(lowered: jax.stages.Lowered, **options: str | bool) -> jax.stages.Compiled:
    """Compiles a program for analysis; XLA's `options` override those of this module."""
    return lowered.compile(compiler_options={**_COMPILER_OPTIONS, **options})


def compiled_depths(
    config: network.T5Config, every_layer: bool = False, period: int = 1
) -> list[tuple[int, int]]:
    """Returns (encoder, decoder) layers of the models to compile: the whole one, or small ones.

    `period` is the number of layers after which layers repeat.
    """
    encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
    shallow = -(-SHALLOW // period) * period
    deeper = max(DEEPER, 2 * shallow)
    # Scanned layers are one loop, which compiles equally fast at any depth.
    if every_layer or config.scan_layers or max(encoder, decoder) <= deeper:
        return [(encoder, decoder)]
    first = (min(encoder, shallow), min(decoder, shallow))
    if encoder == decoder:
        return [first, (deeper, deeper)]
    last = (min(encoder, deeper), min(decoder, deeper))
    # A stack of at most `shallow` layers yields no further depth.
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
        total = base = measured[0].get(name, 0)
        for depth, values in zip(depths[1:], measured[1:], strict=True):
            # A further depth differs in one stack, or equally in both if they are equally deep.
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
    """Returns the bytes of (abstract) arrays on one device, from their shardings."""
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
        # A row has one embedding, so it holds one example: no segments.
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
    """Replaces bfloat16, which the CPU compiler would widen, by float16, which has its size."""
    return leaf.update(dtype=jnp.float16) if leaf.dtype == jnp.bfloat16 else leaf


def _measure(step: TrainStep, mesh: Mesh, fsdp: bool) -> dict[str, float]:
    """Returns the quantities that grow linearly with the number of layers."""
    compiled = compile_step(step, mesh, fsdp)
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
    # jax returns None on backends without an analysis; the CPU backend has all of them.
    assert text is not None and memory is not None and cost is not None
    program = hlo.parse(text)
    once, total = hlo.matrix_product_flops(program)
    measured: dict[str, float] = {
        # Outputs that do not reuse the memory of a donated argument are temporaries too.
        "temporaries": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        # XLA's analysis counts the body of a loop once.
        "flops": cost["flops"] + total - once,
    }
    for kind, (arrays, size) in hlo.collectives(program).items():
        measured |= {f"{kind} arrays": arrays, f"{kind} bytes": size}
    return measured
