"""The flags and gin files of the commands, with T5X's names."""

import argparse
import ast
import contextlib
import functools
import logging
import os
import re
import sys
import tokenize
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import (
    compile_cache,
    distributed,
    folder_lock,
    gin_cycles,
    gin_errors,
    gin_help,
    gin_types,
    host_memory,
    run_file,
    seqio_cache_dirs,
)

T = TypeVar("T")

GIN_DIR = gin_help.GIN_DIR  # the package's gin files

# Run files read these macros, and model and method files set them. Their default is None.
_SET_BY_MODEL_AND_METHOD = (
    "MODEL",
    "METHOD",
    "TRAINABLE",
    "LEARNING_RATE",
    "FREEZE",
    "UPCYCLE_NOISE",
)

# Method files read this macro, and model files set it. A command that opens checkpoints may have no
# model file. The macro's default, None, is set only after the gin files and the check of macro
# names, so that a flag for the macro is an error if no gin file sets it.
_SET_BY_MODEL = "SPARSE_STEP"

# Model files read DROPOUT_RATE, which only run files set; some run files read DTYPE, which only
# model files set. Some commands take only one of the two files.
_DEFAULTS = "DROPOUT_RATE = 0.0\nDTYPE = None\n"

# Modules that --gin.… can name. They are imported for flags and again in each gin file, because an
# import in a gin file holds for that file alone.
_MODULES = {
    "pemoe_jax": ("evaluate", "infer", "tasks", "train"),
    "pemoe_jax.core": (
        "adapters",
        "freezing",
        "network",
        "optim",
        "partitioning",
        "routing",
        "sparse",
        "steps",
    ),
    "pemoe_jax.runtime": ("options",),
    "pemoe_jax.tools": ("embed", "routes"),
}
_IMPORTS = [
    "from __gin__ import dynamic_registration",
    *(f"from {package} import {name}" for package, names in _MODULES.items() for name in names),
]

# gin raises these for a missing file, a line that does not parse, and an unknown name or import.
_GIN_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    ImportError,
    NameError,
    AttributeError,
    TypeError,
    tokenize.TokenError,
)

# Bindings that run files have, for commands without a run file: they select what trains.
FREEZE_BINDINGS = """\
from pemoe_jax.core import freezing
freezing.trainable_patterns.trainable = %TRAINABLE
freezing.trainable_patterns.freeze = %FREEZE
"""

# Files whose macros `--help` lists for commands that take model and method files.
MODEL_AND_METHOD_FILES = (
    "models/t5_1_1.gin",
    "methods/flan_moe.gin",
    "methods/molora.gin",
    "methods/mov.gin",
)

# Commands that read tasks, by the names of their modules.
_TASK_COMMANDS = ("train", "evaluate", "infer", "embed", "routes", "export_tasks")

_EPILOG = """\
gin files are searched in the working folder, in --gin_search_paths and in the package's gin/.
--gin.MACRO=value sets a macro; a value that is not a gin literal is a string.
--gin.MODULE.FUNCTION.PARAMETER=value sets any other parameter.
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose `--help` lists macros; only then are gin files read."""

    macro_texts: Sequence[str] = ()
    example = ""

    def format_help(self) -> str:
        macros = gin_help.describe_macros([_DEFAULTS, *self.macro_texts])
        self.epilog = f"macros:\n{macros}\n\n{_EPILOG}\nexample:\n{self.example}"
        return super().format_help()


