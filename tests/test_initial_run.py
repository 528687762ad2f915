"""Runs that continue from another run: INITIAL_CHECKPOINT_PATH is a run of this package."""

import pathlib
import shutil

import numpy as np
import pytest
from test_train import assert_ends_alike, train_flags
from test_train import folder as folder  # a fixture

from pemoe_jax import train
from pemoe_jax.checkpoints import initial_run, models, runs
from pemoe_jax.checkpoints.records import Record
from pemoe_jax.core import params as params_lib
from pemoe_jax.tools import convert

# Nothing changes in a step: a run's parameters are those that it starts from.
STILL = {
    "LEARNING_RATE": 0.0,
    "TRAIN_STEPS": 1,
    "optim.create_learning_rate_scheduler.min_learning_rate": 0.0,
}
SPARSE = {"SPARSE_STEP": 1, "NUM_EXPERTS": 4, "UPCYCLE_NOISE": 0.05}


@pytest.fixture(scope="module")
def adapter_run(folder, tmp_path_factory) -> pathlib.Path:
    """A run of MoV, whose base is a file."""
    path = tmp_path_factory.mktemp("initial") / "mov"
    assert train.main(train_flags(folder, "mov", path, TRAIN_STEPS=3)) == 0
    return path


@pytest.fixture(scope="module")
def sparse_run(folder, tmp_path_factory) -> pathlib.Path:
    """An upcycled run whose routers do not train."""
    path = tmp_path_factory.mktemp("initial") / "flan"
    flags = train_flags(folder, "flan_st", path, **SPARSE, TRAIN_STEPS=2, FREEZE="router")
    assert train.main(flags) == 0
    return path


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    params = params_lib.flatten(models.open_model(str(path)).load())
    return {name: np.asarray(array) for name, array in params.items()}


def assert_equal_parameters(first: pathlib.Path, second: pathlib.Path) -> None:
    arrays, others = load(first), load(second)
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, others[name]), name


def test_adapters_continue_on_the_base_of_their_run(folder, adapter_run, tmp_path, capsys):
    def run(path: pathlib.Path, **macros) -> int:
        settings = {"INITIAL_CHECKPOINT_PATH": adapter_run, "MIXTURE_OR_TASK_NAME": "check_1"}
        return train.main(train_flags(folder, "mov", path, **settings | macros))

    assert run(tmp_path / "still", SEED=3, **STILL) == 0
    out = capsys.readouterr().out
    assert f"\ninitial run  {adapter_run}, a run of mov, fingerprint " in out
    assert "settings that differ" not in out
    assert_equal_parameters(tmp_path / "still", adapter_run)
    before, record = (runs.read_record(str(path)) for path in (adapter_run, tmp_path / "still"))
    assert record.base == before.base and record.counts == before.counts
    assert record.trained_tasks == ["check_1", *before.trained_tasks]
    assert record.trained_datasets == ["check", *before.trained_datasets]

    # A run of the base cannot resume as one that started from a run, such as itself.
    copy = shutil.copytree(adapter_run, tmp_path / "copy")
    assert run(copy, TRAIN_STEPS=9, INITIAL_CHECKPOINT_PATH=copy) == 1
    assert "INITIAL_CHECKPOINT_PATH, a run with fingerprint none -> " in capsys.readouterr().err

    exported = tmp_path / "exported"
    assert convert.main(["adapter", str(adapter_run), str(exported)]) == 0
    assert run(tmp_path / "colleague", INITIAL_CHECKPOINT_PATH=exported, **STILL) == 0
    assert_equal_parameters(tmp_path / "colleague", adapter_run)

    # A stopped run ends as a whole one, and cannot resume as a run of the base.
    assert run(tmp_path / "whole", TRAIN_STEPS=4, INITIAL_CHECKPOINT_PATH=copy) == 0
    assert run(tmp_path / "parts", TRAIN_STEPS=2) == 0
    base = folder / "base.safetensors"
    assert run(tmp_path / "parts", TRAIN_STEPS=4, INITIAL_CHECKPOINT_PATH=base) == 1
    assert "INITIAL_CHECKPOINT_PATH, a run with fingerprint " in capsys.readouterr().err
    assert run(tmp_path / "parts", TRAIN_STEPS=4) == 0
    assert_ends_alike(tmp_path / "whole", tmp_path / "parts")

    # The path of the initial run is no setting that distinguishes seeds.
    settings = [
        initial_run.fingerprint_settings(str(path), runs.read_record(str(path)))
        for path in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert settings[0] == settings[1]


def test_settings_that_do_not_change_shapes_may_differ(folder, adapter_run, tmp_path, capsys):
    flags = train_flags(folder, "mov", tmp_path, INITIAL_CHECKPOINT_PATH=adapter_run, **STILL)
    flags.insert(2, "--gin_file=routing/top_2.gin")
    assert train.main(flags) == 0
    line = f"settings that differ from those of {adapter_run}: router.top_k None -> 2 at key, value"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "macros", "message"),
    [
        ("mov", {"NUM_EXPERTS": 5}, "mov -> mov, num_experts 10 -> 5 at key, value, gate"),
        ("lora", {}, "mov -> lora, adapters at key, value, gate -> query, key, "),
        ("full", {}, "mov -> full, adapters at key, value, gate -> none\n"),
        (
            "mov",
            {"TRAINABLE": "['.*/router/.*']"},
            "TRAINABLE and FREEZE must not freeze parameters that the initial run ",
        ),
        ("mov", {"UPCYCLE_NOISE": 0.1}, "UPCYCLE_NOISE must be 0.0, as in the run "),
    ],
)
def test_another_shape_is_refused_with_both(
    folder, adapter_run, tmp_path, capsys, method, macros, message
):
    settings = {"INITIAL_CHECKPOINT_PATH": adapter_run} | macros
    assert train.main(train_flags(folder, method, tmp_path / "run", **settings)) == 1
    error = capsys.readouterr().err
    assert message in error and str(adapter_run) in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_base_that_was_moved(folder, adapter_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        runs, "read_record", lambda path, read=runs.read_record: move_base(read(path))
    )
    flags = train_flags(folder, "mov", tmp_path / "run", INITIAL_CHECKPOINT_PATH=adapter_run)
    assert train.main(flags) == 1
    message = f"{adapter_run} belongs to the base /nowhere, which does not exist\n"
    assert capsys.readouterr().err.endswith(message)


