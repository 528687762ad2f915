"""T5's attention in fused kernels for GPUs: the logits of all pairs are never in memory.

As flash attention (arXiv 2205.14135, 2307.08691) with what T5 adds: the bias of relative positions
is read where a tile of logits is made, one for all rows of the batch. Who may read whom is told by
a number for each token, so a row that packs several examples costs as much as these do: tiles of
queries and keys that have nothing to do with one another are not visited.

Products are of bfloat16 and summed in float32, and so is the softmax. Each gradient is summed in
one program in a fixed order, so two runs give the same bits. The bias has no gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

Array = jax.Array

_LOW = -1e10  # of a pair that may not be read; finite, so that a row of them gives no NaN
_LEAST = 16  # the shortest side of a product
_TILE = 64  # queries, and keys; of 32 to 128 the fastest on an H200, for all three kernels


def supports(query: Array) -> bool:
    """Whether the kernels run here, and take these queries, [B, Lq, H, K].

    On GPUs, one or a mesh that shares out rows and heads evenly; of bfloat16, and of heads of a
    size that matrix units take.
    """
    rows, _, heads, size = query.shape
    mesh = jax.sharding.get_abstract_mesh().shape
    if jax.device_count() > 1 and not mesh:
        return False
    even = rows % mesh.get("data", 1) == heads % mesh.get("model", 1) == 0
    fits = query.dtype == jnp.bfloat16 and size in (16, 32, 64, 128)
    return jax.default_backend() == "gpu" and even and fits


def fused_attention_on_mesh(*of: Any, causal: bool) -> Array:
    """As `fused_attention`: each device of the mesh in scope has rows and heads of its own."""

    def run(*of: Any) -> Array:
        return fused_attention(*of, causal)

    if math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1:
        tokens, numbers = PartitionSpec("data", None, "model"), PartitionSpec("data")
        specs = (tokens, tokens, tokens, numbers, numbers, PartitionSpec(None, "model"))
        return jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)(*of)
    return run(*of)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def fused_attention(
    query: Array,
    key: Array,
    value: Array,
    of_queries: Array,
    of_keys: Array,
    bias: Array | None,
    causal: bool = False,
    interpret: bool = False,
) -> Array:
    """-> [B, Lq, H, K]; reverse mode only.

    Args:
      query: [B, Lq, H, K], bfloat16, K of 16, 32, 64 or 128. key, value: [B, Lk, H, K].
      of_queries, of_keys: int32 [B, Lq], [B, Lk]: a query reads the keys of its own number; keys of
        number 0 are read by none. A query that has none to read gets a mean of some values.
      bias: [1, H, Lq, Lk], added to the logits, without a gradient; None: none.
      causal: whether a query reads no key to its right (Lq = Lk).
      interpret: runs the kernels on any device, slowly, for tests.
    """
    return _forward(query, key, value, of_queries, of_keys, bias, causal, interpret)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    of_queries: Array,
    of_keys: Array,
    bias: Array | None,
    causal: bool,
    interpret: bool,
) -> tuple[Array, tuple[Any, ...]]:
    run = _Call(query, key, causal, interpret)
    out, normalizer = run(
        _forward_kernel, "queries", ["out", "row"],
        q=query, of_q=of_queries, k=key, v=value, of_k=of_keys, bias=bias,
    )  # fmt: skip
    # named for `stacks.REMAT_POLICIES`
    out = checkpoint_name(out, "attended")
    normalizer = checkpoint_name(normalizer, "attended")
    return out, (query, key, value, of_queries, of_keys, bias, out, normalizer)


def _backward(causal: bool, interpret: bool, saved: Any, d_out: Array) -> tuple[Any, ...]:
    query, key, value, of_queries, of_keys, bias, out, normalizer = saved
    # [B, H, Lq]: what of each row's gradient the softmax takes off again
    mean = jnp.einsum("bqhk,bqhk->bhq", d_out.astype(jnp.float32), out.astype(jnp.float32))
    of = {
        "q": query, "of_q": of_queries, "g": d_out, "row": normalizer, "mean": mean,
        "k": key, "v": value, "of_k": of_keys,
    }  # fmt: skip
    settings = (query, key, causal, interpret)
    (d_query,) = _Call(*settings)(_to_queries_kernel, "queries", ["out"], **of, bias=bias)
    turned = None if bias is None else jnp.swapaxes(bias, 2, 3)
    d_key, d_value = _Call(*settings)(
        _to_keys_kernel, "keys", ["of keys", "of keys"], **of, turned=turned
    )
    return d_query, d_key, d_value, None, None, None


fused_attention.defvjp(_forward, _backward)


class _Call:
    """One kernel over tiles of queries, or of keys, of all heads and rows.

    Lengths are padded to whole tiles; what is padded has the number 0 and nothing reads it.
    """

    def __init__(self, query: Array, key: Array, causal: bool, interpret: bool):
        self.batch, self.queries, self.heads, self.size = query.shape
        self.keys = key.shape[1]
        self.tile = {
            "queries": min(_TILE, _power(self.queries)),
            "keys": min(_TILE, _power(self.keys)),
        }
        self.length = {
            "queries": _whole(self.queries, self.tile["queries"]),
            "keys": _whole(self.keys, self.tile["keys"]),
        }
        self.causal, self.interpret = causal, interpret

    def __call__(
        self, kernel: Callable[..., None], over: str, outputs: list[str], **given: Array | None
    ) -> list[Array]:
        # late: a second of imports that only who asks for these kernels pays
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        arrays = {name: self._padded(name, x) for name, x in given.items() if x is not None}
        first, last = self._visited(arrays["of_q"], arrays["of_k"], over)
        arrays = {"first": first, "last": last, **arrays}
        specs = {name: self._spec(name, over, pl) for name in arrays}
        shapes = [self._shape(name) for name in outputs]

        def named(*refs: Any) -> None:
            kernel(dict(zip(arrays, refs, strict=False)), *refs[len(arrays) :], causal=self.causal,
                   queries=self.tile["queries"], keys=self.tile["keys"])  # fmt: skip

        made = pl.pallas_call(
            named,
            grid=(self.length[over] // self.tile[over], self.batch, self.heads),
            in_specs=list(specs.values()),
            out_specs=[self._spec(name, over, pl) for name in outputs],
            out_shape=shapes,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=self.interpret,
            name=kernel.__name__.strip("_"),
        )(*arrays.values())
        return [self._cut(name, x) for name, x in zip(outputs, made, strict=True)]

    def _axes(self, name: str) -> tuple[str, ...]:
        """Of an array, what each axis is: rows of the batch, heads, tokens of a side, or itself."""
        return {
            "q": ("batch", "queries", "heads", "size"),
            "g": ("batch", "queries", "heads", "size"),
            "out": ("batch", "queries", "heads", "size"),
            "k": ("batch", "keys", "heads", "size"),
            "v": ("batch", "keys", "heads", "size"),
            "of keys": ("batch", "keys", "heads", "size"),
            "of_q": ("batch", "queries"),
            "of_k": ("batch", "keys"),
            "row": ("batch", "heads", "queries"),
            "mean": ("batch", "heads", "queries"),
            "bias": ("one", "heads", "queries", "keys"),
            "turned": ("one", "heads", "keys", "queries"),
            "first": ("batch", "tile"),
            "last": ("batch", "tile"),
        }[name]

    def _padded(self, name: str, x: Array) -> Array:
        wanted = [
            self.length.get(axis, n) for axis, n in zip(self._axes(name), x.shape, strict=True)
        ]
        return jnp.pad(x, [(0, to - n) for n, to in zip(x.shape, wanted, strict=True)])

    def _cut(self, name: str, x: Array) -> Array:
        own = {"queries": self.queries, "keys": self.keys}
        return x[tuple(slice(own.get(axis)) for axis in self._axes(name))]

    def _shape(self, name: str) -> jax.ShapeDtypeStruct:
        sizes = {"batch": self.batch, "heads": self.heads, "size": self.size, **self.length}
        shape = tuple(sizes[axis] for axis in self._axes(name))
        return jax.ShapeDtypeStruct(shape, jnp.float32 if name == "row" else jnp.bfloat16)

    def _spec(self, name: str, over: str, pl: Any) -> Any:
        """A program's part: its own tile of the tokens that the grid is over, all others whole."""
        part: list[int | None] = []
        for axis in self._axes(name):
            if axis in ("queries", "keys"):
                part.append(self.tile[over] if axis == over else self.length[axis])
            else:
                part.append(self.size if axis == "size" else None)

        def place(tile: Any, row: Any, head: Any) -> tuple[Any, ...]:
            at = {"batch": row, "heads": head, "tile": tile, over: tile}
            return tuple(at.get(axis, 0) for axis in self._axes(name))

        return pl.BlockSpec(tuple(part), place)

    def _visited(self, of_queries: Array, of_keys: Array, over: str) -> tuple[Array, Array]:
        """For each tile the first tile of the other side to visit, and the one behind the last.

        Returns:
          int32 [B, tiles] each. By the tiles' least and largest numbers: none is left out, and
          where numbers rise along a row, as those of packed examples, none is visited in vain.
        """
        queries = of_queries.reshape(self.batch, -1, 1, self.tile["queries"])
        keys = of_keys.reshape(self.batch, 1, -1, self.tile["keys"])
        least = jnp.min(jnp.where(keys > 0, keys, jnp.iinfo(jnp.int32).max), axis=-1)
        meet = (jnp.max(keys, axis=-1) >= jnp.min(queries, axis=-1)) & (
            least <= jnp.max(queries, axis=-1)
        )  # [B, tiles of queries, tiles of keys]
        if self.causal:
            ends = (1 + jnp.arange(meet.shape[1])) * self.tile["queries"]
            meet &= jnp.arange(meet.shape[2]) * self.tile["keys"] < ends[:, None]
        if over == "keys":
            meet = jnp.swapaxes(meet, 1, 2)
        count = meet.shape[2]
        first = jnp.argmax(meet, axis=2)
        last = jnp.where(jnp.any(meet, axis=2), count - jnp.argmax(meet[:, :, ::-1], axis=2), first)
        return first.astype(jnp.int32), last.astype(jnp.int32)


