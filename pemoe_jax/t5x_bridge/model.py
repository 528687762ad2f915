"""The network as T5X's encoder-decoder model, with a frozen base and the routers' losses."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax.core import freeze
from flax.linen import partitioning as nn_partitioning
from t5x import losses, models
from t5x import metrics as t5x_metrics

from pemoe_jax.core import adapters, network, routing, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError, check_choice
from pemoe_jax.core.params import Params, PyTree

if TYPE_CHECKING:
    import seqio
    from t5x import optimizers

Batch: TypeAlias = Mapping[str, jax.Array]


class EncoderDecoderModel(models.EncoderDecoderModel):
    """T5X's model, with the routers' losses in its loss and no gradients of frozen parameters.

    Args:
      module: the network.
      input_vocabulary, output_vocabulary: seqio vocabularies.
      optimizer_def: the optimizer; None for evaluation and inference.
      trainable: patterns of the trainable parameters; each must match a parameter.
      seed: seed of the initial parameters, which are those of `pemoe train`.
      router_metrics: the routers' metrics to log: 'sites' (means over the layers for each site),
        'layers' (each router), or None.
      settings: further arguments of T5X's model: z_loss, label_smoothing,
        loss_normalizing_factor, decode_fn, default_decoder_params, feature_converter_cls.

    Raises:
      InputError: `router_metrics` is unknown, a router reads sentence embeddings, which T5X's
        batches do not contain, or the vocabulary has more ids than the network.
    """

    def __init__(
        self,
        module: network.Transformer,
        input_vocabulary: "seqio.Vocabulary",
        output_vocabulary: "seqio.Vocabulary",
        optimizer_def: "optimizers.OptimizerDef | None" = None,
        trainable: Sequence[str] = (".*",),
        seed: int = 0,
        router_metrics: str | None = "sites",
        **settings: Any,
    ) -> None:
        check_choice("ROUTER_METRICS", router_metrics, (*routing.DETAIL_LEVELS, None))
        for site, record in adapters.describe(module.adapters).items():
            router = record.get("router")
            if router is not None and router["reads"] == "sentence":
                raise InputError(
                    f"the router at {site} reads sentence embeddings, which T5X's batches do not"
                    " contain: choose another routing file, or train with pemoe train"
                )
        num_ids = output_vocabulary.vocab_size
        if num_ids > module.config.vocab_size:
            raise InputError(
                f"T5Config.vocab_size must be at least {num_ids}, the size of the vocabulary with"
                f" sentinels, got {module.config.vocab_size}"
            )
        self.trainable = tuple([trainable] if isinstance(trainable, str) else trainable)
        self.seed, self._router_metrics = seed, router_metrics
        super().__init__(module, input_vocabulary, output_vocabulary, optimizer_def, **settings)

    @functools.cached_property
    def trainable_paths(self) -> set[str]:
        """Paths of the trainable parameters."""
        shapes = params_lib.flatten(network.param_shapes(self.module))
        return params_lib.trainable_paths(shapes, self.trainable)

    def get_initial_variables(
        self, rng: object, input_shapes: object, input_types: object = None
    ) -> PyTree:
        """Returns the initial `params` and their axis names; the arguments are ignored."""
        del rng, input_shapes, input_types
        params = network.init_params(self.module, self.seed, lambda _: True, self._cast_frozen)
        axes = {
            f"{path}_axes": nn_partitioning.AxisMetadata(names=names)
            for path, names in network.param_axes(self.module).items()
        }
        return freeze({"params": params, "params_axes": params_lib.unflatten(axes)})

    def _cast_frozen(self, path: str, leaf: jax.Array) -> jax.Array:
        # Frozen parameters are in the activation dtype, as in `pemoe train`.
        if path in self.trainable_paths:
            return leaf
        return leaf.astype(params_lib.frozen_dtype(path, self.module.config.dtype))

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, PyTree]:
        """Returns the sum of T5X's loss and the routers' losses, and the metrics.

        The routers' losses are those of `pemoe train`: `routing.total_aux_loss`, added to the mean
        loss of a token.

        Args:
          params: all parameters.
          batch: arrays [B, L] under T5X's names.
          dropout_rng: None for no dropout.
        """
        logits, collections = self._compute_logits(
            self._stop_frozen_gradients(params), batch, dropout_rng, mutable=["routers"]
        )
        targets = batch["decoder_target_tokens"]
        factor, weights = losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        loss, z_loss, weight_sum = losses.compute_weighted_cross_entropy(
            logits,
            targets=targets,
            weights=weights,
            label_smoothing=self._label_smoothing,
            z_loss=self._z_loss,
            loss_normalizing_factor=factor,
        )
        metrics = self._compute_metrics(
            logits=logits,
            targets=targets,
            mask=weights,
            loss=loss,
            z_loss=z_loss,
            segment_ids=_segments(batch),
        )
        sown = collections.get("routers", {})
        statistics = routing.sown_by_router(sown, "statistics")
        if statistics:
            routers = jnp.stack([*statistics.values()])
            aux_losses = routers[:, routing.STATISTICS.index("aux_loss")]
            # T5X's loss is the sum over tokens divided by the factor, not the mean over tokens. The
            # same scale keeps the ratio of the two losses.
            aux_loss = routing.total_aux_loss([*statistics], aux_losses)
            loss += aux_loss * weight_sum / (1.0 if factor is None else factor)
            # T5X's metrics were computed above, without the routers' losses.
            metrics["loss"] = t5x_metrics.AveragePerStep(total=loss)
            if self._router_metrics is not None:
                rows = {"routers": routers}
                if dispatch := routing.sown_by_router(sown, "dispatch"):
                    rows["dispatch"] = jnp.stack([*dispatch.values()])
                metrics |= _router_metrics([*statistics], rows, self._router_metrics)
        return loss, metrics

    def _stop_frozen_gradients(self, params: Params) -> dict[str, PyTree]:
        # T5X differentiates with respect to all parameters. The gradients of frozen ones are then
        # constants, zero, which XLA does not compute.
        return params_lib.unflatten(
            {
                path: leaf if path in self.trainable_paths else jax.lax.stop_gradient(leaf)
                for path, leaf in params_lib.flatten(params).items()
            }
        )


def _segments(batch: Batch) -> dict[str, jax.Array]:
    """Returns the segment ids by which T5X's metrics count examples and padding.

    A row of an unpacked batch is one segment: its tokens are True, and its padding False.
    """
    suffix = "_segment_ids"
    packed = {n.removesuffix(suffix): ids for n, ids in batch.items() if n.endswith(suffix)}
    unpacked = ("encoder_input_tokens", "decoder_target_tokens")
    return packed or {name: batch[name] != 0 for name in unpacked}


def _router_metrics(
    paths: Sequence[str], rows: Mapping[str, jax.Array], detail: str
) -> dict[str, clu_metrics.Metric]:
    """Returns the metrics of `steps.summarize_routers`, with `router/` in front of their names."""
    # Not T5X's AveragePerStep, which would add up the values of a step's microbatches.
    return {
        f"router/{name}": clu_metrics.Average(total=value, count=jnp.ones(()))
        for name, value in steps.summarize_routers(paths, rows, detail).items()
    }
