"""Counts parameters in total, at each site and per token, next to the figures that papers publish.

Counts need only the parameters' paths (`encoder/layers_0/mlp/gate_adapter/router/kernel`) and their
shapes, so a model of any size is counted without its weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pemoe_jax.analysis import published_numbers
from pemoe_jax.analysis.planning import flops
from pemoe_jax.analysis.tables import MISSING, Table, format_scaled, format_share
from pemoe_jax.core.adapters import SITES
from pemoe_jax.core.routing import EXPERTS_SITE

if TYPE_CHECKING:
    from pemoe_jax.core.sparse import Sparse

# Groups of the match: the site, and "router/" if the parameter is the router's.
_ADAPTER_PATH = re.compile(r"(?:^|/)(\w+)_adapter/(router/)?")
# Experts and router of a sparse MLP, whose parameters are named as in T5X's sparse models.
_SPARSE_PATH = re.compile(r".*?/mlp/(?:expert|(router))/")
_SPARSE_ROUTER = "/mlp/router/router_weights/w/kernel"
_SITES = (*SITES, EXPERTS_SITE)
# Sites of dense MLPs. A layer with a sparse MLP has adapters at the sites of its attention only.
MLP_SITES = ("wi_0", "wi_1", "gate", "wo")
# The default of `Router.reads` in each expert module.
_DEFAULT_READS = {"VectorExperts": "y", "LoRAExperts": "x"}

_NOTE_ON_SHARE = (
    "share: trainable / total, where total is base and adapters together, as in a run's summary;"
    " of base: trainable / base."
)
_NOTE_ON_SPARSE_BASE = (
    "The base of a sparse model is the dense model with one expert in each sparse layer, without"
    " routers."
)
_NOTE_ON_DENSE_LAYERS = (
    "On a sparse model, adapters of MLP sites are in its dense layers alone, those of attention in"
    " all layers."
)
# tests/tools/test_count.py checks the arithmetic of this note. The 9.1M of arXiv 2205.05638 are
# 9,097,216 parameters at XL: the code of that paper (r-three/t-few, configs/lora.json) adapts every
# linear layer and trains the norms.
_NOTE_ON_PUBLISHED = (
    "paper: the figure that arXiv 2309.05444 prints for T5 3B and 11B, quoted from a summary of it"
    " (Krebbet/wiki-kit on GitHub); '–' if no source has it. The figure for 11B is this count"
    " divided by 11·10⁹. Those for 3B equal (E·n + 4.2M) / (3·10⁹), or n / (3·10⁹) without routers,"
    " where n is what arXiv 2205.05638 states for one adapter: 0.54M for (IA)³, and 9.1M for a LoRA"
    " that adapts every linear layer (wi_1 too) and trains the norms. Their router part does not"
    " grow with E. In the paper's code it does, by a kernel [features, E] at each site, and the"
    " modules of that code have the counts of this table."
)


class HasShape(Protocol):
    """An array, or an abstract array such as `jax.ShapeDtypeStruct`."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteCount:
    """Trainable parameters at a site, summed over the blocks that have it.

    A block is the attention or the MLP of a layer; a decoder layer has two attention blocks.

    Attributes:
      blocks: number of blocks with trainable parameters at the site.
      experts: parameters of the experts: vectors, LoRA pairs or whole MLPs.
      router: parameters of the routers.
    """

    blocks: int
    experts: int
    router: int


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model with its adapters.

    Attributes:
      method: name with experts and rank, such as 'mov-30' or 'molora-10 r4'.
      trainable: trainable parameters, of the base and the adapters.
      total: parameters of the base and the adapters.
      base: parameters of the base; a sparse one is counted with one expert in each sparse layer.
      sites: site -> its counts, for the sites with trainable parameters. They are in the order of
        `adapters.SITES`; sparse layers, the site 'mlp/experts', come last.
      used: parameters that a token uses.
      flops: forward FLOPs of an input token and a target token together: with the experts that they
        use, and with all places of the experts; see `flops.token_flops`.
      is_sparse: whether the model has sparse layers.
    """

    method: str
    trainable: int
    total: int
    base: int
    sites: dict[str, SiteCount]
    used: int = 0
    flops: tuple[int, int] = (0, 0)
    is_sparse: bool = False

    @property
    def routers(self) -> int:
        """Parameters of the routers of all sites."""
        return sum(site.router for site in self.sites.values())

    @property
    def trainable_base(self) -> int:
        """Trainable parameters of the base."""
        return self.trainable - self.routers - sum(site.experts for site in self.sites.values())


def count_parameters(
    shapes: Mapping[str, HasShape],
    trainable: Collection[str],
    method: str,
    sparse: Sparse | None = None,
    router_reads: Mapping[str, str | None] | None = None,
) -> ParameterCount:
    """Counts the parameters of a model.

    Args:
      shapes: path -> array or shape of every parameter.
      trainable: paths of the parameters that train.
      method: name of the method, without experts and rank.
      sparse: settings of the sparse layers; None for a dense model.
      router_reads: `flops.describe_router_reads` of the adapters; None: every router has the
        default of its module.
    """
    experts: Counter[str] = Counter()
    routers: Counter[str] = Counter()
    blocks: dict[str, set[str]] = {}
    base = 0
    for path, leaf in shapes.items():
        size = math.prod(leaf.shape)
        match = _ADAPTER_PATH.search(path)
        if match:
            site, is_router, block = match[1], bool(match[2]), path[: match.end(1)]
        elif match := _SPARSE_PATH.match(path):
            site, is_router, block = EXPERTS_SITE, bool(match[1]), path.partition("/mlp/")[0]
            # Kernels of experts are stacked, [E, ...]: the dense base has one kernel.
            base += 0 if is_router else size // leaf.shape[0]
        else:
            # The dense base lacks the MLP that EXTRA_MLP adds after each sparse one.
            base += 0 if "extra_mlp" in path else size
            continue
        if path in trainable:
            (routers if is_router else experts)[site] += size
            blocks.setdefault(site, set()).add(block)
    return ParameterCount(
        method=method_label(method, shapes),
        trainable=sum(math.prod(shapes[path].shape) for path in trainable),
        total=sum(math.prod(leaf.shape) for leaf in shapes.values()),
        base=base,
        sites={
            site: SiteCount(len(blocks[site]), experts[site], routers[site])
            for site in _SITES
            if site in blocks
        },
        used=flops.used_parameters(shapes, sparse),
        flops=flops.token_flops(shapes, router_reads or {}, sparse),
        is_sparse=sparse is not None,
    )


def method_tables(name: str, counts: Sequence[ParameterCount]) -> list[Table]:
    """Returns a table of methods on one base, and one of their parameters by site, if any have."""
    published = [_published_share(count) for count in counts]
    # Heading -> cells. Columns that no method needs are deleted below.
    columns = {
        "trainable": [_number(count.trainable) for count in counts],
        "total": [_number(count.total) for count in counts],
        "activated": [_number(count.used) for count in counts],
        "share": [_percent(count.trainable, count.total) for count in counts],
        "of base": [_percent(count.trainable, count.base) for count in counts],
        "FLOPs": [format_scaled(count.flops[0]) for count in counts],
        "with places": [format_scaled(count.flops[1]) for count in counts],
        "paper": [figure or MISSING for figure in published],
    }
    notes = {
        _NOTE_ON_SHARE: True,
        flops.NOTE_ON_TOKENS: any(count.is_sparse for count in counts),
        _NOTE_ON_SPARSE_BASE: any(count.is_sparse for count in counts),
        _NOTE_ON_DENSE_LAYERS: any(
            count.is_sparse and set(MLP_SITES) & set(count.sites) for count in counts
        ),
        _NOTE_ON_PUBLISHED: any(published),
    }
    if not any(published):
        del columns["paper"]
    if not any(count.is_sparse for count in counts):
        for column in ("activated", "FLOPs", "with places"):
            del columns[column]
    summary = Table(
        f"{name}: a base of {counts[0].base:,} parameters",
        ["method", *columns],
        [[count.method, *cells] for count, *cells in zip(counts, *columns.values(), strict=True)],
        notes=[note for note, applies in notes.items() if applies],
    )
    with_sites = [count for count in counts if count.sites]
    return [summary, _sites_by_method(name, with_sites)] if with_sites else [summary]


def site_tables(name: str, count: ParameterCount) -> list[Table]:
    """Returns a table of one method's totals, and one of its counts by site, if it has any."""
    summary = method_tables(name, [count])[0]
    if not count.sites:
        return [summary]
    rows = [
        [site, str(part.blocks)]
        + [_number(n) for n in (part.experts, part.router, part.experts + part.router)]
        for site, part in count.sites.items()
    ]
    if count.trainable_base:
        rows.append(["base", "", "", "", _number(count.trainable_base)])
    experts = sum(site.experts for site in count.sites.values())
    total = ["total", "", _number(experts), _number(count.routers), _number(count.trainable)]
    columns = ["site", "blocks", "experts", "routers", "trainable"]
    note = (
        "blocks: attention or MLP blocks with trainable parameters at the site; a decoder layer has"
        " two attention blocks."
    )
    title = f"{name}: trainable at each site"
    return [summary, Table(title, columns, rows, footer=[total], notes=[note])]


