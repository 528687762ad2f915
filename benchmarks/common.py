"""What the benchmark scripts share: flags, dimensions, ratios, and rows of results."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import floors
import machine
import workers
from workers import REPO, Side

VOCAB_SIZE = 32128
METHODS = {"ia3": "(IA)³", "lora": "LoRA, rank 4", "full": "full", "mov": "MoV-10"}


def make_parser(
    doc: str | None, rounds: int = 9, size: str | None = None, gpu: bool = False
) -> argparse.ArgumentParser:
    """Returns a parser with the flags that scripts share.

    Args:
      doc: description, the script's docstring.
      rounds: default of --rounds.
      size: default of --size; None: the script does not have the flag.
      gpu: whether the script has the flag --gpu.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", default=rounds, type=int, help="steps of each side")
    if size is not None:
        parser.add_argument("--size", default=size, help="dimensions: gin/models/t5_1_1_SIZE.gin")
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="use the GPU, not two CPU threads")
    parser.add_argument("--json", type=pathlib.Path, help="output file of the rows")
    return parser


def add_torch_flags(parser: argparse.ArgumentParser, mode: str) -> None:
    """Adds the flags of a torch peer, which runs in `mode` by default."""
    parser.add_argument("--torch", default=peer_python("torch"), help="Python of the torch peer")
    parser.add_argument("--torch_mode", default=mode, help="settings of torch, see torch_peer.py")
    parser.add_argument("--search", action="store_true", help="try all settings of torch first")


def torch_mode(
    args: argparse.Namespace, make_side: Callable[[str], Side], modes: Sequence[str]
) -> str:
    """Returns --torch_mode, or with --search the fastest of `modes`; prints their times."""
    if not args.search:
        return args.torch_mode
    seconds = {}
    for mode in modes:
        side = make_side(mode)
        workers.alternate([side], args.rounds)
        seconds[mode] = statistics.median(side.seconds)
        peak = side.info["peak"] / machine.MEGABYTE
        print(f"{side.name}: {seconds[mode]:.3f} s, least {min(side.seconds):.3f}, {peak:.0f} MB")
    return min(seconds, key=lambda mode: seconds[mode])


def dimensions(size: str) -> dict[str, int]:
    """Returns the dimensions in a size's gin file, under T5Config's names."""
    text = (REPO / "gin" / "models" / f"t5_1_1_{size}.gin").read_text(encoding="utf-8")
    return {name: int(number) for name, number in re.findall(r"^  (\w+) = (\d+)$", text, re.M)}


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    # `statistics.quantiles` needs two numbers, but a trial may take a single round.
    if len(numbers) == 1:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def paired_ratios(ours: Sequence[float], peers: Sequence[float]) -> tuple[float, float, float]:
    """Returns the quartiles of our times divided by the peer's of the same round."""
    # A slow minute of the machine slows both sides of a round, and cancels in their ratio.
    return quartiles([a / b for a, b in zip(ours, peers, strict=True)])


def peer_python(name: str) -> str:
    """Returns a peer's Python: PEMOE_<NAME>_PYTHON, or that of `make bench-peers`."""
    default = str(REPO / f".venv-{name}" / "bin" / "python")
    return os.environ.get(f"PEMOE_{name.upper()}_PYTHON", default)


def check_peer(python: str, flag: str) -> None:
    """Exits with one line if a peer's interpreter does not exist."""
    if shutil.which(python) is None:
        raise SystemExit(f"--{flag} must be a Python interpreter, got {python}: make bench-peers")


# --- rows ---


def measure_row(
    name: str, sides: Sequence[Side], rounds: int, sequential: bool = False
) -> dict[str, Any]:
    """Alternates our side and its peer, if there is one, and returns the row.

    Args:
      name: name of the row, see `results.ROWS`.
      sides: our side, and the peer's.
      rounds: number of steps of each side.
      sequential: see `workers.alternate`.
    """
    other_load = workers.alternate(sides, rounds, sequential)
    rates = [side.info["rates"] for side in sides if "rates" in side.info]
    work = sides[0].info.get("floor")
    floor = floors.floor_time(work, *rates) if work else None
    return make_row(name, sides[0], sides[1] if len(sides) > 1 else None, other_load, floor)


