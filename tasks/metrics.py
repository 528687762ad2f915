"""Metrics of generated text under P3's names, for seqio's Evaluator.

Each metric takes (targets, predictions) and returns percentages, as T5's evaluation does. A run of
whitespace counts as one space, because SentencePiece replaces it by one.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

MetricFn = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns `accuracy`: the percentage of predictions that equal their target.

    Case and punctuation count.
    """
    pairs = zip(targets, predictions, strict=True)
    return {"accuracy": _percentage(target.split() == text.split() for target, text in pairs)}


def squad(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns SQuAD's metrics (arXiv 1606.05250), `exact_match` and `f1`, over words.

    Case, punctuation and the articles a, an, the are ignored. If the target or the prediction has
    no words left, F1 is 1 if neither has any and 0 otherwise, as in SQuAD 2.0.
    """
    pairs = [(_words(t), _words(p)) for t, p in zip(targets, predictions, strict=True)]
    return {
        "exact_match": _percentage(target == prediction for target, prediction in pairs),
        "f1": _percentage(_f1(target, prediction) for target, prediction in pairs),
    }


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _f1(target: list[str], prediction: list[str]) -> float:
    """Returns the F1 of two lists of words, compared as multisets as in SQuAD's official script."""
    if not target or not prediction:
        return float(target == prediction)
    common = (collections.Counter(target) & collections.Counter(prediction)).total()
    return 2 * common / (len(target) + len(prediction))


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns `bleu`: sacrebleu's corpus BLEU with its international tokenization."""
    import sacrebleu

    # "intl" splits off punctuation of every script; T5 uses it for all languages.
    score = sacrebleu.corpus_bleu(list(predictions), [list(targets)], tokenize="intl").score
    return {"bleu": float(score)}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns `rouge1`, `rouge2` and `rougeLsum`: the mean F1 of rouge-score, without stemming."""
    scores = [
        _rouge_scorer().score(_split_sentences(target), _split_sentences(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {name: _percentage(score[name].fmeasure for score in scores) for name in _ROUGES}


_ROUGES = ("rouge1", "rouge2", "rougeLsum")


@functools.cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(_ROUGES)


def _split_sentences(text: str) -> str:
    # rougeLsum takes each line for a sentence. T5's metric splits in the same way.
    return text.replace(" . ", " .\n")


def spearman_correlation(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns `spearman_correlation`: the rank correlation of texts that are numbers.

    A text that is not a number counts as -1, as in T5. If all targets or all predictions are
    equal, the correlation is undefined, and 0 is returned.
    """
    # Computed here, as the correlation of the ranks: scipy.stats would return nan, with a warning,
    # if all values are equal.
    ranks = [_ranks([_number(text) for text in texts]) for texts in (targets, predictions)]
    deviations = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt(np.prod([np.sum(deviation**2) for deviation in deviations]))
    correlation = np.sum(deviations[0] * deviations[1]) / scale if scale else 0.0
    return {"spearman_correlation": 100 * float(correlation)}


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if np.isfinite(number) else -1.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Returns the ranks of `values`, from 0; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[index]


def _percentage(values: Iterable[float]) -> float:
    return 100 * float(np.mean(list(values)))


# The metrics by their names in P3. "Other" stands for a metric that promptsource does not name.
BY_NAME: Mapping[str, MetricFn | None] = {
    "Accuracy": accuracy,
    "BLEU": bleu,
    "ROUGE": rouge,
    "Squad": squad,
    "Spearman Correlation": spearman_correlation,
    "Other": None,
}
DEFAULT_METRICS = ("Accuracy",)


def check_names(names: object, where: str) -> Sequence[str]:
    """Returns the value of `metrics` in INDEX.json, after checking it.

    Args:
      names: the value.
      where: the file and the task, for errors.

    Raises:
      InputError: the value is not a list of keys of `BY_NAME`.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: 'metrics' must be a list of names, got {names!r}")
    for name in names:
        if name not in BY_NAME:
            raise InputError(
                f"{where}: 'metrics' must be names among {', '.join(BY_NAME)}, got {name!r}"
            )
    return names


def metric_fns(names: Sequence[str]) -> list[MetricFn]:
    """Returns the functions of metrics, each once; [accuracy] if none of them has a function."""
    fns = [fn for name in dict.fromkeys(names) if (fn := BY_NAME[name]) is not None]
    return fns or [accuracy]


def add_metrics(task: str, names: Sequence[str]) -> None:
    """Adds metrics of generated text to a registered seqio task, unless it has metrics already."""
    provider = seqio_tasks.get_mixture_or_task(task)
    if provider.predict_metric_fns or provider.metric_objs:
        return
    # seqio's `Task.replace` returns a plain Task whatever the class, so the task is changed in
    # place, and the properties that it has cached are recomputed.
    provider._metric_fn_constructor_args = [
        *provider._metric_fn_constructor_args,
        *metric_fns(names),
    ]
    for cached in ("_all_metric_fns", "metric_objs", "predict_with_aux_metric_fns"):
        provider.__dict__.pop(cached, None)
