"""`pemoe sweep`: trains and evaluates experiments with several seeds and reports them."""

import argparse
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.runtime import atomic_write, file_io, folder_lock, gin_flags, progress, run_file
from pemoe_jax.tools import report, subprocesses, sweep_choices, sweep_plan
from pemoe_jax.tools.sweep_plan import Command, Run

if TYPE_CHECKING:
    from pemoe_jax.analysis.zero_shot import claims as claims_lib

_DESCRIPTION = """\
Trains each EXPERIMENT with each seed, evaluates it, and writes one report: median
over prompts, mean and standard deviation over seeds. Each training and each
evaluation is a separate process. Run the same command again to continue a sweep:
it skips finished runs, resumes stopped ones from their checkpoints and retries
failed ones.

An EXPERIMENT is gin files and settings joined by +. Its files come before those
of --gin_file, so that a method precedes the run file; its settings override all
others. +NAME=direct names the experiment, +SEEDS=0,1 replaces --seeds for it.
+FROM=direct starts it from the run of the experiment `direct`, before it in the
sweep, with the same seed; gains.md has its gain over the same experiment without
FROM. +SETTING=best(A,B,C) first trains the experiment with each value and the
first of --seeds, and takes the value with the highest accuracy on --choose_on;
+SETTING=best_of(direct) takes the value of the experiment `direct`. @FILE inserts
the arguments of a file, in which # starts a comment."""

_EPILOG = """\
--gin.SETTING=value is passed to every training. Settings that locate the data
(the macros of runs/tasks.gin) are passed to evaluation as well, both those of
--gin and those of an experiment. Join settings for evaluation only to --evaluate
with +.

output in DIR: report.md, .csv, .json and .png; for each run its MODEL_DIR
<experiment>-seed<n>/ with train.log, evaluate.log and results/; base/ with the
scores of the base model; gains.md, if an experiment has FROM; choices.md, .json
and the folder choices/ with the trainings that were compared, if one has best();
claims.md, .json and .png, if --claims names a file of claims.

examples:
  pemoe sweep @sweeps/quickstart_flan.txt --output=/tmp/flan
  pemoe sweep methods/mov.gin methods/mov.gin+routing/top_1.gin \\
    methods/mov.gin+NUM_EXPERTS=30 --gin_file=runs/quickstart.gin \\
    --evaluate=runs/quickstart_evaluate.gin --seeds=0,1,2 --output=/tmp/sweep
"""

FLAGS = argparse.ArgumentParser(
    prog="pemoe sweep",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)
FLAGS.add_argument(
    "experiments", nargs="+", metavar="EXPERIMENT", help="FILE[+FILE…][+SETTING=value…]"
)
FLAGS.add_argument("--output", required=True, metavar="DIR", help="output folder")
FLAGS.add_argument(
    "--evaluate", required=True, metavar="FILE[+…]", help="gin files and settings of evaluation"
)
FLAGS.add_argument(
    "--seeds", default="0", metavar="N,N", help="seeds joined by commas (default: 0)"
)
for _flag, _metavar, _help in (
    ("--gin_file", "FILE", "a gin file for every training; may be repeated"),
    ("--gin_bindings", "LINE", "a line of gin for every training; may be repeated"),
):
    FLAGS.add_argument(_flag, action="append", default=[], metavar=_metavar, help=_help)
for _flag in ("--gin_search_paths", "--seqio_additional_cache_dirs"):
    FLAGS.add_argument(_flag, default="", metavar="DIR,DIR", help="as for pemoe train")
FLAGS.add_argument(
    "--jobs",
    type=int,
    default=1,
    metavar="N",
    help="number of runs at the same time, which share the cores (default: 1)",
)
FLAGS.add_argument("--claims", metavar="FILE", help="JSON file of claims to compare with results")
FLAGS.add_argument(
    "--choose_on",
    default="jsonl_train_score_eval",
    metavar="MIXTURE",
    help="mixture whose accuracy chooses the value of best() (default: jsonl_train_score_eval, the"
    " validation splits of training tasks)",
)
FLAGS.add_argument("--no_base", action="store_true", help="do not evaluate the base model")
FLAGS.add_argument(
    "--stop_at_failure", action="store_true", help="do not continue with the other runs"
)
FLAGS.add_argument("--with_paper", action="store_true", help="add published rows to the report")
FLAGS.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")

_MODULES: dict[Command, str] = {"train": "pemoe_jax.train", "evaluate": "pemoe_jax.evaluate"}
_TICK = 0.1  # seconds between two checks of the running commands


class State(TypedDict):
    """The content of a run's `sweep.json`.

    `settings` are those of training, `scoring` those of evaluation. `train` and `evaluate` are the
    seconds that these commands took, None for one that has not finished.
    """

    settings: dict[str, str]
    scoring: dict[str, str]
    train: float | None
    evaluate: float | None


