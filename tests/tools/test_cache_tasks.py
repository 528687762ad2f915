"""`pemoe cache_tasks`: P3_DIR and seqio read the caches."""

import json
import pathlib

import p3_forms
import pytest
from p3_runs import VOCAB

from pemoe_jax import tasks
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.tools import cache_tasks

LENGTHS = {"inputs": 128, "targets": 32}
RTE = "super_glue_rte_can_we_infer"


@pytest.fixture(scope="module")
def forms(tmp_path_factory, encode):
    root = tmp_path_factory.mktemp("p3")
    p3_forms.write_parquet(root / "parquet", encode)
    p3_forms.write_templates(root / "templates")
    return root


def run(source, output, *flags) -> int:
    return cache_tasks.main(
        [f"--p3_dir={source}", f"--output={output}", f"--vocab_path={VOCAB}", *flags]
    )


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cached_ids(name: str, split: str, use_cached: bool) -> list:
    ds = seqio_tasks.get_mixture_or_task(name).get_dataset(
        LENGTHS, split=split, shuffle=False, use_cached=use_cached
    )
    return [(row["inputs"].tolist(), row["targets"].tolist()) for row in ds.as_numpy_iterator()]


def test_caches_from_parquet_and_templates_are_equal_and_readable(forms, tmp_path, encode, capsys):
    seqio = seqio_import.import_seqio()
    for form in ("parquet", "templates"):
        assert run(forms / form, tmp_path / form, "--tasks=super_glue_*,anli_*") == 0
    assert "9/9" not in capsys.readouterr().err
    written = files(tmp_path / "templates")
    assert set(written) == {
        f"{name}/{file}"
        for name, split in p3_forms.all_rows()
        if "ag_news" not in name
        for file in (
            f"{split}.tfrecord-00000-of-00001",
            f"info.{split}.json",
            f"stats.{split}.json",
            "COMPLETED",
        )
    }
    for name, content in files(tmp_path / "parquet").items():
        if not name.endswith("json"):
            continue
        assert json.loads(content) == json.loads(written[name])
    stats = json.loads(written[f"{RTE}/stats.train.json"])
    rows = [p3_forms.with_ids(row, encode, True) for row in p3_forms.plain_rows(RTE, "train")]
    assert stats == {
        "examples": 150,
        "inputs_tokens": sum(len(row["inputs"]) for row in rows),
        "inputs_max_tokens": max(len(row["inputs"]) for row in rows),
        "targets_tokens": sum(len(row["targets"]) for row in rows),
        "targets_max_tokens": max(len(row["targets"]) for row in rows),
    }
    for form in ("parquet", "templates"):
        seqio.set_global_cache_dirs([])
        tasks.register(p3_dir=str(tmp_path / form), vocab_path=str(VOCAB))
        for name in (RTE, f"{RTE}_score_eval"):
            expected = [
                (row["inputs"], row["targets"])
                for row in (
                    p3_forms.with_ids(row, encode, True)
                    for row in p3_forms.all_rows()[name, "validation"]
                )
            ]
            assert cached_ids(name, "validation", True) == expected
            assert cached_ids(name, "validation", False) == expected
    seqio.set_global_cache_dirs([])


