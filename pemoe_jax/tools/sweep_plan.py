"""Plans a sweep: a run for each experiment and seed, and the trials that choose values.

Settings of experiments are flags `--gin.SETTING=value` here. FROM, SEEDS and NAME are settings of
the sweep, not macros of gin: the functions `_split_…` take them out. Trials are the runs whose
scores choose the value of a `best()`, see `sweep_choices`.
"""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import file_io, gin_flags
from pemoe_jax.tools import sweep_choices

Command = Literal["train", "evaluate"]
# Macros that the sweep sets for each run. A user's value is an error: it would have no effect.
_SWEEP_MACROS = ("SEED", "MODEL_DIR", "CHECKPOINT_PATH", "EVAL_OUTPUT_DIR")
_PATH_MACROS = ("CHECKPOINT_PATH", "EVAL_OUTPUT_DIR")
_FROM, _SEEDS, _NAME = "--gin.FROM=", "--gin.SEEDS=", "--gin.NAME="
CHOICES = "choices"  # folder of the trials: a training and an evaluation for each value of best()
# INITIAL_CHECKPOINT_PATH may be a reference such as @quickstart.base(), which gin resolves when it
# calls a function.
_RESOLVE_BASE_CONFIG = """\
from __gin__ import dynamic_registration
from pemoe_jax.tools import sweep_plan
sweep_plan.resolve_base.path = %INITIAL_CHECKPOINT_PATH
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training and its evaluation, or the evaluation of a base model.

    Attributes:
      folder: output folder.
      train_flags: flags of `pemoe_jax.train`; empty for a base model.
      evaluate_flags: flags of `pemoe_jax.evaluate`.
      train_settings: gin settings that the trained parameters depend on.
      evaluate_settings: gin settings that the scores depend on.
      initial: folder of the run that FROM names, which this run starts from; None without FROM.
      direct: folder of the run of the same experiment without FROM and with the same seed; None if
        the sweep has none before this run.
    """

    folder: Path
    train_flags: list[str]
    evaluate_flags: list[str]
    train_settings: dict[str, str]
    evaluate_settings: dict[str, str]
    initial: Path | None = None
    direct: Path | None = None

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def commands(self) -> list[tuple[Command, list[str]]]:
        """Returns (command, flags) in the order in which they run."""
        train: list[tuple[Command, list[str]]] = [("train", self.train_flags)]
        return [*(train if self.train_flags else []), ("evaluate", self.evaluate_flags)]


class _Experiment(NamedTuple):
    """An experiment of the command line, split into its parts.

    Attributes:
      text: the argument, for errors.
      name: value of NAME, or a name made of the files and settings.
      files, settings: flags of its gin files and settings, without those of the sweep.
      seeds: a run is made for each.
      initial: name of the experiment that FROM names; None without FROM.
      direct: with FROM, name of an earlier experiment with the same files and settings but without
        FROM; None if there is none.
    """

    text: str
    name: str
    files: list[str]
    settings: list[str]
    seeds: list[int]
    initial: str | None
    direct: str | None


def resolve_base(path: str | None) -> str | None:
    """Returns INITIAL_CHECKPOINT_PATH: gin binds `path` to it, and resolves references."""
    return path


def plan_trials(
    args: argparse.Namespace, bindings: Sequence[str]
) -> dict[tuple[str, sweep_choices.Choice], dict[str, Run]]:
    """Returns the trials of each best(), as {(name of its experiment, its choice): {value: run}}.

    Trials are the runs of a sweep in the folder `CHOICES`, with the first of --seeds alone. They
    are scored on the mixture of --choose_on.

    Raises:
      InputError: a flag or an experiment is wrong.
    """
    trials = {}
    for experiment in args.experiments:
        files, settings = _split_experiment(experiment)
        settings, choice = sweep_choices.split_choice(settings, experiment)
        settings, _ = _split_seeds(settings, args.seeds)
        name, settings = _split_name(files, settings)
        if choice is None or choice.source:  # best_of() takes the value of another experiment
            continue
        # The experiment as text again, with each value in the place of best().
        words = [flag.removeprefix("--gin_file=").removeprefix("--gin.") for flag in files]
        words += [flag.removeprefix("--gin.") for flag in settings]
        trial_args = argparse.Namespace(**vars(args))
        trial_args.experiments = [
            "+".join([*words, f"{choice.setting}={v}"]) for v in choice.values
        ]
        trial_args.output = str(Path(args.output) / CHOICES)
        trial_args.seeds = args.seeds.partition(",")[0]
        trial_args.evaluate = f"{args.evaluate}+MIXTURE_OR_TASK_NAME={args.choose_on}"
        trial_args.no_base = True
        runs = plan_runs(trial_args, bindings)
        trials[name, choice] = dict(zip(choice.values, runs, strict=True))
    return trials


