"""Roles of the tasks of a JSON lines folder: trained on, scored, held out; and their mixtures."""

import pytest
from data_tasks import LENGTHS, YES_NO, write
from test_jsonl import folder as folder  # fixtures
from test_jsonl import index_entry, register_error, write_index
from test_jsonl import vocab as vocab

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_tasks
from pemoe_jax.tasks import jsonl
from pemoe_jax.tasks.vocabulary import load_vocabulary


def test_without_index_unscored_tasks_are_trained_on(folder, vocab):
    tasks = jsonl.register(folder, vocab)
    assert tasks.train_tasks == ["colour_ask", "colour_say", "free", "nli_a", "nli_b"]
    assert tasks.eval_tasks == []
    assert tasks.no_eval_split == ["free"]
    assert tasks.eval_splits == {
        "colour_ask": "validation",
        "colour_say": "validation",
        "nli_a": "test",
        "nli_b": "test",
    }
    with pytest.raises(
        InputError, match="'jsonl_score_eval' is not registered: .* no task to score"
    ):
        seqio_tasks.get_mixture_or_task("jsonl_score_eval")
    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_*"])
    assert tasks.train_tasks == ["colour_ask", "colour_say", "free"]
    assert tasks.eval_tasks == ["nli_a_score_eval", "nli_b_score_eval"]
    assert seqio_tasks.subtask_names("jsonl_score_eval") == tasks.eval_tasks
    assert seqio_tasks.subtask_names("jsonl_train") == tasks.train_tasks
    assert tasks.examples == {
        "colour_ask": 3,
        "colour_say": 3,
        "free": 1,
        "nli_a_score_eval": 2,
        "nli_b_score_eval": 2,
    }
    # Without an index every task is its own dataset: nli_b is not held out because nli_a is.
    assert "nli_b" in jsonl.register(folder, vocab, eval_tasks=["nli_a"]).train_tasks


def test_tasks_with_choices_have_a_score_eval_task(folder, vocab):
    import seqio

    jsonl.register(folder, vocab)
    names = set(seqio.TaskRegistry.names())
    assert {"nli_a_score_eval", "nli_b_score_eval"} <= names
    assert not {"free_score_eval", "colour_ask_score_eval"} & names


def test_roles_from_index(folder, vocab):
    write_index(
        folder,
        colour_ask=index_entry("colour", "BASE"),
        colour_say=index_entry("colour", "GPT_EVAL"),
        nli_a=index_entry("super_glue", "", "BASE", subset="rte"),
        nli_b=index_entry("super_glue", "BASE", "", subset="rte"),
        free=index_entry("free", "BASE", t0_blacklisted=True),
    )
    tasks = jsonl.register(folder, vocab)
    assert tasks.has_index
    assert tasks.train_tasks == ["colour_ask"]
    assert tasks.eval_tasks == ["nli_a_score_eval"]
    assert tasks.held_out == ["rte"]
    assert tasks.held_out_skipped == ["nli_b"]  # a training role, but its dataset is held out
    assert tasks.datasets["nli_b"] == tasks.datasets["nli_a_score_eval"] == "rte"
    assert tasks.datasets["colour_ask"] == "colour"


@pytest.mark.parametrize("change", [{"original_task": False}, {"t0_do_eval": "BIAS_FAIRNESS"}])
def test_scoring_role_requires_base_and_original_task(folder, vocab, change):
    entry = index_entry("nli", "", "BASE", original_task=True)
    write_index(folder, nli_a=entry | change, nli_b=entry)
    assert jsonl.register(folder, vocab).eval_tasks == ["nli_b_score_eval"]
    write_index(folder, colour_ask=entry, nli_b=entry)  # colour_ask has no choices
    assert jsonl.register(folder, vocab).eval_tasks == ["nli_b_score_eval"]


