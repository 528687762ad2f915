"""seqio imported and looked up; answer choices grouped."""

import data_tasks
import numpy as np
import pytest
from data_tasks import LENGTHS
from processes import import_seqio

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_tasks


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
seqio_import.import_seqio.cache_clear()
threads = [threading.Thread(target=seqio_import.import_seqio.__wrapped__) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
os.write(2, b"after")"""
    assert import_seqio(tmp_path, then=then).stderr == "from another thread\nafter"


# --- errors


def test_unknown_names_are_met_with_close_ones(registered):
    with pytest.raises(InputError, match=r"unknown task or mixture 'jsonl_trian' .*jsonl_train"):
        seqio_tasks.subtask_names("jsonl_trian")
    with pytest.raises(InputError, match="unknown task or mixture 'qqq'"):
        seqio_tasks.vocab_size("qqq")


def test_a_task_without_choices_is_named(registered):
    with pytest.raises(InputError, match="'plain' has no answer choices .*'plain_score_eval'"):
        choices.load_choice_groups("plain", LENGTHS)
    with pytest.raises(InputError, match="'a' has no answer choices to score"):
        choices.load_choice_groups("a", LENGTHS)


def test_vocabulary_size_counts_the_sentinels(registered):
    vocabulary = seqio_tasks.get_mixture_or_task("a").output_features["targets"].vocabulary
    assert (
        seqio_tasks.vocab_size("jsonl_train")
        == seqio_tasks.vocab_size("a")
        == vocabulary.vocab_size
    )
    assert seqio_tasks.vocab_size("a") == len(vocabulary.tokenizer)


# --- scoring


def test_groups_are_the_rows_of_the_file(registered):
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


def test_groups_are_cut_as_seqio_cuts(registered):
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


def test_a_mixtures_groups_are_its_tasks(registered):
    found, _ = registered
    together = choices.load_choice_groups("jsonl_score_eval", LENGTHS)
    apart = [
        group for twin in found.eval_tasks for group in choices.load_choice_groups(twin, LENGTHS)
    ]
    assert [(g.task, g.idx, g.input_text) for g in together] == [
        (g.task, g.idx, g.input_text) for g in apart
    ]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        assert one.is_correct == other.is_correct
    capped = choices.load_choice_groups("jsonl_score_eval", LENGTHS, max_examples=2)
    assert [(g.task, g.idx) for g in capped] == [
        ("plain_score_eval", 0),
        ("scored_score_eval", 0),
        ("scored_score_eval", 1),
    ]
