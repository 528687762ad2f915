"""Several experiments with several seeds, one after another: `pemoe sweep --help`."""

import argparse
import dataclasses
import functools
import json
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, progress
from pemoe_jax.tools import subprocesses

_DESCRIPTION = """\
Trains each EXPERIMENT with each seed, scores it, and ends in one report: median
over prompts, mean and standard deviation over seeds. Each training and each
scoring is a process of its own. The same command again does what is not done:
a finished run is left alone, a stopped one goes on from its checkpoint, a
failed one is tried again.

An EXPERIMENT is gin files and settings joined by +. Its files come before those
of --gin_file, so that a method stands before a run file; its settings win over
all others. @FILE stands for the arguments in a file, # for a comment there."""

_EPILOG = """\
--gin.NAME=value goes to training, and those of runs/tasks.gin (where the data
are) to scoring too; settings of scoring alone are joined to --evaluate.

in DIR: report.md, .csv, .json, .png; <experiment>-seed<n>/ of each run, a
MODEL_DIR with train.log, evaluate.log and results/; base/ of the base's scores.

examples:
  pemoe sweep @sweeps/quickstart_routing.txt --output=/tmp/routing
  pemoe sweep methods/mov.gin methods/mov.gin+routing/top_1.gin \\
    methods/mov.gin+NUM_EXPERTS=30 --gin_file=runs/quickstart.gin \\
    --evaluate=runs/quickstart_evaluate.gin --seeds=0,1,2 --output=/tmp/sweep
  pemoe sweep paper/mov_10.gin paper/mov_10_top_1.gin \\
    --evaluate=paper/evaluate.gin --seeds=0,1,2 --output=/data/sweep \\
    --gin.P3_DIR=p3 --gin.INITIAL_CHECKPOINT_PATH=t5-xl-lm-adapt
"""

FLAGS = argparse.ArgumentParser(
    prog="pemoe sweep",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)
FLAGS.add_argument(
    "experiments", nargs="+", metavar="EXPERIMENT", help="FILE[+FILE…][+NAME=value…]"
)
FLAGS.add_argument("--output", required=True, metavar="DIR", help="where everything goes")
FLAGS.add_argument(
    "--evaluate", required=True, metavar="FILE[+…]", help="gin files and settings of the scoring"
)
FLAGS.add_argument("--seeds", default="0", metavar="N,N", help="joined by commas (default: 0)")
FLAGS.add_argument(
    "--gin_file", action="append", default=[], metavar="FILE", help="of every training; repeatable"
)
FLAGS.add_argument(
    "--gin_bindings", action="append", default=[], metavar="BINDING", help="of every training"
)
FLAGS.add_argument("--gin_search_paths", default="", metavar="DIR,DIR", help="as of train")
FLAGS.add_argument(
    "--seqio_additional_cache_dirs",
    dest="caches",
    default="",
    metavar="DIR,DIR",
    help="as of train",
)
FLAGS.add_argument("--no_base", action="store_true", help="do not score the base itself")
FLAGS.add_argument("--stop_at_failure", action="store_true", help="else the others go on")
FLAGS.add_argument("--with_paper", action="store_true", help="published rows in the report")
FLAGS.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")

_MODULES = {"train": "pemoe_jax.train", "evaluate": "pemoe_jax.evaluate"}
_STATE = "sweep.json"
_OURS = ("SEED", "MODEL_DIR", "CHECKPOINT_PATH", "EVAL_OUTPUT_DIR")
_OF_A_PLACE = ("CHECKPOINT_PATH", "EVAL_OUTPUT_DIR")
_WIRING = """\
from __gin__ import dynamic_registration
from pemoe_jax.tools import sweep
sweep.resolve_base.path = %INITIAL_CHECKPOINT_PATH
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training and its scoring, or the scoring of a base.

    Attributes:
      folder: what it writes to.
      train: flags of `pemoe_jax.train`; none for a base.
      evaluate: flags of `pemoe_jax.evaluate`.
      settings: of the training, what its result hangs on.
      scoring: of the scoring.
    """

    folder: Path
    train: list[str]
    evaluate: list[str]
    settings: dict[str, str]
    scoring: dict[str, str]

    @property
    def results(self) -> Path:
        """Where its scores are."""
        return self.folder / "results"

    def commands(self) -> list[tuple[str, list[str]]]:
        """(command, flags), in order."""
        found = [("train", self.train), ("evaluate", self.evaluate)]
        return [(name, flags) for name, flags in found if flags]


