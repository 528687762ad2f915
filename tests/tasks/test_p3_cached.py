"""--seqio_additional_cache_dirs and USE_CACHED_TASKS: caches of P3 and of other tasks."""

import json
import pathlib

import data_tasks
import numpy as np
import p3_forms
import pytest
from data_tasks import LENGTHS
from p3_runs import VOCAB, train_flags

from pemoe_jax import evaluate, train
from pemoe_jax.checkpoints import runs
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, seqio_import
from pemoe_jax.runtime import seqio_cache_dirs
from pemoe_jax.tools import cache_tasks

RTE = "super_glue_rte_can_we_infer"


@pytest.fixture(scope="module")
def cache(tmp_path_factory, encode) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cache")
    p3_forms.write_cache(folder, encode)
    return folder


@pytest.fixture(autouse=True)
def no_caches(monkeypatch):
    monkeypatch.setattr(seqio_cache_dirs, "additional_cache_dirs", [])
    monkeypatch.delenv("PEMOE_P3_DIR", raising=False)
    seqio_import.import_seqio().set_global_cache_dirs([])


def trained(model_dir: pathlib.Path) -> dict[str, np.ndarray]:
    arrays, _, step = runs.open_trained(str(model_dir))
    assert step == 6
    return {path: array.read() for path, array in arrays.items()} | {
        "consumed": np.array(runs.read_data_position(str(model_dir)))
    }


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key])


def test_train_and_evaluate_from_a_cache(cache, tmp_path, capsys):
    """Without P3_DIR; a resumed run equals an uninterrupted one with P3_DIR."""
    few = {"TRAIN_STEPS": 6, "BATCH_SIZE": 8, "PACK": True, "EVAL_PERIOD": 6}
    cached = ["--gin.USE_CACHED_TASKS=True", f"--seqio_additional_cache_dirs={cache}"]
    for name, steps, flags in (
        ("parts", 3, cached),
        ("parts", 6, cached),
        ("whole", 6, [f"--gin.P3_DIR={cache}"]),
    ):
        few["TRAIN_STEPS"] = steps
        assert train.main([*train_flags(tmp_path / name, "super_glue_rte", **few), *flags]) == 0
    output = capsys.readouterr().out
    assert f"P3, cached in {cache}: 5 of 544 tasks and 4 of 116 _score_eval tasks" in output
    assert "validation loss" in output
    assert_same(trained(tmp_path / "whole"), trained(tmp_path / "parts"))
    predictions = []
    for name, flags in (("cached", cached), ("folder", [f"--gin.P3_DIR={cache}"])):
        scoring = [
            "--gin_file=runs/evaluate.gin",
            f"--gin.CHECKPOINT_PATH={tmp_path / 'whole'}",
            f"--gin.EVAL_OUTPUT_DIR={tmp_path / name / 'scored'}",
            "--gin.MIXTURE_OR_TASK_NAME=super_glue_rte_score_eval",
            f"--gin.VOCAB_PATH={VOCAB}",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}",
            "--gin.BATCH_SIZE=8",
            *flags,
        ]
        assert evaluate.main(scoring) == 0
        files = (tmp_path / name / "scored" / "predictions" / "whole").iterdir()
        predictions.append({file.stem: file.read_text() for file in files})
        assert sum(bool(text.strip()) for text in predictions[-1].values()) == 2
        results = json.loads((tmp_path / name / "scored" / "results.json").read_text())
        assert list(results["runs"][0]["datasets"]) == ["rte"]
    assert predictions[0] == predictions[1]


def examples(name: str, count: int, **settings) -> list[list[int]]:
    batches = feed.train_batches(name, LENGTHS, 1, pack=False, use_cached=True, **settings)
    return [next(batches)["encoder_input_tokens"][0].tolist() for _ in range(count)]


