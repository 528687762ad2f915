"""Finds where a training step's first infinity or NaN comes from."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import steps
from pemoe_jax.core.params import Params, PyTree


def find_source(
    model: steps.Model,
    loss: steps.Loss,
    trainable: Params,
    frozen: Params,
    batch: steps.Batch,
    rng: jax.Array,
    microbatches: int,
) -> str:
    """Names the first value that holds infinity or NaN, for example 'the parameter a/b'.

    The candidates are, in this order, the parameters, the outputs of modules in the forward pass,
    the gradients, and the loss. The forward pass runs without compilation, one operation at a time.
    Layers inside a scan or rematerialization are traced even so, and have no values to check; the
    stack around them is named instead.

    Args:
      model, loss, trainable, frozen, batch, microbatches: see `steps.grads_and_metrics`.
      rng: the dropout key of the step.
    """
    params = params_lib.merge(trainable, frozen)
    for path, leaf in params_lib.flatten(params).items():
        if not _is_finite(leaf):
            return f"the parameter {path}"
    source: list[str] = []

    def check(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        # A module returns before the modules that contain it, so the innermost one is named.
        if not source and not _is_finite(output):
            source.append("/".join(context.module.path) or "the model")
        return output

    with nn.intercept_methods(check):
        steps.apply_model(model, params, batch, rng, mutable=["routers"])
    if source:
        return f"the output of {source[0]}"
    grads, _ = steps.grads_and_metrics(model, loss, trainable, frozen, batch, rng, microbatches)
    for path, leaf in params_lib.flatten(grads).items():
        if not _is_finite(leaf):
            return f"the gradient of {path}"
    return "the loss"


def _is_finite(tree: PyTree) -> bool:
    """Whether all floats of a tree are finite; traced values, which are unknown, are skipped."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
