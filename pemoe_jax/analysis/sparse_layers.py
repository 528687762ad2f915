"""Lines about sparse layers for the summary that a run prints first."""

from collections.abc import Mapping
from typing import Any

from pemoe_jax.analysis.counts import MLP_SITES
from pemoe_jax.analysis.planning import flops
from pemoe_jax.analysis.tables import format_scaled, format_share
from pemoe_jax.core import adapters, network, partitioning
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.network import Transformer
from pemoe_jax.core.sparse import Sparse


def summary_lines(
    model: Transformer,
    base: Mapping[str, Any],
    lengths: Mapping[str, int],
    batch_size: int,
) -> dict[str, str]:
    """Returns name -> text of the lines, for `counts.parameter_summary`; empty for a dense model.

    Call it in the context of the run's mesh.

    Args:
      model: the network.
      base: the entry `base` of the run's record.
      lengths: numbers of tokens of 'inputs' and 'targets' in a row of the batch.
      batch_size: number of rows of a microbatch, over all devices.
    """
    if model.sparse is None:
        return {}
    sparse, config = model.sparse, model.config
    depth = config.num_encoder_layers + config.num_decoder_layers
    # SPARSE_STEP divides the layers of each stack, as `network` checks.
    num_sparse = depth // sparse.sparse_step
    experts = f"{sparse.num_experts} experts in {num_sparse} of {depth} layers"
    if upcycled := base.get("upcycled"):
        noise = f", noise {upcycled['noise']:g}" if upcycled["noise"] else ""
        experts = f"upcycled from a dense base: {experts}{noise}"
        # All experts start as copies of one dense MLP. Their outputs are its output only if the
        # weights of a token's experts sum to 1, but near-uniform probabilities sum to about k / E.
        if sparse.combine == "probability":
            experts += (
                "; the start is not the dense function: COMBINE='probability' multiplies outputs"
                f" by about {sparse.top_k}/{sparse.num_experts}"
            )
    stack_lengths = {"encoder": lengths["inputs"], "decoder": lengths["targets"]}
    lines = {
        "experts": experts,
        "places": "; ".join(
            f"{stack}: {_describe_places(sparse, stack, length, batch_size)}"
            for stack, length in stack_lengths.items()
        ),
        "a token": _describe_token_cost(model),
    }
    if sites := [site for site in model.adapters.sites() if site in MLP_SITES]:
        lines["adapters"] = f"at {', '.join(sites)} in the {depth - num_sparse} dense layers alone"
    return lines


def _describe_token_cost(model: Transformer) -> str:
    """Describes the parameters that a token uses and the forward FLOPs that it takes."""
    shapes = params_lib.flatten(network.param_shapes(model))
    used = flops.used_parameters(shapes, model.sparse)
    reads = flops.describe_router_reads(adapters.describe(model.adapters))
    by_experts, with_places = flops.token_flops(shapes, reads, model.sparse)
    return (
        f"{used:,} of {params_lib.count(shapes):,} parameters; an input and a target token:"
        f" {format_scaled(by_experts)} FLOPs forward, {format_scaled(with_places)} with all places"
    )


def _describe_places(sparse: Sparse, stack: str, length: int, batch_size: int) -> str:
    """Describes how many of a group's tokens an expert takes in training, and what it must drop."""
    tokens = flops.tokens_per_group(sparse, batch_size, length, partitioning.data_parallelism())
    places = sparse.group_capacity(tokens, deterministic=False)
    if sparse.routing == "experts" and stack == "encoder":
        # `Sparse` rejects experts that choose tokens without a capacity.
        assert places is not None
        clipped = f" (clipped from {places})" if places > tokens else ""
        return f"an expert chooses {min(places, tokens)} of {tokens} tokens{clipped}"
    if places is None or places >= tokens:
        return f"an expert takes all of {tokens} tokens"
    text = f"an expert takes up to {places} of {tokens} tokens"
    # Even perfectly balanced routing drops the assignments beyond the places of all experts.
    assignments = sparse.top_k * tokens
    if (excess := assignments - sparse.num_experts * places) > 0:
        text += f", at least {format_share(excess, assignments)} of assignments are dropped"
    return text
