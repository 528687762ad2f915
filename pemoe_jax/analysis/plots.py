"""Loss curves and routing maps as PNG files, and the style of all figures.

matplotlib is imported only when a figure is drawn: importing it takes longer than most commands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import atomic_write, file_io, progress
from pemoe_jax.runtime.file_io import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# The palette of Okabe and Ito, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TEXT_COLOR, MUTED_COLOR, ACCENT_COLOR = "#333333", "#999999", "#8C3A00"
GRID_COLOR = "#E6E6E6"
PIXELS_PER_INCH = 150

# Metric -> label and relative height of its panel.
_LOSS_PANELS = {
    "loss": ("loss", 2.6),
    "accuracy": ("token accuracy", 1.5),
    "learning_rate": ("learning rate", 1.0),
}
# Upper ends of a map's color scale, as multiples of the uniform probability.
_MAP_SCALES = (1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_MAX_MAP_WIDTH = 17  # inches
_HELD_OUT = "held out ↓"
# A site such as "decoder/layers_3/mlp/gate", also with a prefix, or as the path of its router's
# kernel: groups are stack, layer, module and name.
_SITE = re.compile(
    r"(?:.*/)?(encoder|decoder)/layers_(\d+)/(\w+)/(\w+?)(?:_adapter)?(?:/router)?(?:/kernel)?"
)


def loss_curve(metrics: str | AnyPath, png: str | AnyPath, *, title: str = "Training") -> AnyPath:
    """Draws loss, accuracy and learning rate over steps, one panel for each recorded metric.

    Training is drawn as a line, with a running mean if there are at least 20 values, and evaluation
    as points. A training loss or accuracy is the mean of the steps since the last report, so it is
    drawn in the middle of these steps.

    Args:
      metrics: a metrics.jsonl with lines `{"step": 10, "train/loss": 2.3, "eval/loss": 2.5, …}`. A
        resumed run may repeat steps; of each metric of a step, the last value counts.
      png: output file.
      title: title of the figure.

    Raises:
      InputError: the file is missing, a line has another form, or no metric is recorded.
    """
    rows = _read_metrics(file_io.to_path(metrics))
    series: dict[str, dict[str, np.ndarray]] = {}
    for metric in _LOSS_PANELS:
        for name in (f"train/{metric}", f"eval/{metric}"):
            # Skips steps without this metric, for which "" stands, and metrics that are text.
            steps = sorted(s for s, row in rows.items() if not isinstance(row.get(name, ""), str))
            if steps:
                is_mean = name.startswith("train/") and metric != "learning_rate"
                positions = _window_middles(steps) if is_mean else steps
                curve = np.array([positions, [rows[step][name] for step in steps]], float)
                series.setdefault(metric, {})[name] = curve
    if not series:
        raise InputError(f"{metrics}: expected lines with {list(_LOSS_PANELS)}, got none")

    heights = [_LOSS_PANELS[metric][1] for metric in series]
    size = (7.5, 0.9 + 1.25 * sum(heights))
    figure = import_pyplot().figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(series), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    color = COLORS[0]
    for ax, (metric, curves) in zip(axes, series.items(), strict=True):
        for name, curve in curves.items():
            steps, values = curve
            if name.startswith("eval/"):
                ax.plot(steps, values, "o", ms=5, color=color, mec="white", label="evaluation")
            elif metric == "learning_rate" or len(steps) < 20:
                ax.plot(steps, values, color=color, lw=1.8, label="training")
            else:
                ax.plot(steps, values, color=color, lw=0.6, alpha=0.3)
                # Each mean is over a tenth of the curve.
                smooth = _running_mean(values, len(values) // 20)
                ax.plot(steps, smooth, color=color, lw=1.8, label="training")
        ax.set_ylabel(_LOSS_PANELS[metric][0])
        ax.grid(color=GRID_COLOR, lw=0.8)
        ax.set_axisbelow(True)
        ax.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
        if metric == "learning_rate":
            ax.set_ylim(bottom=0)  # so that a constant rate looks constant
    axes[-1].set_xlabel("step")
    # Short runs would get ticks at fractions of a step.
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        axes[0].legend(handles, labels, frameon=False, fontsize=9)
    axes[0].set_title(title, loc="left", fontweight="bold")
    return save_figure(figure, png)


def routing_map(
    probs: Mapping[str, Mapping[str, Any]],
    png: str | AnyPath,
    *,
    trained: Collection[str] | None = None,
    max_ratio: float | None = 4.0,
    title: str = "Where each task is routed",
    quantity: str = "mean probability",
) -> AnyPath:
    """Draws router probabilities: one panel per site, one row per task, one column per expert.

    Colors show the ratio of a probability to the uniform 1/E, on a log scale common to all panels.

    Args:
      probs: site -> task -> probabilities [E]; a site is the path of its parameters or any text.
      png: output file.
      trained: tasks that the model was trained on, drawn above the others; None draws all alike.
      max_ratio: upper end of the scale, whose lower end is the inverse; None selects the smallest
        of `_MAP_SCALES` that contains all ratios, or the largest one if none does.
      title: title of the figure.
      quantity: name of the values, for the color bar.

    Raises:
      InputError: there are no probabilities, or they have different lengths.
    """
    shapes = sorted({np.shape(p) for by_task in probs.values() for p in by_task.values()})
    if len(shapes) != 1 or len(shapes[0]) != 1:
        raise InputError(
            f"routing map: expected probabilities of one length [E], got shapes {shapes}"
        )
    experts = shapes[0][0]
    tasks = list(dict.fromkeys(task for by_task in probs.values() for task in by_task))
    above = [task for task in tasks if trained is None or task in trained]
    below = [task for task in tasks if task not in above]
    # None stands for the row between the two groups, which has only the label "held out".
    rows: list[str | None] = [*above, *([None] if above and below else []), *below]
    images = {site: _log_ratios(by_task, rows, experts) for site, by_task in probs.items()}
    if max_ratio is None:
        # `images` are log ratios: half and twice the uniform probability are equally far from 0.
        largest = 2 ** max(np.nanmax(np.abs(image)) for image in images.values())
        max_ratio = next((scale for scale in _MAP_SCALES if scale >= largest), _MAP_SCALES[-1])
    # No probability exceeds E times the uniform one, so the scale does not either.
    limit = math.log2(max(_MAP_SCALES[0], min(max_ratio, experts)))

    # Positions are computed in inches, so that the size of cells and labels is always the same.
    # Cells are narrower if there are many, so that a panel of 64 experts fits a page.
    cell, row_height = (0.17 if experts <= 16 else 0.12 if experts <= 32 else 0.08), 0.19
    panel_width, panel_height = cell * experts, row_height * len(rows)
    pitch = max(panel_width + 0.2, 0.15 + max(text_width(_site_title(site), 9) for site in images))
    left = 0.35 + max(text_width(task, 8) for task in [*tasks, _HELD_OUT])
    top, between, bottom = 0.85, 0.6, 1.3
    lines = _panel_lines(list(images), max(1, int((_MAX_MAP_WIDTH - left) / pitch)))
    width = max(left + pitch * max(map(len, lines)), left + 3.5, 0.5 + text_width(title, 13))
    height = top + len(lines) * (panel_height + between) - between + bottom
    figure = import_pyplot().figure(figsize=(width, height))
    draw_title(figure, title)
    for number, line in enumerate(lines):
        y = height - top - (number + 1) * panel_height - number * between
        for column, site in enumerate(line):
            x = left + column * pitch
            rect = (x / width, y / height, panel_width / width, panel_height / height)
            ax = figure.add_axes(rect)
            axes_image = _draw_map_panel(ax, images[site], limit)
            ax.set_title(_site_title(site), size=9, c=TEXT_COLOR, pad=4, loc="left")
            if None in rows:
                ax.axhline(len(above), color=MUTED_COLOR, lw=0.8)
            if column == 0:
                ax.set_xlabel("expert", size=8, c=TEXT_COLOR, loc="left", labelpad=1)
                ax.set_yticks(range(len(rows)), [task or _HELD_OUT for task in rows])
                for task, label in zip(rows, ax.get_yticklabels(), strict=True):
                    is_held_out = None in rows and task not in above
                    label.set_color(ACCENT_COLOR if is_held_out else TEXT_COLOR)
                    label.set_fontweight("bold" if task is None else "normal")

    bar = figure.add_axes((left / width, 0.45 / height, 3.2 / width, 0.13 / height))
    color_bar = figure.colorbar(axes_image, cax=bar, orientation="horizontal", extend="both")
    ticks = np.linspace(-limit, limit, 5)
    color_bar.set_ticks(list(ticks), labels=[f"{2**tick / experts:.3g}" for tick in ticks])
    color_bar.outline.set_visible(False)
    bar.tick_params(labelsize=8, length=2)
    uniform = f"{quantity} (uniform: {1 / experts:.3g})"
    bar.set_title(uniform, size=9, loc="left", c=TEXT_COLOR, pad=4)
    return save_figure(figure, png)


def import_pyplot() -> ModuleType:
    """Returns matplotlib.pyplot in the style of this package, for writing files."""
    import matplotlib

    matplotlib.use("Agg")  # the default backend may need a display
    import matplotlib.pyplot

    matplotlib.rc("font", size=10)
    # Names of folders and tasks may contain `$`, which must not begin a formula.
    matplotlib.rc("text", parse_math=False)
    matplotlib.rc("savefig", dpi=PIXELS_PER_INCH)
    matplotlib.rc("axes", edgecolor=MUTED_COLOR, labelcolor=TEXT_COLOR, titlecolor=TEXT_COLOR)
    matplotlib.rc("axes.spines", top=False, right=False)
    matplotlib.rc("xtick", color=TEXT_COLOR)
    matplotlib.rc("ytick", color=TEXT_COLOR)
    return matplotlib.pyplot


def save_figure(figure: Figure, png: str | AnyPath) -> AnyPath:
    """Writes a figure as a PNG file, closes it and returns the path."""
    with atomic_write.temporary_path(png, overwrite=True) as temporary:
        figure.savefig(temporary, format="png")
    import_pyplot().close(figure)
    return file_io.to_path(png)


def draw_title(figure: Figure, title: str) -> None:
    """Draws a bold title in the upper left corner, at the same place for all sizes of figures."""
    width, height = figure.get_size_inches()
    style: dict[str, Any] = {"size": 12, "weight": "bold", "va": "center", "c": TEXT_COLOR}
    figure.text(0.15 / width, 1 - 0.3 / height, title, **style)


def text_width(text: str, size: float) -> float:
    """Returns the width in inches of a line of text at a font size in points."""
    from matplotlib.textpath import TextPath

    import_pyplot()  # sets the style, in which `$` is an ordinary character
    return TextPath((0, 0), text, size=size).get_extents().width / 72  # 72 points are an inch


def _draw_map_panel(ax: Axes, image: np.ndarray, limit: float) -> AxesImage:
    """Draws the cells of a site from log ratios [rows, E]; NaN is white."""
    from matplotlib import colormaps

    rows, experts = image.shape
    colors = colormaps["PuOr_r"].with_extremes(bad="white")
    axes_image = ax.imshow(image, colors, aspect="auto", interpolation="none")
    axes_image.set_clim(-limit, limit)
    # White grid lines at the minor ticks separate the cells.
    ax.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.8)
    ax.tick_params(which="both", length=0, labelsize=8, pad=2)
    ax.spines[:].set_visible(False)
    # Up to 16 experts are all labeled, more only as 1, 10, 20, …
    labeled = [0, *range(9, experts, 10)] if experts > 16 else list(range(experts))
    ax.set_xticks(labeled, [str(expert + 1) for expert in labeled])
    ax.set_yticks([])
    return axes_image


def _log_ratios(by_task: Mapping[str, Any], rows: Sequence[str | None], experts: int) -> np.ndarray:
    """Returns log2 of E times the probabilities [rows, E]; NaN for rows without any."""
    missing = np.full(experts, np.nan)
    image = np.array([missing if task is None else by_task.get(task, missing) for task in rows])
    # Top-k routing has probabilities of 0, whose logarithm would be infinite.
    return np.log2(np.maximum(image * experts, 1e-6))


def _panel_lines(sites: Sequence[str], max_panels: int) -> list[list[str]]:
    """Splits sites into lines of at most `max_panels` panels.

    A stack begins a new line. A layer is split only if it has more than `max_panels` sites.
    """
    layers: dict[tuple, list[str]] = {}
    for site in sites:
        match = _SITE.fullmatch(site)
        layers.setdefault(match.group(1, 2) if match else ("", site), []).append(site)
    lines: list[list[str]] = []
    last_stack = None
    for (stack, _), layer in layers.items():
        if lines and stack == last_stack and len(lines[-1]) + len(layer) <= max_panels:
            lines[-1] += layer
        else:
            line_count = -(-len(layer) // max_panels)
            size = -(-len(layer) // line_count)  # equal lengths if possible: 5 + 5, not 9 + 1
            lines += [layer[i : i + size] for i in range(0, len(layer), size)]
        last_stack = stack
    return lines


def _site_title(site: str) -> str:
    """Abbreviates 'decoder/layers_3/encoder_decoder_attention/key' to 'dec 3 · cross key'."""
    match = _SITE.fullmatch(site)
    if not match:
        return site
    stack, layer, module, name = match.groups()
    kind = {"encoder_decoder_attention": "cross ", "self_attention": "self "}.get(module, "")
    return f"{stack[:3]} {layer} · {kind}{name}"


def _read_metrics(file: AnyPath) -> dict[int, dict[str, Any]]:
    """Returns step -> metrics."""
    rows: dict[int, dict[str, Any]] = {}
    try:
        # Invalid UTF-8 must not abort reading. Inside of a JSON string it is harmless; elsewhere,
        # its line is reported below.
        text = file_io.read_text(file, "surrogateescape")
    except OSError as error:
        raise InputError(f"{file}: expected a file of metrics, got {error.strerror}") from None
    lines = text.split("\n")[:-1]  # a last line without a newline is still being written
    for number, line in enumerate(lines, 1):
        row = progress.parse_metrics(line)
        if not row:
            raise InputError(
                f'{file}, line {number}: expected a JSON object with "step", got {line[:60]!r}'
            )
        rows.setdefault(row["step"], {}).update(row)
    return rows


def _window_middles(steps: Sequence[int]) -> np.ndarray:
    """Returns the middle of the steps that each report covers, which follow the previous report."""
    last = np.array(steps, float)
    first = np.array([0, *steps[:-1]]) + 1.0
    return (first + last) / 2


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of each value and its neighbors, ignoring values that are not finite.

    There are `width` neighbors on each side, or fewer near the ends, but always equally many on
    both sides: a mean over more earlier values than later ones would lag behind a trend.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # Differences of cumulative sums take linear time, whatever the width is.
    index = np.arange(len(values))
    widths = np.minimum(width, np.minimum(index, index[::-1]))
    low, high = index - widths, index + widths + 1
    with np.errstate(invalid="ignore"):  # 0 / 0, hence NaN, where no neighbor is finite
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
