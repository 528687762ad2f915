"""Folders of JSON lines as seqio tasks: rows, odd rows, errors, the P3 sample."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
from data_tasks import LENGTHS, YES_NO, make_vocab, write

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, seqio_tasks
from pemoe_jax.tasks import jsonl
from pemoe_jax.tasks.vocabulary import load_vocabulary


@pytest.fixture(scope="session")
def vocab(tmp_path_factory) -> pathlib.Path:
    return make_vocab(tmp_path_factory.mktemp("vocab"))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """colour_{ask,say} (train, validation), nli_{a,b} (choices), free (train only, no choices)."""
    for task in ("colour_ask", "colour_say"):
        write(tmp_path, task, "train", [("sky", "blue"), ("grass", "green"), ("sea", "blue")])
        write(tmp_path, task, "validation", [("the sky", "blue")])
    for task in ("nli_a", "nli_b"):
        write(tmp_path, task, "train", [("sky is blue", "yes", YES_NO)] * 4)
        rows = [("the sky is blue", "yes", YES_NO), ("the sky is green", "no", YES_NO)]
        write(tmp_path, task, "test", rows)
    write(tmp_path, "free", "train", [("what was it", "a good film")])
    return tmp_path


def write_index(folder: pathlib.Path, **entries: dict) -> None:
    (folder / "INDEX.json").write_text(json.dumps(entries))


def index_entry(dataset: str, train: str = "", evaluate: str = "", **more) -> dict:
    return {"dataset": dataset, "t0_do_train": train, "t0_do_eval": evaluate} | more


def register_error(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        jsonl.register(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- examples


def test_truncated_ids_end_in_eos(tmp_path, vocab):
    text = "the sky is blue what colour is the sea"
    write(tmp_path, "t", "train", [(text, "red green blue red green blue")])
    jsonl.register(tmp_path, vocab)
    ids = load_vocabulary(vocab).encode(text)
    (row,) = (
        seqio_tasks.get_mixture_or_task("t")
        .get_dataset(None, split="train", shuffle=False)
        .as_numpy_iterator()
    )
    assert row["inputs"].tolist() == [*ids, 1]
    assert row["inputs_pretokenized"] == text.encode()
    (row,) = (
        seqio_tasks.get_mixture_or_task("t")
        .get_dataset({"inputs": 6, "targets": 3}, split="train", shuffle=False)
        .as_numpy_iterator()
    )
    assert row["inputs"].tolist() == [*ids[:5], 1]
    assert len(row["targets"]) == 3 and row["targets"][-1] == 1


def test_score_eval_task_has_the_features_of_p3(tmp_path, vocab):
    rows = [("sky", "blue", ["red", "blue", "green"]), ("what", "no", YES_NO)]
    write(tmp_path, "t", "validation", rows)
    jsonl.register(tmp_path, vocab, eval_tasks=["t"])
    task = seqio_tasks.get_mixture_or_task("t_score_eval")
    examples = list(
        task.get_dataset(LENGTHS, split="validation", shuffle=False).as_numpy_iterator()
    )
    assert [row["idx"].tolist() for row in examples] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert [bool(row["is_correct"]) for row in examples] == [False, True, False, False, True]
    assert [row["weight"] for row in examples] == [1.0] * 5
    assert [row["targets_pretokenized"] for row in examples[:3]] == [b"red", b"blue", b"green"]
    assert examples[1]["answer_choices"].tolist() == [b"red", b"blue", b"green"]
    spec = task.get_dataset(LENGTHS, split="validation", shuffle=False).element_spec
    dtypes = {key: value.dtype.name for key, value in spec.items()}
    assert dtypes == {
        "inputs": "int32",
        "targets": "int32",
        "inputs_pretokenized": "string",
        "targets_pretokenized": "string",
        "answer_choices": "string",
        "idx": "int32",
        "is_correct": "bool",
        "weight": "float32",
    }


def test_seqio_evaluator_scores_a_score_eval_task(tmp_path, vocab):
    import seqio

    rows = [
        ("sky", "blue", ["red", "blue"]),
        ("grass", "green", ["green", "red"]),
        ("sea", "blue", ["blue", "blue", "red"]),  # doubled: both are correct
        ("film", "good", ["red", "blue"]),  # the target is not among the choices
    ]
    write(tmp_path, "t", "test", rows)
    jsonl.register(tmp_path, vocab, eval_tasks=["t"])
    evaluator = seqio.Evaluator(
        "t_score_eval",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        sequence_length=LENGTHS,
    )
    blue = load_vocabulary(vocab).encode("blue")

    def score(dataset):  # 1 for "blue", 0 for every other choice
        return [
            (i, float(row["decoder_target_tokens"][: len(blue)].tolist() == blue))
            for i, row in dataset.as_numpy_iterator()
        ]

    metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score, step=0)
    # sky: blue, right; grass: a tie, the first is right; sea: right; film: wrong.
    assert metrics.result()["t_score_eval"]["accuracy"] == pytest.approx(0.75)


def test_every_epoch_shuffles_the_whole_file(tmp_path, vocab):
    write(tmp_path, "t", "train", [(f"{i}", "yes") for i in range(100)])
    jsonl.register(tmp_path, vocab)
    task = seqio_tasks.get_mixture_or_task("t")

    def read(seed):
        ds = task.get_dataset(LENGTHS, split="train", shuffle=True, seed=seed, num_epochs=2)
        texts = [int(row["inputs_pretokenized"]) for row in ds.as_numpy_iterator()]
        return texts[:100], texts[100:]

    first, second = read(0)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert (first, second) == read(0)
    assert first != read(1)[0]
    assert np.mean(first[:34]) > 30  # the beginning of the file has a mean of 17


def test_shards_are_disjoint_and_complete(tmp_path, vocab):
    import seqio

    write(tmp_path, "t", "train", [(f"{i}", "yes") for i in range(5)])
    jsonl.register(tmp_path, vocab)

    def read(name, **kwargs):
        ds = seqio_tasks.get_mixture_or_task(name).get_dataset(
            LENGTHS, split="train", seed=0, **kwargs
        )
        return [int(row["inputs_pretokenized"]) for row in ds.as_numpy_iterator()]

    parts = [read("t", shuffle=False, shard_info=seqio.ShardInfo(i, 2)) for i in range(2)]
    assert parts == [[0, 2, 4], [1, 3]]
    small = [read("t", shuffle=True, shard_info=seqio.ShardInfo(i, 8)) for i in (0, 7)]
    assert all(len(part) == 1 for part in small)  # an empty shard would end a mixture


# --- odd rows


def test_odd_rows_are_counted(tmp_path, vocab):
    many = [str(i) for i in range(50)]
    rows = [
        ("sky", "blue", ["red", "blue"]),
        ("film", "good", ["red", "blue"]),  # 2: target not among them
        ("sea", "blue", ["blue", " blue", "red"]),  # 3: doubled
        ("", "red", ["red", "blue"]),  # 4: empty
        ("word " * 2000, "49", many),  # 5: truncated
        ("grass", "green"),  # 6: no choices
        ("grass", "", ["", "red"]),  # 7: empty target
    ]
    path = write(tmp_path, "t", "validation", rows)
    path.write_text(path.read_text() + "\n\n")  # blank lines at the end
    write(tmp_path, "t", "train", rows)
    tasks = jsonl.register(tmp_path, vocab, eval_tasks=["t"], train_tasks=["t"])
    expected = {
        "target_not_in_choices": (1, 2),
        "doubled_choices": (1, 3),
        "empty_input": (1, 4),
        "no_choices": (1, 6),
        "empty_target": (1, 7),
    }
    for split in ("train", "validation"):
        odd = {o.kind: (o.count, o.line) for o in tasks.odd if o.split == split}
        assert odd == expected
    assert (tasks.max_choices, tasks.max_words) == (50, 2000)
    text = "\n".join(tasks.summary)
    assert "odd rows: targets not among their choices: 2 (t/train.jsonl:2" in text
    assert "longest input: 2,000 words; up to 50 choices" in text
    groups = choices.load_choice_groups("t_score_eval", LENGTHS)
    assert [g.idx for g in groups] == [0, 1, 2, 3, 4, 6]  # row 5 (0-based) has no choices
    assert [g.anomalies for g in groups] == [
        (),
        ("target_not_in_choices",),
        ("doubled_choices",),
        ("empty_input",),
        ("equal_tokens", "cut_input"),  # the vocabulary has no digits
        (),
    ]
    assert groups[2].is_correct == (True, True, False)
    assert len(groups[4].choices) == 50 and len(groups[4].inputs) == LENGTHS["inputs"]
    assert next(feed.train_batches("jsonl_train", LENGTHS, 4))["decoder_target_tokens"].any()


# --- errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"inputs": "a" "targets"', "not JSON: Expecting ',' delimiter at column 16"),
        (b"[1, 2]", "expected an object, got list [1, 2]"),
        (b'{"inputs": "a", "label": 1}', "expected a field 'targets', got inputs, label"),
        (b'{"inputs": 5, "targets": "a"}', "'inputs' must be a string, got int 5"),
        (b'{"inputs": "a", "targets": null}', "'targets' must be a string, got NoneType null"),
        (
            b'{"inputs": "a", "targets": "b", "answer_choices": ["x", 1]}',
            "'answer_choices' must be a list of strings, got list [\"x\", 1]",
        ),
        (
            b'{"inputs": "a", "targets": "b", "answer_choices": "xy"}',
            "'answer_choices' must be a list of strings, got str \"xy\"",
        ),
        (b'{"inputs": "\xff", "targets": "b"}', "not UTF-8: invalid start byte at byte 12"),
        (
            b'{"inputs": "\\ud800", "targets": "b"}',
            "'inputs' has an unpaired surrogate \\ud800",
        ),
    ],
)
def test_malformed_line_is_an_error(folder, vocab, line, message):
    path = folder / "colour_say" / "train.jsonl"
    path.write_bytes(b'{"inputs": "a", "targets": "b"}\n\n' + line + b"\n")
    assert register_error(folder, vocab) == f"{path}:3: {message}"
    # Unused files are not read, and an error leaves the earlier tasks task_roles.
    jsonl.register(folder, vocab, train_tasks=["free"])
    assert register_error(folder, vocab) == f"{path}:3: {message}"
    assert seqio_tasks.subtask_names("jsonl_train") == ["free"]
    with pytest.raises(InputError, match=re.escape(f"{path}:3: {message}")):
        feed.train_batches("colour_say", LENGTHS, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08", ":1: not UTF-8: "),
        ('{"inputs": "a", "targets": "b"}'.encode("utf-16"), ":1: not UTF-8: "),
        (b'[{"inputs": "a", "targets": "b", "answer_choices": ["b", "c"]}]', ":1: expected an obj"),
        (b'{\n"inputs": "a", "targets": "b", "answer_choices": ["b"]\n}\n', ":1: not JSON: "),
        (
            b'{"inputs": "a", "targets": "b", "answer_choices": "b|c"}',
            ":1: 'answer_choices' must be a list of strings, got str",
        ),
    ],
)
def test_malformed_tasks_to_score_are_not_left_out(folder, vocab, content, message):
    path = folder / "nli_a" / "test.jsonl"
    path.write_bytes(content)
    assert register_error(folder, vocab, eval_tasks=["nli_*"]).startswith(f"{path}{message}")
    jsonl.register(folder, vocab, eval_tasks=["nli_b"], use=["eval"])


def test_use_limits_the_files_read(folder, vocab):
    (folder / "free" / "train.jsonl").write_text('{"inputs": "a", "targets": "b"}\nnonsense\n')
    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_a"], use=("eval",))
    assert set(tasks.examples) == {"nli_a_score_eval"}
    assert "free/train.jsonl:2: not JSON" in register_error(folder, vocab, eval_tasks=["nli_a"])
    tasks = jsonl.register(folder, vocab, eval_tasks=["nli_a"], use=("eval", "train_eval"))
    assert set(tasks.examples) == {"nli_a_score_eval", "nli_b_score_eval"}
    path = folder / "nli_b" / "test.jsonl"
    path.write_text(path.read_text() + "nonsense\n")
    jsonl.register(folder, vocab, eval_tasks=["nli_a"], use=("eval",))
    message = register_error(folder, vocab, eval_tasks=["nli_a"], use=("train_eval",))
    assert message.startswith(f"{path}:3: not JSON")
    for wrong in ("train_eval", ["test"]):
        message = register_error(folder, vocab, use=wrong)
        assert message.startswith(
            "use must be a list of 'train', 'eval', 'train_eval', 'decode', got"
        )


def test_task_with_both_roles_is_counted_once(tmp_path, vocab):
    for split in ("train", "validation"):
        write(tmp_path, "t", split, [("sky", "red", YES_NO)])
    tasks = jsonl.register(tmp_path, vocab, train_tasks=["t"], eval_tasks=["t"])
    assert [(odd.split, odd.count) for odd in tasks.odd] == [("train", 1), ("validation", 1)]


def test_byte_order_mark_is_ignored(folder, vocab):
    path = folder / "free" / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "free" in jsonl.register(folder, vocab).train_tasks


def test_folder_errors(tmp_path, vocab):
    missing = tmp_path / "missing"
    assert register_error(missing, vocab) == f"JSONL_DIR {missing} does not exist"
    loose = tmp_path / "loose"
    loose.mkdir()
    expected = f"JSONL_DIR {loose} must hold <task>/<split>.jsonl"
    assert register_error(loose, vocab) == f"{expected}, got none"
    (loose / "train.jsonl").write_text("{}")
    assert register_error(loose, vocab) == f"{expected}, got train.jsonl directly in it"
    assert "got a file" in register_error(loose / "train.jsonl", vocab)
    empty = write(tmp_path / "empty", "t", "train", [])
    assert (
        register_error(tmp_path / "empty", vocab) == f"{empty}: expected at least one row, got none"
    )
    for name in ("train.json", "dev.jsonl", "train.jsonl.gz"):
        (tmp_path / name / "a_b").mkdir(parents=True)
        (tmp_path / name / "a_b" / name).write_text("{}")
        expected = "a_b: expected one of train.jsonl, validation.jsonl, val.jsonl, test.jsonl, got "
        assert register_error(tmp_path / name, vocab).endswith(expected + name)
    for name, expected in (("test.jsonl.gz", "test"), ("test.csv", "test"), ("dev.jsonl", "valid")):
        task = write(tmp_path / f"with_{name}", "t", "train", [("a", "b")]).parent
        (task / name).write_text("{}")
        error = register_error(task.parent, vocab)
        assert error.startswith(f"{task}: expected {expected}") and error.endswith(f", got {name}")
    write(tmp_path / "name", "a b", "train", [("a", "b")])
    assert "must have only letters, digits" in register_error(tmp_path / "name", vocab)
    write(tmp_path / "reserved", "t", "train", [("a", "b")])
    write(tmp_path / "reserved", "t_score_eval", "train", [("a", "b")])
    assert "the name 't_score_eval' is reserved" in register_error(tmp_path / "reserved", vocab)


def test_mixtures_of_p3_need_its_folder(folder, vocab):
    from pemoe_jax import tasks

    # Test modules that import a part of P3 register its tasks when they are collected.
    if "pemoe_jax.tasks.p3" in sys.modules:
        sys.modules["pemoe_jax.tasks.p3"].remove()
    tasks.register(jsonl_dir=str(folder), vocab_path=str(vocab))
    with pytest.raises(InputError, match="'t0_train' is not registered: .* pass P3_DIR"):
        seqio_tasks.get_mixture_or_task("t0_train")


def test_vocabulary_errors(folder, tmp_path, vocab):
    missing = tmp_path / "none.model"
    message = f"VOCAB_PATH must be a SentencePiece model file or 'bytes', got no file at {missing}"
    assert register_error(folder, missing) == message
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"this is no model")
    assert f"VOCAB_PATH {broken} is not a SentencePiece model" in register_error(folder, broken)
    other = tmp_path / "other"
    other.mkdir()
    path = make_vocab(other, pad_id=3, unk_id=0)
    assert "expected pad, eos, unk at ids (0, 1, 2), got" in register_error(folder, path)


def test_default_vocabulary(monkeypatch):
    """T5's public file, unless PEMOE_VOCAB_PATH is set."""
    from pemoe_jax.tasks import vocabulary

    monkeypatch.delenv("PEMOE_VOCAB_PATH", raising=False)
    public = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
    assert vocabulary.default_vocab_path() == public
    monkeypatch.setenv("PEMOE_VOCAB_PATH", "/a/spiece.model")
    assert vocabulary.default_vocab_path() == "/a/spiece.model"


