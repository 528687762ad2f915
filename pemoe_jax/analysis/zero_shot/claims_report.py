"""Reports of measured claims: the contents of claims.json, claims.md and claims.png.

claims.json has four keys. "rule" is `claims.VERDICT_RULE`, "experiments" has the accuracy and the
costs of each experiment of the sweep, "choices" has the settings that were chosen on training
tasks, and "claims" has each claim with its `claims.Result`. Accuracies are in %, differences in
percentage points.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.analysis import plots
from pemoe_jax.analysis.tables import MISSING, Table, format_bytes
from pemoe_jax.analysis.zero_shot import claims as claims_lib
from pemoe_jax.analysis.zero_shot import result_tables
from pemoe_jax.analysis.zero_shot.results import JsonObject

# An experiment's entry has these keys of its first run; `evaluate.describe_run` explains them.
_RUN_KEYS = ("variant", "trainable", "total", "used", "step")
_VERDICTS = (
    claims_lib.REPRODUCED,
    claims_lib.NOT_REPRODUCED,
    claims_lib.UNDECIDED,
    claims_lib.NOT_MEASURED,
)
# Green, red, blue and gray, as in `plots.COLORS`.
_COLORS = dict(zip(_VERDICTS, ("#009E73", "#D55E00", "#0072B2", "#999999"), strict=True))
_COST_NOTE = (
    "Activated: parameters that a token uses. File: size of the trained parameters in float32. Peak"
    " memory: in training; on a CPU, of the whole process with its libraries. Step: median time of"
    " a training step, without compilation. Evaluation: time to score all examples, with"
    " compilation."
)
_NOTES = (
    "Difference: of accuracies, in percentage points, mean over seeds. Seeds: paired t-interval of"
    " 95 % over the differences of single seeds, which covers other adapters and another order of"
    " the data. Prompts: bootstrap interval of 95 % of the differences averaged over seeds, with"
    " prompts and examples drawn independently. Agree: seeds whose difference is above the bound.",
    claims_lib.VERDICT_RULE + " Intervals are those of single claims, not of all together.",
)


def build_report(
    claims: Sequence[claims_lib.Claim],
    runs: Mapping[str, Mapping[int, JsonObject]],
    choices: Sequence[Mapping[str, object]] = (),
    base: JsonObject | None = None,
) -> JsonObject:
    """Returns the contents of claims.json.

    Args:
      claims: the claims.
      runs: experiment -> seed -> run, as `results.load_results` loads it.
      choices: entries of a sweep's choices.json.
      base: run of the base model.

    Raises:
      InputError: see `claims.measure`.
    """
    experiments: dict[str, dict[int, JsonObject]] = {"base": {0: base}} if base else {}
    experiments |= {name: dict(by_seed) for name, by_seed in runs.items()}
    report = {
        "rule": claims_lib.VERDICT_RULE,
        "experiments": [_experiment(name, by_seed) for name, by_seed in experiments.items()],
        "choices": list(choices),
        "claims": [
            {**dataclasses.asdict(claim), **claims_lib.measure(claim, runs)} for claim in claims
        ],
    }
    return _rounded(report)


def _experiment(name: str, by_seed: Mapping[int, JsonObject]) -> JsonObject:
    """Returns an experiment's entry in claims.json, with means over its seeds."""
    seeds = sorted(by_seed)
    first = by_seed[seeds[0]]
    averages = [100 * by_seed[seed]["average"]["mean"] for seed in seeds]
    return {
        "experiment": name,
        **{key: first.get(key) for key in _RUN_KEYS},
        "seeds": seeds,
        "accuracies": averages,
        "accuracy": statistics.fmean(averages),
        "chance": 100 * first["average"]["chance"],
        **_costs([by_seed[seed] for seed in seeds]),
        "datasets": {
            dataset: statistics.fmean(
                100 * by_seed[seed]["datasets"][dataset]["mean"] for seed in seeds
            )
            for dataset in first["datasets"]
        },
    }


def _costs(runs: Sequence[JsonObject]) -> JsonObject:
    """Returns the costs that are known, and the device.

    `step_seconds` and `evaluation_seconds` are means over seeds, in seconds. `peak_memory` is the
    largest of all seeds, in bytes, or None if no seed recorded it. Without step times, the device
    and the memory are left out.
    """
    # If a run has trained on several machines, its entry for the first one counts.
    steps = [run["step_times"][0] for run in runs if run.get("step_times")]
    costs = {
        "step_seconds": [entry["seconds"] for entry in steps],
        "evaluation_seconds": [run.get("evaluation_seconds") for run in runs],
    }
    known = {name: [v for v in values if v is not None] for name, values in costs.items()}
    means = {name: statistics.fmean(values) for name, values in known.items() if values}
    if not steps:
        return means
    memory = max(float(entry.get("memory", 0)) for entry in steps)
    return {"device": steps[0]["device"], **means, "peak_memory": memory or None}


def _rounded(value: Any) -> Any:
    """Rounds all floats to four decimals, so that equal runs write equal files."""
    if isinstance(value, dict):
        return {key: _rounded(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(member) for member in value]
    return round(value, 4) if isinstance(value, float) else value


def summary(report: JsonObject) -> str:
    """Returns one line that says how many claims have each verdict."""
    counts = Counter(claim["verdict"] for claim in report["claims"])
    words = [f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict]]
    return f"{len(report['claims'])} claims: {', '.join(words)}"


def to_tables(report: JsonObject) -> list[Table]:
    """Returns the tables of claims, of the experiments' accuracies, and of their costs."""
    return [_claims_table(report), _experiments_table(report), _costs_table(report)]


