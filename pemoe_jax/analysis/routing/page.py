"""What routers did as one HTML page that holds its pictures, as Markdown, and as files."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pemoe_jax.analysis import plots, tables
from pemoe_jax.analysis.routing import metrics
from pemoe_jax.analysis.routing import plots as plots_lib
from pemoe_jax.analysis.routing import tables as tables_lib
from pemoe_jax.analysis.routing.metrics import ProbeResult
from pemoe_jax.analysis.tables import Table

_DPI = 150  # of the pictures, see `plots.pyplot`; a page has 96 pixels an inch
_MAP, _ENTROPY, _TREE = "map", "entropy", "tasks"
_ALT = {
    _MAP: "Map: mean probability of each expert for each task",
    _ENTROPY: "Entropy of the routers by layer",
    _TREE: "Tree of tasks by the distance of their routing",
}


def draw_plots(routing: ProbeResult, folder: Path) -> None:
    """Writes <run>_map.png, <run>_entropy.png and, of several tasks, <run>_tasks.png."""
    name = routing.about["name"]
    plots.routing_map(
        {
            site: dict(
                zip(routing.names, metrics.mean_distributions(routing.totals, site), strict=True)
            )
            for site in routing.sites
        },
        _png(routing, folder, _MAP),
        seen=routing.seen,
        fold=None,
        title=f"Where tasks are routed: {name}",
        measure=tables_lib.value_name(routing),
    )
    plots_lib.plot_entropies(
        metrics.router_entropies(routing),
        _png(routing, folder, _ENTROPY),
        title=f"Entropy of the routers by layer: {name}",
    )
    if len(routing.tasks) > 1:
        plots_lib.plot_dendrogram(
            metrics.task_distances(routing),
            routing.names,
            _png(routing, folder, _TREE),
            seen=routing.seen,
            title=f"Which tasks are routed alike: {name}",
        )


def _png(routing: ProbeResult, folder: Path, kind: str) -> Path:
    return folder / f"{routing.about['name']}_{kind}.png"


def _kinds(routing: ProbeResult) -> list[str]:
    return [_MAP, _ENTROPY, *([_TREE] if len(routing.tasks) > 1 else [])]


def render_files(routings: Sequence[ProbeResult], folder: Path) -> dict[str, str]:
    """{name: content} of the files beside the pictures, which `draw` has written to the folder."""
    return {
        "routes.html": to_html(routings, folder),
        "routes.md": to_markdown(routings, folder),
        "routes.json": tables_lib.to_json(routings),
        "routes.csv": tables_lib.distributions_csv(routings),
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
class RunSection:
    """A run's part of the page."""

    anchor: str
    name: str
    checkpoint: str
    measure: str
    pictures: Mapping[str, Picture]
    by_site: Mapping[str, Table]
    entropies: Table
    nearest: Table | None
    top_tokens: Mapping[str, list[tuple[int, list[metrics.TopToken]]]]
    min_count: int


def to_html(routings: Sequence[ProbeResult], folder: Path) -> str:
    """The page; nothing in it is read from anywhere else."""
    page: str = _template().render(
        title="What the experts do: " + ", ".join(str(one.about["name"]) for one in routings),
        runs=tables_lib.runs_table(routings),
        parts=[_part(i, one, folder) for i, one in enumerate(routings)],
        distance=metrics.DISTANCE_DEFINITION,
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


def _part(number: int, routing: ProbeResult, folder: Path) -> RunSection:
    return RunSection(
        anchor=f"run-{number + 1}",
        name=str(routing.about["name"]),
        checkpoint=str(routing.about["checkpoint"]),
        measure=tables_lib.value_name(routing),
        pictures={kind: _picture(_png(routing, folder, kind), kind) for kind in _kinds(routing)},
        by_site=tables_lib.site_tables(routing),
        entropies=tables_lib.entropy_table(routing),
        nearest=tables_lib.nearest_table(routing),
        top_tokens={
            site: list(enumerate(metrics.top_tokens(routing, site), 1)) for site in routing.sites
        },
        min_count=routing.min_count,
    )


def _picture(png: Path, kind: str) -> Picture:
    content = png.read_bytes()
    pixels = int.from_bytes(content[16:20], "big")  # of PNG's first chunk, IHDR
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return Picture(uri, round(pixels * 96 / _DPI), _ALT[kind])


# --- as text


def to_markdown(routings: Sequence[ProbeResult], folder: Path) -> str:
    """The tables, and links to the pictures beside."""
    parts = ["# What the experts do", tables.markdown_table(tables_lib.runs_table(routings))]
    for one in routings:
        parts.append(f"# {one.about['name']}")
        for kind in _kinds(one):
            parts.append(f"![{_ALT[kind]}]({_png(one, folder, kind).name})")
        near = tables_lib.nearest_table(one)
        found = [
            *tables_lib.site_tables(one).values(),
            tables_lib.entropy_table(one),
            *([near] if near else []),
            *map(_in_code, tables_lib.token_tables(one).values()),
        ]
        for table in found:
            parts += [f"## {table.title}", tables.markdown_table(table), *table.notes]
        parts.append(f"Distance: {metrics.DISTANCE_DEFINITION}.")
        parts.append(f"Tokens: those met {one.min_count} times at least, with shares above 1/E.")
    return "\n\n".join(parts) + "\n"


def _in_code(table: Table) -> Table:
    """Tokens as code: Markdown would take `<start>` for a tag and `*` for emphasis."""
    rows = [[number, "`" + tokens.replace("`", "'") + "`"] for number, tokens in table.rows]
    return Table(table.title, table.columns, rows)


def summary(routings: Sequence[ProbeResult]) -> str:
    """What the command prints: of each run how decided its routers are at the sites looked at."""
    lines = []
    for one in routings:
        at = [layer for layer in metrics.router_entropies(one) if layer.site in one.sites]
        width = max(len(layer.site) for layer in at)
        lines.append(f"{one.about['name']}: entropy of each token, of the mean; bits by task")
        lines += [
            f"  {layer.site:<{width}}  {layer.token_entropy:.3f}  {layer.mean_entropy:.3f}"
            f"  {layer.task_bits:.4f}"
            for layer in at
        ]
    return "\n".join(lines)
