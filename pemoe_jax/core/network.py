"""T5 v1.1 with adapters: encoder, decoder, and `Transformer` with the signatures of T5X."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from pemoe_jax.core import attention, layers, stacks
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.adapters import Adapters
from pemoe_jax.core.errors import InputError, check_integer
from pemoe_jax.core.experts import SparseMlpBlock
from pemoe_jax.core.params import Params, ParamSpec, PyTree
from pemoe_jax.core.routing import TokenInfo
from pemoe_jax.core.sparse import Sparse

Array = jax.Array
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Dimensions of T5 v1.1 (a release after arXiv 1910.10683), under T5X's names.

    The defaults are those of T5 v1.1 Small without dropout. The last three fields change how a step
    is computed, not the model.

    The positions of a row share a dropout mask, and in attention, the queries of a head share one.
    T5X runs two implementations of T5, its minimal T5 and flaxformer's. Their dropout differs only
    at the encoder's output: see `broadcast_encoder_dropout`.

    Attributes:
      vocab_size: number of rows of the embedding, V; 32,128 in the public checkpoints.
      dtype: dtype of activations, 'float32' or 'bfloat16'; parameters are created in float32.
      emb_dim, num_heads, head_dim, mlp_dim: D, H, K and F.
      num_encoder_layers, num_decoder_layers: depths of the stacks.
      dropout_rate: dropout rate of embeddings, attention, MLPs and residual branches.
      mlp_activations: activations of an MLP's input projections: ('gelu', 'linear') in T5 v1.1,
        ('relu',) in T5 1.0, ('silu', 'linear') in UL2.
      logits_via_embedding: whether the embedding is also the matrix of the logits layer, whose
        input is then scaled by D^-1/2, as in T5 1.0.
      broadcast_encoder_dropout: whether the positions of a row share the dropout mask of the
        encoder's output, as in flaxformer and so in the MoV paper's code (gin/paper/). If False, a
        mask is drawn for each position, as in T5X's minimal T5.
      sentence_dim: S, size of the sentence embeddings that routers may read; None: D.
      scan_layers: whether the layers of a stack run as a loop. Then one layer (one period of
        layers in a sparse model) is compiled instead of all.
      remat_policy: which activations the backward pass recomputes to save memory: 'none', 'minimal'
        (all but matrix products and fused attention) or 'full' (all); see `stacks.REMAT_POLICIES`.
      attention: implementation of attention: 'plain', 'chunked' (less memory for long inputs) or
        'fused' (bfloat16 on a GPU).
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
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    logits_via_embedding: bool = False
    broadcast_encoder_dropout: bool = False
    sentence_dim: int | None = None
    scan_layers: bool = False
    remat_policy: str = "none"
    attention: str = "plain"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
            raise InputError(f"T5Config.dtype must be float32 or bfloat16, got {self.dtype!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.name == "sentence_dim" and value is not None):
                check_integer(f"T5Config.{field.name}", value)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise InputError(f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}")
        for name, value in (
            ("SCAN_LAYERS", self.scan_layers),
            ("T5Config.broadcast_encoder_dropout", self.broadcast_encoder_dropout),
            ("T5Config.logits_via_embedding", self.logits_via_embedding),
        ):
            if not isinstance(value, bool):
                raise InputError(f"{name} must be True or False, got {value!r}")
        # JSON and gin have lists, but models are static arguments of jitted functions, so all their
        # fields must be hashable. The dataclass is frozen, so the field is set through `object`.
        activations = tuple(self.mlp_activations)
        object.__setattr__(self, "mlp_activations", activations)
        if not 1 <= len(activations) <= 2 or not set(activations) <= layers.ACTIVATIONS.keys():
            raise InputError(
                "T5Config.mlp_activations must be one or two of"
                f" {[*layers.ACTIVATIONS]}, got {self.mlp_activations!r}"
            )
        if self.remat_policy not in stacks.REMAT_POLICIES:
            expected = [*stacks.REMAT_POLICIES]
            raise InputError(f"REMAT_POLICY must be one of {expected}, got {self.remat_policy!r}")
        attention.check_implementation(self.attention, self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields that define the model; `T5Config(**fields)` is the inverse."""
        fields = {
            **dataclasses.asdict(self),
            "dtype": jnp.dtype(self.dtype).name,
            "mlp_activations": [*self.mlp_activations],  # equal to what JSON reads back
        }
        return {name: value for name, value in fields.items() if name not in _EXECUTION_FIELDS}