def move_base(record: Record) -> Record:
    record.base["path"] = "/nowhere"
    return record


@pytest.mark.slow
def test_a_sparse_model_continues_with_the_frozen_parts_of_its_run(
    folder, sparse_run, tmp_path, capsys
):
    """The seed and the noise of its upcycling are those of the run."""

    def run(name: str, **macros) -> int:
        settings = SPARSE | STILL | {"INITIAL_CHECKPOINT_PATH": sparse_run, "SEED": 5} | macros
        return train.main(train_flags(folder, "flan_st", tmp_path / name, **settings))

    assert run("frozen", FREEZE="router", UPCYCLE_NOISE=0.0) == 0
    assert_equal_parameters(tmp_path / "frozen", sparse_run)
    record = runs.read_record(str(tmp_path / "frozen"))
    assert record.base["upcycled"] == {"seed": 0, "noise": 0.05} and record.base["needed"]
    assert run("all") == 0
    assert_equal_parameters(tmp_path / "all", sparse_run)
    assert not runs.read_record(str(tmp_path / "all")).base["needed"]
    capsys.readouterr()
    assert run("experts", FREEZE="experts") == 1
    assert "frozen arrays of flan_st, such as decoder/layers_0/mlp/expert/" in (
        capsys.readouterr().err
    )
    assert run("eight", NUM_EXPERTS=8) == 1
    assert f"got {sparse_run}: flan_st -> flan_st, NUM_EXPERTS 4 -> 8\n" in (
        capsys.readouterr().err
    )

    settings = {"INITIAL_CHECKPOINT_PATH": sparse_run}
    assert train.main(train_flags(folder, "full", tmp_path / "dense", **settings)) == 1
    assert f"got {sparse_run}: flan_st -> full, sparse layers with 4 experts -> none\n" in (
        capsys.readouterr().err
    )

    # Of a whole model, any part may freeze, and adapters are new.
    settings = {"INITIAL_CHECKPOINT_PATH": tmp_path / "all", "UPCYCLE_NOISE": 0.0}
    assert run("experts", FREEZE="experts", **settings) == 0
    assert_equal_parameters(tmp_path / "experts", sparse_run)
    record = runs.read_record(str(tmp_path / "experts"))
    assert record.initial["path"] == str(tmp_path / "all") and record.base["needed"]
    assert record.initial["fingerprint"] == record.base["fingerprint"]
