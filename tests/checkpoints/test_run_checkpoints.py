"""Checkpoints of runs: unreadable ones, and resuming with other settings."""

import dataclasses
import functools
import json
import pathlib
import re
import resource
import shutil
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pemoe_jax.checkpoints import runs, same_run
from pemoe_jax.checkpoints.records import Record, parse_record
from pemoe_jax.core import adapters, freezing, routing, sparse, steps
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

RECORD = Record(
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
    # Of a state with other shapes, the checkpoint is not a damaged one.
    shaped = state.replace(opt_state=optax.adamw(0.1).init({"kernel": jnp.ones(2)}))
    with pytest.raises(InputError, match=r"checkpoint_0/state: .* got other optimizer settings"):
        checkpoints.restore_newest(shaped)
    (tmp_path / "checkpoint_0" / "checksums.json").unlink()  # as in earlier versions
    for file in (largest_file(folder), folder / "manifest.ocdbt", folder / "_METADATA"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"checkpoint_0/state: cannot be restored: "):
            checkpoints.restore(0, state)
        file.write_bytes(content)
    assert checkpoints.restore(0, state).params["kernel"][7] == 7
    checkpoints.close()


def test_a_run_without_checkpoints(tmp_path):
    checkpoints = runs.RunCheckpoints(str(tmp_path))
    state = steps.TrainState.create({"kernel": jnp.zeros(2)}, optax.sgd(0.1))
    with pytest.raises(InputError, match=r"^.*: expected a checkpoint_<step>, got none$"):
        checkpoints.restore_newest(state)
    checkpoints.close()


def save_steps(folder: pathlib.Path, number: int, keep: int | None = None) -> steps.TrainState:
    """Saves steps 1 to `number`, each with its number in a parameter; returns the last state."""
    checkpoints = runs.RunCheckpoints(str(folder), keep)
    for step in range(1, number + 1):
        kernel = jnp.arange(6000.0).at[0].set(step)
        state = steps.TrainState.create({"kernel": kernel}, optax.sgd(0.1))
        checkpoints.save(state.replace(step=jnp.asarray(step)), RECORD, {"examples": [step]})
    checkpoints.close()
    return state


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(checkpoint: pathlib.Path) -> None:
    for file in (checkpoint / "state").glob("**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 8
        file.write_bytes(content)


def change_values(checkpoint: pathlib.Path) -> None:
    """Replaces the arrays by others, of which every file is whole."""
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(checkpoint.with_name("checkpoint_1") / "state", checkpoint / "state")


DAMAGES = {
    "values changed": change_values,
    "no state": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "manifest cut": lambda checkpoint: cut(checkpoint / "state" / "manifest.ocdbt"),
    "metadata empty": lambda checkpoint: (checkpoint / "state" / "_METADATA").write_text(""),
    "no record": lambda checkpoint: shutil.rmtree(checkpoint / "record"),
    "record cut": lambda checkpoint: cut(checkpoint / "record" / "metadata"),
    "position cut": lambda checkpoint: cut(checkpoint / "feed" / "metadata"),
    "bits flipped": flip_bits,
    "array cut": lambda checkpoint: cut(largest_file(checkpoint / "state")),
    "empty later folder": lambda checkpoint: checkpoint.with_name("checkpoint_99").mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_renamed_and_the_one_before_is_used(
    tmp_path, damage, capsys
):
    state = save_steps(tmp_path, 2)
    DAMAGES[damage](tmp_path / "checkpoint_2")
    good, bad = (2, 99) if "later" in damage else (1, 2)
    checkpoints = runs.RunCheckpoints(str(tmp_path), keep=1)
    restored, step = checkpoints.restore_newest(state)
    assert (step, restored.step, restored.params["kernel"][0]) == (good, good, good)
    out = capsys.readouterr().out
    assert out.startswith("warning: ") and f"checkpoint_{bad}" in out and out.count("\n") == 1
    assert (tmp_path / f"damaged_checkpoint_{bad}").is_dir()
    checkpoints.delete_older(good)  # never deletes the last good one
    assert runs.newest_readable_step(tmp_path) == good
    checkpoints.save(restored.replace(step=restored.step + 1), RECORD, {"examples": [9]})
    checkpoints.close()
    assert runs.saved_steps(tmp_path) == [good + 1]


@pytest.mark.parametrize("examples", [[], [-1, 5], [True, 5], [1.5, 5], None])
def test_damaged_data_positions(tmp_path, examples):
    file = tmp_path / "checkpoint_3" / "feed" / "metadata"
    file.parent.mkdir(parents=True)
    (tmp_path / "checkpoint_3" / "record").mkdir()
    file.write_text(json.dumps({"examples": examples}))
    for num_shards in (2, 3):
        with pytest.raises(InputError, match="examples: expected a list of integers"):
            runs.read_data_position(str(file.parents[1]), num_shards)


def test_without_a_whole_checkpoint_nothing_is_renamed(tmp_path):
    state = save_steps(tmp_path, 2)
    for step in (1, 2):
        flip_bits(tmp_path / f"checkpoint_{step}")
    checkpoints = runs.RunCheckpoints(str(tmp_path))
    with pytest.raises(InputError, match="checkpoint_2/state: unreadable: "):
        checkpoints.restore_newest(state)
    assert runs.saved_steps(tmp_path) == [1, 2]


def test_older_checkpoints_are_deleted_when_the_new_one_has_been_opened(tmp_path, monkeypatch):
    state = save_steps(tmp_path, 3, keep=2)
    assert runs.saved_steps(tmp_path) == [2, 3]
    (tmp_path / "checkpoint_1.orbax-checkpoint-tmp").mkdir()  # of a run that was killed
    checkpoints = runs.RunCheckpoints(str(tmp_path), keep=1)
    checkpoints.save(state.replace(step=jnp.asarray(4)), RECORD)
    monkeypatch.setattr(runs, "open_trained", lambda path: ({}, RECORD, 4))
    with pytest.raises(InputError, match="checkpoint_4 .* is missing: resume from checkpoint_3"):
        checkpoints.close()
    assert runs.saved_steps(tmp_path) == [2, 3, 4]
    monkeypatch.undo()
    runs.RunCheckpoints(str(tmp_path), keep=1).delete_older(4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_4"]


def test_a_failed_save_is_one_line_and_names_the_last_checkpoint(tmp_path, capfd):
    """As on a full disk: no file can be larger than 4 kB."""
    gin_flags.silence_libraries()
    state = save_steps(tmp_path, 1)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=6000))
    checkpoints = runs.RunCheckpoints(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(InputError) as error:
            checkpoints.save(state.replace(step=jnp.asarray(2), params={"kernel": kernel}), RECORD)
            for _ in range(300):  # without another save
                checkpoints.check_save()
                time.sleep(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/checkpoint_2 could not be saved: ")
    assert message.endswith("File too large: resume from checkpoint_1")
    checkpoints.close()
    assert runs.saved_steps(tmp_path) == [1] and capfd.readouterr() == ("", "")


def mov(num_experts: int, top_k: int | None = None) -> dict:
    def factory(**arguments):
        router = functools.partial(routing.Router, top_k=top_k)
        return adapters.VectorExperts(num_experts=num_experts, router=router, **arguments)

    return adapters.describe(adapters.Adapters(key=factory, value=factory, gate=factory))


SPARSE = sparse.describe(sparse.Sparse(8))
UPCYCLED = RECORD.base | {"needed": True, "upcycled": {"seed": 0, "noise": 0.0}}
FROZEN_BASE = RECORD.base | {"needed": True, "fingerprint": "f", "checksum": "1:a"}


def test_records_of_earlier_versions_are_of_dense_models():
    values = dataclasses.asdict(RECORD)
    del values["sparse"]
    assert parse_record(values, "record").sparse is None
    values["sparse"] = SPARSE
    assert parse_record(values, "record").sparse == SPARSE
    values["sparse"] = 8
    with pytest.raises(InputError, match="record: sparse: expected an object, got 8"):
        parse_record(values, "record")
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
        (
            {"base": RECORD.base | {"needed": True}, "seed": 0},
            {"base": RECORD.base | {"needed": True}, "seed": 1},
            "SEED 0 -> 1",
        ),
        ({"optimizer": "adafactor"}, {"optimizer": "adamw"}, "OPTIMIZER adafactor -> adamw"),
        ({"config": {"emb_dim": 8}}, {"config": {"emb_dim": 9}}, "T5Config.emb_dim 8 -> 9"),
        ({"trainable": [".*"]}, {"trainable": ["a"]}, "TRAINABLE ['.*'] -> ['a']"),
        (
            {"trainable": [".*"]},
            {"trainable": freezing.trainable_patterns([".*"], "router")},
            "FREEZE None -> router",
        ),
        (
            {"base": FROZEN_BASE},
            {"base": FROZEN_BASE | {"checksum": "1:b"}},
            "base checksum 1:a -> 1:b",
        ),
        # If the fingerprints differ, so do the checksums, which are then not listed.
        (
            {"base": FROZEN_BASE},
            {"base": FROZEN_BASE | {"fingerprint": "g", "checksum": "1:b"}},
            "base fingerprint f -> g",
        ),
        ({"vocabulary": "a"}, {"vocabulary": "b"}, "fingerprint of VOCAB_PATH a -> b"),
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


@pytest.mark.parametrize(
    ("saved", "current", "difference"),
    [
        ({"held_out": ["a", "b"]}, {"held_out": ["b"]}, "held-out datasets without a"),
        (
            {"trained_tasks": ["a", "b"]},
            {"trained_tasks": [*"bcdefg"]},
            "training tasks without a, with c, d, e and 2 more",
        ),
        ({"seed": 0}, {"seed": 1}, "SEED 0 -> 1"),
        ({"batches": {"PACK": True, "x": 0}}, {"batches": {"PACK": False}}, "PACK True -> False"),
    ],
)
def test_other_data_and_seeds_are_allowed_on_demand(saved, current, difference):
    before, after = (dataclasses.replace(RECORD, **changes) for changes in (saved, current))
    expected = f"to resume, got {difference}: change them back, pass --allow_changes, or choose"
    with pytest.raises(InputError, match=re.escape(expected)):
        same_run.check_same_run("run", before, after)
    assert same_run.check_same_run("run", before, after, allow_changes=True) == [difference]
    other = dataclasses.replace(after, optimizer="adafactor")
    with pytest.raises(InputError, match="OPTIMIZER adamw -> adafactor; .*: change them back, or"):
        same_run.check_same_run(
            "run", dataclasses.replace(before, optimizer="adamw"), other, allow_changes=True
        )


def test_the_base_of_a_run_that_trains_every_parameter_may_change():
    """Its checkpoints do not need the base."""
    before, after = (
        dataclasses.replace(RECORD, base=base | {"needed": False})
        for base in (FROZEN_BASE, FROZEN_BASE | {"checksum": "1:b"})
    )
    same_run.check_same_run("run", before, after)


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
