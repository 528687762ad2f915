"""T5 v1.1: encoder, decoder, and `Transformer` with the signatures that T5X calls."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from pemoe_jax.core import attention, layers, stacks
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.adapters import Adapters
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.routing import Tokens

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Dimensions of a T5 v1.1 (arXiv 1910.10683, the v1.1 release), under T5X's names.

    Attributes:
      vocab_size: V, rows of the embedding (32,128 in the public checkpoints).
      dtype: of activations, 'float32' or 'bfloat16'; parameters are created in float32.
      emb_dim: D. num_heads: H. head_dim: K. mlp_dim: F.
      dropout_rate: for embeddings, attention, MLP and residual branches alike.
      sentence_dim: S of the sentence embeddings that routers may read; None: D.
      scan_layers: whether a stack runs as one loop over its layers, compiled once.
      remat_policy: what is kept of a layer for its gradients, see `stacks.REMAT_POLICIES`.
      attention: how it is computed, see `attention.dot_product_attention`.

    The last three change how a step is computed and not what the model is.
    """

    vocab_size: int = 32128
    dtype: str = "float32"
    emb_dim: int = 512
    num_heads: int = 6
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    dropout_rate: float = 0.0
    sentence_dim: int | None = None
    scan_layers: bool = False
    remat_policy: str = "none"
    attention: str = "plain"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
            raise InputError(f"T5Config.dtype: expected float32 or bfloat16, found {self.dtype!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise InputError(f"T5Config.{field.name}: must be at least 1, found {value}")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise InputError(
                f"T5Config.dropout_rate: expected a share in [0, 1), found {self.dropout_rate}"
            )
        if not isinstance(self.scan_layers, bool):
            raise InputError(f"SCAN_LAYERS: expected True or False, found {self.scan_layers!r}")
        stacks.check_remat_policy(self.remat_policy)
        attention.check_implementation(self.attention, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """What the model is, as plain data; `T5Config(**d)` reads it back."""
        found = {**dataclasses.asdict(self), "dtype": jnp.dtype(self.dtype).name}
        return {name: value for name, value in found.items() if name not in _HOW_NOT_WHAT}


_HOW_NOT_WHAT = ("scan_layers", "remat_policy", "attention")


class _Block(nn.Module):
    """What encoder and decoder layers share: their parts, with the config filled in."""

    config: T5Config
    adapters: Adapters = Adapters()

    def attention(self, name: str) -> layers.MultiHeadDotProductAttention:
        cfg = self.config
        return layers.MultiHeadDotProductAttention(
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            dtype=cfg.dtype,
            dropout_rate=cfg.dropout_rate,
            implementation=cfg.attention,
            adapters=self.adapters,
            name=name,
        )

    def norm(self, name: str) -> layers.LayerNorm:
        return layers.LayerNorm(dtype=self.config.dtype, name=name)

    def residual(self, x: Array, y: Array, tokens: Tokens) -> Array:
        dropout = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))
        y = dropout(y, deterministic=tokens.deterministic)
        return layers.constrain_sharding(x + y, ("batch", "length", "embed"))

    def mlp_branch(self, x: Array, tokens: Tokens) -> Array:
        cfg = self.config
        mlp = layers.MlpBlock(
            mlp_dim=cfg.mlp_dim,
            dtype=cfg.dtype,
            dropout_rate=cfg.dropout_rate,
            adapters=self.adapters,
            name="mlp",
        )
        y = mlp(self.norm("pre_mlp_layer_norm")(x), tokens)
        return self.residual(x, y, tokens)


class EncoderLayer(_Block):
    """Self-attention and MLP, each behind a norm and beside a residual."""

    @nn.compact
    def __call__(
        self, x: Array, mask: attention.Mask | None, bias: Array | None, tokens: Tokens
    ) -> Array:
        """[B, L, D] -> [B, L, D]; mask and bias as `attention.prepare_mask_and_bias` gives them."""
        h = self.norm("pre_attention_layer_norm")(x)
        h = self.attention("attention")(h, h, mask, bias, tokens_q=tokens, tokens_kv=tokens)
        x = self.residual(x, h, tokens)
        return self.mlp_branch(x, tokens)


