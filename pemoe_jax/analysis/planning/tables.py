"""Tables of plans: what a train step takes on each device, layouts side by side."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pemoe_jax.analysis import tables
from pemoe_jax.analysis.planning.flops import Flops
from pemoe_jax.analysis.planning.hlo import COLLECTIVES
from pemoe_jax.core.errors import InputError

MEMORY = ("frozen base", "trainable", "optimizer state", "batch", "activations and temporaries")

_NOTE_ON_MEMORY = (
    "Weights, optimizer state and batch are exact. Activations and temporaries are what XLA's"
    " compiler for CPUs sets aside; those for TPUs and GPUs fuse more and need less."
)
_NOTE_ON_COLLECTIVES = (
    "Collectives: arrays and their bytes on each device, a step; XLA sends small arrays together."
    " Compilers for TPUs and GPUs reduce a sum once where that for CPUs reduces its terms."
)
_NOTE_ON_FLOPS = (
    "FLOPs: of the compiled program, on each device; of the model: matrix products by hand, with"
    " the gradients of activations, and those of weights for what trains. A token is one of the"
    " inputs or the targets."
)


@dataclass(frozen=True)
class Layout:
    """`data` × `model` devices, parameters spread over `data` too or not."""

    data: int
    model: int
    fsdp: bool = False

    @classmethod
    def parse(cls, text: str, fsdp: bool = False) -> Layout:
        """'4x8' or '32x1:fsdp'.

        Raises:
          InputError: it is neither.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(:fsdp)?", text)
        if not found:
            raise InputError(f"--mesh: expected DATAxMODEL or DATAxMODEL:fsdp, found {text!r}")
        return cls(int(found[1]), int(found[2]), fsdp or bool(found[3]))

    @property
    def devices(self) -> int:
        """How many."""
        return self.data * self.model

    def __str__(self) -> str:
        return f"{self.data}x{self.model}" + (" FSDP" if self.fsdp else "")


@dataclass(frozen=True)
class Plan:
    """A train step in one layout.

    Attributes:
      layout: its name, as '4x8' or '32x1 FSDP'.
      devices: how many.
      memory: bytes on a device, by `MEMORY`.
      collectives: kind -> (arrays, bytes) a step, on a device.
      flops: of the compiled step, on a device.
      model_flops: of the whole batch, by hand.
      tokens: of inputs and targets in the batch.
      compiled: what was compiled, in words.
    """

    layout: str
    devices: int
    memory: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    flops: int
    model_flops: Flops
    tokens: int
    compiled: str

    @property
    def peak(self) -> int:
        """Bytes on a device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Chip:
    """A device's memory in bytes, and its name."""

    name: str
    memory: int = field(compare=False)


def to_tables(title: str, plans: Sequence[Plan], chip: Chip | None) -> list[tables.Table]:
    """The table of layouts side by side, and that of FLOPs a token."""
    columns = ["on each device", *(plan.layout for plan in plans)]
    rows = [[name, *(_bytes(plan.memory[name]) for plan in plans)] for name in MEMORY]
    rows.append(["peak", *(_bytes(plan.peak) for plan in plans)])
    if chip:
        rows.append([f"of {chip.name}", *(_share(plan.peak, chip) for plan in plans)])
    for kind in COLLECTIVES:
        if any(kind in plan.collectives for plan in plans):
            rows.append([kind, *(_moved(plan.collectives.get(kind)) for plan in plans)])
    rows.append(["FLOPs", *(_count(plan.flops) for plan in plans)])
    rows.append(["of the model", *(_overhead(plan) for plan in plans)])
    notes = [_NOTE_ON_MEMORY, _NOTE_ON_COLLECTIVES, _NOTE_ON_FLOPS]
    notes += list(dict.fromkeys(f"Compiled: {plan.compiled}." for plan in plans))
    return [tables.Table(title, columns, rows, notes=notes), _of_model(plans[0])]


def _of_model(plan: Plan) -> tables.Table:
    flops = plan.model_flops
    parts = {
        "forward": flops.forward,
        "gradients of activations": flops.backward,
        "gradients of the base's weights": flops.weights,
        "adapters and routers": flops.adapters,
    }
    return tables.Table(
        "FLOPs of the model",
        ["part", "a token", "a step"],
        [[name, _count(n / plan.tokens), _count(n)] for name, n in parts.items() if n],
        footer=[["together", _count(flops.together / plan.tokens), _count(flops.together)]],
    )


def to_json(title: str, plans: Sequence[Plan], chip: Chip | None) -> str:
    """All figures, whole."""
    found = [
        {
            **dataclasses.asdict(plan),
            "peak": plan.peak,
            **({"fits": plan.peak <= chip.memory} if chip else {}),
        }
        for plan in plans
    ]
    memory = {"name": chip.name, "bytes": chip.memory} if chip else None
    return json.dumps({"title": title, "device": memory, "plans": found}, indent=1) + "\n"


def _bytes(number: float) -> str:
    """Three digits, of 1000 bytes to a kB."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def _count(number: float) -> str:
    return _scaled(number, ("", "k", "M", "G", "T", "P", "E"))


def _scaled(number: float, units: Sequence[str]) -> str:
    """1,234,567 -> '1.23 MB'."""
    at = 0
    while number >= 999.5 and at < len(units) - 1:
        number, at = number / 1000, at + 1
    digits = 0 if number >= 99.5 or at == 0 else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f} {units[at]}".rstrip()


def _moved(found: tuple[int, int] | None) -> str:
    return tables.MISSING if not found else f"{found[0]:,} × · {_bytes(found[1])}"


def _share(peak: int, chip: Chip) -> str:
    word = "fits" if peak <= chip.memory else "too much"
    return f"{100 * peak / chip.memory:.0f} %, {word}"


def _overhead(plan: Plan) -> str:
    """How much of it all devices compute, of what has to be computed once."""
    return f"{plan.flops * plan.devices / plan.model_flops.together:.2f} ×"
