"""What papers print, each figure with where it was read.

The paper is arXiv 2309.05444 (MoV, MoLORA). Its own tables could not be read; its figures here come
from a public note on it (`NOTE_ON_PAPER`), T0's from the cards of two models that set them beside
their own. Nothing is computed from other figures here, and what had no source is left out: the
paper's accuracies by data set, its averages of (IA)3, LoRA and MoLORA, those of its 770M and 11B
models, and its shares of MoLORA-10 and, at 3B, MoV-60.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

COLUMNS = ("ANLI", "CB", "RTE", "WSC", "WiC", "COPA", "WNG", "HS")

NOTE_ON_PAPER = "github.com/Krebbet/wiki-kit, wiki/research/moe-adapters/mov-molora.md"
_CARD = "huggingface.co/hamishivi/hypertask_T0_"

_VECTORS = ("key", "value", "gate")
_PAIRS = ("query", "key", "value", "out", "wi_0", "wo")
_XL, _XXL = 2_849_757_184, 11_135_332_352  # bases of T5 v1.1, the papers' 3B and 11B

# Trainable parameters in %, as printed: (base, method, sites) -> figure. Source: NOTE_ON_PAPER.
SHARES = {
    (_XL, "ia3", _VECTORS): "0.018",
    (_XL, "lora r4", _PAIRS): "0.3",
    (_XL, "mov-10", _VECTORS): "0.32",
    (_XL, "mov-30", _VECTORS): "0.68",
    (_XL, "molora-15 r4", _PAIRS): "4.69",
    (_XXL, "mov-60", _VECTORS): "0.86",
}


@dataclass(frozen=True)
class Row:
    """A published row of zero-shot accuracies in %.

    Attributes:
      name: whose it is, and of which size.
      method: named as ours are.
      share: of parameters trained, in %, as printed.
      measure: over the prompts of a data set, 'median' or 'mean'.
      source: where the figures were read.
      cells: by column, those of `COLUMNS` that are known.
      average: over all eight data sets, where it is printed.
    """

    name: str
    method: str
    share: str
    measure: str
    source: str
    cells: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None


def _t0(size: str, *cells: float) -> Row:
    """A full fine-tuning of T5 v1.1 + LM on T0's mixture, arXiv 2110.08207."""
    columns = dict(zip(COLUMNS, cells, strict=True))
    return Row(f"T0 {size}", "full", "100", "mean", f"{_CARD}{size} (model card)", columns)


def _paper(method: str, share: str, average: float) -> Row:
    """Of arXiv 2309.05444, T5 v1.1 XL + LM."""
    return Row(f"paper 3B {method}", method, share, "median", NOTE_ON_PAPER, average=average)


ROWS = (
    _paper("full", "100", 60.06),  # its own run of T0's recipe
    _paper("mov-10", "0.32", 59.93),
    _paper("mov-30", "0.68", 60.61),
    _paper("mov-10 top-2", "0.32", 57.45),  # its ablation: the best experts of a token alone
    _paper("mov-10 top-1", "0.32", 54.92),
    _t0("3B", 33.4, 45.4, 64.6, 65.1, 50.7, 75.9, 51.0, 27.2),
    _t0("11B", 41.0, 70.1, 81.0, 61.1, 56.1, 91.5, 59.9, 33.6),
)

NOTE = (
    "Published: paper 3B is arXiv 2309.05444 (T5 v1.1 XL + LM; full: its own run of T0), averages"
    f" over the eight data sets as told by a note on it ({NOTE_ON_PAPER}); its figures by data set,"
    " and those of (IA)3, LoRA, MoLORA and of its 770M and 11B models are left out: no source was"
    " found. T0 3B and 11B are arXiv 2110.08207's models, means over prompts as printed on the"
    f" cards of {_CARD}3B and …11B; those cards average over StoryCloze too, so no average stands"
    " here. On the paper's shares of parameters see `pemoe count`."
)
