"""Writes P3's tasks as seqio's offline caches: `pemoe cache_tasks --help`."""

import argparse
import collections
import concurrent.futures
import contextlib
import fnmatch
import functools
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pemoe_jax.core.errors import InputError, check_integer, plural
from pemoe_jax.runtime import file_io, gin_flags, seqio_cache_dirs

if TYPE_CHECKING:
    from pemoe_jax.data.row_reader import Row, RowReader

_DESCRIPTION = """\
Writes tasks of P3 as tfrecords in the layout of the published caches. The source is Parquet as the
Hugging Face hub serves it, JSON lines, or prompt templates with the datasets' examples (see
docs/p3.md). To read the result, pass its folder as P3_DIR, or as --seqio_additional_cache_dirs with
USE_CACHED_TASKS=True. Run the same command again to continue after a stop."""
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
    help="names or patterns (*, ?) of tasks (also <task>_score_eval), or of mixtures such as"
    " t0_train (default: all)",
)
FLAGS.add_argument(
    "--p3_dir",
    metavar="DIR",
    help="folder to read; by default the environment's PEMOE_P3_DIR",
)
FLAGS.add_argument("--output", required=True, metavar="DIR", help="folder to write the caches to")
FLAGS.add_argument(
    "--vocab_path",
    metavar="FILE",
    help="SentencePiece file, or 'bytes'; by default the environment's PEMOE_VOCAB_PATH, or T5's",
)
FLAGS.add_argument(
    "--workers", type=int, default=1, metavar="N", help="number of processes (default: 1)"
)
FLAGS.add_argument(
    "--shard_rows",
    type=int,
    default=1_000_000,
    metavar="N",
    help="maximum number of rows in a file (default: 1000000)",
)
gin_flags.add_cache_dirs_flag(
    FLAGS, "folders of caches, separated by commas; tasks in them are not written again"
)


class _Job(NamedTuple):
    task: str
    split: str


class _Settings(NamedTuple):
    """Settings of a call, which are passed to every worker process."""

    p3_dir: str
    vocab_path: str
    output: Path
    shard_rows: int


