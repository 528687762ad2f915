"""Bars of accuracy as a PNG file: a panel a data set, a bar a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pemoe_jax.analysis import plots

_ROW, _PANEL, _GAP = 0.24, 1.6, 0.25  # inches: a bar's height, a panel's width, between panels
_MOST = 5  # panels in a line
_LEGEND = (
    ("dashed: chance", "any"),
    ("line at the end: 95 % interval over examples", "interval"),
    ("dots: seeds, the bar is their mean", "seeds"),
    ("hatched: trained on it", "hatched"),
    ("grey: published", "pale"),
    ("†: average over fewer data sets", "mark"),
)


@dataclass(frozen=True)
class Bar:
    """A value in %, its interval, how it is drawn, a mark behind it, and what seeds have of it."""

    value: float
    interval: tuple[float, float] | None = None
    hatched: bool = False
    pale: bool = False
    mark: str = ""
    seeds: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """A data set: its bars in the rows' order (None: not known), and the accuracy of chance."""

    title: str
    bars: Sequence[Bar | None]
    chance: float | None = None


def draw(panels: Sequence[Panel], rows: Sequence[str], png: str | Path, *, title: str) -> Path:
    """Draws the panels in lines of at most five, all from 0 to 100 %; `rows` name the bars."""
    plt = plots.pyplot()
    lines = [panels[i : i + _MOST] for i in range(0, len(panels), _MOST)]
    # Everything is placed in inches, so that bars and labels keep their size however many.
    left = 0.3 + max(plots.inches(row, 8) for row in rows)
    top, between, bottom = 0.85, 0.65, 0.75
    tall = _ROW * len(rows)
    legend = _legend(panels)
    width = max(
        left + (_PANEL + _GAP) * len(lines[0]),
        0.5 + plots.inches(title, 13),
        0.4 + plots.inches(legend, 8),
    )
    height = top + len(lines) * (tall + between) - between + bottom
    figure = plt.figure(figsize=(width, height))
    figure.text(
        0.15 / width, 1 - 0.3 / height, title, size=12, weight="bold", va="center", c=plots.INK
    )
    figure.text(0.15 / width, 0.2 / height, legend, size=8, va="center", c=plots.INK)
    for number, line in enumerate(lines):
        for place, panel in enumerate(line):
            x = left + place * (_PANEL + _GAP)
            y = height - top - (number + 1) * tall - number * between
            axis = figure.add_axes((x / width, y / height, _PANEL / width, tall / height))
            _draw_panel(axis, panel)
            axis.set_yticks(range(len(rows)), rows if place == 0 else [""] * len(rows))
    return plots.save(figure, png)


def _draw_panel(axis: Any, panel: Panel) -> None:
    for row, bar in enumerate(panel.bars):
        if bar is None:
            axis.text(1.5, row, "–", size=8, va="center", c=plots.FAINT)
            continue
        axis.barh(
            row,
            bar.value,
            height=0.72,
            color="#C8C8C8" if bar.pale else plots.COLOURS[0],
            hatch="////" if bar.hatched else None,
            edgecolor="white",
            linewidth=0,
        )
        end = bar.value
        if bar.interval:
            low, high = bar.interval
            axis.plot([low, high], [row, row], color=plots.INK, lw=1.2, solid_capstyle="butt")
            end = max(end, high)
        if bar.seeds:
            ring = {"s": 11, "facecolor": "white", "edgecolor": plots.INK, "linewidth": 0.9}
            axis.scatter(bar.seeds, [row] * len(bar.seeds), zorder=3, **ring)
            end = max(end, *bar.seeds) + 2  # a ring's half
        text = f"{bar.value:.1f} {bar.mark}".strip()
        ground = {"fc": "white", "ec": "none", "pad": 0.3}  # the line of chance ends at the text
        axis.text(end + 2, row, text, size=8, va="center", c=plots.INK, bbox=ground)
    if panel.chance is not None:
        axis.axvline(panel.chance, color=plots.ACCENT, lw=0.9, ls=(0, (3, 2)))
    axis.set_title(panel.title, size=9, loc="left", pad=4, weight="bold")
    axis.set_xlim(0, 124)  # room for the figure behind a bar of 100 %
    axis.set_ylim(len(panel.bars) - 0.5, -0.5)
    axis.set_xticks([0, 50, 100])
    axis.tick_params(length=0, labelsize=8, pad=3)
    axis.grid(axis="x", color="#E6E6E6", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["left", "bottom"]].set_visible(False)


def _legend(panels: Sequence[Panel]) -> str:
    """What the marks that are there mean."""
    drawn = [bar for panel in panels for bar in panel.bars if bar]
    return "   ·   ".join(
        text
        for text, mark in _LEGEND
        if (mark == "any" and any(panel.chance is not None for panel in panels))
        or any(getattr(bar, mark, None) for bar in drawn)
    )
