"""Tables of sentence embeddings on disk."""

import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import sentence_table
from pemoe_jax.runtime import file_io, folder_lock
from pemoe_jax.runtime.file_io import AnyPath

ENCODER = {"name": "some", "dim": 3, "fingerprint": "f0"}


def make_ids(number: int) -> np.ndarray:
    return np.array([3 + number % 50, 3 + number // 50, 1], np.int32)


def open_writer(folder: AnyPath, **changes) -> sentence_table.TableWriter:
    settings = {"encoder": ENCODER, "dtype": "float32", "vocabulary": "v", "length": 8, **changes}
    return sentence_table.TableWriter(folder, *settings.values())


def make_vectors(numbers) -> np.ndarray:
    return np.array([[n, n / 7, -n] for n in numbers], np.float32)


def add(folder: AnyPath, numbers, finish: bool = True, **changes) -> None:
    writer = open_writer(folder, **changes)
    new = [n for n in numbers if sentence_table.input_key(make_ids(n)) not in writer.known_keys]
    for part in np.array_split(new, 3) if new else []:
        writer.add([sentence_table.input_key(make_ids(n)) for n in part], make_vectors(part))
    if finish:
        writer.finish()


def forget_checksums(folder: pathlib.Path) -> None:
    """Makes a table one of an earlier version."""
    file = folder / "about.json"
    about = json.loads(file.read_text())
    del about["checksums"]
    file.write_text(json.dumps(about))


def check_table(folder: AnyPath, numbers) -> None:
    """Asserts that a table has exactly these inputs, each with its own vector."""
    table = sentence_table.SentenceTable(folder)
    numbers = np.random.default_rng(0).permutation(list(numbers))
    assert len(table) == len(numbers)
    vectors = table.vectors(table.rows(map(make_ids, numbers)))
    np.testing.assert_array_equal(np.stack(vectors), make_vectors(numbers))
    assert table.rows([make_ids(2000), make_ids(numbers[0])[:-1]]).tolist() == [-1, -1]


def test_table_roundtrip_over_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sentence_table, "_PART_ROWS", 100)
    add(tmp_path / "table", range(700))
    assert len(list((tmp_path / "table" / "parts").glob("*.vectors.npy"))) > 2
    check_table(tmp_path / "table", range(700))
    about = json.loads((tmp_path / "table" / "about.json").read_text())
    assert (about["inputs"], about["encoder"], about["lengths"]) == (700, ENCODER, [8])


def test_input_key_is_blake2b_of_ids_without_padding():
    raw = bytes([5, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0])
    expected = hashlib.blake2b(raw, digest_size=16).digest()
    for ids in ([5, 7, 1], [5, 7, 1, 0, 0], np.array([5, 7, 1], np.int64)):
        assert sentence_table.input_key(ids) == expected
    others = [[7, 5, 1], [5, 7], [5, 7, 1, 1], []]
    assert len({expected, *map(sentence_table.input_key, others)}) == 5


def test_keys_with_trailing_zeros_or_high_first_bytes(tmp_path, monkeypatch):
    """numpy drops trailing zeros of byte strings, and could sort bytes from 128 on as negative."""
    keys = [bytes([n]) * 15 + b"\0" for n in (0, 1, 127, 128, 255)]
    keys += [b"\xff" * 14 + b"\0\0", b"\xff" * 15 + b"\1"]
    monkeypatch.setattr(sentence_table, "input_key", lambda ids: keys[int(ids[0])])
    numbers = range(len(keys))
    writer = open_writer(tmp_path)
    writer.add(keys, make_vectors(numbers))
    writer.finish()
    table = sentence_table.SentenceTable(tmp_path)
    vectors = table.vectors(table.rows([[n] for n in numbers]))
    np.testing.assert_array_equal(np.stack(vectors), make_vectors(numbers))
    reopened = open_writer(tmp_path)
    assert reopened.known_keys == set(keys)


def test_additions_do_not_rewrite_vectors(tmp_path):
    add(tmp_path, range(50))
    before = sentence_table.SentenceTable(tmp_path)
    old = (tmp_path / "parts" / "00000.vectors.npy").stat()
    add(tmp_path, range(30, 90), length=16)
    check_table(tmp_path, range(90))
    assert (tmp_path / "parts" / "00000.vectors.npy").stat().st_mtime_ns == old.st_mtime_ns
    # A table that is open keeps its old index.
    assert len(before) == 50 and before.rows([make_ids(49), make_ids(60)])[0] >= 0
    assert sentence_table.SentenceTable(tmp_path).lengths == [8, 16]
    assert len(list(tmp_path.glob("keys.*.npy"))) == 1
    add(tmp_path, range(90))  # no new inputs
    check_table(tmp_path, range(90))


def test_unfinished_table_cannot_be_read_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(sentence_table, "_PART_ROWS", 10)
    add(tmp_path, range(40), finish=False)
    with pytest.raises(InputError, match=r"is not finished: run pemoe embed again"):
        sentence_table.SentenceTable(tmp_path)
    writer = open_writer(tmp_path)
    assert len(writer.known_keys) == 40
    add(tmp_path, range(60))
    check_table(tmp_path, range(60))
    add(tmp_path, range(60, 90), finish=False)  # a complete table stays readable
    check_table(tmp_path, range(60))


def test_vectors_are_stored_in_float16_and_checked(tmp_path):
    add(tmp_path, range(5), dtype="float16")
    table = sentence_table.SentenceTable(tmp_path)
    vector = table.vectors(table.rows([make_ids(3)]))[0]
    assert vector.dtype == np.float16
    np.testing.assert_array_equal(vector, make_vectors([3])[0].astype(np.float16))
    writer = open_writer(tmp_path, dtype="float16")
    for vectors, message in (
        (np.full((1, 3), 1e6), "finite in float16"),
        (np.full((1, 3), np.nan), "finite"),
        (np.ones((1, 4)), r"shape \(1, 3\), got \(1, 4\)"),
    ):
        with pytest.raises(InputError, match=message):
            writer.add([b"x" * 16], vectors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {**ENCODER, "fingerprint": "f1"}}, "some, fingerprint f0, size 3: expected"),
        ({"encoder": {**ENCODER, "dim": 4}}, "size 4"),
        ({"dtype": "float16"}, "EMBEDDING_DTYPE 'float32'"),
        ({"dtype": "int8"}, "EMBEDDING_DTYPE must be one of"),
        ({"vocabulary": "w"}, "vocabulary 'v': expected the same to add to it, got 'w'"),
    ],
)
def test_addition_must_match_the_table(tmp_path, changes, message):
    add(tmp_path, range(5))
    with pytest.raises(InputError, match=message):
        add(tmp_path, range(6), **changes)
    check_table(tmp_path, range(5))


