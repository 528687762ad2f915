"""Writes benchmarks/RESULTS.md from the rows in benchmarks/results/*.json and their targets.

python benchmarks/results.py
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common

HERE = pathlib.Path(__file__).parent
Measured = Mapping[str, Any]  # a row of a results file


@dataclasses.dataclass(frozen=True)
class Target:
    """A target of a row.

    Attributes:
      name: name of the figure.
      figure: computes it from the row.
      limit: its bound.
      at_least: whether the bound is a lower one.
      percent: whether it is shown as a percentage.
    """

    name: str
    figure: Callable[[Measured], float]
    limit: float
    at_least: bool = False
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.name} {'≥' if self.at_least else '≤'} {self.format(self.limit)}"

    def format(self, number: float) -> str:
        return f"{number:.0%}" if self.percent else f"{number:.3g}"

    def is_met(self, row: Measured) -> bool:
        number = self.figure(row)
        return number >= self.limit if self.at_least else number <= self.limit


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: the row's name, description and targets; whether it needs a GPU."""

    name: str
    description: str
    targets: Sequence[Target]
    gpu: bool = False


def _time(limit: float) -> Target:
    return Target("time", lambda row: row["ratio"][1], limit)


def _speed(limit: float) -> Target:
    return Target("speed", lambda row: 1 / row["ratio"][1], limit, at_least=True)


def _memory(limit: float) -> Target:
    return Target("memory", lambda row: row["ours"]["peak"] / row["peer"]["peak"], limit)


def _temporaries(limit: float) -> Target:
    return Target(
        "temporaries",
        lambda row: row["ours"]["temporaries"] / row["peer"]["temporaries"],
        limit,
    )


def _seconds(limit: float) -> Target:
    return Target("seconds", lambda row: row["ours"]["seconds"], limit)


_UTILIZATION = Target(
    "utilization", lambda row: row["ours"]["utilisation"], 0.5, at_least=True, percent=True
)
_PEFT = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "full": "full"}
_MOLORA = "MoLORA-10 of rank 4 against LoRA of rank 40, whole step"
_MOV = "MoV-30 against (IA)³, whole step"
_FORMULATION = "MoLORA's layer, 30 experts, against the paper's formulation"
_LAYER = "MoV-30's layer, forward and backward, against its floor of 2½ copies"
_SCORING = "rank classification, Small, 16 × 4 choices, 256/8"

ROWS = [
    Row("molora_against_lora/cpu", f"{_MOLORA}, Small", [_time(1.05)]),
    Row("molora_against_lora/gpu", f"{_MOLORA}, Large", [_time(1.05)], gpu=True),
    Row("mov_against_ia3/cpu", f"{_MOV}, Small", [_time(1.25)]),
    Row("mov_against_ia3/gpu", f"{_MOV}, Large", [_time(1.10)], gpu=True),
    Row("mov_layer/gpu gate both", f"{_LAYER}, `gate` of Large", [_time(1.5)], gpu=True),
    Row("mov_layer/gpu key both", f"{_LAYER}, `key` of Large", [_time(1.5)], gpu=True),
    Row(
        "molora_formulation/cpu D to D",
        f"{_FORMULATION}, 512 to 512",
        [_speed(10), _temporaries(1 / 20)],
    ),
    Row(
        "molora_formulation/cpu D to 2D",
        f"{_FORMULATION}, 512 to 1024",
        [_speed(10), _temporaries(1 / 20)],
    ),
    *(
        Row(
            f"step_against_peft/{method}",
            f"step against transformers and PEFT, Small, {name}",
            [_time(1.0), _memory(0.8)],
        )
        for method, name in _PEFT.items()
    ),
    *(
        Row(
            f"step_against_t5x/{method}", f"step against T5X, Small, {_PEFT[method]}", [_time(0.75)]
        )
        for method in ("ia3", "lora")
    ),
    *(
        Row(
            f"gpu_throughput/{size} {method}",
            f"tokens per second against transformers and PEFT, {size}, {_PEFT[method]}",
            [_speed(2.0), _UTILIZATION],
            gpu=True,
        )
        for size in ("large", "xl")
        for method in ("ia3", "lora")
    ),
    *(
        Row(f"gpu_throughput/{size} mov", f"utilization, {size}, MoV-10", [_UTILIZATION], gpu=True)
        for size in ("large", "xl")
    ),
    Row("xxl_on_one_gpu/gpu", "XXL, 11B, MoV-10, on one GPU of 80 GB", [], gpu=True),
    Row("score_choices/cpu passes", f"{_SCORING}, against one pass per choice", [_speed(3.0)]),
    Row(
        "score_choices/cpu torch",
        f"{_SCORING}, against torch, inputs encoded once as well",
        [_time(1.0)],
    ),
    Row("startup/cpu", "process start to first step, tiny, programs cached", [_seconds(15.0)]),
]