def resolve_base(path: str | None) -> str | None:
    """What gin gives it: the path of an experiment's base."""
    return path


def sweep(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Does what the flags ask for.

    Raises:
      InputError: a flag or an experiment is wrong, found before anything is started; or runs
        failed, after the others were reported.
    """
    runs = plan_runs(args, bindings)
    if args.dry_run:
        for run in runs:
            for name, flags in run.commands():
                print(shlex.join(["pemoe", name, *flags]))
        return
    for run in runs:
        _state(run)  # raises where a folder holds something else
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children save
    try:
        with subprocesses.exclusive_lock(Path(args.output)) as lock:
            failed = _run_all(runs, lock, args.stop_at_failure)
            done = [run for run in runs if _state(run)["evaluate"]]
            if done:
                _report(done, args)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed ({', '.join(failed)}):"
            " the same command tries them again"
        )


def plan_runs(args: argparse.Namespace, bindings: Sequence[str]) -> list[Run]:
    """The runs that the flags ask for, every configuration parsed.

    Raises:
      InputError: a flag is wrong, or an experiment is none.
    """
    seeds = _seeds(args.seeds)
    for name in [_name_of(binding) for binding in [*bindings, *args.gin_bindings]]:
        if name in _OURS:
            raise InputError(f"--gin.{name}: the sweep sets it{' (--seeds)' * (name == 'SEED')}")
    passed = [f"--gin_search_paths={args.gin_search_paths}"] * bool(args.gin_search_paths)
    cached = [f"--seqio_additional_cache_dirs={args.caches}"] * bool(args.caches)
    common = [_flag(one) for one in bindings]
    lines = [f"--gin_bindings={line}" for line in args.gin_bindings]
    files, own = _parts(args.evaluate)
    data = [flag for flag, one in zip(common, bindings, strict=True) if _name_of(one) in _of_data()]
    scoring = [*_files(files), *passed, *cached, *data, *own]

    runs: list[Run] = []
    bases: dict[str, None] = {}
    for experiment in args.experiments:
        files, own = _parts(experiment)
        name = _named(experiment)
        flags = [*_files([*files, *args.gin_file]), *passed, *cached, *common, *lines, *own]
        for seed in seeds:
            folder = Path(args.output) / f"{name}-seed{seed}"
            if folder in [run.folder for run in runs]:
                raise InputError(f"{experiment}: another experiment has the name {name}")
            train = [*flags, f"--gin.SEED={seed}", f"--gin.MODEL_DIR={folder}"]
            found = _parsed("train", train, experiment)
            base = _base(experiment)
            if base is not None:
                bases[base] = None
            runs.append(_run(folder, train, found, [*scoring, f"--gin.CHECKPOINT_PATH={folder}"]))
    scored: list[Run] = []
    for number, base in enumerate([] if args.no_base else bases, 1):
        folder = Path(args.output) / ("base" if number == 1 else f"base_{number}")
        flags = [*scoring, f"--gin.CHECKPOINT_PATH={base}"]
        scored.append(_run(folder, [], {"base": base}, flags))
    return [*scored, *runs]  # bases first: a mistake in --evaluate shows before hours of training


def _run(folder: Path, train: list[str], found: dict[str, str], scoring: list[str]) -> Run:
    evaluate = [*scoring, f"--gin.EVAL_OUTPUT_DIR={folder / 'results'}"]
    scored = _parsed("evaluate", evaluate, "--evaluate")
    scored = {name: value for name, value in scored.items() if name not in _OF_A_PLACE}
    return Run(folder, train, evaluate, found, scored)


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"--seeds: expected whole numbers joined by commas, found {text!r}")
    return list(dict.fromkeys(map(int, text.split(","))))


def _parts(text: str) -> tuple[list[str], list[str]]:
    """'a.gin+B=1' -> (['a.gin'], ['--gin.B=1'])."""
    parts = re.split(r"\+(?=[A-Za-z_./~])", text)  # not the + of 1e+3
    files = [part for part in parts if "=" not in part]
    if not all(file.endswith(".gin") for file in files):
        raise InputError(f"{text}: expected gin files and NAME=value, joined by +")
    return files, [f"--gin.{part}" for part in parts if "=" in part]


def _named(experiment: str) -> str:
    files, own = _parts(experiment)
    words = [Path(file).stem for file in files] + [part.removeprefix("--gin.") for part in own]
    return re.sub(r"[^\w.=-]+", "_", "_".join(words)).strip("_.")


def _files(files: Sequence[str]) -> list[str]:
    return [f"--gin_file={file}" for file in files]


def _name_of(binding: str) -> str:
    return binding.partition("=")[0].strip()


def _flag(binding: str) -> str:
    """The flag that gives a binding, its value without quotes where it needs none."""
    name, value = (part.strip() for part in binding.split("=", 1))
    plain = f"--gin.{name}={value[1:-1]}"
    return plain if gin_flags.split_bindings([plain])[1] == [binding] else f"--gin.{name}={value}"


def _of_data() -> set[str]:
    """The macros of runs/tasks.gin, which training and scoring share."""
    text = (gin_flags.GIN_DIR / "runs" / "tasks.gin").read_text()
    return set(re.findall(r"^([A-Z][A-Z0-9_]*) = ", text, re.MULTILINE))


def _parsed(command: str, flags: Sequence[str], where: str) -> dict[str, str]:
    """Parses what a command would be given -> its settings."""
    import gin

    from pemoe_jax import evaluate, train
    from pemoe_jax.analysis.zero_shot import settings

    known = {"train": train.FLAGS, "evaluate": evaluate.FLAGS}[command]
    rest, bindings = gin_flags.split_bindings(flags)
    try:
        gin_flags.load_config(known.parse_args(rest), bindings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    found = settings.read(gin.config_str())
    if f"{command}.{command}.model" not in found:
        raise InputError(f"{where}: no gin file is of {command}: expected one of runs/…")
    if command == "train" and "None" in (found["MODEL"], found["TRAINABLE"]):
        raise InputError(f"{where}: expected a model and a method, found files of only one of them")
    return found


def _base(where: str) -> str | None:
    """The base of the configuration that was parsed last."""
    import gin

    try:
        with gin.unlock_config():
            gin.parse_config(_WIRING)
        return gin_flags.call_configured(resolve_base)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _state(run: Run) -> dict[str, Any]:
    """How far a run is: the seconds that `train` and `evaluate` took, None where not finished.

    Raises:
      InputError: its folder holds a run of other settings, or what no sweep wrote.
    """
    fresh = {"settings": run.settings, "scoring": run.scoring, "train": None, "evaluate": None}
    file = run.folder / _STATE
    if not file.exists():
        if run.folder.exists() and any(run.folder.iterdir()):
            raise InputError(f"{run.folder} holds what no sweep wrote: choose another --output")
        return fresh
    try:
        state = json.loads(file.read_text())
        before = state["settings"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: expected what a sweep wrote: delete {run.folder}") from None
    for name in {**before, **run.settings}:
        if before.get(name) != run.settings.get(name):
            raise InputError(
                f"{run.folder} holds a run with {name} = {before.get(name, '(not set)')}, expected"
                f" the same to go on, found {run.settings.get(name, '(not set)')}: choose another"
                " --output, or delete it"
            )
    if state["scoring"] != run.scoring or not (run.results / "results.json").is_file():
        state = {**state, "scoring": run.scoring, "evaluate": None}
    return state


def _save(run: Run, state: Mapping[str, Any]) -> None:
    from pemoe_jax.runtime import atomic_write

    atomic_write.write_json(run.folder / _STATE, state)


def _run_all(runs: Sequence[Run], lock: int, stop_at_failure: bool) -> list[str]:
    """Runs what is not done; the names of those that failed."""
    print(f"{len(runs)} runs, each with its logs in {runs[0].folder.parent}/<run>/", flush=True)
    failed: list[str] = []
    width = max(len(run.folder.name) for run in runs)
    for number, run in enumerate(runs, 1):
        opening = f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.folder.name:<{width}}"
        state = _state(run)
        if state["evaluate"]:
            print(f"{opening}  finished before  {_score(run)}", flush=True)
        else:
            problem = _run_one(run, state, lock, opening)
            if problem:
                failed.append(run.folder.name)
                print(f"{opening}  FAILED {problem}", flush=True)
                if stop_at_failure:
                    break
                continue
            spent = [
                f"{name} {progress.format_duration(state[name])}" for name, _ in run.commands()
            ]
            left = _left(runs[:number], runs[number:])
            print("  ".join([opening, *spent, _score(run), *left]), flush=True)
    return failed


def _left(before: Sequence[Run], after: Sequence[Run]) -> list[str]:
    """['left 1:02:03'] by what trainings and scorings took so far; nothing where none is done."""
    states = [_state(run) for run in before if run.train]
    took = [state["train"] + state["evaluate"] for state in states if state["evaluate"]]
    waiting = sum(not _state(run)["evaluate"] for run in after)
    return [f"left {progress.format_duration(sum(took) / len(took) * waiting)}"] if took else []


def _run_one(run: Run, state: dict[str, Any], lock: int, opening: str) -> str:
    """Trains and scores, what is not done of it; what went wrong, '' for nothing."""
    _save(run, state)
    for name, flags in run.commands():
        if state[name]:
            continue
        if name == "evaluate":  # which would not write over what it does not make again
            shutil.rmtree(run.results, ignore_errors=True)
        log = run.folder / f"{name}.log"
        live = _live(opening, name, log)
        next(live)
        start = time.monotonic()
        try:
            code = subprocesses.run_module(
                _MODULES[name], flags, log, lock, functools.partial(next, live)
            )
        finally:
            live.close()
        if code:
            return f"in {name}, {subprocesses.describe_exit(code, log)} (log: {log})"
        state[name] = max(0.1, round(time.monotonic() - start, 1))
        _save(run, state)
    return ""


def _live(opening: str, name: str, log: Path) -> Generator[None, None, None]:
    """On a terminal a line that shows what a run says last; nothing elsewhere."""
    start = time.monotonic()
    try:
        while True:
            if sys.stdout.isatty():
                spent = progress.format_duration(time.monotonic() - start)
                line = f"{opening}  {name} {spent}  {subprocesses.last_line(log)}"
                print(f"\r\x1b[K{line[:100]}", end="", flush=True)
            yield
    finally:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)


def _score(run: Run) -> str:
    found = json.loads((run.results / "results.json").read_text())
    return f"average {100 * found['runs'][0]['average']['median']:.1f}"


def _report(runs: Sequence[Run], args: argparse.Namespace) -> None:
    from pemoe_jax.tools import report

    flags = [f"--output={args.output}", *["--with_paper"] * args.with_paper]
    report.report(report.FLAGS.parse_args([*(str(run.results) for run in runs), *flags]))


def expand_argument_files(argv: Sequence[str]) -> list[str]:
    """The arguments, with those of a file in place of @FILE.

    Raises:
      InputError: there is no such file, in the working folder or among the package's gin files.
    """
    found: list[str] = []
    for argument in argv:
        if not argument.startswith("@"):
            found.append(argument)
            continue
        places = [Path(argument[1:]), gin_flags.GIN_DIR / argument[1:]]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise InputError(f"{argument}: expected a file of arguments, found none")
        found += shlex.split(file.read_text(), comments=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        given = expand_argument_files(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return gin_flags.run_command(FLAGS, sweep, given)