class _ActiveRun(NamedTuple):
    """A run whose commands are running.

    Attributes:
      run: the run.
      commands: the generator of `_run_commands`, which is advanced at each tick.
      cores: CPUs that the commands may use.
    """

    run: Run
    commands: Generator[str, None, str]
    cores: list[int]


def sweep(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Runs the sweep that the flags describe.

    Raises:
      InputError: a flag or an experiment is wrong, in which case nothing runs; or runs failed, in
        which case the report has the others.
    """
    output = Path(args.output)
    trials = sweep_plan.plan_trials(args, bindings)
    trial_runs = [run for by_value in trials.values() for run in by_value.values()]
    claims = _load_claims(args.claims) if args.claims else []
    # All configurations are checked before anything runs. Until a value is chosen, best() has its
    # first one.
    runs = sweep_plan.plan_runs(args, bindings)
    if args.dry_run:
        for run in [*trial_runs, *runs]:
            for name, flags in run.commands():
                print(shlex.join(["pemoe", name, *flags]))
        return
    # Raises if a folder belongs to something else. With trials, the values of best() in `runs` are
    # not final yet, so the states of these runs are read after the choice.
    for run in [*trial_runs, *([] if trials else runs)]:
        _read_state(run)
    # SIGTERM raises KeyboardInterrupt, as SIGINT does, so that running trainings can save.
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: list[str] = []
    try:
        lock = folder_lock.hold(output, "--output")
        _begin_run_file(args)
        if trials:
            failed = _run_all(trial_runs, lock, args.stop_at_failure, args.jobs)
            _report(trial_runs, output / sweep_plan.CHOICES)
            if not (failed and args.stop_at_failure):
                runs = sweep_plan.plan_runs(args, bindings, _choose(trials, output))
                for run in runs:
                    _read_state(run)
        if not (failed and args.stop_at_failure):
            failed += _run_all(runs, lock, args.stop_at_failure, args.jobs)
            _report(runs, output, args.with_paper)
            _report_gains(runs, output)
            if claims:
                _report_claims(claims, runs, output)
    except KeyboardInterrupt:
        print("stopped: run the same command to continue", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(trial_runs) + len(runs)} runs failed ({', '.join(failed)}): run"
            " the same command to retry them"
        )


def _begin_run_file(args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import records

    run_file.begin(
        Path(args.output),
        versions=records.package_versions(),
        config=None,  # each run has its own
        experiments=list(args.experiments),
    )


def _report(runs: Sequence[Run], output: Path, with_paper: bool = False) -> None:
    """Writes and prints the report of the finished runs, if there are any."""
    folders = [str(run.results) for run in _finished(runs)]
    if folders:
        # In this process: another start of Python would take seconds.
        flags = [f"--output={output}", *["--with_paper"] * with_paper]
        report.report(report.FLAGS.parse_args([*folders, *flags]))


def _finished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if _read_state(run)["evaluate"]]


# --- running ---


def _read_state(run: Run) -> State:
    """Returns the state of a run, from its `sweep.json` if there is one.

    If the settings of scoring have changed, or its results are missing, the run's evaluation counts
    as unfinished.

    Raises:
      InputError: the folder holds a run with other settings, a damaged `sweep.json`, or files that
        no sweep wrote.
    """
    from pemoe_jax.checkpoints import run_settings

    file = run.folder / "sweep.json"
    if not file.exists():
        if run.folder.exists() and any(run.folder.iterdir()):
            raise InputError(
                f"{run.folder}: expected a run of a sweep, got other files; choose another --output"
            )
        return State(
            settings=run.train_settings, scoring=run.evaluate_settings, train=None, evaluate=None
        )
    try:
        state: State = file_io.parse_json(file.read_text(encoding="utf-8"))
        # Older versions also recorded bindings that only pass macros on.
        previous = run_settings.drop_wiring(state["settings"])
        scoring = run_settings.drop_wiring(state["scoring"])
        for seconds in (state["train"], state["evaluate"]):
            if seconds is not None and not (type(seconds) in (int, float) and seconds > 0):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{file}: expected the state of a sweep's run; delete {run.folder} to run it again"
        ) from None
    # The error has the first difference only: a run has too many settings to print.
    for name in {**previous, **run.train_settings}:
        old, new = (s.get(name, "(not set)") for s in (previous, run.train_settings))
        if old != new:
            raise InputError(
                f"{run.folder}: expected {name} = {old}, the setting of its run, got {new}; choose"
                " another --output or delete the folder"
            )
    # A changed evaluation is repeated, which is cheap. A changed training is an error, see above.
    if scoring != run.evaluate_settings or not (run.results / "results.json").is_file():
        return {**state, "scoring": run.evaluate_settings, "evaluate": None}
    return state


def _run_all(runs: Sequence[Run], lock: int, stop_at_failure: bool, jobs: int) -> list[str]:
    """Runs the unfinished runs, `jobs` at a time; returns the names of those that failed.

    Args:
      runs: the runs, in the order in which they start.
      lock: file descriptor of the sweep's lock.
      stop_at_failure: whether no further run starts after one that failed.
      jobs: number of runs at the same time.
    """
    # All lines are flushed, because Python buffers output to a file.
    logs = f"{runs[0].folder.parent}/<run>/"
    print(f"{plural(len(runs), 'run')}, with logs in {logs}", flush=True)
    width = max(len(run.folder.name) for run in runs)
    prefixes = {
        run.folder: f"[{number:>{len(str(len(runs)))}}/{len(runs)}] {run.folder.name:<{width}}"
        for number, run in enumerate(runs, 1)
    }
    failed: list[str] = []
    waiting = {run.folder: run for run in runs}
    active: dict[Path, _ActiveRun] = {}
    free_cores = subprocesses.split_cores(jobs)
    with subprocesses.end_children() as children:
        while waiting or active:
            # Start runs while cores are free; a run waits for the one that it starts FROM.
            for folder, run in list(waiting.items()):
                if not free_cores or run.initial in {*waiting, *active}:
                    continue
                del waiting[folder]
                state = _read_state(run)
                if state["evaluate"]:
                    print(f"{prefixes[folder]}  already finished  {_score(run)}", flush=True)
                    continue
                cores = free_cores.pop(0)
                commands = _run_commands(run, state, lock, cores, children)
                active[folder] = _ActiveRun(run, commands, cores)
            # Ask each active run for its status, and report those that have ended.
            statuses = []
            for folder, (run, commands, cores) in list(active.items()):
                try:
                    statuses.append(f"{prefixes[folder]}  {next(commands)}")
                    continue
                except StopIteration as end:
                    problem = end.value
                del active[folder]
                free_cores.append(cores)
                if problem:
                    failed.append(folder.name)
                    waiting = {} if stop_at_failure else waiting
                    line = f"FAILED {problem}"
                else:
                    line = _describe_end(run, runs, len(waiting) + len(active), jobs)
                print(f"{prefixes[folder]}  {line}", flush=True)
            _show(statuses)
    return failed


def _describe_end(run: Run, runs: Sequence[Run], unfinished: int, jobs: int) -> str:
    """Returns the durations and the score of a run, and the time left for the unfinished runs."""
    state = _read_state(run)
    words = [f"{name} {progress.format_duration(state[name] or 0)}" for name, _ in run.commands()]
    words.append(_score(run))
    # The time left is the mean over finished runs times the number of unfinished ones. Base models,
    # which take much less time, are not in the mean.
    states = [_read_state(other) for other in runs if other.train_flags]
    seconds = [(s["train"] or 0) + s["evaluate"] for s in states if s["evaluate"]]
    if seconds:
        left = statistics.mean(seconds) * unfinished / jobs
        words.append(f"left {progress.format_duration(left)}")
    return "  ".join(words)


def _show(statuses: Sequence[str]) -> None:
    """Waits for a tick if commands run; on a terminal, shows their statuses in a line meanwhile."""
    show = sys.stdout.isatty() and statuses
    if show:
        # At most 100 columns, since a line that wraps could not be erased.
        width = 100 // len(statuses) - 2
        print("\r\x1b[K" + "  ".join(s[:width] for s in statuses), end="", flush=True)
    try:
        time.sleep(_TICK if statuses else 0)
    finally:
        if show:
            print("\r\x1b[K", end="", flush=True)


def _run_commands(
    run: Run, state: State, lock: int, cores: Sequence[int], children: list[subprocess.Popen]
) -> Generator[str, None, str]:
    """Runs a run's unfinished commands and records them.

    Args:
      run, state: the run and its state.
      lock: file descriptor that the commands inherit.
      cores: CPUs that they may use; empty: all.
      children: list to which their processes are added.

    Yields:
      A text until all commands have ended: the running command, its duration, and the last line of
      its log.

    Returns:
      The error; '' without one.
    """
    atomic_write.write_json(run.folder / "sweep.json", state)
    for name, flags in run.commands():
        if state[name]:
            continue
        if name == "train" and run.initial is not None and not _is_trained(run.initial):
            return f"in train: {run.initial.name}, which it starts FROM, is not trained"
        if name == "evaluate":
            # Results of an earlier evaluation, which a new one may refuse to overwrite.
            shutil.rmtree(run.results, ignore_errors=True)
        log = run.folder / f"{name}.log"
        start = time.monotonic()
        child = subprocesses.start_module(_MODULES[name], flags, log, lock, cores)
        children.append(child)
        while (code := child.poll()) is None:
            duration = progress.format_duration(time.monotonic() - start)
            yield f"{name} {duration}  {subprocesses.last_line(log)}"
        if code:
            return f"in {name}, {subprocesses.describe_exit(code, log)} (log: {log})"
        # A training that was ended by SIGTERM has saved a checkpoint, and exits with 0 as well.
        last = run.folder / f"checkpoint_{run.train_settings.get('TRAIN_STEPS')}"
        if name == "train" and not last.is_dir():
            return f"in train, {subprocesses.last_line(log)} (log: {log})"
        # At least 0.1: `sweep` takes 0 for unfinished.
        state[name] = max(0.1, round(time.monotonic() - start, 1))
        atomic_write.write_json(run.folder / "sweep.json", state)
    return ""


def _is_trained(folder: Path) -> bool:
    """Whether a run's training has finished."""
    # Its checkpoints do not tell: an unfinished training has some as well.
    state = file_io.read_json(folder / "sweep.json")
    return bool(state["train"])


def _choose(
    trials: Mapping[tuple[str, sweep_choices.Choice], Mapping[str, Run]], output: Path
) -> dict[str, str]:
    """Chooses the values of best() by the results of the trials, and prints and writes them.

    Returns:
      Experiment -> the chosen value.

    Raises:
      InputError: all trials of an experiment failed.
    """
    from pemoe_jax.analysis import tables

    chosen = []
    for (name, choice), by_value in trials.items():
        finished = _finished(list(by_value.values()))
        folders = {value: run.results for value, run in by_value.items() if run in finished}
        chosen.append(sweep_choices.choose(name, choice, folders))
    table = sweep_choices.choices_table(chosen)
    tables.print_tables([table])
    atomic_write.write_text(output / "choices.md", tables.to_markdown([table]))
    atomic_write.write_json(output / "choices.json", {"choices": chosen})
    return {entry["experiment"]: entry["value"] for entry in chosen}


def _report_gains(runs: Sequence[Run], output: Path) -> None:
    """Prints and writes the gains of experiments that start FROM another run, if there are any."""
    from pemoe_jax.analysis import tables
    from pemoe_jax.analysis.zero_shot import gains

    finished = _finished(runs)
    folders = {run.folder for run in finished}
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for run in finished:
        if run.direct in folders:
            experiment = run.folder.name.rpartition("-seed")[0]
            pairs.setdefault(experiment, []).append((run.results, run.direct / "results"))
    if pairs:
        table = gains.build_gains_table(pairs)
        tables.print_tables([table])
        atomic_write.write_text(output / "gains.md", tables.to_markdown([table]))


def _load_claims(file: str) -> "list[claims_lib.Claim]":
    from pemoe_jax.analysis.zero_shot import claims

    return claims.load_claims(sweep_plan.find_file(file) or Path(file))


def _report_claims(claims: "Sequence[claims_lib.Claim]", runs: Sequence[Run], output: Path) -> None:
    """Compares claims with the results of the finished runs; prints and writes the comparison."""
    from pemoe_jax.analysis import tables
    from pemoe_jax.analysis.zero_shot import claims_report, results

    by_experiment: dict[str, dict[int, results.JsonObject]] = {}
    base = None
    for run in _finished(runs):
        (result,) = results.load_results(str(run.results))["runs"]
        experiment, _, seed = run.folder.name.rpartition("-seed")
        if run.train_flags:
            by_experiment.setdefault(experiment, {})[int(seed)] = result
        else:
            base = base or result  # claims refer to the first base of the sweep
    choices_file = output / "choices.json"
    choices = file_io.read_json(choices_file)["choices"] if choices_file.exists() else []
    comparison = claims_report.build_report(claims, by_experiment, choices, base)
    claim_tables = claims_report.to_tables(comparison)
    tables.print_tables(claim_tables)
    atomic_write.write_json(output / "claims.json", comparison)
    claims_report.draw_forest(comparison, output / "claims.png")
    image = "![Difference of each claim, with intervals](claims.png)"
    atomic_write.write_text(output / "claims.md", tables.to_markdown(claim_tables) + f"\n{image}\n")
    print(claims_report.summary(comparison))


def _score(run: Run) -> str:
    """Returns the average accuracy of a finished run, as text."""
    results = file_io.read_json(run.results / "results.json")
    return f"average {100 * results['runs'][0]['average']['median']:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        arguments = sweep_plan.expand_argument_files(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return gin_flags.run_command(FLAGS, sweep, arguments)
