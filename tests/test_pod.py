"""Two processes with two virtual devices each compute the same as one process on one device."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import assert_moved_alike, data_flags, train_flags
from test_train import folder as folder  # a fixture

from pemoe_jax import train
from pemoe_jax.checkpoints import runs
from pemoe_jax.runtime import distributed, file_io
from pemoe_jax.tools import verify

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = REPO / "launch" / "local_processes.sh"
# 4 × 1 and 1 × 4 are in test_a_run_resumes_on_other_meshes, for some of the steps.
MESHES = {"2x2": {"MODEL_PARALLELISM": 2}, "fsdp": {"FSDP": True}}
# Without packing: with two shards, packed rows would hold other examples.
SETTINGS = {"PACK": False, "LOG_PERIOD": 1, "CHECKPOINT_PERIOD": 2, "KEEP_CHECKPOINTS": None}
SETTINGS["optim.adamw.eps"] = 1e-3  # see test_train.test_a_run_resumes_in_another_form

pytestmark = pytest.mark.slow


Command = tuple[str, list[str]]  # of the package, and its flags

# Commands run in one process, since most of a command's time goes to imports.
IN_TURN = """
import importlib, json, sys
for name, flags in json.loads(sys.argv[1]):
    assert importlib.import_module(f"pemoe_jax.{name}").main(flags) == 0
"""


def in_turn(*commands: Command) -> list[str]:
    return [sys.executable, "-c", IN_TURN, json.dumps(commands)]


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of the tests with one device."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, **more}


def run_in_two(command: list[str]) -> None:
    subprocess.run(
        [str(SCRIPT), "2", *command],
        env=environment(DEVICES_PER_PROCESS="2"),
        check=True,
        cwd=REPO,
        timeout=900,
    )


def mov_flags(folder, model_dir, **macros) -> list[str]:
    return train_flags(folder, "mov", model_dir, **{**SETTINGS, "TRAIN_STEPS": 4, **macros})


def losses(model_dir: pathlib.Path) -> dict[int, float]:
    rows = map(json.loads, (model_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows}


def scores(output: pathlib.Path) -> np.ndarray:
    files = sorted((output / "predictions").glob("*/*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert lines
    return np.array([score for line in lines for score in line["scores"]])


def evaluation(folder, checkpoint, output, **macros) -> list[str]:
    return [
        "--gin_file=runs/evaluate.gin",
        f"--gin.CHECKPOINT_PATH={checkpoint}",
        f"--gin.EVAL_OUTPUT_DIR={output}",
        *data_flags(folder),
        *(f"--gin.{name}={value}" for name, value in macros.items()),
    ]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> pathlib.Path:
    """A run of one process on one device, scored."""
    root = tmp_path_factory.mktemp("alone")
    command = in_turn(
        ("train", mov_flags(folder, root / "run")),
        ("evaluate", evaluation(folder, root / "run", root / "scores")),
    )
    subprocess.run(command, env=environment(), check=True, cwd=REPO)
    return root


@pytest.fixture(scope="module")
def in_two(folder, tmp_path_factory) -> pathlib.Path:
    """Runs of two processes on each mesh, scored, and one that changes its mesh after two steps."""
    root = tmp_path_factory.mktemp("in_two")
    commands: list[Command] = []
    for mesh, macros in MESHES.items():
        run = root / mesh / "run"
        scoring = evaluation(folder, run, root / mesh / "scores", **macros)
        commands += [("train", mov_flags(folder, run, **macros)), ("evaluate", scoring)]
    changes = root / "changes"
    commands += [
        ("train", mov_flags(folder, changes, MODEL_PARALLELISM=1, TRAIN_STEPS=2)),
        ("train", mov_flags(folder, changes, MODEL_PARALLELISM=4, TRAIN_STEPS=3)),
    ]
    run_in_two(in_turn(*commands))
    return root


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_equal_one(alone, in_two, mesh):
    actual, expected = losses(in_two / mesh / "run"), losses(alone / "run")
    assert actual.keys() == expected.keys() == {1, 2, 3, 4}
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), step
    assert_moved_alike(alone / "run", in_two / mesh / "run")
    np.testing.assert_allclose(  # scores are written with five decimals
        scores(in_two / mesh / "scores"), scores(alone / "scores"), rtol=1e-5, atol=1.1e-5
    )


def test_a_run_resumes_on_other_meshes(folder, alone, in_two):
    """Two steps on 4 × 1, one on 1 × 4, one by a single process equal a run of one process."""
    run = in_two / "changes"
    assert train.main(mov_flags(folder, run)) == 0
    actual, expected = losses(run), losses(alone / "run")
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), step
    assert_moved_alike(alone / "run", run)


def test_a_run_in_a_bucket(folder, alone, gcs):
    """Two processes write it, over half of a checkpoint that a killed run left, and resume it."""
    run = file_io.to_path("gs://bucket/run")
    gcs.objects["bucket/run/checkpoint_4/state/left"] = b"half", 1
    macros = {**MESHES["fsdp"], "KEEP_CHECKPOINTS": 1}
    commands = [("train", mov_flags(folder, run, **macros, TRAIN_STEPS=n)) for n in (2, 4)]
    run_in_two(in_turn(*commands))
    lines = [json.loads(line) for line in gcs.read(run / "metrics.jsonl").splitlines()]
    expected = losses(alone / "run")
    assert [line["step"] for line in lines] == [*expected]
    for line in lines:
        assert line["train/loss"] == pytest.approx(expected[line["step"]], rel=1e-5), line
    names = gcs.names(run)
    assert {name.split("/")[0] for name in names if "/" in name} == {"checkpoint_4", "tensorboard"}
    assert "checkpoint_4/state/left" not in names and ".lock" not in names
    assert verify.verify(str(run)) == 1
    assert_moved_alike(alone / "run", run)


TRAIN = [sys.executable, "-m", "pemoe_jax.train"]
PEER_FAILED = "another process of the run has ended or cannot be reached: start all of them again"
PATIENCE = distributed.HEARTBEAT_SECONDS + 60  # and time to end on a busy machine


def start_two(arguments: list[str], folder: pathlib.Path) -> list[subprocess.Popen]:
    """Starts two processes with stderr in `errors_<number>`: a full pipe would block them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = []
    for number in (0, 1):
        variables = environment(
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number)
        )
        with (folder / f"errors_{number}").open("w") as errors:
            both.append(
                subprocess.Popen(
                    arguments, env=variables, cwd=REPO, stdout=subprocess.DEVNULL, stderr=errors
                )
            )
    return both


