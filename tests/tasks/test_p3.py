"""P3's tasks: the published table, and the same examples from every form of a folder."""

import csv
import gc
import importlib
import itertools
import json
import os
import pathlib
import sys
import time
import weakref

import numpy as np
import p3_forms
import pytest
from p3_runs import VOCAB

from pemoe_jax import tasks
from pemoe_jax.analysis import generation
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, seqio_import, seqio_tasks, shots, task_fraction
from pemoe_jax.data.seekable_tasks import StreamOptions
from pemoe_jax.runtime import options
from pemoe_jax.tasks.p3 import published

LENGTHS = {"inputs": 128, "targets": 32}
RTE, GPT = "super_glue_rte_can_we_infer", "super_glue_rte_GPT_3_style"
FORMS = ("cache", "parquet", "templates", "datasets", "tfds")


@pytest.fixture
def p3():
    from pemoe_jax.tasks import p3

    return p3


@pytest.fixture(scope="module")
def forms(tmp_path_factory, encode):
    """Folder of each form."""
    root = tmp_path_factory.mktemp("p3")
    p3_forms.write_cache(root / "cache", encode)
    p3_forms.write_parquet(root / "parquet", encode)
    p3_forms.write_templates(root / "templates")
    p3_forms.write_datasets(root / "datasets")
    p3_forms.write_tfds(root / "tfds")
    return {form: root / form for form in FORMS}


@pytest.fixture(autouse=True)
def no_caches(monkeypatch):
    seqio = seqio_import.import_seqio()
    seqio.set_global_cache_dirs([])
    monkeypatch.delenv("PEMOE_P3_DIR", raising=False)
    seqio_tasks.warn_once.cache_clear()


def register(folder, **settings):
    return tasks.register(p3_dir=str(folder), vocab_path=str(VOCAB), **settings)


# --- the table


def test_counts_of_the_table():
    tasks_by_name = published.tasks()
    assert len(tasks_by_name) == 544
    assert sum(task.has_score_eval for task in tasks_by_name.values()) == 116
    sizes = {name: len(names) for name, names in published.mixtures().items()}
    assert sizes["t0_train"] == 313
    assert sizes["t0+_train"] == 313 + 79
    assert sizes["t0++_train"] == 313 + 79 + 72
    assert sizes["t0_eval_score_eval"] == 111
    scored = [
        tasks_by_name[name.removesuffix("_score_eval")]
        for name in published.mixtures()["t0_eval_score_eval"]
    ]
    labels = [task.label for task in scored]
    assert {label: labels.count(label) for label in labels} == {
        "anli": 45,
        "cb": 15,
        "copa": 12,
        "hellaswag": 4,
        "rte": 10,
        "wic": 10,
        "winogrande_winogrande_xl": 5,
        "wsc.fixed": 10,
    }
    assert [sizes[f"anli_r{r}_score_eval"] for r in (1, 2, 3)] == [15, 15, 15]
    # 43 tasks of T0+ and T0++ belong to datasets that are scored
    both = {task.name for task in tasks_by_name.values() if task.do_train and task.do_eval}
    assert len(both) == 43
    # 38 datasets, of which app_reviews, kilt_tasks and quarel have no prompt of the original task
    assert sizes["t0_train_one_og_prompt"] == 35
    firsts = published.mixtures()["t0_train_one_og_prompt"]
    assert len({tasks_by_name[name].dataset_name for name in firsts}) == 35
    assert "imdb_Movie_Expressed_Sentiment" in firsts
    assert all(
        tasks_by_name[name].original_task
        for name in published.mixtures()["t0_train_all_og_prompts"]
    )


def test_task_names_follow_from_dataset_and_template():
    for name, task in published.tasks().items():
        assert (
            published.task_name(task.dataset, task.subset, task.template, task.anli_round) == name
        )


