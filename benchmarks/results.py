"""Puts the measured rows beside their targets: benchmarks/results/*.json -> benchmarks/RESULTS.md.

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
Found = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """What a row is to reach.

    Attributes:
      name: of the figure.
      of: the row -> the figure.
      limit: its bound.
      at_least: whether it is the least, else the most.
      percent: how it is written.
    """

    name: str
    of: Callable[[Found], float]
    limit: float
    at_least: bool = False
    percent: bool = False

    def in_words(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.name} {sign} {self.written(self.limit)}"

    def written(self, number: float) -> str:
        return f"{number:.0%}" if self.percent else f"{number:.3g}"

    def is_met(self, row: Found) -> bool:
        number = self.of(row)
        return number >= self.limit if self.at_least else number <= self.limit


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: the row's name, what it is, its targets; whether it needs a GPU."""

    name: str
    what: str
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


_UTILISATION = Target(
    "utilisation", lambda row: row["ours"]["utilisation"], 0.5, at_least=True, percent=True
)
_PEFT = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "full": "full"}
_OF_STEP = "MoLORA-10 of rank 4 against LoRA of rank 40, whole step"
_OF_MOV = "MoV-30 against (IA)³, whole step"
_FORMULATION = "MoLORA's layer, 30 experts, against the paper's formulation"
_LAYER = "MoV-30's layer, forward and backward, against its floor of 2½ copies"
_SCORING = "rank classification, Small, 16 × 4 choices, 256/8"

ROWS = [
    Row("molora_against_lora/cpu", f"{_OF_STEP}, Small", [_time(1.05)]),
    Row("molora_against_lora/gpu", f"{_OF_STEP}, Large", [_time(1.05)], gpu=True),
    Row("mov_against_ia3/cpu", f"{_OF_MOV}, Small", [_time(1.25)]),
    Row("mov_against_ia3/gpu", f"{_OF_MOV}, Large", [_time(1.10)], gpu=True),
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
            f"tokens a second against transformers and PEFT, {size}, {_PEFT[method]}",
            [_speed(2.0), _UTILISATION],
            gpu=True,
        )
        for size in ("large", "xl")
        for method in ("ia3", "lora")
    ),
    *(
        Row(f"gpu_throughput/{size} mov", f"utilisation, {size}, MoV-10", [_UTILISATION], gpu=True)
        for size in ("large", "xl")
    ),
    Row("xxl_on_one_gpu/gpu", "XXL, 11B, MoV-10, on one GPU of 80 GB", [], gpu=True),
    Row("score_choices/cpu passes", f"{_SCORING}, against one pass a choice", [_speed(3.0)]),
    Row("score_choices/cpu torch", f"{_SCORING}, against torch with the same trick", [_time(1.0)]),
    Row("startup/cpu", "process start to first step, tiny, programs cached", [_seconds(15.0)]),
]

HEAD = """\
# What was measured

Made by `python benchmarks/results.py` from `benchmarks/results/`, which `make bench` fills.
Time and speed are ratios to the peer: the median over rounds in which the two take turns, and the
middle half of the rounds' ratios. The floor is the least that the operations (of a frozen base:
forward and the gradients of activations) or the bytes moved take at the rates measured beside
(`benchmarks/floors.py`). Memory on a CPU is the peak of the whole process, its libraries and the
compiling included; what it held before the model was built stands behind the plus: 1.2 + 0.3 GB.
T is what XLA takes for temporaries. On a GPU it is the device's own peak. What was tried for each
row, and why those that miss their target do: [NOTES.md](NOTES.md).

| | target | measured | ours | peer | floor | memory: ours | peer |
| :-- | :-- | :-- | --: | --: | --: | --: | --: |
"""


def read(folder: pathlib.Path) -> dict[str, Found]:
    """Name -> row, of all files; of two with one name that of the later file's name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        found |= {row["row"]: row for row in json.loads(path.read_text())}
    return found


def line(row: Row, found: Found | None) -> str:
    """Of the table."""
    wanted = "<br>".join(target.in_words() for target in row.targets) or "fits"
    if found is None:
        return f"| {row.what} | {wanted} | not measured{' (needs a GPU)' * row.gpu} | | | | | |"
    cells = [row.what, wanted, "<br>".join(measured(target, found) for target in row.targets)]
    if not row.targets:
        cells[-1] = "fits"
    cells += [side_time(found["ours"]), side_time(found.get("peer"))]
    cells.append(duration(found["floor"]["seconds"]) if found["floor"] else "")
    cells += [side_memory(found["ours"]), side_memory(found.get("peer"))]
    return f"| {' | '.join(cells)} |"


def measured(target: Target, found: Found) -> str:
    """A figure, its spread where it has one, and whether it does."""
    spread = ""
    if target.name in ("time", "speed"):
        ends = [found["ratio"][0], found["ratio"][2]]
        if target.name == "speed":
            ends = [1 / end for end in reversed(ends)]
        spread = f" ({ends[0]:.3g}–{ends[1]:.3g})"
    verdict = "" if target.is_met(found) else ", **missed**"
    return f"{target.name} {target.written(target.of(found))}{spread}{verdict}"


def duration(seconds: float) -> str:
    """As '1.23 s' or '4.56 ms'."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def side_time(side: Found | None) -> str:
    """A step, and on a GPU its tokens a second."""
    if side is None:
        return ""
    text = duration(side["seconds"])
    if side.get("device peak"):
        text += f"<br>{side['tokens'] / side['seconds']:,.0f} tokens/s"
    return text


def side_memory(side: Found | None) -> str:
    """The device's peak, or the process' and what of it is not the model's; temporaries."""
    if side is None:
        return ""
    parts = []
    if side.get("device peak"):
        parts.append(f"{side['device peak'] / 1e9:.1f} GB")
    elif "before" in side:
        above = side["peak"] - side["before"]
        parts.append(f"{above / 1e9:.2f} + {side['before'] / 1e9:.2f} GB")
    elif "peak" in side:
        parts.append(f"{side['peak'] / 1e9:.2f} GB")
    if side.get("temporaries") is not None:
        parts.append(f"T {side['temporaries'] / 1e6:,.0f} MB")
    return "<br>".join(parts)


def how(row: Row, found: Found) -> str:
    """How a row was measured, as an item of a list."""
    sides = [found["ours"], *([found["peer"]] if "peer" in found else [])]
    told = "; ".join(f"{side['name']}: {side['versions']}" for side in sides if "versions" in side)
    floor = f" Floor: {common.floor_in_words(found['floor'])}." if found["floor"] else ""
    return (
        f"- **{row.what}**: `{found['command']}`. {found['machine']}; {found['rounds']} rounds, in"
        f" which others used {found['others used']:.0%} of the cores. {told}.{floor}"
    )


def main() -> None:
    """Writes RESULTS.md."""
    found = read(HERE / "results")
    lines = [line(row, found.get(row.name)) for row in ROWS]
    told = [how(row, found[row.name]) for row in ROWS if row.name in found]
    text = HEAD + "\n".join(lines) + "\n\n## How\n\n" + "\n".join(told) + "\n"
    (HERE / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
