"""Tables as Markdown and CSV, and shares in %."""

import csv
import io

import pytest

from pemoe_jax.analysis import tables


def test_markdown_is_aligned_and_escaped():
    table = tables.Table("t", ["run", "accuracy"], [["a|b", "1.0"], ["long name", "–"]])
    assert tables.markdown_table(table).split("\n") == [
        "| run       | accuracy |",
        "| :-------- | -------: |",
        "| a\\|b      |      1.0 |",
        "| long name |        – |",
    ]


def test_a_table_of_one_column_is_printed(capsys):
    tables.print_tables([tables.Table("t", ["run"], [["x"]])])
    assert capsys.readouterr().out.split()[:2] == ["t", "run"]


def test_alignment_does_not_depend_on_names():
    """Runs have any names, such as those of other columns."""
    table = tables.Table("t", ["prompt", "dataset", "base"], [["p", "d", "1.0"]], num_text=2)
    rule = tables.markdown_table(table).split("\n")[1]
    assert rule == "| :----- | :------ | ---: |"


def test_notes_follow_the_tables_once():
    first = tables.Table("a", ["run"], [["x"]], notes=["note"])
    second = tables.Table("b", ["run"], [["y"]], footer=[["sum"]], notes=["note", "other"])
    assert tables.to_markdown([first, second]).split("\n\n")[-2:] == ["note", "other\n"]
    assert "| y   |\n| sum |" in tables.to_markdown([first, second])


@pytest.mark.parametrize(
    "part, whole, text",
    [
        (0, 10, "0 %"), (10, 10, "100 %"), (19, 100_000, "0.019 %"), (32, 10_000, "0.32 %"),
        (469, 10_000, "4.69 %"), (123, 1000, "12.3 %"), (1, 1_000_000, "0.0001 %"),
    ],
)  # fmt: skip
def test_format_share(part, whole, text):
    assert tables.format_share(part, whole) == text


def test_csv_has_no_formulas():
    """A spreadsheet runs text that begins with one of these signs; numbers stay numbers."""
    texts = ["=1+1", "@SUM(1)", "+a", "-a", " =1", "\t=1"]
    cells = [*texts, "-0.5", "+1e-3", -0.5, None, "a=b", "a,b"]
    lines = list(csv.reader(io.StringIO(tables.to_csv([cells]))))
    escaped = [f"'{text}" for text in texts]
    assert lines == [[*escaped, "-0.5", "+1e-3", "-0.5", "", "a=b", "a,b"]]
