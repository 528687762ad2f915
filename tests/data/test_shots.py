"""Shots: drawn from train splits, never the evaluated row, and put in front of inputs."""

import collections
import pathlib

import data_tasks
import numpy as np
import pytest
from data_tasks import YES_NO, make_vocab, write

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import choices, seqio_tasks, shots
from pemoe_jax.data.shots import SolvedExample
from pemoe_jax.runtime.options import FewShot
from pemoe_jax.tasks import jsonl
from pemoe_jax.tasks.vocabulary import load_vocabulary

VOCAB = pathlib.Path(__file__).resolve().parents[2] / "tasks" / "quickstart" / "vocab.model"
SHOTS = [np.arange(10, 14), np.arange(20, 23), np.arange(30, 32)]  # 4, 3 and 2 tokens
INPUTS = np.array([7, 8, 1])
LENGTHS = {"inputs": 64, "targets": 8}
# Different inputs of the train split of the task `many`.
TRAIN = [
    (f"is the {noun} {colour}", YES_NO[number % 2], YES_NO)
    for noun in ("sky", "grass", "sea", "film")
    for number, colour in enumerate(("red", "blue", "green"))
]
LEAKED = TRAIN[4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shots")
    rows = {
        "many": {"train": TRAIN * 2, "validation": [("is it good", "no", YES_NO), LEAKED]},
        "few": {"train": [*TRAIN[:3], ("no target", "", YES_NO)], "validation": [TRAIN[0]]},
        "none": {"validation": [("is it bad", "no", YES_NO)]},
        "a": {"train": [("sky", "blue")], "validation": [("sky", "blue")]},
    }
    for task, splits in rows.items():
        for split, members in splits.items():
            write(folder, task, split, members)
    make_vocab(folder)
    return folder


@pytest.fixture
def tasks(folder):
    """`many` evaluates two rows and one of its train split; others have too few examples."""
    jsonl.register(folder, folder / "spiece.model", eval_tasks=["many", "few", "none"])


def load(name: str, count: int, seed: int = 0, limit: int = 64) -> shots.TaskShots:
    return shots.load_shots([name], FewShot(count, seed), limit)[name]


def pairs(task_shots: shots.TaskShots) -> list[tuple[str, str]]:
    return [(example.input_text, example.target_text) for example in task_shots.examples]


# --- drawing ---


def test_shots_are_rows_of_the_train_split_drawn_by_seed_and_task(tasks):
    drawn = pairs(load("many_score_eval", 4))
    assert len(set(drawn)) == 5 and set(drawn) <= {row[:2] for row in TRAIN}  # one in reserve
    assert pairs(load("many", 4)) == drawn  # of `pemoe infer`
    assert pairs(load("many_score_eval", 2)) == drawn[:3]
    assert pairs(load("many_score_eval", 4, seed=1)) != drawn


def test_draw_depends_on_neither_the_order_nor_repetitions():
    examples = [SolvedExample([number], [1]) for number in range(50)]

    def numbers(examples, count=4, seed=0, task="a"):
        drawn = shots.draw(examples, count, shots.draw_seed(seed, task))
        return [example.inputs[0] for example in drawn]

    first = numbers(examples)
    assert len(set(first)) == 4
    assert numbers(reversed(examples)) == numbers(examples * 2) == first
    assert numbers(examples, count=2) == first[:2]
    assert numbers(examples, seed=1) != first
    assert numbers(examples, task="b") != first
    assert sorted(numbers(examples[:3])) == [0, 1, 2]
    # Results of another day or machine must be comparable.
    assert first == [44, 3, 20, 33]


def test_user_tasks_of_answer_choices_are_read_by_their_correct_rows(tasks):
    def rows(inputs: list[int], correct: int) -> list[dict]:
        return [
            {"inputs": inputs, "targets": [5 + choice, 1], "is_correct": choice == correct}
            for choice in range(2)
        ]

    train = [[*ids, 1] for ids in ([10], [11], [12, 13])]
    numbered = collections.defaultdict(list)
    for split, inputs in (("train", train), ("validation", [[10, 1], [20, 1]])):
        for number, ids in enumerate(inputs):
            for choice, row in enumerate(rows(ids, correct=number % 2)):
                numbered[split].append(row | {"idx": [number, choice]})
    data_tasks.add_rows("user_score_eval", numbered["validation"], train=numbered["train"])
    task_shots = load("user_score_eval", 2)
    drawn = {tuple(e.inputs.tolist()): e.targets.tolist() for e in task_shots.examples}
    assert drawn == {(10, 1): [5, 1], (11, 1): [6, 1], (12, 13, 1): [5, 1]}
    groups = choices.load_choice_groups("user_score_eval", LENGTHS)
    leaked, other = shots.add_shots(groups, {"user_score_eval": task_shots}, 64)
    assert (leaked.num_shots, other.num_shots) == (2, 2)
    assert leaked.inputs.tolist().count(10) == 1 and leaked.inputs[-2] == 10
    assert len(leaked.choices) == 2


# --- the evaluated row ---


@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_leaked_row_is_no_shot_of_itself(tasks, count):
    """One of the evaluated rows is also in the train split, twice."""
    names = {"many_score_eval": load("many_score_eval", count)}
    vocabulary = names["many_score_eval"].vocabulary
    groups = choices.load_choice_groups("many_score_eval", LENGTHS)
    plain, leaked = (
        vocabulary.decode(group.inputs.tolist()) for group in shots.add_shots(groups, names, 999)
    )
    texts = [" ".join(pair) for pair in pairs(names["many_score_eval"])]
    assert plain == " ".join([*texts[:count], "is it good"])
    others = [text for text in texts if text != " ".join(LEAKED[:2])]
    assert leaked == " ".join([*others[:count], LEAKED[0]])
    assert leaked.count(LEAKED[0]) == 1


def test_rows_without_eos_are_recognized():
    vocabulary = load_vocabulary("bytes")
    examples = [SolvedExample([10, 11], [5, 1]), SolvedExample([12, 1], [6, 1])]
    task_shots = shots.TaskShots("t", 1, examples, vocabulary)
    for inputs in ([10, 11], [10, 11, 1]):
        tokens, _ = task_shots.prepend_to(np.array(inputs), 99)
        assert tokens.tolist() == [12, 35, 6, 13, 13, *inputs]


# --- wrong input ---


def test_wrong_input(tasks):
    names = ["many_score_eval", "none_score_eval"]
    with pytest.raises(
        InputError, match="^SHOTS must be 0 for tasks without a 'train' split, got 3"
    ):
        shots.load_shots(names, FewShot(3), 64)
    with pytest.raises(InputError, match="got 1: none_score_eval$"):
        shots.load_shots(names, FewShot(1), 64)
    with pytest.raises(
        InputError, match="^SHOTS must be at most 12 for 'many_score_eval', .*, got 13"
    ):
        load("many_score_eval", 13)
    with pytest.raises(InputError, match="at most 3 for 'few_score_eval'"):  # targets are empty
        load("few_score_eval", 4)
    groups = choices.load_choice_groups("few_score_eval", LENGTHS)
    with pytest.raises(InputError, match="at most 2 for 'few_score_eval', as one of its 3 solved"):
        shots.add_shots(groups, {"few_score_eval": load("few_score_eval", 3)}, 64)
    for wrong in (-1, 1.5, True, "3", None):
        with pytest.raises(InputError, match="^SHOTS must be an integer of at least 0, got "):
            load("many_score_eval", wrong)


# --- few-shot inputs ---


@pytest.mark.parametrize(
    ("limit", "expected", "left_out"),
    [
        (12, [10, 11, 12, 13, 20, 21, 22, 30, 31, 7, 8, 1], 0),
        (11, [20, 21, 22, 30, 31, 7, 8, 1], 1),  # one token too few for the first
        (8, [20, 21, 22, 30, 31, 7, 8, 1], 1),
        (7, [30, 31, 7, 8, 1], 2),
        (4, [7, 8, 1], 3),
        (3, [7, 8, 1], 3),
        (2, [7, 8, 1], 3),  # the input is the caller's to truncate
    ],
)
def test_whole_shots_are_left_out_from_the_front(limit, expected, left_out):
    tokens, count = shots.prepend_shots(SHOTS, INPUTS, limit)
    assert (tokens.tolist(), count, tokens.dtype) == (expected, left_out, np.int32)


def test_shots_before_one_that_is_left_out_are_left_out_too():
    # The first would fit alone, but the shots would then not be the last ones.
    tokens, count = shots.prepend_shots([SHOTS[2], SHOTS[0]], INPUTS, 6)
    assert (tokens.tolist(), count) == ([7, 8, 1], 2)


def test_header_comes_first_and_is_left_out_last():
    header = [5, 6]
    for limit, expected, left_out in (
        (7, [5, 6, 30, 31, 7, 8, 1], 0),
        (6, [5, 6, 7, 8, 1], 1),
        (5, [5, 6, 7, 8, 1], 1),
    ):
        tokens, count = shots.prepend_shots(SHOTS[2:], INPUTS, limit, header)
        assert (tokens.tolist(), count) == (expected, left_out)
    tokens, count = shots.prepend_shots([], INPUTS, 4, header)
    assert (tokens.tolist(), count) == ([7, 8, 1], 0)


def test_shots_longer_than_the_limit_are_never_cut(tasks):
    whole = load("many_score_eval", 4)
    lengths = [len(shots.shot_tokens(example, whole.vocabulary)) for example in whole.examples]
    # Inputs that are longer than the limit are told apart by all of their tokens.
    for limit in (3, 6, 9, 20):
        task_shots = load("many_score_eval", 4, limit=limit)
        tokens, used = task_shots.prepend_to(np.array([9, 1]), limit)
        assert len(tokens) == 2 + sum(lengths[4 - used : 4]) <= limit
    assert used > 0


@pytest.mark.parametrize("path", [VOCAB, "bytes"])
def test_shot_equals_its_text(path):
    vocabulary = load_vocabulary(path)
    ids = [[*vocabulary.encode(text), vocabulary.eos_id] for text in ("is it so?", "yes")]
    expected = vocabulary.encode("is it so? yes\n\n")
    assert shots.shot_tokens(SolvedExample(*ids), vocabulary).tolist() == expected
    without_eos = SolvedExample(ids[0][:-1], ids[1][:-1])
    assert shots.shot_tokens(without_eos, vocabulary).tolist() == expected


class OwnShots(shots.TaskWithShots):
    """A benchmark with its own examples."""

    def __init__(self, vocabulary):
        self.output_features = {"inputs": type("Feature", (), {"vocabulary": vocabulary})}

    def solved_examples(self):
        return [SolvedExample([number], [5]) for number in (12, 11, 10)]

    def shots_header(self):
        return [4]


def test_a_task_with_its_own_shots(monkeypatch):
    task = OwnShots(load_vocabulary("bytes"))
    monkeypatch.setattr(seqio_tasks, "get_mixture_or_task", lambda name: task)
    task_shots = load("own", 2, seed=3)
    tokens, used = task_shots.prepend_to(np.array([9, 1]), 99)
    assert (tokens.tolist(), used) == ([4, 12, 35, 5, 13, 13, 11, 35, 5, 13, 13, 9, 1], 2)
    tokens, _ = task_shots.prepend_to(np.array([12, 1]), 99)
    assert tokens.tolist() == [4, 11, 35, 5, 13, 13, 10, 35, 5, 13, 13, 12, 1]


# --- last, as it registers another folder ---


def test_a_damaged_train_file_is_named(tmp_path):
    write(tmp_path, "damaged", "validation", [("is it good", "no", YES_NO)])
    (tmp_path / "damaged" / "train.jsonl").write_text('{"inputs": "sky", "targets": "blue"}\n{')
    jsonl.register(tmp_path, make_vocab(tmp_path), eval_tasks=["damaged"])
    with pytest.raises(InputError, match=r"damaged.train\.jsonl:2"):
        load("damaged_score_eval", 1)