def last_error(file: pathlib.Path) -> str:
    """Returns the last line of stderr, which must be the only line that this package printed."""
    for _ in range(100):  # the watchdog may outlive the process by a moment
        lines = file.read_text().splitlines()
        errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        if errors:
            break
        time.sleep(0.1)
    assert errors == [len(lines) - 1], "\n".join(lines)
    return lines[-1]


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory) -> tuple[pathlib.Path, int]:
    """A run whose process 1 was killed, and the exit code of process 0; its errors are beside."""
    root = tmp_path_factory.mktemp("killed")
    run = root / "run"
    flags = mov_flags(folder, run, TRAIN_STEPS=100_000, KEEP_CHECKPOINTS=2)
    both = start_two([*TRAIN, *flags], root)
    try:
        deadline = time.monotonic() + 600
        while len(runs.saved_steps(run)) < 2:
            assert time.monotonic() < deadline and both[0].poll() is None, "no checkpoint"
            time.sleep(0.5)
        both[1].kill()
        return run, both[0].wait(PATIENCE)
    finally:
        for process in both:
            process.kill()


def test_a_killed_process_ends_the_other(killed):
    """Within a bounded time and with one line."""
    run, code = killed
    assert code != 0 and PEER_FAILED in last_error(run.parent / "errors_0")


def test_a_signal_to_any_process_saves_on_all(folder, killed, tmp_path):
    """Both resume after a kill from the last checkpoint, and stop after the same step.

    An interrupt is handled as SIGTERM: the process sends it to itself, and JAX tells the others.
    """
    run, _ = killed
    saved = max(runs.saved_steps(run))
    last = max(saved, *losses(run))
    flags = mov_flags(folder, run, TRAIN_STEPS=100_000, CHECKPOINT_PERIOD=100_000)
    both = start_two([*TRAIN, *flags], tmp_path)
    try:
        deadline = time.monotonic() + 600
        while max(losses(run)) < last + 3:
            assert time.monotonic() < deadline and both[0].poll() is None, "no steps"
            time.sleep(0.5)
        both[1].send_signal(signal.SIGINT)
        codes = [process.wait(60) for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [0, 0], [(tmp_path / f"errors_{i}").read_text() for i in (0, 1)]
    assert json.loads((run / "run.json").read_text())["first_step"] == saved
    assert runs.saved_steps(run)[-1] == [*losses(run)][-1]
    assert [*losses(run)] == [*range(1, len(losses(run)) + 1)]


WAIT = """
import pathlib, sys, time
from pemoe_jax.runtime import distributed
distributed.HEARTBEAT_SECONDS = 10
distributed.initialize()
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_an_idle_process_ends_too(tmp_path, killed):
    """Whichever is killed: process 0, which runs JAX's coordination service, or the other."""
    both = start_two([sys.executable, "-c", WAIT, str(tmp_path / "up")], tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline, "not up"
            time.sleep(0.1)
        both[killed].kill()
        code = both[1 - killed].wait(PATIENCE)
    finally:
        for process in both:
            process.kill()
    assert code != 0 and PEER_FAILED in last_error(tmp_path / f"errors_{1 - killed}")
