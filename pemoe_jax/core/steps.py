"""The loss, and the train, eval and score steps over batches of numpy arrays.

Gradients are taken only with respect to the trainable parameters. The frozen parameters are a
separate argument, so their gradients are never computed. Loss and normalization are T5X's.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pemoe_jax.core import cross_entropy, experts, network, routing
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.kernels import cpu_schedule
from pemoe_jax.core.params import Params, PyTree

Array = jax.Array
Batch = Mapping[str, Array | np.ndarray]
Metrics = dict[str, Array]

# Metrics that are arrays: `routers` has a row for each router, and `dispatch` has a row for each
# sparse layer.
ROUTER_ROWS = ("routers", "dispatch")

NORMALIZERS = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


class Model(Protocol):
    """A module that can be trained; its `apply` has the signature of `Transformer.apply`."""

    @property
    def apply(self) -> Callable[..., PyTree]: ...


@flax.struct.dataclass
class TrainState:
    """The state of a run: the step, the trainable parameters and the optimizer's state."""

    step: Array
    params: Params
    opt_state: PyTree

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns the state before the first step, for trainable parameters."""
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


@dataclasses.dataclass(frozen=True)
class Loss:
    """Settings of the loss, under T5X's names.

    Attributes:
      z_loss: coefficient of log(Z)², which keeps the softmax's denominator Z near 1; 0: no such
        loss.
      label_smoothing: total probability of the other V - 1 tokens, which share it equally.
      loss_normalizing_factor: divisor of the summed loss: None (no division), a number,
        'NUM_REAL_TARGET_TOKENS', 'NUM_TOTAL_TARGET_TOKENS' (padding counts too) or
        'AVERAGE_PER_SEQUENCE' (the mean over the tokens of each sequence, then over sequences; the
        examples of a packed row are separate sequences).
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    loss_normalizing_factor: float | str | None = "NUM_REAL_TARGET_TOKENS"

    def __post_init__(self) -> None:
        factor = self.loss_normalizing_factor
        if isinstance(factor, str) and factor not in NORMALIZERS:
            raise InputError(
                f"LOSS_NORMALIZING_FACTOR must be None, a number or one of {NORMALIZERS},"
                f" got {factor!r}"
            )


def _token_weights(batch: Batch) -> Array:
    # Weights may exclude some targets, such as the prefix of T5X's prefix LM.
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] > 0
    return jnp.asarray(weights, jnp.float32)


def weights_and_normalizer(batch: Batch, factor: float | str | None) -> tuple[Array, Array]:
    """Returns token weights [B, L] and the divisor of the weighted sum of losses.

    `factor` is `Loss.loss_normalizing_factor`.
    """
    weights = _token_weights(batch)
    if not isinstance(factor, str):
        return weights, jnp.asarray(1.0 if factor is None else factor, jnp.float32)
    if factor == "NUM_REAL_TARGET_TOKENS":
        return weights, jnp.maximum(jnp.sum(weights), 1.0)
    if factor == "NUM_TOTAL_TARGET_TOKENS":
        return weights, jnp.asarray(weights.size, jnp.float32)
    segments = batch.get("decoder_segment_ids")
    if segments is None:
        segments = jnp.ones(weights.shape, jnp.int32)
    # All pairs of tokens are compared, since the shapes of a program are fixed, but the number of
    # sequences in a packed row varies.
    same_sequence = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)  # [B, L, L]
    sequence_weight = jnp.einsum("blm,bm->bl", same_sequence, weights)
    weights = jnp.where(sequence_weight > 0, weights / jnp.maximum(sequence_weight, 1e-9), 0.0)
    return weights, jnp.maximum(jnp.sum(weights), 1.0)  # the sum is the number of sequences