def plan_runs(
    args: argparse.Namespace, bindings: Sequence[str], chosen: Mapping[str, str] | None = None
) -> list[Run]:
    """Returns the runs that the flags describe, base models first; parses every configuration.

    Args:
      args, bindings: the parsed flags.
      chosen: experiment -> value of its best(); None: the first value of each.

    Raises:
      InputError: a flag or an experiment is wrong.
    """
    from pemoe_jax.checkpoints import run_settings

    file_io.resolve_output_folder(file_io.resolve_local(args.output, "--output"), "--output")
    file_io.check_no_pattern(Path(args.output).absolute(), "--output")
    _parse_seeds(args.seeds, "--seeds")  # raises for a wrong text
    if args.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {args.jobs}")
    _check_not_reserved([f"--gin.{binding}" for binding in [*bindings, *args.gin_bindings]])
    shared = [
        f"--{name}={getattr(args, name)}"
        for name in ("gin_search_paths", "seqio_additional_cache_dirs")
        if getattr(args, name)
    ]
    train_bindings = [*map(_binding_flag, bindings)]
    train_bindings += [f"--gin_bindings={line}" for line in args.gin_bindings]
    # Evaluations get only the macros of runs/tasks.gin: their run files do not know others, such as
    # TRAIN_STEPS.
    tasks_gin = (gin_flags.GIN_DIR / "runs" / "tasks.gin").read_text(encoding="utf-8")
    data_macros = set(re.findall(r"^([A-Z][A-Z0-9_]*) = ", tasks_gin, re.MULTILINE))
    data_bindings = [_binding_flag(b) for b in bindings if _binding_name(b) in data_macros]
    files, settings = _split_experiment(args.evaluate)
    _check_not_reserved(settings, "--evaluate")
    evaluate_flags = [*files, *shared, *data_bindings, *settings]

    runs: list[Run] = []
    bases: dict[str, None] = {}  # an ordered set
    for experiment in _resolve_experiments(args.experiments, args.seeds, chosen or {}):
        files = [*experiment.files, *(f"--gin_file={file}" for file in args.gin_file)]
        data_settings = [
            flag
            for flag in experiment.settings
            if _binding_name(flag.removeprefix("--gin.")) in data_macros
        ]
        experiment_flags = [*files, *shared, *train_bindings, *experiment.settings]
        for seed in experiment.seeds:
            folder = _folder(args.output, experiment.name, seed)
            by_folder = {run.folder: run for run in runs}
            # `_describe_experiment` replaces characters, so two experiments may get the same name.
            if folder in by_folder:
                raise InputError(
                    f"{experiment.text}: another experiment has the name {experiment.name}"
                )
            flags = [*experiment_flags, f"--gin.SEED={seed}", f"--gin.MODEL_DIR={folder}"]
            initial = direct = None
            if experiment.initial is not None:
                initial = _folder(args.output, experiment.initial, seed)
                if initial not in by_folder:
                    earlier = dict.fromkeys(path.name.rpartition("-seed")[0] for path in by_folder)
                    raise InputError(
                        f"{experiment.text}: FROM must name an experiment before this one"
                        f" ({', '.join(earlier) or 'none'}), got {experiment.initial!r}"
                    )
                flags.append(f"--gin.INITIAL_CHECKPOINT_PATH={initial}")
                if experiment.direct is not None:
                    direct = _folder(args.output, experiment.direct, seed)
            train_settings = _parse_settings("train", flags, experiment.text)
            if initial is not None:
                # The initial run is compared by its settings, and not by its path, since the output
                # folder may be moved.
                fingerprint = run_settings.fingerprint(by_folder[initial].train_settings)
                text = f"the run of {experiment.initial} with settings {fingerprint}"
                train_settings["INITIAL_CHECKPOINT_PATH"] = text
            elif (base := _parsed_base(experiment.text)) is not None:
                bases[base] = None
            scoring_flags = [*evaluate_flags, *data_settings, f"--gin.CHECKPOINT_PATH={folder}"]
            run = _make_run(folder, flags, train_settings, scoring_flags)
            direct = direct if direct in by_folder else None
            runs.append(dataclasses.replace(run, initial=initial, direct=direct))
    base_runs: list[Run] = []
    for number, base in enumerate([] if args.no_base else bases, 1):
        folder = Path(args.output) / ("base" if number == 1 else f"base_{number}")
        flags = [*evaluate_flags, f"--gin.CHECKPOINT_PATH={base}"]
        base_runs.append(_make_run(folder, [], {"base": base}, flags))
    # Bases first, so that a mistake in --evaluate shows before hours of training.
    return base_runs + runs


