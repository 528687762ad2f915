"""What a compiled program does, read off its text (XLA's HLO): collectives and matrix products.

The text is that of one device's program. What lies in a loop counts as often as the loop runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%[\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([0-9,]*)\})")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a program: its name, the shape of its result, what it is, and the rest."""

    name: str
    shape: str
    kind: str
    rest: str


@dataclass(frozen=True)
class Program:
    """The computations of a program by name, and how often each runs."""

    computations: dict[str, list[Instruction]]
    runs: dict[str, int]

    def instructions(self) -> Iterator[tuple[Instruction, int, str]]:
        """(instruction, how often it runs, name of its computation)."""
        for name, found in self.computations.items():
            for instruction in found:
                yield instruction, self.runs.get(name, 0), name


def parse(text: str) -> Program:
    """Reads a program's text, as `compiled.as_text()` gives it."""
    computations: dict[str, list[Instruction]] = {}
    entry, found = "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith("HloModule"):
            found = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction:
            found.append(Instruction(*instruction.groups()))
    runs: dict[str, int] = {}
    _count_runs(computations, entry, 1, runs)
    return Program(computations, runs)


def _count_runs(
    computations: dict[str, list[Instruction]], name: str, times: int, runs: dict[str, int]
) -> None:
    runs[name] = runs.get(name, 0) + times
    for instruction in computations.get(name, ()):
        if instruction.kind in (*COLLECTIVES, "reduce", "scatter", "sort", "reduce-window"):
            continue  # what they call adds or compares two numbers
        trips = _TRIPS.search(instruction.rest) if instruction.kind == "while" else None
        for called in _CALLED.findall(instruction.rest):
            for one in _OPERAND.findall(called):
                _count_runs(computations, one, times * (int(trips[1]) if trips else 1), runs)


def collectives(program: Program) -> dict[str, tuple[int, int]]:
    """kind -> (how many arrays, bytes) of a run of the program, of those kinds that it has.

    Bytes are those of each array whole: what an all-reduce, all-gather, all-to-all or permutation
    leaves on a device, and what a reduce-scatter takes. XLA may send several arrays as one.
    """
    found: dict[str, tuple[int, int]] = {}
    for instruction, times, _ in program.instructions():
        if instruction.kind not in COLLECTIVES or not times:
            continue
        arrays = len(_ARRAY.findall(instruction.shape))
        if instruction.kind == "all-to-all":
            arrays = 1  # its parts are listed as a tuple
        moved = size(instruction.shape)
        if instruction.kind == "reduce-scatter":
            moved *= _group(instruction.rest)
        count, total = found.get(instruction.kind, (0, 0))
        found[instruction.kind] = (count + arrays * times, total + moved * times)
    return {kind: found[kind] for kind in COLLECTIVES if kind in found}


def _group(rest: str) -> int:
    """How many devices take part in a collective together."""
    found = _GROUPS.search(rest)
    if not found:
        return 1
    return int(found[1]) if found[1] else len(found[2].split(","))


def size(shape: str) -> int:
    """Bytes of a shape, or of all in a tuple: `(f32[8,4]{1,0}, bf16[])` -> 130."""
    return sum(
        int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64)) * _bytes(kind)
        for kind, dims in _ARRAY.findall(shape)
    )


def _bytes(kind: str) -> int:
    """Of an element: f32 4, bf16 2, pred 1, f8e4m3fn 1, c64 8."""
    digits = re.match(r"[a-z]+(\d+)", kind)
    return max(1, int(digits[1]) // 8) if digits else 1


def products(program: Program) -> tuple[int, int]:
    """FLOPs of the matrix products: (each counted once, each as often as it runs)."""
    once = whole = 0
    for name, found in program.computations.items():
        times = program.runs.get(name, 0)
        shapes = {one.name: one.shape for one in found}
        for one in found:
            if one.kind != "dot" or not times:
                continue
            of_result = _elements(one.shape)
            left = _OPERAND.findall(one.rest)[0]
            dims = _dims(shapes[left])
            contracted = [int(n) for n in _CONTRACTING.findall(one.rest)[0].split(",") if n]
            flops = 2 * of_result * int(np.prod([dims[n] for n in contracted], dtype=np.int64))
            once += flops
            whole += flops * times
    return once, whole


def _dims(shape: str) -> list[int]:
    return [int(n) for n in _ARRAY.findall(shape)[0][1].split(",") if n]


def _elements(shape: str) -> int:
    return int(np.prod(_dims(shape), dtype=np.int64))
