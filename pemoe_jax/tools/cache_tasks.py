"""Writes P3's tasks as seqio caches: `pemoe cache_tasks --help`."""

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import functools
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, seqio_caches

_DESCRIPTION = """\
Writes tasks of P3 as tfrecords, in the layout of the published caches, which P3_DIR and seqio
(USE_CACHED_TASKS, --seqio_additional_cache_dirs) read: from Parquet as the hub serves it, from JSON
lines, or from prompt templates and a data set's examples (docs/p3.md says in which forms). The same
command again does what is not done yet."""
_EPILOG = """\
example:
  pemoe cache_tasks --tasks='super_glue_rte_*' --p3_dir=parquet --output=cache
"""
FLAGS = argparse.ArgumentParser(
    prog="pemoe cache_tasks",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)
FLAGS.add_argument(
    "--tasks",
    default="*",
    metavar="PATTERN,PATTERN",
    help="names or patterns (*, ?) of tasks and of their twins <task>_score_eval, or of mixtures"
    " such as t0_train; all by default",
)
FLAGS.add_argument(
    "--p3_dir",
    metavar="DIR",
    help="the folder that is read; by default the environment's PEMOE_P3_DIR",
)
FLAGS.add_argument("--output", required=True, metavar="DIR", help="where the caches go")
FLAGS.add_argument(
    "--vocab_path",
    metavar="FILE",
    help="SentencePiece file; by default the environment's PEMOE_VOCAB_PATH, or T5's",
)
FLAGS.add_argument(
    "--workers", type=int, default=1, metavar="N", help="processes that write at the same time"
)
FLAGS.add_argument(
    "--shard_rows", type=int, default=1_000_000, metavar="N", help="most rows of a file"
)
gin_flags.add_cache_dirs_flag(
    FLAGS, "folders that are looked into too, joined by commas: what is cached there is left out"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A split of a task to be written."""

    task: str
    split: str


@dataclasses.dataclass(frozen=True)
class _Context:
    """What a process needs to do any job."""

    p3_dir: str
    vocab_path: str
    output: Path
    shard_rows: int


def cache_tasks(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """The command.

    Args:
      args: as the flags have them.
      bindings: of gin; there must be none.

    Raises:
      InputError: anything the user can mend. What was written before stays.
    """
    from pemoe_jax import tasks
    from pemoe_jax.runtime import progress

    if bindings:
        raise InputError(f"this command takes no gin bindings, found {bindings[0]}")
    for name, value in (("--workers", args.workers), ("--shard_rows", args.shard_rows)):
        if value < 1:
            raise InputError(f"{name} must be a positive integer, found {value}")
    p3_dir = args.p3_dir or os.environ.get("PEMOE_P3_DIR")
    if not p3_dir:
        raise InputError("no --p3_dir: expected a folder of P3 (or PEMOE_P3_DIR)")
    context = _Context(
        os.path.abspath(os.path.expanduser(p3_dir)),
        args.vocab_path or tasks.default_vocab_path(),
        Path(args.output).expanduser().absolute(),
        args.shard_rows,
    )
    if context.output == Path(context.p3_dir):
        raise InputError(f"--output {context.output} is the folder that is read, expected another")
    _readers.cache_clear()  # the folder may have changed since
    folder, splits = _to_write(context, args.tasks.split(","))
    finished = [task for task in splits if (context.output / task / "COMPLETED").exists()]
    jobs = [
        Job(task, split)
        for task, names in splits.items()
        if task not in finished
        for split in names
    ]
    print(
        f"{folder}: {len(splits)} tasks to {context.output}"
        + (f", {len(finished)} of them done before" if finished else ""),
        flush=True,
    )
    bar = progress.Progress("splits", len(jobs), note="starting")
    done: dict[str, set[str]] = {}
    rows = 0
    try:
        for number, (job, written) in enumerate(_results(context, jobs, args.workers), 1):
            rows += written
            done.setdefault(job.task, set()).add(job.split)
            if done[job.task] == set(splits[job.task]):
                _complete(context.output / job.task)
            bar.report_if_due(number, f"{progress.format_count(rows)} rows")
    finally:
        bar.close()
    print(f"{len(splits)} tasks in {context.output}", flush=True)


def _to_write(context: _Context, patterns: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """What the folder is, and task -> its splits, of the tasks that match."""
    from pemoe_jax.tasks.p3 import published as published_lib
    from pemoe_jax.tasks.p3.folder import CACHE, Folder

    folder = Folder(context.p3_dir)
    published = published_lib.tasks()
    twins = [task.name + published_lib.SCORE_EVAL for task in published.values() if task.has_twin]
    names = [*published, *twins, *published_lib.made_twins()]
    wanted: dict[str, list[str]] = {}
    for pattern in filter(None, patterns):
        matched: Sequence[str] = published_lib.mixtures().get(pattern, ())
        matched = matched or fnmatch.filter(names, pattern)
        if not matched:
            raise InputError(f"--tasks {pattern!r} matched none of {len(names)} tasks and twins")
        there = {name: found for name in matched if (found := folder.find(name)) is not None}
        for bad in folder.unreadable.values():
            raise InputError(bad)
        lacking = [f"{name}: {folder.lacking[name]}" for name in matched if name in folder.lacking]
        if not there:
            raise InputError(
                f"--tasks {pattern!r}: {folder.path} has none of the {len(matched)} tasks"
                + (f"; {lacking[0]}" if lacking else "")
            )
        if lacking:
            more = f" (and {len(lacking) - 1} more tasks)" if len(lacking) > 1 else ""
            print(f"left out: {lacking[0]}{more}", flush=True)
        for name, found in there.items():
            if found.form != CACHE and found.splits and not _is_cached(name):
                wanted[name] = sorted(found.splits)
    if not wanted:
        where = ", ".join([str(folder.path), *seqio_caches.additional_cache_dirs])
        raise InputError(f"{where}: all tasks that match are tfrecord caches already")
    return str(folder.path), wanted


def _is_cached(name: str) -> bool:
    """Whether a task is in one of --seqio_additional_cache_dirs."""
    return any(
        os.path.exists(f"{folder}/{name}/COMPLETED")
        for folder in seqio_caches.additional_cache_dirs
    )


def _results(context: _Context, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, int]]:
    """Does the jobs -> each with the rows written, as they end."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, write_split(context, job)
        return
    spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), spawn) as pool:
        waiting = {pool.submit(write_split, context, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_split(context: _Context, job: Job) -> int:
    """Writes a split of a task, unless that was done before; returns its rows.

    The files are written into a folder beside, then moved, info last: a split with info is whole.
    """
    target = context.output / job.task
    info_path = target / f"info.{job.split}.json"
    if info_path.exists():
        return 0
    reader = _readers(context)(job.task, job.split)
    beside = target / f".{job.split}"
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was stopped
    beside.mkdir(parents=True)
    shards, stats, features = _write_shards(reader, beside, context.shard_rows)
    for number, path in enumerate(shards):
        path.rename(target / f"{job.split}.tfrecord-{number:05d}-of-{len(shards):05d}")
    from seqio import __version__ as seqio_version

    from pemoe_jax.runtime import atomic_write

    info = {"num_shards": len(shards), "features": features, "seqio_version": seqio_version}
    for path, found in ((target / f"stats.{job.split}.json", stats), (info_path, info)):
        atomic_write.write_json(path, found, indent=None)
    beside.rmdir()
    return int(stats["examples"])


@functools.cache
def _readers(context: _Context) -> Callable[[str, str], Any]:
    """Task and split -> their rows; made once in each process."""
    gin_flags.silence_libraries()
    from pemoe_jax.tasks import p3

    p3.register(context.p3_dir, context.vocab_path)
    folder, encode = p3.settings.folder, p3.settings.encode
    return lambda task, split: folder.reader(task, split, encode)


def _write_shards(
    reader: Any, folder: Path, shard_rows: int
) -> tuple[list[Path], dict[str, int], dict[str, Any]]:
    """Writes the rows of a reader -> files, stats, features."""
    import tensorflow as tf

    from pemoe_jax.data import rows as rows_lib

    paths: list[Path] = []
    stats = {"examples": 0}
    features: dict[str, Any] = {}
    writer = None
    try:
        for rows in reader.row_blocks():
            for row in rows:
                if writer is None or stats["examples"] % shard_rows == 0:
                    if writer is not None:
                        writer.close()
                    paths.append(folder / f"{len(paths):05d}")
                    writer = tf.io.TFRecordWriter(str(paths[-1]))
                writer.write(rows_lib.serialize(row))
                _count(stats, row)
                for key in row:
                    features.setdefault(key, _FEATURES[key])
        if writer is None:  # no rows: an empty file, which can be read
            paths.append(folder / "00000")
            paths[0].touch()
    finally:
        if writer is not None:
            writer.close()
    return paths, stats, features or {key: _FEATURES[key] for key in rows_lib.TEXT_FEATURES}


_FEATURES: dict[str, Any] = {
    "inputs": {"shape": [None], "dtype": "int32"},
    "targets": {"shape": [None], "dtype": "int32"},
    "inputs_pretokenized": {"shape": [], "dtype": "string"},
    "targets_pretokenized": {"shape": [], "dtype": "string"},
    "answer_choices": {"shape": [None], "dtype": "string"},
    "idx": {"shape": [None], "dtype": "int32"},
    "is_correct": {"shape": [], "dtype": "bool"},
    "weight": {"shape": [], "dtype": "float32"},
}


def _count(stats: dict[str, int], row: dict[str, Any]) -> None:
    stats["examples"] += 1
    for key in ("inputs", "targets"):
        tokens = len(row[key])
        stats[f"{key}_tokens"] = stats.get(f"{key}_tokens", 0) + tokens
        stats[f"{key}_max_tokens"] = max(stats.get(f"{key}_max_tokens", 0), tokens)


def _complete(folder: Path) -> None:
    (folder / "COMPLETED").touch()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_command(FLAGS, cache_tasks, argv)
