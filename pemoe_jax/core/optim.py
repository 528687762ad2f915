"""Optimizers and learning-rate schedules, with T5X's settings as defaults."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import partitioning
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.params import Params, PyTree

Step: TypeAlias = jax.typing.ArrayLike
Schedule: TypeAlias = Callable[[Step], jax.Array | float]
ParamAxes: TypeAlias = Mapping[str, Sequence[str]]  # path -> axis names: `network.param_axes`
# (schedule, param_axes=…) -> the optimizer of the parameters with these axes.
OptimizerFactory: TypeAlias = Callable[..., optax.GradientTransformation]

# The logical names of the axis of experts, in sparse MLPs and in adapters.
_EXPERT_AXES = ("expert", "adapter_expert")


def adafactor(
    learning_rate: Schedule,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
    weight_decay_rate: float | None = None,
    clip_norm: float | None = None,
    per_expert: bool = True,
    param_axes: ParamAxes | None = None,
) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) without momentum, as T5 was trained.

    With `multiply_by_parameter_scale`, LoRA's B starts slowly, since it is zero at first.

    By default, each expert of a parameter is updated as if it were a separate parameter. T5X does
    the same with `FactorDim.BATCH` for the axis `expert`. A router, which compares experts, is one
    parameter, but its second moments are not factored over the axis of experts.

    Args:
      learning_rate: step -> learning rate.
      decay_rate: c; the second moments decay by the factor 1 - (step - step_offset + 1)^-c.
      step_offset: subtracted from the step in this decay. To continue counting from a base model's
        number of steps, as T5X does, pass minus this number; the second moments then hardly change.
      clipping_threshold: bound of an update's root mean square; None: no bound.
      multiply_by_parameter_scale: whether an update is multiplied by the root mean square of the
        parameter, or by 1e-3 if that is larger.
      min_dim_size_to_factor: second moments are factored over the two largest axes of a parameter
        if both have at least this size.
      weight_decay_rate: rate of the weight decay; None: no decay.
      clip_norm: bound of the gradient's global norm; None: no bound.
      per_expert: whether the root mean squares of updates and parameters are computed for each
        expert or, as in the MoV paper's code, over all experts of a parameter. Second moments are
        always per expert.
      param_axes: logical axis names of the parameters; None: no parameter has experts.
    """
    map_over = functools.partial(_map_over_axis, param_axes=param_axes or {})
    rms_names = _EXPERT_AXES if per_expert else ()
    # The transformations are in the order of `optax.adafactor`, so the state has its structure.
    second_moments = optax.scale_by_factored_rms(
        decay_rate=decay_rate,
        step_offset=step_offset,
        min_dim_size_to_factor=min_dim_size_to_factor,
        epsilon=1e-30,
    )
    # "unmodeled" is the axis of experts in a router's kernel [features, E].
    parts = [map_over(second_moments, names=(*_EXPERT_AXES, "unmodeled"))]
    if clipping_threshold is not None:
        parts.append(map_over(optax.clip_by_block_rms(clipping_threshold), names=rms_names))
    parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(map_over(optax.scale_by_param_block_rms(), names=rms_names))
    if weight_decay_rate is not None:
        parts.append(optax.add_decayed_weights(weight_decay_rate))
    return _clip(optax.chain(*parts, optax.scale(-1)), clip_norm)


def _clip(
    optimizer: optax.GradientTransformation, norm: float | None
) -> optax.GradientTransformation:
    """Bounds the global norm of the gradients that an optimizer reads."""
    if norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(norm), optimizer)


def _map_over_axis(
    transformation: optax.GradientTransformation, names: Sequence[str], param_axes: ParamAxes
) -> optax.GradientTransformation:
    """Applies a transformation to each slice of a parameter along an axis named in `names`.

    Parameters without such an axis are not sliced. A state with the shape of a slice is stacked
    along the parameter's axis; any other state, such as a factored moment, along axis 0.
    """
    # Path -> position of the axis to slice along, or None.
    positions = {
        path: next((i for i, axis in enumerate(axes) if axis in names), None)
        for path, axes in param_axes.items()
    }
    if not any(position is not None for position in positions.values()):
        return transformation

    def slice_axes(params: Params) -> list[tuple[PyTree, PyTree]]:
        """Returns (axes of parameters, axes of states) for `vmap`, for each size of sliced axes."""
        flat = params_lib.flatten(params)
        slices = {path: _remove_axis(leaf, positions[path]) for path, leaf in flat.items()}
        state = jax.eval_shape(transformation.init, params_lib.unflatten(slices))
        axes_by_size: dict[int, dict[str, int]] = {}
        for path, leaf in flat.items():
            position = positions[path]
            if position is not None:
                axes_by_size.setdefault(leaf.shape[position], {})[path] = position

        def state_axis(
            key_path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct, mapped: Mapping[str, int]
        ) -> int | None:
            position = partitioning.value_of_param(key_path, mapped)
            parameter_slice = partitioning.value_of_param(key_path, slices)
            if position is None or parameter_slice is None:
                return None
            if leaf.shape == parameter_slice.shape:
                return position
            return None if leaf.shape == (1,) else 0  # (1,) is optax's placeholder for no state

        return [
            (
                params_lib.unflatten({path: mapped.get(path) for path in flat}),
                jax.tree_util.tree_map_with_path(
                    functools.partial(state_axis, mapped=mapped), state
                ),
            )
            for mapped in axes_by_size.values()
        ]

    def init(params: Params) -> PyTree:
        function = transformation.init
        # The axes that one `vmap` maps over must have the same size. So there is one `vmap` for
        # each size, which leaves the parameters of other sizes unmapped.
        for params_axes, state_axes in slice_axes(params):
            function = jax.vmap(function, in_axes=(params_axes,), out_axes=state_axes)
        return function(params)

    def update(
        updates: Params, state: PyTree, params: Params | None = None
    ) -> tuple[PyTree, PyTree]:
        function = transformation.update
        for params_axes, state_axes in slice_axes(updates):
            axes = (params_axes, state_axes)
            function = jax.vmap(function, in_axes=(*axes, params_axes), out_axes=axes)
        return function(updates, state, params)

    return optax.GradientTransformation(init, update)


