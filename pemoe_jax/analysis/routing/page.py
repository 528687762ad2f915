"""Routing results as files: one self-contained HTML page, Markdown, JSON, CSV and pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pemoe_jax.analysis import plots, tables
from pemoe_jax.analysis.routing import measure, metrics, specialization
from pemoe_jax.analysis.routing import plots as routing_plots
from pemoe_jax.analysis.routing import tables as routing_tables
from pemoe_jax.analysis.routing.metrics import ProbeResult
from pemoe_jax.runtime.file_io import AnyPath

if TYPE_CHECKING:
    import jinja2

# Kind of a picture, as at the end of its file name -> its alternative text.
_ALT = {
    "map": "Map: mean probability of each expert for each task",
    "load": "Load of the experts of sparse layers, and drops",
    "entropy": "Entropy of the routers by layer",
    "tasks": "Dendrogram of tasks by the distance of their routing",
}


def draw_plots(result: ProbeResult, folder: AnyPath) -> None:
    """Writes <run>_map.png, <run>_entropy.png, <run>_load.png and <run>_tasks.png.

    The picture of loads is drawn only for a model with sparse layers, and that of tasks, a
    dendrogram, only for several tasks.
    """
    name = result.run["name"]
    means = measure.mean_probs(result.totals, result.task_names)
    plots.routing_map(
        {site: means[site] for site in result.sites},
        _png(result, folder, "map"),
        trained=result.trained_tasks,
        # The narrowest scale that fits: soft routers may differ from uniform by a few percent.
        max_ratio=None,
        title=f"Where tasks are routed: {name}",
        quantity=routing_tables.value_name(result),
    )
    routing_plots.plot_entropies(
        metrics.router_entropies(result),
        _png(result, folder, "entropy"),
        title=f"Entropy of the routers by layer: {name}",
    )
    if loads := metrics.sparse_loads(result):
        routing_plots.plot_loads(
            loads,
            _png(result, folder, "load"),
            title=f"Load of the experts in training: {name}",
        )
    if len(result.tasks) > 1:
        routing_plots.plot_dendrogram(
            metrics.task_distances(result),
            result.task_names,
            _png(result, folder, "tasks"),
            trained=result.trained_tasks,
            title=f"Which tasks are routed alike: {name}",
        )


def _png(result: ProbeResult, folder: AnyPath, kind: str) -> AnyPath:
    return folder / f"{result.run['name']}_{kind}.png"


def _picture_kinds(result: ProbeResult) -> list[str]:
    """Returns the keys of `_ALT` for which `draw_plots` draws a picture."""
    missing = {"tasks"} if len(result.tasks) < 2 else set()
    missing |= {"load"} if not result.dispatch else set()
    return [kind for kind in _ALT if kind not in missing]


def render_files(results: Sequence[ProbeResult], folder: AnyPath) -> dict[str, str]:
    """Returns {file name: content}; `draw_plots` must have written the pictures to `folder`."""
    return {
        "routes.html": to_html(results, folder),
        "routes.md": to_markdown(results, folder),
        "routes.json": routing_tables.to_json(results),
        "routes.csv": routing_tables.distributions_csv(results),
        "distances.csv": routing_tables.distances_csv(results),
        **(
            {"loads.csv": routing_tables.loads_csv(results)}
            if any(result.dispatch for result in results)
            else {}
        ),
    }


# --- HTML ---


def to_html(results: Sequence[ProbeResult], folder: AnyPath) -> str:
    """Returns the HTML page; it embeds the pictures, so the file can be sent on its own."""
    return _template().render(
        title="What the experts do: " + ", ".join(str(r.run["name"]) for r in results),
        runs=routing_tables.runs_table(results),
        sections=[_section(i, result, folder) for i, result in enumerate(results, 1)],
        distance=metrics.DISTANCE_DEFINITION,
    )


def _template() -> jinja2.Template:
    # Imported here, like matplotlib in `plots`, so that `pemoe routes --help` stays fast.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of tasks and tokens come from data
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a misspelled name raises instead of printing nothing
    )
    return environment.get_template("page.html")


def _section(number: int, result: ProbeResult, folder: AnyPath) -> dict[str, object]:
    """Returns the values that the template needs for a run."""
    return {
        "anchor": f"run-{number}",
        "name": result.run["name"],
        "checkpoint": result.run["checkpoint"],
        "quantity": routing_tables.value_name(result),
        "pictures": {
            kind: _picture(_png(result, folder, kind), kind) for kind in _picture_kinds(result)
        },
        "site_tables": routing_tables.site_tables(result),
        "load_tables": _load_tables(result),
        "entropies": routing_tables.entropy_table(result),
        "specialization": _specialization_table(result),
        "nearest": routing_tables.nearest_table(result),
        "top_tokens": {site: metrics.top_tokens(result, site) for site in result.sites},
        "min_count": result.min_count,
    }


def _load_tables(result: ProbeResult) -> list[tables.Table]:
    load_tables = routing_tables.load_table(result), routing_tables.assignment_table(result)
    return [table for table in load_tables if table is not None]


def _specialization_table(result: ProbeResult) -> tables.Table | None:
    return specialization.to_table(specialization.measure(result))


def _picture(png: AnyPath, kind: str) -> dict[str, object]:
    """Returns a picture as a data URI, with its width in CSS pixels and its alternative text."""
    content = png.read_bytes()
    width = int.from_bytes(content[16:20], "big")  # pixels, from PNG's first chunk, IHDR
    # CSS has 96 pixels per inch, fewer than the file: dense displays and print show all pixels.
    return {
        "uri": "data:image/png;base64," + base64.b64encode(content).decode(),
        "width": round(width * 96 / plots.PIXELS_PER_INCH),
        "alt": _ALT[kind],
    }


# --- text ---


def to_markdown(results: Sequence[ProbeResult], folder: AnyPath) -> str:
    """Returns the tables as Markdown, with links to the pictures in the same folder."""
    parts = ["# What the experts do", tables.markdown_table(routing_tables.runs_table(results))]
    for result in results:
        parts.append(f"# {result.run['name']}")
        for kind in _picture_kinds(result):
            parts.append(f"![{_ALT[kind]}]({_png(result, folder, kind).name})")
        nearest = routing_tables.nearest_table(result)
        specialization_table = _specialization_table(result)
        for table in [
            *routing_tables.site_tables(result).values(),
            *([specialization_table] if specialization_table else []),
            *_load_tables(result),
            routing_tables.entropy_table(result),
            *([nearest] if nearest else []),
            *routing_tables.token_tables(result),
        ]:
            parts += [f"## {table.title}", tables.markdown_table(table), *table.notes]
        parts += [
            f"Distance: {metrics.DISTANCE_DEFINITION}.",
            f"Tokens by expert: the tokens that occur at least {result.min_count} times and have a"
            " mean probability of the expert above 1/E.",
        ]
    return "\n\n".join(parts) + "\n"


def summary(results: Sequence[ProbeResult]) -> str:
    """Returns the lines that `pemoe routes` prints: the entropies at each run's sites."""
    lines = []
    for result in results:
        routers = [r for r in metrics.router_entropies(result) if r.site in result.sites]
        width = max(len(router.site) for router in routers)
        lines.append(
            f"{result.run['name']}: mean entropy of a token and entropy of the mean, as fractions"
            " of log E; distance between tasks in bits"
        )
        lines += [
            f"  {router.site:<{width}}  {router.token_entropy:.3f}  {router.mean_entropy:.3f}"
            f"  {router.task_bits:.4f}"
            for router in routers
        ]
        # One entry for each group of tasks. If the sites are all sites of a layer, the layer has
        # equal entries, which the dict drops.
        entries = dict.fromkeys(
            entry for entry in specialization.measure(result) if entry.sites == tuple(result.sites)
        )
        lines += [
            f"  information on the task, {entry.tasks} tasks {entry.group}: {entry.bits:.4f} bits"
            f" (shuffled {entry.shuffled_mean:.4f}, 95 % below {entry.shuffled_high:.4f})"
            for entry in entries
        ]
    return "\n".join(lines)
