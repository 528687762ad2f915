"""Optimizers and learning-rate schedules, with T5X's settings as defaults."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from pemoe_jax.core.errors import InputError

Step: TypeAlias = jax.typing.ArrayLike
Schedule: TypeAlias = Callable[[Step], jax.Array | float]
OptimizerFactory: TypeAlias = Callable[[Schedule], optax.GradientTransformation]


def adafactor(
    learning_rate: Schedule,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
    weight_decay_rate: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) as T5 was trained with it: without momentum.

    With `multiply_by_parameter_scale` a step is relative to the root mean square of the parameter,
    but at least 1e-3: LoRA's B, which starts at zero, then starts slowly.
    """
    return optax.adafactor(
        learning_rate=learning_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        weight_decay_rate=weight_decay_rate,
    )


def adamw(
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101); `clip_norm` bounds the gradient's global norm, None does not."""
    optimizer = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


_FACTORS = ("constant", "linear_warmup", "rsqrt_decay", "linear_decay", "cosine_decay")


def create_learning_rate_scheduler(
    factors: str = "constant",
    base_learning_rate: float = 1e-3,
    warmup_steps: int = 0,
    total_steps: int | None = None,
) -> Schedule:
    """Returns step -> learning rate, a product of named factors as in T5X.

    Args:
      factors: factors joined by `*`: constant (the base learning rate), linear_warmup (0 to 1 over
        warmup_steps), rsqrt_decay (1 / sqrt(max(step, warmup_steps, 1))), linear_decay and
        cosine_decay (1 to 0 from the end of the warm-up to total_steps).
      base_learning_rate: the base learning rate, which is the factor `constant`.
      warmup_steps: number of steps that linear_warmup takes; decays begin after them.
      total_steps: step at which the decays end.

    Raises:
      InputError: a factor is unknown, or a decay has no total_steps.
    """
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in _FACTORS:
            raise InputError(f"SCHEDULE must be a product of {[*_FACTORS]}, got factor {name!r}")
        if name in ("linear_decay", "cosine_decay") and total_steps is None:
            raise InputError(f"SCHEDULE factor {name!r} needs total_steps, got None")

    def schedule(step: Step) -> jax.Array | float:
        step = jnp.asarray(step, jnp.float32)
        decay_steps = max((total_steps or 0) - warmup_steps, 1)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        values: dict[str, Callable[[], jax.Array | float]] = {
            "constant": lambda: base_learning_rate,
            "linear_warmup": lambda: jnp.minimum(1.0, step / max(warmup_steps, 1)),
            "rsqrt_decay": lambda: jax.lax.rsqrt(jnp.maximum(step, max(warmup_steps, 1))),
            "linear_decay": lambda: 1.0 - progress,
            "cosine_decay": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        }
        return math.prod((values[name]() for name in names), start=jnp.asarray(1.0, jnp.float32))

    return schedule
