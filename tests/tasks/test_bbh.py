"""BIG-Bench Hard's folder: its files, the tasks made of them, and one line for each mistake."""

import json

import numpy as np
import pytest
from benchmark_folders import BBH_TASKS, solved, write_bbh

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_tasks, shots
from pemoe_jax.runtime import options
from pemoe_jax.tasks import bbh

VOCABULARY = "tasks/quickstart/vocab.model"


@pytest.fixture
def folder(tmp_path):
    return write_bbh(tmp_path / "bbh_folder")


def test_tasks_are_the_published_ones():
    assert (len(bbh.TASKS), len(set(bbh.TASKS.values()))) == (27, 23)
    assert bbh.TASKS["tracking_shuffled_objects_seven_objects"] == "tracking_shuffled_objects"
    assert bbh.TASKS["snarks"] == "snarks"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is warm. So the answer is (A).", "(A)"),
        ("So the answer is (A). No, the answer is (B).", "(B)"),  # the last
        ("So the answer is ] } ].", "] } ]"),
        ("so the answer is  -12 . ", "-12"),
        ("Yes.", "Yes"),
        ("(C)", "(C)"),
        ("the answer is e.g.. ", "e.g."),  # one full stop ends the sentence
        ("", ""),
    ],
)
def test_answers(text, answer):
    assert bbh.extract_answer(text) == answer


def test_prompts(folder):
    prompt = bbh.read_prompt(folder / "cot-prompts" / "navigate.txt")
    assert prompt.description == "Say whether I am back (navigate)."
    expected = [
        bbh.PromptExample(question, f"{reasoning} So the answer is {answer}.", answer)
        for question, reasoning, answer in map(solved, range(3))
    ]
    assert prompt.examples == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-----\n", "", r"navigate.txt: expected a line '-----' before the prompt, got none"),
        ("Q: ", "R: ", "navigate.txt: expected solved examples that begin with 'Q:', got none"),
        (f"Q: {solved(0)[0]}", "Q:", "navigate.txt:5: expected a question after 'Q:', got none"),
        ("answer is yes.", "answer is .", "navigate.txt:5: expected 'So the answer is …' in the"),
        ("A: Let's", "Let's", "navigate.txt:5: expected a line 'A: Let's think step by step. …'"),
        ("the answer is", "it is", "navigate.txt:5: expected 'So the answer is …' in the example"),
    ],
)
def test_wrong_prompts(folder, old, new, message):
    path = folder / "cot-prompts" / "navigate.txt"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        bbh.register(folder, VOCABULARY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"examples": [', r"navigate.json:1: not JSON: Expecting value at column 15"),
        ("[]", r"navigate.json: expected an object, got list \[\]"),
        ('{"examples": []}', r"navigate.json: 'examples' must be a list of objects, got list \[\]"),
        ('{"examples": ["a"]}', "navigate.json: example 1 must be an object, got str"),
        (
            '{"examples": [{"input": "a", "target": "b"}, {"input": "a"}]}',
            "navigate.json: example 2: 'target' must be a string, got NoneType null",
        ),
        (
            '{"examples": [{"input": "a", "target": " "}]}',
            "navigate.json: example 1: 'target' must be a text that is not blank, got ' '",
        ),
    ],
)
def test_wrong_examples(folder, content, message):
    (folder / "bbh" / "navigate.json").write_text(content)
    with pytest.raises(InputError, match=message):
        bbh.register(folder, VOCABULARY)


def test_wrong_folders(folder, tmp_path):
    for path, message in (
        (tmp_path / "none", "BBH_DIR .*none must be a folder, got no such folder"),
        (tmp_path, "must hold bbh/<task>.json, got none"),
    ):
        with pytest.raises(InputError, match=message):
            bbh.register(path, VOCABULARY)
    prompt = folder / "cot-prompts" / "navigate.txt"
    content = prompt.read_text()
    prompt.unlink()
    with pytest.raises(InputError, match="navigate.txt: expected the task's prompt, got no such"):
        bbh.register(folder, VOCABULARY)
    prompt.write_text(content)
    (folder / "bbh" / "snark.json").write_text("{}")
    with pytest.raises(InputError, match="'snark' is not a task of BBH; did you mean 'snarks'"):
        bbh.register(folder, VOCABULARY)


