"""P3's prompted rows in JSON lines and Parquet: checked, and scored also without their text."""

import json

import pytest

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
        import pyarrow
        from pyarrow import parquet

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
