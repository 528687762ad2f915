"""Damage that shows in the middle of a run: an error of one line; checkpoints stay."""

import pathlib
import shutil

import data_tasks
import numpy as np
import p3_forms
import pytest
from data_tasks import LENGTHS
from p3_runs import VOCAB, train_flags

from pemoe_jax import tasks, train
from pemoe_jax.analysis import generation
from pemoe_jax.checkpoints import runs
from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, feed, row_reader, seqio_import, seqio_tasks, tfrecords
from pemoe_jax.data.order import ExampleOrder
from pemoe_jax.runtime import options
from pemoe_jax.tasks import TaskRoles
from pemoe_jax.tasks.p3 import folder, tables

TASK = "ag_news_recommend"
ROWS = 3000


@pytest.fixture(scope="module")
def cache(tmp_path_factory, encode) -> pathlib.Path:
    """A training task of 3,000 rows."""
    folder = tmp_path_factory.mktemp("p3")
    row = {"targets_pretokenized": "Politician", "answer_choices": ["Politician", "Athlete"]}
    rows = [
        p3_forms.with_ids(row | {"inputs_pretokenized": f"Who reads {n}?"}, encode, True)
        for n in range(ROWS)
    ]
    p3_forms.write_cache_split(folder / TASK, "train", rows)
    p3_forms.write_cache_split(folder / TASK, "test", rows[:50])
    (folder / TASK / "COMPLETED").touch()
    return folder


@pytest.fixture
def copy(cache, tmp_path) -> pathlib.Path:
    shutil.copytree(cache, tmp_path / "p3")
    return tmp_path / "p3"


@pytest.fixture(autouse=True)
def no_caches():
    seqio_import.import_seqio().set_global_cache_dirs([])


def frames(path: pathlib.Path) -> list[int]:
    """Returns the offset of each record."""
    content, starts = path.read_bytes(), [0]
    while starts[-1] < len(content):
        length = int.from_bytes(content[starts[-1] : starts[-1] + 8], "little")
        starts.append(starts[-1] + length + 16)
    return starts[:-1]


