"""seqio imported and looked up; answer choices grouped, their batches."""

import data_tasks
import numpy as np
import pytest
from processes import import_seqio
from test_jsonl import LENGTHS

from pemoe_jax import data
from pemoe_jax.core.errors import InputError


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return data_tasks.register(tmp_path_factory.mktemp("data"))


# --- importing seqio


def test_importing_seqio_says_nothing():
    then = "import tensorflow as tf, tensorflow_text, os; print(tf.constant(1) + 1)"
    done = import_seqio(then=then + "; os.write(2, b'after')")
    assert (done.returncode, done.stderr) == (0, "after")


CHATTER = "I0000 00:00:1795314241.148746   29132 port.cc:153] oneDNN custom operations are on."
FAKE = f"""
import os, types
os.write(2, b"{CHATTER}\\n")
os.write(2, b"from another thread\\n")
config = types.SimpleNamespace(set_visible_devices=lambda *_: None)
"""


def test_only_chatter_is_kept_from_stderr(tmp_path):
    (tmp_path / "tensorflow.py").write_text(FAKE)
    (tmp_path / "seqio.py").write_text("")
    done = import_seqio(tmp_path)
    assert (done.returncode, done.stderr) == (0, "from another thread\n")
    assert CHATTER in import_seqio(tmp_path, TF_CPP_MIN_LOG_LEVEL="0").stderr