def _resolve_experiments(
    texts: Sequence[str], default_seeds: str, chosen: Mapping[str, str]
) -> list[_Experiment]:
    """Splits the texts of experiments, and replaces best() and best_of() by values.

    Args:
      texts: the experiments of the command line, in order.
      default_seeds: text of --seeds, for experiments without SEEDS.
      chosen: name of an experiment -> value of its best(); by default the first value.

    Raises:
      InputError: a text is wrong, or best_of() names no experiment with best() before its own.
    """
    experiments = []
    values: dict[str, str] = {}  # name of an experiment -> the value that its best() has
    names: dict[str, str] = {}  # files and settings of an experiment -> its name
    for text in texts:
        files, settings = _split_experiment(text)
        _check_not_reserved(settings, text)
        settings, choice = sweep_choices.split_choice(settings, text)
        settings, seeds = _split_seeds(settings, default_seeds)
        name, settings = _split_name(files, settings)
        names[_describe_experiment(files, settings)] = name
        settings, initial = _split_from(settings, text)
        direct = names.get(_describe_experiment(files, settings))  # now without FROM
        if choice is not None:
            if choice.values:
                values[name] = chosen.get(name, choice.values[0])
            if (choice.source or name) not in values:
                raise InputError(
                    f"{text}: best_of() must name an experiment with best() before this one"
                    f" ({', '.join(values) or 'none'}), got {choice.source!r}"
                )
            settings.append(f"--gin.{choice.setting}={values[choice.source or name]}")
        experiments.append(_Experiment(text, name, files, settings, seeds, initial, direct))
    return experiments


def _check_not_reserved(settings: Sequence[str], where: str = "") -> None:
    """Raises InputError, with `where` in front, if a setting is one that the sweep sets."""
    for setting in settings:
        name = _binding_name(setting.removeprefix("--gin."))
        if name in _SWEEP_MACROS:
            hint = " from --seeds" if name == "SEED" else ""
            prefix = f"{where}: " if where else ""
            raise InputError(f"{prefix}--gin.{name}: the sweep sets it{hint}")


def _make_run(
    folder: Path,
    train_flags: list[str],
    train_settings: dict[str, str],
    evaluate_flags: Sequence[str],
) -> Run:
    """Returns a run; adds the output folder to the flags of its evaluation, and parses them."""
    flags = [*evaluate_flags, f"--gin.EVAL_OUTPUT_DIR={folder / 'results'}"]
    settings = _parse_settings("evaluate", flags, "--evaluate")
    # Scores stay valid if the output folder is moved.
    settings = {name: value for name, value in settings.items() if name not in _PATH_MACROS}
    return Run(folder, train_flags, flags, train_settings, settings)


def _split_from(settings: Sequence[str], experiment: str) -> tuple[list[str], str | None]:
    """Splits settings --gin.SETTING=value -> (those other than FROM, the value of FROM or None).

    Raises:
      InputError: FROM is set twice, or together with INITIAL_CHECKPOINT_PATH, which it replaces.
    """
    names = [flag.removeprefix(_FROM) for flag in settings if flag.startswith(_FROM)]
    rest = [flag for flag in settings if not flag.startswith(_FROM)]
    if len(names) > 1:
        raise InputError(f"{experiment}: expected a single FROM, got {len(names)}")
    if names and any(flag.startswith("--gin.INITIAL_CHECKPOINT_PATH=") for flag in rest):
        raise InputError(
            f"{experiment}: INITIAL_CHECKPOINT_PATH must not be set with FROM, which sets it"
        )
    return rest, names[0] if names else None


def _split_seeds(settings: Sequence[str], default: str) -> tuple[list[str], list[int]]:
    """Splits settings --gin.SETTING=value -> (those other than SEEDS, the seeds).

    `default` is the text of --seeds, for settings without SEEDS.
    """
    texts = [flag.removeprefix(_SEEDS) for flag in settings if flag.startswith(_SEEDS)]
    seeds = _parse_seeds(texts[-1], "SEEDS") if texts else _parse_seeds(default, "--seeds")
    return [flag for flag in settings if not flag.startswith(_SEEDS)], seeds


