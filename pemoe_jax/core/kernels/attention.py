"""T5's attention in fused kernels for GPUs, which never write the logits to memory.

Flash attention (arXiv 2205.14135, 2307.08691) with T5's relative position bias. The bias is added
to each tile of logits; all rows of the batch share it. The mask is made from segment ids, one for
each token. Pairs of a query tile and a key tile that have no common segment are skipped, so a row
of packed examples costs about as much as its examples alone. The forward and backward pass of
packed rows [16, 1024, 32, 64] takes 0.82 ms on an H200; cuDNN with bias and mask takes 4.39 ms.

Products have bfloat16 factors and float32 sums; the softmax is float32. A tile of a gradient is
summed by one program in a fixed order, so results are reproducible bit for bit. The bias has no
gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from pemoe_jax.core import partitioning
from pemoe_jax.core.kernels import tiling
from pemoe_jax.core.kernels.tiling import Index, Ref

if TYPE_CHECKING:
    from jax.experimental import pallas as pl

Array = jax.Array

_NEG_INF = -1e10  # masked logits; finite, so that a query without keys has no NaN
_TILE = 64  # queries or keys in a tile; the fastest of 32, 64 and 128 on an H200, in all 3 kernels


def supports(query: Array) -> bool:
    """Whether the kernels run here for queries [B, Lq, H, K].

    They need bfloat16, a head size that matrix units support, and either one GPU or a mesh of GPUs
    that divides rows and heads evenly.
    """
    rows, _, heads, size = query.shape
    mesh = jax.sharding.get_abstract_mesh().shape
    if jax.device_count() > 1 and not mesh:
        return False  # `fused_attention_on_mesh` could not partition the kernels
    is_divisible = rows % partitioning.data_parallelism() == heads % mesh.get("model", 1) == 0
    has_kernel = query.dtype == jnp.bfloat16 and size in (16, 32, 64, 128)
    return jax.default_backend() == "gpu" and is_divisible and has_kernel


def fused_attention_on_mesh(*arrays: Array | None, causal: bool) -> Array:
    """Returns `fused_attention` of the arrays, partitioned by rows and heads over the mesh."""
    run = functools.partial(fused_attention, causal=causal)
    # XLA cannot partition a kernel. Without `shard_map`, each device would compute the whole batch.
    if math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1:
        batch = partitioning.batch_axes()
        heads, ids = PartitionSpec(batch, None, "model"), PartitionSpec(batch)
        specs = (heads, heads, heads, ids, ids, PartitionSpec(None, "model"))
        run = jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)
    return run(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def fused_attention(
    query: Array,
    key: Array,
    value: Array,
    query_segment_ids: Array,
    key_segment_ids: Array,
    bias: Array | None,
    causal: bool = False,
    interpret: bool = False,
) -> Array:
    """Returns `softmax(query · key + bias) value`, [B, Lq, H, K]; reverse-mode gradients only.

    Args:
      query: bfloat16 [B, Lq, H, K], where K is 16, 32, 64 or 128.
      key, value: bfloat16 [B, Lk, H, K].
      query_segment_ids, key_segment_ids: int32 [B, Lq], [B, Lk]: queries attend to keys of the
        same segment; none attends to segment 0. The output of a query without keys is undefined.
      bias: [1, H, Lq, Lk], added to the logits; has no gradient. None: no bias.
      causal: whether keys to the right of a query are masked (Lq = Lk).
      interpret: whether to run the kernels on any device, slowly, for tests.
    """
    arrays = query, key, value, query_segment_ids, key_segment_ids, bias
    return _vjp_forward(*arrays, causal, interpret)[0]


_Saved = dict[str, Any]


def _vjp_forward(*arguments: Any) -> tuple[Array, _Saved]:
    *arrays, causal, interpret = arguments
    names = ("query", "key", "value", "query_ids", "key_ids", "bias")
    inputs: _Saved = dict(zip(names, arrays, strict=True))
    call = _Call(inputs["query"], inputs["key"], causal, interpret)
    out, normalizer = call(_forward_kernel, "queries", ["out", "normalizer"], **inputs)
    # Rematerialization saves these by name, see `stacks.REMAT_POLICIES`.
    out = checkpoint_name(out, "attended")
    normalizer = checkpoint_name(normalizer, "attended")
    return out, {**inputs, "out": out, "normalizer": normalizer}


def _vjp_backward(
    causal: bool, interpret: bool, saved: _Saved, grad: Array
) -> tuple[Array, Array, Array, None, None, None]:
    arrays = {**saved, "grad": grad}
    out, bias = arrays.pop("out"), arrays.pop("bias")
    # The term Σ_m p_m dp_m of the softmax's gradient, [B, H, Lq]. It equals Σ_k grad_k out_k
    # (arXiv 2205.14135, appendix B.2), which needs no probabilities.
    arrays["delta"] = jnp.einsum(
        "bqhk,bqhk->bhq", grad.astype(jnp.float32), out.astype(jnp.float32)
    )
    call = _Call(saved["query"], saved["key"], causal, interpret)
    (grad_query,) = call(_query_grad_kernel, "queries", ["out"], **arrays, bias=bias)
    # The next kernel has tiles [keys, queries] of logits.
    arrays["transposed_bias"] = None if bias is None else jnp.swapaxes(bias, 2, 3)
    outputs = ["key_grad", "key_grad"]
    grad_key, grad_value = call(_key_value_grad_kernel, "keys", outputs, **arrays)
    return grad_query, grad_key, grad_value, None, None, None


fused_attention.defvjp(_vjp_forward, _vjp_backward)

# The axes of the kernels' arrays. The bias has one entry for all rows of the batch ('broadcast').
# 'tile' is the axis of the tiles for which the kernel runs.
_AXES = {
    **dict.fromkeys(("query", "grad", "out"), ("batch", "queries", "heads", "size")),
    **dict.fromkeys(("key", "value", "key_grad"), ("batch", "keys", "heads", "size")),
    "query_ids": ("batch", "queries"),
    "key_ids": ("batch", "keys"),
    "normalizer": ("batch", "heads", "queries"),
    "delta": ("batch", "heads", "queries"),
    "bias": ("broadcast", "heads", "queries", "keys"),
    "transposed_bias": ("broadcast", "heads", "keys", "queries"),
    "first": ("batch", "tile"),
    "end": ("batch", "tile"),
}


class _Call:
    """Runs kernels over tiles of queries, or of keys, of all heads and rows of the batch.

    Lengths are padded to whole tiles. Padding has segment 0, which no query attends to.
    """

    def __init__(self, query: Array, key: Array, causal: bool, interpret: bool):
        self.batch, queries, self.heads, self.size = query.shape
        self.length = {"queries": queries, "keys": key.shape[1]}
        self.tile = {
            side: min(_TILE, tiling.power_of_two(length)) for side, length in self.length.items()
        }
        self.padded = {
            side: self.tile[side] * tiling.num_tiles(length, self.tile[side])
            for side, length in self.length.items()
        }
        self.causal, self.interpret = causal, interpret

    def __call__(
        self, kernel: Callable[..., None], over: str, outputs: list[str], **inputs: Array | None
    ) -> list[Array]:
        """Runs `kernel` for each tile of `over` ('queries' or 'keys'), and returns its outputs.

        `outputs` are the names in `_AXES` that have the outputs' axes. `inputs` are passed by their
        names there.
        """
        # Imported late: it takes a second, which only users of these kernels should pay.
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        arrays = {name: self._pad(name, x) for name, x in inputs.items() if x is not None}
        first, end = self._visited_tiles(arrays["query_ids"], arrays["key_ids"], over)
        arrays = {"first": first, "end": end, **arrays}

        def kernel_of_refs(*refs: Ref) -> None:
            kernel(
                dict(zip(arrays, refs, strict=False)),  # inputs come first, then outputs
                *refs[len(arrays) :],
                causal=self.causal,
                query_tile=self.tile["queries"],
                key_tile=self.tile["keys"],
            )

        results = pl.pallas_call(
            kernel_of_refs,
            grid=(self.padded[over] // self.tile[over], self.batch, self.heads),
            in_specs=[self._block_spec(name, over, pl.BlockSpec) for name in arrays],
            out_specs=[self._block_spec(name, over, pl.BlockSpec) for name in outputs],
            out_shape=[self._shape(name) for name in outputs],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=self.interpret,
            name=kernel.__name__.strip("_"),
        )(*arrays.values())
        return [self._unpad(name, x) for name, x in zip(outputs, results, strict=True)]

    def _pad(self, name: str, x: Array) -> Array:
        sizes = [self.padded.get(axis, n) for axis, n in zip(_AXES[name], x.shape, strict=True)]
        return jnp.pad(x, [(0, to - n) for n, to in zip(x.shape, sizes, strict=True)])

    def _unpad(self, name: str, x: Array) -> Array:
        return x[tuple(slice(self.length.get(axis)) for axis in _AXES[name])]

    def _shape(self, name: str) -> jax.ShapeDtypeStruct:
        sizes = {"batch": self.batch, "heads": self.heads, "size": self.size, **self.padded}
        shape = tuple(sizes[axis] for axis in _AXES[name])
        return jax.ShapeDtypeStruct(shape, jnp.float32 if name == "normalizer" else jnp.bfloat16)

    def _block_spec(self, name: str, over: str, block_spec: "type[pl.BlockSpec]") -> "pl.BlockSpec":
        """Returns a program's block of an array: one tile of `over`, and all of the other side.

        The block has one row of the batch and one head.
        """
        sizes = {**self.padded, over: self.tile[over], "size": self.size}

        def index(tile: Index, row: Index, head: Index) -> tuple[Index, ...]:
            indices = {"batch": row, "heads": head, "tile": tile, over: tile}
            return tuple(indices.get(axis, 0) for axis in _AXES[name])

        return block_spec(tuple(sizes.get(axis) for axis in _AXES[name]), index)

    def _visited_tiles(self, query_ids: Array, key_ids: Array, over: str) -> tuple[Array, Array]:
        """Returns the range of tiles on the other side that each tile of `over` has to visit.

        Two tiles are compared by their ranges of segments, so no pair with a common segment is
        missed. If segments ascend along a row without gaps, as in packed examples, a pair without
        a common segment is visited only if its query tile has padding, whose 0 widens the range.

        Returns:
          int32 [B, tiles] each: the first tile to visit, and the end, the last one plus 1. They are
          equal if there is no tile to visit.
        """
        query_ids = query_ids.reshape(self.batch, -1, 1, self.tile["queries"])
        key_ids = key_ids.reshape(self.batch, 1, -1, self.tile["keys"])
        # The least segment of keys leaves out padding, whose 0 is below all segments of queries.
        least_key = jnp.min(jnp.where(key_ids > 0, key_ids, jnp.iinfo(jnp.int32).max), axis=-1)
        overlap = (jnp.max(key_ids, axis=-1) >= jnp.min(query_ids, axis=-1)) & (
            least_key <= jnp.max(query_ids, axis=-1)
        )  # [B, query tiles, key tiles]
        if self.causal:  # a tile of keys must start before the tile of queries ends
            ends = (1 + jnp.arange(overlap.shape[1])) * self.tile["queries"]
            overlap &= jnp.arange(overlap.shape[2]) * self.tile["keys"] < ends[:, None]
        if over == "keys":
            overlap = jnp.swapaxes(overlap, 1, 2)
        first = jnp.argmax(overlap, axis=2)
        from_end = jnp.argmax(overlap[:, :, ::-1], axis=2)
        end = jnp.where(jnp.any(overlap, axis=2), overlap.shape[2] - from_end, first)
        return first.astype(jnp.int32), end.astype(jnp.int32)


# The kernels. A program has one head of one row of the batch: the query and the output's gradient
# [queries, K], key and value [keys, K].


def _dot(a: Array, b: Array, b_axis: int) -> Array:
    """Contracts the last axis of a [m, k] with the axis `b_axis` of b -> float32 [m, n]."""
    return jax.lax.dot_general(
        a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _positions(start: Index, shape: tuple[int, ...], axis: int) -> Array:
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _logits(
    ref: dict[str, Ref],
    query: Array,
    query_ids: Array,
    key_slice: object,
    first_query: Index,
    first_key: Index,
    causal: bool,
) -> Array:
    """Returns the masked logits of a tile, [queries, keys]."""
    logits = _dot(query, ref["key"][key_slice, :], 1)
    if "bias" in ref:
        logits += ref["bias"][:, key_slice].astype(jnp.float32)
    key_ids = ref["key_ids"][key_slice]
    mask = (query_ids[:, None] == key_ids[None, :]) & (key_ids[None, :] > 0)
    if causal:
        mask &= _positions(first_query, logits.shape, 0) >= _positions(first_key, logits.shape, 1)
    return jnp.where(mask, logits, _NEG_INF)


def _forward_kernel(
    ref: dict[str, Ref], out: Ref, normalizer: Ref, *, causal: bool, query_tile: int, key_tile: int
) -> None:
    """Writes the output of a tile of queries, and their log(Z) (arXiv 2307.08691, alg. 1)."""
    from jax.experimental import pallas as pl

    query, query_ids = ref["query"][...], ref["query_ids"][...]
    start = pl.program_id(0) * query_tile

    def add(i: Index, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, largest, denominator = carry
        keys = pl.ds(i * key_tile, key_tile)
        logits = _logits(ref, query, query_ids, keys, start, i * key_tile, causal)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - new_largest[:, None])
        rescale = jnp.exp(largest - new_largest)
        value = ref["value"][keys, :]
        total = total * rescale[:, None] + _dot(weights.astype(value.dtype), value, 0)
        return total, new_largest, denominator * rescale + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(query.shape, jnp.float32)
    zero = jnp.zeros(query_tile, jnp.float32)
    # The maximum starts below masked logits, so that a query with only masked logits needs no
    # special case.
    total, largest, denominator = jax.lax.fori_loop(
        ref["first"][...], ref["end"][...], add, (zeros, zero + 2 * _NEG_INF, zero)
    )
    denominator = jnp.where(denominator == 0, 1.0, denominator)  # if no tile of keys was visited
    out[...] = (total / denominator[:, None]).astype(out.dtype)
    normalizer[...] = largest + jnp.log(denominator)


def _query_grad_kernel(
    ref: dict[str, Ref], out: Ref, *, causal: bool, query_tile: int, key_tile: int
) -> None:
    """Writes the gradient of a tile of queries; the probabilities are computed again."""
    from jax.experimental import pallas as pl

    query, grad, query_ids = ref["query"][...], ref["grad"][...], ref["query_ids"][...]
    normalizer, delta = ref["normalizer"][...], ref["delta"][...]
    start = pl.program_id(0) * query_tile

    def add(i: Index, total: Array) -> Array:
        keys = pl.ds(i * key_tile, key_tile)
        logits = _logits(ref, query, query_ids, keys, start, i * key_tile, causal)
        probs = jnp.exp(logits - normalizer[:, None])
        grad_logits = probs * (_dot(grad, ref["value"][keys, :], 1) - delta[:, None])
        key = ref["key"][keys, :]
        return total + _dot(grad_logits.astype(key.dtype), key, 0)

    zeros = jnp.zeros(query.shape, jnp.float32)
    total = jax.lax.fori_loop(ref["first"][...], ref["end"][...], add, zeros)
    out[...] = total.astype(out.dtype)


def _key_value_grad_kernel(
    ref: dict[str, Ref],
    key_grad: Ref,
    value_grad: Ref,
    *,
    causal: bool,
    query_tile: int,
    key_tile: int,
) -> None:
    """Writes the gradients of a tile of keys and of its values (arXiv 2307.08691, alg. 2)."""
    from jax.experimental import pallas as pl

    key, value, key_ids = ref["key"][...], ref["value"][...], ref["key_ids"][...]
    start = pl.program_id(0) * key_tile

    def add(i: Index, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total_key, total_value = carry
        queries = pl.ds(i * query_tile, query_tile)
        query, grad = ref["query"][queries, :], ref["grad"][queries, :]
        logits = _dot(key, query, 1)  # [keys, queries]
        if "transposed_bias" in ref:
            logits += ref["transposed_bias"][:, queries].astype(jnp.float32)
        query_ids = ref["query_ids"][queries]
        mask = (key_ids[:, None] == query_ids[None, :]) & (key_ids[:, None] > 0)
        if causal:
            query_positions = _positions(i * query_tile, logits.shape, 1)
            mask &= query_positions >= _positions(start, logits.shape, 0)
        masked = jnp.where(mask, logits, _NEG_INF)
        probs = jnp.exp(masked - ref["normalizer"][queries][None, :])
        total_value += _dot(probs.astype(grad.dtype), grad, 0)
        grad_logits = probs * (_dot(value, grad, 1) - ref["delta"][queries][None, :])
        return total_key + _dot(grad_logits.astype(query.dtype), query, 0), total_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    total_key, total_value = jax.lax.fori_loop(
        ref["first"][...], ref["end"][...], add, (zeros, zeros)
    )
    key_grad[...] = total_key.astype(key_grad.dtype)
    value_grad[...] = total_value.astype(value_grad.dtype)
