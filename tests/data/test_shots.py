"""Shots in front of inputs."""

import numpy as np
import pytest

from pemoe_jax.data import shots
from pemoe_jax.tasks.vocabulary import load_vocabulary

SHOTS = [np.arange(10, 14), np.arange(20, 23), np.arange(30, 32)]  # 4, 3 and 2 tokens
INPUTS = np.array([7, 8, 1])


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


def test_draw_depends_on_seed_and_task_alone():
    first = shots.draw(range(50), 4, 0, "a")
    assert len(set(first)) == 4 and set(first) <= set(range(50))
    assert shots.draw(iter(range(50)), 4, 0, "a") == first
    assert shots.draw(range(50), 4, 1, "a") != first
    assert shots.draw(range(50), 4, 0, "b") != first
    # A run with fewer shots has the first of these.
    assert shots.draw(range(50), 2, 0, "a") == first[:2]
    assert sorted(shots.draw(range(3), 4, 0, "a")) == [0, 1, 2]
    # Fixed, as results of another day or machine must be comparable.
    assert first == [18, 36, 8, 44]


@pytest.mark.parametrize("path", ["tasks/quickstart/vocab.model", "bytes"])
def test_shot_equals_its_text(path):
    vocabulary = load_vocabulary(path)
    ids = [[*vocabulary.encode(text), vocabulary.eos_id] for text in ("is it so?", "yes")]
    expected = vocabulary.encode("is it so? yes\n\n")
    assert shots.shot_tokens(shots.SolvedExample(*ids), vocabulary).tolist() == expected
    without_eos = shots.SolvedExample(ids[0][:-1], ids[1][:-1])
    assert shots.shot_tokens(without_eos, vocabulary).tolist() == expected
