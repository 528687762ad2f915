"""The loss, and the train, eval and score steps over batches of numpy arrays.

Gradients are taken with respect to the trainable parameters alone: the frozen ones are an argument
of their own, so no gradient of them is ever formed. Source of loss and normalisation: T5X.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pemoe_jax.core import cross_entropy, network, routing
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

Array = jax.Array
Batch = Mapping[str, Any]
Metrics = dict[str, Array]

NORMALIZERS = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


@flax.struct.dataclass
class TrainState:
    """What a run changes: the step, the trainable parameters, the optimiser's state."""

    step: Array
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


@dataclasses.dataclass(frozen=True)
class Loss:
    """Settings of the loss, under T5X's names.

    Attributes:
      z_loss: coefficient of log(Z)², which keeps the logits' normaliser near 1.
      label_smoothing: share of the target's mass spread over the other V - 1 tokens.
      loss_normalizing_factor: what the summed loss is divided by: None (nothing: a sum), a number,
        NUM_REAL_TARGET_TOKENS, NUM_TOTAL_TARGET_TOKENS (padding counted) or AVERAGE_PER_SEQUENCE
        (the mean over a sequence's tokens, then over sequences, packed ones told apart).
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    loss_normalizing_factor: float | str | None = "NUM_REAL_TARGET_TOKENS"

    def __post_init__(self) -> None:
        factor = self.loss_normalizing_factor
        if isinstance(factor, str) and factor not in NORMALIZERS:
            raise InputError(
                f"LOSS_NORMALIZING_FACTOR: expected None, a number or one of {NORMALIZERS},"
                f" found {factor!r}"
            )


def _token_weights(batch: Batch) -> Array:
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] > 0
    return jnp.asarray(weights, jnp.float32)


def weights_and_normalizer(batch: Batch, factor: float | str | None) -> tuple[Array, Array]:
    """Token weights [B, L] and the number that their weighted sum of losses is divided by."""
    weights = _token_weights(batch)
    if factor is None:
        return weights, jnp.ones(())
    if not isinstance(factor, str):
        return weights, jnp.asarray(factor, jnp.float32)
    if factor == "NUM_REAL_TARGET_TOKENS":
        return weights, jnp.maximum(jnp.sum(weights), 1.0)
    if factor == "NUM_TOTAL_TARGET_TOKENS":
        return weights, jnp.asarray(weights.size, jnp.float32)
    segments = batch.get("decoder_segment_ids")
    if segments is None:
        segments = jnp.ones(weights.shape, jnp.int32)
    # [B, L, L]: how much weight a token's own sequence has in all
    same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
    per_sequence = jnp.einsum("blm,bm->bl", same, weights)
    weights = jnp.where(per_sequence > 0, weights / jnp.maximum(per_sequence, 1e-9), 0.0)
    return weights, jnp.maximum(jnp.sum(weights), 1.0)  # its sum is the number of sequences


def apply_model(
    model: Any, params: Any, batch: Batch, dropout_rng: Array | None, **options: Any
) -> Any:
    """Logits [B, L, V] of a batch in T5X's names, packed or not; dropout where a key is given.

    Args:
      options: of the network, or of Linen's `apply`: with `mutable` its collections are returned
        beside the logits.
    """
    return model.apply(
        {"params": params},
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        encoder_segment_ids=batch.get("encoder_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
        encoder_positions=batch.get("encoder_positions"),
        decoder_positions=batch.get("decoder_positions"),
        enable_dropout=dropout_rng is not None,
        rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        **_sentences(batch),
        **options,
    )


def _sentences(batch: Batch) -> dict[str, Any]:
    """What the model is given of sentence embeddings [B, S], where the batch has any."""
    found = batch.get("sentence_embeddings")
    return {} if found is None else {"sentence_embeddings": found}


def _loss_sums(
    model: Any, loss: Loss, params: Any, batch: Batch, weights: Array, rng: Array | None
) -> tuple[Array, Metrics]:
    """Weighted sum of losses over a batch, and the sums that metrics are made of.

    The routers' losses, a mean over routers, count as the losses of a token do: so their weight
    beside it does not hang on how the sum is normalised.
    """
    hidden, told = apply_model(model, params, batch, rng, return_hidden=True, mutable=["routers"])
    total, of_tokens = cross_entropy.chunked_cross_entropy(
        hidden,
        network.logits_kernel(params),
        batch["decoder_target_tokens"],
        weights,
        loss.label_smoothing,
        loss.z_loss,
    )
    real = _token_weights(batch)
    tokens = jnp.sum(real)
    sums = {name: jnp.sum(value * real) for name, value in of_tokens.items()}
    sums["tokens"] = tokens
    routers = params_lib.flatten(told.get("routers", {}))
    if routers:
        statistics = [statistic for _, (statistic,) in sorted(routers.items())]
        sums["routers"] = jnp.stack(statistics) * tokens
        # taken before they are stacked: then XLA sees what nobody asked for, and drops it
        objective = routing.STATISTICS.index("objective")
        objectives = [jax.lax.index_in_dim(one, objective, keepdims=False) for one in statistics]
        total += jnp.mean(jnp.stack(objectives)) * jnp.sum(weights)
    return total, sums


def router_paths(model: Any) -> list[str]:
    """Where the routers are, in the order of the rows of a step's `routers`.

    Returns:
      e.g. ['decoder/layers_0/mlp/gate_adapter', …].
    """
    end = "/router/kernel"
    paths = params_lib.flatten(network.param_shapes(model))
    return sorted(path.removesuffix(end) for path in paths if path.endswith(end))


def _metrics(total: Array, sums: Metrics) -> Metrics:
    tokens = jnp.maximum(sums["tokens"], 1.0)
    routers = {"routers": sums["routers"] / tokens} if "routers" in sums else {}
    return {
        **routers,
        "loss": total,
        "cross_ent_loss": sums["nll"] / tokens,
        "z_loss": sums["z"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "tokens": sums["tokens"],
    }


def loss_and_grads(
    model: Any,
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    rng: Array | None = None,
    microbatches: int = 1,
) -> tuple[Any, Metrics]:
    """Gradients with respect to `trainable`, and metrics, of one batch.

    The batch's normaliser divides the sum over microbatches, so accumulated gradients equal those
    of the whole batch however its tokens are spread.

    Args:
      trainable, frozen: the two halves of the parameters.
      batch: arrays [B, L] in T5X's names.
      rng: dropout key; None for no dropout.
      microbatches: in how many pieces the batch is run, one after another.
    """
    weights, normalizer = weights_and_normalizer(batch, loss.loss_normalizing_factor)

    def loss_fn(trainable: Any, piece: Batch, weights: Array, rng: Array | None) -> Any:
        params = params_lib.merge(trainable, frozen)
        total, sums = _loss_sums(model, loss, params, piece, weights, rng)
        return total / normalizer, sums

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (total, sums), grads = grad_fn(trainable, batch, weights, rng)
        return grads, _metrics(total, sums)

    size = weights.shape[0]
    if size % microbatches:
        raise InputError(f"MICROBATCHES {microbatches} does not divide the batch of {size} rows")
    # every microbatch takes every n-th row, so that each device keeps the rows it holds
    pieces = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(size // microbatches, microbatches, *a.shape[1:]), 0, 1),
        (dict(batch), weights),
    )

    def accumulate(carry: Any, item: Any) -> tuple[Any, None]:
        index, (piece, piece_weights) = item
        piece_rng = None if rng is None else jax.random.fold_in(rng, index)
        (total, sums), grads = grad_fn(trainable, piece, piece_weights, piece_rng)
        return jax.tree.map(jnp.add, carry, (total, sums, grads)), None

    shapes = jax.eval_shape(
        lambda: grad_fn(trainable, jax.tree.map(lambda a: a[0], pieces[0]), pieces[1][0], rng)
    )
    (total, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (total, sums, grads), _ = jax.lax.scan(
        accumulate, (total, sums, grads), (jnp.arange(microbatches), pieces)
    )
    return grads, _metrics(total, sums)


StepFn = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    microbatches: int = 1,
    router_metrics: bool = True,
    state_sharding: Any = None,
) -> StepFn:
    """-> step(state, frozen, batch, rng) -> (state, metrics); jitted, the state is donated.

    `rng` is the run's key; the step folds its number in, so a resumed run draws the same masks.
    All metrics are scalars but `routers`, [routers, 6]: `routing.STATISTICS` of each of
    `router_paths`; without `router_metrics` what no loss needs of it is not computed. The new
    state lies as `state_sharding` says (see `partitioning.state_shardings`); None: as XLA likes.
    """

    def step(
        state: TrainState, frozen: Any, batch: Batch, rng: Array
    ) -> tuple[TrainState, Metrics]:
        dropout_rng = jax.random.fold_in(rng, state.step)
        grads, metrics = loss_and_grads(
            model, loss, state.params, frozen, batch, dropout_rng, microbatches
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        if not router_metrics:
            metrics.pop("routers", None)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    options: dict[str, Any] = {"donate_argnums": (0,)}
    if state_sharding is not None:
        options["out_shardings"] = (state_sharding, state_sharding.step)
    # any module with the network's signature may be trained, and need have no config
    remat_policy = getattr(getattr(model, "config", None), "remat_policy", "none")
    if remat_policy != "none" and jax.default_backend() == "cpu":
        # the schedule that CPUs have otherwise is for operations side by side: 4 to 10 % faster,
        # but it computes all that is to be computed again at once
        schedule = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        options["compiler_options"] = schedule
    return jax.jit(step, **options)


def make_eval_step(model: Any, loss: Loss) -> Callable[[Any, Any, Batch], Metrics]:
    """-> step(trainable, frozen, batch) -> sums of nll, z, correct and tokens; no dropout."""

    def step(trainable: Any, frozen: Any, batch: Batch) -> Metrics:
        params = params_lib.merge(trainable, frozen)
        _, sums = _loss_sums(model, loss, params, batch, _token_weights(batch), None)
        sums.pop("routers", None)
        return sums

    return jax.jit(step)


def score_choices(model: Any, params: Any, batch: Batch) -> Array:
    """Log-probability of every answer choice, each input encoded once for all its choices.

    Args:
      batch: encoder_input_tokens [B, L]; decoder_input_tokens and decoder_target_tokens
        [B, C, Lt]; sentence_embeddings [B, S] for routers that read them. A choice that only fills
        a row up is all zeros.

    Returns:
      [B, C] float32: the sum over the target's tokens, in nats, not normalised by length.
    """
    inputs = batch["encoder_input_tokens"]
    targets = batch["decoder_target_tokens"]
    rows, choices, length = targets.shape
    flat_targets = targets.reshape(rows * choices, length)
    sentences = _sentences(batch)
    encoded = model.apply(
        {"params": params}, inputs, enable_dropout=False, method=model.encode, **sentences
    )
    real = (flat_targets > 0).astype(jnp.float32)
    hidden = model.apply(
        {"params": params},
        encoded,
        inputs,
        batch["decoder_input_tokens"].reshape(rows * choices, length),
        flat_targets,
        enable_dropout=False,
        return_hidden=True,
        method=model.decode,
        **sentences,
    )
    kernel = network.logits_kernel(params)
    _, of_tokens = cross_entropy.chunked_cross_entropy(hidden, kernel, flat_targets, real)
    scores = -jnp.sum(of_tokens["nll"] * real, axis=-1)
    return scores.reshape(rows, choices)