def write_as_seqio_does(folder: pathlib.Path, split: str, rows: list[dict]) -> None:
    """Writes rows as seqio does, whose own writer needs Apache Beam."""
    import seqio
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as writer:
        for row in rows:
            row = {k: int(v) if isinstance(v, np.bool_) else v for k, v in row.items()}
            writer.write(seqio.dict_to_tfexample(row).SerializeToString())
    features = {
        key: {
            "shape": [None] * np.ndim(value),
            "dtype": "string" if np.asarray(value).dtype.kind in "OS" else "int32",
        }
        for key, value in rows[0].items()
    }
    (folder / f"info.{split}.json").write_text(json.dumps({"num_shards": 1, "features": features}))
    (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(rows)}))
    (folder / "COMPLETED").touch()


def test_stream_from_a_cache_of_json_lines_starts_anywhere(tmp_path):
    import seqio

    data_tasks.register(tmp_path)
    for name, split in (("a", "train"), ("b", "train"), ("scored_score_eval", "validation")):
        task = seqio.TaskRegistry.get(name)
        ds = task.source.get_dataset(split, shuffle=False)
        rows = list(task.preprocess_precache(ds).as_numpy_iterator())
        write_as_seqio_does(tmp_path / "cache" / name, split, rows)
    seqio_cache_dirs.add_cache_dirs([str(tmp_path / "cache")])
    for name, split in (("jsonl_train", "train"), ("scored_score_eval", "validation")):
        whole = examples(name, 120, split=split, seed=2)
        assert examples(name, 20, split=split, seed=2, start={"examples": 100}) == whole[100:]
        assert examples(name, 30, split=split, seed=2, shard=(1, 2)) == whole[1:60:2]
    fresh = feed.train_batches("a", LENGTHS, 1, pack=False, seed=2)
    assert examples("a", 40, seed=2) == [
        next(fresh)["encoder_input_tokens"][0].tolist() for _ in range(40)
    ]


def test_missing_caches(cache, tmp_path, capsys):
    flags = train_flags(tmp_path / "run", "super_glue_wic", TRAIN_STEPS=1)
    cached = "--gin.USE_CACHED_TASKS=True"

    def message(*more: str) -> str:
        assert train.main([*flags, *more]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "cache_dirs: /nowhere must be a folder, got no such folder" in message(
        cached, f"--seqio_additional_cache_dirs={cache},/nowhere"
    )
    assert "no cache of P3 in" in message(cached, f"--seqio_additional_cache_dirs={tmp_path}")
    seqio_import.import_seqio().set_global_cache_dirs([])
    seqio_cache_dirs.additional_cache_dirs.clear()
    error = message(cached, f"--seqio_additional_cache_dirs={cache}")
    assert "no cache of 10 of 10 tasks, such as 'super_glue_wic_" in error and str(cache) in error
    assert "P3_DIR is not set" in message(f"--seqio_additional_cache_dirs={cache}")
    with pytest.raises(InputError, match="USE_CACHED_TASKS: no cache of 10 of 10 tasks, "):
        choices.load_choice_groups("super_glue_wic_score_eval", LENGTHS, use_cached=True)
    assert not (tmp_path / "run").exists()


def test_cache_tasks_skips_tasks_cached_elsewhere(cache, tmp_path, encode, capsys):
    p3_forms.write_parquet(tmp_path / "parquet", encode)
    (cache / RTE).rename(tmp_path / "kept")
    try:
        flags = [f"--p3_dir={tmp_path / 'parquet'}", f"--output={tmp_path / 'out'}"]
        flags += [f"--vocab_path={VOCAB}", f"--seqio_additional_cache_dirs={cache}"]
        assert cache_tasks.main(flags) == 0
        written = {path.name for path in (tmp_path / "out").iterdir()}
        assert written == {RTE, "ag_news_recommend_score_eval"}  # the latter is not published
    finally:
        (tmp_path / "kept").rename(cache / RTE)
    capsys.readouterr()
    assert cache_tasks.main([*flags, "--tasks=super_glue_*"]) == 1
    assert "all tasks that match are tfrecord caches already" in capsys.readouterr().err