def method_label(
    method: str,
    shapes: Mapping[str, HasShape],
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
    sparse: Sparse | None = None,
) -> str:
    """Returns the method with its experts, rank and routing, such as 'mov-10 top-2'.

    Sizes that differ between sites are joined by a slash: 'molora-10 r4/8'. Adapters on a sparse
    base of eight experts are 'mov-10 on 8 experts'.

    Args:
      method: name of the method.
      shapes: path -> array or shape of every parameter.
      adapters: description by `core.adapters.describe`; None omits the routing of adapters.
      sparse: settings of the sparse layers; None omits their routing.
    """

    def joined_sizes(ending: str) -> str:
        sizes = {leaf.shape[-1] for path, leaf in shapes.items() if path.endswith(ending)}
        return "/".join(map(str, sorted(sizes)))

    # Router kernels are [features, E], and lora_a is [D, E, R].
    experts, rank = joined_sizes("_adapter/router/kernel"), joined_sizes("_adapter/lora_a")
    label = method + (f"-{experts}" if experts else "") + (f" r{rank}" if rank else "")
    label = f"{label} {routing_label(adapters or {})}".rstrip()
    if sparse_experts := joined_sizes(_SPARSE_ROUTER):
        has_adapters = any("_adapter/" in path for path in shapes)
        label += f" on {sparse_experts} experts" if has_adapters else f"-{sparse_experts}"
        if sparse is not None:
            label += " expert choice" if sparse.routing == "experts" else f" top-{sparse.top_k}"
    return label


