"""The probe: a jitted function that adds up router probabilities by task and by token.

Shapes: `T` tasks, `V` vocabulary, `E` experts of a site, `B` rows of `L` tokens, `H` heads.

A site is the parameter path of an adapter without its suffix, e.g. 'decoder/layers_3/mlp/gate'. The
router of a sparse layer is at the site 'decoder/layers_3/mlp/experts'. The probabilities there are
the weights of a token's chosen experts before any assignment is dropped, but the entropy is that of
the softmax over all experts.
"""

import functools
from collections.abc import Callable, Collection

import flax.struct
import jax
import jax.numpy as jnp

from pemoe_jax.core import adapters, network, routing, steps
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.errors import InputError

Array = jax.Array

STACKS = ("encoder", "decoder")
_MODULES = ("attention", "self_attention", "encoder_decoder_attention", "mlp")
_SUFFIX = "_adapter"

# GPUs and TPUs multiply float32 matrices with fewer bits by default, which would round the counts.
exact_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class ProbeTotals:
    """Sums over non-padding tokens, all float32; distributions per head are averaged over heads.

    Attributes:
      probs: {site: [T, E]} router probabilities, at every router.
      entropy: {site: [T]} entropies, in nats, of the probabilities normalized to sum to one; at
        sparse layers, those of the softmax before experts are chosen.
      num_tokens: {stack: [T]} number of tokens.
      token_probs: {site: [V, E]} router probabilities by token id, at the requested sites.
      token_counts: {stack: [V]} number of tokens by token id.
    """

    probs: dict[str, Array]
    entropy: dict[str, Array]
    num_tokens: dict[str, Array]
    token_probs: dict[str, Array]
    token_counts: dict[str, Array]


Probe = Callable[[params_lib.Params, steps.Batch, Array, ProbeTotals], ProbeTotals]


def expert_counts(model: network.Transformer) -> dict[str, int]:
    """Returns {site: E} of every router in layer order; empty if the method has no routers."""
    # Tracing yields shapes without computing anything, also for models that do not fit into memory.
    kernels = steps.router_kernels(model)
    return {
        path.removesuffix(_SUFFIX): kernels[path].shape[-1]
        for path in sorted(kernels, key=_layer_order)
    }


def _layer_order(path: str) -> tuple[int, int, int, int]:
    """Returns the sort key of a router: the indices of its stack, layer, module and site."""
    stack, layer, module, site = path.removesuffix(_SUFFIX).split("/")
    sites = [*adapters.SITES, routing.EXPERTS_SITE.rpartition("/")[2]]
    order = _MODULES.index(module), sites.index(site)
    return STACKS.index(stack), int(layer.removeprefix("layers_")), *order


def token_stack(site: str) -> str:
    """Returns the stack whose tokens a site's router reads."""
    # Cross-attention projects the encoder's output to keys and values.
    reads_encoder = site.startswith("encoder/") or site.endswith(
        ("encoder_decoder_attention/key", "encoder_decoder_attention/value")
    )
    return STACKS[0] if reads_encoder else STACKS[1]


def init_totals(
    model: network.Transformer, num_tasks: int, token_sites: Collection[str] = ()
) -> ProbeTotals:
    """Returns totals of zeros.

    Args:
      model: network with routers.
      num_tasks: T.
      token_sites: sites whose probabilities are also summed by token id.

    Raises:
      InputError: a token site has no router.
    """
    counts = expert_counts(model)
    unknown = [site for site in token_sites if site not in counts]
    if unknown:
        raise InputError(f"token_sites must be among {list(counts)}, got {unknown[0]!r}")
    vocab_size = model.config.vocab_size
    return ProbeTotals(
        probs={site: jnp.zeros((num_tasks, size)) for site, size in counts.items()},
        entropy={site: jnp.zeros(num_tasks) for site in counts},
        num_tokens={stack: jnp.zeros(num_tasks) for stack in STACKS},
        token_probs={site: jnp.zeros((vocab_size, counts[site])) for site in token_sites},
        token_counts={stack: jnp.zeros(vocab_size) for stack in STACKS},
    )


def make_probe(model: network.Transformer) -> Probe:
    """Returns a jitted `probe(params, batch, task_ids, totals) -> totals` that donates `totals`.

    `batch` is an unpacked batch with T5X's feature names and the correct answers as targets.
    `task_ids`, int32 [B], are the indices of the rows' tasks. In the decoder's totals by token, the
    token is the one that the decoder reads (0: the start token), not the one that it predicts.
    """

    def probe(
        params: params_lib.Params, batch: steps.Batch, task_ids: Array, totals: ProbeTotals
    ) -> ProbeTotals:
        _, collections = steps.apply_model(model, params, batch, None, mutable=["intermediates"])
        token_ids = {stack: batch[f"{stack}_input_tokens"] for stack in STACKS}
        # The start token, which the decoder reads first, has the id of padding. The decoder's mask
        # therefore comes from its targets.
        masks = {
            "encoder": (batch["encoder_input_tokens"] > 0).astype(jnp.float32),
            "decoder": (batch["decoder_target_tokens"] > 0).astype(jnp.float32),
        }
        task_one_hot = jax.nn.one_hot(task_ids, totals.num_tokens["encoder"].shape[0])  # [B, T]
        probs, entropy = dict(totals.probs), dict(totals.entropy)
        token_probs = dict(totals.token_probs)
        sown = routing.sown_by_router(collections["intermediates"], "probs")
        softmax = routing.sown_by_router(collections["intermediates"], "router_probs")
        for path, site_probs in sown.items():
            site = path.removesuffix(_SUFFIX)
            stack = token_stack(site)
            token_mixture, token_entropy = _mixture_and_entropy(site_probs)
            if site in softmax:  # a sparse layer
                token_entropy = jnp.sum(jax.scipy.special.entr(softmax[site]), axis=-1)
            probs[site] += exact_einsum("bt,ble,bl->te", task_one_hot, token_mixture, masks[stack])
            entropy[site] += exact_einsum("bt,bl,bl->t", task_one_hot, token_entropy, masks[stack])
            if site in token_probs:
                masked = token_mixture * masks[stack][..., None]  # [B, L, E]
                token_probs[site] = token_probs[site].at[token_ids[stack]].add(masked)
        return ProbeTotals(
            probs=probs,
            entropy=entropy,
            num_tokens={
                stack: count + exact_einsum("bt,bl->t", task_one_hot, masks[stack])
                for stack, count in totals.num_tokens.items()
            },
            token_probs=token_probs,
            token_counts={
                stack: count.at[token_ids[stack]].add(masks[stack])
                for stack, count in totals.token_counts.items()
            },
        )

    # `totals` are donated, so that `token_probs`, [V, E] at each requested site, exists only once.
    return jax.jit(probe, donate_argnums=(3,))


def _mixture_and_entropy(probs: Array) -> tuple[Array, Array]:
    """Returns probabilities [B, L, E] and entropies in nats [B, L], both averaged over heads.

    Args:
      probs: [B, L, E], or [B, L, H, E] of a router with a distribution per head.
    """
    # Top-k routers may keep less than the full probability; an entropy needs a sum of one.
    normalized = probs / jnp.maximum(jnp.sum(probs, axis=-1, keepdims=True), 1e-9)
    entropy = jnp.sum(jax.scipy.special.entr(normalized), axis=-1)
    if probs.ndim == 4:  # [B, L, H, E]
        return jnp.mean(probs, axis=2), jnp.mean(entropy, axis=2)
    return probs, entropy