@pytest.mark.parametrize(
    ("task", "rate"),
    [
        ("super_glue_rte_can_we_infer", 2490),  # the size of its train split
        ("app_reviews_generate_review", 288065),
        ("anli_can_we_infer_r2", 162865),  # the sum over three rounds
        ("amazon_polarity_would_you_buy", 55555),  # 3,600,000 > 500,000: 500,000 // 9 templates
        ("dbpedia_14_given_a_choice_of_categories_", 125000),  # 560,000: 500,000 // 4
        ("yelp_review_full_so_i_would", 71428),  # 650,000: 500,000 // 7
        ("wiki_bio_who", 100000),  # 582,659: 500,000 // 5
        ("super_glue_copa_exercise_score_eval", 400),
    ],
)
def test_rates(task, rate):
    assert published.rate(task) == rate


def test_table_agrees_with_the_published_tasks():
    path = pathlib.Path(__file__).parents[3] / "shared" / "p3" / "tasks.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with path.open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(published.tasks())
    for name, task in published.tasks().items():
        row = rows[name]
        assert (task.dataset, task.subset, task.template) == (
            row["dataset"],
            row["subset"],
            row["template"],
        )
        assert (task.do_train, task.do_eval) == (row["do_train"], row["do_eval"])
        assert task.splits.get("validation", 0) == int(row["validation"] or 0)


def test_import_is_fast_and_reads_only_the_table():
    """The module is imported again; the table is no longer cached."""
    former = sys.modules.pop("pemoe_jax.tasks.p3", None)
    if former is not None:
        former.remove()
    for function in (published.tasks, published.names, published.mixtures):
        function.cache_clear()
    opened = []

    def record(event, args):  # an audit hook cannot be removed
        if event == "open" and opened is not None:
            opened.append(str(args[0]))

    sys.addaudithook(record)
    start = time.process_time()
    importlib.import_module("pemoe_jax.tasks.p3")
    assert time.process_time() - start < 2
    files, opened = opened, None
    files = [name for name in files if not name.endswith((".py", ".pyc", ".so"))]
    assert [os.path.basename(name) for name in files if os.path.isfile(name)] == ["tasks.csv"]
    seqio = seqio_import.import_seqio()
    names = [name for name in published.names() if name in seqio.TaskRegistry.names()]
    assert sum(name.endswith("_score_eval") for name in names) == 116
    assert len(names) == 544 + 116
    assert len(seqio.MixtureRegistry.get("t0_train").tasks) == 313


def test_metrics_from_the_table(p3):
    from pemoe_jax.tasks import metrics, score_eval

    task = seqio_tasks.get_mixture_or_task("adversarial_qa_dbert_generate_question")  # BLEU;ROUGE
    assert task.predict_metric_fns == [metrics.bleu, metrics.rouge]
    task = seqio_tasks.get_mixture_or_task(f"{RTE}_score_eval")
    assert task.score_metric_fns == [score_eval.rank_accuracy]


# --- the forms of a folder


def ids(name: str, split: str) -> list[tuple[list[int], list[int]]]:
    ds = seqio_tasks.get_mixture_or_task(name).get_dataset(
        LENGTHS, split=split, shuffle=False, num_epochs=1
    )
    return [(row["inputs"].tolist(), row["targets"].tolist()) for row in ds.as_numpy_iterator()]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_the_same_ids(p3, forms, encode, form):
    register(forms[form])
    count = 0
    for (name, split), rows in p3_forms.all_rows().items():
        # these forms have no rows of their own for it: the choice groups below are tested instead
        if form in ("datasets", "tfds") and name.endswith("_score_eval"):
            continue
        expected = [p3_forms.with_ids(row, encode, True) for row in rows]
        assert ids(name, split) == [(row["inputs"], row["targets"]) for row in expected]
        count += 0 if name.endswith("_score_eval") else len(rows)
    assert count == 1000


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_the_same_shots(p3, forms, form):
    register(forms[form])
    name = f"{RTE}_score_eval"
    task_shots = shots.load_shots([name], options.FewShot(3), 128)[name]
    rows = p3_forms.plain_rows(RTE, "train")
    texts = {row["inputs_pretokenized"]: row["targets_pretokenized"] for row in rows}
    drawn = [(example.input_text, example.target_text) for example in task_shots.examples]
    assert len(set(drawn)) == 4 and all(texts[inputs] == target for inputs, target in drawn)
    # The same rows in every form.
    assert [list(texts).index(inputs) for inputs, _ in drawn] == [1, 98, 49, 83]
    assert task_shots.tokens[0].tolist() == task_shots.vocabulary.encode(" ".join(drawn[0]))
    if form == "cache":
        cached = shots.load_shots([name], options.FewShot(3), 128, use_cached=True)[name]
        assert [example.input_text for example in cached.examples] == [text for text, _ in drawn]