def test_examples_without_a_space_and_hidden_files(folder):
    path = folder / "cot-prompts" / "navigate.txt"
    prompt = bbh.read_prompt(path)
    path.write_text(path.read_text().replace("Q: ", "Q:", 1))
    assert bbh.read_prompt(path) == prompt
    (folder / "bbh" / "._navigate.json").write_bytes(b"\0")
    assert "._navigate" not in bbh.find_files(folder)


def test_tasks_of_a_folder(folder):
    roles = bbh.register(folder, VOCABULARY, eval_examples=4)
    names = {mode: {f"bbh_{mode}_{task}" for task in BBH_TASKS} for mode in ("direct", "reasoning")}
    assert set(seqio_tasks.subtask_names("bbh_direct")) == names["direct"]
    assert set(seqio_tasks.subtask_names("bbh")) == names["direct"] | names["reasoning"]
    assert roles.datasets["bbh_direct_logical_deduction_five_objects"] == "logical_deduction_direct"
    assert roles.summary[0].endswith(": 3 of 27 files, 12 examples")
    assert "missing tasks, not in the means: boolean_expressions, " in roles.summary[1]
    content = json.loads((folder / "bbh" / "navigate.json").read_text())
    for mode, end in (("direct", "A:"), ("reasoning", "A: Let's think step by step.")):
        task = seqio_tasks.get_mixture_or_task(f"bbh_{mode}_navigate")
        rows = [*seqio_tasks.get_dataset(task.name, {}, "validation", False).as_numpy_iterator()]
        assert [
            (row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode())
            for row in rows
        ] == [(f"Q: {e['input']}\n{end}", e["target"]) for e in content["examples"][:4]]
        vocabulary = task.output_features["inputs"].vocabulary
        assert task.shots_header() == vocabulary.encode("Say whether I am back (navigate).")
        shots = [(shot.input_text, shot.target_text) for shot in task.solved_examples()]
        assert shots == [
            (
                f"Q: {question}\n{end}",
                answer if mode == "direct" else f"{reasoning} So the answer is {answer}.",
            )
            for question, reasoning, answer in map(solved, range(3))
        ]


def test_a_leaked_row_is_no_shot_of_itself(folder):
    """A row of `bbh/` that the prompt has too: its input has the other shots alone."""
    question, _, answer = solved(1)
    path = folder / "bbh" / "navigate.json"
    content = json.loads(path.read_text())
    content["examples"].append({"input": question, "target": answer})
    path.write_text(json.dumps(content))
    bbh.register(folder, VOCABULARY)
    task = seqio_tasks.get_mixture_or_task("bbh_reasoning_navigate")
    few_shot = options.FewShot(shots=3)
    task_shots = shots.load_shots([task.name], few_shot, 512)[task.name]
    rows = [*seqio_tasks.get_dataset(task.name, {}, "validation", False).as_numpy_iterator()]
    vocabulary = task.output_features["inputs"].vocabulary
    counts = []
    for row in rows:
        tokens, count = task_shots.prepend_to(row["inputs"], 512)
        counts.append(count)
        text = vocabulary.decode(tokens.tolist())
        assert text.startswith(vocabulary.decode(vocabulary.encode("Say whether I am back")))
        own = vocabulary.decode(row["inputs"].tolist())
        assert text.endswith(own) and text.count(own) == 1
        np.testing.assert_array_equal(tokens[-len(row["inputs"]) :], row["inputs"])
    assert counts == [3, 3, 3, 3, 3, 2]
    with pytest.raises(InputError, match="SHOTS must be at most 3 for 'bbh_reasoning_navigate'"):
        shots.load_shots([task.name], options.FewShot(shots=4), 512)
