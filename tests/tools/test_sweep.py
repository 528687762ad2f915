"""`pemoe sweep`: what it plans, runs, resumes after a kill, refuses, and reports."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from jsonl_folder import write_folder, write_vocabulary

from pemoe_jax.checkpoints import runs as checkpoints
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags
from pemoe_jax.tools import subprocesses, sweep

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/finetune.gin"]
FLAGS = [*TINY, "--evaluate=runs/evaluate.gin", "--gin.JSONL_DIR=tasks", "--gin.TRAIN_STEPS=9"]
FLAGS += ["--gin.INITIAL_CHECKPOINT_PATH=base.safetensors"]


def plan(*flags: str) -> list[sweep.Run]:
    rest, bindings = gin_flags.split_bindings(sweep.expand_argument_files(flags))
    return sweep.plan_runs(sweep.FLAGS.parse_args(rest), bindings)


# --- the plan ---


def test_runs_are_experiments_times_seeds_and_their_bases():
    found = plan("methods/mov.gin", "methods/ia3.gin", *FLAGS, "--output=out", "--seeds=0,7")
    assert [str(run.folder) for run in found] == [
        *("out/base", "out/mov-seed0", "out/mov-seed7", "out/ia3-seed0", "out/ia3-seed7")
    ]
    base, first, *_ = found
    assert base.train == [] and [name for name, _ in base.commands()] == ["evaluate"]
    assert "--gin.CHECKPOINT_PATH=base.safetensors" in base.evaluate
    assert "--gin.CHECKPOINT_PATH=out/mov-seed0" in first.evaluate
    assert {"--gin.SEED=0", "--gin.MODEL_DIR=out/mov-seed0"} <= set(first.train)
    assert first.settings["SEED"] == "0" and first.settings["TRAIN_STEPS"] == "9"
    assert plan("methods/mov.gin", *FLAGS, "--output=out", "--no_base")[0].train


def test_order_of_files_and_settings():
    """A method's files stand before the run file, whose settings win; an experiment's own last."""
    experiment = "methods/mov.gin+routing/top_2.gin+NUM_EXPERTS=3+LEARNING_RATE=1e+3"
    (_, run) = plan(experiment, *FLAGS, "--output=out", "--gin.NUM_EXPERTS=5")
    assert run.folder.name == "mov_top_2_NUM_EXPERTS=3_LEARNING_RATE=1e_3-seed0"
    files = [flag.removeprefix("--gin_file=") for flag in run.train if "gin_file" in flag]
    assert files == ["methods/mov.gin", "routing/top_2.gin", TINY[0][11:], TINY[1][11:]]
    assert run.settings["NUM_EXPERTS"] == "3" and run.settings["LEARNING_RATE"] == "1000.0"
    assert run.settings["routing.Router.top_k"] == "2"


def test_where_data_are_goes_to_scoring_too():
    evaluate = "--evaluate=runs/evaluate.gin+BATCH_SIZE=2"
    (_, run) = plan(
        *("methods/mov.gin", *FLAGS, evaluate, "--output=out", "--gin.BATCH_SIZE=4"),
        *("--gin.EVAL_TASKS=['a']", "--gin_search_paths=mine"),
    )
    for flag in ("--gin.JSONL_DIR=tasks", "--gin.EVAL_TASKS=['a']", "--gin_search_paths=mine"):
        assert flag in run.train and flag in run.evaluate
    assert "--gin.BATCH_SIZE=4" in run.train and "--gin.BATCH_SIZE=4" not in run.evaluate
    assert run.scoring["BATCH_SIZE"] == "2" and "--gin.TRAIN_STEPS=9" not in run.evaluate


def test_arguments_from_a_file(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("# a comment\nmethods/mov.gin 'methods/ia3.gin'  # another\n--seeds=1,2\n")
    assert sweep.expand_argument_files(["a", f"@{file}", "b"]) == [
        *("a", "methods/mov.gin", "methods/ia3.gin", "--seeds=1,2", "b")
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["methods/none.gin"], "methods/none.gin: gin: .*methods/none.gin"),
        (["methods/mov.gin+top_1"], "expected gin files and NAME=value"),
        (
            ["methods/mov.gin+NUM_EXPERT=2"],
            "NUM_EXPERT: no gin file has .* did you mean NUM_EXPERTS",
        ),
        (["methods/mov.gin", "./methods/mov.gin"], "another experiment has the name mov"),
        (["routing/soft.gin"], "expected a model and a method"),
        (["methods/mov.gin", "--seeds=0;1"], "whole numbers joined by commas, found '0;1'"),
        (["methods/mov.gin", "--gin.SEED=3"], r"the sweep sets it \(--seeds\)"),
        (["methods/mov.gin", "--gin.MODEL_DIR=x"], "MODEL_DIR: the sweep sets it$"),
        (["methods/mov.gin", "--evaluate=runs/infer.gin"], "no gin file is of evaluate"),
        (["@no.txt"], "@no.txt: expected a file of arguments"),
    ],
)
def test_what_is_wrong_is_found_before_anything_runs(tmp_path, capsys, flags, says):
    assert sweep.main([*FLAGS, *flags, f"--output={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert re.search(f"{says}\n?", error) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_commands_that_parse(tmp_path, capsys):
    assert sweep.main(["methods/mov.gin", *FLAGS, f"--output={tmp_path}/out", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == [
        *("pemoe_jax.evaluate", "pemoe_jax.train", "pemoe_jax.evaluate")
    ]
    assert not (tmp_path / "out").exists()


# --- running it, with stand-ins for training and scoring ---

TRAIN = """
import json, os, pathlib, sys, time
flags = dict(flag.removeprefix("--gin.").split("=", 1) for flag in sys.argv[1:])
folder = pathlib.Path(flags["MODEL_DIR"]); folder.mkdir(parents=True, exist_ok=True)
progress = folder / "progress"
if flags.get("NUM_EXPERTS") == "13":
    sys.exit("error: thirteen is too many")
