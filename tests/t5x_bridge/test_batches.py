"""The iterator of batches for T5X's trainer; needs no T5X."""

import json

import numpy as np
import pytest
from clu.data import dataset_iterator

from pemoe_jax.data import prefetch
from pemoe_jax.t5x_bridge import data

SPEC = {"ids": dataset_iterator.ArraySpec(np.dtype(np.int32), (1,))}


class Counted:
    """Batches of one example, numbered from a position."""

    def __init__(self, position):
        self.position = position or {"examples": 0}

    def __iter__(self):
        return self

    def __next__(self):
        number = self.position["examples"]
        self.position = {"examples": number + 1}
        return {"ids": np.array([number], np.int32)}


def make_batches() -> data.Batches:
    return data.Batches(lambda position: prefetch.prefetch(Counted(position)), SPEC)


def test_positions_of_the_last_steps_are_kept(tmp_path):
    """A checkpoint of step s has the position after s batches, though more have been read."""
    batches = make_batches()
    for _ in range(200):
        last = next(batches)["ids"][0]
    assert last == 199 and len(batches._positions) < 20
    for step in (200, 199, 190):
        file = tmp_path / f"checkpoint_{step}" / "train_ds"
        file.parent.mkdir()
        batches.save(file)
        assert json.loads(file.read_text()) == {"examples": step}
    restored = make_batches()
    restored.restore(file)
    assert next(restored)["ids"][0] == 190
    restored.save(file)
    assert json.loads(file.read_text()) == {"examples": 190}
    with pytest.raises(KeyError):
        restored.save(tmp_path / "checkpoint_192" / "train_ds")
