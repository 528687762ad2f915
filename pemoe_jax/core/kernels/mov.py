"""MoV's layer in fused kernels for one GPU: `y * Σ_e softmax(y k)_e l_e`, and its gradients.

With array operations, both passes write and read a float32 scale of y's size. The forward kernels
only read y and write the product. The backward kernels only read y and the gradient of the output,
and write the gradient of y. A step of MoV-10 with T5 XL's sizes takes 84.7 ms on an H200; with
array operations, it takes 103 ms.

A row is one token. The unit of the memory traffic below is reading and writing y once.

- If a head's features fit into one tile (key, value), each pass is one kernel. The traffic is 1 in
  the forward pass and 1½ in the backward pass.
- Otherwise (gate), the probabilities of a row depend on all its tiles of features, and so do the
  gradients of its logits. Each pass then has two kernels, with a traffic of 1½ forward and 2½
  backward. The first kernel reads y (backward, also the output's gradient) and computes the
  probabilities (or the gradients of the logits), [rows, E]. The second kernel uses them on tiles of
  rows and features. It starts with the features that the first kernel read last, which are likely
  still in the L2 cache.

If y is float32, products are three passes of TF32, which is nearly float32. If y is bfloat16,
products have bfloat16 factors and float32 sums. Parameters, and the probabilities of the forward
pass, are then sums of two bfloat16 numbers (16 bits of mantissa). Gradients, and the probabilities
that multiply them, are rounded to bfloat16. Softmax and sums are always float32. Sums over rows
have a fixed order, so results are reproducible bit for bit.

Tested in Pallas's interpret mode, and on a GPU by `tests/core/test_gpu.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pemoe_jax.core.kernels import tiling
from pemoe_jax.core.kernels.tiling import Index, Ref

if TYPE_CHECKING:
    from jax.experimental import pallas as pl

Array = jax.Array
Carry = TypeVar("Carry")

_ROW_TILE = 64  # rows in a tile
_FEATURE_TILE_BYTES = 256  # size of one row of a tile: 128 bfloat16 or 64 float32 features
# Row tiles of a program in the forward pass. The program loads the parameters once for all of them.
_FORWARD_ROW_TILES = 4
# The largest number of programs of a backward kernel that sums over rows: eight for each of the 132
# multiprocessors of an H100 or H200.
_MAX_PROGRAMS = 1056


def is_supported() -> bool:
    """Whether the only device is a GPU. XLA cannot partition a kernel over several devices."""
    return jax.default_backend() == "gpu" and jax.device_count() == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def route_and_scale(
    y: Array, kernel: Array, vectors: Array, weights: Array, interpret: bool = False
) -> tuple[Array, Array]:
    """Returns `y * Σ_e p_e l_e` with `p = softmax(y @ kernel)`, and sums over p.

    Only reverse-mode gradients exist.

    Args:
      y: [B, L, H, K] or [B, L, F], float32 or bfloat16.
      kernel: [K or F, E], float32, shared by the heads.
      vectors: [H, E, K] or [E, F], float32.
      weights: [B, L], float32, the tokens' weights in the sums.
      interpret: whether to run the kernels on any device, slowly, for tests.

    Returns:
      The product, in y's shape and dtype, and four weighted sums over tokens and heads, float32
      [4, E]: the sums of p, of 1 for the expert with the largest p, of p's entropy, and of log(Z)².
      The last two have the same value for all experts. The sums have no gradient.
    """
    return _vjp_forward(y, kernel, vectors, weights, interpret)[0]


_Saved = tuple[Array, Array, Array, Array | None]  # y, kernel, vectors, probabilities


def _vjp_forward(
    y: Array, kernel: Array, vectors: Array, weights: Array, interpret: bool
) -> tuple[tuple[Array, Array], _Saved]:
    out, sums, probs = _Layer(y, kernel, interpret).forward(y, kernel, vectors, weights)
    return (out, sums), (y, kernel, vectors, probs)


def _vjp_backward(
    interpret: bool, saved: _Saved, grads: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    y, kernel, _, _ = saved
    return *_Layer(y, kernel, interpret).backward(*saved, grads[0]), None


route_and_scale.defvjp(_vjp_forward, _vjp_backward)


def _pad(x: Array, *shape: int) -> Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])


# The axes of the kernels' arrays. 'columns' are experts, padded. Each of the 'row programs' sums
# over a part of the rows.
_AXES = {
    **dict.fromkeys(("y", "grad", "out", "grad_y"), ("rows", "heads", "features")),
    "weights": ("rows", "one"),
    "kernel": ("parts", "features", "columns"),
    "vectors": ("heads", "parts", "features", "columns"),
    **dict.fromkeys(("probs", "grad_logits"), ("rows", "heads", "columns")),
    "sums": ("row programs", "heads", "sums", "columns"),
    "grad_kernel": ("row programs", "heads", "features", "columns"),
    "grad_vectors": ("row programs", "heads", "features", "columns"),
}
_FLOAT32 = ("weights", "probs", "sums", "grad_kernel", "grad_vectors")  # whatever y's dtype is


class _Layer:
    """The sizes of one layer, and the calls of its kernels.

    Rows and features are padded to whole tiles with zeros, which add nothing to any sum. Experts
    are padded to a power of two, and padded experts have probability zero.
    """

    def __init__(self, y: Array, kernel: Array, interpret: bool):
        self.shape, self.dtype, self.interpret = y.shape, y.dtype, interpret
        self.features, self.experts = kernel.shape
        self.heads = math.prod(y.shape[2:-1])
        self.feature_tile = min(
            tiling.power_of_two(self.features), _FEATURE_TILE_BYTES // y.dtype.itemsize
        )
        self.feature_tiles = tiling.num_tiles(self.features, self.feature_tile)
        self.padded_features = self.feature_tiles * self.feature_tile
        self.columns = tiling.power_of_two(self.experts)
        self.parts = 1 if y.dtype == jnp.float32 else 2  # terms that a parameter is split into
        self.stages = 3 if self.columns <= 32 else 2  # more do not fit into shared memory
        self.row_tiles = tiling.num_tiles(y.shape[0] * y.shape[1], _ROW_TILE)
        self.rows = self.row_tiles * _ROW_TILE
        # Number of row tiles that each program of the backward pass sums over.
        row_programs = max(1, _MAX_PROGRAMS // (self.heads * self.feature_tiles))
        self.summed_row_tiles = tiling.num_tiles(self.row_tiles, row_programs)

    def forward(
        self, y: Array, kernel: Array, vectors: Array, weights: Array
    ) -> tuple[Array, Array, Array | None]:
        """Returns `route_and_scale`'s results, and padded probabilities for `backward`.

        The probabilities are None if the backward kernel computes them again.
        """
        y, parameters = self._pad_activation(y), self._pad_parameters(kernel, vectors)
        weights = _pad(weights.reshape(-1, 1), self.rows, 1)
        if self.feature_tiles == 1:
            probs = None
            run = self._call(_forward_kernel, "heads rows", _FORWARD_ROW_TILES, "out sums")
            out, sums = run(y=y, **parameters, weights=weights)
        else:
            run = self._call(_route_kernel, "heads rows", 1, "probs sums", self.stages)
            probs, sums = run(y=y, kernel=parameters["kernel"], weights=weights)
            run = self._call(_scale_kernel, "rows heads features", _FORWARD_ROW_TILES, "out")
            (out,) = run(y=y, probs=probs, vectors=parameters["vectors"])
        return self._unpad_activation(out), jnp.sum(sums, (0, 1))[:, : self.experts], probs

    def backward(
        self, y: Array, kernel: Array, vectors: Array, probs: Array | None, grad: Array
    ) -> tuple[Array, Array, Array]:
        """Returns the gradients of y, kernel and vectors."""
        shape = vectors.shape
        y, grad = self._pad_activation(y), self._pad_activation(grad)
        parameters = self._pad_parameters(kernel, vectors)
        outputs, row_tiles = "grad_y grad_kernel grad_vectors", self.summed_row_tiles
        if probs is None:
            run = self._call(_backward_kernel, "heads rows", row_tiles, outputs)
            grad_y, grad_kernel, grad_vectors = run(y=y, grad=grad, **parameters)
        else:
            run = self._call(_backward_route_kernel, "heads rows", 1, "grad_logits", self.stages)
            (grad_logits,) = run(y=y, grad=grad, probs=probs, vectors=parameters["vectors"])
            run = self._call(_backward_scale_kernel, "rows heads features", row_tiles, outputs)
            inputs = {"y": y, "grad": grad, "probs": probs, "grad_logits": grad_logits}
            grad_y, grad_kernel, grad_vectors = run(**inputs, **parameters)
        grad_kernel = jnp.sum(grad_kernel, (0, 1))[: self.features, : self.experts]
        grad_vectors = jnp.sum(grad_vectors, 0)[:, : self.features, : self.experts]
        grad_vectors = jnp.swapaxes(grad_vectors, 1, 2).reshape(shape)
        return self._unpad_activation(grad_y), grad_kernel, grad_vectors

    def _pad_activation(self, x: Array) -> Array:
        x = x.reshape(-1, self.heads, self.features)
        return _pad(x, self.rows, self.heads, self.padded_features)

    def _unpad_activation(self, x: Array) -> Array:
        rows = self.shape[0] * self.shape[1]
        return x[:rows, :, : self.features].reshape(self.shape)

    def _pad_parameters(self, kernel: Array, vectors: Array) -> dict[str, Array]:
        vectors = vectors.reshape(self.heads, self.experts, self.features)
        vectors = jnp.swapaxes(vectors, 1, 2)  # in the kernel's order of axes
        vectors = _pad(vectors, self.heads, self.padded_features, self.columns)
        return {
            "kernel": self._split(_pad(kernel, self.padded_features, self.columns)),
            "vectors": jnp.swapaxes(self._split(vectors), 0, 1),
        }

    def _split(self, x: Array) -> Array:
        """Splits x into `parts` terms in the activation's dtype, on a new first axis."""
        if self.parts == 1:
            return x[None]
        # Without a cast to bfloat16 and back, which XLA would simplify away.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return jnp.stack([high, x - high]).astype(self.dtype)

    def _call(
        self, kernel: Callable[..., None], grid: str, row_tiles: int, outputs: str, stages: int = 2
    ) -> Callable[..., list[Array]]:
        """Returns a function that runs a kernel on inputs, passed by their names in `_AXES`.

        Args:
          kernel: takes a `_Program` and the refs of inputs and outputs.
          grid: names of the grid's axes, the fastest first. Without 'features', each program has
            all features.
          row_tiles: number of row tiles of a program; the last program may have fewer.
          outputs: names of the outputs in `_AXES`.
          stages: number of stages of Triton's software pipeline.
        """
        # Imported late: it takes a second, which only users of these kernels should pay.
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        grid_axes, output_names = grid.split(), outputs.split()
        programs = {
            "rows": tiling.num_tiles(self.row_tiles, row_tiles),
            "heads": self.heads,
            "features": self.feature_tiles,
        }
        sizes = {
            "rows": self.rows,
            "row programs": programs["rows"],
            "heads": self.heads,
            "features": self.padded_features,
            "columns": self.columns,
            "parts": self.parts,
            "sums": 4,
            "one": 1,
        }
        # The size of a program's block along each axis. None: the block has one index of the axis,
        # and the program's refs lack the axis.
        blocks = {**sizes, "rows": row_tiles * _ROW_TILE, "row programs": None, "heads": None}
        if "features" in grid_axes:
            blocks["features"] = self.feature_tile

        def spec(name: str) -> "pl.BlockSpec":
            def block_index(*program: Index) -> tuple[Index, ...]:
                index = dict(zip(grid_axes, program, strict=True))
                index["row programs"] = index["rows"]
                if "features" in index:
                    # From the last tile to the first: the previous kernel has just read the last.
                    index["features"] = self.feature_tiles - 1 - index["features"]
                return tuple(index.get(axis, 0) for axis in _AXES[name])

            return pl.BlockSpec(tuple(blocks[axis] for axis in _AXES[name]), block_index)

        def shape(name: str) -> jax.ShapeDtypeStruct:
            dtype = jnp.float32 if name in _FLOAT32 else self.dtype
            return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in _AXES[name]), dtype)

        def loop(
            count: Index, size: int, body: Callable[[object, Carry], Carry], start: Carry
        ) -> Carry:
            return jax.lax.fori_loop(
                0, count, lambda i, carry: body(pl.ds(i * size, size), carry), start
            )

        def over_rows(body: Callable[[object, Carry], Carry], start: Carry) -> Carry:
            remaining = self.row_tiles - row_tiles * pl.program_id(grid_axes.index("rows"))
            return loop(jnp.minimum(row_tiles, remaining), _ROW_TILE, body, start)

        over_features = functools.partial(loop, self.feature_tiles, self.feature_tile)

        def run(**inputs: Array) -> list[Array]:
            program = _Program(self.experts, over_rows, over_features, self.interpret)
            return pl.pallas_call(
                functools.partial(kernel, program),
                grid=tuple(programs[axis] for axis in grid_axes),
                in_specs=[spec(name) for name in inputs],
                out_specs=[spec(name) for name in output_names],
                out_shape=[shape(name) for name in output_names],
                compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages),
                interpret=self.interpret,
            )(*inputs.values())

        return run