# Fields that `as_dict` leaves out: a run may resume with other values of these.
_EXECUTION_FIELDS = ("broadcast_encoder_dropout", "scan_layers", "remat_policy", "attention")


class _Block(nn.Module):
    """The parts that encoder and decoder layers share; a layer with `sparse` has a sparse MLP."""

    config: T5Config
    adapters: Adapters = Adapters()
    sparse: Sparse | None = None

    is_causal: ClassVar[bool] = False

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

    def add_residual(self, x: Array, y: Array, tokens: TokenInfo) -> Array:
        """Adds a branch's output y, with dropout, to the residual stream x."""
        y = layers.row_dropout(self.config.dropout_rate, tokens)(y)
        return layers.constrain_sharding(x + y, ("batch", "length", "embed"))

    def add_mlp(self, x: Array, tokens: TokenInfo) -> Array:
        """Adds the MLP's branch, and that of the extra dense MLP if there is one, to x."""
        cfg = self.config
        settings = cfg.mlp_dim, cfg.mlp_activations, cfg.dtype, cfg.dropout_rate
        if self.sparse is None:
            mlp: nn.Module = layers.MlpBlock(*settings, self.adapters, name="mlp")
        else:
            mlp = SparseMlpBlock(self.sparse, *settings, self.is_causal, name="mlp")
        y = mlp(self.norm("pre_mlp_layer_norm")(x), tokens)
        x = self.add_residual(x, y, tokens)
        if self.sparse is None or not self.sparse.extra_mlp:
            return x
        # `extra_mlp` has no adapters: the sites of an MLP are those of `mlp`.
        extra_mlp = layers.MlpBlock(*settings, name="extra_mlp")
        y = extra_mlp(self.norm("pre_extra_mlp_layer_norm")(x), tokens)
        return self.add_residual(x, y, tokens)


class EncoderLayer(_Block):
    """Self-attention and MLP, each with a norm before it and a residual connection."""

    @nn.compact
    def __call__(
        self, x: Array, mask: attention.Mask | None, bias: Array | None, tokens: TokenInfo
    ) -> Array:
        """[B, L, D] -> [B, L, D]; mask and bias are those of `attention.prepare_mask_and_bias`."""
        h = self.norm("pre_attention_layer_norm")(x)
        h = self.attention("attention")(h, h, mask, bias, tokens_q=tokens, tokens_kv=tokens)
        return self.add_mlp(self.add_residual(x, h, tokens), tokens)


class DecoderLayer(_Block):
    """Causal self-attention, cross-attention to the encoder's output, and MLP."""

    is_causal: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        encoded: Array,
        self_mask_and_bias: tuple[attention.Mask | None, Array | None],
        cross_mask_and_bias: tuple[attention.Mask | None, Array | None],
        tokens: TokenInfo,
        encoded_tokens: TokenInfo,
        decode: bool,
    ) -> Array:
        """x [B·C, L, D], encoded [B, Le, D] -> [B·C, L, D]; for C see `Transformer.decode`."""
        h = self.norm("pre_self_attention_layer_norm")(x)
        h = self.attention("self_attention")(
            h, h, *self_mask_and_bias, tokens_q=tokens, tokens_kv=tokens, decode=decode
        )
        x = self.add_residual(x, h, tokens)
        h = self.norm("pre_cross_attention_layer_norm")(x)
        h = self.attention("encoder_decoder_attention")(
            h,
            encoded,
            *cross_mask_and_bias,
            tokens_q=tokens,
            tokens_kv=encoded_tokens,
            decode=decode,
        )
        return self.add_mlp(self.add_residual(x, h, tokens), tokens)


def _make_layer(
    layer: type[_Block],
    config: T5Config,
    adapters: Adapters,
    sparse: Sparse | None,
    index: int,
    **options: PyTree,
) -> nn.Module:
    """Returns layer `index` of a stack; `options` are Linen's, such as the layer's `name`."""
    is_sparse = sparse is not None and sparse.is_sparse(index)
    return layer(config, adapters, sparse if is_sparse else None, **options)


