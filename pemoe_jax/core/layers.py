"""T5's layers with adapters at eight sites; names and shapes of parameters are T5X's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from pemoe_jax.core import attention, quantized
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.adapters import Adapters
from pemoe_jax.core.params import PyTree
from pemoe_jax.core.routing import TokenInfo

Array = jax.Array
Initializer = jax.nn.initializers.Initializer

# T5X's initializers. They are constants, so that parameters of the same shape share one compiled
# program, see `params.param`.
_DENSE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_ATTENTION_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_EMBED_INIT = nn.initializers.normal(stddev=1.0)
_RELPOS_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


@functools.cache
def _query_init(head_dim: int) -> Initializer:
    # T5 does not divide the logits of attention by sqrt(K). Its query kernels start smaller by this
    # factor instead. Cached, so that there is one initializer for each head size.
    return nn.initializers.variance_scaling(1.0 / head_dim, "fan_in", "normal")


def constrain_sharding(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Constrains an activation's sharding by logical axis names; a no-op without a mesh."""
    # Without the constraint, XLA may propagate a parameter's sharding to the residual stream, and
    # then gather the stream in each layer.
    return nn.with_logical_constraint(x, axes)


def row_dropout(rate: float, tokens: TokenInfo | None) -> nn.Dropout:
    """Returns dropout with one mask for all positions of a row, as in T5."""
    deterministic = tokens is None or tokens.deterministic
    return nn.Dropout(rate, broadcast_dims=(-2,), deterministic=deterministic)


class Dense(nn.Module):
    """A linear layer without bias; heads are joined in the kernel, as in T5X's checkpoints.

    Attributes:
      features: size of the output.
      kernel_axes: logical axis names of the kernel.
      dtype: dtype of the product.
      kernel_init: initializer of the kernel; a module-level constant.
    """

    features: int
    kernel_axes: tuple[str, str]
    dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: Initializer = _DENSE_INIT

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """[..., in] -> [..., features]."""
        kernel: PyTree = self.get_variable("params", "kernel")
        if isinstance(kernel, quantized.QuantizedMatrix):
            return checkpoint_name(quantized.matmul(inputs, kernel, self.dtype), "product")
        kernel = params_lib.param(
            self, "kernel", self.kernel_init, (inputs.shape[-1], self.features), self.kernel_axes
        )
        # Batch and length are joined in one axis, [B·L, in]. With two axes, XLA on CPUs copies and
        # transposes the output's gradient to compute the kernel's gradient, which doubles the time
        # of that product (benchmarks/NOTES.md).
        rows = inputs.astype(self.dtype).reshape(-1, inputs.shape[-1])
        product = jnp.matmul(rows, kernel.astype(self.dtype))
        # The policy "minimal" of `stacks.REMAT_POLICIES` stores activations named "product".
        return checkpoint_name(product.reshape(*inputs.shape[:-1], self.features), "product")


class Embed(nn.Module):
    """Token embedding [V, D]."""

    num_embeddings: int
    features: int
    dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        shape, axes = (self.num_embeddings, self.features), ("vocab", "embed")
        self.embedding = params_lib.param(self, "embedding", _EMBED_INIT, shape, axes)

    def __call__(self, token_ids: Array) -> Array:
        """[B, L] -> [B, L, D]."""
        return jnp.take(self.embedding.astype(self.dtype), token_ids, axis=0)


