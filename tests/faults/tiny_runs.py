"""Runs commands on tiny models in forks of one process, so that libraries are imported once.

The process itself must start no device and no thread pool, because these do not survive a fork.
"""

import atexit
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

METHODS = ("ia3", "lora", "mov", "molora", "full", "flan_switch")
SECONDS = 900  # for a command, which takes a few seconds; the machine may be busy
_SIZES = {"emb_dim": 16, "num_heads": 2, "head_dim": 6, "mlp_dim": 20, "vocab_size": 256}
_SIZES |= {"num_encoder_layers": 1, "num_decoder_layers": 1}


def prepare(root: pathlib.Path) -> None:
    """Writes tasks and a vocabulary, and imports the modules that the commands need."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # Compiling dominates such short runs.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    # JAX warns of every fork. Here they are safe, because this process starts no device.
    warnings.filterwarnings("ignore", message=".*fork")
    import jsonl_folder

    from pemoe_jax.runtime import gin_flags

    jsonl_folder.write_folder(root / "tasks")
    jsonl_folder.write_vocabulary(root / "vocab.model")
    gin_flags.silence_libraries()
    from pemoe_jax.data import seqio_import

    seqio_import.import_seqio()
    from pemoe_jax import evaluate, train  # noqa: F401
    from pemoe_jax.analysis import evaluation, plots  # noqa: F401
    from pemoe_jax.checkpoints import new_run, runs  # noqa: F401
    from pemoe_jax.data import feed, prefetch  # noqa: F401
    from pemoe_jax.runtime import train_loop  # noqa: F401

    plots.import_pyplot()


def data_flags(root: pathlib.Path) -> list[str]:
    """Returns the flags that training and evaluation share."""
    return [
        *(f"--gin.JSONL_DIR={root / 'tasks'}", f"--gin.VOCAB_PATH={root / 'vocab.model'}"),
        *("--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}", "--gin.BATCH_SIZE=8"),
    ]


def train_flags(
    root: pathlib.Path, method: str, model_dir: pathlib.Path, **macros: object
) -> list[str]:
    """Returns the flags of a training of eight steps, with a checkpoint every two steps.

    Args:
      root: folder with the tasks and the vocabulary.
      method: name of the method's gin file.
      model_dir: folder of the run.
      macros: other settings, which replace the defaults.
    """
    settings: dict[str, object] = {
        **{"INITIAL_CHECKPOINT_PATH": None, "TRAIN_STEPS": 8, "CHECKPOINT_PERIOD": 2},
        **{"LOG_PERIOD": 1, "LEARNING_RATE": 0.02, "KEEP_CHECKPOINTS": 2, "DROPOUT_RATE": 0.1},
    }
    if method.startswith("flan"):
        settings |= {"SPARSE_STEP": 1, "NUM_EXPERTS": 4}
    files = ("models/t5_1_1_tiny.gin", f"methods/{method}.gin", "runs/finetune.gin")
    return [
        *(f"--gin_file={file}" for file in files),
        f"--gin.MODEL_DIR={model_dir}",
        *(f"--gin.network.T5Config.{name}={value}" for name, value in _SIZES.items()),
        *data_flags(root),
        *(f"--gin.{name}={value}" for name, value in (settings | macros).items()),
    ]


def evaluate_flags(root: pathlib.Path, checkpoint: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Returns the flags of an evaluation."""
    return [
        *("--gin_file=runs/evaluate.gin", f"--gin.CHECKPOINT_PATH={checkpoint}"),
        *(f"--gin.EVAL_OUTPUT_DIR={output}", *data_flags(root)),
    ]


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      code: exit code; the negative number of the signal if one ended it; None: it took too long.
      output: what it printed.
      cpu_seconds: user and system time.
    """

    code: int | None
    output: str
    cpu_seconds: float

    @property
    def outcome(self) -> str:
        """'finished', 'killed', 'clear' (one line of error), 'hang' or 'traceback'."""
        if self.code is None:
            return "hang"
        if "Traceback" in self.output:
            return "traceback"
        if self.code in (0, -signal.SIGKILL):
            return "killed" if self.code else "finished"
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        is_last = bool(errors) and self.output.rstrip().endswith(errors[-1])
        return "clear" if self.code == 1 and len(errors) == 1 and is_last else "traceback"


class Fork:
    """A forked process that runs `work` and exits with its result.

    Args:
      work: returns the exit code.
      log: file for stdout and stderr.
      variables: environment variables to set.
    """

    def __init__(
        self,
        work: Callable[[], int],
        log: pathlib.Path,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        # The child must not return into the caller, which would continue in both processes.
        if self.pid == 0:
            os._exit(self._run(work, variables or {}))

    def _run(self, work: Callable[[], int], variables: Mapping[str, str]) -> int:
        code = 99  # if `work` raises
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(variables)
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        # `os._exit` skips exit functions, such as the one by which JAX leaves the other processes.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return code

    def cpu_seconds(self) -> float:
        """Returns the CPU time so far; infinity if the process has ended."""
        # The fields after the command's name, which may have spaces: 0 is the state, 11 and 12 are
        # the user and system time in ticks.
        stat = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(stat[11]) + int(stat[12])
        return float("inf") if stat[0] == "Z" else ticks / os.sysconf("SC_CLK_TCK")

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Waits for the end; kills the process if it takes too long."""
        deadline = time.monotonic() + seconds
        is_late = False
        while True:
            # Unlike `waitpid`, it returns the process's own usage of CPU time.
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                is_late = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        code = None if is_late else os.waitstatus_to_exitcode(status)
        output = self.log.read_text(errors="replace")
        return Ended(code, output, usage.ru_utime + usage.ru_stime)


def run(work: Callable[[], int], log: pathlib.Path) -> Ended:
    """Runs `work` in a fork until its end."""
    return Fork(work, log).wait()


# --- events ---

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def watch(folder: pathlib.Path, on_event: Callable[[int, str, str], object]) -> None:
    """Calls `on_event(number, event, path)` before each write to a folder in this process.

    Events are Python's audit events of `_EVENTS`: a file is opened for writing, renamed or deleted,
    or a folder is made. They are counted from 1. `on_event` may raise, and then the write fails.
    Files that C++ writes, such as the arrays of a checkpoint, have no events.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        on_event(count, event, str(arguments[0]))

    # A hook cannot be removed, so `watch` must be called in a fork.
    sys.addaudithook(hook)