class DecoderLayer(_Block):
    """Causal self-attention, attention to the encoder, and MLP."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        encoded: Array,
        decoder_mask: attention.Mask | None,
        bias: Array | None,
        cross_mask: attention.Mask | None,
        cross_bias: Array | None,
        tokens: Tokens,
        encoded_tokens: Tokens,
        decode: bool,
    ) -> Array:
        """x [B·C, L, D], encoded [B, Le, D] -> [B·C, L, D]."""
        h = self.norm("pre_self_attention_layer_norm")(x)
        h = self.attention("self_attention")(
            h,
            h,
            decoder_mask,
            bias,
            tokens_q=tokens,
            tokens_kv=tokens,
            decode=decode,
        )
        x = self.residual(x, h, tokens)
        h = self.norm("pre_cross_attention_layer_norm")(x)
        h = self.attention("encoder_decoder_attention")(
            h,
            encoded,
            cross_mask,
            cross_bias,
            tokens_q=tokens,
            tokens_kv=encoded_tokens,
            decode=decode,
        )
        x = self.residual(x, h, tokens)
        return self.mlp_branch(x, tokens)


def _how(stack: "Encoder | Decoder") -> dict[str, Any]:
    """How layers are run where they are trained; all are made, and decode, one by one."""
    if stack.is_initializing():
        return {}
    return {"scan": stack.config.scan_layers, "remat_policy": stack.config.remat_policy}


class Encoder(nn.Module):
    """The encoder stack."""

    config: T5Config
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, embedded: Array, mask: attention.SegmentMask, tokens: Tokens) -> Array:
        """Embedded tokens [B, L, D] -> [B, L, D]."""
        cfg, deterministic = self.config, tokens.deterministic
        length = embedded.shape[1]
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        x = dropout(embedded, deterministic=deterministic)
        bias = layers.RelativePositionBiases(cfg.num_heads, dtype=cfg.dtype, name="relpos_bias")(
            length, length, bidirectional=True
        )
        of_all = attention.prepare_mask_and_bias(cfg.attention, mask, bias)
        x = stacks.apply_layers(
            self,
            functools.partial(EncoderLayer, cfg, self.adapters),
            cfg.num_encoder_layers,
            lambda layer, x: layer(x, *of_all, tokens),
            x,
            **_how(self),
        )
        x = layers.LayerNorm(dtype=cfg.dtype, name="encoder_norm")(x)
        return dropout(x, deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder stack and the logits."""

    config: T5Config
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(
        self,
        embedded: Array,
        encoded: Array,
        decoder_mask: attention.SegmentMask | None,
        cross_mask: attention.SegmentMask,
        tokens: Tokens,
        encoded_tokens: Tokens,
        decode: bool,
        max_decode_length: int | None,
        return_hidden: bool = False,
    ) -> Array:
        """Embedded tokens [B·C, L, D], encoded [B, Le, D] -> logits [B·C, L, V], float32.

        With `return_hidden` what the logits' matrix reads, [B·C, L, D] in float32.
        """
        cfg, deterministic = self.config, tokens.deterministic
        length = embedded.shape[1]
        if decode and max_decode_length:
            length = max_decode_length
        dropout = nn.Dropout(cfg.dropout_rate, broadcast_dims=(-2,))
        x = dropout(embedded, deterministic=deterministic)
        bias = layers.RelativePositionBiases(cfg.num_heads, dtype=cfg.dtype, name="relpos_bias")(
            length, length, bidirectional=False
        )
        of_own = attention.prepare_mask_and_bias(cfg.attention, decoder_mask, bias)
        of_encoded = attention.prepare_mask_and_bias(cfg.attention, cross_mask, None)
        x = stacks.apply_layers(
            self,
            functools.partial(DecoderLayer, cfg, self.adapters),
            cfg.num_decoder_layers,
            lambda layer, x: layer(
                x, encoded, *of_own, *of_encoded, tokens, encoded_tokens, decode
            ),
            x,
            **({} if decode else _how(self)),
        )
        x = layers.LayerNorm(dtype=cfg.dtype, name="decoder_norm")(x)
        x = dropout(x, deterministic=deterministic)
        if return_hidden:
            return x.astype(jnp.float32)
        # T5 v1.1 unties the logits from the embedding and does not scale them
        logits = layers.Dense(
            cfg.vocab_size, ("embed", "vocab"), dtype=jnp.float32, name="logits_dense"
        )
        return logits(x)


