"""Time from the start of `python -m pemoe_jax.train` to the end of its first step.

    python benchmarks/startup.py [--rounds 3] [--size tiny] [--json FILE]

A tiny T5 v1.1 with random weights and MoV, the quickstart's sample and vocabulary, 8 rows of 64 and
16 tokens, on two CPU threads. A first run, which does not count, fills the cache of compiled
programs. The first step ends when its metrics are written. The peer is `import seqio` alone, which
takes most of that time.
"""

import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import common
import machine
import workers


def first_step(folder: pathlib.Path, size: str) -> tuple[float, resource.struct_rusage]:
    """Returns the seconds until the first step's metrics exist, and the resource usage."""
    macros = {
        "MODEL_DIR": folder,
        "INITIAL_CHECKPOINT_PATH": None,
        "TRAIN_STEPS": 1,
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 16},
        "VOCAB_SIZE": 640,  # at least as many as the quickstart's vocabulary has ids
    }
    files = [f"models/t5_1_1_{size}", "methods/mov", "runs/finetune", "runs/quickstart_data"]
    arguments = ["-m", "pemoe_jax.train", *(f"--gin_file={name}.gin" for name in files)]
    arguments += [f"--gin.{name}={value}" for name, value in macros.items()]
    metrics = folder / "metrics.jsonl"
    return time_python(arguments, lambda: metrics.exists() and metrics.stat().st_size > 0)


def time_python(
    arguments: Sequence[str], done: Callable[[], bool] = lambda: False
) -> tuple[float, resource.struct_rusage]:
    """Runs Python; returns the seconds until `done` is true or it ends, and its resource usage."""
    with tempfile.TemporaryFile("w+") as output:
        clock, seconds = time.perf_counter(), 0.0
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=workers.REPO, stdout=output, stderr=output)
        # wait4 reports the usage of this child alone, `resource` only the sum of all children.
        while not (result := os.wait4(process.pid, os.WNOHANG))[0]:
            if not seconds and done():
                seconds = time.perf_counter() - clock
            time.sleep(0.005)
        _, status, usage = result
        seconds = seconds or time.perf_counter() - clock
        if status:
            output.seek(0)
            raise SystemExit(output.read())
    return seconds, usage


def main() -> None:
    """Runs the benchmark."""
    args = common.make_parser(__doc__, rounds=3, size="tiny").parse_args()
    machine.pin()
    os.environ["PYTHONPATH"] = str(workers.REPO)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        # By default jax caches no program that compiles in less than a second.
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        cold, _ = first_step(root / "cold", args.size)
        ours = workers.Side("start to first step, programs cached")
        peer = workers.Side("import seqio alone")
        load = machine.OtherLoad()
        for number in range(args.rounds):
            for side, (seconds, usage) in (
                (ours, first_step(root / f"run_{number}", args.size)),
                (peer, time_python(["-c", "import seqio"])),
            ):
                side.times.append((seconds, usage.ru_utime + usage.ru_stime))
                side.info["peak"] = max(side.info.get("peak", 0), 1024 * usage.ru_maxrss)
        other_load = load.share(sum(cpu for side in (ours, peer) for _, cpu in side.times))
    ours.info["versions"] = machine.versions("jax", "jaxlib", "flax", "seqio", "tensorflow")
    print(f"the first run, without the cache: {cold:.1f} s")
    common.write_rows([common.make_row("startup/cpu", ours, peer, other_load)], args.json)


if __name__ == "__main__":
    main()