class Encoder(nn.Module):
    """The encoder stack."""

    config: T5Config
    adapters: Adapters = Adapters()
    sparse: Sparse | None = None

    @nn.compact
    def __call__(self, embedded: Array, mask: attention.SegmentMask, tokens: TokenInfo) -> Array:
        """Embedded tokens [B, L, D] -> [B, L, D]."""
        cfg, length = self.config, embedded.shape[1]
        dropout = layers.row_dropout(cfg.dropout_rate, tokens)
        x = dropout(embedded)
        biases = layers.RelativePositionBiases(cfg.num_heads, cfg.dtype, name="relpos_bias")
        bias = biases(length, length, bidirectional=True)
        # All layers share the position biases and the mask, so these are prepared once.
        mask_and_bias = attention.prepare_mask_and_bias(cfg.attention, mask, bias)
        x = stacks.apply_layers(
            self,
            functools.partial(_make_layer, EncoderLayer, cfg, self.adapters, self.sparse),
            cfg.num_encoder_layers,
            lambda layer, x: layer(x, *mask_and_bias, tokens),
            x,
            scan=cfg.scan_layers,
            remat_policy=cfg.remat_policy,
            period=layer_period(self.sparse),
        )
        if not cfg.broadcast_encoder_dropout:
            dropout = nn.Dropout(cfg.dropout_rate, deterministic=tokens.deterministic)
        return dropout(layers.LayerNorm(cfg.dtype, name="encoder_norm")(x))


class Decoder(nn.Module):
    """The decoder stack and the logits layer."""

    config: T5Config
    adapters: Adapters = Adapters()
    sparse: Sparse | None = None

    @nn.compact
    def __call__(
        self,
        embedded: Array,
        encoded: Array,
        decoder_mask: attention.SegmentMask | None,
        cross_mask: attention.SegmentMask,
        tokens: TokenInfo,
        encoded_tokens: TokenInfo,
        decode: bool,
        max_decode_length: int | None,
        return_hidden: bool,
        embedding: Array | None = None,
    ) -> Array:
        """Embedded tokens [B·C, L, D], encoded [B, Le, D] -> logits [B·C, L, V], float32.

        With `return_hidden`, returns the input of the logits layer, float32 [B·C, L, D].
        `embedding` [V, D] is the matrix of the logits layer if it is tied to the embedding.
        """
        cfg, length = self.config, embedded.shape[1]
        if decode and max_decode_length:
            # A step has one token, but its position is known only when the program runs. So the
            # bias is computed for the whole cache, and attention takes the row of the position.
            length = max_decode_length
        dropout = layers.row_dropout(cfg.dropout_rate, tokens)
        x = dropout(embedded)
        biases = layers.RelativePositionBiases(cfg.num_heads, cfg.dtype, name="relpos_bias")
        bias = biases(length, length, bidirectional=False)
        self_mask_and_bias = attention.prepare_mask_and_bias(cfg.attention, decoder_mask, bias)
        cross_mask_and_bias = attention.prepare_mask_and_bias(cfg.attention, cross_mask, None)
        x = stacks.apply_layers(
            self,
            functools.partial(_make_layer, DecoderLayer, cfg, self.adapters, self.sparse),
            cfg.num_decoder_layers,
            lambda layer, x: layer(
                x, encoded, self_mask_and_bias, cross_mask_and_bias, tokens, encoded_tokens, decode
            ),
            x,
            scan=cfg.scan_layers and not decode,  # each layer has a cache, which a scan lacks
            remat_policy="none" if decode else cfg.remat_policy,  # decoding has no backward pass
            period=layer_period(self.sparse),
        )
        x = dropout(layers.LayerNorm(cfg.dtype, name="decoder_norm")(x))
        # Logits are float32 even for bfloat16 activations, as in T5X.
        x = x.astype(jnp.float32)
        if cfg.logits_via_embedding:
            x *= cfg.emb_dim**-0.5
        if return_hidden:
            return x
        if cfg.logits_via_embedding:
            assert embedding is not None
            return x @ embedding.astype(jnp.float32).T
        return layers.Dense(cfg.vocab_size, ("embed", "vocab"), jnp.float32, name="logits_dense")(x)


