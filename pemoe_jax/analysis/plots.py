"""Pictures as PNG files: loss curves and routing maps. matplotlib is imported when one is drawn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = {"loss": "loss", "accuracy": "token accuracy", "learning_rate": "learning rate"}
INK, FAINT, ACCENT = "#333333", "#999999", "#8C3A00"
FOLDS = (1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


def loss_curve(
    metrics: str | Path | Mapping[str, str | Path],
    png: str | Path,
    *,
    train_prefix: str = "train/",
    eval_prefix: str = "eval/",
    title: str = "Training",
) -> Path:
    """Draws loss, accuracy and learning rate over steps, one panel for each that was recorded.

    `metrics` is a file of JSON lines `{"step": 10, "loss": 2.3, ...}`, or several by the name of
    their run. A name without a prefix counts as training. Of lines for one step (a run that went
    back to a checkpoint) the last counts. Training is drawn as a running mean over its own noise,
    evaluation as points. Raises InputError for a line that is not such an object.
    """
    files = metrics if isinstance(metrics, Mapping) else {"": metrics}
    series: dict[str, list[tuple[str, str, np.ndarray]]] = {}
    for run, file in files.items():
        rows = _read(Path(file))
        for panel in PANELS:
            for kind, names in (
                ("train", (train_prefix + panel, panel)),
                ("eval", (eval_prefix + panel,)),
            ):
                points = [
                    (step, row[name]) for step, row in rows.items() for name in names if name in row
                ]
                if points:
                    series.setdefault(panel, []).append(
                        (run, kind, np.array(sorted(points), float))
                    )
    if not series:
        raise InputError(
            f"{', '.join(map(str, files.values()))}: expected lines with {list(PANELS)}, found none"
        )

    plt = pyplot()
    heights = [2.6 if panel == "loss" else 1.5 if panel == "accuracy" else 1.0 for panel in series]
    figure, axes = plt.subplots(
        len(series),
        1,
        sharex=True,
        squeeze=False,
        figsize=(7.5, 0.9 + 1.25 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(files)}
    for axis, (panel, lines) in zip(axes[:, 0], series.items(), strict=True):
        for run, kind, recorded in lines:
            steps, values = recorded.T
            label = run if kind == "train" else f"{run}, evaluation".lstrip(", ")
            if kind == "eval":
                axis.plot(steps, values, "o", ms=5, color=colours[run], mec="white", label=label)
            elif panel == "learning_rate" or len(steps) < 20:
                axis.plot(steps, values, color=colours[run], lw=1.8, label=label or "training")
            else:
                axis.plot(steps, values, color=colours[run], lw=0.6, alpha=0.3)
                smooth = _running_mean(values, len(values) // 20)
                axis.plot(steps, smooth, color=colours[run], lw=1.8, label=label or "training")
        axis.set_ylabel(PANELS[panel])
        axis.grid(color="#E6E6E6", lw=0.8)
        axis.set_axisbelow(True)
        axis.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
        if panel == "learning_rate":
            axis.set_ylim(bottom=0)
    axes[-1, 0].set_xlabel("step")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(labels) > 1:
        axes[0, 0].legend(handles, labels, frameon=False, fontsize=9)
    axes[0, 0].set_title(title, loc="left", fontweight="bold")
    return save(figure, png)


def routing_map(
    probs: Mapping[str, Mapping[str, Any]],
    png: str | Path,
    *,
    seen: Collection[str] | None = None,
    fold: float | None = 4.0,
    title: str = "Where each task is routed",
    measure: str = "mean probability",
) -> Path:
    """Draws mean routing probabilities: a panel a site, a row a task, a column an expert.

    `probs` is {site: {task: [E]}}, sites named by their parameters' path or in any other way;
    with `seen`, the tasks trained on, the others stand apart below them. Colours tell a
    probability as a multiple of the uniform 1/E, on a log scale from 1/`fold` to `fold` that all
    panels share; `None` takes the narrowest of a few scales that holds all values. `measure` says
    what the colours tell. Raises InputError for probabilities that are not all of one length.
    """
    lengths = {np.shape(p) for by_task in probs.values() for p in by_task.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise InputError(
            f"routing map: expected probabilities of one length [E], found shapes {sorted(lengths)}"
        )
    (experts,) = next(iter(lengths))
    tasks = list(dict.fromkeys(task for by_task in probs.values() for task in by_task))
    above = [task for task in tasks if seen is None or task in seen]
    below = [task for task in tasks if task not in above]
    rows: list[str | None] = [*above, *([None] if above and below else []), *below]
    images = {site: _image(by_task, rows, experts) for site, by_task in probs.items()}
    if fold is None:
        largest = 2 ** max(np.nanmax(np.abs(image)) for image in images.values())
        fold = next((f for f in FOLDS if f >= largest), FOLDS[-1])
    limit = math.log2(max(FOLDS[0], min(fold, experts)))  # no probability is above 1 = E times 1/E

    plt = pyplot()
    from matplotlib import colormaps

    colours = colormaps["PuOr_r"].with_extremes(bad="white")
    # Everything is placed in inches, so that cells and labels keep their size however many.
    cell, row_height = (0.17 if experts <= 16 else 0.12 if experts <= 32 else 0.08), 0.19
    panel_width, panel_height = cell * experts, row_height * len(rows)
    pitch = max(panel_width + 0.2, 0.15 + max(inches(_site_title(site), 9) for site in images))
    left = 0.35 + max(inches(task, 8) for task in [*tasks, "held out ↓"])
    top, between, bottom = 0.85, 0.6, 1.3
    lines = _lines(list(images), max(1, int((17 - left) / pitch)))
    width = max(left + pitch * max(map(len, lines)), left + 3.5, 0.5 + inches(title, 13))
    height = top + len(lines) * (panel_height + between) - between + bottom
    figure = plt.figure(figsize=(width, height))
    figure.text(0.15 / width, 1 - 0.3 / height, title, size=12, weight="bold", va="center", c=INK)
    shown: Any = None
    for line, sites in enumerate(lines):
        for column, site in enumerate(sites):
            x = left + column * pitch
            y = height - top - (line + 1) * panel_height - line * between
            axis = figure.add_axes(
                (x / width, y / height, panel_width / width, panel_height / height)
            )
            shown = axis.imshow(
                images[site],
                aspect="auto",
                cmap=colours,
                vmin=-limit,
                vmax=limit,
                interpolation="none",
            )
            axis.set_title(_site_title(site), size=9, c=INK, pad=4, loc="left")
            axis.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
            axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
            axis.grid(which="minor", color="white", lw=0.8)
            axis.tick_params(which="both", length=0, labelsize=8, pad=2)
            axis.spines[:].set_visible(False)
            marks = [0, *range(9, experts, 10)] if experts > 16 else list(range(experts))
            axis.set_xticks(marks, [str(e + 1) for e in marks])
            axis.set_yticks([])
            if None in rows:  # the empty row, crossed by a rule
                axis.axhline(len(above), color=FAINT, lw=0.8)
            if column == 0:
                axis.set_xlabel("expert", size=8, c=INK, loc="left", labelpad=1)
                axis.set_yticks(range(len(rows)), [task or "held out ↓" for task in rows])
                for task, label in zip(rows, axis.get_yticklabels(), strict=True):
                    label.set_color(ACCENT if None in rows and task not in above else INK)
                    label.set_fontweight("bold" if task is None else "normal")

    bar = figure.add_axes((left / width, 0.45 / height, 3.2 / width, 0.13 / height))
    colour_bar = figure.colorbar(shown, cax=bar, orientation="horizontal", extend="both")
    ticks = np.linspace(-limit, limit, 5)
    colour_bar.set_ticks(list(ticks), labels=[f"{2**t / experts:.3g}" for t in ticks])
    colour_bar.outline.set_visible(False)
    bar.tick_params(labelsize=8, length=2)
    bar.set_title(f"{measure} (uniform: {1 / experts:.3g})", size=9, loc="left", c=INK, pad=4)
    return save(figure, png)


def _image(by_task: Mapping[str, Any], rows: Sequence[str | None], experts: int) -> np.ndarray:
    """[rows, E] log2 of the probabilities' multiple of 1/E; NaN where there are none."""
    image = np.full((len(rows), experts), np.nan)
    for i, task in enumerate(rows):
        if task is not None and task in by_task:
            image[i] = by_task[task]
    return np.log2(np.maximum(image * experts, 1e-6))