class _Program(NamedTuple):
    """What a kernel needs besides its arrays: sizes, loops over tiles, and products.

    A loop is called as `loop(body, carry)`, with `body(tile, carry) -> carry`.
    """

    experts: int  # columns that are not padding
    over_rows: Callable[..., tuple[Array, ...]]
    over_features: Callable[..., Array]
    interpret: bool

    def dot(self, a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
        """Contracts the given axes of two matrices of the same dtype; returns float32."""
        # Interpret mode runs on CPUs, which have no TF32.
        uses_tf32 = a.dtype == jnp.float32 and not self.interpret
        return jax.lax.dot_general(
            a,
            b,
            (((a_axis,), (b_axis,)), ((), ())),
            precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if uses_tf32 else None,
            preferred_element_type=jnp.float32,
        )

    def times(self, a: Array, parts: Sequence[Array], parts_axis: int) -> Array:
        """Returns `a @ Σ parts`; contracts the axis `parts_axis` of the parts."""
        products = [self.dot(a, part, 1, parts_axis) for part in parts]
        return functools.reduce(jnp.add, products)

    def mix(self, probs: Array, vectors: Sequence[Array]) -> Array:
        """Returns `probs @ vectors`, [rows, features].

        If y is bfloat16, both factors are sums of two parts, with 16 bits of mantissa.
        """
        high = probs.astype(vectors[0].dtype)
        scale = self.times(high, vectors, 1)
        if len(vectors) == 1:
            return scale
        # The product of the two low parts is left out: it is about 2⁻¹⁸ of the scale.
        low = (probs - high.astype(jnp.float32)).astype(high.dtype)
        return scale + self.dot(low, vectors[0], 1, 1)


# The kernels. A program has rows of one head, with all features or a tile of them. Its arrays are y
# and the gradient of the output [rows, features], kernel and vectors [parts, features, columns],
# probabilities and gradients of logits [rows, columns], and weights [rows, 1].


def _parts(ref: Ref, features: object = slice(None)) -> list[Array]:
    return [ref[part, features, :] for part in range(ref.shape[0])]


def _softmax(logits: Array, experts: int) -> tuple[Array, Array]:
    """Returns the probabilities, and log(Z) of each row, [rows, 1]."""
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # Only padded columns are masked. So no row is fully masked, and -inf causes no NaN.
    logits = jnp.where(column < experts, logits, -jnp.inf)
    largest = jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights / total, largest + jnp.log(total)


def _softmax_and_terms(
    logits: Array, weights: Array, experts: int
) -> tuple[Array, tuple[Array, ...]]:
    """Returns the probabilities, and the terms of `route_and_scale`'s four sums over rows."""
    probs, log_z = _softmax(logits, experts)
    entropy = log_z - jnp.sum(probs * logits, axis=1, keepdims=True)
    top_1 = (probs >= jnp.max(probs, axis=1, keepdims=True)).astype(jnp.float32)
    return probs, tuple(x * weights for x in (probs, top_1, entropy, log_z * log_z))


def _store_sums(sums: Ref, terms: tuple[Array, ...]) -> None:
    """Writes the sum over rows of each term to a row of `sums`."""
    for row, term in enumerate(terms):
        sums[row, :] = jnp.broadcast_to(jnp.sum(term, axis=0), (sums.shape[1],))


def _softmax_grad(probs: Array, grad_probs: Array) -> Array:
    """Returns the gradient of the logits."""
    return probs * (grad_probs - jnp.sum(probs * grad_probs, axis=1, keepdims=True))


def _scale_grad(grad: Array, y: Array) -> Array:
    """Returns the gradient of the scale `Σ_e p_e l_e`, rounded to y's dtype."""
    return (grad.astype(jnp.float32) * y.astype(jnp.float32)).astype(y.dtype)


def _store_gradients(
    program: _Program,
    kernel: Ref,
    vectors: Ref,
    outputs: Sequence[Ref],
    load_tile: Callable[..., tuple[Array, ...]],
) -> None:
    """Writes the gradients of y, kernel and vectors.

    Args:
      program: the program.
      kernel, vectors: the parameters.
      outputs: where to write the gradients of y, kernel and vectors.
      load_tile: (rows, parts of kernel, parts of vectors) -> these rows of y, of the output's
        gradient, of the probabilities and of the logits' gradient, all in y's dtype.
    """
    grad_y, grad_kernel, grad_vectors = outputs
    k, v = _parts(kernel), _parts(vectors)

    def add(rows: object, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        y, grad, probs, grad_logits = load_tile(rows, k, v)
        tile = grad.astype(jnp.float32) * program.times(probs, v, 1)  # through the product
        tile += program.times(grad_logits, k, 1)  # through the logits
        kernel_sum = sums[0] + program.dot(y, grad_logits, 0, 0)
        vectors_sum = sums[1] + program.dot(_scale_grad(grad, y), probs, 0, 0)
        grad_y[rows, :] = tile.astype(y.dtype)
        return kernel_sum, vectors_sum

    zeros = jnp.zeros(grad_kernel.shape, jnp.float32)
    grad_kernel[...], grad_vectors[...] = program.over_rows(add, (zeros, zeros))


def _forward_kernel(
    program: _Program, y: Ref, kernel: Ref, vectors: Ref, weights: Ref, out: Ref, sums: Ref
) -> None:
    """Computes the forward pass in one kernel, if a head's features are one tile."""
    k, v = _parts(kernel), _parts(vectors)

    def add(rows: object, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = y[rows, :]
        logits = program.times(tile, k, 0)
        probs, terms = _softmax_and_terms(logits, weights[rows, :], program.experts)
        scale = program.mix(probs, v)
        out[rows, :] = (tile.astype(jnp.float32) * scale).astype(out.dtype)
        return tuple(a + b for a, b in zip(totals, terms, strict=True))

    # The terms of all tiles are added elementwise, and their rows are summed once at the end.
    wide, narrow = (jnp.zeros((_ROW_TILE, n), jnp.float32) for n in (sums.shape[1], 1))
    _store_sums(sums, program.over_rows(add, (wide, wide, narrow, narrow)))


def _backward_kernel(
    program: _Program, y: Ref, grad: Ref, kernel: Ref, vectors: Ref, *outputs: Ref
) -> None:
    """Computes the backward pass in one kernel, if a head's features are one tile."""

    def load_tile(rows: object, k: list[Array], v: list[Array]) -> tuple[Array, ...]:
        tile, tile_grad = y[rows, :], grad[rows, :]
        probs, _ = _softmax(program.times(tile, k, 0), program.experts)
        grad_probs = program.times(_scale_grad(tile_grad, tile), v, 0)
        grad_logits = _softmax_grad(probs, grad_probs).astype(tile.dtype)
        return tile, tile_grad, probs.astype(tile.dtype), grad_logits

    _store_gradients(program, kernel, vectors, outputs, load_tile)


def _route_kernel(
    program: _Program, y: Ref, kernel: Ref, weights: Ref, probs: Ref, sums: Ref
) -> None:
    """Writes probabilities of a tile of rows, and their sums; the first forward kernel of two."""

    def add(features: object, logits: Array) -> Array:
        return logits + program.times(y[:, features], _parts(kernel, features), 0)

    logits = program.over_features(add, jnp.zeros(probs.shape, jnp.float32))
    probs[...], terms = _softmax_and_terms(logits, weights[...], program.experts)
    _store_sums(sums, terms)


def _scale_kernel(program: _Program, y: Ref, probs: Ref, vectors: Ref, out: Ref) -> None:
    """Writes the product of y and the scale; the second forward kernel of two."""
    v = _parts(vectors)

    def scale(rows: object, carry: None) -> None:
        tile = y[rows, :].astype(jnp.float32)
        out[rows, :] = (tile * program.mix(probs[rows, :], v)).astype(out.dtype)

    program.over_rows(scale, None)


def _backward_route_kernel(
    program: _Program, y: Ref, grad: Ref, probs: Ref, vectors: Ref, grad_logits: Ref
) -> None:
    """Writes the gradients of the logits of a tile of rows; the first backward kernel of two."""

    def add(features: object, grad_probs: Array) -> Array:
        grad_scale = _scale_grad(grad[:, features], y[:, features])
        return grad_probs + program.times(grad_scale, _parts(vectors, features), 0)

    grad_probs = program.over_features(add, jnp.zeros(probs.shape, jnp.float32))
    grad_logits[...] = _softmax_grad(probs[...], grad_probs).astype(grad_logits.dtype)


def _backward_scale_kernel(
    program: _Program,
    y: Ref,
    grad: Ref,
    probs: Ref,
    grad_logits: Ref,
    kernel: Ref,
    vectors: Ref,
    *outputs: Ref,
) -> None:
    """Writes the gradients of y, kernel and vectors; the second backward kernel of two."""

    def load_tile(rows: object, *parts: list[Array]) -> tuple[Array, ...]:
        tile_probs = probs[rows, :].astype(y.dtype)
        return y[rows, :], grad[rows, :], tile_probs, grad_logits[rows, :]

    _store_gradients(program, kernel, vectors, outputs, load_tile)
