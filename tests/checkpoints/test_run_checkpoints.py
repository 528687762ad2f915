"""Checkpoints of runs: unreadable ones, and resuming with other settings."""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
import optax
import pytest

from pemoe_jax.checkpoints import runs, same_run
from pemoe_jax.core import adapters, freezing, routing, sparse, steps
from pemoe_jax.core.errors import InputError

RECORD = runs.Record(
    method="full",
    trainable=[".*"],
    config={},
    adapters={},
    base={"path": None, "seed": 0, "fingerprint": "", "needed": False},
    counts={},
    versions={},
)


def test_a_checkpoint_is_opened_once_after_it_is_written(tmp_path):
    """Orbax reads this folder's name as a pattern and saves no arrays."""
    checkpoints = runs.RunCheckpoints(str(tmp_path / "run[1]"), keep=None)
    state = steps.TrainState.create({"kernel": jnp.ones((2, 3))}, optax.sgd(0.1))
    checkpoints.save(state, RECORD)
    with pytest.raises(InputError, match=r"checkpoint_0/state: expected arrays named params"):
        checkpoints.save(state.replace(step=state.step + 1), RECORD)
    checkpoints.close()


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max(filter(pathlib.Path.is_file, folder.rglob("*")), key=lambda f: f.stat().st_size)


def test_checkpoints_that_cannot_be_restored(tmp_path):
    state = steps.TrainState.create({"kernel": jnp.arange(6000.0)}, optax.adamw(0.1))
    checkpoints = runs.RunCheckpoints(str(tmp_path))
    checkpoints.save(state, RECORD)
    folder = tmp_path / "checkpoint_0" / "state"
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    checkpoints.close()
    checkpoints = runs.RunCheckpoints(str(tmp_path))
    other = steps.TrainState.create(state.params, clipped)
    with pytest.raises(InputError, match=r"checkpoint_0/state: .* got other optimizer settings"):
        checkpoints.restore(0, other)
    for file in (largest_file(folder), folder / "manifest.ocdbt", folder / "_METADATA"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"checkpoint_0/state: cannot be restored: "):
            checkpoints.restore(0, state)
        file.write_bytes(content)
    assert checkpoints.restore(0, state).params["kernel"][7] == 7
    checkpoints.close()


def mov(num_experts: int, top_k: int | None = None) -> dict:
    def factory(**arguments):
        router = functools.partial(routing.Router, top_k=top_k)
        return adapters.VectorExperts(num_experts=num_experts, router=router, **arguments)

    return adapters.describe(adapters.Adapters(key=factory, value=factory, gate=factory))


SPARSE = sparse.describe(sparse.Sparse(8))
UPCYCLED = RECORD.base | {"needed": True, "upcycled": {"seed": 0, "noise": 0.0}}


def test_records_of_earlier_versions_are_of_dense_models():
    values = dataclasses.asdict(RECORD)
    del values["sparse"]
    assert runs.parse_record(values, "record").sparse is None
    values["sparse"] = SPARSE
    assert runs.parse_record(values, "record").sparse == SPARSE
    values["sparse"] = 8
    with pytest.raises(InputError, match="record: sparse: expected an object, got 8"):
        runs.parse_record(values, "record")
    with pytest.raises(InputError, match=r"Sparse has no settings \['colour'\]"):
        sparse.from_description(SPARSE | {"colour": 1})


@pytest.mark.parametrize(
    ("saved", "current", "difference"),
    [
        (
            {"adapters": mov(10)},
            {"adapters": mov(5, top_k=2)},
            "num_experts 10 -> 5 at key, value, gate; router.top_k None -> 2 at key, value, gate",
        ),
        (
            {"sparse": SPARSE},
            {"sparse": SPARSE | {"num_experts": 4}},
            "NUM_EXPERTS 8 -> 4",
        ),
        ({"sparse": None}, {"sparse": SPARSE}, "sparse layers none -> with 8 experts"),
        ({"sparse": SPARSE}, {"sparse": None}, "sparse layers with 8 experts -> none"),
        (
            {"base": UPCYCLED},
            {"base": UPCYCLED | {"upcycled": {"seed": 0, "noise": 0.1}}},
            "UPCYCLE_NOISE 0.0 -> 0.1",
        ),
        ({"seed": 0}, {"seed": 1}, "SEED 0 -> 1"),
        ({"optimizer": "adafactor"}, {"optimizer": "adamw"}, "OPTIMIZER adafactor -> adamw"),
        ({"config": {"emb_dim": 8}}, {"config": {"emb_dim": 9}}, "T5Config.emb_dim 8 -> 9"),
        ({"trainable": [".*"]}, {"trainable": ["a"]}, "TRAINABLE ['.*'] -> ['a']"),
        (
            {"trainable": [".*"]},
            {"trainable": freezing.trainable_patterns([".*"], "router")},
            "FREEZE None -> router",
        ),
        ({"held_out": ["a", "b"]}, {"held_out": ["b"]}, "held-out datasets without a"),
        (
            {"trained_tasks": ["a", "b"]},
            {"trained_tasks": [*"bcdefg"]},
            "training tasks without a, with c, d, e and 2 more",
        ),
        (
            {"method": "mov", "adapters": mov(10)},
            {"method": "ia3", "adapters": {}, "trainable": ["a"]},
            "method mov -> ia3",
        ),
    ],
)
def test_a_resumed_run_keeps_its_settings(saved, current, difference):
    before, after = (dataclasses.replace(RECORD, **changes) for changes in (saved, current))
    same_run.check_same_run("run", before, before)
    with pytest.raises(InputError) as error:
        same_run.check_same_run("run", before, after)
    assert f"to resume, got {difference}: change" in str(error.value)


def test_settings_that_a_record_does_not_know_are_not_compared():
    later = dataclasses.replace(RECORD, optimizer="adamw", trained_tasks=["a"], held_out=["b"])
    same_run.check_same_run("run", RECORD, later)
    dropout = SPARSE | {"expert_dropout_rate": 0.2}  # dropout may change
    records = [dataclasses.replace(RECORD, sparse=each) for each in (SPARSE, dropout)]
    same_run.check_same_run("run", *records)
    base = {"path": "x", "seed": 0, "fingerprint": "f", "needed": True, "frozen_dtype": "int8"}
    same_run.check_same_run(
        "run", dataclasses.replace(RECORD, base=base), dataclasses.replace(RECORD, base={})
    )
