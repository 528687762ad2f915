"""Upcycling: makes the arrays of a sparse model from those of a dense one (arXiv 2212.05055).

Each expert is a copy of its block's MLP, optionally with noise: each weight of each expert is then
multiplied by its own draw of 1 + N(0, σ²). Routers are drawn at random. The extra MLP of ST-MoE, a
dense MLP after the experts, is a copy too, except for its last matrix, which is zero, so that the
extra MLP adds nothing at the start.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pemoe_jax.checkpoints.base_model import BaseModel
from pemoe_jax.checkpoints.lazy_array import Index, LazyArray, from_numpy
from pemoe_jax.core import network
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.network import Transformer

_COPIED_MLP = re.compile(r"(.*/)(mlp/expert|extra_mlp)/(\w+)/kernel")
# Parameters without a counterpart in the dense model, and `extra_mlp/wo`, which is set to zero
# instead of copied.
_INITIALIZED = re.compile(r".*/(mlp/router|pre_extra_mlp_layer_norm|extra_mlp/wo)/.*")


def source_path(path: str) -> str | None:
    """Returns the path of the dense array from which a sparse model's array is made.

    None for an array that is initialized instead: routers, and parts of the extra MLP.
    """
    if _INITIALIZED.fullmatch(path):
        return None
    match = _COPIED_MLP.fullmatch(path)
    return path if match is None else f"{match[1]}mlp/{match[3]}/kernel"


def names_by_source(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns {path of a dense array: paths of the sparse model's arrays that are made from it}."""
    names: dict[str, list[str]] = {}
    for path in paths:
        if source := source_path(path):
            names.setdefault(source, []).append(path)
    return names


def is_expert(path: str) -> bool:
    """Whether an array has a matrix of each expert of a layer, [E, in, out]."""
    return "/mlp/expert/" in path


def should_upcycle(model: Transformer, base: BaseModel) -> bool:
    """Whether a base has to be upcycled, because it is dense and the model is sparse.

    Raises:
      InputError: the base is sparse, and the model is dense or has other experts.
    """
    if base.sparse is None:
        return model.sparse is not None
    experts, step = base.sparse["num_experts"], base.sparse["sparse_step"]
    if model.sparse is None:
        raise InputError(
            f"{base} has {experts} experts in {_blocks(step)}: pass a method with experts"
            " (--gin_file=methods/flan_switch.gin), got a dense model"
        )
    for name, macro in (
        ("num_experts", "NUM_EXPERTS"),
        ("sparse_step", "SPARSE_STEP"),
        ("extra_mlp", "EXTRA_MLP"),
    ):
        expected, actual = base.sparse[name], getattr(model.sparse, name)
        if expected != actual:
            raise InputError(f"{macro} must be {expected}, as in the {base}, got {actual}")
    return False


def _blocks(step: int) -> str:
    return "every layer" if step == 1 else f"one of every {step} layers"


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """Makes the arrays of a sparse model from those of a dense base.

    Attributes:
      model: the sparse model.
      seed: seed of the routers and of the noise.
      noise: σ: each weight of each expert is multiplied by its own draw of 1 + N(0, σ²); 0: exact
        copies.
    """

    model: Transformer
    seed: int
    noise: float = 0.0

    def copy_to_experts(
        self, path: str, array: jax.Array, dtype: jnp.dtype, sharding: Sharding | None
    ) -> jax.Array:
        """Copies a matrix [in, out] to the experts [E, in, out] at `path`, on their devices."""
        assert self.model.sparse is not None
        key = None
        if self.noise:
            # The key depends on the path, so the noise does not depend on the order of loading.
            key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(path.encode()))
        copy = _copy_program(self.model.sparse.num_experts, jnp.dtype(dtype), sharding)
        return copy(array, key, self.noise)

    def draw(
        self, paths: Iterable[str], transform: params_lib.Transform = params_lib.identity
    ) -> dict[str, params_lib.PyTree]:
        """Initializes the parameters that are not made from a dense array.

        Args:
          paths: paths of parameters of the sparse model; those with a dense array are skipped.
          transform: applied to (path, array) of each.

        Returns:
          path -> array.
        """
        drawn_paths = {path for path in paths if source_path(path) is None}

        def zero_extra_wo(path: str, array: jax.Array) -> params_lib.PyTree:
            return transform(path, array * 0 if path.endswith("/extra_mlp/wo/kernel") else array)

        drawn = network.init_params(self.model, self.seed, drawn_paths.__contains__, zero_extra_wo)
        return params_lib.flatten(drawn)

    def lazy_arrays(self, dense: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
        """Returns all arrays of the sparse model, as path -> lazy array, for conversions."""
        shapes = params_lib.flatten(network.param_shapes(self.model, params_lib.is_base))
        arrays = {path: from_numpy(np.asarray(a)) for path, a in self.draw(shapes).items()}
        for path in shapes.keys() - arrays.keys():
            source = source_path(path)
            assert source is not None
            array = dense[source]
            arrays[path] = self._lazy_copies(path, array) if is_expert(path) else array
        return {path: arrays[path] for path in shapes}  # in the model's order

    def _lazy_copies(self, path: str, array: LazyArray) -> LazyArray:
        assert self.model.sparse is not None

        # All experts are made for any slice, because writers read whole arrays anyway.
        def read_slice(index: Index) -> np.ndarray:
            device_array = jnp.asarray(array.read())
            return np.asarray(self.copy_to_experts(path, device_array, array.dtype, None))[index]

        return LazyArray((self.model.sparse.num_experts, *array.shape), array.dtype, read_slice)


def dense_sharding(sharding: Sharding | None) -> Sharding | None:
    """Returns the sharding of a matrix [in, out], given the sharding of its copies [E, in, out]."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.cache
def _copy_program(
    num_experts: int, dtype: jnp.dtype, sharding: Sharding | None
) -> Callable[[jax.Array, jax.Array | None, float], jax.Array]:
    # The copies are made on the device, so that the host holds one matrix instead of E.
    def copy(array: jax.Array, key: jax.Array | None, noise: float) -> jax.Array:
        shape = (num_experts, *array.shape)
        if key is None:
            return jnp.broadcast_to(array.astype(dtype), shape)
        factor = 1.0 + noise * jax.random.normal(key, shape, jnp.float32)
        return (array.astype(jnp.float32) * factor).astype(dtype)

    return jax.jit(copy, out_shardings=sharding)