def _claims_table(report: JsonObject) -> Table:
    rows = []
    for claim in report["claims"]:
        bound = "" if claim["expect"] == "better" else f" (−{claim['margin']:g})"
        rows.append(
            [
                claim["claim"] + bound,
                claim["paper"],
                _compared(claim),
                claim["verdict"],
                MISSING
                if claim["difference"] is None
                else f"{round(claim['difference'], 1) + 0.0:+.1f}",  # not -0.0
                _interval(claim["seed_interval"]),
                _interval(claim["prompt_interval"]),
                f"{claim['agree']} of {len(claim['seeds'])}",
            ]
        )
    columns = ["claim", "in the paper", "compared", "verdict", "difference", "seeds", "prompts"]
    return Table(
        f"Claims: {summary(report).partition(': ')[2]}",
        [*columns, "agree"],
        rows,
        notes=list(_NOTES),
        num_text=4,
    )


def _compared(claim: JsonObject) -> str:
    return " + ".join(claim["plus"]) + " − " + " − ".join(claim["minus"])


def _interval(ends: Sequence[float] | None) -> str:
    return MISSING if ends is None else f"{ends[0]:+.1f} to {ends[1]:+.1f}"


def _experiments_table(report: JsonObject) -> Table:
    experiments = report["experiments"]
    datasets = list(dict.fromkeys(name for row in experiments for name in row["datasets"]))
    rows = []
    for row in experiments:
        accuracies = row["accuracies"]
        deviation = f" ±{statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        trainable = row["trainable"]
        rows.append(
            [
                row["experiment"],
                str(row["variant"] or MISSING),
                MISSING if trainable is None else f"{trainable:,}",
                str(len(row["seeds"])),
                *(_accuracy(row["datasets"].get(name)) for name in datasets),
                f"{row['accuracy']:.1f}{deviation}",
            ]
        )
    chance = result_tables.format_range([row["chance"] for row in experiments], "{:.1f}".format)
    return Table(
        "Accuracy in %: mean over prompts, mean ± standard deviation over seeds",
        ["experiment", "method", "trainable", "seeds", *datasets, "average"],
        rows,
        footer=[["chance", *[""] * (3 + len(datasets)), chance]],
        num_text=2,
    )


def _costs_table(report: JsonObject) -> Table:
    rows = []
    for row in report["experiments"]:
        trainable, memory = row["trainable"], row.get("peak_memory")
        step, evaluation = row.get("step_seconds"), row.get("evaluation_seconds")
        counts = (trainable, row["total"], row["used"])
        rows.append(
            [
                row["experiment"],
                *(MISSING if count is None else f"{count:,}" for count in counts),
                MISSING if trainable is None else format_bytes(4 * trainable),
                format_bytes(memory) if memory else MISSING,
                MISSING if step is None else f"{1000 * step:.0f} ms",
                MISSING if evaluation is None else f"{evaluation:.1f} s",
                f"{row['accuracy']:.1f}",
            ]
        )
    devices = dict.fromkeys(row["device"] for row in report["experiments"] if "device" in row)
    columns = ["experiment", "trainable", "total", "activated", "file", "peak memory"]
    return Table(
        "Costs beside accuracy",
        [*columns, "step", "evaluation", "accuracy"],
        rows,
        notes=[_COST_NOTE + f" Device: {'; '.join(devices) or MISSING}."],
    )


def _accuracy(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def draw_forest(report: JsonObject, png: Path) -> Path:
    """Draws a line per claim: its difference, the difference of each seed, and both intervals."""
    pyplot = plots.import_pyplot()
    claims = [claim for claim in report["claims"] if claim["difference"] is not None]
    labels = [claim["claim"] for claim in claims]
    left = 0.4 + max((plots.text_width(label, 9) for label in labels), default=1.0)
    height = 1.3 + 0.42 * len(claims)
    width = left + 5.2
    figure = pyplot.figure(figsize=(width, height))
    ax = figure.add_axes((left / width, 0.75 / height, 4.6 / width, (height - 1.3) / height))
    for row, claim in enumerate(claims):
        color = _COLORS[claim["verdict"]]
        # In units of a line, seeds are drawn 0.12 above its middle and prompts 0.16 below.
        if claim["seed_interval"]:
            ax.plot(claim["seed_interval"], [row - 0.12] * 2, color=color, lw=2.6)
        ax.plot(claim["prompt_interval"], [row + 0.16] * 2, color=color, lw=1.0)
        bound = 0.0 if claim["expect"] == "better" else -claim["margin"]
        ax.plot([bound] * 2, [row - 0.4, row + 0.4], color=plots.TEXT_COLOR, lw=1.0)
        seeds = claim["differences"]
        style = {"fc": "white", "ec": color, "lw": 0.9, "zorder": 3}
        ax.scatter(seeds, [row - 0.12] * len(seeds), s=12, **style)
        ax.scatter([claim["difference"]], [row - 0.12], s=34, c=color, zorder=4)
    ax.axvline(0, color=plots.MUTED_COLOR, lw=0.8)
    ax.set_yticks(range(len(claims)), labels, size=9)
    ax.set_ylim(len(claims) - 0.5, -0.5)
    ax.tick_params(length=0)
    ax.set_xlabel("difference in percentage points")
    handles = [
        pyplot.Line2D([], [], color=_COLORS[verdict], marker="o", lw=2, label=verdict)
        for verdict in dict.fromkeys(claim["verdict"] for claim in claims)
    ]
    if handles:
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            frameon=False,
            fontsize=8,
        )
    legend = (
        "dot: mean over seeds · thick: 95 % over seeds, small dots: seeds · thin: 95 % over prompts"
        " and examples · black line: bound"
    )
    figure.text(0.1 / width, 0.12 / height, legend, size=7.5, color=plots.TEXT_COLOR)
    return plots.save_figure(figure, png)