def _remove_axis(leaf: jax.Array, axis: int | None) -> jax.ShapeDtypeStruct:
    shape = tuple(size for i, size in enumerate(leaf.shape) if i != axis)
    return jax.ShapeDtypeStruct(shape, leaf.dtype)


def adamw(
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    param_axes: ParamAxes | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101); `clip_norm` bounds the gradient's global norm, None: no bound."""
    del param_axes  # moments are per entry, so experts need no special treatment
    optimizer = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _clip(optimizer, clip_norm)


# T5X's seven factors, and `linear_to_zero` and `cosine_to_zero`.
_FACTORS = (
    "constant",
    "linear_warmup",
    "linear_decay",
    "rsqrt_decay",
    "rsqrt_normalized_decay",
    "decay_every",
    "cosine_decay",
    "linear_to_zero",
    "cosine_to_zero",
)


def create_learning_rate_scheduler(
    factors: str = "constant",
    base_learning_rate: float = 1e-3,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20_000,
    steps_per_cycle: int = 100_000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> Schedule:
    """Returns the function step -> learning rate, a product of named factors.

    The first seven factors have T5X's values (`t5x.utils.create_learning_rate_scheduler`). With
    W = warmup_steps:

    - constant: base_learning_rate.
    - linear_warmup: min(1, step / W), or 1 without a warm-up.
    - linear_decay: base_learning_rate * min(step / W, 1 + decay_factor * (W - step)), where 1 takes
      the place of step / W if W = 0. It includes `constant` and `linear_warmup`, and reaches zero
      1 / decay_factor steps after the warm-up.
    - rsqrt_decay: 1 / sqrt(max(step, W, 1)).
    - rsqrt_normalized_decay: sqrt(W) / sqrt(max(step, W)), which is 1 until the end of the warm-up.
    - decay_every: decay_factor to the power of step // steps_per_decay.
    - cosine_decay: half a period of a cosine, from 1 to 0, which starts again every steps_per_cycle
      steps after the warm-up.
    - linear_to_zero, cosine_to_zero: a line, or half a period of a cosine, from 1 at the end of the
      warm-up to 0 at total_steps.

    Args:
      factors: names of factors joined by `*`, such as 'constant * linear_warmup * cosine_to_zero'.
      base_learning_rate: learning rate of the factors `constant` and `linear_decay`.
      warmup_steps: number of steps of the warm-up.
      total_steps: number of steps of the training; linear_to_zero and cosine_to_zero end there.
      decay_factor: see linear_decay and decay_every.
      steps_per_decay: see decay_every.
      steps_per_cycle: see cosine_decay.
      step_offset: number of steps to subtract from each step.
      min_learning_rate: lower bound of the result; a warm-up starts from it instead of 0.

    Raises:
      InputError: a factor is unknown, a setting that it needs is missing, or there is no learning
        rate.
    """
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in _FACTORS:
            raise InputError(f"SCHEDULE must be a product of {[*_FACTORS]}, got factor {name!r}")
        if name.endswith("_to_zero") and total_steps is None:
            raise InputError(f"SCHEDULE factor {name!r} needs total_steps, got None")
        if name == "rsqrt_normalized_decay" and warmup_steps < 1:
            raise InputError(
                f"WARMUP_STEPS must be at least 1 for SCHEDULE factor {name!r}, got {warmup_steps}"
            )

    if base_learning_rate is None:  # LEARNING_RATE is None in gin unless a file or a flag sets it
        raise InputError(
            "LEARNING_RATE is not set: pass --gin_file=methods/… or --gin.LEARNING_RATE=…"
        )

    def schedule(step: Step) -> jax.Array | float:
        step = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        warmup = step / warmup_steps if warmup_steps else jnp.ones_like(step)
        # At least 1, since without a warm-up T5X's formula divides by zero at step 0.
        root = jnp.sqrt(jnp.maximum(step, max(warmup_steps, 1)))
        cycle = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle) % 1.0
        decay_steps = max((total_steps or 0) - warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        linear_decay = jnp.minimum(warmup, 1.0 + decay_factor * (warmup_steps - step))
        values: dict[str, Callable[[], jax.Array | float]] = {
            "constant": lambda: base_learning_rate,
            "linear_warmup": lambda: jnp.minimum(1.0, warmup),
            "linear_decay": lambda: base_learning_rate * linear_decay,
            "rsqrt_decay": lambda: 1.0 / root,
            "rsqrt_normalized_decay": lambda: math.sqrt(warmup_steps) / root,
            "decay_every": lambda: decay_factor ** (step // steps_per_decay),
            "cosine_decay": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * cycle)),
            "linear_to_zero": lambda: 1.0 - progress,
            "cosine_to_zero": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        }
        rate = math.prod((values[name]() for name in names), start=jnp.asarray(1.0, jnp.float32))
        return jnp.maximum(rate, min_learning_rate)

    schedule.__name__ = factors  # shown in the summary of a run
    return schedule