def _parse_seeds(text: str, setting: str) -> list[int]:
    """Returns the distinct seeds of a text such as '0,1,2'; InputError for any other text."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"{setting} must be integers joined by commas, got {text!r}")
    return list(dict.fromkeys(map(int, text.split(","))))


def _split_experiment(text: str) -> tuple[list[str], list[str]]:
    """Returns an experiment's flags of files and of settings.

    'a.gin+B=1' becomes (['--gin_file=a.gin'], ['--gin.B=1']).

    Raises:
      InputError: a part is neither a gin file nor SETTING=value.
    """
    parts = re.split(r"\+(?=[A-Za-z_./~])", text)  # not the + of 1e+3
    files = [f"--gin_file={part}" for part in parts if "=" not in part]
    if not all(file.endswith(".gin") for file in files):
        raise InputError(f"{text}: expected gin files and SETTING=value joined by +")
    return files, [f"--gin.{part}" for part in parts if "=" in part]


def _split_name(files: Sequence[str], settings: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the name of an experiment, and its settings --gin.SETTING=value other than NAME.

    Raises:
      InputError: NAME has characters that a folder's name cannot have.
    """
    rest = [flag for flag in settings if not flag.startswith(_NAME)]
    names = [flag.removeprefix(_NAME) for flag in settings if flag.startswith(_NAME)]
    if not names:
        return _describe_experiment(files, rest), rest
    if not re.fullmatch(r"\w[\w.=-]*", names[-1]):
        raise InputError(f"NAME must be letters, digits and '_.=-', got {names[-1]!r}")
    return names[-1], rest


def _describe_experiment(files: Sequence[str], settings: Sequence[str]) -> str:
    """Returns a folder's name: 'mov_B=1_FROM=mov' for methods/mov.gin, B=1 and FROM=mov."""
    words = [Path(flag.removeprefix("--gin_file=")).stem for flag in files]
    words += [flag.removeprefix("--gin.") for flag in settings]
    return re.sub(r"[^\w.=-]+", "_", "_".join(words)).strip("_.")


def _folder(output: str, experiment: str, seed: int) -> Path:
    return Path(output) / f"{experiment}-seed{seed}"


def _binding_name(binding: str) -> str:
    return binding.partition("=")[0].strip()


def _binding_flag(binding: str) -> str:
    """Returns the flag of a binding, without quotes around its value if they make no difference."""
    name, value = (part.strip() for part in binding.split("=", 1))
    # The commands that --dry_run prints are easier to read without quotes inside quotes.
    plain = f"--gin.{name}={value[1:-1]}"
    return plain if gin_flags.split_bindings([plain])[1] == [binding] else f"--gin.{name}={value}"


def _parse_settings(command: str, flags: Sequence[str], where: str) -> dict[str, str]:
    """Parses a command's flags and returns the settings that its result depends on."""
    import gin

    from pemoe_jax import evaluate, train
    from pemoe_jax.checkpoints import run_settings

    parser = {"train": train.FLAGS, "evaluate": evaluate.FLAGS}[command]
    rest, bindings = gin_flags.split_bindings(flags)
    try:
        gin_flags.load_config(parser.parse_args(rest), bindings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    # The parsed configuration, not the flags: two ways to write one setting must compare equal.
    config = gin.config_str()
    settings = run_settings.parse_settings(config)
    if f"{command}.{command}.data = " not in config:
        raise InputError(f"{where}: expected a run file of {command}, such as runs/…, got none")
    if command == "train":
        kinds = {"MODEL": "model file", "TRAINABLE": "method file"}
        missing = [kind for macro, kind in kinds.items() if settings[macro] == "None"]
        if missing:
            raise InputError(
                f"{where}: expected files of a model and of a method, got no"
                f" {' and no '.join(missing)}"
            )
    return settings


def _parsed_base(where: str) -> str | None:
    """Returns the base model of the configuration that was parsed last."""
    import gin

    try:
        with gin.unlock_config():
            gin.parse_config(_RESOLVE_BASE_CONFIG)
        return gin_flags.call_configured(resolve_base)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def expand_argument_files(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with each @FILE replaced by the arguments in that file.

    Raises:
      InputError: the file exists neither in the working folder nor in the package's gin folder, or
        does not hold arguments.
    """
    # argparse's fromfile_prefix_chars knows neither comments, quotes nor the package's folder.
    expanded: list[str] = []
    for argument in argv:
        if not argument.startswith("@"):
            expanded.append(argument)
            continue
        file = find_file(argument[1:])
        if file is None:
            raise InputError(f"{argument}: expected a file of arguments, got no such file")
        try:
            expanded += shlex.split(file.read_text(encoding="utf-8-sig"), comments=True)
        except ValueError as error:  # not UTF-8, or a quote that is not closed
            raise InputError(f"{argument}: expected arguments, got {first_line(error)}") from None
    return expanded


def find_file(name: str) -> Path | None:
    """Returns a file of the working folder, else of the package's gin folder, else None."""
    candidates = [Path(name), gin_flags.GIN_DIR / name]
    return next((path for path in candidates if path.is_file()), None)
