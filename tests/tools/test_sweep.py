"""`pemoe sweep`: running, resuming, refusing and reporting, with stand-ins for its commands."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from jsonl_folder import write_folder, write_vocabulary
from sweep_flags import FLAGS, TINY

from pemoe_jax import evaluate, train
from pemoe_jax.checkpoints import runs as checkpoints
from pemoe_jax.runtime import folder_lock
from pemoe_jax.tools import subprocesses, sweep

ROOT = pathlib.Path(__file__).parents[2]
TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(flag.removeprefix("--gin.").split("=", 1) for flag in sys.argv[1:])
folder = pathlib.Path(flags["MODEL_DIR"]); folder.mkdir(parents=True, exist_ok=True)
progress = folder / "progress"
cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
start = time.monotonic()
if flags.get("NUM_EXPERTS") == "13":
    sys.exit("error: thirteen is too many")
if os.environ.get("KILLED_RUN") == folder.name:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    for step in range(int(progress.read_text()) if progress.exists() else 0, 20):
        print("step", step, flush=True)
        (folder / "steps").open("a").write(f"{step} ")
        time.sleep(float(os.environ["STAND_IN_PAUSE"]))
        progress.write_text(str(step + 1))
        if os.environ.get("STOPPED_RUN") == folder.name:
            sys.exit(print("stopped by SIGTERM"))
    (folder / f"checkpoint_{flags['TRAIN_STEPS']}").mkdir(exist_ok=True)
    (folder / "process.json").write_text(json.dumps([start, time.monotonic(), cores]))
except KeyboardInterrupt:
    (folder / "saved").touch()
    sys.exit(130)
"""
EVALUATE = """
import json, pathlib, sys
flags = dict(flag.removeprefix("--gin.").split("=", 1) for flag in sys.argv[1:])
run = pathlib.Path(flags["CHECKPOINT_PATH"]); folder = pathlib.Path(flags["EVAL_OUTPUT_DIR"])
number = sum(map(ord, run.name)) % 10  # a different score for each run
task = {"dataset": "cb", "split": "x", "accuracy": number / 10, "chance": 0.5, "examples": 10}
known = {"name": run.name, "method": "mov", "variant": "mov", "step": 20, "checkpoint": run.name}
if "-seed" in run.name:
    name, seed = run.name.split("-seed")
    known |= {"seed": int(seed), "settings": name}
score = {"median": number / 10, "mean": number / 10, "chance": 0.5}
known |= {"datasets": {"cb": {**score, "prompts": 1, "examples": 10}}, "average": score}
folder.mkdir(parents=True, exist_ok=True)
predictions = folder / "predictions" / run.name
predictions.mkdir(parents=True, exist_ok=True)
lines = [json.dumps({"idx": i, "correct": i < number}) for i in range(10)]
(predictions / "cb_a.jsonl").write_text("\\n".join(lines))
(folder / "results.json").write_text(json.dumps({"runs": [{**known, "tasks": {"cb_a": task}}]}))
"""
DRIVER = """
import sys
from pemoe_jax.tools import sweep
sweep._MODULES.update(train="stand_in_train", evaluate="stand_in_evaluate")
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> pathlib.Path:
    """A folder with stand-ins for the training and evaluation modules, and a driver."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "stand_in_train.py").write_text(TRAIN)
    (folder / "stand_in_evaluate.py").write_text(EVALUATE)
    (folder / "driver.py").write_text(DRIVER)
    return folder


