"""MMLU's folder: its files, the tasks made of them, and one line for each mistake."""

import collections

import pytest
from benchmark_folders import SUBJECTS, questions, write_csv, write_mmlu

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_tasks
from pemoe_jax.tasks import mmlu

VOCABULARY = "tasks/quickstart/vocab.model"
LENGTHS = {"inputs": 256, "targets": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mmlu(tmp_path_factory.mktemp("mmlu"))


def test_areas_are_the_published_ones():
    counts = collections.Counter(mmlu.AREAS.values())
    assert counts == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}


def test_questions_with_commas_quotes_and_several_lines(tmp_path):
    rows = [
        [
            "Which is larger,\nthe sun or the moon?",
            'the "sun"',
            "the moon",
            "",
            "both, equally",
            "A",
        ],
        *questions("astronomy", 2),
    ]
    path = write_csv(tmp_path / "a.csv", rows)
    path.write_text(f"{path.read_text()}\n")  # a blank line is no row
    read = mmlu.read_questions(path)
    assert [[question.text, *question.options, question.answer] for question in read] == rows
    assert read[0].prompt() == (
        'Which is larger,\nthe sun or the moon?\nA. the "sun"\nB. the moon\nC. \n'
        "D. both, equally\nAnswer:"
    )
    assert mmlu.read_questions(path, limit=1) == read[:1]


# The first row takes lines 1 and 2.
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,a,b,c,A\n", r"a.csv:3: expected 6 columns \(question, A, B, C, D, answer\), got 5"),
        ("q,a,b,c,d,x,A\n", "a.csv:3: expected 6 columns .*, got 7"),
        ("q,a,b,c,d,E\n", "a.csv:3: the answer must be one of 'A', 'B', 'C', 'D', got 'E'"),
        ("question,A,B,C,D,answer\n", "a.csv:3: the answer must be one of .*, got 'answer'"),
        ("q,a,b,c,d,\n", "a.csv:3: the answer must be one of .*, got ''"),
        ('q,"a,b,c,d,A\n', "a.csv:3: not CSV: "),
        ("q,\xff,b,c,d,A\n", "a.csv: not UTF-8: invalid start byte at byte "),
    ],
)
def test_wrong_rows(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_bytes(('"two\nlines",a,b,c,d,A\n' + text).encode("latin-1"))
    with pytest.raises(InputError, match=message):
        mmlu.read_questions(path, limit=1)


def test_empty_file(tmp_path):
    (tmp_path / "a.csv").write_text("\n")
    with pytest.raises(InputError, match="a.csv: expected at least one row, got none"):
        mmlu.read_questions(tmp_path / "a.csv")


def test_wrong_folders(folder, tmp_path):
    for path, message in (
        (tmp_path / "none", "MMLU_DIR .*none must be a folder, got no such folder"),
        (tmp_path, "must hold test/<subject>_test.csv, got none"),
    ):
        with pytest.raises(InputError, match=message):
            mmlu.register(path, VOCABULARY)
    with pytest.raises(InputError, match="MMLU_SPLIT must be one of 'test', 'val', got 'dev'"):
        mmlu.register(folder, VOCABULARY, split="dev")
    write_csv(tmp_path / "test" / "astronomy_test.csv", questions("astronomy", 1))
    (tmp_path / "test" / "._astronomy_test.csv").write_bytes(b"\0")
    assert [*mmlu.find_files(tmp_path, "test")] == ["astronomy"]
    write_csv(tmp_path / "test" / "astronomie_test.csv", questions("astronomy", 1))
    message = "'astronomie' is not a subject of MMLU; did you mean 'astronomy'"
    with pytest.raises(InputError, match=message):
        mmlu.register(tmp_path, VOCABULARY)


def test_tasks_of_a_folder(folder):
    roles = mmlu.register(folder, VOCABULARY)
    names = [f"mmlu_{subject}_score_eval" for subject in SUBJECTS]
    assert sorted(roles.eval_tasks) == sorted(names) == seqio_tasks.subtask_names(mmlu.MIXTURE)
    assert roles.summary[0].endswith(": 5 of 57 subjects, 25 questions of test")
    assert roles.summary[1].startswith("missing subjects, not in the means: abstract_algebra, ")
    groups = choices.load_choice_groups(mmlu.MIXTURE, LENGTHS)
    assert len(groups) == 25
    for group in groups:
        subject = roles.datasets[group.task].removeprefix("mmlu_")
        question = mmlu.Question(*_split(questions(subject, 16)[9 + group.idx]))
        assert group.input_text == question.prompt()
        assert group.choice_texts == mmlu.LETTERS
        assert [*group.is_correct] == [letter == question.answer for letter in "ABCD"]
        assert not group.anomalies
    # Another call replaces the tasks.
    roles = mmlu.register(folder, VOCABULARY, eval_examples=2, split="val")
    assert len(choices.load_choice_groups(mmlu.MIXTURE, LENGTHS)) == 10
    assert roles.eval_splits["mmlu_astronomy"] == "val"


def _split(row):
    return row[0], tuple(row[1:5]), row[5]


def test_shots_are_those_of_dev(folder, tmp_path):
    mmlu.register(folder, VOCABULARY)
    task = seqio_tasks.get_mixture_or_task("mmlu_nutrition_score_eval")
    vocabulary = task.output_features["inputs"].vocabulary
    header = "The following are multiple choice questions (with answers) about nutrition."
    assert task.shots_header() == vocabulary.encode(header)
    solved = task.solved_examples()
    rows = [mmlu.Question(*_split(row)) for row in questions("nutrition", 5)]
    assert [(shot.input_text, shot.target_text) for shot in solved] == [
        (row.prompt(), row.answer) for row in rows
    ]
    assert all([*shot.inputs] == vocabulary.encode(shot.input_text) for shot in solved)
    write_csv(tmp_path / "test" / "nutrition_test.csv", questions("nutrition", 2))
    mmlu.register(tmp_path, VOCABULARY)
    with pytest.raises(InputError, match="are read from .*nutrition_dev.csv, got no such file"):
        seqio_tasks.get_mixture_or_task("mmlu_nutrition_score_eval").solved_examples()
