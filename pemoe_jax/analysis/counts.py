"""Tables of parameter counts: what trains, of how many, at which sites, and what papers print.

Everything is read off paths and shapes (`encoder/layers_0/mlp/gate_adapter/router/kernel`), so a
count of any configuration needs no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pemoe_jax.analysis import paper, tables
from pemoe_jax.analysis.layout import print_tables as print_tables
from pemoe_jax.analysis.layout import to_markdown as to_markdown
from pemoe_jax.core.adapters import SITES

_NOTE_ON_SHARE = (
    "share: trainable / total, where total is base and adapters together, as in a run's summary;"
    " of base: trainable / base."
)
_READS = {"VectorExperts": "y", "LoRAExperts": "x"}  # what their routers read by default
_NOTE_ON_SITES = "Sites count vectors or pairs, in all blocks; routers are those of all sites."
# The arithmetic is in tests/tools/test_count.py. 9.1M: the code of arXiv 2205.05638 (r-three/t-few,
# configs/lora.json) adapts every linear layer and trains the norms, 9,097,216 parameters at XL.
_NOTE_ON_PRINTED = (
    "paper: what arXiv 2309.05444 prints for T5 3B and 11B, read in a note on it (Krebbet/wiki-kit"
    " on GitHub); – where no source was found. The figure for 11B is this count over 11·10⁹. Those"
    " for 3B fit (E · n + 4.2M) / 3·10⁹, without routers n / 3·10⁹, where n is what arXiv"
    " 2205.05638 states for one adapter: 0.54M for (IA)³, 9.1M for a LoRA that has wi_1 and the"
    " norms too. So their router part does not grow with E; in the paper's code it does, by a"
    " kernel [features, E] a site, and its modules have the counts of this table."
)


@dataclass(frozen=True)
class Site:
    """Trainable parameters of one site, all blocks together.

    Attributes:
      blocks: in how many attention or MLP blocks it is.
      experts: of vectors or pairs.
      router: of the routers beside them.
    """

    blocks: int
    experts: int
    router: int


@dataclass(frozen=True)
class Count:
    """Parameters of one model with its adapters.

    Attributes:
      method: its name with experts and rank, as 'mov-30' or 'molora-10 r4'.
      trainable, total: of base and adapters together.
      base: parameters of the base.
      sites: in the order of `core.adapters.SITES`, those where something trains.
    """

    method: str
    trainable: int
    total: int
    base: int
    sites: dict[str, Site]

    @property
    def routers(self) -> int:
        """Of all sites."""
        return sum(site.router for site in self.sites.values())

    @property
    def rest(self) -> int:
        """Trainable parameters of the base."""
        return self.trainable - self.routers - sum(site.experts for site in self.sites.values())


def count(shapes: Mapping[str, Any], trainable: Collection[str], method: str) -> Count:
    """Counts a model.

    Args:
      shapes: path -> anything with a shape, of all parameters.
      trainable: the paths that train.
      method: its name.
    """
    experts: Counter[str] = Counter()
    routers: Counter[str] = Counter()
    blocks: dict[str, set[str]] = {}
    base = 0
    for path, leaf in shapes.items():
        found = tables.ADAPTER.search(path)
        if not found:
            base += _size(leaf)
        elif path in trainable:
            (routers if found.group(2) else experts)[found.group(1)] += _size(leaf)
            blocks.setdefault(found.group(1), set()).add(path[: found.end(1)])
    return Count(
        method=label(method, shapes),
        trainable=sum(_size(shapes[path]) for path in trainable),
        total=sum(map(_size, shapes.values())),
        base=base,
        sites={
            site: Site(len(blocks[site]), experts[site], routers[site])
            for site in SITES
            if site in blocks
        },
    )


def by_method(name: str, counts: Sequence[Count]) -> list[tables.Table]:
    """A row a method: trainable, total, share and the papers' figures; then the sites."""
    printed = [_printed(one) for one in counts]
    summary = tables.Table(
        f"{name}: a base of {counts[0].base:,} parameters",
        ["method", "trainable", "total", "share", "of base", *(["paper"] if any(printed) else [])],
        [
            [one.method, _number(one.trainable), _number(one.total)]
            + [_share(one.trainable, one.total), _share(one.trainable, one.base)]
            + ([figure or tables.NONE] if any(printed) else [])
            for one, figure in zip(counts, printed, strict=True)
        ],
        notes=[_NOTE_ON_SHARE, *([_NOTE_ON_PRINTED] if any(printed) else [])],
    )
    return [summary, *_at_sites(name, [one for one in counts if one.sites])]