def cache_tasks(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Runs the command with parsed flags.

    Raises:
      InputError: a flag or the data is wrong, or there are gin bindings. Splits that have been
        written are kept.
    """
    from pemoe_jax.runtime import progress
    from pemoe_jax.tasks import check_p3_paths
    from pemoe_jax.tasks.vocabulary import default_vocab_path

    gin_flags.check_no_bindings(bindings)
    check_integer("--workers", args.workers)
    check_integer("--shard_rows", args.shard_rows)
    p3_dir = args.p3_dir or os.environ.get("PEMOE_P3_DIR")
    if not p3_dir:
        raise InputError("--p3_dir is not set: pass a folder of P3, or set PEMOE_P3_DIR")
    check_p3_paths(p3_dir, args.vocab_path)
    settings = _Settings(
        os.path.abspath(os.path.expanduser(p3_dir)),
        args.vocab_path or default_vocab_path(),
        file_io.resolve_output_folder(file_io.resolve_local(args.output, "--output"), "--output"),
        args.shard_rows,
    )
    if settings.output.resolve() == Path(settings.p3_dir).resolve():
        raise InputError(f"--output must differ from --p3_dir, got {settings.output} for both")
    _reader_factory.cache_clear()  # the folder may have changed since an earlier call
    folder, splits = _find_splits(settings, args.tasks.split(","))
    # After a stop, a task may have all of its splits, but no file COMPLETED. It is not finished
    # yet: its jobs find the splits and write nothing, and then the file is written.
    finished = [task for task in splits if (settings.output / task / "COMPLETED").exists()]
    jobs = [
        _Job(task, split)
        for task, names in splits.items()
        if task not in finished
        for split in names
    ]
    note = f", {len(finished)} of them complete already" if finished else ""
    print(f"{folder}: {plural(len(splits), 'task')} to {settings.output}{note}", flush=True)
    bar = progress.Progress("splits", len(jobs), note="starting")
    unfinished = {task: set(names) for task, names in splits.items()}
    num_rows = 0
    left_out: list[str] = []
    try:
        for number, (job, result) in enumerate(_run_jobs(settings, jobs, args.workers), 1):
            unfinished[job.task].remove(job.split)
            if isinstance(result, str):
                left_out.append(result)
                splits[job.task].remove(job.split)
            else:
                num_rows += result
            if splits[job.task] and not unfinished[job.task]:
                # Written last, because seqio takes a cache with this file for complete.
                (settings.output / job.task / "COMPLETED").touch()
            bar.report_if_due(number, f"{progress.format_count(num_rows)} rows")
    finally:
        bar.close()
    num_tasks = sum(map(bool, splits.values()))
    if left_out:
        others = f" (and {plural(len(left_out) - 1, 'more split')})" if len(left_out) > 1 else ""
        if not num_tasks:
            raise InputError(f"no task has rows: {left_out[0]}{others}")
        print(f"left out: {left_out[0]}{others}", flush=True)
    print(f"{plural(num_tasks, 'task')} in {settings.output}", flush=True)


def _find_splits(settings: _Settings, patterns: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """Returns P3_DIR's path, and {task: splits} of the matching tasks that are not caches yet.

    Raises:
      InputError: a pattern matches nothing that has data, a file of templates cannot be read, or
        all tasks are caches already.
    """
    from pemoe_jax.tasks.p3 import published
    from pemoe_jax.tasks.p3.folder import CACHE, Folder

    folder = Folder(settings.p3_dir)
    names = [*published.names(), *published.unpublished_score_tasks()]
    splits: dict[str, list[str]] = {}
    for pattern in filter(None, patterns):
        matched = published.mixtures().get(pattern) or fnmatch.filter(names, pattern)
        if not matched:
            raise InputError(f"--tasks {pattern!r} matched none of {len(names)} tasks")
        files = {name: files for name in matched if (files := folder.find(name)) is not None}
        # Training leaves out the tasks of a file that cannot be read. A cache must be complete.
        if folder.unreadable:
            raise InputError(next(iter(folder.unreadable.values())))
        unavailable = folder.describe_unavailable(matched)
        if not files:
            problem = f"--tasks {pattern!r}: {folder.path} has none of the {len(matched)} tasks"
            raise InputError("; ".join([problem, *unavailable]))
        for reason in unavailable:
            print(f"left out: {reason}", flush=True)
        for name, task_files in files.items():
            is_cached = any(
                os.path.exists(f"{cache_dir}/{name}/COMPLETED")
                for cache_dir in seqio_cache_dirs.additional_cache_dirs
            )
            if task_files.form != CACHE and task_files.splits and not is_cached:
                splits[name] = sorted(task_files.splits)
    if not splits:
        where = ", ".join([str(folder.path), *seqio_cache_dirs.additional_cache_dirs])
        raise InputError(f"{where}: all tasks that match are tfrecord caches already")
    return str(folder.path), splits


def _run_jobs(
    settings: _Settings, jobs: Sequence[_Job], workers: int
) -> Iterator[tuple[_Job, int | str]]:
    """Runs the jobs; yields each, when it ends, with the result of `write_split`."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, write_split(settings, job)
        return
    # A process that is forked after TensorFlow has started threads can deadlock.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), spawn) as pool:
        waiting = {pool.submit(write_split, settings, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        # Otherwise leaving the pool, also after Ctrl-C, would wait for the jobs in its queue.
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_split(settings: _Settings, job: _Job) -> int | str:
    """Writes a split of a task, unless it exists.

    Files are written into a temporary folder and then moved, `info.<split>.json` last, so that a
    split with this file is complete even if the process was killed.

    Returns:
      The number of rows written (0 if the split exists); or a text, if none of the split's examples
      can be used: the reason why it is left out.
    """
    from pemoe_jax.runtime import atomic_write
    from pemoe_jax.tasks.p3.readers import NoRowsError

    target = settings.output / job.task
    info_path = target / f"info.{job.split}.json"
    if info_path.exists():
        return 0
    reader = _reader_factory(settings)(job.task, job.split)
    partial = target / f".{job.split}"
    shutil.rmtree(partial, ignore_errors=True)  # from a run that was stopped
    partial.mkdir(parents=True)
    try:
        shards, stats, features = _write_shards(reader, partial, settings.shard_rows)
    except InputError as error:
        shutil.rmtree(partial)
        with contextlib.suppress(OSError):  # another split of the task may have been written
            target.rmdir()
        if not isinstance(error, NoRowsError):
            raise
        return str(error)
    for number, path in enumerate(shards):
        path.rename(target / f"{job.split}.tfrecord-{number:05d}-of-{len(shards):05d}")
    from seqio import __version__ as seqio_version

    info = {"num_shards": len(shards), "features": features, "seqio_version": seqio_version}
    for path, content in ((target / f"stats.{job.split}.json", stats), (info_path, info)):
        atomic_write.write_json(path, content, indent=None)
    partial.rmdir()
    return stats["examples"]


@functools.cache
def _reader_factory(settings: _Settings) -> Callable[[str, str], "RowReader"]:
    """Returns a function (task, split) -> reader; cached, so that a process registers P3 once."""
    # A spawned worker is a new process, in which the libraries are not silenced yet.
    gin_flags.silence_libraries()
    from pemoe_jax.tasks import p3

    p3.register(settings.p3_dir, settings.vocab_path)
    folder = p3.settings.folder
    return lambda task, split: folder.reader(task, split, p3.settings)


_FeatureInfo = dict[str, object]  # 'shape' and 'dtype' of a feature, as in info.<split>.json


def _write_shards(
    reader: "RowReader", folder: Path, shard_rows: int
) -> tuple[list[Path], dict[str, int], dict[str, _FeatureInfo]]:
    """Writes the rows of a reader.

    Returns:
      The files, the content of stats.<split>.json, and the shape and dtype of each feature.
    """
    import tensorflow as tf

    from pemoe_jax.data import row_reader

    paths: list[Path] = []
    stats = {"examples": 0}
    features: dict[str, _FeatureInfo] = {}
    writer = None
    try:
        for rows in _report_odd_rows(reader.row_blocks(), reader.location):
            for row in rows:
                if writer is None or stats["examples"] % shard_rows == 0:
                    if writer is not None:
                        writer.close()
                    paths.append(folder / f"{len(paths):05d}")
                    writer = tf.io.TFRecordWriter(str(paths[-1]))
                writer.write(row_reader.serialize(row))
                _update_stats(stats, row)
                for key in row:
                    features.setdefault(key, _FEATURES[key])
        # A split may have no rows. seqio needs a file, which may be empty.
        if writer is None:
            paths.append(folder / "00000")
            paths[0].touch()
    finally:
        if writer is not None:
            writer.close()
    return paths, stats, features or {key: _FEATURES[key] for key in row_reader.TEXT_FEATURES}


def _report_odd_rows(blocks: "Iterator[list[Row]]", location: str) -> "Iterator[list[Row]]":
    """Yields blocks of rows; then prints how many rows are odd (`row_checks.ODD_ROWS`), by kind.

    Args:
      blocks: the blocks.
      location: name of the source, for the printed lines.
    """
    from pemoe_jax.data import row_checks

    number, has_choices = 0, False
    first: dict[str, str] = {}  # kind -> 'row N', its first row
    counts: collections.Counter[str] = collections.Counter()
    for rows in blocks:
        yield rows
        for row in rows:
            number += 1
            choices = [text.decode() for text in row.get("answer_choices", [])]
            has_choices = has_choices or bool(choices)
            texts = [row.get(f"{key}_pretokenized") for key in row_checks.TEXT_FEATURES]
            # Rows without texts are left out, and so are those of a _score_eval task (which have an
            # `idx`): they repeat the rows of the task itself.
            if "idx" not in row and None not in texts:
                inputs, targets = (text.decode() for text in texts if text is not None)
                kinds = row_checks.find_odd_kinds(inputs, targets, choices)
                kinds += [] if choices else ["no_choices"]
                counts.update(kinds)
                first |= {kind: f"row {number}" for kind in kinds if kind not in first}
    # If no row has choices, the task has none, and its rows are not odd.
    if not has_choices:
        first.pop("no_choices", None)
    for line in row_checks.describe_odd_rows(first.items(), counts):
        print(f"{location}: {line}", flush=True)


# As in info.<split>.json of the published caches.
_FEATURES: dict[str, _FeatureInfo] = {
    "inputs": {"shape": [None], "dtype": "int32"},
    "targets": {"shape": [None], "dtype": "int32"},
    "inputs_pretokenized": {"shape": [], "dtype": "string"},
    "targets_pretokenized": {"shape": [], "dtype": "string"},
    "answer_choices": {"shape": [None], "dtype": "string"},
    "idx": {"shape": [None], "dtype": "int32"},
    "is_correct": {"shape": [], "dtype": "bool"},
    "weight": {"shape": [], "dtype": "float32"},
}


def _update_stats(stats: dict[str, int], row: "Row") -> None:
    """Adds a row to the content of stats.<split>.json, whose keys are those of seqio."""
    stats["examples"] += 1
    for key in ("inputs", "targets"):
        tokens = len(row[key])
        stats[f"{key}_tokens"] = stats.get(f"{key}_tokens", 0) + tokens
        stats[f"{key}_max_tokens"] = max(stats.get(f"{key}_max_tokens", 0), tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return gin_flags.run_command(FLAGS, cache_tasks, argv)
