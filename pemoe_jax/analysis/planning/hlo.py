"""Collectives and matrix products of a compiled program, read from its HLO text.

XLA's own cost analysis counts the body of a loop once and does not report collectives. The HLO text
is the program of one device, and states how often each loop runs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These operations call a computation on two scalars, such as an addition, with nothing to count.
_SCALAR_CALLERS = (*COLLECTIVES, "reduce", "scatter", "sort", "reduce-window")

# "%name (parameters) -> shape {" begins a computation; the main one has "ENTRY" in front.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# "  %name = shape opcode(operands), attributes"
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
# An array in a shape, such as "bf16[8,128]": dtype and dimensions.
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
# Computations that an instruction runs, except the condition of a loop, which is on scalars.
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%[\w.-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONTRACTING_DIMS = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
# Devices that communicate, in one of two notations: [groups,size]<=[...] or {{0,1},{2,3}}.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([0-9,]*)\})")
_NAME = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: name of the result.
      shape: shape of the result, or a tuple of shapes.
      opcode: the operation, such as 'dot'.
      rest: operands and attributes, as text.
    """

    name: str
    shape: str
    opcode: str
    rest: str


@dataclass(frozen=True)
class Program:
    """A compiled program: its computations, and how often each runs, both by name."""

    computations: dict[str, list[Instruction]]
    run_counts: dict[str, int]


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
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(*match.groups()))
    run_counts: dict[str, int] = {}
    _add_runs(computations, entry, 1, run_counts)
    return Program(computations, run_counts)


def collectives(program: Program) -> dict[str, tuple[int, int]]:
    """Returns kind -> (arrays, bytes) of one run of the program.

    The bytes of an all-reduce, all-gather, all-to-all or permutation are those of its output on a
    device; the bytes of a reduce-scatter are those of its input. XLA may combine several arrays in
    one instruction, in which each is counted.
    """
    totals: dict[str, tuple[int, int]] = {}
    for name, runs in program.run_counts.items():
        for instruction in program.computations.get(name, ()):
            kind = instruction.opcode
            if kind not in COLLECTIVES:
                continue
            # The shape of an all-to-all is a tuple of the parts of one array; that of other
            # collectives may be a tuple of several arrays.
            arrays = 1 if kind == "all-to-all" else len(_ARRAY.findall(instruction.shape))
            size = shape_bytes(instruction.shape)
            # The output of a reduce-scatter is one shard of its input.
            if kind == "reduce-scatter":
                size *= _group_size(instruction.rest)
            total_arrays, total_bytes = totals.get(kind, (0, 0))
            totals[kind] = (total_arrays + arrays * runs, total_bytes + size * runs)
    return {kind: totals[kind] for kind in COLLECTIVES if kind in totals}


def matrix_product_flops(program: Program) -> tuple[int, int]:
    """Returns the FLOPs of all matrix products, counted once each and as often as they run."""
    once = total = 0
    for name, runs in program.run_counts.items():
        instructions = program.computations.get(name, [])
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode != "dot":
                continue
            lhs_dims = _dims(shapes[_NAME.findall(instruction.rest)[0]])
            contracting = _numbers(_CONTRACTING_DIMS.findall(instruction.rest)[0])
            contracted = math.prod(lhs_dims[axis] for axis in contracting)
            # A multiplication and an addition for each element of the output and contracted index.
            flops = 2 * math.prod(_dims(instruction.shape)) * contracted
            once += flops
            total += flops * runs
    return once, total


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape or a tuple of shapes: 130 for `(f32[8,4]{1,0}, bf16[])`."""
    return sum(
        math.prod(_numbers(dims)) * _element_bytes(dtype) for dtype, dims in _ARRAY.findall(shape)
    )


def _add_runs(
    computations: dict[str, list[Instruction]], name: str, runs: int, run_counts: dict[str, int]
) -> None:
    """Adds `runs` runs of a computation, and of those that it calls, to `run_counts`."""
    # The runs of a computation with several callers add up.
    run_counts[name] = run_counts.get(name, 0) + runs
    for instruction in computations.get(name, ()):
        if instruction.opcode in _SCALAR_CALLERS:
            continue
        match = _TRIP_COUNT.search(instruction.rest) if instruction.opcode == "while" else None
        # A loop of unknown length and each branch of a conditional count as one run.
        trips = int(match[1]) if match else 1
        for names in _CALLED.findall(instruction.rest) if trips else ():
            for called in _NAME.findall(names):
                _add_runs(computations, called, runs * trips, run_counts)


def _group_size(rest: str) -> int:
    """Returns the number of devices in each group of a collective."""
    match = _GROUPS.search(rest)
    if not match:
        return 1
    return int(match[1]) if match[1] else len(match[2].split(","))


def _element_bytes(dtype: str) -> int:
    """Returns the bytes of an element: 4 for f32, 2 for bf16, 1 for pred, f8e4m3fn and s4."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return max(1, int(bits[1]) // 8) if bits else 1


def _dims(shape: str) -> list[int]:
    """Returns the dimensions of an array, the first one of a tuple."""
    return _numbers(_ARRAY.findall(shape)[0][1])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
