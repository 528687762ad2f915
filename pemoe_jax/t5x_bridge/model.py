"""Our network under T5X's encoder-decoder model: a frozen base, and the routers' losses."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax.core import freeze
from flax.linen import partitioning as nn_partitioning
from t5x import losses, models
from t5x import metrics as t5x_metrics

from pemoe_jax.core import adapters, network, routing
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

Batch = Mapping[str, Any]


class EncoderDecoderModel(models.EncoderDecoderModel):
    """T5X's model, whose loss counts the routers' and forms no gradient of what is frozen.

    Args:
      module: our network.
      input_vocabulary, output_vocabulary: of seqio.
      optimizer_def: None where nothing is trained.
      trainable: patterns of the parameters that train; each must match something.
      seed: of the initial parameters, each drawn by its path as our own runner draws it.
      router_metrics: what is told of the routers: 'sites' (each site, over the layers), 'layers'
        (each router), None (nothing).
      settings: further arguments of T5X's model: z_loss, label_smoothing,
        loss_normalizing_factor, decode_fn, default_decoder_params, feature_converter_cls.

    Raises:
      InputError: a router reads sentence embeddings, which T5X's batches do not hold, or the
        vocabulary has more ids than the network.
    """

    def __init__(
        self,
        module: network.Transformer,
        input_vocabulary: Any,
        output_vocabulary: Any,
        optimizer_def: Any = None,
        trainable: Sequence[str] = (".*",),
        seed: int = 0,
        router_metrics: str | None = "sites",
        **settings: Any,
    ) -> None:
        if router_metrics not in (None, *routing.DETAIL_LEVELS):
            raise InputError(
                f"ROUTER_METRICS: expected 'sites', 'layers' or None, found {router_metrics!r}"
            )
        described = adapters.describe(module.adapters)
        readers = [site for site, one in described.items() if _reads_sentences(one)]
        if readers:
            raise InputError(
                f"the router at {readers[0]} reads sentence embeddings, which T5X's batches do not"
                " hold: expected another routing file, or pemoe train"
            )
        ids = output_vocabulary.vocab_size
        if ids > module.config.vocab_size:
            raise InputError(
                f"the vocabulary has {ids} ids, sentinels included, but the model's"
                f" T5Config.vocab_size is {module.config.vocab_size}"
            )
        self.trainable = tuple([trainable] if isinstance(trainable, str) else trainable)
        self.seed = seed
        self._router_metrics = router_metrics
        super().__init__(
            module=module,
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            **settings,
        )

    @functools.cached_property
    def trainable_paths(self) -> set[str]:
        """Of the parameters that train."""
        return params_lib.trainable_paths(
            params_lib.flatten(network.param_shapes(self.module)), self.trainable
        )

    def get_initial_variables(
        self, rng: Any, input_shapes: Mapping[str, Any], input_types: Any = None
    ) -> Any:
        """`params` and the names of their axes; neither the key nor the shapes matter.

        Frozen parameters are kept in the activation dtype, as our own runner keeps them.
        """
        del rng, input_shapes, input_types
        drawn = {
            path: leaf if path in self.trainable_paths else self._kept(path, leaf)
            for path, leaf in params_lib.flatten(
                network.init_params(self.module, self.seed, lambda _: True)
            ).items()
        }
        axes = {
            f"{path}_axes": nn_partitioning.AxisMetadata(names=names)
            for path, names in network.param_axes(self.module).items()
        }
        return freeze(
            {"params": params_lib.unflatten(drawn), "params_axes": params_lib.unflatten(axes)}
        )

    def _kept(self, path: str, leaf: jax.Array) -> jax.Array:
        return leaf.astype(params_lib.frozen_dtype(path, self.module.config.dtype))

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: Any) -> tuple[jax.Array, Any]:
        """T5X's loss and the routers', (a scalar, its metrics and `router/…`).

        As in our own runner the routers' losses, a mean over routers, count as a token's loss does.

        Args:
          params: all parameters.
          batch: arrays [B, L] in T5X's names.
          dropout_rng: None for no dropout.
        """
        logits, told = self._compute_logits(
            self._stopped(params), batch, dropout_rng, mutable=["routers"]
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
        routers = params_lib.flatten(told.get("routers", {}))
        if routers:
            statistics = jnp.stack([statistic for _, (statistic,) in sorted(routers.items())])
            objective = statistics[:, routing.STATISTICS.index("objective")]
            loss += jnp.mean(objective) * weight_sum / (1.0 if factor is None else factor)
            metrics["loss"] = t5x_metrics.AveragePerStep(total=loss)
            if self._router_metrics is not None:
                paths = [path.removesuffix("/statistics") for path in sorted(routers)]
                metrics |= _router_metrics(paths, statistics, self._router_metrics)
        return loss, metrics

    def _stopped(self, params: Any) -> Any:
        """The parameters, frozen ones cut off, so that XLA forms no gradient of them."""
        return params_lib.unflatten(
            {
                path: leaf if path in self.trainable_paths else jax.lax.stop_gradient(leaf)
                for path, leaf in params_lib.flatten(params).items()
            }
        )


def _reads_sentences(described: Mapping[str, Any]) -> bool:
    router = described.get("router")
    return router is not None and router["reads"] == "sentence"


def _segments(batch: Batch) -> dict[str, Any]:
    """What T5X counts examples and padding by: segments of packed rows, else which tokens are."""
    end = "_segment_ids"
    packed = {name.removesuffix(end): ids for name, ids in batch.items() if name.endswith(end)}
    unpacked = ("encoder_input_tokens", "decoder_target_tokens")
    return packed or {name: batch[name] != 0 for name in unpacked}


def _router_metrics(paths: Sequence[str], told: jax.Array, detail: str) -> dict[str, Any]:
    """`routing.summarize_statistics` of traced statistics [routers, 6], under `router/`.

    They are means over steps and microbatches (T5X divides its AveragePerStep by steps alone).
    """
    rows: dict[str, list[int]] = {"": list(range(len(paths)))}
    for number, path in enumerate(paths):
        name = path.removesuffix("_adapter") if detail == "layers" else routing.site_name(path)
        rows.setdefault(name, []).append(number)
    found = {}
    for name, members in rows.items():
        part = told[jnp.array(members)]
        for column, statistic in enumerate(routing.STATISTICS):
            if name and statistic == "objective":
                continue
            of = jnp.max if statistic == "load" else jnp.mean
            key = "/".join(filter(None, ("router", name, statistic)))
            found[key] = clu_metrics.Average(total=of(part[:, column]), count=jnp.ones(()))
    return found