def make_parser(
    command: str, description: str, example: str, macros: Sequence[str]
) -> argparse.ArgumentParser:
    """Returns a parser with the flags that all commands with gin files share.

    Args:
      command: name of the command.
      description: what the command does, for `--help`.
      example: command lines, for `--help`.
      macros: gin texts or files of the package, whose macros `--help` lists.
    """
    parser = _Parser(
        prog=f"pemoe {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.macro_texts, parser.example = macros, example
    for flag, name, text in (
        ("--gin_file", "FILE", "a gin file; may be repeated"),
        ("--gin_bindings", "LINE", "a line of gin: `MODEL_DIR = '/tmp/run'`; may be repeated"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=name, help=text)
    text = "folders to search for gin files, separated by commas"
    parser.add_argument("--gin_search_paths", default="", metavar="DIR,DIR", help=text)
    if command in _TASK_COMMANDS:
        add_cache_dirs_flag(
            parser, "folders of seqio's offline caches, separated by commas, for USE_CACHED_TASKS"
        )
    return parser


def add_cache_dirs_flag(flags: argparse.ArgumentParser, text: str) -> None:
    """Adds the flag for the folders of seqio's offline caches, which `run_command` registers."""
    flags.add_argument("--seqio_additional_cache_dirs", default="", metavar="DIR,DIR", help=text)


def _as_gin_value(text: str) -> str:
    """Returns gin literals, macros and references unchanged, anything else as a quoted string."""
    stripped = text.strip()
    try:
        if stripped[:1] not in ("@", "%"):
            ast.literal_eval(stripped)
    except (ValueError, SyntaxError):
        if stripped[:1] not in ("[", "(", "{"):  # a list or dict may hold references
            return repr(text)
    return stripped


def split_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates arguments `--gin.NAME=value` from others -> (others, gin bindings)."""
    rest, bindings = [], []
    for argument in argv:
        if argument.startswith("--gin."):
            name, equals, value = argument[len("--gin.") :].partition("=")
            if not equals:
                raise InputError(f"{argument}: expected --gin.NAME=value, got no '='")
            bindings.append(f"{name} = {_as_gin_value(value)}")
        else:
            rest.append(argument)
    return rest, bindings


def check_no_bindings(bindings: Sequence[str]) -> None:
    """Raises InputError if a command without gin settings got some."""
    if bindings:
        name = bindings[0].partition(" ")[0]
        raise InputError(f"--gin.{name}: this command takes no gin settings")


def load_config(
    args: argparse.Namespace, bindings: Sequence[str], macros: Sequence[str] = ()
) -> None:
    """Parses the gin files and bindings.

    Args:
      args: parsed flags.
      bindings: bindings of `--gin.NAME=value`, from `split_bindings`.
      macros: lines 'NAME = value' for the command's own macros, parsed before any file.

    Raises:
      InputError: a file is missing, a line does not parse, a name does not exist, a value has a
        wrong type or range, or a setting has no effect.
    """
    import importlib.util  # noqa: F401  gin uses it without importing it

    import gin

    if not args.gin_file:
        raise InputError(
            "no gin file: pass --gin_file=… for a model, a method and a run (see --help)"
        )
    gin.clear_config()
    for folder in [*filter(None, args.gin_search_paths.split(",")), str(GIN_DIR)]:
        gin.add_config_file_search_path(folder)
    lines = [*_IMPORTS, *args.gin_bindings, *bindings]
    try:
        # Later values win: defaults, then files, then flags.
        gin.parse_config([f"{macro} = None" for macro in _SET_BY_MODEL_AND_METHOD])
        gin.parse_config([_DEFAULTS, *macros])
        with _local_files_alone():
            gin.parse_config_files_and_bindings(args.gin_file, [], finalize_config=False)
        _check_macro_names(bindings, args.gin_bindings, args.gin_file)
        if macro_value(_SET_BY_MODEL) is None:
            gin.parse_config(f"{_SET_BY_MODEL} = None")
        in_files = {selector for _, selector in gin.config._CONFIG}
        gin.parse_config_files_and_bindings([], lines, finalize_config=False)
        gin_types.check_texts(gin.config._CONFIG)  # gin's own checks print the configuration
        gin.finalize()
    except InputError:
        raise
    except _GIN_ERRORS as error:
        raise InputError(gin_errors.describe_error(error, lines)) from error
    gin_types.check_bindings([*_SET_BY_MODEL_AND_METHOD, _SET_BY_MODEL])
    gin_cycles.check_cycles(gin.config._CONFIG)
    _check_routers_have_effect()
    _check_has_effect([*args.gin_bindings, *bindings], in_files)


@contextlib.contextmanager
def _local_files_alone() -> Iterator[None]:
    """Makes gin read files as UTF-8 in any locale, and keeps it from searching Python packages.

    That search fails if the working folder has a folder `runs/`.
    """
    import gin

    readers = gin.config._FILE_READERS
    gin.config._FILE_READERS = [(functools.partial(open, encoding="utf-8"), os.path.isfile)]
    try:
        yield
    finally:
        gin.config._FILE_READERS = readers


def _check_macro_names(
    bindings: Sequence[str], lines: Sequence[str], gin_files: Sequence[str]
) -> None:
    """Raises InputError for a macro that no gin file sets: gin would accept it silently.

    Such a macro is misspelled, or belongs to a method or a run whose gin file was not passed.

    Args:
      bindings: bindings of `--gin.NAME=value`.
      lines: lines of --gin_bindings, which may define new macros.
      gin_files: the gin files that were passed.
    """
    known = set(gin_errors.macro_names())
    for binding in [*bindings, *lines]:
        name = binding.partition("=")[0].strip()
        if name in known or not re.fullmatch(r"[A-Za-z_]\w*", name):
            continue
        if t5x_flags := gin_errors.describe_t5x_flags(name):
            raise InputError(f"{name} belongs to T5X: pass {t5x_flags}")
        if owners := gin_help.find_macro_owners(name):
            flags = " ".join(f"--gin_file={file}" for file in gin_files)
            raise InputError(f"{name} belongs to {_join_names(owners)}, got {flags}")
        if binding in bindings:
            hint = gin_errors.suggest_names(name, known)
            raise InputError(f"--gin.{name}: no gin file has a macro of this name{hint}")


def _check_has_effect(bindings: Sequence[str], in_files: Collection[str]) -> None:
    """Raises InputError for a flag that sets a parameter of a function that the run does not use.

    For example, the function belongs to another optimizer or method. gin would accept the flag
    silently. Only functions of this package are checked.

    Args:
      bindings: bindings of flags.
      in_files: functions whose parameters a gin file binds.
    """
    import gin

    config, registry = gin.config._CONFIG, gin.config._REGISTRY
    used = {reference.configurable.selector for reference in gin.config.iterate_references(config)}
    for binding in bindings:
        name = binding.partition("=")[0].strip()  # scope/module.function.parameter
        match = registry.get_match(name.rpartition(".")[0].rpartition("/")[2])
        if match is None or not match.selector.startswith("pemoe_jax.") or match.selector in used:
            continue
        module, function = match.selector.rsplit(".", 2)[-2:]
        # No binding refers to the function of a command, but a run file binds its parameters.
        if match.selector in in_files and module in _TASK_COMMANDS:
            continue
        raise InputError(
            f"{name} has no effect: nothing in this run uses {module}.{function}"
            " (it belongs to another method, optimizer or command)"
        )


# Parameter of adapters' routers -> macro of the same setting for sparse layers.
_SPARSE_MACROS = {
    "top_k": "TOP_K",
    "renormalize": "COMBINE",
    "straight_through": "COMBINE",
    "balance_loss": "BALANCE_LOSS",
    "z_loss": "ROUTER_Z_LOSS",
    "jitter_noise": "JITTER",
}


def _check_routers_have_effect() -> None:
    """Raises InputError for a file of routing/ with a method whose adapters have no router."""
    import gin

    config, router = gin.config._CONFIG, "pemoe_jax.core.routing.Router"
    parameters = [
        name for (_, selector), values in config.items() if selector == router for name in values
    ]
    used = {reference.configurable.selector for reference in gin.config.iterate_references(config)}
    if not parameters or router in used or macro_value("METHOD") is None:
        return
    hint = ""
    if "pemoe_jax.core.sparse.Sparse" in used:
        macros = [
            *dict.fromkeys(_SPARSE_MACROS[name] for name in parameters if name in _SPARSE_MACROS)
        ]
        hint = f"; sparse layers have {_join_names(macros) if macros else 'no such setting'}"
    raise InputError(
        f"routing.Router.{parameters[0]} has no effect: no adapter of {macro_value('METHOD')} has a"
        f" router, which files of routing/ configure{hint}"
    )


def _join_names(names: Sequence[str]) -> str:
    """Joins names as 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def macro_value(name: str) -> object:
    """Returns a macro's value in the loaded configuration; None if no file or flag sets it."""
    import gin

    try:
        return gin.query_parameter(f"{name}/macro.value")
    except ValueError:
        return None


def call_configured(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Calls a function with these arguments and those that gin binds; returns its value.

    Raises:
      InputError: no gin file configures the function, or a value is missing.
    """
    import gin

    try:
        configured = gin.get_configurable(function)
    except ValueError as error:
        raise InputError(gin_errors.describe_unconfigured(function.__name__)) from error
    try:
        return configured(*args, **kwargs)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        if "Required bindings" in str(error) or "gin.REQUIRED" in str(error):
            raise InputError(gin_errors.describe_error(error, ())) from error
        if "No values supplied by Gin" in str(error):
            raise InputError(gin_errors.describe_missing(error, function.__name__)) from error
        raise


def silence_libraries() -> None:
    """Keeps the libraries' log messages off the terminal; must be called before their import."""
    # orbax warns about intended settings, such as a save without `custom_metadata`. It raises its
    # errors, but first its threads and asyncio log each of them with a stack trace.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # Without this, TensorFlow reports for 5 s that a deleted folder in a bucket exists.
    os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")


def _print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # After a failed write, each thread of tensorstore raises this error, and no code can catch it.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def run_configured(
    flags: argparse.ArgumentParser,
    function: Callable[..., object],
    argv: Sequence[str] | None = None,
    flag_names: Sequence[str] = (),
) -> int:
    """Runs a command that is one function configured by gin; returns its exit code.

    Args:
      flags: the command's parser.
      function: the function.
      argv: the arguments; None: `sys.argv`.
      flag_names: flags whose values are passed to the function.
    """

    def load_and_call(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        load_config(args, bindings)
        call_configured(function, **{name: getattr(args, name) for name in flag_names})

    return run_command(flags, load_and_call, argv)


def run_command(
    flags: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, Sequence[str]], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the flags and runs a command; returns its exit code.

    A user's mistake becomes one line on stderr and exit code 1.

    Args:
      flags: the command's parser.
      work: the command, called with the parsed flags and the gin bindings among the arguments.
      argv: the arguments; None: `sys.argv`.
    """
    silence_libraries()
    command = flags.prog.rpartition(" ")[2]
    code = 1
    try:
        rest, bindings = split_bindings(sys.argv[1:] if argv is None else argv)
        args = flags.parse_args(rest)
        # A first line at once, as the imports that follow take many seconds.
        if command in (*_TASK_COMMANDS, "cache_tasks"):
            # With --text, stdout has nothing but infer's answers.
            stream = sys.stderr if getattr(args, "text", None) else sys.stdout
            words = ["pemoe", command, *getattr(args, "gin_file", [])]
            print(" ".join(words), file=stream, flush=True)
        # These settings hold for the whole process, so they are not for one that already uses jax.
        if command in _TASK_COMMANDS and "jax" not in sys.modules:
            compile_cache.enable()
            host_memory.configure()
            host_memory.disable_async_dispatch()
        folders = getattr(args, "seqio_additional_cache_dirs", "").split(",")
        if any(folders):
            seqio_cache_dirs.add_cache_dirs([*filter(None, folders)])
        work(args, bindings)
        run_file.finish("finished", "the work is done")
        code = 0
    except InputError as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        run_file.finish("failed", first_line(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        run_file.finish("stopped", "interrupted")
        code = 130
    except Exception as error:
        run_file.finish("failed", f"{type(error).__name__}: {first_line(error)}")
        # An error of the operating system is no bug, but a missing permission, a full disk or a
        # file in place of a folder.
        os_error = _os_error(error)
        if os_error is None:
            distributed.exit_on_error(error)
            raise
        path = os_error.filename2 or os_error.filename
        print(f"error: {path or 'writing'}: {os_error.strerror}", file=sys.stderr)
    finally:
        folder_lock.release_all()
    return distributed.exit_process(code)


def _os_error(error: BaseException | None) -> OSError | None:
    """Returns the error if the operating system raised it, with its number; else None."""
    # From within a configured function, gin raises a copy of the error that lacks the number.
    while isinstance(error, OSError) and error.strerror is None:
        error = error.__context__
    return error if isinstance(error, OSError) else None
