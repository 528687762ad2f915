"""Sentence encoders for `pemoe embed`: T5's encoder with mean pooling, and users' functions.

Shapes: `B` batch, `L` length, `D` embed, `S` size of the embedding, `N` inputs.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from pemoe_jax.core.errors import InputError, first_line

if TYPE_CHECKING:
    import jax

    from pemoe_jax.core import network
    from pemoe_jax.core.params import Params
    from pemoe_jax.data.sentence_table import EncoderInfo

# The vector of this text identifies an encoder that has no fingerprint. Tables record the vector,
# so the text must not change.
_PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind."


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """An input to embed.

    Attributes:
      ids: token ids as the model reads them, truncated and with EOS: int32 [L].
      text: the text before tokenization; None if the encoder does not read it.
    """

    ids: np.ndarray
    text: str | None


@runtime_checkable
class Encoder(Protocol):
    """A sentence encoder."""

    reads_text: bool  # whether the encoder reads `EncoderInput.text`, and not its ids

    def describe(self) -> "EncoderInfo":
        """Returns name, dim, and fingerprint or probe, see `sentence_table.is_same_encoder`."""

    def encode(self, inputs: Sequence[EncoderInput], batch_size: int) -> np.ndarray:
        """Returns the embeddings of inputs, in their order: [N, S]."""


@dataclasses.dataclass
class MeanPooledEncoder:
    """Averages the outputs of a base model's encoder over an input's tokens: float32 [N, D].

    Attributes:
      model: dimensions and activation dtype; its adapters are not used.
      base_path: the base model; None: random weights.
      seed: seed of random weights.
    """

    model: "network.Transformer"
    base_path: str | None
    seed: int = 0
    reads_text = False

    def describe(self) -> "EncoderInfo":
        """See `Encoder`; the fingerprint is the base model's, whatever its dtype."""
        dim, fingerprint = self.model.config.emb_dim, self._loaded[-1]
        return {"name": "mean_pooled", "dim": dim, "fingerprint": fingerprint}

    # Loaded at the first use, because gin creates the encoder before other settings are checked.
    @functools.cached_property
    def _loaded(self) -> "tuple[jax.sharding.Mesh, Params, object]":
        """The mesh, the parameters of the encoder, and the fingerprint of the base model."""
        from pemoe_jax.checkpoints import models
        from pemoe_jax.core import params, partitioning

        mesh = partitioning.make_mesh()
        sharding = partitioning.replicated_sharding(mesh)
        # The fingerprint is that of the whole base, so the decoder is read too, and then dropped.
        base, identity = models.load_base(self.model, self.base_path, self.seed, shardings=sharding)
        without_decoder = params.select(base, lambda path: not path.startswith("decoder/"))
        return mesh, without_decoder, identity["fingerprint"]

    @functools.cached_property
    def _pool(self) -> "Callable[[Params, jax.Array], jax.Array]":
        """The jitted function of (params, int32 [B, L]) that returns float32 [B, D]."""
        import jax
        import jax.numpy as jnp

        def pool(params: "Params", tokens: jax.Array) -> jax.Array:
            model, variables = self.model, {"params": params}
            encoded = model.apply(variables, tokens, enable_dropout=False, method=model.encode)
            assert isinstance(encoded, jax.Array)
            mask = (tokens > 0).astype(jnp.float32)[..., None]
            # In float32: a bfloat16 sum over hundreds of tokens has only two or three digits.
            total = jnp.sum(encoded.astype(jnp.float32) * mask, axis=1)
            return total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)  # zeros for rows of padding

        return jax.jit(pool)

    def encode(self, inputs: Sequence[EncoderInput], batch_size: int) -> np.ndarray:
        """See `Encoder`; batches of short inputs have more than `batch_size` rows."""
        from pemoe_jax.core import partitioning
        from pemoe_jax.data import inference_batches, prefetch

        mesh, params, _ = self._loaded

        def pool(tokens: np.ndarray) -> "jax.Array":
            batch = partitioning.shard_batch({"tokens": tokens}, mesh)
            return self._pool(params, batch["tokens"])

        ids = [item.ids for item in inputs]
        batches = inference_batches.encoder_batches(
            ids, batch_size, partitioning.data_parallelism(mesh)
        )
        results = ((pool(tokens), indices) for tokens, indices in batches)
        vectors = np.zeros((len(inputs), self.model.config.emb_dim), np.float32)
        for pooled, indices in prefetch.keep_in_flight(results):
            vectors[indices] = np.asarray(pooled)[: len(indices)]
        return vectors