HEAD = """\
# Measurements

`python benchmarks/results.py` writes this file from `benchmarks/results/`, where `make bench` puts
its rows. Time and speed are ratios to the peer: the median over rounds in which both alternate, and
the middle half of the rounds' ratios. The floor is a lower bound (`benchmarks/floors.py`): the time
of the operations (for a frozen base model the forward pass and the gradients of activations) or of
the bytes moved, at the rates that the machine reached in the same run. Memory on a CPU is the peak
of the whole process, including its libraries and the compilation; in 1.2 + 0.3 GB the second number
is the memory before the model was built. T is XLA's memory for temporaries. Memory on a GPU is the
device's peak. [NOTES.md](NOTES.md) explains what was tried for each row, and why some miss their
target.

| | target | measured | ours | peer | floor | memory: ours | peer |
| :-- | :-- | :-- | --: | --: | --: | --: | --: |
"""


def read_rows(folder: pathlib.Path) -> dict[str, Measured]:
    """Returns {name: row} of all files; of equal names the row in the last file counts."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        rows |= {row["row"]: row for row in json.loads(path.read_text())}
    return rows


def format_line(row: Row, measured: Measured | None) -> str:
    """Returns a line of the table."""
    targets = "<br>".join(map(str, row.targets)) or "fits"
    if measured is None:
        hint = " (needs a GPU)" if row.gpu else ""
        return f"| {row.description} | {targets} | not measured{hint} | | | | | |"
    figures = "<br>".join(format_figure(target, measured) for target in row.targets) or "fits"
    ours, peer = measured["ours"], measured.get("peer")
    floor = format_duration(measured["floor"]["seconds"]) if measured["floor"] else ""
    times, memories = (
        [formatted(side) if side else "" for side in (ours, peer)]
        for formatted in (format_time, format_memory)
    )
    return f"| {' | '.join([row.description, targets, figures, *times, floor, *memories])} |"


def format_figure(target: Target, measured: Measured) -> str:
    """Returns a figure with its spread, if it is a ratio, and whether it misses the target."""
    spread = ""
    if target.name in ("time", "speed"):
        low, _, high = measured["ratio"]
        if target.name == "speed":
            low, high = 1 / high, 1 / low
        spread = f" ({low:.3g}–{high:.3g})"
    verdict = "" if target.is_met(measured) else ", **missed**"
    return f"{target.name} {target.format(target.figure(measured))}{spread}{verdict}"


def format_duration(seconds: float) -> str:
    """Returns '1.23 s' or '4.56 ms'."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_time(side: Measured) -> str:
    """Returns the time of a step, and on a GPU the tokens per second."""
    text = format_duration(side["seconds"])
    if side.get("device peak"):
        text += f"<br>{side['tokens'] / side['seconds']:,.0f} tokens/s"
    return text


def format_memory(side: Measured) -> str:
    """Returns the peak of the device or of the process, and the temporaries."""
    parts = []
    if side.get("device peak"):
        parts.append(f"{side['device peak'] / 1e9:.1f} GB")
    elif "before" in side:
        model = side["peak"] - side["before"]
        parts.append(f"{model / 1e9:.2f} + {side['before'] / 1e9:.2f} GB")
    elif "peak" in side:
        parts.append(f"{side['peak'] / 1e9:.2f} GB")
    if side.get("temporaries") is not None:
        parts.append(f"T {side['temporaries'] / 1e6:,.0f} MB")
    return "<br>".join(parts)


def format_conditions(row: Row, measured: Measured) -> str:
    """Returns a list item with the command, machine, versions and floor of a row."""
    sides = [measured["ours"], *([measured["peer"]] if "peer" in measured else [])]
    versions = "; ".join(f"{s['name']}: {s['versions']}" for s in sides if "versions" in s)
    floor = f" Floor: {common.describe_floor(measured['floor'])}." if measured["floor"] else ""
    return (
        f"- **{row.description}**: `{measured['command']}`. {measured['machine']};"
        f" {measured['rounds']} rounds, in which others used {measured['others used']:.0%} of the"
        f" cores. {versions}.{floor}"
    )


def main() -> None:
    """Writes RESULTS.md."""
    rows = read_rows(HERE / "results")
    lines = [format_line(row, rows.get(row.name)) for row in ROWS]
    conditions = [format_conditions(row, rows[row.name]) for row in ROWS if row.name in rows]
    text = HEAD + "\n".join(lines) + "\n\n## Conditions\n\n" + "\n".join(conditions) + "\n"
    (HERE / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