def test_index_without_roles_or_without_tasks(folder, vocab):
    write_index(folder, nli_a={"dataset": "nli"}, nli_b={"dataset": "nli", "subset": "x"})
    tasks = jsonl.register(folder, vocab)
    assert tasks.train_tasks == ["colour_ask", "colour_say", "free", "nli_a", "nli_b"]
    assert (tasks.datasets["nli_a"], tasks.datasets["nli_b"]) == ("nli", "nli_x")
    assert tasks.datasets["free"] == "free"
    assert tasks.not_in_index == ["colour_ask", "colour_say", "free"]


def test_tasks_named_like_held_out_ones_are_named_in_a_warning(folder, vocab):
    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_a"])
    assert tasks.named_like_held_out == ["nli_b"]
    warning = "WARNING: trained on, but named like a held-out dataset"
    assert [line for line in tasks.summary if line.startswith(warning)][0].endswith("(nli_b)")
    write_index(folder, nli_b={"dataset": "other"})  # said to be another one
    assert jsonl.register(folder, vocab, eval_tasks=["nli_a"]).named_like_held_out == []
    write_index(folder, colour_ask={"dataset": "nli"})
    tasks = jsonl.register(folder, vocab, eval_tasks=["colour_ask"])
    assert tasks.named_like_held_out == ["nli_a", "nli_b"]


@pytest.mark.parametrize(
    "subsets, is_named", [(("", "x"), True), (("x", ""), True), (("x", "y"), False)]
)
def test_a_dataset_with_and_without_a_subset_is_named_in_a_warning(
    folder, vocab, subsets, is_named
):
    entries = [{"dataset": "nli", **({"subset": each} if each else {})} for each in subsets]
    write_index(folder, nli_a=entries[0], nli_b=entries[1])
    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_a"])
    assert "nli_b" in tasks.train_tasks
    assert tasks.named_like_held_out == ["nli_b"] * is_named


def test_train_tasks_overrides_held_out_datasets(folder, vocab):
    entries = {
        "colour_ask": index_entry("colour", "BASE"),
        "colour_say": index_entry("colour", "BASE"),
        "nli_a": index_entry("nli", "", "BASE"),
        "nli_b": index_entry("nli", "BASE", ""),
    }
    write_index(folder, **entries)
    # EVAL_TASKS selects another task; the dataset with the scoring role stays held out.
    write(folder, "colour_ask", "validation", [("sky", "blue", ["blue", "red"])])
    tasks = jsonl.register(folder, vocab, eval_tasks=["colour_ask"])
    assert tasks.held_out == ["colour", "nli"]
    assert tasks.eval_tasks == ["colour_ask_score_eval"]
    assert tasks.train_tasks == ["free"]
    assert tasks.held_out_skipped == ["colour_say", "nli_b"]
    assert tasks.held_out_trained == []
    tasks = jsonl.register(folder, vocab, train_tasks=["nli_*", "free"])
    assert tasks.train_tasks == ["free", "nli_a", "nli_b"]
    assert tasks.held_out_trained == ["nli_a", "nli_b"]
    assert any("WARNING: held out, but trained on" in line for line in tasks.summary)
    assert tasks.eval_tasks == ["nli_a_score_eval"]  # TRAIN_TASKS does not change scoring


@pytest.mark.parametrize(
    "evaluation",
    [
        {"free": index_entry("colour", "", "BASE")},  # no choices
        {"nli_a": index_entry("colour", "", "BASE", original_task=False)},
        {"nli_a": index_entry("colour", "", "BIAS_FAIRNESS")},
        {"elsewhere": index_entry("colour", "", "BASE")},  # no files here
    ],
)
def test_datasets_to_evaluate_are_held_out_whatever_can_be_scored(folder, vocab, evaluation):
    write_index(
        folder,
        colour_ask=index_entry("colour", "BASE"),
        nli_b=index_entry("nli", "BASE"),
        **evaluation,
    )
    tasks = jsonl.register(folder, vocab, train_tasks=None)
    assert tasks.held_out == ["colour"]
    assert tasks.held_out_skipped == ["colour_ask"]
    assert "nli_b" in tasks.train_tasks and not {"colour_ask", "free"} & {
        task for task in tasks.train_tasks if tasks.datasets[task] == "colour"
    }


