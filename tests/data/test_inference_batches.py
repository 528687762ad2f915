"""Batches of few shapes: they contain everything once, with little padding and even sizes."""

import data_tasks
import numpy as np
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, inference_batches


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return data_tasks.register(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_group_is_whole_in_one_batch(registered, batch_size):
    groups = choices.load_choice_groups("jsonl_score_eval", {"inputs": 128, "targets": 32})
    seen = []
    for batch, members in inference_batches.score_batches(groups, batch_size):
        inputs, fed, targets = (
            batch[key]
            for key in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        )
        assert 1 <= len(members) <= len(inputs) == len(targets) <= batch_size
        np.testing.assert_array_equal(fed[..., 1:], targets[..., :-1])
        assert not fed[..., 0].any()
        for i, group in enumerate(members):
            assert inputs[i][inputs[i] > 0].tolist() == group.inputs.tolist()
            for j, ids in enumerate(group.choices):
                assert targets[i, j][targets[i, j] > 0].tolist() == ids.tolist()
            assert not targets[i, len(group.choices) :].any()
        assert not inputs[len(members) :].any() and not targets[len(members) :].any()
        seen += members
    assert sorted(map(id, seen)) == sorted(map(id, groups))


def make_group(num_choices, input_length, target_length):
    return choices.ChoiceGroup(
        task="t",
        idx=0,
        inputs=np.ones(input_length, np.int32),
        choices=(np.ones(target_length, np.int32),) * num_choices,
        is_correct=(True,) * num_choices,
        input_text="",
        choice_texts=("",) * num_choices,
        input_truncated=False,
        target_truncated=False,
    )


def random_groups():
    rng = np.random.default_rng(0)
    sizes = zip(
        rng.integers(2, 4, 800), rng.integers(5, 250, 800), rng.integers(2, 8, 800), strict=True
    )
    return [make_group(*size) for size in sizes]


def shapes_and_padding(groups, batch_size, **settings):
    """Returns the shapes of the batches, and how many times padding multiplies the tokens."""
    batches = [
        batch for batch, _ in inference_batches.score_batches(groups, batch_size, **settings)
    ]
    keys = ("encoder_input_tokens", "decoder_target_tokens")
    shapes = {tuple(batch[key].shape for key in keys) for batch in batches}
    spent = [sum(batch[key].size for batch in batches) for key in keys]
    real = [
        sum(len(group.inputs) for group in groups),
        sum(len(ids) for group in groups for ids in group.choices),
    ]
    return shapes, spent[0] / real[0], spent[1] / real[1]


def test_few_shapes_for_many_sizes():
    shapes, inputs, choices = shapes_and_padding(random_groups(), 16)
    assert len(shapes) <= 3 and inputs < 1.4 and choices < 2.5


def test_shapes_are_added_while_they_save_more_padding_than_they_cost():
    groups = random_groups()
    many, tight, _ = shapes_and_padding(groups, 16, program_cost=0, max_programs=100)
    few, loose, _ = shapes_and_padding(groups, 16, program_cost=0, max_programs=3)
    single, all_padded, _ = shapes_and_padding(groups, 16, program_cost=1 << 30)
    assert len(many) > len(few) == 3 > len(single) == 1
    assert tight < loose < all_padded
    assert tight < 1.2


def test_batches_of_a_shape_are_of_even_size():
    """33 groups of a shape come in two batches of 17, not in one of 32 and one for the last."""
    batches = list(inference_batches.score_batches([make_group(2, 10, 4)] * 33, 32))
    assert [len(batch["encoder_input_tokens"]) for batch, _ in batches] == [17, 17]
    assert [len(members) for _, members in batches] == [17, 16]


def test_no_groups_give_no_batches():
    assert list(inference_batches.score_batches([], 4)) == []


def test_wide_groups_come_in_smaller_batches():
    groups = [make_group(50, 10, 100) for _ in range(20)] + [make_group(2, 10, 4)] * 32
    batches = list(
        inference_batches.score_batches(groups, 32, multiple_of=4, max_target_tokens=56 * 112 * 6)
    )
    rows = [len(batch["encoder_input_tokens"]) for batch, _ in batches]
    assert rows == [4] * 5 + [32]  # 6 would fit, 4 is a multiple of 4
    batch, _ = next(inference_batches.score_batches(groups, 32, multiple_of=8, max_target_tokens=1))
    assert len(batch["encoder_input_tokens"]) == 8
    with pytest.raises(
        InputError, match="BATCH_SIZE must be a multiple of .*-parallel size, 4, got"
    ):
        next(inference_batches.score_batches(groups, 30, multiple_of=4))


def test_input_batches_hold_every_input_once():
    rng = np.random.default_rng(0)
    inputs = [rng.integers(1, 9, n).astype(np.int32) for n in rng.integers(1, 70, 41)]
    seen = []
    for tokens, numbers in inference_batches.input_batches(
        inputs, 8, multiple_of=2, program_cost=100
    ):
        assert len(tokens) % 2 == 0 and len(numbers) <= len(tokens) <= 8
        for row, number in zip(tokens, numbers, strict=False):
            np.testing.assert_array_equal(row[: len(inputs[number])], inputs[number])
            assert not row[len(inputs[number]) :].any()
        for row in tokens[len(numbers) :]:
            np.testing.assert_array_equal(row, tokens[len(numbers) - 1])
        seen += numbers
    assert sorted(seen) == list(range(41))


def test_encoder_batches_have_few_shapes_and_hold_every_input_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1025, 3000)
    inputs = [rng.integers(3, 200, length).astype(np.int32) for length in lengths]
    seen, shapes, area = [], set(), 0
    for tokens, numbers in inference_batches.encoder_batches(inputs, 32, multiple_of=3):
        shapes.add(tokens.shape)
        area += tokens.size
        seen += numbers
        for row, number in zip(tokens, numbers, strict=False):
            np.testing.assert_array_equal(row[: len(inputs[number])], inputs[number])
        assert not tokens[len(numbers) :].any() and len(tokens) % 3 == 0
        assert tokens.sum() == sum(inputs[number].sum() for number in numbers)
    assert sorted(seen) == list(range(3000))
    assert len(shapes) == len({width for _, width in shapes}) <= 11
    assert lengths.sum() > 0.75 * area  # padding
    assert (33, 1024) in shapes and (42, 384) in shapes  # 32 · 512 / 384 = 42.7
