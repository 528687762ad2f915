"""Flags and gin files of the entry points, as T5X's users know them."""

import argparse
import ast
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import compile_cache, distributed, gin_types, host_memory

GIN_DIR = Path(__file__).parent.parent / "gin"

_SET_BY_MODEL_AND_METHOD = ("MODEL", "METHOD", "TRAINABLE", "LEARNING_RATE")

# what --gin.… may refer to: gin's imports hold for one file each
_IMPORTS = """\
from __gin__ import dynamic_registration
from pemoe_jax.tools import embed
from pemoe_jax import evaluate
from pemoe_jax import infer
from pemoe_jax.tools import routes
from pemoe_jax import tasks
from pemoe_jax import train
from pemoe_jax.core import adapters
from pemoe_jax.core import network
from pemoe_jax.core import optim
from pemoe_jax.core import routing
from pemoe_jax.core import steps
"""

_RUN_MODELS = ("train", "evaluate", "infer", "embed", "routes")  # commands, on tasks

_EPILOG = """\
gin files are looked for in the working folder, then in --gin_search_paths, then among the
package's own. Macros of the run files are set with --gin.MACRO=value; a value that is no gin
literal is taken as a string. --gin.MODULE.FUNCTION.PARAMETER=value sets any other parameter.
"""


def make_parser(
    command: str, description: str, example: str, macros: str
) -> argparse.ArgumentParser:
    """The flags that all entry points have."""
    result = argparse.ArgumentParser(
        prog=f"pemoe {command}",
        description=description,
        epilog=f"macros:\n{macros}\n{_EPILOG}\nexample:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; may be repeated",
    )
    result.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="BINDING",
        help="a line of gin, e.g. 'MODEL_DIR = \"/tmp/run\"'; may be repeated",
    )
    result.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIR,DIR",
        help="folders in which gin files are looked for, joined by commas",
    )
    if command in _RUN_MODELS:
        add_cache_dirs_flag(
            result,
            "folders of seqio's offline caches, joined by commas; USE_CACHED_TASKS=True reads them",
        )
    return result


def add_cache_dirs_flag(flags: argparse.ArgumentParser, text: str) -> None:
    """Adds the flag of folders of seqio's offline caches, which `attempt` acts on."""
    flags.add_argument("--seqio_additional_cache_dirs", default="", metavar="DIR,DIR", help=text)


def _as_gin_value(text: str) -> str:
    """Gin's own literals, macros and references stay; anything else becomes a string."""
    stripped = text.strip()
    if stripped[:1] in ("@", "%"):
        return stripped
    try:
        ast.literal_eval(stripped)
    except (ValueError, SyntaxError):
        if stripped[:1] in ("[", "(", "{"):  # may hold references
            return stripped
        return repr(text)
    return stripped