class LayerNorm(nn.Module):
    """RMS norm (arXiv 1910.07467) with a scale and without bias; T5X calls it LayerNorm."""

    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]; the mean square is computed in float32."""
        scale = params_lib.param(
            self, "scale", nn.initializers.ones_init(), (x.shape[-1],), ("embed",)
        )
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(self.dtype)  # T5's epsilon
        return y * scale.astype(self.dtype)


# T5's buckets of relative positions (arXiv 1910.10683, section 2.1).
_NUM_BUCKETS = 32  # the encoder uses half of them for each direction
_MAX_DISTANCE = 128  # all distances from here on share the last bucket


def relative_position_bucket(relative_position: np.ndarray, bidirectional: bool) -> np.ndarray:
    """Returns T5's bucket of each relative position; buckets of long distances are wider.

    Args:
      relative_position: `key position - query position`, an int array of any shape.
      bidirectional: whether keys to the right have their own buckets, as in the encoder. Otherwise
        they share the bucket of distance 0; the decoder masks them.

    Returns:
      int32 array of the same shape, values in [0, 32).
    """
    bucket = np.zeros_like(relative_position, dtype=np.int32)
    distance = -relative_position
    num_buckets = _NUM_BUCKETS
    if bidirectional:
        num_buckets //= 2
        bucket += (distance < 0).astype(np.int32) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    # Half of the buckets hold one distance each. The widths of the others grow logarithmically.
    num_exact = num_buckets // 2
    # In float32 as in T5 and T5X, since rounding decides at the edges of the buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / num_exact)
    ratio /= np.log(_MAX_DISTANCE / num_exact)
    far = num_exact + (ratio * (num_buckets - num_exact)).astype(np.int32)
    far = np.minimum(far, num_buckets - 1)
    return (bucket + np.where(distance < num_exact, distance, far)).astype(np.int32)


class RelativePositionBiases(nn.Module):
    """Learned biases, one for each head and bucket; all layers of a stack share them."""

    num_heads: int
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, query_length: int, key_length: int, bidirectional: bool) -> Array:
        """Returns the biases [1, H, query_length, key_length]."""
        shape, axes = (self.num_heads, _NUM_BUCKETS), ("heads", "relpos_buckets")
        rel_embedding = params_lib.param(self, "rel_embedding", _RELPOS_INIT, shape, axes)
        relative = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
        buckets = relative_position_bucket(relative, bidirectional)
        return jnp.take(rel_embedding.astype(self.dtype), buckets, axis=1)[None]


class MultiHeadDotProductAttention(nn.Module):
    """Attention with the sites query, key, value and out; its logits are not scaled.

    The queries may have C times as many rows as the keys, for C answer choices or beams of one
    input: rows b·C to b·C + C - 1 of the queries attend to row b of the keys. So the keys and
    values of an input are projected and cached once for all its choices.

    Attributes:
      num_heads, head_dim: H and K.
      dtype: dtype of the products.
      dropout_rate: dropout rate of the attention probabilities.
      implementation: one of `attention.IMPLEMENTATIONS`.
      adapters: adapter factories by site.
    """

    num_heads: int
    head_dim: int
    dtype: jax.typing.DTypeLike = jnp.float32
    dropout_rate: float = 0.0
    implementation: str = "plain"
    adapters: Adapters = Adapters()

    def _project(self, site: str, inputs: Array, tokens: TokenInfo | None) -> Array:
        init = _query_init(self.head_dim) if site == "query" else _ATTENTION_INIT
        features = self.num_heads * self.head_dim
        y = Dense(features, ("embed", "joined_kv"), self.dtype, init, name=site)(inputs)
        y = y.reshape(*y.shape[:2], self.num_heads, self.head_dim)  # [B, L, H, K]
        return self.adapters.adapt(site, inputs, y, tokens)

    def _project_kv(
        self, inputs_kv: Array, tokens: TokenInfo | None, use_cache: bool
    ) -> list[Array]:
        # Cross-attention has a collection of its own, `cross_cache`, which is written only if the
        # caller makes it mutable. T5X's decoding does not make it mutable, so there the encoder's
        # output is projected again at every step.
        arrays: list[Array] = []
        for site in ("key", "value"):
            if use_cache and self.has_variable("cross_cache", site):
                arrays.append(self.get_variable("cross_cache", site))
                continue
            arrays.append(self._project(site, inputs_kv, tokens))
            if use_cache and self.is_mutable_collection("cross_cache"):
                self.put_variable("cross_cache", site, arrays[-1])
        return arrays

    def _update_self_cache(
        self, key: Array, value: Array, bias: Array | None
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Writes one step's key and value to the cache; the first call only creates the cache.

        Args:
          key, value: [B, 1, H, K]; [B, T, H, K] in the first call.
          bias: [1, H, T, T], where T is the length of the cache; or None.

        Returns:
          The cached keys and values, [B, T, H, K]; the mask of the positions written so far,
          [1, 1, 1, T]; and this step's row of the bias, [1, H, 1, T]. The first call returns its
          arguments, without a mask.
        """
        is_initialized = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not is_initialized:
            return key, value, None, bias
        if key.shape[1] != 1:
            raise ValueError(f"cached decoding takes one token at a step, got {key.shape[1]}")
        if bias is not None and bias.shape[-1] != cached_key.value.shape[1]:
            raise ValueError(
                f"max_decode_length must be the length of the cache, {cached_key.value.shape[1]},"
                f" got {bias.shape[-1]}"
            )
        position = index.value
        update = jax.lax.dynamic_update_slice_in_dim
        cached_key.value = update(cached_key.value, key, position, 1)
        cached_value.value = update(cached_value.value, value, position, 1)
        index.value = position + 1
        # The cache is zero after this position, and the softmax would count these keys.
        filled = jnp.arange(cached_key.value.shape[1]) <= position
        if bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(bias, position, 1, axis=-2)
        return cached_key.value, cached_value.value, filled[None, None, None, :], bias

    @nn.compact
    def __call__(
        self,
        inputs_q: Array,
        inputs_kv: Array,
        mask: attention.Mask | None = None,
        bias: Array | None = None,
        *,
        tokens_q: TokenInfo | None = None,
        tokens_kv: TokenInfo | None = None,
        decode: bool = False,
    ) -> Array:
        """[B, Lq, D], [B, Lk, D] -> [B, Lq, D].

        Args:
          inputs_q, inputs_kv: inputs of queries, and of keys and values. If they are the same
            object, this is self-attention.
          mask: bool that broadcasts to [B, H, Lq, Lk], True where a query attends to a key, or a
            `SegmentMask`; unused by self-attention with `decode`, which masks by its cache.
          bias: added to the logits; broadcasts to [B, H, Lq, Lk].
          tokens_q, tokens_kv: tokens of inputs_q and inputs_kv, for routers and dropout.
          decode: whether to decode one token at a step with a cache.

        Raises:
          ValueError: the rows of inputs_q are not a multiple of the rows of inputs_kv, or a
            decoding step does not fit the cache.
        """
        is_self_attention = inputs_q is inputs_kv
        query = self._project("query", inputs_q, tokens_q)
        key, value = self._project_kv(inputs_kv, tokens_kv, decode and not is_self_attention)
        if decode and is_self_attention:
            key, value, mask, bias = self._update_self_cache(key, value, bias)
        batch = key.shape[0]
        if query.shape[0] % batch:
            raise ValueError(
                f"the number of rows of inputs_q must be a multiple of the {batch} rows of"
                f" inputs_kv, got {query.shape[0]}"
            )
        if query.shape[0] != batch:
            # [B·C, Lq, H, K] -> [B, C·Lq, H, K]: all choices of an input are queries of one row.
            query = query.reshape(batch, -1, self.num_heads, self.head_dim)
        dropout_mask = None
        if tokens_q is not None and not tokens_q.deterministic and self.dropout_rate > 0.0:
            # As in T5X, a dropped key is dropped for all queries of a head.
            ones = jnp.ones((batch, self.num_heads, 1, key.shape[1]))
            dropout_mask = nn.Dropout(self.dropout_rate)(ones, deterministic=False)
        attended = attention.dot_product_attention(
            query, key, value, mask, bias, dropout_mask, self.implementation
        )
        joined = attended.reshape(*inputs_q.shape[:2], self.num_heads * self.head_dim)
        axes = ("joined_kv", "embed")
        out = Dense(inputs_q.shape[-1], axes, self.dtype, _ATTENTION_INIT, name="out")
        return self.adapters.adapt("out", joined, out(joined), tokens_q)


