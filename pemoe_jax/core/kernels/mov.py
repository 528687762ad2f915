"""MoV's layer in fused kernels for one GPU: `y * Σ_e softmax(y k)_e l_e`, and its gradients.

As array operations the layer writes and reads a scale of y's size in float32, and as much again
backwards. Here y is read and the product written; backwards y and its cotangent g are read and dy
is written: where a head's features fit into one tile (key, value) one copy of the tensor forward
and one and a half backward. Where they do not (gate) a row's probabilities are known only after all
of its features, and so are the gradients of its logits. There one kernel streams through y, and
backwards through y and g, for what is known of rows, [rows, E]; another maps tiles of rows and
features with that: one and a half copies forward, two and a half backward. The second begins with
the features that the first read last, which are the likeliest to be in the L2.

Products of float32 are three passes of TF32, nearly float32. For bfloat16 they are products of
bfloat16, summed in float32: parameters, and forward the probabilities too, are sums of two bfloat16
(16 bits), y is what it is, and gradients, and the probabilities that they meet, are rounded.
Softmax and sums are float32. Sums over rows go by parts in a fixed order, so two runs give the same
bits.

Tested in Pallas's interpret mode, and on a GPU by `tests/core/test_gpu.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

_ROWS = 64  # of a tile
_FEATURE_BYTES = 256  # of a tile's row
_LEAST = 16  # the shortest side of a product; all sides are powers of two
_FORWARD_TILES = 4  # of rows that a program scales: it loads the parameters once for them
_PROGRAMS = 1056  # eight for each of an H100's 132 processors, where sums over rows are split


def is_supported() -> bool:
    """Whether there is one device and it is a GPU: XLA cannot split a kernel over several."""
    return jax.default_backend() == "gpu" and jax.device_count() == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def route_and_scale(
    y: Array, kernel: Array, vectors: Array, weights: Array, interpret: bool = False
) -> tuple[Array, Array]:
    """`y * Σ_e p_e l_e` with `p = softmax(y @ kernel)`, and sums over the p; reverse mode only.

    Args:
      y: [B, L, H, K] or [B, L, F], float32 or bfloat16.
      kernel: [K or F, E], float32, shared by heads.
      vectors: [H, E, K] or [E, F], float32.
      weights: [B, L], float32, how much a token counts in the sums.
      interpret: runs the kernels on any device, slowly, for tests.

    Returns:
      (of y's shape and dtype; [4, E], float32: over tokens and heads, by weights, the sums of p, of
      ones where p is largest, and, the same in all columns, of p's entropy and of log(Z)²). The
      sums have no gradients.
    """
    out, sums, _ = _Layer(y, kernel, interpret).forward(y, kernel, vectors, weights)
    return out, sums


def _saved(
    y: Array, kernel: Array, vectors: Array, weights: Array, interpret: bool
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array | None]]:
    out, sums, probs = _Layer(y, kernel, interpret).forward(y, kernel, vectors, weights)
    return (out, sums), (y, kernel, vectors, probs)


def _gradients(
    interpret: bool,
    saved: tuple[Array, Array, Array, Array | None],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array, None]:
    y, kernel, _, _ = saved
    return *_Layer(y, kernel, interpret).backward(*saved, cotangents[0]), None


route_and_scale.defvjp(_saved, _gradients)


def _power(size: int) -> int:
    return max(_LEAST, 1 << (size - 1).bit_length())


def _pad(x: Array, *shape: int) -> Array:
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])


class _Layer:
    """The sizes of one layer, and the calls of its kernels.

    What is padded is zero: such rows and features add nothing to any sum, and padded experts have
    a probability of zero. Nothing is padded where tiles divide the rows and features.
    """

    def __init__(self, y: Array, kernel: Array, interpret: bool):
        self.shape, self.dtype, self.interpret = y.shape, y.dtype, interpret
        self.features, self.experts = kernel.shape
        self.heads = math.prod(y.shape[2:-1])
        self.block = min(_power(self.features), _FEATURE_BYTES // y.dtype.itemsize)
        self.blocks = -(-self.features // self.block)
        self.padded = self.blocks * self.block
        self.columns = _power(self.experts)
        self.parts = 1 if y.dtype == jnp.float32 else 2  # of a parameter
        self.stages = 3 if self.columns <= 32 else 2  # more would not fit into shared memory
        self.tiles = -(-y.shape[0] * y.shape[1] // _ROWS)  # of rows
        self.rows = self.tiles * _ROWS
        # tiles of rows that one program sums over where sums over rows are split
        self.summed = -(-self.tiles // max(1, _PROGRAMS // (self.heads * self.blocks)))

    def forward(
        self, y: Array, kernel: Array, vectors: Array, weights: Array
    ) -> tuple[Array, Array, Array | None]:
        """Of `route_and_scale`, and the padded probabilities if backward needs them."""
        y, kernel, vectors = self._activation(y), self._kernel(kernel), self._vectors(vectors)
        weights = _pad(weights.reshape(-1, 1), self.rows, 1)
        if self.blocks == 1:
            probs = None
            run = self._call(
                _forward_one,
                ("heads", "rows"),
                _FORWARD_TILES,
                ["y", "kernel", "vectors", "weights"],
                ["y", "sums"],
            )
            out, sums = run(y, kernel, vectors, weights)
        else:
            run = self._call(
                _route,
                ("heads", "rows"),
                1,
                ["y", "kernel", "weights"],
                ["probs", "sums"],
                stages=self.stages,
            )
            probs, sums = run(y, kernel, weights)
            grid = "rows", "heads", "features"
            run = self._call(_scale, grid, _FORWARD_TILES, ["y", "probs", "vectors"], ["y"])
            (out,) = run(y, probs, vectors)
        return self._restored(out), jnp.sum(sums, (0, 1))[:, : self.experts], probs

    def backward(
        self, y: Array, kernel: Array, vectors: Array, probs: Array | None, g: Array
    ) -> tuple[Array, Array, Array]:
        shape = vectors.shape
        y, g = self._activation(y), self._activation(g)
        kernel, vectors = self._kernel(kernel), self._vectors(vectors)
        outputs = ["y", "gradient", "gradient"]
        if probs is None:
            inputs = ["y", "y", "kernel", "vectors"]
            run = self._call(_backward_one, ("heads", "rows"), self.summed, inputs, outputs)
            dy, d_kernel, d_vectors = run(y, g, kernel, vectors)
        else:
            inputs = ["y", "y", "probs", "vectors"]
            run = self._call(
                _backward_route, ("heads", "rows"), 1, inputs, ["d_logits"], stages=self.stages
            )
            (d_logits,) = run(y, g, probs, vectors)
            inputs = ["y", "y", "probs", "d_logits", "kernel", "vectors"]
            grid = "rows", "heads", "features"
            run = self._call(_backward_scale, grid, self.summed, inputs, outputs)
            dy, d_kernel, d_vectors = run(y, g, probs, d_logits, kernel, vectors)
        d_kernel = jnp.sum(d_kernel, (0, 1))[: self.features, : self.experts]
        d_vectors = jnp.sum(d_vectors, 0)[:, : self.features, : self.experts]
        return self._restored(dy), d_kernel, jnp.swapaxes(d_vectors, 1, 2).reshape(shape)

    def _activation(self, x: Array) -> Array:
        x = x.reshape(-1, self.heads, self.features)
        return _pad(x, self.rows, self.heads, self.padded)

    def _restored(self, x: Array) -> Array:
        rows = self.shape[0] * self.shape[1]
        return x[:rows, :, : self.features].reshape(self.shape)

    def _kernel(self, kernel: Array) -> Array:
        """[parts, features, columns]."""
        return self._split(_pad(kernel, self.padded, self.columns))

    def _vectors(self, vectors: Array) -> Array:
        """[heads, parts, features, columns], with the kernel's order of axes."""
        vectors = vectors.reshape(self.heads, self.experts, self.features)
        vectors = _pad(jnp.swapaxes(vectors, 1, 2), self.heads, self.padded, self.columns)
        return jnp.swapaxes(self._split(vectors), 0, 1)

    def _split(self, x: Array) -> Array:
        """Numbers of the activation's dtype on a new first axis, whose sum x is."""
        if self.parts == 1:
            return x[None]
        # no cast and back, which XLA takes for superfluous
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return jnp.stack([high, x - high]).astype(self.dtype)

    def _call(
        self,
        kernel: Callable[..., None],
        grid: tuple[str, ...],
        tiles: int,
        inputs: list[str],
        outputs: list[str],
        stages: int = 2,
    ) -> Callable[..., list[Array]]:
        """A kernel by names of its arrays, over a grid whose first axis runs fastest.

        Args:
          kernel: sees the parts of its arrays that are a program's.
          grid: of 'rows', 'heads' and maybe 'features'; without these a program sees all of them.
          tiles: of rows, that a program sees. The last program may see fewer.
          inputs, outputs: names.
          stages: of Triton's pipeline.
        """
        # late: a second of imports that only who asks for these kernels pays
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        span = tiles * _ROWS
        steps = {"rows": -(-self.tiles // tiles), "heads": self.heads, "features": self.blocks}
        width = self.block if "features" in grid else self.padded
        rows, heads, features, columns = self.rows, self.heads, self.padded, self.columns
        # name -> shape, dtype, a program's part of it (None: an axis that it does not see), and
        # where in parts that is: by the program's row, head and tile of features, or the first
        arrays: dict[str, tuple[Any, Any, Any, str]] = {
            "y": ((rows, heads, features), self.dtype, (span, None, width), "rhf"),
            "weights": ((rows, 1), jnp.float32, (span, 1), "r0"),
            "kernel": (
                (self.parts, features, columns),
                self.dtype,
                (self.parts, width, columns),
                "0f0",
            ),
            "vectors": (
                (heads, self.parts, features, columns),
                self.dtype,
                (None, self.parts, width, columns),
                "h0f0",
            ),
            "probs": ((rows, heads, columns), jnp.float32, (span, None, columns), "rh0"),
            "d_logits": ((rows, heads, columns), self.dtype, (span, None, columns), "rh0"),
            "sums": (
                (steps["rows"], heads, 4, columns),
                jnp.float32,
                (None, None, 4, columns),
                "rh00",
            ),
            "gradient": (
                (steps["rows"], heads, features, columns),
                jnp.float32,
                (None, None, width, columns),
                "rhf0",
            ),
        }

        def spec(name: str) -> Any:
            *_, part, where = arrays[name]

            def position(*program: Any) -> tuple[Any, ...]:
                at = dict(zip(grid, program, strict=True))
                # from the last on, see above
                at["features"] = self.blocks - 1 - at["features"] if "features" in at else 0
                of = {"r": at["rows"], "h": at["heads"], "f": at["features"], "0": 0}
                return tuple(of[axis] for axis in where)

            return pl.BlockSpec(part, position)

        def over_rows(body: Callable[[Any, Any], Any], start: Any) -> Any:
            left = self.tiles - tiles * pl.program_id(grid.index("rows"))
            return jax.lax.fori_loop(
                0,
                jnp.minimum(tiles, left),
                lambda i, carry: body(pl.ds(i * _ROWS, _ROWS), carry),
                start,
            )

        def over_features(body: Callable[[Any, Any], Any], start: Any) -> Any:
            return jax.lax.fori_loop(
                0,
                self.blocks,
                lambda i, carry: body(pl.ds(i * self.block, self.block), carry),
                start,
            )

        return pl.pallas_call(
            functools.partial(
                kernel, _Program(self.experts, over_rows, over_features, self.interpret)
            ),
            grid=tuple(steps[name] for name in grid),
            in_specs=[spec(name) for name in inputs],
            out_specs=[spec(name) for name in outputs],
            out_shape=[jax.ShapeDtypeStruct(*arrays[name][:2]) for name in outputs],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages),
            interpret=self.interpret,
        )


class _Program(NamedTuple):
    """What a kernel knows beside its arrays.

    Attributes:
      experts: how many columns are not padding.
      over_rows, over_features: (body, carry) -> carry, of `body(a tile's rows or features, carry)`
        for the tiles that the program sees.
      interpret: see `route_and_scale`.
    """

    experts: int
    over_rows: Callable[[Callable[[Any, Any], Any], Any], Any]
    over_features: Callable[[Callable[[Any, Any], Any], Any], Any]
    interpret: bool

    def dot(self, a: Array, b: Array, of_a: int, of_b: int) -> Array:
        """Product of matrices of one dtype, over these axes of a and b -> float32."""
        precise = a.dtype == jnp.float32 and not self.interpret
        return jax.lax.dot_general(
            a,
            b,
            (((of_a,), (of_b,)), ((), ())),
            precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if precise else None,
            preferred_element_type=jnp.float32,
        )

    def times(self, a: Array, parts: Sequence[Array], of_parts: int) -> Array:
        """`a @ Σ parts`, over this axis of the parts."""
        total = self.dot(a, parts[0], 1, of_parts)
        for part in parts[1:]:
            total += self.dot(a, part, 1, of_parts)
        return total

    def mix(self, probs: Array, vectors: Sequence[Array]) -> Array:
        """`probs @ vectors`, of 16 bits both if the vectors are bfloat16: [rows, features]."""
        high = probs.astype(vectors[0].dtype)
        scale = self.times(high, vectors, 1)
        if len(vectors) == 1:
            return scale
        low = (probs - high.astype(jnp.float32)).astype(high.dtype)
        return scale + self.dot(low, vectors[0], 1, 1)


# The kernels. A program sees rows of one head: y, g [rows, features], kernel and vectors [parts,
# features, columns], probabilities and gradients of logits [rows, columns], weights [rows, 1]; all
# features of a row, or a tile of them.


def _parts(ref: Any, features: Any = slice(None)) -> list[Array]:
    return [ref[part, features, :] for part in range(ref.shape[0])]


def _softmax(logits: Array, experts: int) -> tuple[Array, Array]:
    """Probabilities, and of each row log(Z), [rows, 1]."""
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(column < experts, logits, -jnp.inf)
    top = jnp.max(logits, axis=1, keepdims=True)
    terms = jnp.exp(logits - top)
    total = jnp.sum(terms, axis=1, keepdims=True)
    return terms / total, top + jnp.log(total)


def _routed(logits: Array, weights: Array, experts: int) -> tuple[Array, tuple[Array, ...]]:
    """Probabilities, and what `route_and_scale` sums over rows: [rows, columns] and [rows, 1]."""
    probs, log_z = _softmax(logits, experts)
    entropy = log_z - jnp.sum(probs * logits, axis=1, keepdims=True)
    first = (probs >= jnp.max(probs, axis=1, keepdims=True)).astype(jnp.float32)
    return probs, tuple(x * weights for x in (probs, first, entropy, log_z * log_z))


def _store_sums(sums: Any, terms: tuple[Array, ...]) -> None:
    for number, term in enumerate(terms):
        sums[number, :] = jnp.broadcast_to(jnp.sum(term, axis=0), (sums.shape[1],))


def _to_logits(probs: Array, d_probs: Array) -> Array:
    return probs * (d_probs - jnp.sum(probs * d_probs, axis=1, keepdims=True))


def _product(back: Array, tile: Array) -> Array:
    """The gradient of the scale, rounded to the tile's dtype."""
    return (back.astype(jnp.float32) * tile.astype(jnp.float32)).astype(tile.dtype)


def _forward_one(
    program: _Program, y: Any, kernel: Any, vectors: Any, weights: Any, out: Any, sums: Any
) -> None:
    k, v = _parts(kernel), _parts(vectors)

    def add(rows: Any, terms: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = y[rows, :]
        probs, more = _routed(program.times(tile, k, 0), weights[rows, :], program.experts)
        scale = program.mix(probs, v)
        out[rows, :] = (tile.astype(jnp.float32) * scale).astype(out.dtype)
        return tuple(a + b for a, b in zip(terms, more, strict=True))

    wide, narrow = (jnp.zeros((_ROWS, n), jnp.float32) for n in (sums.shape[1], 1))
    _store_sums(sums, program.over_rows(add, (wide, wide, narrow, narrow)))


def _backward_one(
    program: _Program,
    y: Any,
    g: Any,
    kernel: Any,
    vectors: Any,
    dy: Any,
    d_kernel: Any,
    d_vectors: Any,
) -> None:
    k, v = _parts(kernel), _parts(vectors)

    def add(rows: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        tile, back = y[rows, :], g[rows, :]
        probs, _ = _softmax(program.times(tile, k, 0), program.experts)
        d_logits = _to_logits(probs, program.times(_product(back, tile), v, 0))
        d_logits, probs = d_logits.astype(tile.dtype), probs.astype(tile.dtype)
        dy[rows, :] = _through(program, back, probs, d_logits, k, v).astype(dy.dtype)
        return _summed(program, tile, back, probs, d_logits, sums)

    zeros = jnp.zeros(d_kernel.shape, jnp.float32)
    d_kernel[...], d_vectors[...] = program.over_rows(add, (zeros, zeros))


def _through(
    program: _Program,
    back: Array,
    probs: Array,
    d_logits: Array,
    kernel: Sequence[Array],
    vectors: Sequence[Array],
) -> Array:
    """Gradient of a tile, by the scale and by the logits."""
    d_tile = back.astype(jnp.float32) * program.times(probs, vectors, 1)
    return d_tile + program.times(d_logits, kernel, 1)


def _summed(
    program: _Program,
    tile: Array,
    back: Array,
    probs: Array,
    d_logits: Array,
    sums: tuple[Array, Array],
) -> tuple[Array, Array]:
    """With a tile's part in the gradients of kernel and vectors, [features, columns] both."""
    d_kernel, d_vectors = sums
    d_kernel += program.dot(tile, d_logits, 0, 0)
    return d_kernel, d_vectors + program.dot(_product(back, tile), probs, 0, 0)


def _route(program: _Program, y: Any, kernel: Any, weights: Any, probs: Any, sums: Any) -> None:
    def add(features: Any, logits: Array) -> Array:
        return logits + program.times(y[:, features], _parts(kernel, features), 0)

    logits = program.over_features(add, jnp.zeros(probs.shape, jnp.float32))
    probs[...], terms = _routed(logits, weights[...], program.experts)
    _store_sums(sums, terms)


def _scale(program: _Program, y: Any, probs: Any, vectors: Any, out: Any) -> None:
    v = _parts(vectors)

    def scale(rows: Any, carry: None) -> None:
        tile = y[rows, :].astype(jnp.float32)
        out[rows, :] = (tile * program.mix(probs[rows, :], v)).astype(out.dtype)

    program.over_rows(scale, None)


def _backward_route(
    program: _Program, y: Any, g: Any, probs: Any, vectors: Any, d_logits: Any
) -> None:
    def add(features: Any, d_probs: Array) -> Array:
        d_scale = _product(g[:, features], y[:, features])
        return d_probs + program.times(d_scale, _parts(vectors, features), 0)

    d_probs = program.over_features(add, jnp.zeros(probs.shape, jnp.float32))
    d_logits[...] = _to_logits(probs[...], d_probs).astype(d_logits.dtype)


def _backward_scale(
    program: _Program,
    y: Any,
    g: Any,
    probs: Any,
    d_logits: Any,
    kernel: Any,
    vectors: Any,
    dy: Any,
    d_kernel: Any,
    d_vectors: Any,
) -> None:
    k, v = _parts(kernel), _parts(vectors)

    def add(rows: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        tile, back, p, to_logits = y[rows, :], g[rows, :], probs[rows, :], d_logits[rows, :]
        p = p.astype(tile.dtype)
        dy[rows, :] = _through(program, back, p, to_logits, k, v).astype(dy.dtype)
        return _summed(program, tile, back, p, to_logits, sums)

    zeros = jnp.zeros(d_kernel.shape, jnp.float32)
    d_kernel[...], d_vectors[...] = program.over_rows(add, (zeros, zeros))