def test_second_run_continues(forms, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    assert run(forms / "parquet", whole, f"--tasks={RTE}*") == 0
    part = tmp_path / "part"
    calls = []
    real = cache_tasks._write_shards

    def stop_at_the_third(reader, folder, shard_rows):
        calls.append(folder)
        if len(calls) == 3:
            (folder / "00000").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(reader, folder, shard_rows)

    monkeypatch.setattr(cache_tasks, "_write_shards", stop_at_the_third)
    assert run(forms / "parquet", part, f"--tasks={RTE}*") == 130
    assert (part / RTE / "COMPLETED").exists()
    assert not (part / f"{RTE}_score_eval" / "COMPLETED").exists()
    assert not list((part / f"{RTE}_score_eval").glob("*.tfrecord-*"))
    assert run(forms / "parquet", part, f"--tasks={RTE}*") == 0
    assert "1 of them complete already" in capsys.readouterr().out
    assert len(calls) == 3 + 2  # the two splits of the _score_eval task
    assert files(part) == files(whole)


def test_workers_and_shards(forms, tmp_path, monkeypatch):
    monkeypatch.setenv("PEMOE_P3_DIR", str(forms / "templates"))
    flags = [f"--output={tmp_path}", f"--vocab_path={VOCAB}"]
    assert cache_tasks.main([*flags, f"--tasks={RTE}", "--workers=2", "--shard_rows=60"]) == 0
    names = sorted(path.name for path in (tmp_path / RTE).glob("train.tfrecord*"))
    assert names == [f"train.tfrecord-{shard:05d}-of-00003" for shard in range(3)]
    tasks.register(p3_dir=str(tmp_path), vocab_path=str(VOCAB))
    assert len(cached_ids(RTE, "train", False)) == 150
    again = files(tmp_path)
    assert cache_tasks.main([*flags, f"--tasks={RTE}"]) == 0
    assert files(tmp_path) == again


def test_unpublished_score_eval_task(forms, tmp_path):
    assert run(forms / "parquet", tmp_path, "--tasks=t0_train_score_eval") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ag_news_recommend_score_eval"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=nothing_*"], "'nothing_*' matched none of"),
        (["--tasks=super_glue_wic_*"], "has none of the 20 tasks"),
        (["--workers=0"], "--workers must be a positive integer, got 0"),
        (["--p3_dir=/nowhere"], "P3_DIR /nowhere must be a folder, got no such folder"),
        (["--vocab_path=/nowhere", f"--tasks={RTE}"], "got no file at /nowhere"),
        (["--gin.X=1"], "--gin.X: this command takes no gin settings"),
    ],
)
def test_errors_are_one_line(forms, tmp_path, capsys, flags, message):
    assert run(forms / "parquet", tmp_path / "out", *flags) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_output_differs_from_the_source(forms, capsys):
    for output in (forms / "parquet", forms / "templates" / ".." / "parquet"):
        assert run(forms / "parquet", output, f"--tasks={RTE}") == 1
        assert "error: --output must differ from --p3_dir, got " in capsys.readouterr().err


def test_missing_column_leaves_the_task_incomplete(forms, tmp_path, capsys):
    import shutil

    import pyarrow
    from pyarrow import parquet

    source = tmp_path / "source"
    shutil.copytree(forms / "parquet" / "ag_news_recommend", source / "ag_news_recommend")
    path = source / "ag_news_recommend" / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table({"inputs": [[1]]}), path)
    assert run(source, tmp_path / "out", "--workers=1") == 1
    assert f"{path}: expected a column 'targets'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "ag_news_recommend" / "COMPLETED").exists()


TREC = """\
templates:
  k: !Template
    answer_choices: thing ||| person ||| place
    jinja: "What is asked for? {{text}} ||| {{answer_choices[label_coarse]}}"
    metadata: [Accuracy]
    name: fine_grained_open
"""


@pytest.mark.parametrize(
    ("field", "labels", "message"),
    [
        ("coarse_label", [1, 2], "its template reads 'label_coarse' (nearest: 'coarse_label')"),
        ("label-coarse", ["1", "2"], "2 of 2 examples of {} left out, because the template fails"),
        ("label-coarse", [1.0, 2.0], "(number 1: the index of a list must be an integer, got 1.0)"),
        ("label-coarse", [-1, -1], "left out, because they have no label (number 1: label_coarse"),
        ("label-coarse", [2, -1], None),
    ],
)
def test_labels_of_other_names_and_types(tmp_path, capsys, field, labels, message):
    path = tmp_path / "raw" / "trec" / "train.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"text": f"Who is {label}?", field: label} for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "trec").mkdir()
    (tmp_path / "trec" / "templates.yaml").write_text(TREC)
    out = tmp_path / "out"
    code = run(tmp_path, out, "--tasks=trec_fine_grained_open")
    error = capsys.readouterr().err
    if message is not None:
        assert code == 1 and message.format(path) in error.splitlines()[-1]
        assert not out.exists() or not list(out.iterdir())
    else:
        assert code == 0 and "1 of 2 examples" in error
        stats = json.loads((out / "trec_fine_grained_open" / "stats.train.json").read_text())
        assert stats["examples"] == 1


def test_odd_rows_are_printed(tmp_path, capsys):
    path = tmp_path / "p3" / RTE / "train.jsonl"
    path.parent.mkdir(parents=True)
    rows = [("a", "No", ["No"]), ("", "x", ["No", "No"]), ("a", "x", ["No"]), ("a", "No", None)]
    keys = ("inputs", "targets", "answer_choices")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows]
    path.write_text("".join(lines))
    assert run(tmp_path / "p3", tmp_path / "cache", f"--tasks={RTE}") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "odd rows" in line] == [
        f"{path}: odd rows: targets not among their choices: 2 (row 2)",
        f"{path}: odd rows: duplicate choices: 1 (row 2)",
        f"{path}: odd rows: rows without choices in a task with choices (not scored): 1 (row 4)",
        f"{path}: odd rows: empty inputs: 1 (row 2)",
    ]