def test_damaged_tables_and_other_folders_raise(tmp_path):
    for path, message in (
        (tmp_path / "no", "no such folder"),
        (tmp_path, "without about.json"),
        (7, "got 7"),
    ):
        with pytest.raises(InputError, match=message):
            sentence_table.SentenceTable(path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "file").touch()
    with pytest.raises(InputError, match="expected a new folder or a table"):
        open_writer(tmp_path / "others")
    empty = open_writer(tmp_path / "empty")
    with pytest.raises(InputError, match="the tasks have no inputs to embed"):
        empty.finish()
    table = tmp_path / "table"
    for damage, message in (
        (lambda: os.truncate(table / "parts" / "00000.vectors.npy", 140), "00000.vectors.npy: dam"),
        (lambda: (table / "parts" / "00000.vectors.npy").unlink(), "00000.vectors.npy: no such"),
        (lambda: (table / "about.json").write_text("{"), "about.json: expected JSON"),
        (lambda: (table / "about.json").write_text("[]"), "about.json: expected"),
        (lambda: np.save(table / "rows.1.npy", np.arange(4)), "got 5, 4 and"),
    ):
        add(table, range(5))
        forget_checksums(table)
        damage()
        with pytest.raises(InputError, match=message):
            sentence_table.SentenceTable(table)
        shutil.rmtree(table)


def test_encoders_without_fingerprint_are_compared_by_probe():
    probe = {"name": "a", "dim": 4, "probe": [1.0, -2.0, 0.01]}
    assert sentence_table.is_same_encoder(probe, {**probe, "probe": [1.01, -2.02, 0.0]})
    for other in (
        {**probe, "probe": [1.2, -2.0, 0.01]},
        {**probe, "probe": [1.0, -2.0]},
        {**probe, "name": "b"},
        {"name": "a", "dim": 4},
    ):
        assert not sentence_table.is_same_encoder(probe, other)
    with pytest.raises(InputError, match="which now returns other vectors"):
        sentence_table.check_same_encoder("run", probe, {**probe, "probe": [0.0, 0.0, 0.0]})


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"encoder": 5}, "encoder cannot be 5"),
        ({"encoder": {"name": "some"}}, "encoder cannot be"),
        ({"encoder": {**ENCODER, "dim": "3"}}, "encoder cannot be"),
        ({"parts": "1"}, "parts cannot be '1'"),
        ({"parts": 0}, "parts cannot be 0"),
        ({"parts": -1}, "parts cannot be -1"),
        ({"lengths": 5}, "lengths cannot be 5"),
        ({"vocabulary": None}, "vocabulary cannot be None"),
        ({"dtype": []}, r"dtype cannot be \[\]"),
        ({"checksums": []}, r"checksums cannot be \[\]"),
        ({"checksums": {"../keys.1.npy": "0"}}, "checksums cannot be"),
    ],
)
def test_damaged_about(tmp_path, about, message):
    add(tmp_path, range(5))
    file = tmp_path / "about.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    with pytest.raises(InputError, match=message):
        sentence_table.SentenceTable(tmp_path)
    with pytest.raises(InputError, match=message):
        open_writer(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0, 1, 2, 3, 5]), "rows below 5"),
        (np.array([0, 1, 2, 3, -1]), "rows below 5"),
        (np.ones(5), "rows below 5"),
        (np.ones((5, 1), int), "rows below 5"),
        (np.array(3), "an array with rows"),
        (np.array([], int), "an array with rows"),
        (np.array([{}]), "damaged"),
        (None, "damaged"),
    ],
)
def test_damaged_index(tmp_path, array, message):
    add(tmp_path, range(5))
    forget_checksums(tmp_path)
    (file,) = tmp_path.glob("rows.*.npy")
    file.write_bytes(b"")
    if array is not None:
        np.save(file, array)
    with pytest.raises(InputError, match=message):
        sentence_table.SentenceTable(tmp_path)