def test_shots_of_a_folder_without_the_plain_task(p3, forms, tmp_path):
    name = f"{RTE}_score_eval"
    (tmp_path / name).symlink_to(forms["parquet"] / name)
    register(tmp_path)
    task_shots = shots.load_shots([name], options.FewShot(3), 128)[name]
    rows = p3_forms.plain_rows(RTE, "train")
    texts = {row["inputs_pretokenized"]: row["targets_pretokenized"] for row in rows}
    assert len(task_shots.examples) == 4
    assert all(texts[example.input_text] == example.target_text for example in task_shots.examples)


def test_every_task_of_the_evaluation_mixture_has_a_train_split():
    names = published.mixtures()[published.SCORE_MIXTURE]
    assert all("train" in published.task_of(name).splits for name in names)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_have_the_same_choice_groups(p3, forms, encode, form):
    task_roles = register(forms[form])
    assert task_roles.datasets[f"{RTE}_score_eval"] == "rte"
    groups = choices.load_choice_groups("t0_eval_score_eval", LENGTHS)
    groups_by_task: dict[str, list] = {}
    for group in groups:
        groups_by_task.setdefault(group.task.removesuffix("_score_eval"), []).append(group)
    assert set(groups_by_task) == {task for task in p3_forms.RENDERED if "ag_news" not in task}
    for task, members in groups_by_task.items():
        expected = p3_forms.plain_rows(task, "validation")
        assert [group.idx for group in members] == list(range(50))
        for group, row in zip(members, expected, strict=True):
            assert group.input_text == row["inputs_pretokenized"]
            assert group.inputs.tolist() == [*encode(row["inputs_pretokenized"]), 1]
            assert list(group.choice_texts) == row["answer_choices"]
            assert [c.tolist() for c in group.choices] == [
                [*encode(choice), 1] for choice in row["answer_choices"]
            ]
            target = row["targets_pretokenized"]
            assert group.is_correct == tuple(c == target for c in row["answer_choices"])
    # a single task, and EVAL_EXAMPLES
    register(forms[form], eval_examples=7)
    assert len(choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)) == 7
    assert len(choices.load_choice_groups("super_glue_rte_score_eval", LENGTHS)) == 14


def test_seqio_reads_the_cache(p3, forms, encode):
    register(forms["cache"])
    for name in (RTE, f"{RTE}_score_eval"):
        ds = seqio_tasks.get_mixture_or_task(name).get_dataset(
            LENGTHS, split="validation", use_cached=True, shuffle=False
        )
        rows = {(tuple(row["inputs"]), tuple(row["targets"])) for row in ds.as_numpy_iterator()}
        assert rows == {(tuple(a), tuple(b)) for a, b in ids(name, "validation")}


@pytest.mark.parametrize("inputs_eos", [True, False])
def test_inputs_eos(p3, forms, encode, inputs_eos):
    row = p3_forms.plain_rows(RTE, "validation")[0]
    expected = encode(row["inputs_pretokenized"]) + [1] * inputs_eos
    for form in ("cache", "parquet", "templates"):  # ids as stored, or from text
        register(forms[form], inputs_eos=inputs_eos)
        assert ids(RTE, "validation")[0][0] == expected
        assert (
            choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)[0].inputs.tolist() == expected
        )