def _power(size: int) -> int:
    return max(_LEAST, 1 << (size - 1).bit_length())


def _whole(length: int, tile: int) -> int:
    return -(-length // tile) * tile


# The kernels. A program has one head of one row; q, g [queries, K], k, v [keys, K].


def _dot(a: Array, b: Array, of_b: int) -> Array:
    """a [m, k] and b, whose axis `of_b` is k, -> [m, n], float32."""
    return jax.lax.dot_general(
        a, b, (((1,), (of_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def _readable(of_rows: Array, of_columns: Array, of_keys: Array) -> Array:
    return (of_rows[:, None] == of_columns[None, :]) & (of_keys > 0)


def _places(start: Any, shape: tuple[int, ...], axis: int) -> Array:
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _forward_kernel(
    ref: dict[str, Any], out: Any, normalizer: Any, *, causal: bool, queries: int, keys: int
) -> None:
    from jax.experimental import pallas as pl

    q, of_q = ref["q"][...], ref["of_q"][...]
    start = pl.program_id(0) * queries

    def add(i: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, largest, weight = sums
        at = pl.ds(i * keys, keys)
        logits = _logits_of_queries(ref, q, of_q, at, start, i * keys, causal)
        top = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - top[:, None])
        before = jnp.exp(largest - top)
        v = ref["v"][at, :]
        total = total * before[:, None] + _dot(weights.astype(v.dtype), v, 0)
        return total, top, weight * before + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(q.shape, jnp.float32)
    row = jnp.zeros(queries, jnp.float32)
    total, largest, weight = jax.lax.fori_loop(
        ref["first"][...], ref["last"][...], add, (zeros, row + 2 * _LOW, row)
    )
    weight = jnp.where(weight == 0, 1.0, weight)  # of a tile that reads nothing
    out[...] = (total / weight[:, None]).astype(out.dtype)
    normalizer[...] = largest + jnp.log(weight)


def _logits_of_queries(
    ref: dict[str, Any], q: Array, of_q: Array, at: Any, start: Any, first_key: Any, causal: bool
) -> Array:
    logits = _dot(q, ref["k"][at, :], 1)
    if "bias" in ref:
        logits += ref["bias"][:, at].astype(jnp.float32)
    of_k = ref["of_k"][at]
    seen = _readable(of_q, of_k, of_k[None, :])
    if causal:
        seen &= _places(start, logits.shape, 0) >= _places(first_key, logits.shape, 1)
    return jnp.where(seen, logits, _LOW)


def _to_queries_kernel(
    ref: dict[str, Any], out: Any, *, causal: bool, queries: int, keys: int
) -> None:
    from jax.experimental import pallas as pl

    q, g, of_q = ref["q"][...], ref["g"][...], ref["of_q"][...]
    normalizer, mean = ref["row"][...], ref["mean"][...]
    start = pl.program_id(0) * queries

    def add(i: Any, total: Array) -> Array:
        at = pl.ds(i * keys, keys)
        logits = _logits_of_queries(ref, q, of_q, at, start, i * keys, causal)
        probs = jnp.exp(logits - normalizer[:, None])
        d_logits = probs * (_dot(g, ref["v"][at, :], 1) - mean[:, None])
        k = ref["k"][at, :]
        return total + _dot(d_logits.astype(k.dtype), k, 0)

    zeros = jnp.zeros(q.shape, jnp.float32)
    total = jax.lax.fori_loop(ref["first"][...], ref["last"][...], add, zeros)
    out[...] = total.astype(out.dtype)


def _to_keys_kernel(
    ref: dict[str, Any], d_key: Any, d_value: Any, *, causal: bool, queries: int, keys: int
) -> None:
    """Its tiles of logits lie the other way round, [keys, queries], and so does the bias."""
    from jax.experimental import pallas as pl

    k, v, of_k = ref["k"][...], ref["v"][...], ref["of_k"][...]
    start = pl.program_id(0) * keys

    def add(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        to_key, to_value = sums
        at = pl.ds(i * queries, queries)
        q, g = ref["q"][at, :], ref["g"][at, :]
        logits = _dot(k, q, 1)
        if "turned" in ref:
            logits += ref["turned"][:, at].astype(jnp.float32)
        seen = _readable(of_k, ref["of_q"][at], of_k[:, None])
        if causal:
            seen &= _places(i * queries, logits.shape, 1) >= _places(start, logits.shape, 0)
        probs = jnp.exp(jnp.where(seen, logits, _LOW) - ref["row"][at][None, :])
        to_value += _dot(probs.astype(g.dtype), g, 0)
        d_logits = probs * (_dot(v, g, 1) - ref["mean"][at][None, :])
        return to_key + _dot(d_logits.astype(q.dtype), q, 0), to_value

    zeros = jnp.zeros(k.shape, jnp.float32)
    to_key, to_value = jax.lax.fori_loop(ref["first"][...], ref["last"][...], add, (zeros, zeros))
    d_key[...], d_value[...] = to_key.astype(d_key.dtype), to_value.astype(d_value.dtype)
