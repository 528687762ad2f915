"""Weight-only quantization of frozen matrices: one byte per value, a scale per output channel.

A matrix is cast to the activation dtype where it is used. Scales are proportional to the absolute
maxima of columns, as in LLM.int8() (arXiv 2208.07339). The format e4m3 is that of FP8 Formats for
Deep Learning (arXiv 2209.05433).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pemoe_jax.core.errors import InputError

ACTIVATIONS = "activations"  # not quantized: frozen matrices have the activation dtype
FROZEN_DTYPES = (ACTIVATIONS, "int8", "float8_e4m3fn")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [in, out] as `values * scale`; takes the place of a kernel in a parameter tree.

    Of matrices [E, in, out], each expert's matrix is quantized separately.

    Attributes:
      values: int8 or float8_e4m3fn [in, out] or [E, in, out].
      scale: float32 [out] or [E, out]; all scales are also exact in bfloat16.
    """

    # Any, because as a pytree it also holds shapes and shardings in place of the arrays.
    values: Any
    scale: Any

    # For code that counts and compares the arrays of a parameter tree.
    shape = property(lambda self: tuple(self.values.shape))
    dtype = property(lambda self: self.values.dtype)
    size = property(lambda self: int(self.values.size))


def check_frozen_dtype(frozen_dtype: object) -> None:
    """Raises InputError if the setting is not one of `FROZEN_DTYPES`."""
    if frozen_dtype not in FROZEN_DTYPES:
        raise InputError(f"FROZEN_DTYPE must be one of {[*FROZEN_DTYPES]}, got {frozen_dtype!r}")


def quantize(matrix: jax.Array, dtype: str) -> QuantizedMatrix:
    """Rounds a matrix [in, out], or [E, in, out], to 'int8' or 'float8_e4m3fn'.

    The sharding stays the same. The error of a value is at most scale / 2 for int8. For
    float8_e4m3fn, it is at most 1/16 of the value, or scale / 1024 for values near zero.
    """
    sharding = matrix.sharding
    named = sharding if isinstance(sharding, NamedSharding) else None
    return _quantizer(dtype, matrix.ndim, named)(matrix)


def quantized_shape(
    matrix: jax.ShapeDtypeStruct, frozen_dtype: str
) -> QuantizedMatrix | jax.ShapeDtypeStruct:
    """Returns the shape and sharding of `quantize`'s result, or the matrix if it stays as it is."""
    if frozen_dtype == ACTIVATIONS:
        return matrix
    shardings = _shardings(matrix.sharding, len(matrix.shape))
    scale_shape = (*matrix.shape[:-2], matrix.shape[-1])
    return QuantizedMatrix(
        jax.ShapeDtypeStruct(matrix.shape, jnp.dtype(frozen_dtype), sharding=shardings.values),
        jax.ShapeDtypeStruct(scale_shape, jnp.float32, sharding=shardings.scale),
    )


# Cached, so that matrices of the same shape and sharding share one compiled program.
@functools.cache
def _quantizer(
    dtype: str, ndim: int, sharding: NamedSharding | None
) -> Callable[[jax.Array], QuantizedMatrix]:
    largest = float(jnp.iinfo(dtype).max if dtype == "int8" else jnp.finfo(dtype).max)

    def quantize_matrix(matrix: jax.Array) -> QuantizedMatrix:
        matrix = matrix.astype(jnp.float32)
        scale = jnp.max(jnp.abs(matrix), axis=-2, keepdims=True) / largest  # [1, out]
        # Rounded to bfloat16, so that float32 and bfloat16 activations use the same scale.
        scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
        scale = jnp.where(scale > 0, scale, 1.0)  # for columns of zeros
        # If the scale was rounded down, the largest value is slightly out of range.
        scaled = jnp.clip(matrix / scale, -largest, largest)
        values = (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype)
        return QuantizedMatrix(values, jnp.squeeze(scale, axis=-2))

    out_shardings = None if sharding is None else _shardings(sharding, ndim)
    return jax.jit(quantize_matrix, out_shardings=out_shardings)


def _shardings(sharding: jax.sharding.Sharding | None, ndim: int) -> QuantizedMatrix:
    """Returns the shardings of `values`, and of `scale`, which lacks the axis `in`."""
    if not isinstance(sharding, NamedSharding):
        return QuantizedMatrix(sharding, sharding)
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    scale_spec = PartitionSpec(*spec[:-2], spec[-1])
    return QuantizedMatrix(sharding, NamedSharding(sharding.mesh, scale_spec))


def dequantize(matrix: QuantizedMatrix) -> jax.Array:
    """Returns the matrix in float32, [in, out] or [E, in, out]."""
    return matrix.values.astype(jnp.float32) * matrix.scale[..., None, :]


def matmul(x: jax.Array, matrix: QuantizedMatrix, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Multiplies x [..., in] with a matrix [in, out] -> [..., out] in the activation dtype."""
    # The cast is exact, since bfloat16 represents all values of int8 and float8_e4m3fn. Scaling the
    # product instead of the matrix saves a pass over the matrix.
    return jnp.matmul(x.astype(dtype), matrix.values.astype(dtype)) * matrix.scale.astype(dtype)


def expert_matmul(x: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
    """Multiplies x [E, M, in] with matrices [E, in, out] -> [E, M, out] in x's dtype."""
    product = jnp.einsum("emd,edf->emf", x, matrix.values.astype(x.dtype))
    return product * matrix.scale.astype(x.dtype)[:, None]