def add_utilization(row: dict[str, Any]) -> None:
    """Adds our utilization: the operations of the row's floor per second, over the chip's peak."""
    floor, ours = row["floor"], row["ours"]
    # Recorded results have this spelling of the key.
    ours["utilisation"] = floor["flops"] / ours["seconds"] / floor["flops a second"]


def make_row(
    name: str,
    ours: Side,
    peer: Side | None,
    other_load: float,
    floor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the row of one comparison, or of our side alone, for the results' JSON file.

    Args:
      name: name of the row, see `results.ROWS`.
      ours: our side, after its steps.
      peer: the side that it is compared with.
      other_load: share of the cores that other processes used.
      floor: return value of `floors.floor_time`.
    """
    row: dict[str, Any] = {"row": name, "ours": ours.as_dict()}
    if peer is not None:
        # Times are compared per token: a side that needs more memory may have smaller batches.
        scale = ours.info.get("tokens", 1) / peer.info.get("tokens", ours.info.get("tokens", 1))
        times, peer_times = zip(*ours.times, strict=True), zip(*peer.times, strict=True)
        ratios = [
            paired_ratios(own, [seconds * scale for seconds in other])
            for own, other in zip(times, peer_times, strict=True)
        ]
        row |= {"peer": peer.as_dict(), "ratio": ratios[0], "cpu ratio": ratios[1]}
    return {
        **row,
        "floor": dict(floor or {}),
        "rounds": len(ours.times),
        "others used": other_load,
        "machine": ours.info.get("device") or machine.description(),
        "command": _command(),
    }


def _command() -> str:
    """Returns the command line that started the script, without --json."""
    words = ["benchmarks/" + pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
    # The output path differs between machines, but rows of the same command should be equal.
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return f"python {shlex.join(words)}"


def write_rows(rows: Sequence[Mapping[str, Any]], path: pathlib.Path | None) -> None:
    """Prints the rows and, with a path, writes them as JSON."""
    from pemoe_jax.runtime import atomic_write

    for row in rows:
        print(describe_row(row), flush=True)
    if path is not None:
        atomic_write.write_text(path, json.dumps(list(rows), indent=1) + "\n")


def describe_row(row: Mapping[str, Any]) -> str:
    """Returns a row as lines of text."""
    title = f"{row['row']}: {row['rounds']} rounds, other processes used {row['others used']:.0%}"
    if "ratio" in row:
        low, middle, high = row["ratio"]
        title += (
            f"; {middle:.3f} of the peer's time, middle half {low:.3f}–{high:.3f},"
            f" of its CPU time {row['cpu ratio'][1]:.3f}"
        )
    lines = [title]
    for side in [row["ours"], *([row["peer"]] if "peer" in row else [])]:
        parts = [f"{side['seconds'] * 1e3:.4g} ms per step", f"fastest {side['fastest'] * 1e3:.4g}"]
        for key in (
            "peak",
            "peak of steps",
            "before",
            "temporaries",
            "device peak",
            "parameters",
            "beyond",
        ):
            if side.get(key) is not None:
                parts.append(f"{key} {side[key] / machine.MEGABYTE:.0f} MB")
        if "tokens" in side:
            parts.append(f"{side['tokens'] / side['seconds']:.0f} tokens/s")
        if "utilisation" in side:
            parts.append(f"utilization {side['utilisation']:.1%}")
        lines.append(f"  {side['name']}: {', '.join(parts)}; {side.get('versions', '')}")
    if row["floor"]:
        lines.append(f"  floor: {describe_floor(row['floor'])}")
    return "\n".join([*lines, f"  {row['machine']}; {row['command']}"])


def describe_floor(floor: Mapping[str, Any]) -> str:
    """Returns '412 ms (61.2 GFLOP at 148 G/s; 1.2 GB at 20 GB/s)'."""
    return (
        f"{floor['seconds'] * 1e3:.3g} ms ({floor['flops'] / 1e9:.4g} GFLOP at"
        f" {floor['flops a second'] / 1e9:.4g} G/s; {floor['bytes'] / 1e9:.3g} GB at"
        f" {floor['bytes a second'] / 1e9:.3g} GB/s)"
    )