def _lines(sites: Sequence[str], fitting: int) -> list[list[str]]:
    """The sites in lines of at most `fitting`: a stack starts a line, a layer stays together."""
    layers: dict[tuple, list[str]] = {}
    for site in sites:
        found = _SITE.fullmatch(site)
        layers.setdefault(found.group(1, 2) if found else ("", site), []).append(site)
    lines: list[list[str]] = []
    last = None
    for (stack, _), of_layer in layers.items():
        if lines and stack == last and len(lines[-1]) + len(of_layer) <= fitting:
            lines[-1] += of_layer
        else:
            each = -(-len(of_layer) // -(-len(of_layer) // fitting))  # lines of like length
            lines += [of_layer[i : i + each] for i in range(0, len(of_layer), each)]
        last = stack
    return lines


_SITE = re.compile(
    r"(?:.*/)?(encoder|decoder)/layers_(\d+)/(\w+)/(\w+?)(?:_adapter)?(?:/router)?(?:/kernel)?"
)


def _site_title(site: str) -> str:
    """`decoder/layers_3/encoder_decoder_attention/key_adapter` as `dec 3 · cross key`."""
    found = _SITE.fullmatch(site)
    if not found:
        return site
    stack, layer, module, name = found.groups()
    kind = {"encoder_decoder_attention": "cross ", "self_attention": "self "}.get(module, "")
    return f"{stack[:3]} {layer} · {kind}{name}"


def inches(text: str, size: float) -> float:
    """The width of a line of text at a font size in points."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=size).get_extents().width / 72


def _read(file: Path) -> dict[int, dict]:
    """JSON lines by step, the last of a step counting."""
    rows: dict[int, dict] = {}
    try:
        text = file.read_text()
    except OSError as error:
        raise InputError(f"{file}: expected a file of metrics, found {error.strerror}") from None
    lines = text.split("\n")[:-1]  # a last line without an end is still being written
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'{file}, line {number}: expected a JSON object with "step", found {line[:60]!r}'
            ) from None
    return rows


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and the `width` before and after it, as far as there are any."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def pyplot() -> Any:
    """matplotlib.pyplot without a screen, in the house's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "savefig.dpi": 150,
        }
    )
    return plt


def save(figure: Any, png: str | Path) -> Path:
    """Written beside and renamed, so that no half picture is left."""
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    beside = png.with_name(f".{png.name}.part")
    figure.savefig(beside, format="png")
    beside.replace(png)
    pyplot().close(figure)
    return png