def routing_label(adapters: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a label of the routing, such as 'top-2 balanced'; '' for the paper's soft routing."""
    labels = [
        _router_label(adapter["router"], _DEFAULT_READS[adapter["kind"]])
        for adapter in adapters.values()
        if adapter.get("router")
    ]
    # Equal labels are named once; 'soft' appears only next to another label.
    return "/".join(label or "soft" for label in dict.fromkeys(labels)) if any(labels) else ""


def parameter_summary(
    trainable: Mapping[str, HasShape],
    frozen: Mapping[str, HasShape],
    *,
    base: str,
    method: str,
    extra: Mapping[str, str] | None = None,
) -> str:
    """Returns the first lines of a run's log: base, method, and trainable parameters by site.

    Args:
      trainable: path -> array or shape of each parameter that trains.
      frozen: the same of all others.
      base: path and fingerprint of the base model.
      method: name of the method.
      extra: name -> text of further lines.
    """
    count = count_parameters({**trainable, **frozen}, trainable.keys(), method)
    share = format_share(count.trainable, count.total)
    lines = {
        "base": base,
        "method": method,
        "trainable": f"{count.trainable:,} of {count.total:,} parameters ({share}), "
        f"{len(trainable):,} of {len(trainable) + len(frozen):,} arrays",
    }
    if count.sites:
        sites = [f"{name} {site.experts:,}" for name, site in count.sites.items()]
        routers = [f"routers {count.routers:,}"] if count.routers else []
        lines["sites"] = " · ".join(sites + routers)
    lines |= extra or {}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _sites_by_method(name: str, counts: Sequence[ParameterCount]) -> Table:
    """Returns a table of trainable parameters, with a row per method and a column per site."""
    sites = [site for site in _SITES if any(site in count.sites for count in counts)]
    base = ["base"] if any(count.trainable_base for count in counts) else []
    rows = [
        [count.method]
        + [_number(count.sites[site].experts) if site in count.sites else MISSING for site in sites]
        + [_number(count.routers), *(_number(count.trainable_base) for _ in base)]
        for count in counts
    ]
    note = (
        "The columns of sites count the vectors, LoRA pairs or whole MLPs of all attention and MLP"
        " blocks; 'routers' counts the routers of all sites."
    )
    columns = ["method", *sites, "routers", *base]
    return Table(f"{name}: trainable at each site", columns, rows, notes=[note])


def _router_label(router: Mapping[str, Any], default_reads: str) -> str:
    """Returns the settings of a router that differ from the defaults; '' if none does."""

    def setting(name: str, default: float, word: str, usual: float) -> str:
        """Returns '' for the default, the bare word for the usual value, else word and value."""
        value = router.get(name, default)
        return "" if value == default else word if value == usual else f"{word} {value:g}"

    words = [
        f"top-{router['top_k']}" if router.get("top_k") else "",
        "renormalized" if router.get("renormalize") else "",
        "straight-through" if router.get("straight_through") else "",
        # The usual balance loss and jitter are those of Switch (arXiv 2101.03961), the usual z-loss
        # is that of ST-MoE (arXiv 2202.08906).
        setting("balance_loss", 0.0, "balanced", 1e-2),
        setting("z_loss", 0.0, "z-loss", 1e-3),
        setting("jitter_noise", 0.0, "jitter", 1e-2),
        setting("temperature", 1.0, "temperature", 1.0),
        router["reads"] if router.get("reads") not in (None, default_reads) else "",
    ]
    return " ".join(filter(None, words))


def _published_share(count: ParameterCount) -> str | None:
    """Returns the paper's share of trainable parameters for the same model, if it is known."""
    key = (count.base, count.method, tuple(count.sites))
    figure = published_numbers.TRAINABLE_SHARES.get(key)
    # A model whose norms train too has the same sites, but is not the paper's.
    only_adapters = count.trainable_base == 0 and count.trainable == count.total - count.base
    return f"{figure} %" if figure and only_adapters else None


def _percent(part: int, whole: int) -> str:
    """Returns a percentage with three significant digits, the most that published shares have."""
    percent = 100 * part / whole
    # From 999.5 on, the format below would write an exponent.
    if part == whole or percent >= 999.5:
        return f"{percent:,.0f} %"
    # '#' keeps trailing zeros, but also the point of "123.".
    return f"{percent:#.3g} %".replace(". %", " %")


def _number(count: int) -> str:
    return f"{count:,}" if count else MISSING
