"""P3's prompted rows in JSON lines and Parquet: checked, and scored also without their text."""

import contextlib
import json
import re
from unittest import mock

import pyarrow
import pytest
from pyarrow import parquet

from pemoe_jax.core.errors import InputError
from pemoe_jax.tasks.p3 import readers, tables


class Letters:
    """A tokenizer: the ids of letters are their code points."""

    def encode(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def vocab_size(self):
        return 128


def prompted(path, rows, scored=False):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return readers.PromptedReader(tables.open_table([path]), Letters(), scored)


@pytest.mark.parametrize("file", ["validation.jsonl", "validation.parquet"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer_choices": "b ||| c"}, "'answer_choices' must be a list of strings, got str"),
        ({"targets": 5}, "'targets' must be a string or a list of token ids, got int 5"),
        ({"targets": None}, "'targets' must be a string or a list of token ids, got NoneType"),
        ({"inputs": {"text": "x"}}, "'inputs' must be a string or a list of token ids, got dict"),
        ({"inputs": [5, 700, 1]}, "'inputs' must have token ids from 0 to 127, as the vocabulary"),
    ],
)
def test_wrong_types_name_file_and_row(tmp_path, file, wrong, message):
    row = {"inputs": "a", "targets": "b", "answer_choices": ["b", "c"]} | wrong
    reader = prompted(tmp_path / file, [row, row])
    with pytest.raises(InputError) as error:
        reader.read_rows([1])
    assert str(error.value).startswith(f"{tmp_path / file}: row 2: {message}")
    with pytest.raises(InputError) as error:
        next(reader.row_blocks())
    assert str(error.value).startswith(f"{tmp_path / file}: row 1: {message}")


def test_choices_of_rows_without_text_are_compared_by_ids(tmp_path):
    row = {"inputs": [97, 1], "targets": [98, 1], "answer_choices": ["c", "b"]}
    plain = prompted(tmp_path / "validation.jsonl", [row])
    rows = readers.ChoiceReader(plain, Letters()).read_rows([0, 1])
    assert [row["is_correct"] for row in rows] == [False, True]
    assert rows[1]["inputs"] == [97, 1] and "inputs_pretokenized" not in rows[1]


def test_published_choice_rows_are_checked(tmp_path):
    row = {"inputs": "a", "targets": "b", "idx": [0, 0], "is_correct": True}
    assert prompted(tmp_path / "a.jsonl", [row], scored=True).read_rows([0])[0]["is_correct"]
    reader = prompted(tmp_path / "b.jsonl", [row | {"is_correct": "False"}], scored=True)
    with pytest.raises(InputError, match=r"b.jsonl: row 1: 'is_correct' must be true or false"):
        reader.read_rows([0])


def test_types_of_parquet(tmp_path):
    rows = {"inputs": ["a", "b"], "targets": ["c", "d"]}

    def read(**columns):
        # Row groups stay in memory by path.
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        parquet.write_table(pyarrow.table(rows | columns), path)
        reader = readers.PromptedReader(tables.open_table([path]), Letters(), False)
        return [row for rows in reader.row_blocks() for row in rows]

    expected = read()
    for kind in (pyarrow.string_view(), pyarrow.large_string(), pyarrow.binary()):
        assert read(inputs=pyarrow.array(["a", "b"]).cast(kind)) == expected
    ids = pyarrow.array([[97, 1], [98, 1]], pyarrow.large_list(pyarrow.uint64()))
    assert [row["inputs"] for row in read(inputs=ids)] == [row["inputs"] for row in expected]
    kinds = pyarrow.timestamp("ns"), pyarrow.duration("ns"), pyarrow.time64("ns")
    for kind in kinds:  # whether or not pandas, which has such values, is installed
        time = pyarrow.array([1, 2]).cast(kind)
        message = re.escape(f".parquet: the column 'time' of {kind} must have values")
        with pytest.raises(InputError, match=message):
            read(time=time)
    with pytest.raises(InputError, match="the column 'time' of timestamp.us. must have"):
        read(time=pyarrow.array([2**62, 1]).cast(pyarrow.timestamp("us")))


@pytest.mark.parametrize("kind", [*pyarrow.ArrowException.__subclasses__(), OSError])
def test_errors_of_pyarrow_are_one_line(tmp_path, monkeypatch, kind):
    path = tmp_path / "validation.parquet"
    parquet.write_table(pyarrow.table({"inputs": ["a", "b"]}), path)
    # A damaged file has fewer rows than its metadata says.
    with pytest.raises(InputError, match="validation.parquet: damaged: Index 2 out of bounds"):
        tables.open_table([path]).read_part(0, [2])
    monkeypatch.setattr(parquet, "ParquetFile", mock.Mock(side_effect=kind("of\nlines")))
    with pytest.raises(InputError, match="validation.parquet: not a Parquet file: of$"):
        tables.open_table([path]).part_sizes()


def test_columns_of_the_same_name(tmp_path):
    path = tmp_path / "validation.parquet"
    columns = [pyarrow.array([text]) for text in "abc"]
    parquet.write_table(pyarrow.table(columns, ["inputs", "targets", "targets"]), path)
    with pytest.raises(InputError, match="expected unique columns, got several 'targets'"):
        tables.open_table([path]).part_sizes()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["00000-of-00002"], "expected 2 Parquet files, as the name of .*-00000-of-00002.parquet"),
        (["00000-of-00001", "x"], "expected 1 Parquet file, as .* got validation-00000-of-00001"),
        (["00000-of-00001", "00001-of-00002"], "expected 1 Parquet file, as"),
        (["00000-of-00002", "00001-of-00002"], ""),
        (["00000-of-00001-0a1b"], ""),
        (["1", "2"], ""),
    ],
)
def test_files_of_a_split_are_complete(tmp_path, names, message):
    for name in names:
        (tmp_path / f"validation-{name}.parquet").write_bytes(b"")
    files = tables.find_splits(tmp_path)["validation"]
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        tables.open_table(files)


def test_compressed_files_are_not_left_out_silently(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "train.jsonl.gz").write_text("")
    assert [*tables.find_splits(tmp_path)] == ["train"]
    (tmp_path / "validation-00000-of-00001.parquet.zst").write_text("")
    with pytest.raises(InputError, match="parquet.zst: expected a file that is not compressed"):
        tables.find_splits(tmp_path)
