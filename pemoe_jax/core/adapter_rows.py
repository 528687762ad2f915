"""Batches in which each row has its own adapter, on one base model."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax

from pemoe_jax.core import params as params_lib
from pemoe_jax.core.params import Params, PyTree

if TYPE_CHECKING:
    from pemoe_jax.core.network import Transformer

Array = jax.Array


# Cached, since two equal calls would otherwise return two functions, and JAX would compile both.
# The bound limits the number of compiled programs in memory.
@functools.lru_cache(maxsize=32)
def map_adapters(
    function: Callable[..., Array], model: "Transformer", **settings: object
) -> Callable[[Params, Params, Array, Mapping[str, PyTree], Mapping[str, PyTree]], Array]:
    """Transforms a function of a batch into a function in which each row has its own adapter.

    The base's matrices have no axis that `jax.vmap` maps over, so each product with one of them is
    still computed for the whole batch at once.

    Args:
      function: a function `f(model, params, **rows, **settings, **options)` of a batch, such as
        `steps.score_choices` or `decoding.greedy_decode`.
      model: the network, the same for all adapters.
      settings: keyword arguments that are constants of the program; each combination of their
        values compiles a program.

    Returns:
      A jitted function of (base, adapters, ids, rows, options):

      - base: the base's parameters.
      - adapters: the parameters of A adapters, stacked [A, …].
      - ids: int [B], the index of each row's adapter.
      - rows: the arguments of `function` that have a batch axis, [B, …].
      - options: the arguments of `function` that have no batch axis.
    """

    @jax.jit
    def apply(
        base: Params,
        adapters: Params,
        ids: Array,
        rows: Mapping[str, PyTree],
        options: Mapping[str, PyTree],
    ) -> Array:
        def apply_to_row(adapter: Params, row: Mapping[str, PyTree]) -> Array:
            batch_of_one = jax.tree.map(lambda array: array[None], dict(row))
            params = params_lib.merge(adapter, base)
            return function(model, params, **batch_of_one, **settings, **options)[0]

        row_adapters = jax.tree.map(lambda array: array[ids], adapters)  # [A, …] -> [B, …]
        return jax.vmap(apply_to_row)(row_adapters, dict(rows))

    return apply