def use_stand_ins(modules: pathlib.Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PYTHONPATH", f"{modules}:{ROOT}")
    patch.setenv("STAND_IN_PAUSE", "0")
    patch.setitem(sweep._MODULES, "train", "stand_in_train")
    patch.setitem(sweep._MODULES, "evaluate", "stand_in_evaluate")


@pytest.fixture
def stand_ins(modules, monkeypatch) -> pathlib.Path:
    use_stand_ins(modules, monkeypatch)
    return modules


@pytest.fixture(scope="module")
def finished(modules, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished sweep; tests do not change it."""
    output = tmp_path_factory.mktemp("sweep") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        use_stand_ins(modules, patch)
        assert sweep.main(sweep_flags(output)) == 0
    return output


def sweep_flags(output: pathlib.Path, *more: str) -> list[str]:
    return ["methods/mov.gin", *FLAGS, f"--output={output}", "--seeds=0,1", *more]


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes and kills those still running, and so their children, at the end."""
    started: list[subprocess.Popen] = []

    def start(command: list, **options) -> subprocess.Popen:
        started.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, process=None) -> None:
    deadline = time.monotonic() + 300  # the machine may be busy with other tests
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def table(output: pathlib.Path) -> str:
    return (output / "report.md").read_text() + (output / "report.json").read_text()


def steps(output: pathlib.Path) -> str:
    return (output / "mov-seed0" / "steps").read_text()


def test_report_and_skipping_of_finished_runs(finished, stand_ins, capsys):
    rows = {row["run"]: row for row in json.loads((finished / "report.json").read_text())["rows"]}
    assert set(rows) == {"mov", "base.safetensors"} and rows["mov"]["seeds"] == [0, 1]
    scores = [sum(map(ord, f"mov-seed{seed}")) % 10 / 10 for seed in (0, 1)]
    assert rows["mov"]["average"]["median"] == pytest.approx(100 * sum(scores) / 2)
    assert (finished / "report.png").is_file() and (finished / "report.csv").is_file()
    about = json.loads((finished / "run.json").read_text())
    assert (about["status"], about["experiments"]) == ("finished", ["methods/mov.gin"])
    capsys.readouterr()
    before = steps(finished)
    assert sweep.main(sweep_flags(finished)) == 0
    assert capsys.readouterr().out.count("already finished") == 3
    assert steps(finished) == before and len(before.split()) == 20


def test_gains_of_experiments_that_start_from_others(finished, stand_ins, tmp_path):
    output = shutil.copytree(finished, tmp_path / "copy")
    tuned = "methods/mov.gin+NUM_EXPERTS=3"
    _, *flags = sweep_flags(output)
    assert sweep.main(["methods/mov.gin", tuned, f"{tuned}+FROM=mov", *flags]) == 0
    *_, row, _, _ = (output / "gains.md").read_text().splitlines()
    name = "mov_NUM_EXPERTS=3"
    scores = [
        [sum(map(ord, f"{run}-seed{seed}")) % 10 for run in (f"{name}_FROM=mov", name)]
        for seed in (0, 1)
    ]
    differences = [10 * (run - direct) for run, direct in scores]
    gain = f"{sum(differences) / 2:+.1f} ±{abs(differences[0] - differences[1]) / 2**0.5:.1f}"
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *(f"{name}_FROM=mov", "2", gain, gain)
    ]


def test_the_best_value_is_chosen(stand_ins, tmp_path, monkeypatch, capsys):
    """A training that fails is not chosen, and neither it nor the others are repeated."""
    output = tmp_path / "chosen"
    _, *flags = sweep_flags(output, "--no_base", "--jobs=2")
    flags = ["methods/mov.gin+NUM_EXPERTS=best(2,3,5,13)", *flags]
    assert sweep.main(flags) == 1  # 13 fails
    (choice,) = json.loads((output / "choices.json").read_text())["choices"]
    name = "mov_NUM_EXPERTS={}-seed0"
    scores = {v: sum(map(ord, name.format(v))) % 10 * 10.0 for v in ("2", "3", "5")}
    assert choice == {
        "experiment": "mov",
        "setting": "NUM_EXPERTS",
        "scores": pytest.approx({**scores, "13": None}),
        "value": max(scores, key=lambda v: scores[v]),
    }
    state = json.loads((output / "mov-seed1" / "sweep.json").read_text())
    assert state["settings"]["NUM_EXPERTS"] == choice["value"]
    assert f"| {choice['value']}" in (output / "choices.md").read_text()
    assert "seed1" in table(output) and "NUM_EXPERTS=" in table(output / "choices")
    capsys.readouterr()
    assert sweep.main(flags) == 1
    assert capsys.readouterr().out.count("already finished") == 5


