"""What routers did as one HTML page that holds its pictures, as Markdown, and as files."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pemoe_jax.analysis import plots, tables
from pemoe_jax.analysis.routing import numbers
from pemoe_jax.analysis.routing import plots as plots_lib
from pemoe_jax.analysis.routing import tables as tables_lib
from pemoe_jax.analysis.routing.numbers import Routing
from pemoe_jax.analysis.tables import Table

_DPI = 150  # of the pictures, see `plots.pyplot`; a page has 96 pixels an inch
_MAP, _ENTROPY, _TREE = "map", "entropy", "tasks"
_ALT = {
    _MAP: "Map: mean probability of each expert for each task",
    _ENTROPY: "Entropy of the routers by layer",
    _TREE: "Tree of tasks by the distance of their routing",
}


def draw(routing: Routing, folder: Path) -> None:
    """Writes <run>_map.png, <run>_entropy.png and, of several tasks, <run>_tasks.png."""
    name = routing.about["name"]
    plots.routing_map(
        {
            site: dict(zip(routing.names, numbers.shares(routing.sums, site), strict=True))
            for site in routing.sites
        },
        _png(routing, folder, _MAP),
        seen=routing.seen,
        fold=None,
        title=f"Where tasks are routed: {name}",
        measure=tables_lib.measure(routing),
    )
    plots_lib.entropies(
        numbers.layers(routing),
        _png(routing, folder, _ENTROPY),
        title=f"Entropy of the routers by layer: {name}",
    )
    if len(routing.tasks) > 1:
        plots_lib.dendrogram(
            numbers.distances(routing),
            routing.names,
            _png(routing, folder, _TREE),
            seen=routing.seen,
            title=f"Which tasks are routed alike: {name}",
        )


def _png(routing: Routing, folder: Path, kind: str) -> Path:
    return folder / f"{routing.about['name']}_{kind}.png"


def _kinds(routing: Routing) -> list[str]:
    return [_MAP, _ENTROPY, *([_TREE] if len(routing.tasks) > 1 else [])]


def texts(routings: Sequence[Routing], folder: Path) -> dict[str, str]:
    """{name: content} of the files beside the pictures, which `draw` has written to the folder."""
    return {
        "routes.html": to_html(routings, folder),
        "routes.md": to_markdown(routings, folder),
        "routes.json": tables_lib.to_json(routings),
        "routes.csv": tables_lib.to_csv(routings),
        "distances.csv": tables_lib.distances_csv(routings),
    }


# --- the page


@dataclass(frozen=True)
class Picture:
    """A PNG file as a data URI; width in the page's pixels."""

    uri: str
    width: int
    alt: str


@dataclass(frozen=True)
class Part:
    """A run's part of the page."""

    anchor: str
    name: str
    checkpoint: str
    measure: str
    pictures: Mapping[str, Picture]
    by_site: Mapping[str, Table]
    entropies: Table
    nearest: Table | None
    top_tokens: Mapping[str, list[tuple[int, list[numbers.Token]]]]
    min_count: int


def to_html(routings: Sequence[Routing], folder: Path) -> str:
    """The page; nothing in it is read from anywhere else."""
    page: str = _template().render(
        title="What the experts do: " + ", ".join(str(one.about["name"]) for one in routings),
        runs=tables_lib.about(routings),
        parts=[_part(i, one, folder) for i, one in enumerate(routings)],
        distance=numbers.DISTANCE,
        text_columns=tables.TEXT_COLUMNS,
    )
    return page


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html")


def _part(number: int, routing: Routing, folder: Path) -> Part:
    return Part(
        anchor=f"run-{number + 1}",
        name=str(routing.about["name"]),
        checkpoint=str(routing.about["checkpoint"]),
        measure=tables_lib.measure(routing),
        pictures={kind: _picture(_png(routing, folder, kind), kind) for kind in _kinds(routing)},
        by_site=tables_lib.by_site(routing),
        entropies=tables_lib.entropies(routing),
        nearest=tables_lib.nearest(routing),
        top_tokens={
            site: list(enumerate(numbers.top_tokens(routing, site), 1)) for site in routing.sites
        },
        min_count=routing.min_count,
    )


def _picture(png: Path, kind: str) -> Picture:
    content = png.read_bytes()
    pixels = int.from_bytes(content[16:20], "big")  # of PNG's first chunk, IHDR
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return Picture(uri, round(pixels * 96 / _DPI), _ALT[kind])


# --- as text


def to_markdown(routings: Sequence[Routing], folder: Path) -> str:
    """The tables, and links to the pictures beside."""
    parts = ["# What the experts do", tables.markdown_table(tables_lib.about(routings))]
    for one in routings:
        parts.append(f"# {one.about['name']}")
        for kind in _kinds(one):
            parts.append(f"![{_ALT[kind]}]({_png(one, folder, kind).name})")
        near = tables_lib.nearest(one)
        found = [
            *tables_lib.by_site(one).values(),
            tables_lib.entropies(one),
            *([near] if near else []),
            *map(_in_code, tables_lib.top_tokens(one).values()),
        ]
        for table in found:
            parts += [f"## {table.title}", tables.markdown_table(table), *table.notes]
        parts.append(f"Distance: {numbers.DISTANCE}.")
        parts.append(f"Tokens: those met {one.min_count} times at least, with shares above 1/E.")
    return "\n\n".join(parts) + "\n"


def _in_code(table: Table) -> Table:
    """Tokens as code: Markdown would take `<start>` for a tag and `*` for emphasis."""
    rows = [[number, "`" + tokens.replace("`", "'") + "`"] for number, tokens in table.rows]
    return Table(table.title, table.columns, rows)


def summary(routings: Sequence[Routing]) -> str:
    """What the command prints: of each run how decided its routers are at the sites looked at."""
    lines = []
    for one in routings:
        at = [layer for layer in numbers.layers(one) if layer.site in one.sites]
        width = max(len(layer.site) for layer in at)
        lines.append(f"{one.about['name']}: entropy of each token, of the mean; bits by task")
        lines += [
            f"  {layer.site:<{width}}  {layer.per_token:.3f}  {layer.of_mean:.3f}"
            f"  {layer.between_tasks:.4f}"
            for layer in at
        ]
    return "\n".join(lines)