def mean_pooled(
    model: "network.Transformer | None" = None, initial_checkpoint_path: str | None = None
) -> MeanPooledEncoder:
    """Returns T5's encoder with mean pooling, which loads the base model at its first use.

    Args:
      model: MODEL of a model file.
      initial_checkpoint_path: the base model.

    Raises:
      InputError: one of them is not set.
    """
    if model is None:
        raise InputError("MODEL is not set: pass --gin_file=models/… before the run file")
    if initial_checkpoint_path is None:
        raise InputError(
            "INITIAL_CHECKPOINT_PATH is not set: pass --gin.INITIAL_CHECKPOINT_PATH=… with the base"
            " model whose encoder computes the embeddings, or another SENTENCE_ENCODER"
        )
    return MeanPooledEncoder(model, initial_checkpoint_path)


@dataclasses.dataclass
class TextEncoder:
    """A user's function from a list of texts to an array [N, S], as an encoder.

    The function's attributes `name` and `fingerprint` identify it. If one of them is not a string,
    the function's dotted name, or its vector for a fixed sentence, stands in for it.
    """

    function: Callable[[list[str]], ArrayLike]
    reads_text = True

    def describe(self) -> "EncoderInfo":
        """See `Encoder`; raises InputError unless the function returns vectors."""
        vector = self._call([_PROBE_TEXT])[0]
        name = getattr(self.function, "name", None)
        if not isinstance(name, str):
            # A callable object has no dotted name, but its class has.
            is_named = hasattr(self.function, "__qualname__")
            definition = self.function if is_named else type(self.function)
            name = f"{definition.__module__}.{definition.__qualname__}"
        info = {"name": name, "dim": len(vector)}
        fingerprint = getattr(self.function, "fingerprint", None)
        if isinstance(fingerprint, str):
            return {**info, "fingerprint": fingerprint}
        # `sentence_table.is_same_encoder` compares probes with an absolute tolerance: scaled to a
        # root mean square of 1, all encoders are compared alike. 16 values tell encoders apart.
        scale = max(float(np.sqrt(np.mean(np.square(vector)))), 1e-30)
        return {**info, "probe": [round(float(x), 4) for x in vector[:16] / scale]}

    def encode(self, inputs: Sequence[EncoderInput], batch_size: int) -> np.ndarray:
        """See `Encoder`; texts of similar length share a batch."""
        order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index].ids))
        texts = [inputs[index].text or "" for index in order]
        starts = range(0, len(texts), batch_size)
        vectors = np.concatenate([self._call(texts[n : n + batch_size]) for n in starts])
        return vectors[np.argsort(order)]  # the inverse of `order`

    def _call(self, texts: list[str]) -> np.ndarray:
        """Returns the function's vectors, float32 [N, S]; InputError if it returns others."""
        try:
            vectors = np.asarray(self.function(texts), np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                "SENTENCE_ENCODER must be a function from a list of texts to an array [N, S]:"
                f" {first_line(error)}"
            ) from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
            raise InputError(
                f"SENTENCE_ENCODER must return an array of shape ({len(texts)}, S) for"
                f" {len(texts)} texts, got {vectors.shape}"
            )
        return vectors


def resolve_encoder(encoder: object) -> Encoder:
    """Returns the encoder for a value of SENTENCE_ENCODER.

    Args:
      encoder: an `Encoder`, a function from a list of texts to an array, or its dotted name.

    Raises:
      InputError: it is none of these, or its base model cannot be opened.
    """
    if isinstance(encoder, MeanPooledEncoder) and encoder.base_path is not None:
        from pemoe_jax.checkpoints import base_model
        from pemoe_jax.core import sparse

        # The base is opened here, and loaded later, so that a wrong path fails before the tasks are
        # registered. Model files do not state a sparse base's experts: they come from the base.
        base = base_model.open_base(encoder.base_path)
        if encoder.model.sparse is None and base.sparse is not None:
            model = encoder.model.clone(sparse=sparse.from_description(base.sparse))
            encoder = dataclasses.replace(encoder, model=model)
    if isinstance(encoder, str):
        module, _, name = encoder.replace(":", ".").rpartition(".")
        try:
            encoder = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(
                f"SENTENCE_ENCODER must be a dotted name 'module.function', got {encoder!r}:"
                f" {error}"
            ) from error
    if isinstance(encoder, Encoder):
        return encoder
    if not callable(encoder):
        raise InputError(
            "SENTENCE_ENCODER must be @embed.mean_pooled() or a function of texts, got"
            f" {encoder!r:.80}"
        )
    return TextEncoder(encoder)