def test_training_stream_starts_anywhere_and_takes_every_row_once(p3, forms):
    def read(name, options, count=None):
        ds = seqio_tasks.get_mixture_or_task(name).examples_from(LENGTHS, "train", options)
        rows = ds.take(-1 if count is None else count).as_numpy_iterator()
        return [(row["inputs"].tolist(), row["targets"].tolist()) for row in rows]

    expected = None
    for form in FORMS:
        register(forms[form])
        mixture = seqio_tasks.get_mixture_or_task("t0+_train")  # of the five tasks it has ag_news
        assert [task.name for task in mixture.tasks if task.source.files] == ["ag_news_recommend"]
        first = read("super_glue_rte", StreamOptions(3), 200)
        expected = expected or first
        assert first == expected  # the order is independent of the form
    register(forms["cache"])
    assert read("super_glue_rte", StreamOptions(3, 150), 50) == first[150:]
    assert read("super_glue_rte", StreamOptions(3, shard=(1, 2)), 100) == first[1::2]
    rows = ids(RTE, "train")
    assert {str(row) for row in first} <= {str(row) for row in [*rows, *ids(GPT, "train")]}
    epoch = read(RTE, StreamOptions(seed=1, num_epochs=1))
    assert sorted(epoch) == sorted(rows) and epoch != rows


def test_stream_of_313_tasks_starts_anywhere(p3, tmp_path):
    """Near the start and at example 100,000,000; tasks are drawn by their rates."""
    names = published.mixtures()["t0_train"]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        lines = [{"inputs": f"{number}", "targets": f"{row}"} for row in range(1 + number % 7)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "train.jsonl").write_text(text)
    register(tmp_path)

    def read(start, count):
        batches = feed.train_batches(
            "t0_train", LENGTHS, 1, pack=False, seed=5, start={"examples": start}
        )
        keys = ("encoder_input_tokens", "decoder_target_tokens")
        read = itertools.islice(batches, count)
        return [tuple(batch[key].tobytes() for key in keys) for batch in read]

    first = read(0, 2_000)
    # The rarest tasks have a rate of 1,941 of 17,277,798: by the rates 257.4 ± 6 tasks are drawn.
    assert 234 < len({inputs for inputs, _ in first}) < 281
    for start in (1, 1_579):
        assert read(start, 60) == first[start : start + 60]
    far = read(100_000_000, 100)
    assert read(100_000_040, 60) == far[40:]
    assert len(set(far)) > 30
    name = task_fraction.register_fraction("t0_train", 0.1, seed=0)
    drawn = seqio_tasks.subtask_names(name)
    assert len(drawn) == 31 and set(drawn) < set(names)
    batch = next(feed.train_batches(name, LENGTHS, 64))
    assert batch["encoder_input_tokens"].any(axis=1).all()


def test_a_fraction_of_the_tasks_that_a_folder_has(p3, forms):
    register(forms["parquet"])
    with pytest.raises(InputError, match="must leave a task of 't0_train', which has 1 task to"):
        task_fraction.register_fraction("t0_train", 0.5, seed=0)
    name = task_fraction.register_fraction("super_glue_rte", 0.5, seed=0)
    (drawn,) = seqio_tasks.subtask_names(name)
    assert drawn in (RTE, GPT)


def test_infer_skips_tasks_without_data(p3, forms, tmp_path, capsys):
    task_roles = register(forms["parquet"])
    decoded = generation.read_tasks(options.Data("t0_train", max_examples=2), LENGTHS, task_roles)
    assert [(task.name, len(task.inputs)) for task in decoded] == [("ag_news_recommend", 2)]
    assert "skipping 312 tasks, no data: " in capsys.readouterr().out
    with pytest.raises(InputError, match="has no task 'super_glue_wic_same_sense'"):
        generation.read_tasks(
            options.Data("super_glue_wic_same_sense", max_examples=2), LENGTHS, task_roles
        )
    with pytest.raises(InputError, match="USE_CACHED_TASKS: no cache of "):
        generation.read_tasks(
            options.Data("super_glue_wic", use_cached_tasks=True, max_examples=2),
            LENGTHS,
            task_roles,
        )


def test_train_and_eval_batches(p3, forms):
    register(forms["parquet"])
    batch = next(iter(feed.train_batches("t0_train", LENGTHS, 2, seed=1)))
    assert batch["encoder_input_tokens"].shape == (2, 128)
    batches = list(feed.eval_batches("super_glue_rte", LENGTHS, 4))
    examples = sum(int(np.sum(np.max(batch["decoder_segment_ids"], axis=1))) for batch in batches)
    assert examples == 100


