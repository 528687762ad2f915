"""What routers do with tasks and with tokens: totals over batches, which stay on the device.

Shapes: `T` tasks, `V` token ids, `E` experts of a site. A site is named by its path in the
parameters, e.g. 'decoder/layers_3/mlp/gate'.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pemoe_jax.core import adapters, network, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

Array = jax.Array

STACKS = ("encoder", "decoder")
_MODULES = ("attention", "self_attention", "encoder_decoder_attention", "mlp")
_SUFFIX = "_adapter/probs"

# Sums stay exact where products of matrices are of fewer bits by default (GPU, TPU).
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class ProbeTotals:
    """Sums over real tokens, of head-wise routers the mean over heads; all float32.

    Attributes:
      probs: {site: [T, E]} of what mixes the experts, at every router.
      entropy: {site: [T]} of the entropies of what mixes them, scaled to sum to one, in nats.
      num_tokens: {stack: [T]} how many there are.
      token_probs: {site: [V, E]} as `probs`, by the token's id, at the sites that were asked for.
      token_counts: {stack: [V]} how many there are of each id.
    """

    probs: dict[str, Any]
    entropy: dict[str, Any]
    num_tokens: dict[str, Any]
    token_probs: dict[str, Any]
    token_counts: dict[str, Any]


Probe = Callable[[Any, Any, Array, ProbeTotals], ProbeTotals]


def expert_counts(model: network.Transformer) -> dict[str, int]:
    """{site: E} of every router, in the order of the layers; empty for a method without any."""
    shapes = params_lib.flatten(network.param_shapes(model))
    return {
        path.removesuffix("_adapter"): shapes[f"{path}/router/kernel"].shape[-1]
        for path in sorted(steps.router_paths(model), key=_by_layer)
    }


def _by_layer(path: str) -> tuple[int, int, int, int]:
    stack, layer, module, site = path.removesuffix("_adapter").split("/")
    order = _MODULES.index(module), list(adapters.SITES).index(site)
    return STACKS.index(stack), int(layer.removeprefix("layers_")), *order


def token_stack(site: str) -> str:
    """Whose tokens are routed there: cross-attention's keys and values are the encoder's."""
    of_encoder = site.startswith("encoder/") or site.endswith(
        ("encoder_decoder_attention/key", "encoder_decoder_attention/value")
    )
    return STACKS[0] if of_encoder else STACKS[1]


def init_totals(
    model: network.Transformer, tasks: int, token_sites: Collection[str] = ()
) -> ProbeTotals:
    """Zeros to begin with.

    Args:
      model: with routers.
      tasks: T.
      token_sites: where totals by token are wanted.

    Raises:
      InputError: there is no router at one of them.
    """
    found = expert_counts(model)
    missing = [site for site in token_sites if site not in found]
    if missing:
        raise InputError(f"no router at {missing[0]!r}: expected some of {list(found)}")
    vocab = model.config.vocab_size
    return ProbeTotals(
        probs={site: jnp.zeros((tasks, size)) for site, size in found.items()},
        entropy={site: jnp.zeros(tasks) for site in found},
        num_tokens={stack: jnp.zeros(tasks) for stack in STACKS},
        token_probs={site: jnp.zeros((vocab, found[site])) for site in token_sites},
        token_counts={stack: jnp.zeros(vocab) for stack in STACKS},
    )


def make_probe(model: network.Transformer) -> Probe:
    """Returns the jitted probe(params, batch, tasks, totals) -> totals; `totals` is donated.

    The batch is unpacked, in T5X's names, with the right answers as targets, and `tasks` int [B]
    has each row's number below T. Where decoder sites are asked by token, it is the token that the
    decoder reads (0: the start), not the one that it predicts.
    """

    def probe(params: Any, batch: Any, tasks: Array, totals: ProbeTotals) -> ProbeTotals:
        _, told = steps.apply_model(model, params, batch, None, mutable=["intermediates"])
        read = {
            STACKS[0]: batch["encoder_input_tokens"],
            STACKS[1]: batch["decoder_input_tokens"],
        }
        real = {
            STACKS[0]: batch["encoder_input_tokens"] > 0,
            STACKS[1]: batch["decoder_target_tokens"] > 0,
        }
        weights = {stack: valid.astype(jnp.float32) for stack, valid in real.items()}
        rows = jax.nn.one_hot(tasks, totals.num_tokens[STACKS[0]].shape[0])  # [B, T]
        probs, entropy = dict(totals.probs), dict(totals.entropy)
        token_probs = dict(totals.token_probs)
        for path, (p,) in params_lib.flatten(told["intermediates"]).items():
            site = path.removesuffix(_SUFFIX)
            stack = token_stack(site)
            p, h = _over_heads(p)
            weight = weights[stack]
            probs[site] += _einsum("bt,ble,bl->te", rows, p, weight)
            entropy[site] += _einsum("bt,bl,bl->t", rows, h, weight)
            if site in token_probs:
                token_probs[site] = token_probs[site].at[read[stack]].add(p * weight[..., None])
        return ProbeTotals(
            probs=probs,
            entropy=entropy,
            num_tokens={
                s: totals.num_tokens[s] + _einsum("bt,bl->t", rows, weights[s]) for s in STACKS
            },
            token_probs=token_probs,
            token_counts={s: totals.token_counts[s].at[read[s]].add(weights[s]) for s in STACKS},
        )

    return jax.jit(probe, donate_argnums=(3,))


def _over_heads(probs: Array) -> tuple[Array, Array]:
    """[B, L, (H,) E] -> (probabilities [B, L, E], entropies in nats [B, L]), means over heads."""
    share = probs / jnp.maximum(jnp.sum(probs, axis=-1, keepdims=True), 1e-9)
    entropy = jnp.sum(jax.scipy.special.entr(share), axis=-1)
    if probs.ndim == 4:
        probs, entropy = jnp.mean(probs, axis=2), jnp.mean(entropy, axis=2)
    return probs, entropy
