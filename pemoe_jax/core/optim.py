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
# (schedule, param_axes=…) -> the optimizer of those parameters.
OptimizerFactory: TypeAlias = Callable[..., optax.GradientTransformation]

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
    """Adafactor (arXiv 1804.04235) as T5 was trained with it: without momentum.

    With `multiply_by_parameter_scale` an update is multiplied by the parameter's root mean square,
    which counts as at least 1e-3: LoRA's B, which starts at zero, then starts slowly.

    Each expert of a parameter is updated as if it were a parameter of its own, as by T5X's
    `FactorDim.BATCH` for the axis `expert`. Routers, which compare experts, are one parameter each,
    and are not factored over their experts.

    Args:
      learning_rate: step -> learning rate.
      decay_rate: c; the second moments decay by 1 - (step - step_offset + 1)^-c.
      step_offset: subtracted from the step in this decay. To continue a base model's count of
        steps, as T5X does, pass minus its number of steps; second moments then hardly decay.
      clipping_threshold: bound of an update's root mean square; None: no bound.
      multiply_by_parameter_scale: see above.
      min_dim_size_to_factor: smallest size of two axes over which second moments are factored.
      weight_decay_rate: rate of the weight decay; None: no decay.
      clip_norm: bound of the gradient's global norm; None: no bound.
      per_expert: whether root mean squares are those of an expert or, as in the paper's code, of
        all experts of a parameter. Second moments are by expert in either case.
      param_axes: names of the parameters' axes; None: no parameter has experts.
    """
    map_over = functools.partial(_map_over_axis, param_axes=param_axes or {})
    rms_axes = _EXPERT_AXES if per_expert else ()
    # The order, and so the state, is that of `optax.adafactor`.
    second_moments = optax.scale_by_factored_rms(
        decay_rate=decay_rate,
        step_offset=step_offset,
        min_dim_size_to_factor=min_dim_size_to_factor,
        epsilon=1e-30,
    )
    parts = [map_over(second_moments, names=(*_EXPERT_AXES, "unmodeled"))]
    if clipping_threshold is not None:
        parts.append(map_over(optax.clip_by_block_rms(clipping_threshold), names=rms_axes))
    parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(map_over(optax.scale_by_param_block_rms(), names=rms_axes))
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
    """Maps a transformation over the axis of each parameter whose name is in `names`.

    Parameters without such an axis are not split. A state with the shape of a parameter's slice is
    stacked along the same axis; any other state, such as a factored moment, along axis 0.
    """
    positions = {
        path: next((i for i, axis in enumerate(axes) if axis in names), None)
        for path, axes in param_axes.items()
    }
    if not any(position is not None for position in positions.values()):
        return transformation

    def slice_axes(params: Params) -> list[tuple[PyTree, PyTree]]:
        """Returns (parameter axes, state axes) for `vmap`, for each size of the mapped axis."""
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
        # All axes of one `vmap` must have the same size.
        for param_map, state_map in slice_axes(params):
            function = jax.vmap(function, in_axes=(param_map,), out_axes=state_map)
        return function(params)

    def update(
        updates: Params, state: PyTree, params: Params | None = None
    ) -> tuple[PyTree, PyTree]:
        function = transformation.update
        for param_map, state_map in slice_axes(updates):
            axes = (param_map, state_map)
            function = jax.vmap(function, in_axes=(*axes, param_map), out_axes=axes)
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
    """AdamW (arXiv 1711.05101); `clip_norm` bounds the gradient's global norm, None does not."""
    del param_axes  # moments are per entry, so experts need no special treatment
    optimizer = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _clip(optimizer, clip_norm)


# T5X's factors, and two of our own.
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
    """Returns step -> learning rate, a product of named factors.

    The first seven factors have T5X's values (`t5x.utils.create_learning_rate_scheduler`). With
    W = warmup_steps:

    - constant: base_learning_rate.
    - linear_warmup: min(1, step / W), or 1 without a warm-up.
    - linear_decay: base_learning_rate * min(step / W, 1 + decay_factor * (W - step)); it contains
      `constant` and `linear_warmup`, and reaches zero 1 / decay_factor steps after the warm-up.
    - rsqrt_decay: 1 / sqrt(max(step, W)).
    - rsqrt_normalized_decay: sqrt(W) / sqrt(max(step, W)), which is 1 until the end of the warm-up.
    - decay_every: decay_factor to the power of step // steps_per_decay.
    - cosine_decay: half a cosine from 1 to 0, once every steps_per_cycle steps after the warm-up.
    - linear_to_zero, cosine_to_zero: a line and half a cosine from 1 at the end of the warm-up to 0
      at total_steps.

    Args:
      factors: names of factors joined by `*`, such as 'constant * linear_warmup * cosine_to_zero'.
      base_learning_rate: learning rate of the factors `constant` and `linear_decay`.
      warmup_steps: number of steps of the warm-up.
      total_steps: number of steps of the training; linear_to_zero and cosine_to_zero end there.
      decay_factor: see linear_decay and decay_every.
      steps_per_decay: see decay_every.
      steps_per_cycle: see cosine_decay.
      step_offset: number of steps to subtract from each step.
      min_learning_rate: lower bound of the result, which a warm-up starts from.

    Raises:
      InputError: a factor is unknown, or a setting that it needs is missing.
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

    if base_learning_rate is None:  # in gin, where no file or flag sets it
        raise InputError(
            "LEARNING_RATE is not set: pass --gin_file=methods/… or --gin.LEARNING_RATE=…"
        )

    def schedule(step: Step) -> jax.Array | float:
        step = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        warmup = step / warmup_steps if warmup_steps else jnp.ones_like(step)
        # At least 1: without a warm-up, T5X divides by zero at step 0.
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
