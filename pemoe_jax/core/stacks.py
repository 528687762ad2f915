"""The layers of a stack: one after another or as one loop, with activations kept or recomputed.

As a loop a stack is compiled once however deep it is. It reads each parameter of its layers as one
array `<stack>/layers/…` [N, …], stacked by `stacked` ahead of time where it is frozen, and on the
way where it trains: states, checkpoints and masks know `<stack>/layers_<i>/…` alone.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import quantized
from pemoe_jax.core.errors import InputError

Array = jax.Array


def _all_but_copies(primitive: Any, *of: Any, **settings: Any) -> bool:
    if primitive.name == "convert_element_type":
        return bool(settings["new_dtype"].itemsize <= of[0].dtype.itemsize)
    return primitive.name not in ("sharding_constraint", "broadcast_in_dim", "reshape")


# What the backward pass finds of a layer, beside what the layer read, under T5X's names: all that
# it needs; what its frozen matrices gave and the fused attention, but nothing that adapters made of
# these; nothing. It computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    # A constraint of where a parameter lies would be kept as an array of its own, and a loop would
    # so keep a second copy of all its weights.
    "none": _all_but_copies,
    "minimal": jax.checkpoint_policies.save_only_these_names("product", "attended"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

_COLLECTIONS = ("routers", "intermediates")  # what layers tell, for callers that ask for it
_OF_LAYER = re.compile(r"(.*?)layers_(\d+)/(.*)")


def check_remat_policy(name: Any) -> None:
    """Raises InputError where there is no such policy."""
    if name not in REMAT_POLICIES:
        raise InputError(f"REMAT_POLICY: expected one of {[*REMAT_POLICIES]}, found {name!r}")


def apply_layers(
    stack: nn.Module,
    make: Callable[..., nn.Module],
    count: int,
    call: Callable[[Any, Array], Array],
    x: Array,
    scan: bool = False,
    remat_policy: str = "none",
) -> Array:
    """x [B, L, D] through the layers `layers_0`, … of a stack, in whose compact method this is.

    Args:
      stack: whose layers they are.
      make: (name=…) -> a layer; all layers are alike.
      count: N.
      call: (layer, x) -> x, what the layer reads beside x filled in.
      x: what the first layer reads.
      scan: as a loop. Dropout then draws other masks, as good as those of the unrolled form.
      remat_policy: one of `REMAT_POLICIES`.
    """
    policy = REMAT_POLICIES[remat_policy]
    if scan and count:
        return _scanned(stack, make, count, call, x, policy)
    if remat_policy != "none":
        call = nn.remat(call, policy=policy)
    for i in range(count):
        x = call(make(name=f"layers_{i}"), x)
    return x


def _scanned(
    stack: nn.Module,
    make: Callable[..., nn.Module],
    count: int,
    call: Callable[[Any, Array], Array],
    x: Array,
    policy: Callable[..., bool],
) -> Array:
    layer = make(parent=None)
    told_of = [name for name in _COLLECTIONS if stack.is_mutable_collection(name)]
    keys = jax.random.split(stack.make_rng("dropout"), count) if stack.has_rng("dropout") else None
    params = stack_layers(stack.variables["params"], lambda _: count)["layers"]

    def body(x: Array, of_layer: Any) -> Any:
        params, key = of_layer
        rngs = None if key is None else {"dropout": key}
        return nn.apply(call, layer, mutable=told_of)({"params": params}, x, rngs=rngs)

    # in a loop the forward pass is out of the backward pass' reach: no barrier between the two
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, told = jax.lax.scan(body, x, (params, keys))
    for name, tree in told.items():
        for i in range(count):
            of_layer = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
            stack.put_variable(name, f"layers_{i}", of_layer)
    return x


def stack_layers(
    params: Mapping[str, Any],
    depth_of: Callable[[str], int],
    join: Callable[[list[Any]], Any] = jnp.stack,
) -> dict[str, Any]:
    """Parameters with those of `layers_0`, `layers_1`, … joined under `layers`, for a loop.

    What only some layers of a stack have here (where a part of them trains) stays where it is.

    Args:
      params: of a stack, or of a tree with stacks in it.
      depth_of: what comes before 'layers_0' of a path, as 'encoder/' -> how many layers there are.
      join: [N] leaves -> one leaf.
    """
    found: dict[str, Any] = {}
    of_layers: dict[tuple[str, str], dict[int, Any]] = {}
    for path, leaf in params_lib.flatten(params).items():
        match = _OF_LAYER.fullmatch(path)
        if match is None:
            found[path] = leaf
        else:
            of_layers.setdefault((match[1], match[3]), {})[int(match[2])] = leaf
    for (before, rest), leaves in of_layers.items():
        if len(leaves) == depth_of(before):
            ordered = [leaves[i] for i in sorted(leaves)]
            if len({jax.tree.structure(leaf) for leaf in ordered}) > 1:
                # some train, the others are quantized
                ordered = [
                    quantized.dequantize(leaf)
                    if isinstance(leaf, quantized.QuantizedMatrix)
                    else leaf
                    for leaf in ordered
                ]
            # a quantized matrix has two arrays
            found[f"{before}layers/{rest}"] = jax.tree.map(lambda *one: join([*one]), *ordered)
        else:
            found |= {f"{before}layers_{i}/{rest}": leaf for i, leaf in leaves.items()}
    return params_lib.unflatten(found)


def stack_and_delete(leaves: list[jax.Array]) -> jax.Array:
    """[N] arrays -> one, spread as they are; the N are deleted, so that there is one copy too many
    of one parameter at a time and never of the model."""
    whole = _join(_stacked_sharding(leaves[0].sharding))(leaves)
    whole.block_until_ready()
    for leaf in leaves:
        leaf.delete()
    return whole


def stack_abstract(leaves: list[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
    """What `stack_and_delete` gives, as a shape."""
    shape, dtype = (len(leaves), *leaves[0].shape), leaves[0].dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_stacked_sharding(leaves[0].sharding))


@functools.cache
def _join(sharding: Any) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(jnp.stack, out_shardings=sharding)


def _stacked_sharding(sharding: Any) -> Any:
    """With an axis before the others that is not spread."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