def test_remote_vocabulary(folder, vocab):
    """TensorFlow reads it; an unreachable file is an error of one line."""
    import tensorflow as tf

    tf.io.gfile.copy(str(vocab), "ram://vocabulary/spiece.model", overwrite=True)
    assert load_vocabulary("ram://vocabulary/spiece.model").vocab_size == (
        load_vocabulary(vocab).vocab_size
    )
    message = register_error(folder, "ram://nowhere/spiece.model")
    assert "VOCAB_PATH ram://nowhere/spiece.model cannot be read" in message
    assert "PEMOE_VOCAB_PATH" in message


def test_pattern_errors(folder, vocab):
    message = register_error(folder, vocab, eval_tasks=["nli_*", "nil_a"])
    assert message == "EVAL_TASKS pattern 'nil_a' matched none of 5 tasks; close: nli_a, nli_b"
    message = register_error(folder, vocab, train_tasks=["zzz*"])
    assert message == "TRAIN_TASKS pattern 'zzz*' matched none of 5 tasks"
    (folder / "nli_b" / "train.jsonl").unlink()
    assert "'nli_b', which has no train split" in register_error(
        folder, vocab, train_tasks=["nli_b"]
    )
    assert "must be a list of name patterns" in register_error(folder, vocab, eval_tasks=5)