class Transformer(nn.Module):
    """T5 v1.1 with adapters; `encode`, `decode` and `__call__` as T5X's models call them.

    The parameter tree is that of T5X's minimal T5; adapters add `<site>_adapter/...` beside a
    site's parameters and nothing else. Token 0 is padding.
    """

    config: T5Config
    adapters: Adapters = Adapters()

    def setup(self) -> None:
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, dtype=cfg.dtype)
        self.encoder = Encoder(cfg, self.adapters)
        self.decoder = Decoder(cfg, self.adapters)

    def encode(
        self,
        encoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        enable_dropout: bool = True,
        sentence_embeddings: Array | None = None,
    ) -> Array:
        """Token ids [B, L] -> [B, L, D]; `sentence_embeddings` [B, S] are for routers."""
        valid = encoder_input_tokens > 0
        numbers = _numbers(valid, encoder_segment_ids)
        mask = attention.SegmentMask(numbers, numbers)
        embedded = self.token_embedder(encoder_input_tokens)
        return self.encoder(embedded, mask, Tokens(valid, sentence_embeddings, not enable_dropout))

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
        sentence_embeddings: Array | None = None,
        return_hidden: bool = False,
    ) -> Array:
        """Logits [B·C, L, V] of the decoder; C > 1 where several choices read one input.

        Args:
          encoded: [B, Le, D] from `encode`.
          encoder_input_tokens: [B, Le], for its padding.
          decoder_input_tokens: [B·C, L], targets shifted right; [B, 1] in a step of decoding.
          decoder_target_tokens: [B·C, L], for its padding; not read while decoding.
          encoder_segment_ids, decoder_segment_ids: of packed rows (C = 1).
          decoder_positions: unused: relative positions need none, T5X hands them over.
          enable_dropout: for training.
          decode: one token a step, over the collections `cache` and, if mutable, `cross_cache`.
          max_decode_length: length of the cache in a step of decoding.
          sentence_embeddings: [B, S], for routers that read them.
          return_hidden: what the logits' matrix reads [B·C, L, D], float32, in place of logits: for
            `cross_entropy.chunked_cross_entropy` with `logits_kernel`.
        """
        del decoder_positions
        readable = encoder_input_tokens > 0
        if decoder_segment_ids is None:
            encoder_segment_ids = None  # rows that are not packed read all of their input
        of_keys = _numbers(readable, encoder_segment_ids)
        of_queries = None if encoder_segment_ids is None else decoder_segment_ids
        cross_mask = attention.SegmentMask(of_queries, of_keys)
        decoder_mask = valid = None
        if not decode:
            valid = decoder_target_tokens > 0
            numbers = _numbers(valid, decoder_segment_ids)
            decoder_mask = attention.SegmentMask(numbers, numbers, causal=True)
        embedded = self.token_embedder(decoder_input_tokens)
        encoded_tokens = Tokens(readable, sentence_embeddings, not enable_dropout)
        own = sentence_embeddings
        if own is not None:  # [B·C, S]
            own = jnp.repeat(own, embedded.shape[0] // own.shape[0], axis=0)
        return self.decoder(
            embedded,
            encoded,
            decoder_mask,
            cross_mask,
            Tokens(valid, own, not enable_dropout),
            encoded_tokens,
            decode,
            max_decode_length,
            return_hidden,
        )

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        sentence_embeddings: Array | None = None,
        return_hidden: bool = False,
    ) -> Array:
        """Logits [B, L, V], float32; arguments as for `encode` and `decode`."""
        del encoder_positions  # relative positions need none
        encoded = self.encode(
            encoder_input_tokens, encoder_segment_ids, enable_dropout, sentence_embeddings
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout=enable_dropout,
            decode=decode,
            sentence_embeddings=sentence_embeddings,
            return_hidden=return_hidden,
        )


