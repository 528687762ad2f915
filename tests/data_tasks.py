"""Tasks to train on and to score, registered: for the tests of `data` and of `feed`."""

import pathlib

import numpy as np
from test_jsonl import WORDS, YES_NO, make_vocab, write

from pemoe_jax.tasks import jsonl


def register(folder: pathlib.Path) -> tuple:
    """a and b to train on, with 40 and 25 examples; plain and scored, with choices.

    Returns what `jsonl.register` does, and the rows of scored.
    """
    rng = np.random.default_rng(0)

    def some(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    for task, count in (("a", 40), ("b", 25)):
        write(folder, task, "train", [(f"{task} {some(1, 12)}", some(1, 4)) for _ in range(count)])
        write(folder, task, "validation", [(f"{task} {some(1, 12)}", some(1, 4)) for _ in range(5)])
    rows = []
    for i in range(23):
        choices = [some(1, 3 if i % 2 else 9) for _ in range(2 + i % 5)]
        rows.append((some(1, 60), choices[i % len(choices)], choices))
    write(folder, "scored", "validation", rows)
    write(folder, "plain", "validation", [("sky", "yes", YES_NO)])
    found = jsonl.register(
        folder,
        make_vocab(folder),
        train_tasks=["a", "b"],
        eval_tasks=["plain", "scored"],
    )
    return found, rows