def test_index_errors(folder, vocab):
    path = folder / "INDEX.json"
    path.write_text('{"a": {},\n "b": }')
    assert register_error(folder, vocab) == f"{path}:2: not JSON: Expecting value at column 7"
    path.write_text("[]")
    assert register_error(folder, vocab) == f"{path}: expected an object, got list []"
    path.write_text('{"a": {}, "free": {}, "a": {"dataset": "b"}}')
    assert register_error(folder, vocab) == f"{path}: the key 'a' occurs twice in an object"
    write_index(folder, free={"t0_do_evl": "BASE", "n": 5, "has_answer_choices": True})
    expected = f"{path}: 'free': unknown key 't0_do_evl'; did you mean 't0_do_eval'?"
    assert register_error(folder, vocab) == expected
    for entry, message in (
        ({"colour": 1}, "unknown key 'colour'; expected some of dataset, subset, t0_do_train"),
        ({"t0_do_train": "base"}, "'t0_do_train': unknown role 'base'; did you mean 'BASE'?"),
        ({"t0_do_eval": "yes"}, "'t0_do_eval': unknown role 'yes'; expected one of BASE, BIAS_"),
    ):
        write_index(folder, free=entry)
        assert register_error(folder, vocab).startswith(f"{path}: 'free': {message}")
    write_index(folder, free={"t0_blacklisted": "no"})
    message = f"{path}: 'free': 't0_blacklisted' must be bool, got str \"no\""
    assert register_error(folder, vocab) == message