def test_unpublished_score_eval_tasks(p3, forms):
    task_roles = register(forms["cache"])
    assert task_roles.train_score_tasks == ["ag_news_recommend_score_eval"]
    groups = choices.load_choice_groups("t0_train_score_eval", LENGTHS)
    assert len(groups) == 50
    assert groups[3].choice_texts == ("Politician", "Athlete", "Manager", "Scientist")
    assert task_roles.eval_splits["ag_news_recommend"] == "test"


# --- errors


def odd_rows(encode) -> list[dict]:
    rows = [
        {"inputs_pretokenized": "", "targets_pretokenized": "Yes", "answer_choices": ["Yes", "No"]},
        {"inputs_pretokenized": "a", "targets_pretokenized": "x", "answer_choices": ["Yes", "No"]},
        {"inputs_pretokenized": "b", "targets_pretokenized": "No", "answer_choices": ["No", "No"]},
        {
            "inputs_pretokenized": "bread " * 300,
            "targets_pretokenized": "No",
            "answer_choices": ["No", "Yes"],
        },
        {"inputs_pretokenized": "c", "targets_pretokenized": "Yes", "answer_choices": ["Yes"]},
    ]
    return [p3_forms.with_ids(row, encode, False) for row in rows]


def test_odd_rows_are_counted(p3, tmp_path, encode):
    p3_forms.write_cache_split(tmp_path / RTE, "validation", odd_rows(encode))
    p3_forms.write_cache_split(tmp_path / RTE, "train", odd_rows(encode)[:1])  # one row
    (tmp_path / RTE / "COMPLETED").touch()
    register(tmp_path)
    groups = choices.load_choice_groups("t0_eval_score_eval", LENGTHS)
    assert [group.anomalies for group in groups] == [
        ("empty_input",),
        ("target_not_in_choices",),
        ("doubled_choices",),
        ("cut_input",),
        (),
    ]
    assert [len(group.inputs) for group in groups[::3]] == [1, 128]
    assert groups[3].inputs[-1] == 1
    assert len(groups[4].choices) == 1
    ds = seqio_tasks.get_mixture_or_task("super_glue_rte").examples_from(
        LENGTHS, "train", StreamOptions(seed=0)
    )
    assert [row["inputs"].tolist() for row in ds.take(3).as_numpy_iterator()] == [[1]] * 3
    for shard in range(2):  # both processes read the only row
        ds = seqio_tasks.get_mixture_or_task(RTE).examples_from(
            LENGTHS, "train", StreamOptions(seed=0, shard=(shard, 2))
        )
        assert len(list(ds.take(2))) == 2


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_damaged_tfrecords(p3, tmp_path, forms):
    import shutil

    shutil.copytree(forms["cache"] / f"{RTE}_score_eval", tmp_path / f"{RTE}_score_eval")
    path = tmp_path / f"{RTE}_score_eval" / "validation.tfrecord-00000-of-00001"
    whole = path.read_bytes()

    def score():
        register(tmp_path)
        with pytest.raises(InputError) as error:
            choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)
        return one_line(error)

    path.write_bytes(whole[:-7])
    assert str(path) in score() and "damaged at byte" in score()
    path.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])  # a bit of the data
    assert str(path) in score() and "damaged" in score()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "Git LFS pointer" in score()
    path.unlink()
    assert str(path) in score()
    path.write_bytes(whole)
    (path.parent / "stats.validation.json").write_text('{"examples": 3}')
    assert "expected 3 rows, as stats.validation.json states, got 100" in score()
    (path.parent / "COMPLETED").unlink()
    assert "COMPLETED" in score()


def test_random_access_in_a_file_larger_than_a_block(tmp_path, monkeypatch, encode):
    from pemoe_jax.data import tfrecords

    monkeypatch.setattr(tfrecords, "_BLOCK", 64)  # smaller than a record
    rows = [p3_forms.with_ids(row, encode, True) for row in p3_forms.plain_rows(RTE, "train")]
    p3_forms.write_cache_split(tmp_path, "train", rows, shards=3)
    reader = tfrecords.TFRecordReader(tmp_path, "train", lambda: 1252)
    read = reader.read_rows([149, 0, 75, 49, 50])
    assert [row["inputs"] for row in read] == [rows[i]["inputs"] for i in (149, 0, 75, 49, 50)]
    blocks = [row["inputs"] for block in reader.row_blocks() for row in block]
    assert blocks == [row["inputs"] for row in rows]