def test_claims_are_compared(finished, stand_ins, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "copy")
    claim = {"id": "a", "claim": "MoV-3 is better.", "paper": "unknown", "source": "a file"}
    claim |= {"plus": ["mov_NUM_EXPERTS=3"], "minus": ["mov"]}
    (tmp_path / "claims.json").write_text(json.dumps({"claims": [claim]}))
    _, *flags = sweep_flags(output, f"--claims={tmp_path / 'claims.json'}")
    assert sweep.main(["methods/mov.gin", "methods/mov.gin+NUM_EXPERTS=3", *flags]) == 0
    report = json.loads((output / "claims.json").read_text())
    score = {
        name: [10.0 * (sum(map(ord, f"{name}-seed{seed}")) % 10) for seed in (0, 1)]
        for name in ("mov", "mov_NUM_EXPERTS=3")
    }
    base, *experiments = report["experiments"]
    assert {row["experiment"]: row["accuracies"] for row in experiments} == score
    assert base["experiment"] == "base" and report["choices"] == []
    (measured,) = report["claims"]
    assert measured["differences"] == [
        a - b for a, b in zip(score["mov_NUM_EXPERTS=3"], score["mov"], strict=True)
    ]
    assert "MoV-3 is better." in (output / "claims.md").read_text()
    assert (output / "claims.png").is_file()
    assert f"1 claims: 1 {measured['verdict']}" in capsys.readouterr().out


def test_state_files_of_earlier_versions(finished, stand_ins, tmp_path, capsys):
    """Earlier versions wrote these keys in this form."""
    output = shutil.copytree(finished, tmp_path / "copy")
    state = json.loads((output / "mov-seed0" / "sweep.json").read_text())
    assert list(state) == ["settings", "scoring", "train", "evaluate"]
    old = {**state, "train": 88.2, "evaluate": 28.0}
    (output / "mov-seed0" / "sweep.json").write_text(json.dumps(old, indent=1) + "\n")
    assert sweep.main(sweep_flags(output)) == 0
    assert capsys.readouterr().out.count("already finished") == 3


@pytest.mark.parametrize("seconds", [-1, True, "1", [1], float("nan")])
def test_damaged_state_files(finished, stand_ins, tmp_path, capsys, seconds):
    output = shutil.copytree(finished, tmp_path / "copy")
    file = output / "mov-seed0" / "sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "train": seconds}))
    assert sweep.main(sweep_flags(output)) == 1
    assert "sweep.json: expected the state of a sweep's run; delete " in capsys.readouterr().err


def wait_for_step_4(output: pathlib.Path, process: subprocess.Popen | None = None) -> None:
    """Waits until the sweep's first training has reached step 4."""
    progress = output / "mov-seed0" / "progress"
    wait_for(lambda: progress.exists() and int(progress.read_text() or 0) > 3, process)


def check_resumes(output: pathlib.Path, finished: pathlib.Path) -> None:
    """The report equals that of an uninterrupted sweep; at most one step is repeated."""
    taken = steps(output)
    time.sleep(0.8)
    assert steps(output) == taken  # the training ended with its sweep
    assert sweep.main(sweep_flags(output)) == 0
    assert table(output) == table(finished)
    taken = steps(output).split()
    assert list(map(int, dict.fromkeys(taken))) == list(range(20)) and len(taken) <= 21


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_sweep_saves_and_resumes(
    finished, stand_ins, monkeypatch, tmp_path, capsys, number
):
    output = tmp_path / "interrupted"
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        wait_for_step_4(output)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    try:
        with monkeypatch.context() as slow:
            slow.setenv("STAND_IN_PAUSE", "0.2")
            thread.start()
            assert sweep.main(sweep_flags(output, "--jobs=2")) == 130
    finally:
        thread.join()
        signal.signal(signal.SIGINT, previous)
    assert "run the same command to continue" in capsys.readouterr().err
    assert (output / "mov-seed0" / "saved").exists()
    assert all((file.parent / "saved").exists() for file in output.glob("mov-seed*/progress"))
    check_resumes(output, finished)


def test_jobs_run_at_the_same_time(finished, stand_ins, monkeypatch, tmp_path, capsys):
    """Each waits for the run that it starts from, and on Linux has cores of its own."""
    monkeypatch.setenv("STAND_IN_PAUSE", "0.05")
    output = tmp_path / "parallel"
    _, *flags = sweep_flags(output, "--jobs=2", "--no_base")
    assert sweep.main(["methods/mov.gin", "methods/mov.gin+FROM=mov", *flags]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " average " in line]
    assert sorted(line[:5] for line in lines) == [f"[{number}/4]" for number in range(1, 5)]
    names = [f"mov{start}-seed{seed}" for start in ("", "_FROM=mov") for seed in (0, 1)]
    processes = [json.loads((output / name / "process.json").read_text()) for name in names]
    starts, ends, cores = zip(*processes, strict=True)
    assert max(starts[:2]) < min(ends[:2])
    assert starts[2] > ends[0] and starts[3] > ends[1]
    if sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1:
        assert not set(cores[0]) & set(cores[1])


