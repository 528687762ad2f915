"""A bar chart of accuracies: one panel per dataset or average, one bar per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pemoe_jax.analysis import plots
from pemoe_jax.runtime.file_io import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches: height of a bar, width of a panel, gap between panels.
_BAR_HEIGHT, _PANEL_WIDTH, _GAP = 0.24, 1.6, 0.25
_PANELS_PER_LINE = 5
# (text of the legend, field of `Bar` or `Panel` that the text explains). `_legend` leaves out texts
# about fields that no bar or panel sets.
_LEGEND = (
    ("dashed: chance", "chance"),
    ("line at the end of a bar: 95 % interval over examples", "interval"),
    ("dots: single seeds (the bar is their mean)", "seeds"),
    ("hatched: trained on this dataset", "is_trained"),
    ("gray: published", "is_published"),
    ("†: average over fewer datasets", "mark"),
)


@dataclass(frozen=True)
class Bar:
    """A bar; `value`, `interval` and `seeds` are accuracies in %. `_LEGEND` explains the fields."""

    value: float
    interval: tuple[float, float] | None = None
    is_trained: bool = False
    is_published: bool = False
    mark: str = ""
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """The bars of a dataset or average, and the accuracy of guessing in %.

    `bars` has an entry for each run, from top to bottom; None: the run has no value.
    """

    title: str
    bars: Sequence[Bar | None]
    chance: float | None = None


def draw(
    panels: Sequence[Panel], labels: Sequence[str], png: str | AnyPath, *, title: str
) -> AnyPath:
    """Draws panels with scales from 0 to 100 %, five per line.

    `labels` are the names of the runs, whose bars have the same order in every panel.
    """
    pyplot = plots.import_pyplot()
    lines = [panels[i : i + _PANELS_PER_LINE] for i in range(0, len(panels), _PANELS_PER_LINE)]
    # Positions are computed in inches, so that the size of bars and labels is always the same.
    left = 0.3 + max(plots.text_width(label, 8) for label in labels)
    top, between, bottom = 0.85, 0.65, 0.75  # margins, and the height between lines of panels
    panel_height = _BAR_HEIGHT * len(labels)
    legend = _legend(panels)
    width = max(
        left + (_PANEL_WIDTH + _GAP) * len(lines[0]),
        0.5 + plots.text_width(title, 13),
        0.4 + plots.text_width(legend, 8),
    )
    height = top + len(lines) * (panel_height + between) - between + bottom
    figure = pyplot.figure(figsize=(width, height))
    plots.draw_title(figure, title)
    figure.text(0.15 / width, 0.2 / height, legend, size=8, va="center", c=plots.TEXT_COLOR)
    for number, line in enumerate(lines):
        y = height - top - (number + 1) * panel_height - number * between
        for column, panel in enumerate(line):
            x = left + column * (_PANEL_WIDTH + _GAP)
            rect = (x / width, y / height, _PANEL_WIDTH / width, panel_height / height)
            ax = figure.add_axes(rect)
            _draw_panel(ax, panel)
            ax.set_yticks(range(len(labels)), labels if column == 0 else [""] * len(labels))
    return plots.save_figure(figure, png)


def _draw_panel(ax: Axes, panel: Panel) -> None:
    """Draws the bars of a panel, each followed by its value."""
    for row, bar in enumerate(panel.bars):
        if bar is None:
            ax.text(1.5, row, "–", size=8, va="center", c=plots.MUTED_COLOR)
            continue
        color = "#C8C8C8" if bar.is_published else plots.COLORS[0]
        hatch = "////" if bar.is_trained else None
        ax.barh(row, bar.value, 0.72, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        end = bar.value  # right end of the bar, its interval and its dots
        if bar.interval:
            (line,) = ax.plot(bar.interval, [row, row], color=plots.TEXT_COLOR, lw=1.2)
            line.set_solid_capstyle("butt")  # a projecting cap would lengthen the interval
            end = max(end, bar.interval[1])
        if bar.seeds:
            y = [row] * len(bar.seeds)
            ax.scatter(bar.seeds, y, s=11, fc="white", ec=plots.TEXT_COLOR, lw=0.9, zorder=3)
            end = max(end, *bar.seeds) + 2  # 2 is half the width of a dot
        # The white background covers the dashed line of chance.
        background = {"fc": "white", "ec": "none", "pad": 0.3}
        text = f"{bar.value:.1f} {bar.mark}".strip()
        ax.text(end + 2, row, text, size=8, va="center", c=plots.TEXT_COLOR, bbox=background)
    if panel.chance is not None:
        ax.axvline(panel.chance, color=plots.ACCENT_COLOR, lw=0.9, ls=(0, (3, 2)))
    ax.set_title(panel.title, size=9, loc="left", pad=4, weight="bold")
    ax.set_xlim(0, 124)  # room for the number after a bar of 100 %
    ax.set_ylim(len(panel.bars) - 0.5, -0.5)  # the first bar is on top
    ax.set_xticks([0, 50, 100])
    ax.tick_params(length=0, labelsize=8, pad=3)
    ax.grid(axis="x", color=plots.GRID_COLOR, lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["left", "bottom"]].set_visible(False)


def _legend(panels: Sequence[Panel]) -> str:
    """Returns the texts of `_LEGEND` about the fields that the panels show."""
    bars = [bar for panel in panels for bar in panel.bars if bar]
    shown = {field for _, field in _LEGEND for bar in bars if getattr(bar, field, None)}
    if any(panel.chance is not None for panel in panels):
        shown.add("chance")
    return "   ·   ".join(text for text, field in _LEGEND if field in shown)