def apply_model(
    model: Model, params: Params, batch: Batch, dropout_rng: Array | None, **options: object
) -> PyTree:
    """Returns the logits [B, L, V] of a batch, packed or not, or the result that `options` ask for.

    Args:
      batch: arrays [B, L] under T5X's names, and optionally sentence_embeddings [B, S].
      dropout_rng: dropout key; None disables dropout.
      options: arguments of the network or of Linen's `apply`. With `return_hidden`, the result is
        the input of the logits layer, [B, L, D]; with `mutable`, it is a pair of the result and the
        collections.
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
        **_sentence_embeddings(batch),
        **options,
    )


def _sentence_embeddings(batch: Batch) -> dict[str, Array | np.ndarray]:
    # Passed only if present: T5X's and the tests' modules do not take the argument.
    name = "sentence_embeddings"
    return {name: batch[name]} if batch.get(name) is not None else {}


def _loss_sums(
    model: Model, loss: Loss, params: Params, batch: Batch, weights: Array, rng: Array | None
) -> tuple[Array, Metrics]:
    """Returns the sum of losses over a batch, and the sums from which metrics are computed.

    `weights` are the token weights in the loss, which may be normalized per sequence. Metrics are
    weighted by `_token_weights`, so that they do not depend on the normalizer.
    """
    hidden, collections = apply_model(
        model, params, batch, rng, return_hidden=True, mutable=["routers"]
    )
    total, token_values = cross_entropy.chunked_cross_entropy(
        hidden,
        network.logits_kernel(params),
        batch["decoder_target_tokens"],
        weights,
        loss.label_smoothing,
        loss.z_loss,
    )
    token_weights = _token_weights(batch)
    sums = {name: jnp.sum(values * token_weights) for name, values in token_values.items()}
    sums["tokens"] = jnp.sum(token_weights)
    sown = collections.get("routers", {})
    statistics = routing.sown_by_router(sown, "statistics")
    if statistics:
        # Multiplied by the tokens, since the sums of microbatches are added, and `_metrics` divides
        # by all tokens.
        sums["routers"] = jnp.stack([*statistics.values()]) * sums["tokens"]
        # The column is taken from each router's row and not from the stacked array, so that XLA
        # drops the statistics that nothing reads.
        column = routing.STATISTICS.index("aux_loss")
        aux_losses = jnp.stack(
            [jax.lax.index_in_dim(row, column, keepdims=False) for row in statistics.values()]
        )
        # Multiplied by the sum of the weights, since the total is later divided by the normalizer.
        # The ratio of the auxiliary loss to the tokens' losses then does not depend on the
        # normalizer.
        total += routing.total_aux_loss([*statistics], aux_losses) * jnp.sum(weights)
    if dispatch := routing.sown_by_router(sown, "dispatch"):
        sums["dispatch"] = jnp.stack([*dispatch.values()]) * sums["tokens"]
    return total, sums


def router_kernels(model: network.Transformer) -> dict[str, PyTree]:
    """Returns router path -> shape [features, E] of the router's kernel.

    Paths and their order are those of `routing.sown_by_router`, for example
    'decoder/layers_0/mlp/gate_adapter', or 'decoder/layers_1/mlp/experts' for a sparse layer.
    """
    adapter, sparse = "/router/kernel", "/router/router_weights/w/kernel"
    kernels = {}
    for path, shape in params_lib.flatten(network.param_shapes(model)).items():
        if path.endswith(adapter):
            kernels[path.removesuffix(adapter)] = shape
        elif path.endswith(sparse):
            kernels[path.removesuffix(sparse) + "/experts"] = shape
    return dict(sorted(kernels.items()))


def router_paths(model: network.Transformer) -> list[str]:
    """Returns the paths of the routers, in the order of the rows of a step's `routers`.

    A step's `dispatch` has rows for the sparse layers only.
    """
    return [*router_kernels(model)]


def summarize_routers(
    paths: Sequence[str], rows: Mapping[str, Array | np.ndarray], detail: str
) -> dict[str, Array | np.ndarray]:
    """Returns a step's router metrics as scalars by name, such as 'encoder/mlp/experts/dropped'.

    Args:
      paths: the `router_paths` of the model.
      rows: the step's metrics `routers` and, for a sparse model, `dispatch`.
      detail: see `routing.summarize_statistics`.
    """
    metrics = routing.summarize_statistics(paths, rows["routers"], detail)
    if "dispatch" in rows:
        sparse_paths = [path for path in paths if routing.is_sparse_layer(path)]
        metrics |= routing.summarize_statistics(
            sparse_paths, rows["dispatch"], detail, experts.DISPATCH_STATISTICS
        )
    return metrics


def _metrics(total: Array, sums: Metrics) -> Metrics:
    tokens = jnp.maximum(sums["tokens"], 1.0)
    metrics = {name: sums[name] / tokens for name in ROUTER_ROWS if name in sums}
    return metrics | {
        "loss": total,
        "cross_ent_loss": sums["nll"] / tokens,
        "z_loss": sums["z"] / tokens,
        "accuracy": sums["correct"] / tokens,
        "tokens": sums["tokens"],
    }


def grads_and_metrics(
    model: Model,
    loss: Loss,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    rng: Array | None = None,
    microbatches: int = 1,
) -> tuple[PyTree, Metrics]:
    """Returns the gradients with respect to `trainable`, and the metrics, of one batch.

    The loss of each microbatch is divided by the normalizer of the whole batch. So the accumulated
    gradients equal the gradients of the whole batch, however its tokens are divided, except for
    dropout, router noise, auxiliary losses of routers, and groups of tokens that span rows
    (`Sparse.group`).

    Args:
      model: the network.
      loss: settings of the loss.
      trainable, frozen: the two parts of the parameters.
      batch: arrays [B, L] under T5X's names.
      rng: dropout key; None disables dropout.
      microbatches: number of pieces of the batch that are computed one after another.

    Raises:
      InputError: `microbatches` does not divide B.
    """
    weights, normalizer = weights_and_normalizer(batch, loss.loss_normalizing_factor)

    def loss_fn(
        trainable: Params, batch: Batch, weights: Array, rng: Array | None
    ) -> tuple[Array, Metrics]:
        params = params_lib.merge(trainable, frozen)
        total, sums = _loss_sums(model, loss, params, batch, weights, rng)
        return total / normalizer, sums

    # `frozen` is a constant of `loss_fn`, so JAX does not trace gradients with respect to it.
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (total, sums), grads = grad_fn(trainable, batch, weights, rng)
    else:
        (total, sums), grads = _accumulate(grad_fn, trainable, batch, weights, rng, microbatches)
    return grads, _metrics(total, sums)


GradFn = Callable[[Params, Batch, Array, Array | None], tuple[tuple[Array, Metrics], PyTree]]


def _accumulate(
    grad_fn: GradFn,
    trainable: Params,
    batch: Batch,
    weights: Array,
    rng: Array | None,
    microbatches: int,
) -> tuple[tuple[Array, Metrics], PyTree]:
    size = weights.shape[0]
    if size % microbatches:
        raise InputError(f"MICROBATCHES must divide the batch of {size} rows, got {microbatches}")
    # Microbatch i takes the rows i, i + microbatches, …, so that each device keeps its rows.
    pieces = jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(size // microbatches, microbatches, *a.shape[1:]), 0, 1),
        (dict(batch), weights),
    )

    # Jitted, so that it is traced only once for both `eval_shape` and the scan.
    @functools.partial(jax.jit, inline=True)
    def run(index: Array, piece: tuple[Batch, Array]) -> PyTree:
        piece_rng = None if rng is None else jax.random.fold_in(rng, index)
        return grad_fn(trainable, *piece, piece_rng)

    def add(sums: PyTree, item: tuple[Array, tuple[Batch, Array]]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, run(*item)), None

    # The tree of sums has keys that depend on the model's routers, so its shapes are evaluated.
    indices = jnp.arange(microbatches)
    shapes = jax.eval_shape(run, *jax.tree.map(lambda a: a[0], (indices, pieces)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, (indices, pieces))
    return sums


StepFn = Callable[[TrainState, Params, Batch, Array], tuple[TrainState, Metrics]]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    microbatches: int = 1,
    router_metrics: bool = True,
    state_sharding: TrainState | None = None,
    skip_nonfinite: bool = False,
    donate: bool = True,
) -> StepFn:
    """Returns the jitted function step(state, frozen, batch, rng) -> (state, metrics).

    `rng` is the run's key. The step folds its number into the key, so that a resumed run draws the
    same dropout masks.

    Args:
      model, loss: see `grads_and_metrics`.
      optimizer: the optimizer of the trainable parameters.
      microbatches: see `grads_and_metrics`.
      router_metrics: whether metrics include `routers` [routers, 6], the `routing.STATISTICS` of
        each of `router_paths`, and `dispatch` [sparse layers, 3], the
        `experts.DISPATCH_STATISTICS`; all other metrics are scalars. If False, XLA drops the
        statistics that no loss needs.
      state_sharding: shardings of the new state; None leaves them to XLA.
      skip_nonfinite: whether a step whose loss or gradient is not finite leaves the parameters and
        the optimizer's state as they were.
      donate: whether the new state takes the memory of the old one, which is then unusable.
    """

    def step(
        state: TrainState, frozen: Params, batch: Batch, rng: Array
    ) -> tuple[TrainState, Metrics]:
        dropout_rng = jax.random.fold_in(rng, state.step)
        grads, metrics = grads_and_metrics(
            model, loss, state.params, frozen, batch, dropout_rng, microbatches
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        if skip_nonfinite:  # a norm is not finite if a gradient is not
            is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        if not router_metrics:
            metrics = {name: value for name, value in metrics.items() if name not in ROUTER_ROWS}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    options: dict[str, Any] = {"donate_argnums": (0,) if donate else ()}
    if state_sharding is not None:
        # Metrics are replicated, as the step's number is.
        options["out_shardings"] = (state_sharding, state_sharding.step)
    # A `Model` need not have a config.
    remat_policy = getattr(getattr(model, "config", None), "remat_policy", "none")
    if compiler_options := cpu_schedule.rematerialization_options(remat_policy):
        options["compiler_options"] = compiler_options
    return jax.jit(step, **options)


def make_eval_step(model: Model, loss: Loss) -> Callable[[Params, Params, Batch], Metrics]:
    """Returns step(trainable, frozen, batch) -> sums of nll, z, correct and tokens; no dropout."""

    def step(trainable: Params, frozen: Params, batch: Batch) -> Metrics:
        params = params_lib.merge(trainable, frozen)
        _, sums = _loss_sums(model, loss, params, batch, _token_weights(batch), None)
        return {name: value for name, value in sums.items() if name not in ROUTER_ROWS}

    return jax.jit(step)


@jax.jit
def is_tree_finite(tree: PyTree) -> Array:
    """Returns whether all values of a tree of arrays are finite, bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def score_choices(model: network.Transformer, params: Params, batch: Batch) -> Array:
    """Returns the log-probability of every answer choice, [B, C] float32.

    Each input is encoded once for all its choices. A score is the sum over the target's tokens, in
    nats, not normalized by length.

    Args:
      model: the network.
      params: its parameters.
      batch: encoder_input_tokens [B, L]; decoder_input_tokens and decoder_target_tokens
        [B, C, Lt]; sentence_embeddings [B, S] for routers that read them. A row with fewer than C
        choices is filled up with zeros.
    """
    token_values, is_real = _token_values(model, params, batch)
    return -jnp.sum(token_values["nll"] * is_real, axis=-1)


