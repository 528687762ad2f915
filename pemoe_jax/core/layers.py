"""T5's layers, with parameter names and shapes of T5X's minimal T5, and adapters at eight sites."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from pemoe_jax.core import attention, quantized
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.adapters import Adapters
from pemoe_jax.core.routing import Tokens

Array = jax.Array
Initializer = jax.nn.initializers.Initializer

# Initialisers as in T5X; constants, so that draws of the same shape share one compiled program.
_DENSE_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_ATTENTION_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_EMBED_INIT = nn.initializers.normal(stddev=1.0)
_RELPOS_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


@functools.cache
def _query_init(head_dim: int) -> Initializer:
    """T5 does not scale the logits of attention; its queries start that much smaller."""
    return nn.initializers.variance_scaling(1.0 / head_dim, "fan_in", "normal")


def constrain_sharding(x: Array, axes: tuple[str, ...]) -> Array:
    """Says where an activation lies, by the names of its axes; outside of a mesh it says nothing.

    Without it XLA may spread the residual stream as parameters are spread, and gather it again.
    """
    return nn.with_logical_constraint(x, axes)


class Dense(nn.Module):
    """A matrix without bias; heads are joined in the kernel, as in T5X's checkpoints."""

    features: int
    kernel_axes: tuple[str, str]
    dtype: Any = jnp.float32
    kernel_init: Initializer = _DENSE_INIT

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """[..., in] -> [..., features]."""
        kept: Any = self.get_variable("params", "kernel")
        if isinstance(kept, quantized.QuantizedMatrix):
            return checkpoint_name(quantized.matmul(inputs, kept, self.dtype), "product")
        kernel = params_lib.param(
            self, "kernel", self.kernel_init, (inputs.shape[-1], self.features), self.kernel_axes
        )
        # Tokens as one axis: of two, XLA's CPU compiler transposes the gradient of the output by a
        # copy for the kernel's (which takes as long again), for it does not see through the reshape
        rows = inputs.astype(self.dtype).reshape(-1, inputs.shape[-1])
        product = jnp.matmul(rows, kernel.astype(self.dtype))
        product = product.reshape(*inputs.shape[:-1], self.features)
        return checkpoint_name(product, "product")  # for `stacks.REMAT_POLICIES`