def test_name_of_another_seqio_task_is_an_error(folder, vocab):
    import seqio

    other = seqio.TaskRegistry.add(
        "taken",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features={},
    )
    try:
        write(folder, "taken", "train", [("a", "b")])
        assert "a seqio task named 'taken' exists already" in register_error(folder, vocab)
        assert seqio.TaskRegistry.get("taken") is other
    finally:
        seqio.TaskRegistry.remove("taken")


# --- the P3 sample


def test_p3_sample_roles_and_batches(p3_sample, t5_vocab):
    entries = json.loads((p3_sample / "INDEX.json").read_text())
    tasks = jsonl.register(p3_sample, t5_vocab)
    score = {
        task
        for task, entry in entries.items()
        if entry["t0_do_eval"] == "BASE" and entry["original_task"] and entry["has_answer_choices"]
    }
    train = {
        task
        for task, entry in entries.items()
        if entry["t0_do_train"] == "BASE" and not entry["t0_blacklisted"] and "train" in entry["n"]
    }
    assert set(tasks.train_tasks) == train and len(train) == 248
    assert {name.removesuffix("_score_eval") for name in tasks.eval_tasks} == score
    assert len(score) == 51
    score_train = {
        task
        for task in train
        if entries[task]["has_answer_choices"]
        and {"validation", "val", "test"} & set(entries[task]["n"])
    }
    assert {name.removesuffix("_score_eval") for name in tasks.train_score_tasks} == score_train
    assert tasks.held_out == ["cb", "copa", "hellaswag", "rte", "wic"]
    assert tasks.held_out_trained == []
    for task in train:
        assert tasks.examples[task] == entries[task]["n"]["train"]
    no_eval = {
        task
        for task in train | score
        if not {"validation", "val", "test"} & set(entries[task]["n"])
    }
    assert set(tasks.no_eval_split) == no_eval and len(no_eval) == 27
    odd = {(o.task, o.split): o.count for o in tasks.odd if o.kind == "target_not_in_choices"}
    assert odd[("imdb_Negation_template_for_positive_and_negative", "train")] == 200
    assert tasks.max_choices == 50
    assert seqio_tasks.vocab_size("jsonl_train") == 32100
    batch = next(feed.train_batches("jsonl_train", {"inputs": 256, "targets": 64}, 8))
    assert batch["encoder_input_tokens"].shape == (8, 256)
    evaluation = list(feed.eval_batches("jsonl_train", {"inputs": 256, "targets": 64}, 8, 2))
    assert len(evaluation) == 2


def test_p3_sample_choice_groups(p3_sample, t5_vocab):
    tasks = jsonl.register(p3_sample, t5_vocab, eval_examples=3)
    groups = choices.load_choice_groups("jsonl_score_eval", {"inputs": 512, "targets": 128})
    per_task = {name: [g for g in groups if g.task == name] for name in tasks.eval_tasks}
    entries = json.loads((p3_sample / "INDEX.json").read_text())
    for name, members in per_task.items():
        path = p3_sample / name.removesuffix("_score_eval") / "validation.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()[:3]]
        assert entries[name.removesuffix("_score_eval")]["n"]["validation"] >= len(rows)
        assert [g.input_text for g in members] == [row["inputs"] for row in rows]
        assert [list(g.choice_texts) for g in members] == [row["answer_choices"] for row in rows]
        for group, row in zip(members, rows, strict=True):
            assert list(group.is_correct) == [c == row["targets"] for c in row["answer_choices"]]
