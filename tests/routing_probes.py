"""Router probabilities of a model, without the package's probes."""

import functools

import jax

from pemoe_jax.core import params, steps


@functools.partial(jax.jit, static_argnums=0)
def router_probs(transformer, weights, batch) -> dict:
    """Returns {<site>_adapter/probs: [B, L, (H,) E]}."""
    _, collections = steps.apply_model(transformer, weights, batch, None, mutable=["intermediates"])
    return {path: probs for path, (probs,) in params.flatten(collections["intermediates"]).items()}
