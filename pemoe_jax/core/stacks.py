"""The layers of a stack: unrolled or scanned, with activations stored or rematerialized.

The body of a scan is compiled once, whatever the depth. It is a period of P layers, after which the
layers repeat: P = 1 if all layers are alike, and SPARSE_STEP in a sparse model. The scan needs each
parameter of the N / P layers j, j + P, … as one array [N / P, …]. The path of this array is
`<stack>/layers/…` for P = 1, and `<stack>/layers/<j>/…` otherwise.

Frozen parameters are stacked once, before training. Trainable parameters are stacked in each step,
since optimizer states, checkpoints and the patterns of TRAINABLE have the unstacked paths
`<stack>/layers_<i>/…`.
"""

import functools
import re
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pemoe_jax.core import params as params_lib
from pemoe_jax.core import quantized
from pemoe_jax.core.params import Params, PyTree

Array = jax.Array
# A policy of `jax.checkpoint`: (primitive, *avals, **parameters) -> whether its output is stored.
_Policy: TypeAlias = Callable[..., bool]


def _all_but_copies(
    primitive: Primitive, *avals: jax.core.ShapedArray, **parameters: PyTree
) -> bool:
    # Outputs that only copy parameters, such as those of sharding constraints, are not stored: a
    # scan would otherwise store a second copy of all its weights. Casts to a wider dtype are not
    # stored either, since it is cheaper to repeat them.
    if primitive.name == "convert_element_type":
        return bool(parameters["new_dtype"].itemsize <= avals[0].dtype.itemsize)
    return primitive.name not in ("sharding_constraint", "broadcast_in_dim", "reshape")