def score_and_match_choices(
    model: network.Transformer, params: Params, batch: Batch
) -> tuple[Array, Array]:
    """Returns the scores, and whether greedy decoding returns each choice, [B, C] bool.

    For the arguments and scores see `score_choices`. The second array is True for the zeros that
    fill up a row.
    """
    token_values, is_real = _token_values(model, params, batch)
    scores = -jnp.sum(token_values["nll"] * is_real, axis=-1)
    return scores, jnp.all(token_values["correct"] >= is_real, axis=-1)


def _token_values(
    model: network.Transformer, params: Params, batch: Batch
) -> tuple[dict[str, Array], Array]:
    """Returns `chunked_cross_entropy`'s values of each token, and 1 for tokens, 0 for padding.

    All arrays are [B, C, Lt]; see `score_choices`.
    """
    # The decoder reads row b of the encoder's output for its rows b·C to b·C + C - 1, see
    # `layers.MultiHeadDotProductAttention`. This is 3.4 times as fast as a forward pass per choice.
    inputs = batch["encoder_input_tokens"]
    targets = batch["decoder_target_tokens"]
    rows, choices, length = targets.shape
    targets = targets.reshape(rows * choices, length)
    sentences = _sentence_embeddings(batch)
    apply: Callable[..., PyTree] = model.apply
    encoded = apply(
        {"params": params}, inputs, enable_dropout=False, method=model.encode, **sentences
    )
    hidden = apply(
        {"params": params},
        encoded,
        inputs,
        batch["decoder_input_tokens"].reshape(rows * choices, length),
        targets,
        enable_dropout=False,
        return_hidden=True,
        method=model.decode,
        **sentences,
    )
    kernel = network.logits_kernel(params)
    is_real = jnp.greater(targets, 0).astype(jnp.float32)
    _, token_values = cross_entropy.chunked_cross_entropy(hidden, kernel, targets, is_real)
    by_choice = {name: value.reshape(rows, choices, length) for name, value in token_values.items()}
    return by_choice, is_real.reshape(rows, choices, length)
