"""Writes benchmarks/RESULTS.md from the rows in benchmarks/results/*.json and their targets.

python benchmarks/results.py
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import common

HERE = pathlib.Path(__file__).parent
Measured = Mapping[str, Any]  # a row of a results file

FIGURES: dict[str, Callable[[Measured], float]] = {
    "time": lambda row: row["ratio"][1],
    "speed": lambda row: 1 / row["ratio"][1],
    "memory": lambda row: row["ours"]["peak"] / row["peer"]["peak"],
    "temporaries": lambda row: row["ours"]["temporaries"] / row["peer"]["temporaries"],
    "seconds": lambda row: row["ours"]["seconds"],
    "arrays": lambda row: row["ours"]["beyond"] / row["ours"]["largest"],
    "utilization": lambda row: row["ours"]["utilisation"],
}
# The targets of these figures are lower bounds, those of all others are upper bounds.
AT_LEAST = ("speed", "utilization")


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      name: name of the row in the results files. It contains 'gpu' if the row needs a GPU.
      description: name of the row in the table.
      targets: figure, a key of `FIGURES` -> its bound.
    """

    name: str
    description: str
    targets: Mapping[str, float]


# Parts of descriptions that several rows share.
_MOLORA = "MoLORA-10 of rank 4 against LoRA of rank 40, whole step"
_MOV = "MoV-30 against (IA)³, whole step"
_FORMULATION = "MoLORA's layer, 30 experts, against the paper's formulation, 512 to"
_LAYER = "MoV-30's layer, forward and backward, against its floor of 2½ copies"
_PEFT = "against transformers and PEFT"
_TORCH = "forward pass in PyTorch, Small,"
_SCORING = "rank classification, Small, 16 × 4 choices, 256/8, against"
_SPARSE = "step of Switch-8, T5 Small's width, against"
_SPARSE_GRADS = "gradients of Switch-8, T5 Small's width, against"
_NO_LIMIT = "gradients of Switch-8 without a limit against capacity factor 1.25,"

ROWS = [
    Row("molora_against_lora/cpu", f"{_MOLORA}, Small", {"time": 1.05}),
    Row("molora_against_lora/gpu", f"{_MOLORA}, Large", {"time": 1.05}),
    Row("mov_against_ia3/cpu", f"{_MOV}, Small", {"time": 1.25}),
    Row("mov_against_ia3/gpu", f"{_MOV}, Large", {"time": 1.10}),
    Row("mov_layer/gpu gate both", f"{_LAYER}, `gate` of Large", {"time": 1.5}),
    Row("mov_layer/gpu key both", f"{_LAYER}, `key` of Large", {"time": 1.5}),
    *(
        Row(
            f"molora_formulation/cpu D to {output}",
            f"{_FORMULATION} {size}",
            {"speed": 10, "temporaries": 0.05},
        )
        for output, size in (("D", 512), ("2D", 1024))
    ),
    *(
        Row(
            f"step_against_peft/{method}",
            f"step {_PEFT}, Small, {common.METHODS[method]}",
            {"time": 1.0, "memory": 0.8},
        )
        for method in ("ia3", "lora", "full")
    ),
    Row("torch_mixture/mov", f"{_TORCH} MoV-10 against PEFT's (IA)³", {"time": 1.35}),
    Row(
        "torch_mixture/molora",
        f"{_TORCH} MoLORA-10 of rank 4 against PEFT's LoRA of rank 40",
        {"time": 1.15},
    ),
    *(
        Row(
            f"step_against_t5x/{method}",
            f"step against T5X, Small, {common.METHODS[method]}",
            {"time": 0.75},
        )
        for method in ("ia3", "lora")
    ),
    *(
        Row(
            f"gpu_throughput/{size} {method}",
            f"tokens per second {_PEFT}, {size}, {common.METHODS[method]}",
            {"speed": 2.0, "utilization": 0.5},
        )
        for size in ("large", "xl")
        for method in ("ia3", "lora")
    ),
    Row("gpu_throughput/large mov", "utilization, large, MoV-10", {"utilization": 0.5}),
    Row("gpu_throughput/xl mov", "utilization, xl, MoV-10", {"utilization": 0.5}),
    Row("xxl_on_one_gpu/gpu", "XXL, 11B, MoV-10, on one GPU of 80 GB", {}),
    Row("score_choices/cpu passes", f"{_SCORING} one pass per choice", {"speed": 3.0}),
    Row("score_choices/cpu torch", f"{_SCORING} torch, inputs encoded once as well", {"time": 1.0}),
    Row(
        "api_rank/cpu",
        "the Python API's `rank`, 16 × 4 choices, 256/8, against its program",
        {"time": 1.05},
    ),
    Row(
        "lm_eval_choices/cpu",
        "lm-evaluation-harness, 200 × 4 choices, 128/8, against its model `hf`",
        {"speed": 2.5},
    ),
    Row("sparse_step/hf", f"{_SPARSE} Hugging Face's", {"time": 0.8}),
    Row(
        "sparse_step/flaxformer",
        f"{_SPARSE} flaxformer's, as shipped",
        {"time": 0.5, "temporaries": 0.6},
    ),
    Row("sparse_step/lookup", f"{_SPARSE} flaxformer's, embedding by lookup", {"time": 0.75}),
    Row("sparse_step/dense", f"{_SPARSE_GRADS} dense T5", {"time": 1.15}),
    Row("sparse_step/dense_top_2", f"{_SPARSE_GRADS} dense T5, top-2", {"time": 1.6}),
    Row(
        "sparse_step/gpu dense",
        "gradients of Switch-8, T5 Base's width, bfloat16, against dense T5",
        {"time": 1.25},
    ),
    Row("sparse_step/no_limit", f"{_NO_LIMIT} balanced", {"time": 1.3}),
    Row("sparse_step/one_expert", f"{_NO_LIMIT} all tokens at one expert", {"time": 1.5}),
    Row(
        "sparse_routing/cpu",
        "routing, dispatch and combination, 8,192 tokens, 128 experts, against an MLP's time",
        {"time": 0.1},
    ),
    Row(
        "sparse_load/upcycled",
        "upcycling T5 v1.1 Large to 8 experts, against reading it dense",
        {"time": 1.3, "arrays": 1.0},
    ),
    Row("sparse_load/switch", "reading Switch-Base-8 from a Hugging Face folder", {"arrays": 2.0}),
    Row(
        "api_rank/cpu first answer",
        "`import pemoe_jax` to the first answer, tiny",
        {"seconds": 4.0},
    ),
    Row("startup/cpu", "process start to first step, tiny, programs cached", {"seconds": 15.0}),
]