# Which activations of a layer are stored for its gradients, besides the layer's input. The others
# are recomputed. The keys are T5X's names:
# - `none` stores all activations that gradients need.
# - `minimal` stores the outputs of matrix products (named "product" in `layers`) and of fused
#   attention (named "attended"), but nothing that adapters compute from them.
# - `full` stores nothing.
REMAT_POLICIES: dict[str, _Policy] = {
    "none": _all_but_copies,
    "minimal": jax.checkpoint_policies.save_only_these_names("product", "attended"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Collections that layers sow into. A scan returns their arrays stacked over layers, and
# `_scan_layers` writes them back layer by layer.
_COLLECTIONS = ("routers", "intermediates")
_LAYER_PATH = re.compile(r"(.*?)layers_(\d+)/(.*)")


def apply_layers(
    stack: nn.Module,
    make_layer: Callable[..., nn.Module],
    num_layers: int,
    apply: Callable[[PyTree, Array], Array],
    x: Array,
    scan: bool,
    remat_policy: str,
    period: int = 1,
) -> Array:
    """Applies the N layers `layers_0`, `layers_1`, … of a stack to x [B, L, D].

    Args:
      stack: the module that has the layers; the call is inside its compact method.
      make_layer: (index, name=… or parent=…) -> layer `index`.
      num_layers: N.
      apply: (layer, x) -> the layer's output; it passes the layer's other arguments.
      x: input of the first layer.
      scan: whether to use `jax.lax.scan`. Dropout masks then differ from the unrolled form.
      remat_policy: one of `REMAT_POLICIES`.
      period: P, a divisor of N; layers i and i + P compute the same function of their parameters,
        whose shapes are the same.
    """
    policy = REMAT_POLICIES[remat_policy]
    # `init` always takes the unrolled form, so both forms have the parameters `layers_0/…`,
    # `layers_1/…`, …
    if scan and num_layers and not stack.is_initializing():
        return _scan_layers(stack, make_layer, num_layers, apply, x, policy, period)
    if remat_policy != "none" and not stack.is_initializing():
        apply = nn.remat(apply, policy=policy)
    for i in range(num_layers):
        x = apply(make_layer(i, name=f"layers_{i}"), x)
    return x


def _scan_layers(
    stack: nn.Module,
    make_layer: Callable[..., nn.Module],
    num_layers: int,
    apply: Callable[[PyTree, Array], Array],
    x: Array,
    policy: _Policy,
    period: int,
) -> Array:
    # `nn.scan` would create stacked parameters, but the tree must be that of T5X's minimal T5, with
    # one subtree per layer. So this is `jax.lax.scan` over layers without a parent module.
    mutable = [name for name in _COLLECTIONS if stack.is_mutable_collection(name)]
    has_rng = stack.has_rng("dropout")
    keys = jax.random.split(stack.make_rng("dropout"), num_layers) if has_rng else None
    params = stack_layers(stack.variables["params"], lambda _: num_layers, period=period)["layers"]

    def layer_function(j: int) -> Callable[[Array, PyTree, Array | None], tuple[Array, PyTree]]:
        layer_apply = nn.apply(apply, make_layer(j, parent=None), mutable=mutable)

        def apply_layer(x: Array, params: PyTree, key: Array | None) -> tuple[Array, PyTree]:
            return layer_apply({"params": params}, x, rngs={"dropout": key} if has_rng else None)

        # `prevent_cse` would add a barrier, so that XLA does not merge the recomputation with the
        # forward pass. The two are separate scans here, which XLA does not merge.
        return jax.checkpoint(apply_layer, policy=policy, prevent_cse=False)

    functions = [layer_function(j) for j in range(period)]

    def body(x: Array, inputs: list[tuple[PyTree, Array | None]]) -> tuple[Array, list[PyTree]]:
        collections = []
        for function, (layer_params, key) in zip(functions, inputs, strict=True):
            x, layer_collections = function(x, layer_params, key)
            collections.append(layer_collections)
        return x, collections

    inputs = [
        (params if period == 1 else params[str(j)], None if keys is None else keys[j::period])
        for j in range(period)
    ]
    x, collections = jax.lax.scan(body, x, inputs)
    # collections[j] has the arrays of the layers j, j + P, …, stacked.
    for i in range(num_layers):
        for name, tree in collections[i % period].items():
            layer_tree = jax.tree.map(lambda leaf, i=i: leaf[i // period], tree)
            stack.put_variable(name, f"layers_{i}", layer_tree)
    return x


def stack_layers(
    params: Params,
    depth: Callable[[str], int],
    stack_leaves: Callable[[list[PyTree]], PyTree] = jnp.stack,
    period: int = 1,
) -> dict[str, PyTree]:
    """Stacks the parameters of `layers_0`, `layers_1`, … as `layers`, for a scan.

    `params` may be the frozen part of a tree. A parameter that is frozen in only some of the layers
    j, j + P, … is not stacked.

    Args:
      params: parameters of a stack, or of a tree with stacks.
      depth: returns N for a stack's prefix, the part of a path before 'layers_0', such as
        'encoder/'.
      stack_leaves: N / P leaves -> one leaf.
      period: P.
    """
    flat: dict[str, PyTree] = {}
    # (prefix, j, rest of the path) -> layer -> leaf.
    by_layer: dict[tuple[str, int, str], dict[int, PyTree]] = {}
    for path, leaf in params_lib.flatten(params).items():
        match = _LAYER_PATH.fullmatch(path)
        if match is None:
            flat[path] = leaf
        else:
            index = int(match[2])
            by_layer.setdefault((match[1], index % period, match[3]), {})[index] = leaf
    for (prefix, j, rest), leaves in by_layer.items():
        if len(leaves) != depth(prefix) // period:
            flat |= {f"{prefix}layers_{i}/{rest}": leaf for i, leaf in leaves.items()}
            continue
        ordered = [leaves[i] for i in sorted(leaves)]
        if len(set(map(jax.tree.structure, ordered))) > 1:
            # If only some layers train this parameter, its leaves are arrays in these layers and
            # quantized matrices in the others. They are dequantized, since only equal structures
            # can be stacked.
            ordered = [
                quantized.dequantize(leaf) if isinstance(leaf, quantized.QuantizedMatrix) else leaf
                for leaf in ordered
            ]
        # A quantized matrix is a pytree of two arrays, which are stacked separately.
        stacked = jax.tree.map(lambda *each: stack_leaves([*each]), *ordered)
        flat[f"{prefix}layers/{rest}" if period == 1 else f"{prefix}layers/{j}/{rest}"] = stacked
    return params_lib.unflatten(flat)


def stack_and_delete(leaves: list[jax.Array]) -> jax.Array:
    """Stacks N arrays, keeping their sharding, and deletes them."""
    # Waiting and deleting here limits the copies in memory to one parameter at a time.
    stacked = _stack_program(_stacked_sharding(leaves[0].sharding))(leaves)
    stacked.block_until_ready()
    for leaf in leaves:
        leaf.delete()
    return stacked


def stack_abstract(leaves: list[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
    """Returns the shape and sharding of the array that `stack_and_delete` would return."""
    shape, dtype = (len(leaves), *leaves[0].shape), leaves[0].dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_stacked_sharding(leaves[0].sharding))


# Cached, so that parameters of the same shape and sharding share one compiled program.
@functools.cache
def _stack_program(sharding: Sharding | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(jnp.stack, out_shardings=sharding)


def _stacked_sharding(sharding: Sharding | None) -> Sharding | None:
    """Returns the sharding with a new leading axis, which is not sharded."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