def test_what_a_failing_import_says_is_not_lost(tmp_path):
    (tmp_path / "tensorflow.py").write_text(FAKE)
    (tmp_path / "seqio.py").write_text("raise ImportError('a library is missing')")
    done = import_seqio(tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[:2] == [CHATTER, "from another thread"]
    assert lines[-1] == "ImportError: a library is missing"


def test_threads_may_import_seqio_at_once(tmp_path):
    (tmp_path / "tensorflow.py").write_text(FAKE + "import time; time.sleep(0.2)")
    (tmp_path / "seqio.py").write_text("")
    then = """
import os, threading
data.import_seqio.cache_clear()
threads = [threading.Thread(target=data.import_seqio.__wrapped__) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
os.write(2, b"after")"""
    assert import_seqio(tmp_path, then=then).stderr == "from another thread\nafter"


# --- errors


def test_unknown_names_are_met_with_close_ones(registered):
    with pytest.raises(InputError, match=r"unknown task or mixture 'jsonl_trian' .*jsonl_train"):
        data.subtasks("jsonl_trian")
    with pytest.raises(InputError, match="unknown task or mixture 'qqq'"):
        data.vocab_size("qqq")


def test_a_task_without_choices_is_named(registered):
    with pytest.raises(InputError, match="'plain' has no answer choices .*'plain_score_eval'"):
        data.choice_groups("plain", LENGTHS)
    with pytest.raises(InputError, match="'a' has no answer choices to score"):
        data.choice_groups("a", LENGTHS)


def test_vocabulary_size_counts_the_sentinels(registered):
    vocabulary = data.check_task("a").output_features["targets"].vocabulary
    assert data.vocab_size("jsonl_train") == data.vocab_size("a") == vocabulary.vocab_size
    assert data.vocab_size("a") == len(vocabulary.tokenizer)


# --- scoring


def test_groups_are_the_rows_of_the_file(registered):
    _, rows = registered
    lengths = {"inputs": 128, "targets": 32}
    groups = data.choice_groups("scored_score_eval", lengths)
    assert [g.idx for g in groups] == list(range(len(rows)))
    features = data.check_task("scored").output_features
    vocabulary = features["inputs"].vocabulary
    for group, (text, target, choices) in zip(groups, rows, strict=True):
        assert (group.input_text, list(group.choice_texts)) == (text, choices)
        assert group.inputs.tolist() == [*vocabulary.encode(text), 1]
        assert [ids.tolist() for ids in group.choices] == [
            [*vocabulary.encode(choice), 1] for choice in choices
        ]
        assert group.is_correct == tuple(choice == target for choice in choices)
        assert not group.cut_input and not group.cut_target


def test_groups_are_cut_as_seqio_cuts(registered):
    lengths = {"inputs": 20, "targets": 4}
    groups = data.choice_groups("scored_score_eval", lengths)
    whole = data.choice_groups("scored_score_eval", {"inputs": 400, "targets": 100})
    rows = data.check_task("scored_score_eval").get_dataset(
        lengths, split="validation", shuffle=False
    )
    by_idx = {tuple(row["idx"].tolist()): row for row in rows.as_numpy_iterator()}
    assert any(g.cut_input for g in groups) and any(not g.cut_input for g in groups)
    for group, full in zip(groups, whole, strict=True):
        assert group.cut_input == (len(full.inputs) > 20)
        assert group.cut_target == any(len(ids) > 4 for ids in full.choices)
        for j, ids in enumerate(group.choices):
            np.testing.assert_array_equal(ids, by_idx[group.idx, j]["targets"])
        np.testing.assert_array_equal(group.inputs, by_idx[group.idx, 0]["inputs"])


def test_a_mixtures_groups_are_its_tasks(registered):
    found, _ = registered
    together = data.choice_groups("jsonl_score_eval", LENGTHS)
    apart = [group for twin in found.eval_tasks for group in data.choice_groups(twin, LENGTHS)]
    assert [(g.task, g.idx, g.input_text) for g in together] == [
        (g.task, g.idx, g.input_text) for g in apart
    ]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        assert one.is_correct == other.is_correct
    capped = data.choice_groups("jsonl_score_eval", LENGTHS, max_examples=2)
    assert [(g.task, g.idx) for g in capped] == [
        ("plain_score_eval", 0),
        ("scored_score_eval", 0),
        ("scored_score_eval", 1),
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_group_is_in_one_batch_whole(registered, batch_size):
    groups = data.choice_groups("jsonl_score_eval", {"inputs": 128, "targets": 32})
    seen = []
    for batch, members in data.score_batches(groups, batch_size):
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


def fake_group(num_choices, input_length, target_length):
    return data.ChoiceGroup(
        task="t",
        idx=0,
        inputs=np.ones(input_length, np.int32),
        choices=(np.ones(target_length, np.int32),) * num_choices,
        is_correct=(True,) * num_choices,
        input_text="",
        choice_texts=("",) * num_choices,
        cut_input=False,
        cut_target=False,
    )


def some_groups():
    rng = np.random.default_rng(0)
    sizes = zip(
        rng.integers(2, 4, 800), rng.integers(5, 250, 800), rng.integers(2, 8, 800), strict=True
    )
    return [fake_group(*size) for size in sizes]


def shapes_and_padding(groups, batch_size, **settings):
    """The shapes of the batches, and tokens of inputs and choices over those that are real."""
    batches = [batch for batch, _ in data.score_batches(groups, batch_size, **settings)]
    keys = ("encoder_input_tokens", "decoder_target_tokens")
    shapes = {tuple(batch[key].shape for key in keys) for batch in batches}
    spent = [sum(batch[key].size for batch in batches) for key in keys]
    real = [
        sum(len(group.inputs) for group in groups),
        sum(len(ids) for group in groups for ids in group.choices),
    ]
    return shapes, spent[0] / real[0], spent[1] / real[1]


def test_few_shapes_for_many_sizes():
    shapes, inputs, choices = shapes_and_padding(some_groups(), 16)
    assert len(shapes) <= 3 and inputs < 1.4 and choices < 2.5


def test_a_shape_is_compiled_where_that_saves_more_padding_than_it_costs():
    groups = some_groups()
    many, tight, _ = shapes_and_padding(groups, 16, program_cost=0, max_programs=100)
    few, loose, _ = shapes_and_padding(groups, 16, program_cost=0, max_programs=3)
    one, all_padded, _ = shapes_and_padding(groups, 16, program_cost=1 << 30)
    assert len(many) > len(few) == 3 > len(one) == 1
    assert tight < loose < all_padded
    assert tight < 1.2


def test_batches_of_a_shape_are_of_even_size():
    """33 groups of one shape: two batches of 17, not one of 32 and one of 32 for the last."""
    batches = list(data.score_batches([fake_group(2, 10, 4)] * 33, 32))
    assert [len(batch["encoder_input_tokens"]) for batch, _ in batches] == [17, 17]
    assert [len(members) for _, members in batches] == [17, 16]


def test_no_groups_give_no_batches():
    assert list(data.score_batches([], 4)) == []


def test_wide_groups_come_in_smaller_batches():
    groups = [fake_group(50, 10, 100) for _ in range(20)] + [fake_group(2, 10, 4)] * 32
    batches = list(data.score_batches(groups, 32, multiple_of=4, max_target_tokens=56 * 112 * 6))
    rows = [len(batch["encoder_input_tokens"]) for batch, _ in batches]
    assert rows == [4] * 5 + [32]  # 6 would fit, 4 is a multiple of 4
    one = next(data.score_batches(groups, 32, multiple_of=8, max_target_tokens=1))
    assert len(one[0]["encoder_input_tokens"]) == 8
    with pytest.raises(InputError, match="BATCH_SIZE 30 is not a multiple of .* devices, 4"):
        next(data.score_batches(groups, 30, multiple_of=4))