HEAD = """\
# Measurements

`python benchmarks/results.py` writes this file from `benchmarks/results/`, where `make bench` puts
its rows. Time and speed are ratios to the peer: the median over rounds in which both alternate, and
the middle half of the rounds' ratios. The floor is a lower bound (`benchmarks/floors.py`): the time
of the operations (for a frozen base model the forward pass and the gradients of activations) or of
the bytes moved, at the rates that the machine reached in the same run. Memory on a CPU is the peak
of the whole process, including its libraries and the compilation; in 1.2 + 0.3 GB the second number
is the memory before the model was built. T is XLA's memory for temporaries. Loading is measured
beyond the parameters in the largest array's size (arrays). Memory on a GPU is the device's peak.
[NOTES.md](NOTES.md) explains what was tried for each row, and why some miss their
target.

| | target | measured | ours | peer | floor | memory: ours | peer |
| :-- | :-- | :-- | --: | --: | --: | --: | --: |
"""


def read_rows(folder: pathlib.Path) -> dict[str, Measured]:
    """Returns {name: row} of all files; if two rows have the same name, the last file's is used."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        rows |= {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    return rows


def format_line(row: Row, measured: Measured | None) -> str:
    """Returns a line of the table."""
    # Lines are broken by <br>, because a cell of a Markdown table is one line.
    targets = "<br>".join(
        f"{name} {'≥' if name in AT_LEAST else '≤'} {format_number(name, limit)}"
        for name, limit in row.targets.items()
    )
    if measured is None:
        hint = " (needs a GPU)" if "gpu" in row.name else ""
        return f"| {row.description} | {targets or 'fits'} | not measured{hint} | | | | | |"
    figures = "<br>".join(format_figure(*target, measured) for target in row.targets.items())
    ours, peer = measured["ours"], measured.get("peer")
    cells = [row.description, targets or "fits", figures or "fits"]
    cells += [format_time(ours), format_time(peer) if peer else ""]
    cells.append(format_duration(measured["floor"]["seconds"]) if measured["floor"] else "")
    cells += [format_memory(ours), format_memory(peer) if peer else ""]
    return f"| {' | '.join(cells)} |"


def format_number(name: str, number: float) -> str:
    """Returns the value of a figure as text."""
    return f"{number:.0%}" if name == "utilization" else f"{number:.3g}"


def format_figure(name: str, limit: float, measured: Measured) -> str:
    """Returns a figure with its spread, if it is a ratio, and whether it misses its target."""
    number, spread = FIGURES[name](measured), ""
    if name in ("time", "speed"):
        low, _, high = measured["ratio"]
        # Speed is the inverse of the ratio, so the ends of the spread are exchanged.
        low, high = (1 / high, 1 / low) if name == "speed" else (low, high)
        spread = f" ({low:.3g}–{high:.3g})"
    is_met = number >= limit if name in AT_LEAST else number <= limit
    return f"{name} {format_number(name, number)}{spread}{'' if is_met else ', **missed**'}"


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
    elif "beyond" in side:
        parts.append(f"{side['parameters'] / 1e9:.2f} GB, {side['beyond'] / 1e6:.0f} MB beyond")
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
        f" {measured['rounds']} rounds, in which other processes used"
        f" {measured['others used']:.0%} of the cores. {versions}.{floor}"
    )


def main() -> None:
    """Writes RESULTS.md."""
    rows = read_rows(HERE / "results")
    lines = [format_line(row, rows.get(row.name)) for row in ROWS]
    conditions = [format_conditions(row, rows[row.name]) for row in ROWS if row.name in rows]
    text = HEAD + "\n".join(lines) + "\n\n## Conditions\n\n" + "\n".join(conditions) + "\n"
    (HERE / "RESULTS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
