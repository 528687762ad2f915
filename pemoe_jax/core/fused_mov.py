"""MoV's layer in fused kernels for one GPU: `y * Σ_e softmax(y k)_e l_e`, and its gradients.

As array operations the layer writes and reads a scale of y's size in float32, and as much again
backwards. Here y is read and the product written. Backwards y and its cotangent g are read and dy
is written, once where a head's features fit into one tile (key, value). Where they do not (gate)
the gradients of the parameters need what is known of a row only after all of its features, so a
second kernel reads y and g again. Within a kernel a row's second reading may come from the L2.

Products of float32 are three passes of TF32, nearly float32. For bfloat16, which TF32 holds
exactly, they are one: the parameters are rounded to 11 bits, as XLA's own products on GPUs round
them. Sums and the softmax are float32. Sums over rows go by parts in a fixed order, so two runs
give the same bits.

**Never run on a GPU so far**: tested in Pallas's interpret mode, and lowered to Triton's language.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Dot = Callable[[Array, Array, int, int], Array]

_ROWS = 64  # of a tile
_FEATURE_BYTES = 256  # of a tile's row
_LEAST = 16  # the shortest side of a product; all sides are powers of two
_PROGRAMS = 256  # about two for each of an H100's 132 processors, where sums over rows are split


def runs_here() -> bool:
    """Whether there is one device and it is a GPU: XLA cannot split a kernel over several."""
    return jax.default_backend() == "gpu" and jax.device_count() == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def route_and_scale(y: Array, kernel: Array, vectors: Array, interpret: bool = False) -> Array:
    """`y * Σ_e p_e l_e` with `p = softmax(y @ kernel)`; reverse mode only.

    Args:
      y: [B, L, H, K] or [B, L, F], float32 or bfloat16.
      kernel: [K or F, E], float32, shared by heads.
      vectors: [H, E, K] or [E, F], float32.
      interpret: runs the kernels on any device, slowly, for tests.

    Returns:
      Of y's shape and dtype.
    """
    return _Layer(y, kernel, interpret).forward(y, kernel, vectors)


def _saved(
    y: Array, kernel: Array, vectors: Array, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _Layer(y, kernel, interpret).forward(y, kernel, vectors), (y, kernel, vectors)


def _gradients(
    interpret: bool, saved: tuple[Array, Array, Array], g: Array
) -> tuple[Array, Array, Array]:
    y, kernel, _ = saved
    return _Layer(y, kernel, interpret).backward(*saved, g)


route_and_scale.defvjp(_saved, _gradients)


def _power(size: int) -> int:
    return max(_LEAST, 1 << (size - 1).bit_length())


def _pad(x: Array, *shape: int) -> Array:
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])


class _Layer:
    """The sizes of one layer, and the calls of its kernels.

    What is padded is zero: such rows and features add nothing to any sum, and padded experts have
    a probability of zero.
    """

    def __init__(self, y: Array, kernel: Array, interpret: bool):
        self.shape, self.dtype, self.interpret = y.shape, y.dtype, interpret
        self.features, self.experts = kernel.shape
        self.heads = math.prod(y.shape[2:-1])
        self.block = min(_power(self.features), _FEATURE_BYTES // y.dtype.itemsize)
        self.padded = -(-self.features // self.block) * self.block
        self.columns = _power(self.experts)
        self.one_tile = self.padded == self.block
        # rows that one program sums over where sums over rows are split
        rows = y.shape[0] * y.shape[1]
        tiles = max(1, rows * self.heads * (self.padded // self.block) // (_ROWS * _PROGRAMS))
        self.span = _ROWS * (1 << (tiles.bit_length() - 1))
        self.rows = -(-rows // self.span) * self.span

    def forward(self, y: Array, kernel: Array, vectors: Array) -> Array:
        run = self._call(
            _forward_one if self.one_tile else _forward_tiled,
            ("rows", "heads"),
            _ROWS,
            ["y", "kernel", "vectors"],
            ["y"],
        )
        (out,) = run(self._activation(y), *self._parameters(kernel, vectors))
        return self._restored(out)

    def backward(
        self, y: Array, kernel: Array, vectors: Array, g: Array
    ) -> tuple[Array, Array, Array]:
        y, g = self._activation(y), self._activation(g)
        padded = self._parameters(kernel, vectors)
        inputs = ["y", "y", "kernel", "vectors"]
        if self.one_tile:
            run = self._call(
                _backward_one, ("rows", "heads"), self.span, inputs, ["y", "d_kernel", "d_vectors"]
            )
            dy, d_kernel, d_vectors = run(y, g, *padded)
        else:
            run = self._call(
                _backward_rows, ("rows", "heads"), _ROWS, inputs, ["y", "probs", "probs"]
            )
            dy, probs, d_logits = run(y, g, *padded)
            run = self._call(
                _backward_parameters,
                ("rows", "heads", "features"),
                self.span,
                ["y", "y", "probs", "probs"],
                ["d_kernel", "d_vectors"],
            )
            d_kernel, d_vectors = run(y, g, probs, d_logits)
        d_kernel = jnp.sum(d_kernel, (0, 1))[: self.features, : self.experts]
        d_vectors = jnp.sum(d_vectors, 0)[:, : self.experts, : self.features]
        return self._restored(dy), d_kernel, d_vectors.reshape(vectors.shape)

    def _activation(self, x: Array) -> Array:
        x = x.reshape(-1, self.heads, self.features)
        return _pad(x, self.rows, self.heads, self.padded)

    def _restored(self, x: Array) -> Array:
        rows = self.shape[0] * self.shape[1]
        return x[:rows, :, : self.features].reshape(self.shape)

    def _parameters(self, kernel: Array, vectors: Array) -> tuple[Array, Array]:
        vectors = vectors.reshape(self.heads, self.experts, self.features)
        return (
            _pad(kernel, self.padded, self.columns),
            _pad(vectors, self.heads, self.columns, self.padded),
        )

    def _call(
        self,
        kernel: Callable[..., None],
        grid: tuple[str, ...],
        span: int,
        inputs: list[str],
        outputs: list[str],
    ) -> Callable[..., list[Array]]:
        """A kernel over a grid of rows, heads and maybe tiles of features, by names of arrays."""
        # late: a second of imports that only who asks for these kernels pays
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        width = self.block if "features" in grid else self.padded
        sums = self.rows // span
        # name -> shape, dtype, a program's part of it (None: an axis that it does not see), where
        # in parts that is, by the program's row, head and tile of features
        arrays: dict[str, tuple[Any, Any, Any, Callable[..., tuple[int, ...]]]] = {
            "y": (
                (self.rows, self.heads, self.padded),
                self.dtype,
                (span, None, width),
                lambda row, head, tile=0: (row, head, tile),
            ),
            "kernel": (
                (self.padded, self.columns),
                jnp.float32,
                (width, self.columns),
                lambda row, head, tile=0: (tile, 0),
            ),
            "vectors": (
                (self.heads, self.columns, self.padded),
                jnp.float32,
                (None, self.columns, width),
                lambda row, head, tile=0: (head, 0, tile),
            ),
            "probs": (
                (self.rows, self.heads, self.columns),
                jnp.float32,
                (span, None, self.columns),
                lambda row, head, tile=0: (row, head, 0),
            ),
            "d_kernel": (
                (sums, self.heads, self.padded, self.columns),
                jnp.float32,
                (None, None, width, self.columns),
                lambda row, head, tile=0: (row, head, tile, 0),
            ),
            "d_vectors": (
                (sums, self.heads, self.columns, self.padded),
                jnp.float32,
                (None, None, self.columns, width),
                lambda row, head, tile=0: (row, head, 0, tile),
            ),
        }

        def specs(names: list[str]) -> list[Any]:
            return [pl.BlockSpec(arrays[name][2], arrays[name][3]) for name in names]

        steps = {"rows": sums, "heads": self.heads, "features": self.padded // self.block}
        return pl.pallas_call(
            functools.partial(
                kernel, experts=self.experts, block=self.block, dot=_dot(self.dtype, self.interpret)
            ),
            grid=tuple(steps[name] for name in grid),
            in_specs=specs(inputs),
            out_specs=specs(outputs),
            out_shape=[jax.ShapeDtypeStruct(*arrays[name][:2]) for name in outputs],
            compiler_params=triton.CompilerParams(
                num_warps=8 if "features" in grid else 4, num_stages=2
            ),
            interpret=self.interpret,
        )


def _dot(dtype: Any, interpret: bool) -> Dot:
    """Product of float32 matrices: (a, b, contracted axis of a, of b) -> float32."""
    algorithm = jax.lax.DotAlgorithmPreset.TF32_TF32_F32
    if dtype == jnp.float32:
        algorithm = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
        return jax.lax.dot_general(
            a,
            b,
            (((of_a,), (of_b,)), ((), ())),
            precision=None if interpret else algorithm,
            preferred_element_type=jnp.float32,
        )

    return dot


# The kernels. A program sees rows of one head: y, g [rows, K], kernel [K, E], vectors [E, K]; the
# sizes are the padded ones.


def _tile(ref: Any, rows: int, row: Any, block: int, tile: Any) -> Array:
    from jax.experimental import pallas as pl

    return ref[pl.ds(row * rows, rows), pl.ds(tile * block, block)].astype(jnp.float32)


def _softmax(logits: Array, experts: int) -> Array:
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(column < experts, logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _to_logits(probs: Array, d_probs: Array) -> Array:
    return probs * (d_probs - jnp.sum(probs * d_probs, axis=1, keepdims=True))


def _forward_one(
    y: Any, kernel: Any, vectors: Any, out: Any, *, experts: int, block: int, dot: Dot
) -> None:
    del block
    tile = y[...].astype(jnp.float32)
    probs = _softmax(dot(tile, kernel[...], 1, 0), experts)
    out[...] = (tile * dot(probs, vectors[...], 1, 0)).astype(out.dtype)


def _forward_tiled(
    y: Any, kernel: Any, vectors: Any, out: Any, *, experts: int, block: int, dot: Dot
) -> None:
    from jax.experimental import pallas as pl

    rows, width = y.shape

    def add(i: Any, logits: Array) -> Array:
        tile = _tile(y, rows, 0, block, i)
        return logits + dot(tile, kernel[pl.ds(i * block, block), :], 1, 0)

    zeros = jnp.zeros((rows, kernel.shape[1]), jnp.float32)
    probs = _softmax(jax.lax.fori_loop(0, width // block, add, zeros), experts)

    @pl.loop(0, width // block)
    def _(i: Any) -> None:
        i = width // block - 1 - i  # the last that were read are the likeliest to be in the L2
        features = pl.ds(i * block, block)
        scale = dot(probs, vectors[:, features], 1, 0)
        out[:, features] = (_tile(y, rows, 0, block, i) * scale).astype(out.dtype)


def _backward_one(
    y: Any,
    g: Any,
    kernel: Any,
    vectors: Any,
    dy: Any,
    d_kernel: Any,
    d_vectors: Any,
    *,
    experts: int,
    block: int,
    dot: Dot,
) -> None:
    from jax.experimental import pallas as pl

    k, v = kernel[...], vectors[...]

    def add(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        to_kernel, to_vectors = sums
        tile, back = _tile(y, _ROWS, i, block, 0), _tile(g, _ROWS, i, block, 0)
        probs = _softmax(dot(tile, k, 1, 0), experts)
        d_scale = back * tile
        d_logits = _to_logits(probs, dot(d_scale, v, 1, 1))
        d_tile = back * dot(probs, v, 1, 0) + dot(d_logits, k, 1, 1)
        dy[pl.ds(i * _ROWS, _ROWS), :] = d_tile.astype(dy.dtype)
        return to_kernel + dot(tile, d_logits, 0, 0), to_vectors + dot(probs, d_scale, 0, 0)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    d_kernel[...], d_vectors[...] = jax.lax.fori_loop(0, y.shape[0] // _ROWS, add, zeros)


def _backward_rows(
    y: Any,
    g: Any,
    kernel: Any,
    vectors: Any,
    dy: Any,
    probs: Any,
    d_logits: Any,
    *,
    experts: int,
    block: int,
    dot: Dot,
) -> None:
    from jax.experimental import pallas as pl

    rows, width = y.shape

    def add(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, d_probs = sums
        features = pl.ds(i * block, block)
        tile, back = _tile(y, rows, 0, block, i), _tile(g, rows, 0, block, i)
        logits += dot(tile, kernel[features, :], 1, 0)
        return logits, d_probs + dot(back * tile, vectors[:, features], 1, 1)

    zeros = jnp.zeros((rows, kernel.shape[1]), jnp.float32)
    logits, d_probs = jax.lax.fori_loop(0, width // block, add, (zeros, zeros))
    p = _softmax(logits, experts)
    back_to_logits = _to_logits(p, d_probs)
    probs[...], d_logits[...] = p, back_to_logits

    @pl.loop(0, width // block)
    def _(i: Any) -> None:
        i = width // block - 1 - i
        features = pl.ds(i * block, block)
        scale = dot(p, vectors[:, features], 1, 0)
        through = dot(back_to_logits, kernel[features, :], 1, 1)
        dy[:, features] = (_tile(g, rows, 0, block, i) * scale + through).astype(dy.dtype)


def _backward_parameters(
    y: Any,
    g: Any,
    probs: Any,
    d_logits: Any,
    d_kernel: Any,
    d_vectors: Any,
    *,
    experts: int,
    block: int,
    dot: Dot,
) -> None:
    del experts

    def add(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        to_kernel, to_vectors = sums
        columns = probs.shape[1]
        tile, back = _tile(y, _ROWS, i, block, 0), _tile(g, _ROWS, i, block, 0)
        to_kernel += dot(tile, _tile(d_logits, _ROWS, i, columns, 0), 0, 0)
        return to_kernel, to_vectors + dot(_tile(probs, _ROWS, i, columns, 0), back * tile, 0, 0)

    zeros = jnp.zeros(d_kernel.shape, jnp.float32), jnp.zeros(d_vectors.shape, jnp.float32)
    d_kernel[...], d_vectors[...] = jax.lax.fori_loop(0, y.shape[0] // _ROWS, add, zeros)