# T5 v1.1 uses the tanh approximation of GELU.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "linear": lambda x: x,
    "relu": nn.relu,
    "silu": nn.silu,
}


def activations_by_name(activations: tuple[str, ...]) -> dict[str, str]:
    """Returns input projection -> activation; the projections are wi, or wi_0 and wi_1 if gated."""
    if len(activations) == 1:
        return {"wi": activations[0]}
    return {f"wi_{i}": activation for i, activation in enumerate(activations)}


class MlpBlock(nn.Module):
    """T5's MLP with the sites wi_0, wi_1, gate and wo.

    The MLP of T5 v1.1 is gated, `wo(gelu(wi_0 x) * wi_1 x)`. That of T5 1.0 is `wo(relu(wi x))`;
    its projection `wi` is the site wi_0.

    Attributes:
      mlp_dim: F.
      activations: a key of `ACTIVATIONS` for each input projection; the results are multiplied.
      dtype: dtype of the products.
      dropout_rate: dropout rate of the hidden activations.
      adapters: adapter factories by site.
    """

    mlp_dim: int
    activations: tuple[str, ...] = ("gelu", "linear")
    dtype: jax.typing.DTypeLike = jnp.float32
    dropout_rate: float = 0.0
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, x: Array, tokens: TokenInfo | None = None) -> Array:
        """[B, L, D] -> [B, L, D]; `tokens` describes the tokens of x, for routers and dropout."""
        hidden = None
        for name, activation in activations_by_name(self.activations).items():
            dense = Dense(self.mlp_dim, ("embed", "mlp"), self.dtype, name=name)
            site = "wi_0" if name == "wi" else name
            wi = ACTIVATIONS[activation](self.adapters.adapt(site, x, dense(x), tokens))
            if hidden is None:  # the first projection is the gate
                hidden = self.adapters.adapt("gate", x, wi, tokens)
            else:
                hidden = hidden * wi  # [B, L, F]
        hidden = row_dropout(self.dropout_rate, tokens)(hidden)
        wo = Dense(x.shape[-1], ("mlp", "embed"), self.dtype, name="wo")
        return self.adapters.adapt("wo", hidden, wo(hidden), tokens)
