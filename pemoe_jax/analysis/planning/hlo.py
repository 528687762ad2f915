"""Collectives and matrix products of a compiled program, read from its HLO text.

XLA's own cost analysis counts a loop's body once and lists no collectives. The text is that of one
device's program, and states how often each loop runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions whose computation adds or compares two numbers: nothing to count in it.
_SCALAR_CALLERS = (*COLLECTIVES, "reduce", "scatter", "sort", "reduce-window")

# "%name (parameters) -> shape {" starts a computation, "ENTRY" the one that runs.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%[\w.-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONTRACTING_DIMS = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
# Two notations: [groups,size]<=[...] and {{0,1},{2,3}}.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([0-9,]*)\})")
_NAME = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a program: name and shape of the result, operation, operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str


@dataclass(frozen=True)
class Program:
    """The computations of a compiled program by name, and how often each runs."""

    computations: dict[str, list[Instruction]]
    run_counts: dict[str, int]

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Yields each instruction and how often it runs."""
        for name, instructions in self.computations.items():
            for instruction in instructions:
                yield instruction, self.run_counts.get(name, 0)


def parse(text: str) -> Program:
    """Parses the text of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            instructions = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match:
            instructions.append(Instruction(*match.groups()))
    run_counts: dict[str, int] = {}
    _add_runs(computations, entry, 1, run_counts)
    return Program(computations, run_counts)


def collectives(program: Program) -> dict[str, tuple[int, int]]:
    """Returns kind -> (arrays, bytes) of one run of the program.

    Bytes are those of whole arrays: the output of an all-reduce, all-gather, all-to-all or
    permutation on a device, and the input of a reduce-scatter. XLA may combine several arrays.
    """
    totals: dict[str, tuple[int, int]] = {}
    for instruction, runs in program.instructions():
        if instruction.opcode not in COLLECTIVES or not runs:
            continue
        arrays = len(_ARRAY.findall(instruction.shape))
        if instruction.opcode == "all-to-all":
            arrays = 1  # the tuple lists the parts of one array
        size = shape_bytes(instruction.shape)
        # The output is one shard of the input.
        if instruction.opcode == "reduce-scatter":
            size *= _group_size(instruction.rest)
        total_arrays, total_bytes = totals.get(instruction.opcode, (0, 0))
        totals[instruction.opcode] = (total_arrays + arrays * runs, total_bytes + size * runs)
    return {kind: totals[kind] for kind in COLLECTIVES if kind in totals}


def matrix_product_flops(program: Program) -> tuple[int, int]:
    """Returns the FLOPs of the matrix products, each counted once and as often as it runs."""
    once = total = 0
    for name, instructions in program.computations.items():
        runs = program.run_counts.get(name, 0)
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode != "dot" or not runs:
                continue
            lhs_dims = _dims(shapes[_NAME.findall(instruction.rest)[0]])
            contracting = _numbers(_CONTRACTING_DIMS.findall(instruction.rest)[0])
            contracted = _product([lhs_dims[axis] for axis in contracting])
            flops = 2 * _product(_dims(instruction.shape)) * contracted
            once += flops
            total += flops * runs
    return once, total


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape or a tuple of shapes: 130 for `(f32[8,4]{1,0}, bf16[])`."""
    return sum(
        _product(_numbers(dims)) * _element_bytes(dtype) for dtype, dims in _ARRAY.findall(shape)
    )


def _add_runs(
    computations: dict[str, list[Instruction]], name: str, runs: int, run_counts: dict[str, int]
) -> None:
    # A computation may have several callers: its runs add up.
    run_counts[name] = run_counts.get(name, 0) + runs
    for instruction in computations.get(name, ()):
        if instruction.opcode in _SCALAR_CALLERS:
            continue
        trips = _TRIP_COUNT.search(instruction.rest) if instruction.opcode == "while" else None
        for names in _CALLED.findall(instruction.rest):
            for called in _NAME.findall(names):
                _add_runs(computations, called, runs * (int(trips[1]) if trips else 1), run_counts)


def _group_size(rest: str) -> int:
    """Returns the number of devices that take part in a collective together."""
    match = _GROUPS.search(rest)
    if not match:
        return 1
    return int(match[1]) if match[1] else len(match[2].split(","))


def _element_bytes(dtype: str) -> int:
    """Returns the bytes of an element: f32 4, bf16 2, pred 1, f8e4m3fn 1."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return max(1, int(bits[1]) // 8) if bits else 1


def _dims(shape: str) -> list[int]:
    return _numbers(_ARRAY.findall(shape)[0][1])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _product(numbers: list[int]) -> int:
    return int(np.prod(numbers, dtype=np.int64))
