"""Writes the results of `make faults` to docs/reliability.json, and its tables to reliability.md.

python tests/faults/summary.py        renders the page from the recorded results
"""

import datetime
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


def record(part: str, result: Mapping[str, Any]) -> None:
    """Replaces one part of the recorded results, a key of `_PARTS`, and renders the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[part] = {"date": datetime.date.today().isoformat(), **result}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(), results))


def render(page: str, results: Mapping[str, Any]) -> str:
    """Returns the page with the text between `<!-- name -->` and `<!-- end -->` replaced."""
    for name, lines in _PARTS.items():
        if name in results:
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = "\n".join(lines(results[name])) + "\n"
            # A function, because backslashes of a replacement text would be interpreted.
            page, count = re.subn(pattern, lambda m: m[1] + text + m[2], page, flags=re.DOTALL)  # noqa: B023
            if count != 1:
                raise ValueError(f"{PAGE}: expected one place <!-- {name} -->, got {count}")
    return page


def _damaged_files(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| reader | files | one line | same | other values | traceback | too long | checksum |"
    yield "|:--|--:|--:|--:|--:|--:|--:|:--|"
    for name, row in result["readers"].items():
        columns = ("cases", "clear", "same", "changed", "traceback", "hang")
        cells = " | ".join(f"{row[column]:,}" for column in columns)
        yield f"| {name} | {cells} | {row['checksum'] or 'none'} |"
    yield ""
    yield f"Run on {result['date']}."


def _odd_settings(result: Mapping[str, Any]) -> Iterator[str]:
    counts = [result[key] for key in ("clear", "accepted", "traceback")]
    yield "| commands | one line | would have started | traceback |"
    yield "|--:|--:|--:|--:|"
    yield "| " + " | ".join(f"{count:,}" for count in (result["cases"], *counts)) + " |"
    yield ""
    yield f"Run on {result['date']}."


def _kills(result: Mapping[str, Any]) -> Iterator[str]:
    # A run with another end ends the script, and nothing is recorded: there is no column for it.
    yield "| method | killed at a random moment | at a file event |"
    yield "|:--|--:|--:|"
    for method, row in result["methods"].items():
        yield f"| {method} | {row['random moment']} | {row['file event']} |"
    yield ""
    total = sum(sum(row.values()) for row in result["methods"].values())
    yield f"{total} kills on {result['date']}."


def _two_processes(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| one of two processes | its exit code | the other's | after |"
    yield "|:--|--:|--:|--:|"
    for name in ("killed", "suspended"):
        row = result[name]
        other, itself = row["codes"]
        yield f"| {name} | {itself} | {other} | {row['seconds']} s |"
    yield ""
    yield f"Run on {result['date']}."


def _disks(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| fault | commands |"
    yield "|:--|--:|"
    for name, count in result["faults"].items():
        yield f"| {name} | {count} |"
    yield ""
    yield f"Run on {result['date']}."


def _soak(result: Mapping[str, Any]) -> Iterator[str]:
    (low, high), (fewest, most) = result["MiB"], result["files"]
    yield f"Run on {result['date']}: {result['cycles']} cycles in {result['minutes']:g} minutes."
    yield f"After the first 30 % of them, memory was {low:,} to {high:,} MiB"
    yield f"({result['MiB per cycle']:+.2f} MiB for each cycle), and {fewest} to {most} files"
    yield f"were open ({result['files per cycle']:+.3f} for each cycle)."


# Part of the results, which is also its mark in the page -> function that yields its lines.
_PARTS = {
    "damaged files": _damaged_files,
    "settings": _odd_settings,
    "kills": _kills,
    "two processes": _two_processes,
    "disks": _disks,
    "soak": _soak,
}


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(), json.loads(RESULTS.read_text())))
    sys.exit(0)
