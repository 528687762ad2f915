"""Metrics of generated text by the names that P3 has for them, for seqio's Evaluator.

Each takes (targets, predictions) and gives figures in per cent, as T5's evaluation does. Runs of
spaces count as one, since SentencePiece keeps none. Libraries: rouge-score and sacrebleu.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks.p3 import published

MetricFn = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """How many are the target, letter by letter: `accuracy`."""
    pairs = zip(targets, predictions, strict=True)
    return {"accuracy": 100 * _mean(_one_spaced(t) == _one_spaced(p) for t, p in pairs)}


def squad(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD's (arXiv 1606.05250): `exact_match` and `f1` over words.

    Case, punctuation and the articles a, an, the do not count. Where one of the two has no words
    left, F1 is whether both have none, as SQuAD 2.0 has it.
    """
    pairs = [(_words(t), _words(p)) for t, p in zip(targets, predictions, strict=True)]
    return {
        "exact_match": 100 * _mean(target == prediction for target, prediction in pairs),
        "f1": 100 * _mean(_f1(target, prediction) for target, prediction in pairs),
    }


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(target: list[str], prediction: list[str]) -> float:
    if not target or not prediction:
        return float(target == prediction)
    common = (collections.Counter(target) & collections.Counter(prediction)).total()
    return 2 * common / (len(target) + len(prediction))


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """BLEU of the whole, by sacrebleu with its international tokens: `bleu`."""
    import sacrebleu

    found = sacrebleu.corpus_bleu(list(predictions), [list(targets)], tokenize="intl")
    return {"bleu": float(found.score)}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean F1 of rouge-score, without stemming: `rouge1`, `rouge2`, `rougeLsum`."""
    found = [
        _rouge_scorer().score(_one_sentence_a_line(t), _one_sentence_a_line(p))
        for t, p in zip(targets, predictions, strict=True)
    ]
    return {key: 100 * _mean(one[key].fmeasure for one in found) for key in _ROUGES}


_ROUGES = ("rouge1", "rouge2", "rougeLsum")


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(_ROUGES)


def _one_sentence_a_line(text: str) -> str:
    return text.replace(" . ", " .\n")  # what rougeLsum takes for sentences; T5 does the same


def spearman_correlation(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Rank correlation of the numbers that the texts are: `spearman_correlation`.

    What is no number counts as -1, as in T5. Where all targets or all predictions are alike there
    is none, and it is 0.
    """
    ranks = [_ranks([_number(text) for text in texts]) for texts in (targets, predictions)]
    deviations = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt(np.prod([np.sum(deviation**2) for deviation in deviations]))
    correlation = np.sum(deviations[0] * deviations[1]) / scale if scale else 0.0
    return {"spearman_correlation": 100 * float(correlation)}


def _number(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        return -1.0
    return found if np.isfinite(found) else -1.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    """From 0; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[index]


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


# P3's names. "Other" stands for a metric that promptsource does not name.
BY_NAME: Mapping[str, MetricFn | None] = {
    "Accuracy": accuracy,
    "BLEU": bleu,
    "ROUGE": rouge,
    "Squad": squad,
    "Spearman Correlation": spearman_correlation,
    "Other": None,
}
DEFAULT = ("Accuracy",)


def metric_fns(names: Sequence[str], where: str = "metrics") -> list[MetricFn]:
    """The metrics of these names, each once; accuracy where there is none but "Other".

    Args:
      names: keys of `BY_NAME`.
      where: begins an error's line.

    Raises:
      InputError: a name is not known.
    """
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise InputError(
            f"{where}: expected names among {', '.join(BY_NAME)}, found {unknown[0]!r}"
        )
    found = [fn for name in dict.fromkeys(names) if (fn := BY_NAME[name]) is not None]
    return found or [accuracy]


def names_of(task: str, index: Mapping[str, Any] | None = None, where: str = "") -> Sequence[str]:
    """The names of a task's metrics.

    Args:
      task: its name.
      index: INDEX.json of the folder of JSON lines that the task is of (its `metrics`, a list); for
        other tasks None: P3's by its table.
      where: the path of INDEX.json.

    Raises:
      InputError: `metrics` of the index is not a list of known names.
    """
    if index is None:
        known = published.tasks().get(task)
        return known.metrics if known is not None else DEFAULT
    names = index.get(task, {}).get("metrics", DEFAULT)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: {task!r}: 'metrics' must be a list of names, found {names!r}")
    metric_fns(names, f"{where}: {task!r}: 'metrics'")
    return names


def give(task: str, names: Sequence[str]) -> None:
    """Gives a registered task without metrics of predictions those of these names."""
    found = seqio_tasks.get_mixture_or_task(task)
    if found.predict_metric_fns or found.metric_objs:
        return
    # Task.replace makes a plain Task of any class of tasks, so the task itself is changed
    found._metric_fn_constructor_args = [*found._metric_fn_constructor_args, *metric_fns(names)]
    for cached in ("_all_metric_fns", "metric_objs", "predict_with_aux_metric_fns"):
        found.__dict__.pop(cached, None)
