"""From the start of the process to the end of the first step: `python -m pemoe_jax.train`.

    python benchmarks/startup.py [--rounds 3] [--size tiny] [--json FILE]

A tiny T5 v1.1 with random weights and MoV, the quickstart's sample and vocabulary, 8 rows of 64 and
16 tokens, on two CPU threads. A first run, which is not counted, fills the cache of compiled
programs. The first step is over when its metrics are written. In turn with it `import seqio`
alone, which is most of it.
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


def first_step(folder: pathlib.Path, size: str) -> tuple[float, resource.struct_rusage]:
    """Seconds until the metrics of the first step are there, and what the whole process used."""
    macros = {
        "MODEL_DIR": folder,
        "INITIAL_CHECKPOINT_PATH": None,
        "TRAIN_STEPS": 1,
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 16},
        "VOCAB_SIZE": 640,
    }
    files = [f"models/t5_1_1_{size}", "methods/mov", "runs/finetune", "runs/quickstart_data"]
    words = ["-m", "pemoe_jax.train", *(f"--gin_file={name}.gin" for name in files)]
    words += [f"--gin.{name}={value}" for name, value in macros.items()]
    metrics = folder / "metrics.jsonl"
    return timed(words, lambda: metrics.exists() and metrics.stat().st_size > 0)


def timed(
    words: Sequence[str], done: Callable[[], bool] = lambda: False
) -> tuple[float, resource.struct_rusage]:
    """Runs Python until something is done or it ends: seconds, and what the process used."""
    with tempfile.TemporaryFile("w+") as said:
        clock, seconds = time.perf_counter(), 0.0
        process = subprocess.Popen(
            [sys.executable, *words], cwd=common.REPO, stdout=said, stderr=said
        )
        pid = 0
        while not pid:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not seconds and (pid or done()):
                seconds = time.perf_counter() - clock
            time.sleep(0.005)
        if status:
            said.seek(0)
            raise SystemExit(said.read())
    return seconds, usage


def main() -> None:
    """Measures as the flags say."""
    args = common.parser(__doc__, rounds=3, size="tiny").parse_args()
    common.pin()
    os.environ["PYTHONPATH"] = str(common.REPO)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        cold, _ = first_step(root / "cold", args.size)
        ours = common.Side("start to first step, programs cached", "", {})
        alone = common.Side("import seqio alone", "", {})
        others, own = common.Others(), 0.0
        for number in range(args.rounds):
            for side, (seconds, usage) in (
                (ours, first_step(root / f"run_{number}", args.size)),
                (alone, timed(["-c", "import seqio"])),
            ):
                cpu = usage.ru_utime + usage.ru_stime
                own += cpu
                side.times.append((seconds, cpu))
                side.told["peak"] = max(side.told.get("peak", 0), 1024 * usage.ru_maxrss)
        share = others.share(own)
    ours.told["versions"] = common.versions("jax", "jaxlib", "flax", "seqio", "tensorflow")
    print(f"the first run, without the cache: {cold:.1f} s")
    common.write([common.row("startup/cpu", ours, alone, share)], args.json)


if __name__ == "__main__":
    main()
