"""Looking up tasks and mixtures."""

import data_tasks
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    return data_tasks.register(tmp_path_factory.mktemp("data"))


def test_unknown_names_raise_with_close_matches(registered):
    with pytest.raises(InputError, match=r"unknown task or mixture 'jsonl_trian' .*jsonl_train"):
        seqio_tasks.subtask_names("jsonl_trian")
    with pytest.raises(InputError, match="unknown task or mixture 'qqq'"):
        seqio_tasks.vocab_size("qqq")


def test_numbers_of_tasks_and_examples(registered):
    assert seqio_tasks.describe_examples("a", "train", False) == "1 task, 40 examples"
    assert seqio_tasks.describe_examples("jsonl_train", "train", False) == "2 tasks, 65 examples"
    assert seqio_tasks.describe_examples("a", "nowhere", False) == "0 tasks, 0 examples"


def test_vocab_size_includes_sentinels(registered):
    vocabulary = seqio_tasks.get_mixture_or_task("a").output_features["targets"].vocabulary
    assert (
        seqio_tasks.vocab_size("jsonl_train")
        == seqio_tasks.vocab_size("a")
        == vocabulary.vocab_size
    )
    assert seqio_tasks.vocab_size("a") == len(vocabulary.tokenizer)


def test_vocab_size_is_that_of_the_larger_vocabulary(registered):
    import seqio

    data_tasks.add_rows("users_rows", [{"inputs": [5], "targets": [5]}])
    task = seqio.TaskRegistry.get("users_rows")
    features = dict(task.output_features, inputs=seqio.Feature(seqio.ByteVocabulary()))
    seqio.TaskRegistry.remove("users_rows")
    seqio.TaskRegistry.add("users_rows", task.source, preprocessors=[], output_features=features)
    assert seqio_tasks.vocab_size("users_rows") == seqio.ByteVocabulary().vocab_size
    with pytest.raises(InputError, match="T5Config.vocab_size must be at least 2.., .* got 200"):
        seqio_tasks.check_vocab_size("users_rows", 200)
