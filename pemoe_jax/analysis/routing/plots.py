"""Pictures of routing as PNG files: entropies by layer, and which tasks are routed alike.

`plots.routing_map` draws the map of tasks and experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pemoe_jax.analysis import plots
from pemoe_jax.analysis.routing import probe
from pemoe_jax.analysis.routing.metrics import RouterEntropy
from pemoe_jax.core.errors import InputError

# By kind of site: a colour for what is projected, a line for where.
_NAMES = {"key": 0, "value": 1, "gate": 2, "query": 3, "out": 4, "wi_0": 5, "wi_1": 2, "wo": 6}
_LINES = {"self": "-", "cross": (0, (4, 2)), "": "-"}
_MARKS = {"self": "o", "cross": "s", "": "D"}
_MEASURES = (
    ("token_entropy", "each token (low: it decides)"),
    ("mean_entropy", "mean over all (low: few are used)"),
)


def plot_entropies(layers: Sequence[RouterEntropy], png: str | Path, *, title: str) -> Path:
    """Draws routers' entropies by layer: encoder beside decoder, tokens' above the mean's.

    Where the upper ones are low routers decide; where the lower ones are low experts lie idle. The
    two rows have scales of their own, which end at 1.

    Args:
      layers: of all routers of a model.
      png: the file.
      title: of the picture.
    """
    plt = plots.pyplot()
    stacks = [s for s in probe.STACKS if any(one.stack == s for one in layers)]
    kinds = list(dict.fromkeys(one.kind for one in layers))
    legend = 0.55 + max(plots.inches(kind, 9) for kind in kinds)
    width = max(0.9 + 3.2 * len(stacks) + legend, 0.5 + plots.inches(title, 13))
    figure, axes = plt.subplots(
        2, len(stacks), sharey="row", squeeze=False, figsize=(width, 5.2), layout="constrained"
    )
    for column, stack in enumerate(stacks):
        for row, (measure, meaning) in enumerate(_MEASURES):
            axis = axes[row, column]
            for kind in kinds:
                _line(axis, [o for o in layers if (o.stack, o.kind) == (stack, kind)], measure)
            axis.axhline(1, color=plots.FAINT, lw=0.8, ls=(0, (1, 2)))
            axis.set_title(f"{stack}, {meaning}", size=9.5, loc="left")
            axis.grid(color="#E6E6E6", lw=0.8)
            axis.set_axisbelow(True)
            axis.margins(x=0.08)
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axis.ticklabel_format(axis="y", useOffset=False)
            axis.tick_params(labelsize=9)
        axes[-1, column].set_xlabel("layer", size=9)
    for (measure, _), axis in zip(_MEASURES, axes[:, 0], strict=True):
        least = min(getattr(one, measure) for one in layers)
        bottom = max(-0.02, 1 - 1.15 * max(1 - least, 0.02))
        axis.set_ylim(bottom, 1 + 0.05 * (1 - bottom))
    figure.supylabel("entropy as a share of log E", size=9.5, color=plots.INK)
    figure.suptitle(title, x=0.01, ha="left", size=12, weight="bold", color=plots.INK)
    found: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    ordered = [kind for kind in kinds if kind in found]
    figure.legend(
        [found[kind] for kind in ordered],
        ordered,
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )
    return plots.save(figure, png)


def _line(axis: Any, layers: Sequence[RouterEntropy], measure: str) -> None:
    if not layers:
        return
    where, _, name = layers[0].kind.rpartition(" ")
    axis.plot(
        [one.layer for one in layers],
        [getattr(one, measure) for one in layers],
        color=plots.COLOURS[_NAMES.get(name, len(_NAMES)) % len(plots.COLOURS)],
        ls=_LINES.get(where, "-"),
        marker=_MARKS.get(where, "D"),
        ms=4.5 if len(layers) <= 12 else 3,
        lw=1.6,
        label=layers[0].kind,
    )


def plot_dendrogram(
    distances: np.ndarray,
    tasks: Sequence[str],
    png: str | Path,
    *,
    seen: Collection[str] | None = None,
    title: str,
) -> Path:
    """Draws tasks as leaves of a tree that joins the nearest first (average linkage).

    Args:
      distances: [T, T].
      tasks: T names, at least two.
      png: the file.
      seen: those trained on; the others are coloured.
      title: of the picture.

    Raises:
      InputError: there are fewer than two tasks.
    """
    if len(tasks) < 2:
        raise InputError(f"dendrogram: expected two tasks at least, found {len(tasks)}")
    from scipy.cluster import hierarchy
    from scipy.spatial import distance

    joined = hierarchy.linkage(
        distance.squareform(distances, checks=False), "average", optimal_ordering=True
    )
    joined[:, 2] = np.maximum(joined[:, 2], 1e-6)  # no axis of no length where all are alike
    plt = plots.pyplot()
    row, left, bottom, tree = 0.19, 0.2, 0.75, 5.0  # inches
    coloured = seen is not None and 0 < sum(task in seen for task in tasks) < len(tasks)
    top = 0.85 if coloured else 0.6
    labels = 0.2 + max(plots.inches(task, 8) for task in tasks)
    width = max(left + tree + labels, 0.5 + plots.inches(title, 13))
    height = top + row * len(tasks) + bottom
    figure = plt.figure(figsize=(width, height))
    figure.text(
        0.15 / width, 1 - 0.3 / height, title, size=12, weight="bold", va="center", c=plots.INK
    )
    if coloured:
        kinds = (("trained on", plots.INK), ("held out", plots.ACCENT))
        x = 0.15
        for text, colour in kinds:
            figure.text(x / width, 1 - 0.58 / height, text, size=9, va="center", c=colour)
            x += plots.inches(text, 9) + 0.2
    axis = figure.add_axes((left / width, bottom / height, tree / width, row * len(tasks) / height))
    drawn = hierarchy.dendrogram(
        joined,
        orientation="left",
        labels=list(tasks),
        ax=axis,
        link_color_func=lambda _: "#666666",
        leaf_font_size=8,
    )
    for task, label in zip(drawn["ivl"], axis.get_yticklabels(), strict=True):
        label.set_color(plots.ACCENT if coloured and seen and task not in seen else plots.INK)
    axis.set_xlim(left=joined[-1, 2] * 1.03, right=0)
    axis.tick_params(axis="y", length=0, pad=4)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["left"]].set_visible(False)
    axis.set_xlabel("distance at which they join (0: routed alike, 1: by other experts)", size=9)
    axis.grid(axis="x", color="#E6E6E6", lw=0.8)
    axis.set_axisbelow(True)
    return plots.save(figure, png)
