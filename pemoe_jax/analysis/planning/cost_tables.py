"""The cost of a train step on each device, its tables and its JSON file.

This module imports no jax, since `pemoe plan` parses meshes with it before jax starts: their sizes
set the number of virtual devices, which jax reads from the environment.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pemoe_jax.analysis.planning.flops import StepFlops
from pemoe_jax.analysis.planning.hlo import COLLECTIVES
from pemoe_jax.analysis.tables import MISSING, Table, format_bytes, format_scaled
from pemoe_jax.core.errors import InputError

# Parts of a device's memory, in the order of the table.
MEMORY = ("frozen base", "trainable", "optimizer state", "batch", "activations and temporaries")

_NOTE_ON_MEMORY = (
    "Weights, optimizer state and batch are exact. Activations and temporaries are what XLA's CPU"
    " compiler allocates; the compilers for TPUs and GPUs fuse more and need less."
)
_NOTE_ON_COLLECTIVES = (
    "Collectives: number of arrays and their bytes on each device in a step; XLA combines small"
    " arrays. For a sum of products, the CPU compiler reduces each term; the compilers for TPUs and"
    " GPUs reduce the sum."
)
_NOTE_ON_FLOPS = (
    "FLOPs: those of the compiled program on each device. Multiple: the FLOPs of all devices,"
    " divided by the model's. These are its matrix products by formula, with the gradients of"
    " activations and of trainable weights. A token is an input or target token."
)
_NOTE_ON_PLACES = (
    "Experts: all lines but the last count the experts that a token uses. The last line counts all"
    " places of the experts, which are computed in training whether they hold a token or not."
)


@dataclass(frozen=True)
class MeshLayout:
    """A mesh of `data` × `expert` × `model` devices; `fsdp` also shards parameters over `data`."""

    data: int
    model: int
    fsdp: bool = False
    expert: int = 1

    @classmethod
    def parse(cls, text: str, fsdp: bool = False) -> MeshLayout:
        """Parses '4x8', '2x4x1' or '32x1:fsdp'; raises InputError for any other form."""
        match = re.fullmatch(r"([1-9]\d*)(x[1-9]\d*)?x([1-9]\d*)(:fsdp)?", text)
        if not match:
            raise InputError(
                "--mesh must be DATAxMODEL or DATAxEXPERTxMODEL, optionally with :fsdp at the end,"
                f" got {text!r}"
            )
        expert = int((match[2] or "x1")[1:])
        return cls(int(match[1]), int(match[3]), fsdp or bool(match[4]), expert)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.expert * self.model

    def __str__(self) -> str:
        expert = f"x{self.expert}" if self.expert > 1 else ""
        return f"{self.data}{expert}x{self.model}" + (" FSDP" if self.fsdp else "")


@dataclass(frozen=True)
class StepCost:
    """Cost of a train step on one mesh. The fields are keys of `pemoe plan`'s JSON file.

    Attributes:
      layout: name of the mesh, such as '4x8' or '32x1 FSDP'.
      devices: number of devices.
      memory: bytes on a device, for each of `MEMORY`.
      collectives: kind -> (arrays, bytes) on a device.
      flops: FLOPs of the compiled step on a device.
      model_flops: FLOPs of the model for the whole batch, by formula.
      tokens: number of input and target tokens in the batch.
      compiled: which numbers of layers were compiled, as text.
    """

    layout: str
    devices: int
    memory: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    flops: int
    model_flops: StepFlops
    tokens: int
    compiled: str

    @property
    def peak(self) -> int:
        """Peak memory of a device in bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Chip:
    """A kind of device, with its memory in bytes."""

    name: str
    memory: int


def to_tables(title: str, costs: Sequence[StepCost], chip: Chip | None) -> list[Table]:
    """Returns a table of costs with a column for each mesh, and a table of the model's FLOPs."""
    columns = ["on each device", *(cost.layout for cost in costs)]
    rows = [[name, *(format_bytes(cost.memory[name]) for cost in costs)] for name in MEMORY]
    rows.append(["peak", *(format_bytes(cost.peak) for cost in costs)])
    if chip:
        rows.append([f"of {chip.name}", *(_share(cost.peak, chip) for cost in costs)])
    for kind in COLLECTIVES:
        if any(kind in cost.collectives for cost in costs):
            rows.append([kind, *(_collective(cost.collectives.get(kind)) for cost in costs)])
    rows.append(["FLOPs", *(format_scaled(cost.flops) for cost in costs)])
    rows.append(["multiple of the model's FLOPs", *(_overhead(cost) for cost in costs)])
    notes = [_NOTE_ON_MEMORY, _NOTE_ON_COLLECTIVES, _NOTE_ON_FLOPS]
    notes += list(dict.fromkeys(f"Compiled: {cost.compiled}." for cost in costs))
    # The model's FLOPs are the same on all meshes.
    return [Table(title, columns, rows, notes=notes), _model_flops_table(costs[0])]


def to_json(title: str, costs: Sequence[StepCost], chip: Chip | None) -> str:
    """Returns all costs as JSON, unrounded."""
    plans = [dataclasses.asdict(cost) | {"peak": cost.peak} for cost in costs]
    if chip:
        plans = [plan | {"fits": plan["peak"] <= chip.memory} for plan in plans]
    device = {"name": chip.name, "bytes": chip.memory} if chip else None
    return json.dumps({"title": title, "device": device, "plans": plans}, indent=1) + "\n"


def _model_flops_table(cost: StepCost) -> Table:
    flops = cost.model_flops
    parts = {
        "forward": flops.forward,
        "gradients of activations": flops.backward,
        "gradients of the base's weights": flops.weights,
        "adapters and routers": flops.adapters,
    }
    totals = {"total": flops.total}
    if flops.with_places is not None:
        totals |= {"with all places of the experts": flops.with_places}

    def row(name: str, number: int) -> list[str]:
        return [name, format_scaled(number / cost.tokens), format_scaled(number)]

    return Table(
        "FLOPs of the model",
        ["part", "a token", "a step"],
        [row(name, number) for name, number in parts.items() if number],
        footer=[row(name, number) for name, number in totals.items()],
        notes=[_NOTE_ON_PLACES] if flops.with_places is not None else [],
    )


def _collective(arrays_and_bytes: tuple[int, int] | None) -> str:
    if not arrays_and_bytes:
        return MISSING
    arrays, size = arrays_and_bytes
    return f"{arrays:,} × · {format_bytes(size)}"


def _share(peak: int, chip: Chip) -> str:
    verdict = "fits" if peak <= chip.memory else "too much"
    return f"{100 * peak / chip.memory:.0f} %, {verdict}"


def _overhead(cost: StepCost) -> str:
    """Returns the FLOPs of all devices as a multiple of the model's."""
    # Above 1 is what rematerialization recomputes, and work that devices replicate instead of
    # sharing it. Empty places of experts are in both numbers: they are computed on any mesh.
    total = cost.model_flops.with_places or cost.model_flops.total
    return f"{cost.flops * cost.devices / total:.2f} ×"