def test_missing_data(p3, tmp_path, forms, monkeypatch):
    with pytest.raises(InputError) as error:
        register(tmp_path / "nowhere")
    assert "nowhere" in one_line(error)
    with pytest.raises(InputError) as error:
        register(tmp_path)
    assert "holds nothing of P3" in one_line(error)
    task_roles = register(forms["parquet"])
    assert task_roles.summary[0].endswith("5 of 544 tasks and 4 of 116 _score_eval tasks (rows: 9)")
    assert "not in P3_DIR: 539 tasks" in task_roles.summary[1]
    with pytest.raises(InputError) as error:
        choices.load_choice_groups("super_glue_wic_score_eval", LENGTHS)
    assert "none of 10 tasks" in one_line(error)
    with pytest.raises(InputError) as error:
        choices.load_choice_groups("super_glue_wic_same_sense_score_eval", LENGTHS)
    with pytest.raises(InputError) as error:
        feed.train_batches(RTE, LENGTHS, 2, split="test")
    assert "'test'" in one_line(error)
    with pytest.raises(InputError) as error:
        tasks.register(p3_dir=str(forms["parquet"]), jsonl_dir="x", vocab_path=str(VOCAB))
    assert "expected one folder of tasks, got JSONL_DIR=" in one_line(error)
    with pytest.raises(InputError) as error:
        register(forms["parquet"], eval_tasks=["rte_*"])
    assert "EVAL_TASKS" in one_line(error)
    with pytest.raises(InputError, match="bias_fairness.*none of its tasks is published"):
        seqio_tasks.get_mixture_or_task("bias_fairness_eval_score_eval")
    monkeypatch.setenv("PEMOE_P3_DIR", str(forms["parquet"]))
    assert tasks.register(vocab_path=str(VOCAB)).folder == str(forms["parquet"])


def test_reading_without_p3_dir_is_an_error(p3):
    p3.register(vocab_path=str(VOCAB))
    for name in (RTE, "t0_train"):
        with pytest.raises(InputError, match="P3_DIR is not set"):
            feed.train_batches(name, LENGTHS, 2)
    with pytest.raises(InputError, match="P3_DIR is not set"):
        choices.load_choice_groups("t0_eval_score_eval", LENGTHS)


