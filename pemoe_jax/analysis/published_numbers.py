"""Figures that papers publish, each with its source.

"The paper" is arXiv 2309.05444 (MoV, MoLORA). Its figures are quoted second-hand, from a summary by
others (`PAPER_SOURCE`), since the paper's own tables were not consulted. The figures of T0 come
from two model cards. No figure is computed from others. The following have no source and are
omitted: the paper's accuracies by dataset, its averages for (IA)³, LoRA and MoLORA, its accuracies
at 770M and 11B, and its shares of trainable parameters for MoLORA-10 and, at 3B, MoV-60.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Columns of the paper's zero-shot table, in its order.
COLUMNS = ("ANLI", "CB", "RTE", "WSC", "WiC", "COPA", "WNG", "HS")

PAPER_SOURCE = "github.com/Krebbet/wiki-kit, wiki/research/moe-adapters/mov-molora.md"
_T0_CARD = "huggingface.co/hamishivi/hypertask_T0_"

# The sites at which the paper puts (IA)³ vectors and LoRA pairs. They are in the order of
# `adapters.SITES`, because `counts` compares them with the sites of a model.
_MOV_SITES = ("key", "value", "gate")
_LORA_SITES = ("query", "key", "value", "out", "wi_0", "wo")
# Parameters of T5 v1.1 XL and XXL, which the papers call 3B and 11B.
_XL_PARAMS, _XXL_PARAMS = 2_849_757_184, 11_135_332_352

# (base parameters, method, sites) -> trainable parameters in %, as printed. From PAPER_SOURCE.
TRAINABLE_SHARES = {
    (_XL_PARAMS, "ia3", _MOV_SITES): "0.018",
    (_XL_PARAMS, "lora r4", _LORA_SITES): "0.3",
    (_XL_PARAMS, "mov-10", _MOV_SITES): "0.32",
    (_XL_PARAMS, "mov-30", _MOV_SITES): "0.68",
    (_XL_PARAMS, "molora-15 r4", _LORA_SITES): "4.69",
    (_XXL_PARAMS, "mov-60", _MOV_SITES): "0.86",
}


@dataclass(frozen=True)
class PublishedRow:
    """Zero-shot accuracies of one published model, in %.

    Attributes:
      name: publication, size and method.
      method: name that this package gives the method.
      share: trainable parameters in %, as printed.
      measure: 'median' or 'mean' over the prompts of a dataset.
      source: where the figures are quoted from.
      accuracies: column of `COLUMNS` -> accuracy, where known.
      average: average over all eight datasets, if it is published.
    """

    name: str
    method: str
    share: str
    measure: str
    source: str
    accuracies: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None


def _t0_row(size: str, *accuracies: float) -> PublishedRow:
    """Returns a row of T0 (arXiv 2110.08207): full fine-tuning of LM-adapted T5 v1.1."""
    # The cards' averages include StoryCloze, a ninth dataset, so `average` stays None.
    by_column = dict(zip(COLUMNS, accuracies, strict=True))
    source = f"{_T0_CARD}{size} (model card)"
    return PublishedRow(f"T0 {size}", "full", "100", "mean", source, by_column)


def _paper_row(method: str, share: str, average: float) -> PublishedRow:
    """Returns a row of arXiv 2309.05444: a method on LM-adapted T5 v1.1 XL, the paper's 3B."""
    name = f"paper 3B {method}"
    return PublishedRow(name, method, share, "median", PAPER_SOURCE, average=average)


ROWS = (
    _paper_row("full", "100", 60.06),  # the paper's own run of T0's recipe
    _paper_row("mov-10", "0.32", 59.93),
    _paper_row("mov-30", "0.68", 60.61),
    _paper_row("mov-10 top-2", "0.32", 57.45),  # the paper's ablation of soft routing
    _paper_row("mov-10 top-1", "0.32", 54.92),
    _t0_row("3B", 33.4, 45.4, 64.6, 65.1, 50.7, 75.9, 51.0, 27.2),
    _t0_row("11B", 41.0, 70.1, 81.0, 61.1, 56.1, 91.5, 59.9, 33.6),
)

NOTE = (
    "Published: rows 'paper 3B' are from arXiv 2309.05444 (LM-adapted T5 v1.1 XL; its row 'full' is"
    " the authors' own run of T0's recipe), averages over the eight datasets as quoted by a summary"
    f" of the paper ({PAPER_SOURCE}). Its figures by dataset, and those of (IA)³, LoRA, MoLORA and"
    " of its 770M and 11B models are omitted, as they have no source. T0 3B and 11B are"
    " the models of arXiv 2110.08207, means over prompts as printed on the model cards"
    f" {_T0_CARD}3B and …11B. Those cards average over StoryCloze too, so their average is"
    " omitted. `pemoe count` explains the paper's shares of parameters."
)
