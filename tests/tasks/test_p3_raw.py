"""Datasets for templates, as `datasets` and tensorflow-datasets write them."""

import json
import os
import pathlib
import shutil

import archives
import numpy as np
import p3_forms
import pytest
from p3_runs import VOCAB

from pemoe_jax import tasks
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_import, tfrecords
from pemoe_jax.tasks.p3 import arrow, raw_examples
from pemoe_jax.tasks.p3 import published as published_lib
from pemoe_jax.tasks.p3 import tfds as tfds_lib
from pemoe_jax.tools import cache_tasks

LENGTHS = {"inputs": 128, "targets": 32}
RTE = "super_glue_rte_can_we_infer"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> pathlib.Path:
    return archives.unpack("datasets", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def seqio(monkeypatch):
    monkeypatch.delenv("PEMOE_P3_DIR", raising=False)
    seqio = seqio_import.import_seqio()
    seqio.set_global_cache_dirs([])
    return seqio


def read_all(table) -> list[dict]:
    return table.take(range(table.num_rows))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- datasets


def test_nested_fields(datasets):
    splits = arrow.saved_splits(datasets / "odd" / "nested")
    assert list(splits) == ["train"]
    expected = json.loads((datasets / "odd" / "nested.json").read_text())
    assert read_all(arrow.ArrowTable(splits["train"])) == expected


def test_single_split_and_selected_rows(datasets):
    for name, expected in (("single", list(range(10))), ("indices", [7, 3, 5])):
        splits = arrow.saved_splits(datasets / "odd" / name)
        assert list(splits) == ["test"]
        assert [row["n"] for row in read_all(arrow.ArrowTable(splits["test"]))] == expected


def test_random_access_over_files_and_batches(datasets):
    rows = p3_forms.raw_splits(RTE)["train"]
    home = datasets / "huggingface" / "super_glue" / "rte" / "1.0.3"
    for root, dataset, subset in (("huggingface", "super_glue", "rte"), ("", "super_glue", "copa")):
        if root:
            splits = arrow.cached_splits(datasets / root, dataset, subset)
            assert len(splits["train"]) == 2 and splits["train"][0].parent.parent == home
        else:
            splits = arrow.saved_splits(datasets / "raw" / dataset / subset)
            assert len(splits["train"]) == 2
            rows = p3_forms.raw_splits("super_glue_copa_C1_or_C2_premise_so_because_")["train"]
        table = arrow.ArrowTable(splits["train"])
        numbers = np.random.default_rng(0).permutation(150)
        assert table.num_rows == 150
        assert table.take(numbers) == [rows[number] for number in numbers]


def test_newest_download_without_caches_of_map(datasets, tmp_path):
    home = tmp_path / "super_glue" / "rte"
    shutil.copytree(datasets / "huggingface" / "super_glue" / "rte", home)
    (old,) = home.glob("*/*")
    shutil.copytree(old, home / "1.0.3" / "newer")
    shutil.copytree(old, home / "1.0.3" / "unfinished.incomplete")
    (home / "1.0.3" / "newer" / "super_glue-validation.arrow").unlink()
    (home / "1.0.3" / "newer" / "cache-0123.arrow").write_bytes(b"")
    (home / "1.0.3" / "newer" / "cache-train.arrow").write_bytes(b"")
    os.utime(home / "1.0.3" / "newer" / "dataset_info.json", (9, 9))
    assert list(arrow.cached_splits(tmp_path, "super_glue", "rte")) == ["train"]
    (home / "1.0.3" / "newer" / "super_glue-train-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="expected 2 Arrow files of split 'train', got 1"):
        arrow.cached_splits(tmp_path, "super_glue", "rte")


def test_damaged_arrow_files(datasets, tmp_path):
    path = tmp_path / "x-train.arrow"
    (source,) = (datasets / "huggingface").glob("**/super_glue-validation.arrow")
    whole = source.read_bytes()
    for content in (b"", b"no Arrow at all", whole[: len(whole) // 2], whole[:5000] + b"\xff" * 99):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_all(arrow.ArrowTable([path]))
        assert one_line(error).startswith(f"{path}: not an intact Arrow stream: ")
    state = tmp_path / "state.json"
    for content, message in (({}, "'_data_files'"), ([], "expected a JSON object")):
        state.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            arrow.saved_splits(tmp_path)
    state.write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i"}]}))
    with pytest.raises(InputError, match="flatten_indices"):
        arrow.saved_splits(tmp_path)


# --- tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """hellaswag, winogrande and qasc with two examples each, the second without a label."""
    seqio_import.import_seqio()
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("prepared")
    f = tfds.features
    hellaswag = {
        "context": f.Text(),
        "endings": f.Sequence(f.Text()),
        "activity_label": f.Text(),
        "label": np.int32,
    }
    rows = [
        {"context": "é rains", "endings": ["a", "b"], "activity_label": "x", "label": 1},
        {"context": "It", "endings": [], "activity_label": "", "label": -1},
    ]
    p3_forms.prepare(
        root / "tfds",
        "hellaswag",
        None,
        f.FeaturesDict(hellaswag),
        {"validation": rows, "validation_ind_wikihow": rows[:1]},
    )
    winogrande = {"sentence": f.Text(), "label": f.ClassLabel(names=["1", "2"])}
    rows = [{"sentence": "_ is", "label": 1}, {"sentence": "_ was", "label": -1}]
    p3_forms.prepare(
        root / "tfds",
        "winogrande",
        None,
        f.FeaturesDict(winogrande),
        {"train_xl": rows, "train_xs": rows[:1]},
    )
    qasc = {
        "choices": f.Sequence({"text": f.Text(), "label": f.Text()}),
        "pairs": f.Sequence(f.Sequence(f.Text())),
        "in": {"b": np.bool_, "f": np.float32},
    }
    rows = [
        {"choices": {"text": [], "label": []}, "pairs": [], "in": {"b": True, "f": 0.5}},
        {
            "choices": {"text": ["x", "é"], "label": ["A", "B"]},
            "pairs": [["a", "b"], ["c"]],
            "in": {"b": False, "f": 1.0},
        },
    ]
    p3_forms.prepare(root / "tfds", "qasc", None, f.FeaturesDict(qasc), {"train": rows})
    for dataset, template in (
        ("hellaswag", ("Predict ending with hint", "{{ctx}}: {{endings | join(', ')}}?")),
        ("hellaswag", ("complete_first_then", "{{ctx_a}} {{ctx}}: {{endings[0]}}?")),
    ):
        home = root / "templates" / dataset
        home.mkdir(parents=True, exist_ok=True)
        path = home / "templates.yaml"
        before = path.read_text() if path.exists() else "templates:\n"
        path.write_text(
            f"{before}  {template[0]}: !Template\n    name: {template[0]}\n"
            f"    answer_choices: '{{{{endings | join(\"|||\")}}}}'\n"
            f"    jinja: '{template[1].replace(chr(39), chr(39) * 2)} |||"
            " {{answer_choices[label | int]}}'\n"
        )
    return root


def table(prepared: pathlib.Path, dataset: str, subset: str, split: str):
    builder = tfds_lib.builders()[dataset, subset]
    splits = tfds_lib.prepared_splits(prepared / "tfds", builder)
    return tfds_lib.TfdsTable(splits[split], builder)


def test_fields_and_splits_have_hugging_face_names(prepared):
    first, second = read_all(table(prepared, "hellaswag", "", "validation"))
    assert first["ctx"] == "é rains" and first["endings"] == ["a", "b"] and first["label"] == "1"
    assert second["endings"] == [] and second["label"] == ""
    rows = read_all(table(prepared, "winogrande", "winogrande_xl", "train"))
    assert [row["answer"] for row in rows] == ["2", ""]
    builder = tfds_lib.builders()["hellaswag", ""]
    assert list(tfds_lib.prepared_splits(prepared / "tfds", builder)) == ["validation"]


def test_nested_features_are_lists_and_text(prepared):
    assert read_all(table(prepared, "qasc", "", "train")) == [
        {"choices": {"text": [], "label": []}, "pairs": [], "in": {"b": True, "f": 0.5}},
        {
            "choices": {"text": ["x", "é"], "label": ["A", "B"]},
            "pairs": [["a", "b"], ["c"]],
            "in": {"b": False, "f": 1.0},
        },
    ]


def register(folder: pathlib.Path):
    return tasks.register(p3_dir=str(folder), vocab_path=str(VOCAB))


def test_template_with_a_field_that_the_builder_lacks_is_left_out(prepared, seqio):
    task_roles = register(prepared)
    assert any("1 of 544 tasks" in line for line in task_roles.summary)
    left_out = [line for line in task_roles.summary if line.startswith("left out: ")]
    assert left_out == [
        "left out: hellaswag_complete_first_then: its template reads 'ctx_a' (nearest: 'ctx'),"
        f" which the examples in {prepared / 'tfds'} do not have"
    ]
    groups = choices.load_choice_groups("t0_eval_score_eval", LENGTHS)
    # the second example has the label ''
    assert [group.choice_texts for group in groups] == [("a", "b")]
    assert groups[0].input_text == "é rains: a, b?" and groups[0].is_correct == (False, True)
    with pytest.raises(InputError, match="its template reads 'ctx_a'"):
        choices.load_choice_groups("hellaswag_complete_first_then_score_eval", LENGTHS)


def test_missing_dataset_names_the_command_that_prepares_it(prepared, tmp_path, seqio, capsys):
    p3_forms.write_yaml(tmp_path)
    with pytest.raises(InputError) as error:
        register(tmp_path)
    assert ": it has a template but no dataset: expected" in one_line(error)
    shutil.copytree(prepared / "templates" / "hellaswag", tmp_path / "templates" / "hellaswag")
    (tmp_path / "tfds").symlink_to(prepared / "tfds")
    register(tmp_path)
    with pytest.raises(InputError) as error:
        choices.load_choice_groups(f"{RTE}_score_eval", LENGTHS)
    command = f"`tfds build super_glue/rte --data_dir={tmp_path / 'tfds'}`"
    assert one_line(error).endswith(command)
    assert tfds_lib.builders()["anli", ""].command == "tfds build anli/r1 anli/r2 anli/r3"
    assert "tfds" not in raw_examples.expected_files(tmp_path, "quail", "")
    flags = [f"--p3_dir={tmp_path}", f"--output={tmp_path / 'out'}", f"--vocab_path={VOCAB}"]
    assert cache_tasks.main([*flags, "--tasks=hellaswag_*"]) == 0
    assert "left out: hellaswag_complete_first_then: its template" in capsys.readouterr().out
    assert cache_tasks.main([*flags, f"--tasks={RTE}"]) == 1
    assert capsys.readouterr().err.strip().endswith(command)


def test_damaged_and_missing_tfrecords(prepared, tmp_path):
    folder = tmp_path / "tfds" / "qasc" / "1.0.2"
    shutil.copytree(prepared / "tfds" / "qasc" / "1.0.2", folder)
    (path,) = folder.glob("*.tfrecord-*")
    info = json.loads((folder / "dataset_info.json").read_text())

    def message() -> str:
        with pytest.raises(InputError) as error:
            read_all(table(tmp_path, "qasc", "", "train"))
        return one_line(error)

    whole = path.read_bytes()
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    assert message() == f"{path}: damaged at byte 0: the checksum of row 1 is wrong"
    path.write_bytes(whole)
    garbage = b"\x93" * 40
    checksum = tfrecords.masked_checksum(garbage).to_bytes(4, "little")
    path.write_bytes((40).to_bytes(8, "little") + bytes(4) + garbage + checksum)
    assert message().startswith(f"{path}: not an example of the features in features.json: ")
    path.unlink()
    assert message() == f"{path}: no such file, but dataset_info.json lists 1 shard of the split"
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    assert "expected the format tfrecord, got array_record" in message()


def test_newest_version_is_read(prepared, tmp_path):
    for version in ("1.0.2", "1.0.10", "1.1.0.incompleteABC"):
        shutil.copytree(prepared / "tfds" / "qasc" / "1.0.2", tmp_path / "qasc" / version)
    splits = tfds_lib.prepared_splits(tmp_path, tfds_lib.builders()["qasc", ""])
    assert splits["train"][0].parent.name == "1.0.10"


LABELS = {  # in Hugging Face's order, by tensorflow-datasets' names
    "ag_news_subset": ["World", "Sports", "Business", "Sci/Tech"],
    "anli/r1": ["e", "n", "c"],
    "glue/mrpc": ["not_equivalent", "equivalent"],
    "glue/qqp": ["not_duplicate", "duplicate"],
    "imdb_reviews/plain_text": ["neg", "pos"],
    "paws_wiki/labeled_final_tokenized": ["different_meaning", "paraphrase"],
    "super_glue/boolq": ["False", "True"],
    "super_glue/cb": ["entailment", "contradiction", "neutral"],
    "super_glue/copa": ["choice1", "choice2"],
    "super_glue/multirc": ["False", "True"],
    "super_glue/rte": ["entailment", "not_entailment"],
    "super_glue/wic": ["False", "True"],
    "super_glue/wsc.fixed": ["False", "True"],
    "winogrande": ["1", "2"],
}


def test_builders_have_the_fields_of_the_table(tmp_path, monkeypatch):
    """Read from the installed package's source code; nothing is downloaded."""
    seqio_import.import_seqio()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import gcs_utils

    monkeypatch.setattr(gcs_utils, "_is_gcs_disabled", True)
    published = {(task.dataset, task.subset) for task in published_lib.tasks().values()}
    builders = tfds_lib.builders()
    assert set(builders) <= published and len(builders) == 25
    checked = set()
    for key, builder in builders.items():
        name = builder.name + ("/r1" if key[0] == "anli" else "")
        features = tfds.builder(name, data_dir=tmp_path).info.features
        for field in builder.fields:
            assert set(field.sources) <= set(features), key
        if name in LABELS:
            assert features["label"].names == LABELS[name]
            checked.add(name)
    assert checked == set(LABELS)


# --- cache_tasks


def test_caches_equal_those_from_json_lines(tmp_path, seqio):
    p3_forms.write_templates(tmp_path / "templates")
    p3_forms.write_datasets(tmp_path / "datasets")
    p3_forms.write_tfds(tmp_path / "tfds")
    caches = {}
    for form in ("templates", "datasets", "tfds"):
        out = tmp_path / "out" / form
        flags = [f"--p3_dir={tmp_path / form}", f"--output={out}", f"--vocab_path={VOCAB}"]
        assert cache_tasks.main(flags) == 0
        files = sorted(path for path in out.rglob("*") if path.is_file())
        caches[form] = {str(path.relative_to(out)): path.read_bytes() for path in files}
    assert len(caches["templates"]) > 30
    assert caches["templates"] == caches["datasets"] == caches["tfds"]