def _numbers(valid: Array, segments: Array | None) -> Array:
    """Int32 [B, L] for `attention.SegmentMask`: a token's segment, or 1, and 0 at padding."""
    return jnp.where(valid, 1 if segments is None else segments, 0).astype(jnp.int32)


def logits_kernel(params: Mapping[str, Any]) -> Array:
    """The matrix [D, V] that makes logits of what the decoder gives with `return_hidden`."""
    return params["decoder"]["logits_dense"]["kernel"]


def init_params(
    model: Transformer,
    seed: int,
    keep: Callable[[str], bool],
    made: Callable[[str, jax.Array], Any] = params_lib.identity,
) -> dict[str, Any]:
    """Random parameters, float32: those whose path `keep` accepts; the others are never drawn.

    A parameter's value depends on its path and the seed alone, so a base drawn without adapters
    and one drawn with them are the same.

    Args:
      model: the network.
      seed: of the draw.
      keep: 'a/b/c' -> bool.
      made: (path, array) -> what it is kept as.
    """

    _, recorded = _look_over(model)
    return params_lib.initialize({p: found for p, found in recorded.items() if keep(p)}, seed, made)


def param_shapes(
    model: Transformer, keep: Callable[[str], bool] = lambda _: True
) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct`; nothing is allocated."""
    return params_lib.select(_look_over(model)[0], keep)


def param_axes(model: Transformer) -> dict[str, tuple[str, ...]]:
    """path -> names of the parameter's axes, as ('embed', 'joined_kv')."""
    return {path: axes for path, (_, _, axes) in _look_over(model)[1].items()}


def stack_layers(
    model: Transformer, params: Mapping[str, Any], join: Callable[[list[Any]], Any]
) -> dict[str, Any]:
    """Parameters as a model with `scan_layers` reads them best, see `stacks.stack_layers`.

    Args:
      model: the network.
      params: its parameters, or some of them.
      join: `stacks.stack_and_delete` or `stacks.stack_abstract`.
    """
    depths = {
        "encoder/": model.config.num_encoder_layers,
        "decoder/": model.config.num_decoder_layers,
    }
    return stacks.stack_layers(params, depths.__getitem__, join)


def _look_over(model: Transformer) -> tuple[Any, dict[str, Any]]:
    """The parameters' shapes, and (initialiser, shape, axes) of each; no device is touched.

    A run asks five times, so a model keeps its own. Not by equality: partials of gin's that
    are equal may have been configured differently since.
    """
    kept = vars(model)
    if "_looked_over" not in kept:
        kept["_looked_over"] = _trace(model)
    return kept["_looked_over"]


def _trace(model: Transformer) -> tuple[Any, dict[str, Any]]:
    """What `_look_over` gives.

    The layers of a stack are one module under different names, so one of each stack is traced and
    what is found under `layers_0` holds for all: T5 XXL takes a tenth of a second instead of two.
    """
    depths = {
        "encoder": model.config.num_encoder_layers,
        "decoder": model.config.num_decoder_layers,
    }
    shallow = dataclasses.replace(
        model.config,
        num_encoder_layers=min(1, depths["encoder"]),
        num_decoder_layers=min(1, depths["decoder"]),
    )
    init = functools.partial(model.clone(config=shallow).init, enable_dropout=False)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    sentence_dim = model.config.sentence_dim or model.config.emb_dim
    sentence = jax.ShapeDtypeStruct((1, sentence_dim), jnp.float32)
    with params_lib.record_specs() as recorded:
        shapes = jax.eval_shape(
            lambda t, s: init(jax.random.key(0), t, t, t, sentence_embeddings=s), tokens, sentence
        )
    flat = params_lib.flatten(shapes["params"])
    return params_lib.unflatten(_repeat(flat, depths)), _repeat(recorded, depths)


def _repeat(found: Mapping[str, Any], depths: Mapping[str, int]) -> dict[str, Any]:
    """What was found at '<stack>/layers_0/…', at every layer of the stack."""
    repeated: dict[str, Any] = {}
    for path, value in found.items():
        stack, _, rest = path.partition("/layers_0/")
        if not rest:
            repeated[path] = value
            continue
        for i in range(depths[stack]):
            repeated[f"{stack}/layers_{i}/{rest}"] = value
    return repeated
