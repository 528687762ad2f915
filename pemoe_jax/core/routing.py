"""Routers: from a token's features to a distribution over experts (arXiv 2309.05444, 2.2)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pemoe_jax.core import params as params_lib

Initializer = jax.nn.initializers.Initializer


class Router(nn.Module):
    """Soft router: softmax over experts of one dense layer without bias, in float32.

    Attributes:
      num_experts: E.
      kernel_init: the paper's code draws the kernel from N(0, 0.02).
      feature_axis: logical name of the axis that is read.
    """

    num_experts: int
    kernel_init: Initializer = nn.initializers.normal(stddev=0.02)
    feature_axis: str = "embed"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., features] -> probabilities [..., E], float32, that sum to one."""
        kernel = params_lib.param(
            self,
            "kernel",
            self.kernel_init,
            (inputs.shape[-1], self.num_experts),
            (self.feature_axis, "expert"),
        )
        logits = jnp.matmul(inputs.astype(jnp.float32), kernel)
        return jax.nn.softmax(logits, axis=-1)


RouterFactory = Any  # callable(num_experts=..., feature_axis=..., name=...) -> Router
