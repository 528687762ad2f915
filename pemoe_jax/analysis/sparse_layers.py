"""Lines about sparse layers, for a run's summary."""

from collections.abc import Mapping
from typing import Any

from pemoe_jax.analysis.counts import MLP_SITES
from pemoe_jax.analysis.planning import flops
from pemoe_jax.analysis.tables import format_scaled, format_share
from pemoe_jax.core import adapters, dispatch, network, partitioning
from pemoe_jax.core import params as params_lib
from pemoe_jax.core.network import Transformer
from pemoe_jax.core.sparse import Sparse


def summary_lines(
    model: Transformer,
    base: Mapping[str, Any],
    lengths: Mapping[str, int],
    batch_size: int,
) -> dict[str, str]:
    """Returns name -> text, for `counts.parameter_summary`; nothing for a dense model.

    Call it in the context of the run's mesh.

    Args:
      model: the network.
      base: `base` of the run's record.
      lengths: tokens of 'inputs' and 'targets'.
      batch_size: rows of a microbatch, over all devices.
    """
    if model.sparse is None:
        return {}
    sparse, config = model.sparse, model.config
    depth = config.num_encoder_layers + config.num_decoder_layers
    num_sparse = depth // sparse.sparse_step
    experts = f"{sparse.num_experts} experts in {num_sparse} of {depth} blocks"
    if upcycled := base.get("upcycled"):
        noise = f", noise {upcycled['noise']:g}" if upcycled["noise"] else ""
        experts = f"upcycled from a dense base: {experts}{noise}"
        if sparse.combine == "probability":
            experts += (
                "; the start is not the dense function: COMBINE='probability' multiplies outputs"
                f" by about {sparse.top_k}/{sparse.num_experts}"
            )
    by_stack = {"encoder": lengths["inputs"], "decoder": lengths["targets"]}
    lines = {
        "experts": experts,
        "places": "; ".join(
            f"{stack}: {_places(sparse, stack, length, batch_size)}"
            for stack, length in by_stack.items()
        ),
        "a token": _token_cost(model),
    }
    if sites := [site for site in model.adapters.sites() if site in MLP_SITES]:
        lines["adapters"] = f"at {', '.join(sites)} in the {depth - num_sparse} dense blocks alone"
    return lines


def _token_cost(model: Transformer) -> str:
    shapes = params_lib.flatten(network.param_shapes(model))
    used = flops.used_parameters(shapes, model.sparse)
    reads = flops.describe_router_reads(adapters.describe(model.adapters))
    by_experts, with_places = flops.token_flops(shapes, reads, model.sparse)
    return (
        f"{used:,} of {params_lib.count(shapes):,} parameters; an input and a target token:"
        f" {format_scaled(by_experts)} FLOPs forward, {format_scaled(with_places)} with all places"
    )


def _places(sparse: Sparse, stack: str, length: int, batch_size: int) -> str:
    """Returns what an expert takes of a group in training, and what cannot fit."""
    tokens, experts = length, sparse.num_experts
    if sparse.group != "row":
        multiple = partitioning.data_parallelism() * experts
        rows, columns = dispatch.group_padding(batch_size, length, multiple)
        total = (batch_size + rows) * (length + columns)
        tokens = total // dispatch.num_groups(total, int(sparse.group), multiple)
    places = sparse.group_capacity(tokens, deterministic=False)
    if sparse.routing == "experts" and stack == "encoder":
        assert places is not None
        clipped = f" (clipped from {places})" if places > tokens else ""
        return f"an expert chooses {min(places, tokens)} of {tokens} tokens{clipped}"
    if places is None or places >= tokens:
        return f"an expert takes all of {tokens} tokens"
    text = f"an expert takes up to {places} of {tokens} tokens"
    assignments = sparse.top_k * tokens
    if (left := assignments - experts * places) > 0:
        text += f", at least {format_share(left, assignments)} of assignments are dropped"
    return text