def test_one_command_at_a_time_adds_to_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "TIMEOUT", 0.0)
    folder_lock.hold(tmp_path, "another command")  # of this process: a lock is of an open file
    monkeypatch.setattr(folder_lock, "_held", {})
    with pytest.raises(InputError, match="^SENTENCE_EMBEDDINGS must be .* no other command writes"):
        open_writer(tmp_path)


@pytest.mark.slow
def test_in_a_bucket(gcs, monkeypatch):
    """Written in several parts, added to and read; damage is noticed."""
    monkeypatch.setattr(sentence_table, "_PART_ROWS", 2)
    folder = file_io.to_path("gs://bucket/table")
    add(folder, range(3))
    check_table(folder, range(3))
    folder_lock.release_all()  # as at the end of a command
    add(folder, range(6))
    folder_lock.release_all()
    index = ["keys.4.npy", "rows.4.npy"]
    assert [name for name in gcs.names(folder) if "/" not in name] == ["about.json", *index]
    check_table(folder, range(6))
    assert sentence_table.SentenceTable(folder).verify() == 8
    gcs.log.clear()
    sentence_table.SentenceTable(folder)
    assert {name for _, name in gcs.log} == {"bucket/table/about.json"}  # the rest is here already
    sentence_table._download.cache_clear()
    name = "bucket/table/parts/00001.vectors.npy"
    gcs.objects[name] = gcs.objects[name][0][:-1] + b"!", 1
    with pytest.raises(InputError, match=rf": gs://{name}: damaged: expected the checksum"):
        sentence_table.SentenceTable(folder)
    del gcs.objects[name]
    with pytest.raises(InputError, match=f"gs://{name}: no such file"):
        sentence_table.SentenceTable(folder)
    with pytest.raises(InputError, match="gs://bucket/no: .* got no such folder"):
        sentence_table.SentenceTable("gs://bucket/no")
    gcs.objects["bucket/other/file"] = b"", 1
    with pytest.raises(InputError, match="expected a new folder or a table"):
        open_writer(file_io.to_path("gs://bucket/other"))


def flip_bit(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_noticed(tmp_path, monkeypatch):
    """In the index when a table is opened, in vectors when the first of their file is used."""
    monkeypatch.setattr(sentence_table, "_PART_ROWS", 2)
    add(tmp_path, range(4), finish=False)
    add(tmp_path, range(9))  # resumes
    table = sentence_table.SentenceTable(tmp_path)
    assert table.verify() == 2 * len(list(tmp_path.glob("parts/*.keys.npy")))
    flip_bit(tmp_path / "parts" / "00001.vectors.npy")
    table = sentence_table.SentenceTable(tmp_path)
    assert table.vectors(np.array([0]))[0].tolist() == make_vectors([0])[0].tolist()
    with pytest.raises(
        InputError, match=r"parts/00001.vectors.npy: damaged: expected the checksum"
    ):
        table.vectors(table.rows([make_ids(3)]))
    flip_bit(tmp_path / "parts" / "00001.vectors.npy")
    flip_bit(tmp_path / "parts" / "00000.keys.npy")
    with pytest.raises(InputError, match=r"parts/00000.keys.npy: damaged"):
        open_writer(tmp_path)
    flip_bit(tmp_path / "parts" / "00000.keys.npy")
    (index,) = tmp_path.glob("keys.*.npy")
    flip_bit(index)
    with pytest.raises(InputError, match="keys.*npy: damaged"):
        sentence_table.SentenceTable(tmp_path)
    flip_bit(index)
    forget_checksums(tmp_path)
    check_table(tmp_path, range(9))  # a table of an earlier version
    add(tmp_path, range(20))
    assert sentence_table.SentenceTable(tmp_path).verify() > 2
    check_table(tmp_path, range(20))