def test_splits_without_rows(p3, tmp_path):
    """Parquet of no rows: one line, whatever is to be done with it."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema({"inputs": pyarrow.string(), "targets": pyarrow.string()})
    (tmp_path / RTE).mkdir()
    for split in ("train", "validation"):
        path = tmp_path / RTE / f"{split}-00000-of-00001.parquet"
        parquet.write_table(schema.empty_table(), path)
    task_roles = register(tmp_path)
    assert choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS) == []
    with pytest.raises(InputError, match="none of 10 tasks of .* has rows in its evaluation split"):
        choices.load_choice_groups("super_glue_rte_score_eval", LENGTHS)
    with pytest.raises(InputError, match="parquet: expected at least one row, got none"):
        feed.train_batches(RTE, LENGTHS, 2)
    with pytest.raises(InputError, match=f"the evaluation splits of '{RTE}' have no rows"):
        feed.eval_batches(RTE, LENGTHS, 2)
    with pytest.raises(InputError, match=f"nothing to decode in '{RTE}': "):
        generation.read_tasks(options.Data(RTE), LENGTHS, task_roles)


def test_rows_without_choices(p3, tmp_path, capsys):
    path = tmp_path / RTE / "validation.jsonl"
    path.parent.mkdir()
    rows = [
        {"inputs": "a", "targets": "No", "answer_choices": c} for c in (None, [], ["No", "Yes"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    register(tmp_path)
    assert [g.idx for g in choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)] == [2]
    assert capsys.readouterr().err == (
        f"odd rows: rows without choices in a task with choices (not scored): 2 ({path}: row 1)\n"
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    register(tmp_path)
    assert choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS) == []
    assert capsys.readouterr().err == ""


def test_wrong_row_files(p3, tmp_path):
    import pyarrow
    from pyarrow import parquet

    home = tmp_path / RTE
    home.mkdir()
    path = home / "validation-00000-of-00001.parquet"
    scored = tmp_path / f"{RTE}_score_eval" / path.name
    scored.parent.mkdir()

    def score():
        register(tmp_path)
        with pytest.raises(InputError) as error:
            choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)
        return one_line(error)

    parquet.write_table(pyarrow.table({"inputs": [[1]], "text": ["a"]}), scored)
    assert f"{scored}: expected a column 'targets'" in score() and "inputs, text" in score()
    parquet.write_table(pyarrow.table({"inputs": [[1]], "targets": [[2]]}), scored)
    assert "expected a column 'idx'" in score()
    scored.write_bytes(b"PAR1 is no Parquet")
    assert f"{scored}: not a Parquet file" in score()
    scored.unlink()
    scored.parent.rmdir()
    (home / "validation.jsonl").write_text('{"inputs": "a"}\n')
    assert "validation.jsonl: row 1: expected a field 'targets'" in score()
    (home / "validation.jsonl").write_text("{\n")
    assert "validation.jsonl: row 1: not JSON" in score()


def test_failing_templates(p3, tmp_path, forms, capsys):
    import shutil

    folder = tmp_path / "p3"
    shutil.copytree(forms["templates"], folder)
    raw = folder / "raw" / "super_glue" / "rte" / "validation.jsonl"
    lines = raw.read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    examples[4]["label"] = "seven"  # not an index of the choices
    examples[6]["label"] = -1  # unknown: one template leaves the target empty
    raw.write_text("".join(json.dumps(example) + "\n" for example in examples))
    register(folder)
    groups = choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)
    warning = capsys.readouterr().err
    assert len(groups) == 48 and all(any(group.is_correct) for group in groups)
    assert "1 of 50 examples" in warning
    assert "left out, because the template fails (number 5: " in warning
    assert "left out, because they have no label (number 7: " in warning
    yaml = folder / "templates" / "super_glue" / "rte" / "templates.yaml"
    whole = yaml.read_text()
    yaml.write_text(whole.replace("{{premise}} Can", "{{(label + 1)}} Can"))
    register(folder)
    assert len(choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)) == 48
    warning = capsys.readouterr().err
    assert "1 of 50 examples" in warning
    assert "number 5: TypeError: can only concatenate" in warning
    yaml.write_text(whole.replace("metadata: !TemplateMetadata", "metadata: [", 1))
    task_roles = register(folder)
    assert any("templates.yaml" in line and "not YAML" in line for line in task_roles.summary)
    with pytest.raises(InputError, match=r"no task .*templates.yaml:\d+: not YAML"):
        choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)


def test_rows_with_the_same_idx(p3, tmp_path, encode):
    rows = [p3_forms.with_ids(row, encode, True) for row in p3_forms.score_rows(RTE, "validation")]
    rows[3]["idx"] = [0, 0]
    p3_forms.write_cache_split(tmp_path / f"{RTE}_score_eval", "validation", rows)
    (tmp_path / f"{RTE}_score_eval" / "COMPLETED").touch()
    register(tmp_path)
    with pytest.raises(InputError, match="two rows with the same 'idx'"):
        choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)


@pytest.mark.parametrize("form", ["cache", "parquet", "templates"])
def test_a_folder_that_is_replaced_is_not_kept(p3, forms, form):
    register(forms[form])
    batches = feed.train_batches(RTE, LENGTHS, 2)
    next(batches)
    reader = p3.settings.folder.reader(RTE, "train", p3.settings)
    folder, reader = weakref.ref(p3.settings.folder), weakref.ref(reader)
    gc.collect()
    assert reader() is not None
    next(batches)
    del batches
    register(forms[form])
    gc.collect()
    assert folder() is None
    assert reader() is None