class Embed(nn.Module):
    """Token embedding [V, D]."""

    num_embeddings: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Token ids [B, L] -> [B, L, D]."""
        embedding = params_lib.param(
            self, "embedding", _EMBED_INIT, (self.num_embeddings, self.features), ("vocab", "embed")
        )
        return jnp.take(embedding.astype(self.dtype), tokens, axis=0)


class LayerNorm(nn.Module):
    """T5's norm: root mean square, a scale, no mean and no bias (arXiv 1910.07467)."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]; the statistics are float32."""
        scale = params_lib.param(
            self, "scale", nn.initializers.ones_init(), (x.shape[-1],), ("embed",)
        )
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = (x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
        return y * scale.astype(self.dtype)


def relative_position_bucket(
    relative_position: np.ndarray,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> np.ndarray:
    """T5's buckets of `key position - query position`: exact when near, logarithmic when far.

    Args:
      relative_position: int array of any shape.
      bidirectional: whether keys to the right have buckets of their own (the encoder).
      num_buckets: the number of buckets over both directions.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 array of the same shape, values in [0, num_buckets).
    """
    bucket = np.zeros_like(relative_position, dtype=np.int32)
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket += (distance < 0).astype(np.int32) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    # float32, as T5X and T5 compute it: at the edges of a bucket the rounding decides
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(
        max_distance / exact
    )
    far = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    far = np.minimum(far, num_buckets - 1)
    return (bucket + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativePositionBiases(nn.Module):
    """A learnt bias per head and bucket of distance, shared by the layers of a stack."""

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query_length: int, key_length: int, bidirectional: bool) -> Array:
        """-> [1, H, query_length, key_length]."""
        rel_embedding = params_lib.param(
            self,
            "rel_embedding",
            _RELPOS_INIT,
            (self.num_heads, self.num_buckets),
            ("heads", "relpos_buckets"),
        )
        relative = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
        buckets = relative_position_bucket(
            relative, bidirectional, self.num_buckets, self.max_distance
        )
        return jnp.take(rel_embedding.astype(self.dtype), buckets, axis=1)[None]


class MultiHeadDotProductAttention(nn.Module):
    """Attention without scaling of the logits (T5 folds it into the initialisation), four sites.

    When the batch of the queries is C times that of the keys (answer choices of one input), rows
    `b*C .. b*C + C-1` read row b: the keys and values of an input are projected and kept once.
    """

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    implementation: str = "plain"  # one of `attention.IMPLEMENTATIONS`
    adapters: Adapters = Adapters()

    def _project(self, site: str, inputs: Array, tokens: Tokens | None) -> Array:
        init = _query_init(self.head_dim) if site == "query" else _ATTENTION_INIT
        dense = Dense(
            self.num_heads * self.head_dim,
            ("embed", "joined_kv"),
            dtype=self.dtype,
            kernel_init=init,
            name=site,
        )
        y = dense(inputs)
        y = y.reshape(*y.shape[:2], self.num_heads, self.head_dim)  # [B, L, H, K]
        return self.adapters.adapt(site, inputs, y, tokens)

    def _project_kv(self, inputs_kv: Array, tokens: Tokens | None) -> tuple[Array, Array]:
        return self._project("key", inputs_kv, tokens), self._project("value", inputs_kv, tokens)

    def _cached_cross(self, inputs_kv: Array, tokens: Tokens | None) -> tuple[Array, Array]:
        """Keys and values of the encoder's output, projected at the first call alone.

        They live in a collection of their own, `cross_cache`, which a caller makes mutable to have
        them kept (T5X's decoding does not ask for it, and gets them computed at each step).
        """
        if self.has_variable("cross_cache", "key"):
            return self.get_variable("cross_cache", "key"), self.get_variable(
                "cross_cache", "value"
            )
        key, value = self._project_kv(inputs_kv, tokens)
        if self.is_mutable_collection("cross_cache"):
            self.put_variable("cross_cache", "key", key)
            self.put_variable("cross_cache", "value", value)
        return key, value

    def _cached_self(
        self, key: Array, value: Array, bias: Array | None
    ) -> tuple[Array, Array, Array | None, Array | None]:
        """Puts one step's key and value into the cache; the first call only makes the cache.

        Returns keys and values so far [B, T, H, K], the mask of filled places and this step's bias.
        """
        is_made = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, key.shape, key.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, value.shape, value.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not is_made:
            return key, value, None, bias
        if key.shape[1] != 1:
            raise ValueError(f"cached decoding takes one token a step, found {key.shape[1]}")
        if bias is not None and bias.shape[-1] != cached_key.value.shape[1]:
            raise ValueError(
                f"a step of decoding needs max_decode_length {cached_key.value.shape[1]},"
                f" the length of its cache, found a bias of length {bias.shape[-1]}"
            )
        position = index.value
        cached_key.value = jax.lax.dynamic_update_slice_in_dim(cached_key.value, key, position, 1)
        cached_value.value = jax.lax.dynamic_update_slice_in_dim(
            cached_value.value, value, position, 1
        )
        index.value = position + 1
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
        tokens_q: Tokens | None = None,
        tokens_kv: Tokens | None = None,
        decode: bool = False,
    ) -> Array:
        """[B, Lq, D], [B, Lk, D] -> [B, Lq, D].

        Args:
          inputs_q: what asks.
          inputs_kv: what is read; the same array as inputs_q in self-attention.
          mask: which keys may be read: bool that broadcasts to [B, H, Lq, Lk], or `SegmentMask`.
          bias: added to the logits; broadcasts to [B, H, Lq, Lk].
          tokens_q, tokens_kv: of inputs_q and inputs_kv, for routers; whether there is dropout.
          decode: one step at a time over a cache.
        """
        query = self._project("query", inputs_q, tokens_q)
        if decode and inputs_q is not inputs_kv:
            key, value = self._cached_cross(inputs_kv, tokens_kv)
        else:
            key, value = self._project_kv(inputs_kv, tokens_kv)
            if decode:
                key, value, mask, bias = self._cached_self(key, value, bias)
        deterministic = tokens_q is None or tokens_q.deterministic
        attended = self._attend(query, key, value, mask, bias, deterministic)
        joined = attended.reshape(*inputs_q.shape[:2], self.num_heads * self.head_dim)
        out = Dense(
            inputs_q.shape[-1],
            ("joined_kv", "embed"),
            dtype=self.dtype,
            kernel_init=_ATTENTION_INIT,
            name="out",
        )
        return self.adapters.adapt("out", joined, out(joined), tokens_q)

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: attention.Mask | None,
        bias: Array | None,
        deterministic: bool,
    ) -> Array:
        batch = key.shape[0]
        if query.shape[0] % batch:
            raise ValueError(f"{query.shape[0]} rows of queries cannot share {batch} rows of keys")
        if query.shape[0] != batch:  # [B·C, Lq, H, K] -> [B, C·Lq, H, K]
            query = query.reshape(batch, -1, self.num_heads, self.head_dim)
        dropout_mask = None
        if not deterministic and self.dropout_rate > 0.0:
            # T5X drops the same key for all queries of a head
            ones = jnp.ones((batch, self.num_heads, 1, key.shape[1]))
            dropout_mask = nn.Dropout(self.dropout_rate)(ones, deterministic=False)
        return attention.dot_product_attention(
            query, key, value, mask, bias, dropout_mask, self.implementation
        )


class MlpBlock(nn.Module):
    """T5 v1.1's gated GELU (tanh approximation): `wo(gelu(wi_0 x) * wi_1 x)`, four sites."""

    mlp_dim: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, x: Array, tokens: Tokens | None = None) -> Array:
        """[B, L, D] -> [B, L, D]; `tokens` are those of x."""

        def wi(name: str) -> Array:
            dense = Dense(self.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name=name)
            return self.adapters.adapt(name, x, dense(x), tokens)

        gate = self.adapters.adapt("gate", x, nn.gelu(wi("wi_0"), approximate=True), tokens)
        hidden = gate * wi("wi_1")  # [B, L, F]
        deterministic = tokens is None or tokens.deterministic
        hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
            hidden, deterministic=deterministic
        )
        wo = Dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="wo")
        return self.adapters.adapt("wo", hidden, wo(hidden), tokens)
