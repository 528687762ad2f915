"""Examples with answer choices, grouped by example."""

import data_tasks
import numpy as np
import pytest
from data_tasks import LENGTHS

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_tasks


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return data_tasks.register(tmp_path_factory.mktemp("data"))


def test_tasks_without_choices_raise(registered):
    with pytest.raises(InputError, match="'plain' has no answer choices .*'plain_score_eval'"):
        choices.load_choice_groups("plain", LENGTHS)
    with pytest.raises(InputError, match="'a' has no answer choices to score"):
        choices.load_choice_groups("a", LENGTHS)


def test_groups_equal_the_rows_of_the_file(registered):
    _, rows = registered
    lengths = {"inputs": 128, "targets": 32}
    groups = choices.load_choice_groups("scored_score_eval", lengths)
    assert [g.idx for g in groups] == list(range(len(rows)))
    features = seqio_tasks.get_mixture_or_task("scored").output_features
    vocabulary = features["inputs"].vocabulary
    for group, (text, target, texts) in zip(groups, rows, strict=True):
        assert (group.input_text, list(group.choice_texts)) == (text, texts)
        assert group.inputs.tolist() == [*vocabulary.encode(text), 1]
        assert [ids.tolist() for ids in group.choices] == [
            [*vocabulary.encode(choice), 1] for choice in texts
        ]
        assert group.is_correct == tuple(choice == target for choice in texts)
        assert not group.input_truncated and not group.target_truncated


def test_groups_are_truncated_as_in_seqio(registered):
    lengths = {"inputs": 20, "targets": 4}
    groups = choices.load_choice_groups("scored_score_eval", lengths)
    whole = choices.load_choice_groups("scored_score_eval", {"inputs": 400, "targets": 100})
    rows = seqio_tasks.get_mixture_or_task("scored_score_eval").get_dataset(
        lengths, split="validation", shuffle=False
    )
    by_idx = {tuple(row["idx"].tolist()): row for row in rows.as_numpy_iterator()}
    assert any(g.input_truncated for g in groups) and any(not g.input_truncated for g in groups)
    for group, full in zip(groups, whole, strict=True):
        assert group.input_truncated == (len(full.inputs) > 20)
        assert group.target_truncated == any(len(ids) > 4 for ids in full.choices)
        for j, ids in enumerate(group.choices):
            np.testing.assert_array_equal(ids, by_idx[group.idx, j]["targets"])
        np.testing.assert_array_equal(group.inputs, by_idx[group.idx, 0]["inputs"])


def test_groups_of_a_mixture_are_those_of_its_tasks(registered):
    summary, _ = registered
    together = choices.load_choice_groups("jsonl_score_eval", LENGTHS)
    apart = [
        group for twin in summary.eval_tasks for group in choices.load_choice_groups(twin, LENGTHS)
    ]
    assert [(g.task, g.idx, g.input_text) for g in together] == [
        (g.task, g.idx, g.input_text) for g in apart
    ]
    for first, second in zip(together, apart, strict=True):
        np.testing.assert_array_equal(first.inputs, second.inputs)
        assert first.is_correct == second.is_correct
    capped = choices.load_choice_groups("jsonl_score_eval", LENGTHS, max_examples=2)
    assert [(g.task, g.idx) for g in capped] == [
        ("plain_score_eval", 0),
        ("scored_score_eval", 0),
        ("scored_score_eval", 1),
    ]