def test_tasks_that_cannot_be_scored_are_held_out_and_listed(folder, vocab):
    tasks = jsonl.register(folder, vocab, eval_tasks=["free", "colour_*"])
    assert tasks.held_out == ["colour_ask", "colour_say", "free"]
    assert tasks.train_tasks == ["nli_a", "nli_b"]
    reason = "no answer choices, so not scored: 3 tasks (colour_ask, colour_say, free)"
    assert reason in tasks.summary
    (folder / "nli_a" / "test.jsonl").unlink()
    tasks = jsonl.register(folder, vocab, eval_tasks=["free", "nli_a"])
    with pytest.raises(InputError, match="no task to score .*without answer_choices: free; wit"):
        seqio_tasks.get_mixture_or_task("jsonl_score_eval")


def test_a_later_row_may_be_the_first_with_choices(folder, vocab):
    rows = [("x", "y"), ("x", "y", []), ("sky", "yes", YES_NO), ("x", "y", None)]
    write(folder, "late", "validation", rows)
    write(folder, "none", "validation", rows[:2])
    tasks = jsonl.register(folder, vocab, eval_tasks=["late", "none"])
    assert tasks.eval_tasks == ["late_score_eval"] and tasks.no_choices == ["none"]
    assert tasks.examples["late_score_eval"] == 1
    assert [(odd.kind, odd.count, odd.line) for odd in tasks.odd] == [("no_choices", 3, 1)]
    assert [g.idx for g in choices.load_choice_groups("late_score_eval", LENGTHS)] == [2]


def test_patterns_override_roles(folder, vocab):
    write_index(
        folder,
        nli_a=index_entry("nli", "", ""),
        nli_b=index_entry("nli", "", ""),
        free=index_entry("free", "", ""),
    )
    tasks = jsonl.register(folder, vocab, train_tasks=["f*"], eval_tasks=["nli_[b-z]_score_eval"])
    assert (tasks.train_tasks, tasks.eval_tasks) == (["free"], ["nli_b_score_eval"])
    tasks = jsonl.register(folder, vocab, eval_tasks=["*"])  # those without choices are left out
    assert tasks.eval_tasks == ["nli_a_score_eval", "nli_b_score_eval"]
    assert tasks.no_choices == ["colour_ask", "colour_say", "free"]
    assert tasks.train_tasks == []
    with pytest.raises(InputError, match="no task to train on; held-out datasets: colour_ask, co"):
        seqio_tasks.get_mixture_or_task("jsonl_train")
    assert jsonl.register(folder, vocab, eval_tasks=[]).eval_tasks == []


def test_mixture_of_training_tasks_to_score(folder, vocab):
    write_index(
        folder,
        nli_a=index_entry("nli", "BASE"),
        nli_b=index_entry("rte", "", "BASE"),
        colour_say=index_entry("colour", "BASE"),  # no choices
        colour_ask=index_entry("colour", "BASE"),
        free=index_entry("free", "BASE"),
    )
    write(
        folder, "free", "train", [("what was it", "good", ["good", "bad"])]
    )  # no evaluation split
    tasks = jsonl.register(folder, vocab)
    assert tasks.eval_tasks == ["nli_b_score_eval"]
    assert tasks.train_score_tasks == ["nli_a_score_eval"]
    assert tasks.held_out == ["rte"]
    assert seqio_tasks.subtask_names("jsonl_train_score_eval") == ["nli_a_score_eval"]
    assert [g.task for g in choices.load_choice_groups("jsonl_train_score_eval", LENGTHS)] == [
        "nli_a_score_eval",
        "nli_a_score_eval",
    ]
    lines = tasks.summary
    assert "scoring: 1 task of 1 dataset, 2 examples (jsonl_score_eval): rte" in lines
    line = "scoring of training tasks: 1 task of 1 dataset, 2 examples"
    assert f"{line} (jsonl_train_score_eval): nli" in lines
    tasks = jsonl.register(folder, vocab, train_tasks=["colour_*"])
    assert tasks.train_score_tasks == []
    assert not any("scoring of training tasks" in line for line in tasks.summary)
    with pytest.raises(InputError, match="no task to train on that has answer choices and an eval"):
        seqio_tasks.get_mixture_or_task("jsonl_train_score_eval")


