"""Metrics of generated text: by hand, against their libraries, and added to seqio tasks."""

import math

import numpy as np
import pytest
from data_tasks import make_vocab, write

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks
from pemoe_jax.tasks import jsonl, metrics, score_eval
from pemoe_jax.tasks.p3 import published


def test_accuracy_by_hand():
    """Case matters, whitespace does not: 2 of 4."""
    scores = metrics.accuracy(["Yes", "a  b", "no", "red"], ["Yes", " a b\n", "No", "red."])
    assert scores == {"accuracy": 50.0}


def test_squad_by_hand():
    """Normalised: case, punctuation and articles do not count.

    1. 'The Cat!' and 'cat' are equal: F1 1. 2. 'big red dog' and 'red fish': one common word of 3
    and 2: 2 * 1 / 5 = 0.4. 3. nothing in common: 0. 4. 'to be or to be' and 'to to to': common is
    to twice: 2 * 2 / (5 + 3) = 0.5. Exact 1 / 4, F1 (1 + 0.4 + 0 + 0.5) / 4 = 0.475.
    """
    scores = metrics.squad(
        ["The Cat!", "big red dog", "left", "to be or to be"],
        ["cat", "a red fish", "right", "to to to"],
    )
    assert scores == {"exact_match": 25.0, "f1": pytest.approx(47.5)}


@pytest.mark.parametrize(
    ("target", "prediction", "f1"), [("the", "", 100), ("the", "cat", 0), ("cat", "an", 0)]
)
def test_squad_without_words(target, prediction, f1):
    assert metrics.squad([target], [prediction]) == {"exact_match": f1, "f1": f1}


def test_bleu_by_hand():
    """'the cat sat on the mat' for 'the cat sat on a mat': no brevity.

    Of 6, 5, 4, 3 n-grams match 5, 3, 2, 1: (5/6 * 3/5 * 2/4 * 1/3) ** (1/4) = 0.0833 ** 0.25.
    """
    scores = metrics.bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_of_a_short_answer_by_hand():
    """Five words right of ten: all n-grams match, brevity exp(1 - 10 / 5)."""
    scores = metrics.bleu(["a b c d e f g h i j"], ["a b c d e"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(-1))


def test_bleu_is_sacrebleus_corpus_score():
    import sacrebleu

    targets = ["the sky is blue, isn't it?", "grass is green .", "snow"]
    predictions = ["the sky isn't blue, is it?", "the grass is green .", "coal"]
    expected = sacrebleu.metrics.BLEU(tokenize="intl").corpus_score(predictions, [targets]).score
    assert metrics.bleu(targets, predictions)["bleu"] == pytest.approx(expected)
    assert 0 < expected < 100


def test_rouge_by_hand():
    """'police killed the gunman' for 'police kill the gunman' (no stemming).

    Words: 3 of 4 both ways, F1 0.75. Pairs: 1 of 3, F1 1/3. Longest common: 3 of 4, 0.75. With a
    second example that is right all means are (x + 1) / 2.
    """
    scores = metrics.rouge(["police killed the gunman", "yes"], ["police kill the gunman", "yes"])
    assert scores == pytest.approx({"rouge1": 87.5, "rouge2": 100 / 6, "rougeLsum": 87.5})


def test_rouge_splits_sentences():
    """Swapped sentences: rougeLsum joins the matches of each sentence, so that all words match."""
    scores = metrics.rouge(["a b c . d e f"], ["d e f . a b c"])
    assert scores["rougeLsum"] == scores["rouge1"] == pytest.approx(100)


def test_rouge_equals_the_library():
    from rouge_score import rouge_scorer

    targets = ["the sky is blue today", "grass grows in the field"]
    predictions = ["today the sky was blue", "in the green field"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    pairs = [scorer.score(t, p) for t, p in zip(targets, predictions, strict=True)]
    for name, value in metrics.rouge(targets, predictions).items():
        assert value == pytest.approx(100 * np.mean([pair[name].fmeasure for pair in pairs]))


def test_spearman_by_hand():
    """Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * (1 + 1) / (4 * 15) = 0.8.

    With a tie, 1 2 3 and 1.5 1.5 3: deviations -1 0 1 and -.5 -.5 1: 1.5 / sqrt(2 * 1.5).
    """
    scores = metrics.spearman_correlation(["1", "2", "3", "4"], ["10", "30", "20", "40"])
    assert scores["spearman_correlation"] == pytest.approx(80)
    tied = metrics.spearman_correlation(["1", "2", "3"], ["5", "5", "6.5"])
    assert tied["spearman_correlation"] == pytest.approx(100 * 1.5 / math.sqrt(3))


def test_spearman_of_texts_that_are_not_numbers():
    """'none' is -1, below all others: ranks 0 1 2 and 0 1 2. Of equal predictions it is 0."""
    scores = metrics.spearman_correlation(["0", "1", "2"], ["none", "3", "4"])
    assert scores["spearman_correlation"] == pytest.approx(100)
    assert metrics.spearman_correlation(["1", "2"], ["x", "nan"])["spearman_correlation"] == 0


def test_empty_predictions_score_zero():
    for metric in filter(None, metrics.BY_NAME.values()):
        assert all(value == 0 for value in metric(["yes", "no"], ["", ""]).values())


def test_every_metric_of_p3_has_a_function():
    """All names of the table are known; a task with 'Other' alone gets accuracy."""
    names = {name for task in published.tasks().values() for name in task.metrics}
    assert names == set(metrics.BY_NAME)
    for task in published.tasks():
        assert metrics.metric_fns(published.metric_names(task))
    for task, fns in (
        ("wiki_bio_who", [metrics.bleu, metrics.rouge]),
        ("wiki_bio_guess_person", [metrics.accuracy]),
        ("rotten_tomatoes_Movie_Expressed_Sentiment", [metrics.accuracy]),
    ):
        assert metrics.metric_fns(published.metric_names(task)) == fns
    assert published.metric_names("a_users_own_task") == metrics.DEFAULT_METRICS


def test_wrong_metrics_in_index():
    with pytest.raises(
        InputError, match=r"INDEX.json: 't': 'metrics' must be .*Accuracy.*got 'F1'"
    ):
        metrics.check_names(["F1"], "INDEX.json: 't'")
    with pytest.raises(InputError, match="INDEX.json: 't': 'metrics' must be a list of names"):
        metrics.check_names("Squad", "INDEX.json: 't'")


def test_metrics_are_added_once(tmp_path):
    write(tmp_path, "t", "validation", [("sky", "the blue")])
    jsonl.register(tmp_path, make_vocab(tmp_path))
    task = seqio_tasks.get_mixture_or_task("t")
    kind = type(task)
    for names in (["Squad"], ["BLEU"]):
        metrics.add_metrics("t", names)
    assert seqio_tasks.get_mixture_or_task("t") is task and type(task) is kind
    assert task.predict_metric_fns == [metrics.squad]
    assert len(task.metric_objs) == 1


def test_rank_accuracy_by_hand():
    """Rows in any order: of equal scores the first choice wins, here a wrong and a right one."""
    targets = [((1, 0), True), ((0, 1), True), ((0, 0), False), ((1, 1), False)]
    assert score_eval.rank_accuracy(targets, [-1.0, -2.0, -2.0, -1.0]) == {"accuracy": 0.5}
    assert score_eval.rank_accuracy(targets, ([-1.0, -1.0, -2.0, -3.0], {})) == {"accuracy": 1.0}
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="finite scores, got .* choice 2 of example 1"):
            score_eval.rank_accuracy(targets, [-1.0, wrong, -1.0, -1.0])