def flip(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("data_of_p3", ["folder", "cache"])
def test_training_stops_with_one_line_and_resumes_after_repair(copy, capsys, data_of_p3):
    """A flipped bit in the record of the 1,001st example: step 16, the fourth block."""
    path = copy / TASK / "train.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    number = int(ExampleOrder([ROWS], [1.0], 0, True, None).row_numbers(0, 1001)[1000])
    flip(path, frames(path)[number] + 30)
    flags = train_flags(copy / "run", TASK)
    if data_of_p3 == "folder":
        flags.append(f"--gin.P3_DIR={copy}")
    else:
        flags += ["--gin.USE_CACHED_TASKS=True", f"--seqio_additional_cache_dirs={copy}"]
    assert train.main(flags) == 1
    error = capsys.readouterr().err
    assert error == (
        f"error: {path}: damaged at byte {frames(path)[number]:,}:"
        f" the checksum of row {number + 1:,} is wrong\n"
    )
    last = runs.saved_steps(copy / "run")
    assert last == [10]
    arrays, _, step = runs.open_trained(str(copy / "run"))
    assert step == 10 and all(np.isfinite(array.read()).all() for array in arrays.values())
    path.write_bytes(whole)
    assert train.main(flags) == 0
    assert "resuming from" in capsys.readouterr().out
    assert runs.read_data_position(str(copy / "run")) == [30 * 64]


@pytest.fixture
def user_task(copy):
    """A plain seqio task over the same file."""
    import seqio
    import tensorflow as tf

    path = copy / TASK / "train.tfrecord-00000-of-00001"
    tasks.register(p3_dir=str(copy), vocab_path=str(VOCAB))
    features = seqio_tasks.get_mixture_or_task(TASK).output_features
    kinds = {key: tf.io.FixedLenSequenceFeature([], tf.int64, True) for key in features}
    seqio.TaskRegistry.add(
        "user_task",
        source=seqio.TFExampleDataSource({"train": str(path)}, kinds),
        preprocessors=[
            lambda ds: ds.map(lambda row: {k: tf.cast(v, tf.int32) for k, v in row.items()})
        ],
        output_features=features,
    )
    yield path
    seqio.TaskRegistry.remove("user_task")


def read_all(name: str) -> tuple[int, str]:
    """Returns the number of batches of 64 before the error, and the error."""
    batches = feed.train_batches(name, LENGTHS, 64, pack=False, shuffle=False, num_epochs=1)
    count = 0
    with pytest.raises(InputError) as error:
        for _ in batches:
            count += 1
    return count, one_line(error)


def test_damaged_tfrecord_of_a_user_task(user_task):
    starts = frames(user_task)
    whole = user_task.read_bytes()
    flip(user_task, starts[2000] + 30)
    count, message = read_all("user_task")
    assert 20 < count < 32 and message.startswith(
        f"{user_task}: damaged at byte {starts[2000]:,}: "
    )
    user_task.write_bytes(whole[: starts[2000] + 30])
    count, message = read_all("user_task")
    assert 20 < count < 32 and message.startswith(
        f"{user_task}: damaged at byte {starts[2000]:,}: "
    )


def test_record_that_is_not_an_example(user_task):
    record = b"\x93" * 40
    frame = (40).to_bytes(8, "little")
    frame += tfrecords.masked_checksum(frame).to_bytes(4, "little") + record
    frame += tfrecords.masked_checksum(record).to_bytes(4, "little")
    user_task.write_bytes(user_task.read_bytes()[: frames(user_task)[2000]] + frame)
    count, message = read_all("user_task")
    assert count > 20
    assert message.startswith("reading 'user_task': Could not parse example input, value: ")


def test_bug_in_user_code_keeps_its_traceback(registered_jsonl):
    import tensorflow as tf

    def bug(number):
        raise KeyError("of the user's")

    ds = tf.data.Dataset.range(3).map(lambda n: tf.numpy_function(bug, [n], tf.int64))
    with pytest.raises(tf.errors.UnknownError, match="of the user's"):
        list(seqio_tasks.numpy_iterator(ds, "a"))


@pytest.fixture
def registered_jsonl(tmp_path):
    data_tasks.register(tmp_path)
    return tmp_path


def test_line_that_changes_while_it_is_read(registered_jsonl):
    path = registered_jsonl / "a" / "train.jsonl"
    batches = feed.train_batches("a", LENGTHS, 4, shuffle=False)
    lines = path.read_text().splitlines(keepends=True)
    lines[30] = "x" * (len(lines[30]) - 1) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(InputError) as error:
        list(batches)
    at = sum(len(line.encode()) for line in lines[:30])
    assert one_line(error).startswith(f"{path}, byte {at}: not JSON")


def test_damaged_page_of_parquet(tmp_path, encode):
    import pyarrow
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    rows = [
        p3_forms.with_ids(
            {"inputs_pretokenized": str(rng.integers(1 << 60)), "targets_pretokenized": "x"},
            encode,
            True,
        )
        for _ in range(600)
    ]
    path = tmp_path / TASK / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    group = parquet.ParquetFile(path).metadata.row_group(4)
    begin = group.column(0).data_page_offset
    content[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(content)
    tasks.register(p3_dir=str(tmp_path), vocab_path=str(VOCAB))
    count, message = read_all(TASK)
    assert count == 3 and message.startswith(f"{path}: damaged: ")


def test_damage_in_evaluation_and_decoding(copy):
    path = copy / TASK / "test.tfrecord-00000-of-00001"
    flip(path, frames(path)[40] + 30)
    for use_cached in (False, True):
        tasks.register(p3_dir=str(copy), vocab_path=str(VOCAB))
        with pytest.raises(InputError) as error:
            list(feed.eval_batches(TASK, LENGTHS, 4, use_cached=use_cached))
        assert one_line(error).startswith(f"{path}: damaged at byte")
        with pytest.raises(InputError) as error:
            generation.read_tasks(
                options.Data(TASK, use_cached_tasks=use_cached), LENGTHS, TaskRoles()
            )
        assert one_line(error).startswith(f"{path}: damaged at byte")
    with pytest.raises(InputError) as error:
        choices.load_choice_groups("t0_train_score_eval", LENGTHS)
    assert one_line(error).startswith(f"{path}: damaged")


@pytest.mark.parametrize("wrong", [-1, 5000, 2**32 + 5])
def test_token_ids_outside_of_the_vocabulary(tmp_path, encode, wrong):
    """In tfrecords: the file and the row are named wherever they are read from."""
    row = {"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": ["b", "c"]}
    rows = [p3_forms.with_ids(row, encode, True) for _ in range(3)]
    rows[1]["inputs"] = [5, wrong, 1]
    for split in ("train", "test"):
        p3_forms.write_cache_split(tmp_path / TASK, split, rows)
    (tmp_path / TASK / "COMPLETED").touch()
    tasks.register(p3_dir=str(tmp_path), vocab_path=str(VOCAB))
    size = seqio_tasks.vocab_size(TASK)

    def check(split, read):
        with pytest.raises(InputError) as error:
            read()
        assert one_line(error) == (
            f"{tmp_path / TASK}/{split}.tfrecord: row 2: 'inputs' must have token ids from 0 to"
            f" {size - 1}, as the vocabulary has {size}, got {wrong}"
        )

    settings = {"pack": False, "num_epochs": 1}
    for name in (TASK, "t0_train"):
        for cached in (False, True):
            check(
                "train",
                lambda name=name, cached=cached: list(
                    feed.train_batches(name, LENGTHS, 1, use_cached=cached, **settings)
                ),
            )
    check("test", lambda: list(feed.eval_batches("t0_train", LENGTHS, 1)))
    check("test", lambda: generation.read_tasks(options.Data(TASK), LENGTHS, TaskRoles()))
    check("test", lambda: choices.load_choice_groups(f"{TASK}_score_eval", LENGTHS))


def test_features_of_another_kind_are_damaged():
    """Ids as bytes would read as no ids."""
    import tensorflow as tf

    train = tf.train
    ids, text = train.Int64List(value=[5, 1]), train.BytesList(value=[b"x"])
    good = {"inputs": train.Feature(int64_list=ids), "targets": train.Feature(int64_list=ids)}
    for changed, message in (
        ({"targets": train.Feature(bytes_list=text)}, "'targets' must be int64_list, got bytes"),
        ({"is_correct": train.Feature(bytes_list=text)}, "'is_correct' must be int64_list"),
        ({"is_correct": train.Feature(int64_list=ids)}, r"must be \[0\] or \[1\], got \[5, 1\]"),
        ({"is_correct": train.Feature(int64_list=train.Int64List())}, r"\[1\], got \[\]"),
        ({"answer_choices": train.Feature(int64_list=ids)}, "'answer_choices' must be bytes_list"),
    ):
        example = train.Example(features=train.Features(feature=good | changed))
        with pytest.raises(ValueError, match=message):
            row_reader.parse(example.SerializeToString())
    with pytest.raises(ValueError, match="no feature 'targets'"):
        example = train.Example(features=train.Features(feature={"inputs": good["inputs"]}))
        row_reader.parse(example.SerializeToString())


def test_parquet_that_is_too_large_in_memory(tmp_path, monkeypatch):
    """A text that is repeated takes the space of one in the file, also in lists and structs."""
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(tables, "_MAX_GROUP_BYTES", 300_000)
    monkeypatch.setattr(tables, "_MAX_EXPANSION", 10)
    text = "x" * 1000
    columns = (
        ([text] * 2000, True),
        ([[text, "y"], []] * 1000, True),
        ([{"a": text}] * 2000, True),
        ([7] * 50_000, True),
        ([text] * 200, False),
        ([[text], ["z"], None] * 20, False),
        ([*range(2000)], False),
    )
    for number, (column, is_large) in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"inputs": column}), path)
        table = tables.ParquetTable([path])
        if not is_large:
            assert table.take([1]) == [{"inputs": column[1]}]
            continue
        with pytest.raises(
            InputError, match=r"row group 1 must take at most 0.0 GB in memory, got"
        ):
            table.take([1])


def test_tfrecords_without_info_are_an_error(copy):
    """Without it the split would be left out silently."""
    (info,) = copy.glob("*/info.test.json")
    info.unlink()
    with pytest.raises(InputError, match=r"tfrecord-.*: expected info.test.json beside it"):
        folder.cached_splits(info.parent)