def test_cores_are_split(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3}, raising=False)
    assert subprocesses.split_cores(1) == [[]]
    assert subprocesses.split_cores(2) == [[0, 3], [2]]
    assert subprocesses.split_cores(4) == [[0], [2], [3], [0]]


def test_killed_sweep_kills_its_training_and_resumes(finished, stand_ins, processes, tmp_path):
    output = tmp_path / "killed"
    process = processes(
        [sys.executable, stand_ins / "driver.py", *sweep_flags(output)],
        env={**os.environ, "STAND_IN_PAUSE": "0.2"},
    )
    wait_for_step_4(output, process)
    process.kill()
    process.wait()
    time.sleep(0.5)
    check_resumes(output, finished)


def test_killed_training_leaves_the_other_runs(finished, stand_ins, monkeypatch, tmp_path, capsys):
    output = tmp_path / "killed"
    with monkeypatch.context() as killing:
        killing.setenv("KILLED_RUN", "mov-seed0")
        assert sweep.main(sweep_flags(output)) == 1
    captured = capsys.readouterr()
    assert "FAILED in train, ended by SIGKILL, often for lack of memory" in captured.out
    assert "1 of 3 runs failed (mov-seed0): run the same command to retry them" in captured.err
    assert "seed1" in table(output) and "seed0" not in table(output)
    assert sweep.main(sweep_flags(output)) == 0
    assert table(output) == table(finished)


def test_a_training_that_sigterm_stops_is_not_finished(
    finished, stand_ins, monkeypatch, tmp_path, capsys
):
    """It has saved and exits with 0."""
    output = tmp_path / "stopped"
    with monkeypatch.context() as stopping:
        stopping.setenv("STOPPED_RUN", "mov-seed0")
        assert sweep.main(sweep_flags(output, "--stop_at_failure")) == 1
    assert "FAILED in train, stopped by SIGTERM (log: " in capsys.readouterr().out
    assert not (output / "mov-seed0" / "results").exists()
    assert sweep.main(sweep_flags(output)) == 0
    assert table(output) == table(finished)


