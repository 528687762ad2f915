"""Frozen matrices kept in one byte a value, with a scale for each output channel (weight-only).

They are widened to the activations' type where they are used. LLM.int8() (arXiv 2208.07339) has the
absolute maximum of a vector as the scale, FP8 Formats for Deep Learning (arXiv 2209.05433) e4m3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pemoe_jax.core.errors import InputError

ACTIVATIONS = "activations"  # frozen matrices are kept in their type, as they are
FROZEN_DTYPES = (ACTIVATIONS, "int8", "float8_e4m3fn")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [in, out]: `values * scale`. A leaf of a tree of parameters by its path.

    Attributes:
      values: int8 or float8_e4m3fn [in, out].
      scale: float32 [out], each rounded to bfloat16, so that it is the same in either type of
        activations.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def size(self) -> int:
        """Number of values."""
        return int(self.values.size)


def check_frozen_dtype(frozen_dtype: Any) -> None:
    """Raises InputError where there is no such way of keeping frozen matrices."""
    if frozen_dtype not in FROZEN_DTYPES:
        raise InputError(
            f"FROZEN_DTYPE: expected one of {[*FROZEN_DTYPES]}, found {frozen_dtype!r}"
        )


def quantize(matrix: jax.Array, dtype: str) -> QuantizedMatrix:
    """The nearest values: of int8 half a scale away at most, of float8 1/16 of themselves.

    Args:
      matrix: float32 [in, out]; the result lies as it does.
      dtype: 'int8' or 'float8_e4m3fn'.
    """
    sharding = matrix.sharding
    return _quantizer(dtype, sharding if isinstance(sharding, NamedSharding) else None)(matrix)


def quantized_shape(matrix: jax.ShapeDtypeStruct, frozen_dtype: str) -> Any:
    """What `quantize` gives, as shapes; the matrix itself where it is kept as it is."""
    if frozen_dtype == ACTIVATIONS:
        return matrix
    lies = _shardings(matrix.sharding)
    return QuantizedMatrix(
        jax.ShapeDtypeStruct(matrix.shape, jnp.dtype(frozen_dtype), sharding=lies.values),
        jax.ShapeDtypeStruct(matrix.shape[1:], jnp.float32, sharding=lies.scale),
    )


@functools.cache
def _quantizer(
    dtype: str, sharding: NamedSharding | None
) -> Callable[[jax.Array], QuantizedMatrix]:
    largest = float(jnp.iinfo(dtype).max if dtype == "int8" else jnp.finfo(dtype).max)

    def quantized(matrix: jax.Array) -> QuantizedMatrix:
        matrix = matrix.astype(jnp.float32)
        scale = jnp.max(jnp.abs(matrix), axis=0) / largest  # [out]
        scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
        scale = jnp.where(scale > 0, scale, 1.0)
        # a scale that was rounded down leaves the largest value a quarter beyond its end
        scaled = jnp.clip(matrix / scale, -largest, largest)
        return QuantizedMatrix(
            (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype), scale
        )

    return jax.jit(quantized, out_shardings=None if sharding is None else _shardings(sharding))


def _shardings(sharding: Any) -> QuantizedMatrix:
    """Where both parts lie: the scale as the matrix's last axis."""
    if not isinstance(sharding, NamedSharding):
        return QuantizedMatrix(sharding, sharding)
    last = PartitionSpec(*sharding.spec[1:])
    return QuantizedMatrix(sharding, NamedSharding(sharding.mesh, last))


def dequantize(matrix: QuantizedMatrix) -> jax.Array:
    """float32 [in, out]."""
    return matrix.values.astype(jnp.float32) * matrix.scale


def matmul(x: jax.Array, matrix: QuantizedMatrix, dtype: Any) -> jax.Array:
    """[..., in] -> [..., out], in the activations' type, which holds all values as they are."""
    return jnp.matmul(x.astype(dtype), matrix.values.astype(dtype)) * matrix.scale.astype(dtype)
