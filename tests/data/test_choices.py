"""Examples with answer choices, grouped by example."""

import data_tasks
import numpy as np
import pytest
from data_tasks import LENGTHS

from pemoe_jax.analysis import generation
from pemoe_jax.analysis.routing import measure
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, seqio_tasks
from pemoe_jax.runtime import options
from pemoe_jax.tasks import TaskRoles


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


def choice_row(example: int, choice: int, target: int, correct: bool) -> dict:
    return {
        "inputs": [10 + example, 1],
        "targets": [target, 1],
        "idx": [example, choice],
        "is_correct": correct,
    }


def test_rows_are_grouped_by_index_in_any_order(registered):
    rows = [
        choice_row(example, choice, 20 + choice, correct=choice == example)
        for choice in (2, 0, 1)  # all examples' choices 2, then 0, then 1
        for example in (1, 0)
    ]
    data_tasks.add_rows("users_scored", rows)
    groups = choices.load_choice_groups("users_scored", LENGTHS)
    assert [(g.idx, g.inputs.tolist()) for g in groups] == [(0, [10, 1]), (1, [11, 1])]
    for group in groups:
        assert [ids.tolist() for ids in group.choices] == [[20, 1], [21, 1], [22, 1]]
        assert group.is_correct == tuple(choice == group.idx for choice in range(3))
    capped = choices.load_choice_groups("users_scored", LENGTHS, max_examples=1)
    assert [(g.idx, len(g.choices)) for g in capped] == [(0, 3)]
    data_tasks.add_rows("users_scored", [*rows, rows[1]])
    with pytest.raises(InputError, match=r"row 7: expected unique 'idx', got \[0, 2\] again"):
        choices.load_choice_groups("users_scored", LENGTHS)
    data_tasks.add_rows("users_scored", [*rows, {**rows[1], "idx": [1, 3]}])
    with pytest.raises(InputError, match="row 7: expected the same inputs for all choices of"):
        choices.load_choice_groups("users_scored", LENGTHS)


@pytest.mark.parametrize("empty", [[], [0, 0]])
def test_a_choice_without_tokens_is_an_error(registered, empty):
    rows = [choice_row(0, choice, 20, correct=choice == 0) for choice in range(2)]
    rows[1]["targets"] = empty  # its score would be 0, and win
    data_tasks.add_rows("users_scored", rows)
    message = "users_scored: example 1: choice 2: expected a token in 'targets', got none"
    with pytest.raises(InputError, match=message):
        choices.load_choice_groups("users_scored", LENGTHS)


@pytest.mark.parametrize("key", ["inputs", "targets"])
@pytest.mark.parametrize("wrong", [-1, 5000])
def test_ids_outside_of_the_vocabulary_are_errors(registered, key, wrong):
    rows = [choice_row(example, 0, 20, True) for example in range(3)]
    rows[1][key] = [5, wrong, 1]
    data_tasks.add_rows("users_scored", rows)
    size = seqio_tasks.vocab_size("a")
    message = (
        f"users_scored: example 2: '{key}' must have token ids from 0 to {size - 1}, as the"
        f" vocabulary has {size}, got {wrong}"
    )
    with pytest.raises(InputError) as error:
        choices.load_choice_groups("users_scored", LENGTHS)
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        list(feed.eval_batches("users_scored", LENGTHS, 2))
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        measure.read_examples("users_scored", LENGTHS, 3)
    assert str(error.value) == message
    rows = [{"inputs": row["inputs"], "targets": row["targets"]} for row in rows]
    data_tasks.add_rows("users_plain", rows)
    with pytest.raises(InputError) as error:
        generation.read_tasks(options.Data("users_plain"), LENGTHS, TaskRoles())
    assert str(error.value) == message.replace("users_scored", "users_plain")
    data_tasks.add_rows("users_plain", rows, split="train")
    with pytest.raises(InputError) as error:
        list(feed.train_batches("users_plain", LENGTHS, 2, shuffle=False, num_epochs=1))
    assert str(error.value) == message.replace("users_scored", "users_plain")


def test_choices_of_other_text_and_the_same_tokens_are_odd():
    def anomalies(texts, ids):
        return choices.ChoiceGroup(
            task="t",
            idx=0,
            inputs=np.array([5, 1]),
            choices=tuple(np.array([i, 1], np.int32) for i in ids),
            is_correct=(True,) + (False,) * (len(ids) - 1),
            input_text="a",
            choice_texts=texts,
            input_truncated=False,
            target_truncated=False,
        ).anomalies

    assert anomalies(("{", "}", "a"), (2, 2, 7)) == ("equal_tokens",)
    assert anomalies(("{", "a"), (2, 7)) == ()
    assert anomalies(("a", " a"), (7, 7)) == ("doubled_choices",)
    assert anomalies(("a", "a", "{", "}"), (7, 7, 2, 2)) == ("doubled_choices", "equal_tokens")