def children(parent: int) -> list[int]:
    """Returns the processes that a process started (Linux)."""
    return [*map(int, pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]


def test_failed_runs_are_reported(stand_ins, tmp_path, capsys):
    bad, good = "methods/mov.gin+NUM_EXPERTS=13", "methods/mov.gin"
    flags = [bad, good, *FLAGS, "--no_base"]
    assert sweep.main([*flags, f"--output={tmp_path / 'a'}"]) == 1
    captured = capsys.readouterr()
    assert "FAILED in train, exit code 1: error: thirteen is too many (log: " in captured.out
    assert "1 of 2 runs failed (mov_NUM_EXPERTS=13-seed0)" in captured.err
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    assert about["status"] == "failed"
    assert captured.err.endswith(f"\nerror: {about['reason']}\n")
    assert (tmp_path / "a" / "mov-seed0" / "results").is_dir()
    # A failed training may have left a checkpoint, from which no other run may start.
    flags.insert(2, "methods/ia3.gin+FROM=mov_NUM_EXPERTS=13")
    assert sweep.main([*flags, f"--output={tmp_path / 'a'}"]) == 1
    reason = "FAILED in train: mov_NUM_EXPERTS=13-seed0, which it starts FROM, is not trained"
    assert reason in capsys.readouterr().out
    assert sweep.main([*flags, f"--output={tmp_path / 'b'}", "--stop_at_failure"]) == 1
    assert not (tmp_path / "b" / "mov-seed0").exists()


def test_changed_settings_are_refused_and_changed_evaluation_is_repeated(
    finished, stand_ins, tmp_path, capsys
):
    output = shutil.copytree(finished, tmp_path / "copy")
    assert sweep.main(sweep_flags(output, "--gin.BATCH_SIZE=3")) == 1
    error = capsys.readouterr().err
    assert "expected BATCH_SIZE = 32, the setting of its run, got 3; choose another" in error
    # settings that no result depends on may change
    assert sweep.main(sweep_flags(output, "--gin.LOG_PERIOD=3")) == 0
    assert capsys.readouterr().out.count("already finished") == 3
    (output / "mov-seed0" / "results" / "stale").touch()
    assert sweep.main(sweep_flags(output, "--evaluate=runs/evaluate.gin+EVAL_EXAMPLES=4")) == 0
    assert "already finished" not in capsys.readouterr().out
    assert len(steps(output).split()) == 20  # evaluated again, not trained again
    assert not (output / "mov-seed0" / "results" / "stale").exists()


def test_other_folders_are_refused(stand_ins, tmp_path, capsys):
    (tmp_path / "out" / "mov-seed1").mkdir(parents=True)
    (tmp_path / "out" / "mov-seed1" / "precious").touch()
    assert sweep.main(sweep_flags(tmp_path / "out")) == 1
    assert "mov-seed1: expected a run of a sweep" in capsys.readouterr().err
    assert not (tmp_path / "out" / "mov-seed0").exists()


def test_two_sweeps_in_one_folder_are_refused(stand_ins, processes, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    monkeypatch.setenv("STAND_IN_PAUSE", "0.3")
    first = processes([sys.executable, stand_ins / "driver.py", *sweep_flags(output)])
    wait_for_step_4(output, first)
    monkeypatch.setattr(folder_lock, "TIMEOUT", 0.0)
    assert sweep.main(sweep_flags(output)) == 1
    assert f"in use by process {first.pid} on " in capsys.readouterr().err


# --- running, with real trainings ---


@pytest.mark.slow
def test_killed_trainings_end_like_uninterrupted_ones(processes, tmp_path):
    """Kills the first training, and then the sweep: parameters and scores are equal."""
    write_folder(tmp_path / "tasks")
    write_vocabulary(tmp_path / "vocab.model")
    data = [f"--gin.JSONL_DIR={tmp_path / 'tasks'}", f"--gin.VOCAB_PATH={tmp_path}/vocab.model"]
    data += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}", "--gin.BATCH_SIZE=8"]
    flags = [*TINY, *data, "--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.LEARNING_RATE=0.02"]
    flags += ["--gin.VOCAB_SIZE=256", "--gin.TRAIN_STEPS=160", "--gin.LOG_PERIOD=20"]
    flags += [f"--gin.network.T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")]
    flags += ["--gin.CHECKPOINT_PERIOD=20"]
    parts, name = tmp_path / "parts", "mov-seed1"
    sweep_command = ["methods/mov.gin", *flags, "--evaluate=runs/evaluate.gin", "--seeds=1"]
    sweep_command += ["--no_base", f"--output={parts}"]
    command = [sys.executable, "-m", "pemoe_jax", "sweep", *sweep_command]

    process = processes(command)
    wait_for(lambda: checkpoints.saved_steps(parts / name), process)
    (training,) = children(process.pid)
    os.kill(training, signal.SIGKILL)
    assert process.wait() == 1
    saved = checkpoints.saved_steps(parts / name)
    process = processes(command)
    wait_for(lambda: checkpoints.saved_steps(parts / name) > saved, process)
    process.kill()
    process.wait()
    assert saved < [160] and checkpoints.saved_steps(parts / name) < [160]
    assert sweep.main(sweep_command) == 0

    # Without a sweep, and in this process, which has imported and compiled most of it.
    seeded = ["--gin.SEED=1", f"--gin.MODEL_DIR={tmp_path / name}"]
    assert train.main(["--gin_file=methods/mov.gin", *flags, *seeded]) == 0
    whole, _, _ = checkpoints.open_trained(str(tmp_path / name))
    resumed, _, step = checkpoints.open_trained(str(parts / name))
    assert step == 160 and whole.keys() == resumed.keys()
    for path, array in whole.items():
        assert (array.read() == resumed[path].read()).all(), path
    outputs = [f"--gin.CHECKPOINT_PATH={tmp_path / name}"]
    outputs += [f"--gin.EVAL_OUTPUT_DIR={tmp_path / 'scores'}"]
    assert evaluate.main(["--gin_file=runs/evaluate.gin", *data, *outputs]) == 0
    predictions = sorted((parts / name / "results" / "predictions").glob("*/*.jsonl"))
    assert predictions
    for file in predictions:
        expected = tmp_path / "scores" / "predictions" / name / file.name
        for lines in zip(*(f.read_text().splitlines() for f in (file, expected)), strict=True):
            row, expected_row = map(json.loads, lines)
            assert row.pop("scores") == pytest.approx(expected_row.pop("scores"), abs=1e-4)
            assert row == expected_row
    (row,) = json.loads((parts / "report.json").read_text())["rows"]
    assert (row["run"], row["method"]) == (name, "mov-10")
