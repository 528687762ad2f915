"""Plots of routing as PNG files: entropies by layer, loads of experts, a dendrogram of tasks.

`analysis.plots.routing_map` draws the map of tasks and experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.analysis import plots
from pemoe_jax.analysis.routing import probe
from pemoe_jax.analysis.routing.metrics import RouterEntropy, SparseLoad
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The name of a site sets the color (an index in `plots.COLORS`), its attention the line and marker,
# so that the keys of self- and cross-attention look related. Some names share a color, because
# there are fewer colors than names.
_COLOR = {"key": 0, "value": 1, "gate": 2, "query": 3, "out": 4, "wi_0": 5, "wi_1": 2, "wo": 6}
_COLOR |= {"experts": 6}  # the router of a sparse layer
# Sparse layers have their own line and marker, because `wo` of a dense layer has the same color.
_LINES = {"self": "-", "cross": (0, (4, 2)), "": "-", "experts": ":"}
_MARKERS = {"self": "o", "cross": "s", "": "D", "experts": "^"}
# For each row of panels: the field of `RouterEntropy` that it shows, and the text of its titles.
_ROWS = (
    ("token_entropy", "each token (low: few experts)"),
    ("mean_entropy", "mean over all (low: few experts)"),
)
_SPARSE_ROWS = (("token_entropy", "softmax of each token (low: certain)"), _ROWS[1])
_PLACED_COLOR, _DROPPED_COLOR = plots.COLORS[0], plots.COLORS[4]
_MAX_LOAD_WIDTH = 14  # inches


def plot_entropies(routers: Sequence[RouterEntropy], png: str | AnyPath, *, title: str) -> AnyPath:
    """Draws router entropies by layer.

    The encoder is on the left, the decoder on the right. The upper panels show the mean entropy of
    single tokens, the lower ones the entropy of the mean distribution.
    """
    plt = plots.import_pyplot()
    stacks = [stack for stack in probe.STACKS if any(r.stack == stack for r in routers)]
    kinds = list(dict.fromkeys(r.kind for r in routers))
    rows = _SPARSE_ROWS if kinds == ["experts"] else _ROWS
    legend_width = 0.55 + max(plots.text_width(kind, 9) for kind in kinds)
    width = max(0.9 + 3.2 * len(stacks) + legend_width, 0.5 + plots.text_width(title, 13))
    figure, axes = plt.subplots(
        2, len(stacks), sharey="row", squeeze=False, figsize=(width, 5.2), layout="constrained"
    )
    for column, stack in enumerate(stacks):
        for row, (attribute, meaning) in enumerate(rows):
            ax = axes[row, column]
            for kind in kinds:
                line = [r for r in routers if (r.stack, r.kind) == (stack, kind)]
                attention, _, name = kind.rpartition(" ")
                group = name if name == "experts" else attention
                style: dict[str, Any] = {"ls": _LINES[group], "marker": _MARKERS[group]}
                style |= {"color": plots.COLORS[_COLOR[name]], "ms": 4.5 if len(line) <= 12 else 3}
                if line:  # the encoder has no cross-attention
                    x, y = [r.layer for r in line], [getattr(r, attribute) for r in line]
                    ax.plot(x, y, label=kind, lw=1.6, **style)
            ax.axhline(1, color=plots.MUTED_COLOR, lw=0.8, ls=(0, (1, 2)))
            ax.set_title(f"{stack}, {meaning}", size=9.5, loc="left")
            ax.grid(color=plots.GRID_COLOR, lw=0.8)
            ax.set_axisbelow(True)
            ax.margins(x=0.08)
            # Otherwise, a single layer would have fractional ticks, and values near 1 an offset
            # such as 1e-3+1.
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            ax.ticklabel_format(axis="y", useOffset=False)
            ax.tick_params(labelsize=9)
        axes[-1, column].set_xlabel("layer", size=9)
    # Each row has its own scale, since token entropies may differ from 1 by only a thousandth. The
    # scale always ends just above 1. It spans at least 0.02: a shorter one would magnify noise.
    for (attribute, _), ax in zip(_ROWS, axes[:, 0], strict=True):
        lowest = min(getattr(r, attribute) for r in routers)
        bottom = max(-0.05, 1 - 1.15 * max(1 - lowest, 0.02))
        ax.set_ylim(bottom, 1 + 0.05 * (1 - bottom))
    figure.supylabel("entropy as a share of log E", size=9.5, color=plots.TEXT_COLOR)
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold", color=plots.TEXT_COLOR)
    # One legend for all panels, collected from all: only the decoder has kinds of cross-attention.
    handles: dict[str, object] = {}
    for ax in axes.flat:
        handles |= {line.get_label(): line for line in ax.get_legend_handles_labels()[0]}
    figure.legend(
        [handles[kind] for kind in kinds],
        kinds,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )
    return plots.save_figure(figure, png)


def plot_loads(loads: Sequence[SparseLoad], png: str | AnyPath, *, title: str) -> AnyPath:
    """Draws a panel for each sparse layer, encoder above decoder.

    Bars are the loads of the experts; the upper part of a bar is the load that is dropped. Experts
    that choose tokens have equal loads. Their panels therefore show the shares of tokens that have
    0, 1, … experts, with another color for the bar at 0.
    """
    plt = plots.import_pyplot()
    panel_width = float(np.clip(0.17 * len(loads[0].assigned), 1.7, 5.0))
    max_panels = max(1, int(_MAX_LOAD_WIDTH / (panel_width + 0.35)))
    lines = []  # lines of panels, each with at most max_panels layers of one stack
    for stack in probe.STACKS:
        layers = [load for load in loads if load.site.startswith(f"{stack}/")]
        line_count = max(1, -(-len(layers) // max_panels))
        size = max(1, -(-len(layers) // line_count))  # equal lengths if possible
        lines += [layers[i : i + size] for i in range(0, len(layers), size)]
    legend = _load_legend(loads)
    # Positions are in inches, so that panels keep their size for any number of layers.
    left, between, panel_height, pitch, top, bottom = 0.75, 0.35, 1.2, 2.25, 1.1, 1.0
    width = left + max(map(len, lines)) * (panel_width + between)
    legend_width = 0.5 + sum(0.5 + plots.text_width(label, 9) for label, _ in legend)
    width = max(width, legend_width, 0.5 + plots.text_width(title, 13))
    height = top + pitch * len(lines) - (pitch - panel_height) + bottom
    figure = plt.figure(figsize=(width, height))
    plots.draw_title(figure, title)
    for row, line in enumerate(lines):
        y = height - top - row * pitch - panel_height
        # All panels of a line share one scale. Panels of loads include the line of an even load, 1.
        limit = 1.08 * max(_load_bars(load)[0].max() for load in line)
        for column, load in enumerate(line):
            x = left + column * (panel_width + between)
            rect = (x / width, y / height, panel_width / width, panel_height / height)
            ax = figure.add_axes(rect)
            _draw_load(ax, load, max(limit, 0.0 if load.experts_choose else 1.1))
            if column:
                ax.set_yticklabels([])
            else:
                ax.set_ylabel("share of tokens" if load.experts_choose else "load", size=9)
    x = 0.2
    for label, color in legend:
        figure.text(x / width, 0.22 / height, "■" if color else "- -", size=9, c=color or "k")
        figure.text((x + 0.2) / width, 0.22 / height, label, size=9, c=plots.TEXT_COLOR)
        x += 0.5 + plots.text_width(label, 9)
    return plots.save_figure(figure, png)


def _load_bars(load: SparseLoad) -> tuple[np.ndarray, np.ndarray]:
    """Returns the heights of the bars, and the heights of their upper parts in another color."""
    if load.experts_choose:
        used = int(np.flatnonzero(load.tokens_by_experts).max(initial=1))
        shares = load.shares_by_experts[: used + 1]
        return shares, np.where(np.arange(used + 1) == 0, shares, 0.0)
    return load.load, load.load * (1 - load.placed / np.maximum(load.assigned, 1))


def _load_legend(loads: Sequence[SparseLoad]) -> list[tuple[str, str]]:
    """Returns texts and colors; the color '' stands for the dashed line of an even load."""
    kinds = {load.experts_choose for load in loads}
    dropped = {False: "dropped", True: "without expert"}
    return [
        ("computed", _PLACED_COLOR),
        (" or ".join(dropped[kind] for kind in sorted(kinds)), _DROPPED_COLOR),
        *([("even load", "")] if False in kinds else []),
    ]


def _draw_load(ax: Axes, load: SparseLoad, limit: float) -> None:
    """Draws the panel of a sparse layer, with a scale from 0 to `limit`."""
    heights, upper = _load_bars(load)
    first = 0 if load.experts_choose else 1
    positions = np.arange(len(heights)) + first
    ax.bar(positions, heights - upper, color=_PLACED_COLOR, width=0.8)
    ax.bar(positions, upper, bottom=heights - upper, color=_DROPPED_COLOR, width=0.8)
    stack, layer = load.site.split("/")[:2]
    lines = [f"{stack} {layer.removeprefix('layers_')}"]
    if not load.experts_choose:
        lines.append(f"dropped {100 * load.dropped:.1f} %")
        ax.axhline(1, color=plots.TEXT_COLOR, lw=0.9, ls=(0, (3, 2)))
    lines.append(f"without expert {100 * load.without_expert:.1f} %")
    ax.set_title("\n".join(lines), size=8.5, loc="left", linespacing=1.35)
    ax.set_xlabel("experts of a token" if load.experts_choose else "expert", size=9, labelpad=2)
    ax.set_ylim(0, limit)
    ax.set_xticks(positions[:: -(-len(positions) // 16)])  # at most 16 labels
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color=plots.GRID_COLOR, lw=0.8)
    ax.set_axisbelow(True)


def plot_dendrogram(
    distances: np.ndarray,
    tasks: Sequence[str],
    png: str | AnyPath,
    *,
    trained: Collection[str] | None = None,
    title: str,
) -> AnyPath:
    """Draws the dendrogram of T tasks with average linkage.

    Args:
      distances: distances of the tasks [T, T].
      tasks: names of the tasks, at least two.
      png: output file.
      trained: names of the tasks that the run was trained on, or None if unknown. If only some
        tasks are, the labels of the others are colored.
      title: title of the figure.

    Raises:
      InputError: there are fewer than two tasks.
    """
    if len(tasks) < 2:
        raise InputError(f"a dendrogram needs at least 2 tasks, got {len(tasks)}")
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    # Average linkage, because single linkage would chain tasks. Optimal ordering puts similar
    # leaves next to each other.
    linkage = hierarchy.linkage(
        distance.squareform(distances, checks=False), "average", optimal_ordering=True
    )
    # If all tasks had equal distributions, the axis would have no length.
    linkage[:, 2] = np.maximum(linkage[:, 2], 1e-6)
    plt = plots.import_pyplot()
    # Positions are in inches, so that labels and rows keep their size for any number of tasks.
    row_height, left, bottom, tree_width = 0.19, 0.2, 0.75, 5.0
    is_colored = trained is not None and 0 < sum(task in trained for task in tasks) < len(tasks)
    top = 0.85 if is_colored else 0.6
    label_width = 0.2 + max(plots.text_width(task, 8) for task in tasks)
    width = max(left + tree_width + label_width, 0.5 + plots.text_width(title, 13))
    tree_height = row_height * len(tasks)
    height = top + tree_height + bottom
    figure = plt.figure(figsize=(width, height))
    plots.draw_title(figure, title)
    if is_colored:
        x = 0.15
        for text, color in (("trained on", plots.TEXT_COLOR), ("held out", plots.ACCENT_COLOR)):
            figure.text(x / width, 1 - 0.58 / height, text, size=9, va="center", c=color)
            x += plots.text_width(text, 9) + 0.2
    ax = figure.add_axes((left / width, bottom / height, tree_width / width, tree_height / height))
    drawn = hierarchy.dendrogram(
        linkage,
        orientation="left",
        labels=list(tasks),
        ax=ax,
        link_color_func=lambda _: "#666666",
        leaf_font_size=8,
    )
    for task, label in zip(drawn["ivl"], ax.get_yticklabels(), strict=True):
        is_held_out = is_colored and trained and task not in trained
        label.set_color(plots.ACCENT_COLOR if is_held_out else plots.TEXT_COLOR)
    ax.set_xlim(left=linkage[-1, 2] * 1.03, right=0)
    ax.tick_params(axis="y", length=0, pad=4)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["left"]].set_visible(False)
    ax.set_xlabel("distance of the merge (0: same routing, 1: no expert in common)", size=9)
    ax.grid(axis="x", color=plots.GRID_COLOR, lw=0.8)
    ax.set_axisbelow(True)
    return plots.save_figure(figure, png)