def split_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--gin.NAME=value` out of the arguments -> (other arguments, gin bindings)."""
    rest, bindings = [], []
    for argument in argv:
        if argument.startswith("--gin."):
            name, equals, value = argument[len("--gin.") :].partition("=")
            if not equals:
                raise InputError(f"{argument}: expected --gin.NAME=value, found no '='")
            bindings.append(f"{name} = {_as_gin_value(value)}")
        else:
            rest.append(argument)
    return rest, bindings


def load_config(
    args: argparse.Namespace, bindings: Sequence[str], macros: Sequence[str] = ()
) -> None:
    """Parses the gin files and bindings.

    Args:
      args: parsed flags.
      bindings: of `--gin.NAME=value`.
      macros: 'NAME = value' of macros that the command has itself, before any file.

    Raises:
      InputError: a file is missing, a line does not parse, or it binds what does not exist or
        what is of another type.
    """
    import importlib.util  # noqa: F401  gin uses it without importing it

    import gin

    if not args.gin_file:
        raise InputError(
            "no gin file: expected --gin_file=… of a model, a method and a run, see --help"
        )
    gin.clear_config()
    for folder in [*filter(None, args.gin_search_paths.split(",")), str(GIN_DIR)]:
        gin.add_config_file_search_path(folder)
    try:
        # run files read these; the files and flags that the user gives come after and win
        gin.parse_config([f"{macro} = None" for macro in _SET_BY_MODEL_AND_METHOD])
        # models read the first, for commands without a run file; run files the second, which
        # model files set
        gin.parse_config(["DROPOUT_RATE = 0.0", "DTYPE = None", *macros])
        gin.parse_config_files_and_bindings(args.gin_file, [], finalize_config=False)
        _check_macros(bindings)
        gin.parse_config_files_and_bindings([], [_IMPORTS, *args.gin_bindings, *bindings])
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"gin: {first_line(error)}") from error
    except (ValueError, SyntaxError, ImportError, AttributeError, NameError, TypeError) as error:
        raise InputError(_told(error)) from error
    gin_types.check_bindings(_SET_BY_MODEL_AND_METHOD)


def _told(error: Exception) -> str:
    """What gin complains of, in the user's words."""
    line = first_line(error)
    required = re.match(r"(\w+)/macro\.value set to `%gin\.REQUIRED`", line)
    if required:
        return f"{required[1]} is not set: expected --gin.{required[1]}=…"
    return f"gin: {line}"


def _check_macros(bindings: Sequence[str]) -> None:
    """A macro that no file mentions would be set and never read: a misspelling."""
    import gin

    known = set(re.findall(r"^\s*([A-Z][A-Z0-9_]*)\s*=", gin.config_str(), re.MULTILINE))
    for binding in bindings:
        name = binding.partition("=")[0].strip()
        if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in known:
            close = difflib.get_close_matches(name, known, n=2)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise InputError(f"--gin.{name}: no gin file has a macro of this name{hint}")


def call_configured(function: Callable[..., Any]) -> Any:
    """Calls a function with what gin binds to it; gin's complaints become one line."""
    import gin

    try:
        configured = gin.get_configurable(function)
    except ValueError as error:
        name = f"{function.__module__}.{function.__name__}"
        raise InputError(
            f"no gin file configures {name}: expected a run file, e.g. --gin_file=runs/finetune.gin"
        ) from error
    try:
        return configured()
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        if "Required bindings" in str(error) or "gin.REQUIRED" in str(error):
            raise InputError(first_line(error)) from error
        raise


def silence_libraries() -> None:
    """Keeps the libraries' chatter off the terminal; to be called before they are imported."""
    # gin logs an error for each place that it looks in before it finds a file
    logging.getLogger().addFilter(lambda record: "Path not found" not in record.getMessage())
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's advice on settings that are right
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def run_configured(
    flags: argparse.ArgumentParser,
    function: Callable[..., Any],
    argv: Sequence[str] | None = None,
) -> int:
    """An entry point's main: calls the function with what gin files and flags bind to it."""

    def load_and_call(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        load_config(args, bindings)
        call_configured(function)

    return run_command(flags, load_and_call, argv)


def _add_cache_dirs(args: argparse.Namespace) -> None:
    folders = [*filter(None, getattr(args, "seqio_additional_cache_dirs", "").split(","))]
    if folders:
        from pemoe_jax.data import seqio_tasks

        seqio_tasks.add_cache_dirs(folders)


def run_command(
    flags: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, Sequence[str]], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the flags and works; a user's mistake is one line and exit code 1.

    Args:
      flags: of the command.
      work: called with the parsed flags and the gin bindings among them.
      argv: the arguments; None: those of the process.
    """
    return distributed.exit_process(_attempt(flags, work, argv))


def _attempt(
    flags: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, Sequence[str]], None],
    argv: Sequence[str] | None,
) -> int:
    silence_libraries()
    try:
        rest, bindings = split_bindings(sys.argv[1:] if argv is None else argv)
        args = flags.parse_args(rest)
        if flags.prog.rpartition(" ")[2] in _RUN_MODELS and "jax" not in sys.modules:
            compile_cache.enable()
            host_memory.configure()
            host_memory.disable_async_dispatch()
        _add_cache_dirs(args)
        work(args, bindings)
    except InputError as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:  # no permission, no space, a file where a folder should be
        if error.strerror is None:
            distributed.exit_on_error(error)
            raise
        where = error.filename2 or error.filename
        print(f"error: {where or 'writing'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        distributed.exit_on_error(error)
        raise
    return 0