class Transformer(nn.Module):
    """T5 v1.1 with adapters; `encode`, `decode` and `__call__` have the signatures of T5X.

    The parameter tree is that of T5X's minimal T5. Adapters only add `<site>_adapter/...` next to
    the parameters of a site. Token 0 is padding.

    Attributes:
      config: dimensions.
      adapters: adapter factories by site.
      sparse: which MLPs are mixtures of whole feed-forward experts; None: no MLP is.
    """

    config: T5Config
    adapters: Adapters = Adapters()
    sparse: Sparse | None = None

    def setup(self) -> None:
        _check_depths(self)
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, dtype=cfg.dtype)
        self.encoder = Encoder(cfg, self.adapters, self.sparse)
        self.decoder = Decoder(cfg, self.adapters, self.sparse)

    def encode(
        self,
        encoder_input_tokens: Array,
        encoder_segment_ids: Array | None = None,
        enable_dropout: bool = True,
        sentence_embeddings: Array | None = None,
    ) -> Array:
        """Token ids [B, L] -> [B, L, D]; `sentence_embeddings` [B, S] are for routers."""
        is_token = encoder_input_tokens > 0
        segment_ids = _segment_ids(is_token, encoder_segment_ids)
        mask = attention.SegmentMask(segment_ids, segment_ids)
        embedded = self.token_embedder(encoder_input_tokens)
        tokens = TokenInfo(is_token, sentence_embeddings, not enable_dropout)
        return self.encoder(embedded, mask, tokens)

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
        """Returns the decoder's logits [B·C, L, V], float32.

        C is 1, or the number of answer choices or beams of each input: rows b·C to b·C + C - 1 of
        the decoder attend to row b of `encoded`.

        Args:
          encoded: [B, Le, D] from `encode`.
          encoder_input_tokens: [B, Le], for the padding mask.
          decoder_input_tokens: [B·C, L], targets shifted right; [B·C, 1] in a decoding step.
          decoder_target_tokens: [B·C, L], for the padding mask; ignored in a decoding step.
          encoder_segment_ids, decoder_segment_ids: segments of packed rows (C = 1).
          decoder_positions: ignored, since positions are relative. T5X passes this argument.
          decode: whether this is a decoding step of one token, with the collection `cache` and, if
            the caller makes it mutable, `cross_cache`. The first call, of the cache's length,
            creates the collections.
          max_decode_length: length of the cache in a decoding step.
          sentence_embeddings: [B, S], for routers that read them.
          return_hidden: whether to return the input of the logits layer, float32 [B·C, L, D],
            instead of the logits. `cross_entropy.chunked_cross_entropy` takes it together with
            `logits_kernel`.
        """
        del decoder_positions
        is_encoder_token = encoder_input_tokens > 0
        if decoder_segment_ids is None:
            encoder_segment_ids = None  # a row that is not packed attends to its whole input
        key_segment_ids = _segment_ids(is_encoder_token, encoder_segment_ids)
        query_segment_ids = None if encoder_segment_ids is None else decoder_segment_ids
        cross_mask = attention.SegmentMask(query_segment_ids, key_segment_ids)
        decoder_mask = is_decoder_token = None
        if not decode:
            is_decoder_token = decoder_target_tokens > 0
            segment_ids = _segment_ids(is_decoder_token, decoder_segment_ids)
            decoder_mask = attention.SegmentMask(segment_ids, segment_ids, causal=True)
        embedded = self.token_embedder(decoder_input_tokens)
        encoded_tokens = TokenInfo(is_encoder_token, sentence_embeddings, not enable_dropout)
        if sentence_embeddings is not None:  # [B, S] -> [B·C, S]
            num_choices = embedded.shape[0] // sentence_embeddings.shape[0]
            sentence_embeddings = jnp.repeat(sentence_embeddings, num_choices, axis=0)
        return self.decoder(
            embedded,
            encoded,
            decoder_mask,
            cross_mask,
            TokenInfo(is_decoder_token, sentence_embeddings, not enable_dropout),
            encoded_tokens,
            decode,
            max_decode_length,
            return_hidden,
            self.token_embedder.embedding if self.config.logits_via_embedding else None,
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
        """Returns logits [B, L, V], float32; the arguments are those of `encode` and `decode`."""
        del encoder_positions  # positions are relative
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


def _segment_ids(is_token: Array, segment_ids: Array | None) -> Array:
    """Returns segments int32 [B, L] for `attention.SegmentMask`: 0 at padding, 1 if not packed."""
    return jnp.where(is_token, 1 if segment_ids is None else segment_ids, 0).astype(jnp.int32)


def logits_kernel(params: Params) -> Array:
    """Returns the matrix [D, V] of the logits layer: its kernel, or the transposed embedding."""
    if "logits_dense" in params["decoder"]:
        return params["decoder"]["logits_dense"]["kernel"]
    return params["token_embedder"]["embedding"].T


def init_params(
    model: Transformer,
    seed: int,
    predicate: Callable[[str], bool],
    transform: params_lib.Transform = params_lib.identity,
) -> dict[str, PyTree]:
    """Draws the float32 parameters whose path satisfies the predicate; see `params.initialize`.

    A parameter depends only on its path and the seed, so the base model is the same with and
    without adapters.
    """
    specs = {path: spec for path, spec in _trace(model)[1].items() if predicate(path)}
    return params_lib.initialize(specs, seed, transform)


def param_shapes(
    model: Transformer, predicate: Callable[[str], bool] = lambda _: True
) -> dict[str, PyTree]:
    """Returns the parameters whose path satisfies the predicate, as `jax.ShapeDtypeStruct`.

    Raises:
      InputError: the number of layers of a stack is not a multiple of SPARSE_STEP.
    """
    return params_lib.select(_trace(model)[0], predicate)


def param_axes(model: Transformer) -> dict[str, tuple[str, ...]]:
    """Returns path -> logical axis names of each parameter, such as ('embed', 'joined_kv')."""
    return {path: spec.axes for path, spec in _trace(model)[1].items()}


def stack_layers(
    model: Transformer, params: Params, stack: Callable[[list[PyTree]], PyTree]
) -> dict[str, PyTree]:
    """Stacks parameters, or a part of them such as the frozen ones, for a model with `scan_layers`.

    Args:
      model: the network.
      params: parameters with one subtree per layer.
      stack: `stacks.stack_and_delete` or `stacks.stack_abstract`.
    """
    depths = _depths(model)
    period = layer_period(model.sparse)
    return stacks.stack_layers(params, lambda prefix: depths[prefix.rstrip("/")], stack, period)


def _depths(model: Transformer) -> dict[str, int]:
    config = model.config
    return {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}


def _check_depths(model: Transformer) -> None:
    # Checked when the model is used and not when it is created: a model is created with the depths
    # of a gin file, and a base checkpoint may then replace them.
    period = layer_period(model.sparse)
    for stack, depth in _depths(model).items():
        if depth % period:
            raise InputError(
                f"SPARSE_STEP must divide the {depth} layers of the {stack}, got {period}"
            )


def _trace(model: Transformer) -> tuple[dict[str, PyTree], dict[str, ParamSpec]]:
    """Returns (tree of the parameters' shapes, path -> spec); uses no device."""
    # A run calls this function five times, so the result is stored on the model object. A cache by
    # equality of models would be wrong: gin may bind other values to a configurable later, and a
    # partial of it still compares equal.
    attributes = vars(model)
    if "_traced_params" in attributes:
        return attributes["_traced_params"]
    _check_depths(model)
    # The dense layers of a stack differ only in their names, and so do the sparse layers. So one
    # layer of each kind is traced, and its parameters are repeated: T5-XXL takes 0.1 s, not 2 s.
    # With a step of 2, layer 0 is dense and layer 1 is sparse.
    sparse = model.sparse
    if sparse is not None and sparse.sparse_step > 2:
        sparse = dataclasses.replace(sparse, sparse_step=2)
    period = layer_period(sparse)
    shallow = dataclasses.replace(
        model.config, num_encoder_layers=period, num_decoder_layers=period
    )
    init = model.clone(config=shallow, sparse=sparse).init
    init = functools.partial(init, enable_dropout=False)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    sentence_dim = model.config.sentence_dim or model.config.emb_dim
    sentence = jax.ShapeDtypeStruct((1, sentence_dim), jnp.float32)
    with params_lib.record_specs() as specs:
        shapes = jax.eval_shape(
            lambda ids, sentences: init(
                jax.random.key(0), ids, ids, ids, sentence_embeddings=sentences
            ),
            tokens,
            sentence,
        )
    tree = params_lib.unflatten(_repeat(params_lib.flatten(shapes["params"]), model))
    attributes["_traced_params"] = tree, _repeat(specs, model)
    return attributes["_traced_params"]


def layer_period(sparse: Sparse | None) -> int:
    """Returns the number of layers after which the layers of a stack repeat."""
    return 1 if sparse is None else sparse.sparse_step


def _repeat(values: Mapping[str, _T], model: Transformer) -> dict[str, _T]:
    """Copies the values of '<stack>/layers_<i>/…' to all layers of the same kind.

    Layer 0 is the traced dense layer and layer 1 the traced sparse one. If all layers are alike
    (their period is 1), layer 0 is the only one that was traced.
    """
    repeated: dict[str, _T] = {}
    depths, period = _depths(model), layer_period(model.sparse)
    for path, value in values.items():
        match = re.fullmatch(r"(\w+)/layers_(\d+)/(.*)", path)
        if match is None:
            repeated[path] = value
            continue
        stack, traced_index, rest = match[1], int(match[2]), match[3]
        for i in range(depths[stack]):
            is_last_of_period = i % period == period - 1  # a sparse layer, if the period is above 1
            if traced_index == int(period > 1 and is_last_of_period):
                repeated[f"{stack}/layers_{i}/{rest}"] = value
    return repeated