try:
    for step in range(int(progress.read_text()) if progress.exists() else 0, 20):
        print("step", step, flush=True)
        (folder / "steps").open("a").write(f"{step} ")
        time.sleep(float(os.environ["STAND_IN_PAUSE"]))
        progress.write_text(str(step + 1))
except KeyboardInterrupt:
    (folder / "saved").touch()
    sys.exit(130)
"""
EVALUATE = """
import json, pathlib, sys
flags = dict(flag.removeprefix("--gin.").split("=", 1) for flag in sys.argv[1:])
run = pathlib.Path(flags["CHECKPOINT_PATH"]); folder = pathlib.Path(flags["EVAL_OUTPUT_DIR"])
number = sum(map(ord, run.name)) % 10
task = {"dataset": "cb", "split": "x", "accuracy": number / 10, "chance": 0.5, "examples": 10}
known = {"name": run.name, "method": "mov", "variant": "mov", "step": 20, "checkpoint": run.name}
if "-seed" in run.name:
    name, seed = run.name.split("-seed")
    known |= {"seed": int(seed), "settings": name}
score = {"median": number / 10, "mean": number / 10, "chance": 0.5}
known |= {"datasets": {"cb": {**score, "prompts": 1, "examples": 10}}, "average": score}
folder.mkdir(parents=True, exist_ok=True)
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
    """A folder of modules that sweeps run in place of training and scoring, and a driver."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "stand_in_train.py").write_text(TRAIN)
    (folder / "stand_in_evaluate.py").write_text(EVALUATE)
    (folder / "driver.py").write_text(DRIVER)
    return folder


def use(modules: pathlib.Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PYTHONPATH", f"{modules}:{ROOT}")
    patch.setenv("STAND_IN_PAUSE", "0")
    patch.setitem(sweep._MODULES, "train", "stand_in_train")
    patch.setitem(sweep._MODULES, "evaluate", "stand_in_evaluate")


@pytest.fixture
def stand_ins(modules, monkeypatch) -> pathlib.Path:
    use(modules, monkeypatch)
    return modules


@pytest.fixture(scope="module")
def undisturbed(modules, tmp_path_factory) -> pathlib.Path:
    """A finished sweep; not to be changed."""
    output = tmp_path_factory.mktemp("sweep") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        use(modules, patch)
        assert sweep.main(flags_of(output)) == 0
    return output


def flags_of(output: pathlib.Path, *more: str) -> list[str]:
    return ["methods/mov.gin", *FLAGS, f"--output={output}", "--seeds=0,1", *more]


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes, and ends them (and so what they started) where the test does not."""
    started: list[subprocess.Popen] = []

    def begin(command: list, **options) -> subprocess.Popen:
        started.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def start(processes, modules: pathlib.Path, output: pathlib.Path) -> subprocess.Popen:
    """A slow sweep in a process of its own; it is in its first training, at step 4 or later."""
    process = processes(
        [sys.executable, modules / "driver.py", *flags_of(output)],
        env={**os.environ, "STAND_IN_PAUSE": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    progress = output / "mov-seed0" / "progress"
    wait_for(lambda: progress.exists() and int(progress.read_text() or 0) > 3, process)
    return process


def wait_for(condition, process=None) -> None:
    end = time.monotonic() + 300  # the machine may be busy with other tests
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.02)


def table(output: pathlib.Path) -> str:
    return (output / "report.md").read_text() + (output / "report.json").read_text()


def steps(output: pathlib.Path) -> str:
    return (output / "mov-seed0" / "steps").read_text()


def test_it_ends_in_a_report_and_is_not_done_again(undisturbed, stand_ins, capsys):
    rows = {
        row["run"]: row for row in json.loads((undisturbed / "report.json").read_text())["rows"]
    }
    assert set(rows) == {"mov", "base.safetensors"} and rows["mov"]["seeds"] == [0, 1]
    numbers = [sum(map(ord, f"mov-seed{seed}")) % 10 / 10 for seed in (0, 1)]
    assert rows["mov"]["average"]["median"] == pytest.approx(100 * sum(numbers) / 2)
    assert (undisturbed / "report.png").is_file() and (undisturbed / "report.csv").is_file()
    capsys.readouterr()
    before = steps(undisturbed)
    assert sweep.main(flags_of(undisturbed)) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert steps(undisturbed) == before and len(before.split()) == 20


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_goes_on(undisturbed, stand_ins, processes, tmp_path, how):
    """However it is stopped its training stops with it; then the report is that of an undisturbed
    sweep, and no step is taken twice but the one that was under way."""
    output = tmp_path / "disturbed"
    process = start(processes, stand_ins, output)
    process.send_signal(how)
    said = process.communicate(timeout=300)[0]
    time.sleep(0.5)
    taken = steps(output)
    time.sleep(1.0)
    assert steps(output) == taken  # nobody goes on unseen
    if how != signal.SIGKILL:
        assert process.returncode == 130 and "the same command goes on" in said
        assert (output / "mov-seed0" / "saved").exists()
    assert sweep.main(flags_of(output)) == 0
    assert table(output) == table(undisturbed)
    taken = steps(output).split()
    assert list(map(int, dict.fromkeys(taken))) == list(range(20)) and len(taken) <= 21


def test_a_run_that_is_killed_leaves_the_others(undisturbed, stand_ins, processes, tmp_path):
    output = tmp_path / "disturbed"
    process = start(processes, stand_ins, output)
    (killed,) = children(process.pid)
    os.kill(killed, signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "FAILED in train, ended by SIGKILL, often for want of memory" in said
    assert "1 of 3 runs failed (mov-seed0): the same command tries them again" in said
    assert "seed1" in table(output) and "seed0" not in table(output)
    assert sweep.main(flags_of(output)) == 0
    assert table(output) == table(undisturbed)


def children(parent: int) -> list[int]:
    """The processes that a process started (Linux)."""
    return [*map(int, pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]


def test_failures_are_told_and_may_stop_it(stand_ins, tmp_path, capsys):
    bad, good = "methods/mov.gin+NUM_EXPERTS=13", "methods/mov.gin"
    flags = [bad, good, *FLAGS, "--no_base"]
    assert sweep.main([*flags, f"--output={tmp_path / 'a'}"]) == 1
    told = capsys.readouterr()
    assert "FAILED in train, exit 1: error: thirteen is too many (log: " in told.out
    assert "1 of 2 runs failed (mov_NUM_EXPERTS=13-seed0)" in told.err
    assert (tmp_path / "a" / "mov-seed0" / "results").is_dir()
    assert sweep.main([*flags, f"--output={tmp_path / 'b'}", "--stop_at_failure"]) == 1
    assert not (tmp_path / "b" / "mov-seed0").exists()


def test_other_settings_are_refused_and_another_scoring_is_done(
    undisturbed, stand_ins, tmp_path, capsys
):
    output = shutil.copytree(undisturbed, tmp_path / "copy")
    assert sweep.main(flags_of(output, "--gin.BATCH_SIZE=3")) == 1
    error = capsys.readouterr().err
    assert "BATCH_SIZE = 32, expected the same to go on, found 3: choose another --output" in error
    # what no result hangs on may change
    assert sweep.main(flags_of(output, "--gin.LOG_PERIOD=3")) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    (output / "mov-seed0" / "results" / "of_before").touch()
    assert sweep.main(flags_of(output, "--evaluate=runs/evaluate.gin+EVAL_EXAMPLES=4")) == 0
    assert "finished before" not in capsys.readouterr().out
    assert len(steps(output).split()) == 20  # scored again, not trained again
    assert not (output / "mov-seed0" / "results" / "of_before").exists()


def test_a_folder_of_something_else_is_refused(stand_ins, tmp_path, capsys):
    (tmp_path / "out" / "mov-seed1").mkdir(parents=True)
    (tmp_path / "out" / "mov-seed1" / "precious").touch()
    assert sweep.main(flags_of(tmp_path / "out")) == 1
    assert "mov-seed1 holds what no sweep wrote" in capsys.readouterr().err
    assert not (tmp_path / "out" / "mov-seed0").exists()


def test_two_sweeps_in_a_folder_are_refused(tmp_path):
    with (
        subprocesses.exclusive_lock(tmp_path / "out"),
        pytest.raises(InputError, match="another sweep"),
        subprocesses.exclusive_lock(tmp_path / "out", patience=0.3),
    ):
        pass
    with subprocesses.exclusive_lock(tmp_path / "out", patience=0):  # free again
        pass


# --- and with the real ones ---


@pytest.mark.slow
def test_killed_trainings_end_like_undisturbed_ones(processes, tmp_path):
    """The sweep is killed in one training, a training in the other: equal to the bit at the end."""
    write_folder(tmp_path / "tasks")
    write_vocabulary(tmp_path / "vocab.model")
    flags = ["methods/mov.gin", *TINY, "--evaluate=runs/evaluate.gin", "--seeds=0,1", "--no_base"]
    flags += ["--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.LEARNING_RATE=0.02"]
    flags += [f"--gin.JSONL_DIR={tmp_path / 'tasks'}", f"--gin.VOCAB_PATH={tmp_path}/vocab.model"]
    flags += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}", "--gin.BATCH_SIZE=8"]
    flags += ["--gin.VOCAB_SIZE=256", "--gin.TRAIN_STEPS=160", "--gin.LOG_PERIOD=20"]
    flags += [f"--gin.network.T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")]
    flags += ["--gin.CHECKPOINT_PERIOD=20"]

    def command(name: str) -> list[str]:
        output = f"--output={tmp_path / name}"
        return [sys.executable, "-m", "pemoe_jax", "sweep", *flags, output]

    assert processes(command("whole")).wait() == 0
    parts = tmp_path / "parts"
    process = processes(command("parts"))
    wait_for(lambda: checkpoints.saved_steps(parts / "mov-seed0"), process)
    process.kill()
    process.wait()
    assert checkpoints.saved_steps(parts / "mov-seed0") != [160]
    process = processes(command("parts"))
    wait_for(lambda: checkpoints.saved_steps(parts / "mov-seed1"), process)
    (training,) = children(process.pid)
    os.kill(training, signal.SIGKILL)
    assert process.wait() == 1
    assert checkpoints.saved_steps(parts / "mov-seed1") != [160]
    assert processes(command("parts")).wait() == 0

    for name in ("mov-seed0", "mov-seed1"):
        whole, _, _ = checkpoints.open_trainable(str(tmp_path / "whole" / name))
        other, _, step = checkpoints.open_trainable(str(parts / name))
        assert step == 160 and whole.keys() == other.keys()
        for path, array in whole.items():
            assert (array.read() == other[path].read()).all(), path
    tables = [
        (tmp_path / name / "report.json").read_text().replace(f"/{name}/", "/")
        for name in ("whole", "parts")
    ]
    assert tables[0] == tables[1]
    (row,) = json.loads(tables[0])["rows"]
    assert (row["run"], row["method"], row["seeds"]) == ("mov", "mov-10", [0, 1])
