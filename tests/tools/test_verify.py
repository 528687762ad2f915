"""`pemoe verify`: whole and damaged files of data, tables and weights."""

import json
import pathlib
import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pemoe_jax.checkpoints import safetensors_file
from pemoe_jax.data import sentence_table, tfrecords
from pemoe_jax.tools import verify


def write_tfrecords(path: pathlib.Path, records: list[bytes]) -> None:
    def checksum(data: bytes) -> bytes:
        return tfrecords.masked_checksum(data).to_bytes(4, "little")

    frames = []
    for record in records:
        length = len(record).to_bytes(8, "little")
        frames.append(length + checksum(length) + record + checksum(record))
    path.write_bytes(b"".join(frames))


def write_table(folder: pathlib.Path) -> None:
    encoder = {"name": "some", "dim": 2, "fingerprint": "f"}
    writer = sentence_table.TableWriter(folder, encoder, "float32", "v", 8)
    writer.add([sentence_table.input_key([n]) for n in range(1, 4)], np.ones((3, 2)))
    writer.finish()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task").mkdir()
    row = {"inputs": "a", "targets": "b", "answer_choices": ["b", "c"]}
    (tmp_path / "task" / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "INDEX.json").write_text("{}")
    parquet.write_table(
        pyarrow.table({"inputs": ["text", "other"]}),
        tmp_path / "task" / "test.parquet",
        write_page_checksum=True,
        write_statistics=False,  # they have the values too
        use_dictionary=False,
        compression="none",
    )
    write_tfrecords(tmp_path / "task" / "train.tfrecord-00000-of-00001", [b"one", b"two"])
    (tmp_path / "task" / "info.train.json").write_text('{"num_shards": 1}')
    (tmp_path / "task" / "stats.train.json").write_text('{"examples": 2}')
    safetensors_file.save_file(tmp_path / "a.safetensors", {"a": np.arange(9.0)}, {})
    return tmp_path


def flip(path: pathlib.Path, value: bytes) -> None:
    content = path.read_bytes()
    assert value in content
    path.write_bytes(content.replace(value, bytes([value[0] ^ 1]) + value[1:], 1))


def run(capsys, path: pathlib.Path | str, code: int) -> list[str]:
    assert verify.main([str(path)]) == code
    out, error = capsys.readouterr()
    assert bool(error) == bool(code) and error.count("\n") == code
    return out.splitlines()


def test_whole_files(folder, capsys):
    *lines, summary = run(capsys, folder, 0)
    assert len(lines) == 7 and all(line.startswith(f"ok     {folder}/") for line in lines)
    assert summary == f"{folder}: 7 items verified, no fault"
    text = "\n".join(lines)
    for part in (
        "a.safetensors: 1 array: names, shapes, sizes, finite values, CRC-32Cs",
        "train.tfrecord-00000-of-00001: 2 rows: lengths, the CRC-32C of each row",
        "info.train.json: the 1 tfrecord file of 'train' and their rows",
        "train.jsonl: 1 row: structure, types; without checksums: a changed value is not noticed",
        "test.parquet: 2 rows: structure, types; the CRC-32s of pages that have one",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.safetensors", np.float64(5).tobytes()[-3:], "a.safetensors: 'a': damaged"),
        ("task/train.tfrecord-00000-of-00001", b"two", "the checksum of row 2 is wrong"),
        ("task/test.parquet", b"other", "test.parquet: damaged: .*CRC"),
        ("task/train.jsonl", b"{", "train.jsonl: row 1"),
        ("task/info.train.json", b"1", "'num_shards' must be a positive integer"),
        ("task/stats.train.json", b"2", "must be a number of rows up to 2, .* got 3"),
    ],
)
def test_damaged_files(folder, capsys, name, value, message):
    """Each gets a line; the others are read all the same."""
    flip(folder / name, value)
    lines = run(capsys, folder, 1)
    (fault,) = (line for line in lines if line.startswith("FAULT  "))
    assert re.search(message, fault), fault
    assert len(lines) == 7


def test_a_sentence_table(tmp_path, capsys):
    write_table(tmp_path)
    (line, _) = run(capsys, tmp_path, 0)
    assert "3 inputs: about.json, index, finite vectors; CRC-32Cs" in line
    flip(tmp_path / "parts" / "00000.vectors.npy", np.float32(1).tobytes())
    assert "00000.vectors.npy: damaged" in run(capsys, tmp_path, 1)[0]


def test_other_paths(tmp_path, capsys):
    assert verify.main([str(tmp_path / "no")]) == verify.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("error: PATH must be") == 2


def test_in_a_bucket(folder, gcs, capsys):
    name = "bucket/a.safetensors"
    gcs.objects[name] = (folder / "a.safetensors").read_bytes(), 1
    (line, _) = run(capsys, f"gs://{name}", 0)
    assert line.endswith("finite values, CRC-32Cs")
    gcs.objects[name] = gcs.objects[name][0][:-1] + b"!", 2
    assert "a.safetensors: 'a': damaged" in run(capsys, f"gs://{name}", 1)[0]
    gcs.objects["bucket/data/train.jsonl"] = b"{}\n", 1
    for path in ("gs://bucket/data", "gs://bucket/data/train.jsonl"):
        assert verify.main([path]) == 1
        assert capsys.readouterr().err.endswith(f"(data must be local), got {path}\n")