def by_site(name: str, one: Count) -> list[tables.Table]:
    """The same table for one model, and a row a site."""
    summary = by_method(name, [one])[0]
    rows = [
        [site, str(found.blocks), _number(found.experts), _number(found.router)]
        + [_number(found.experts + found.router)]
        for site, found in one.sites.items()
    ]
    if one.rest:
        rows.append(["base", "", "", "", _number(one.rest)])
    experts = sum(found.experts for found in one.sites.values())
    together = ["together", "", _number(experts), _number(one.routers), _number(one.trainable)]
    columns = ["site", "blocks", "experts", "routers", "trainable"]
    at_sites = tables.Table(f"{name}: trainable at each site", columns, rows, below=[together])
    return [summary, at_sites] if one.sites else [summary]


def _at_sites(name: str, counts: Sequence[Count]) -> list[tables.Table]:
    if not counts:
        return []
    sites = [site for site in SITES if any(site in one.sites for one in counts)]
    beside = ["base"] if any(one.rest for one in counts) else []
    rows = [
        [one.method]
        + [_number(one.sites[site].experts) if site in one.sites else tables.NONE for site in sites]
        + [_number(one.routers)]
        + [_number(one.rest) for _ in beside]
        for one in counts
    ]
    title = f"{name}: trainable at each site"
    return [
        tables.Table(title, ["method", *sites, "routers", *beside], rows, notes=[_NOTE_ON_SITES])
    ]


def label(
    method: str, shapes: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The method with its experts, rank and routing: 'mov-10 top-2'; several where sites differ.

    Args:
      method: its name.
      shapes: path -> anything with a shape, of all parameters.
      adapters: as `core.adapters.describe` gives them; None: nothing is said of the routing.
    """

    def sizes(ending: str) -> str:
        leaves = {leaf.shape[-1] for path, leaf in shapes.items() if path.endswith(ending)}
        return "/".join(map(str, sorted(leaves)))

    experts, rank = sizes("_adapter/router/kernel"), sizes("_adapter/lora_a")
    named = method + (f"-{experts}" if experts else "") + (f" r{rank}" if rank else "")
    return f"{named} {routing(adapters or {})}".rstrip()


def routing(adapters: Mapping[str, Mapping[str, Any]]) -> str:
    """What is unlike the paper's soft routing: 'top-2 balanced', 'sentence'; '' where nothing is.

    Args:
      adapters: as `core.adapters.describe` gives them.
    """
    found = [
        _routing(adapter["router"], _READS[adapter["kind"]])
        for adapter in adapters.values()
        if adapter.get("router")
    ]
    return "/".join(one or "soft" for one in dict.fromkeys(found)) if any(found) else ""


def _routing(router: Mapping[str, Any], reads: str) -> str:
    """Of one router; `reads` is what it reads unless it says otherwise."""

    def unless(name: str, usual: float, word: str, shipped: float) -> str:
        value = router.get(name, usual)
        return "" if value == usual else word if value == shipped else f"{word} {value:g}"

    words = [
        f"top-{router['top_k']}" if router.get("top_k") else "",
        "renormalized" if router.get("renormalize") else "",
        "straight-through" if router.get("straight_through") else "",
        unless("balance_loss", 0.0, "balanced", 1e-2),
        unless("z_loss", 0.0, "z-loss", 1e-3),
        unless("jitter_noise", 0.0, "jitter", 1e-2),
        unless("temperature", 1.0, "temperature", 1.0),
        router["reads"] if router.get("reads") not in (None, reads) else "",
    ]
    return " ".join(filter(None, words))


def _printed(one: Count) -> str | None:
    figure = paper.SHARES.get((one.base, one.method, tuple(one.sites)))
    adapters_alone = one.rest == 0 and one.trainable == one.total - one.base
    return f"{figure} %" if figure and adapters_alone else None


def _share(part: int, whole: int) -> str:
    """Three digits: the smallest differences between papers and code show, and 100 % is all."""
    if part == whole:
        return "100 %"
    return f"{100 * part / whole:#.3g} %".replace(". %", " %")


def _number(count: int) -> str:
    return f"{count:,}" if count else tables.NONE


def _size(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))