def test_evaluation_split_is_the_first_of_validation_val_test(tmp_path, vocab):
    for task, splits in {"a": ["test", "val"], "b": ["test"], "c": ["validation", "val"]}.items():
        for split in ["train", *splits]:
            write(tmp_path, task, split, [(split, "yes", YES_NO)])
    tasks = jsonl.register(tmp_path, vocab, eval_tasks=["*"])
    assert tasks.eval_splits == {"a": "val", "b": "test", "c": "validation"}
    texts = {g.task: g.input_text for g in choices.load_choice_groups("jsonl_score_eval", LENGTHS)}
    assert texts == {"a_score_eval": "val", "b_score_eval": "test", "c_score_eval": "validation"}
    assert choices.load_choice_groups("a_score_eval", LENGTHS, split="test")[0].input_text == "test"


def test_rate_is_the_number_of_examples_capped_as_in_t0(folder, vocab, monkeypatch):
    import seqio

    write_index(folder, nli_a={"dataset": "nli"}, nli_b={"dataset": "nli"})
    jsonl.register(folder, vocab)
    mixture = seqio.MixtureRegistry.get("jsonl_train")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"colour_ask": 3, "colour_say": 3, "free": 1, "nli_a": 4, "nli_b": 4}
    monkeypatch.setattr(jsonl, "MAX_RATE", 3)  # 4 > 3: 3 shared by two templates
    assert mixture.get_rate(seqio.TaskRegistry.get("nli_a")) == 1.5
    assert mixture.get_rate(seqio.TaskRegistry.get("colour_ask")) == 3


def test_eval_examples_caps_every_split_but_train(folder, vocab):
    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_a"], eval_examples=1)
    assert tasks.examples["nli_a_score_eval"] == 1
    assert [g.idx for g in choices.load_choice_groups("nli_a_score_eval", LENGTHS)] == [0]
    assert seqio_tasks.get_mixture_or_task("nli_b").num_input_examples("train") == 4
    for wrong in (0, -1, "3"):
        assert "EVAL_EXAMPLES" in register_error(folder, vocab, eval_examples=wrong)


def test_register_is_idempotent_and_replaces_changed_folders(folder, vocab):
    import seqio

    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_a"])
    task = seqio.TaskRegistry.get("nli_a")
    assert jsonl.register(folder, str(vocab), eval_tasks=["nli_a"]) is tasks
    assert seqio.TaskRegistry.get("nli_a") is task
    assert jsonl.register(folder, vocab, eval_tasks=["nli_b"]).eval_tasks == ["nli_b_score_eval"]
    assert seqio_tasks.subtask_names("jsonl_score_eval") == ["nli_b_score_eval"]
    write(folder, "new", "train", [("sky", "blue")])  # the folder has changed
    assert "new" in jsonl.register(folder, vocab, eval_tasks=["nli_b"]).train_tasks
    other = folder / "other"
    write(other, "only", "train", [("sky", "blue")])
    jsonl.register(other, vocab)
    assert "nli_a" not in seqio.TaskRegistry.names()
    assert "nli_a_score_eval" not in seqio.TaskRegistry.names()


def test_vocabulary_is_loaded_once_per_file(vocab, tmp_path):
    assert load_vocabulary(vocab) is load_vocabulary(str(vocab))
    import seqio

    plain = seqio.SentencePieceVocabulary(str(vocab), extra_ids=100)
    assert load_vocabulary(vocab) == plain  # so a user's own tasks mix with these
    assert load_vocabulary(vocab).vocab_size == plain.vocab_size
