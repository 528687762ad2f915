"""Describes gin's errors in one line, with the names that the user may have meant."""

import difflib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence

from pemoe_jax.core.errors import first_line
from pemoe_jax.runtime import gin_help

# Parameters of T5X's train -> our macros.
_T5X_TRAIN = {
    "model_dir": "MODEL_DIR",
    "total_steps": "TRAIN_STEPS",
    "eval_period": "EVAL_PERIOD",
    "eval_steps": "EVAL_BATCHES",
    "stats_period": "LOG_PERIOD",
    "random_seed": "SEED",
}

# T5X function -> parameter -> our macro, for errors about T5X's bindings. The parameter "" is for a
# reference to the function.
_T5X_BINDINGS = {
    "train_script.train": _T5X_TRAIN,
    "train.train": _T5X_TRAIN,
    "eval_script.evaluate": {"output_dir": "EVAL_OUTPUT_DIR"},
    "infer_script.infer": {"output_dir": "EVAL_OUTPUT_DIR"},
    "trainer.Trainer": {"num_microbatches": "MICROBATCHES", "learning_rate_fn": "SCHEDULE"},
    "adafactor.Adafactor": {"": "OPTIMIZER=@optim.adafactor"},
    "models.EncoderDecoderModel": {
        "optimizer_def": "OPTIMIZER",
        "z_loss": "Z_LOSS",
        "label_smoothing": "LABEL_SMOOTHING",
        "loss_normalizing_factor": "LOSS_NORMALIZING_FACTOR",
    },
    "partitioning.PjitPartitioner": {"num_partitions": "MODEL_PARALLELISM"},
    "utils.SaveCheckpointConfig": {"period": "CHECKPOINT_PERIOD", "keep": "KEEP_CHECKPOINTS"},
    "utils.RestoreCheckpointConfig": {"path": "INITIAL_CHECKPOINT_PATH"},
    "utils.DatasetConfig": {
        "mixture_or_task_name": "MIXTURE_OR_TASK_NAME",
        "task_feature_lengths": "TASK_FEATURE_LENGTHS",
        "batch_size": "BATCH_SIZE",
        "seed": "SEED",
        "pack": "PACK",
        "use_cached": "USE_CACHED_TASKS",
        "module": "MIXTURE_OR_TASK_MODULE",
    },
    "utils.create_learning_rate_scheduler": {
        "factors": "SCHEDULE",
        "base_learning_rate": "LEARNING_RATE",
        "warmup_steps": "WARMUP_STEPS",
    },
}
# T5X's macro -> our macro.
_T5X_MACROS = {"RANDOM_SEED": "SEED", "EVAL_STEPS": "EVAL_BATCHES"}


def describe_error(error: Exception, lines: Sequence[str]) -> str:
    """Returns gin's error as a line for the user.

    Args:
      error: the exception from gin.
      lines: the imports and bindings that were parsed after the gin files.
    """
    line = first_line(error)
    if required := re.match(r"(\w+)/macro\.value set to `%gin\.REQUIRED`", line):
        return f"{required[1]} is not set: pass --gin.{required[1]}=…"
    if missing := re.match(r"Unable to open file: (\S+)\. Searched", line):
        return _describe_missing_file(missing[1])
    if undefined := re.match(r"No bindings specified for '(\w+)/gin\.macro'", line):
        hint = suggest_names(undefined[1], macro_names())
        return f"%{undefined[1]}: no gin file has a macro of this name{hint}"
    if isinstance(error, tokenize.TokenError):
        return f"gin: expected a closing bracket in {_find_unclosed(lines) or 'a gin file'}"
    # gin appends the file, the line number and the code, but for a syntax error in `lines` only the
    # line number.
    location = re.search(
        r"\n  In (?:bindings string|file \"(.+?)\",) line (\d+)\n +(.+)", str(error)
    )
    number = re.search(r" ?\(line (\d+)\)", str(error))
    if token := re.search(r"Failed to parse token '(.+)'", str(error)):
        line = f"{token[1]} is not a value (text needs quotes)"
    where, code = "", ""
    if location:
        where = f"{location[1]} line {location[2]}: " if location[1] else ""
        code = location[3]
    elif number and int(number[1]) <= len(lines):
        line, code = line.replace(number[0], ""), lines[int(number[1]) - 1]
    got = f", got `{code}`" if code else ""
    return where + (_describe_name(line, code) or f"gin: {line.rstrip('.')}{got}")


def describe_missing(error: Exception, command: str) -> str:
    """Describes gin's error about a call that lacks arguments, made while `command` ran."""
    names = re.search(r"for arguments: \[(.*)\]", str(error))
    function = re.search(r"In call to configurable '([\w.]+)'", str(error))
    if not names or not function or function[1] == command:
        return describe_unconfigured(command)
    return (
        f"{function[1]}: no value for {names[1]}: bind it, or refer to the function itself"
        " (@… without parentheses)"
    )


def describe_unconfigured(command: str) -> str:
    """Describes that no gin file configures a command."""
    # These two run files are not named after the function that they configure.
    file = {"train": "finetune", "decode_texts": "infer"}.get(command, command)
    return f"no gin file configures {command}: pass a run file, e.g. --gin_file=runs/{file}.gin"


def describe_t5x_flags(name: str) -> str | None:
    """Returns the flags that replace a binding or macro of T5X, or None if T5X has none.

    Args:
      name: a macro, a function or a parameter, such as 'utils.DatasetConfig.seed'.
    """
    function, _, parameter = name.rpartition(".")
    macros = [_T5X_MACROS.get(name) or _T5X_BINDINGS.get(function, {}).get(parameter)]
    if macros == [None]:
        # `name` is the function itself, or a parameter that is not in the table.
        known = _T5X_BINDINGS.get(name) or _T5X_BINDINGS.get(function, {})
        macros = [*known.values()]
    flags = (f"--gin.{macro}" + ("" if "=" in str(macro) else "=…") for macro in macros)
    return " or ".join(flags) or None


def suggest_names(name: str, names: Iterable[str]) -> str:
    """Returns '; close: …' with up to three names that resemble `name`; '' if none does."""
    names = [*names]
    matches = []
    # Names whose last part occurs in `name` (ignoring case) come first, then similar spellings.
    for part in reversed(name.lower().split(".")):
        matches += [full for full in names if full.rpartition(".")[2].lower() == part]
    lower = {full.lower(): full for full in names}
    similar = difflib.get_close_matches(name.lower(), lower, n=3)
    matches += [lower[match] for match in similar]
    return f"; close: {', '.join([*dict.fromkeys(matches)][:3])}" if matches else ""


def _describe_name(line: str, code: str) -> str | None:
    """Describes an unknown module, function or parameter; None for other errors."""
    if module := re.match(r"'([\w.]+)' was not provided by an import statement", line):
        name = _full_name(module[1], code)
    elif attribute := re.match(r"Couldn't resolve selector ([\w.]+);", line):
        name = _full_name(attribute[1], code)
    elif parameter := re.match(r"Configurable '([\w.]+)' doesn't have a parameter .*'(.+)'", line):
        return _describe_parameter(parameter[1], parameter[2])
    elif line.startswith("not enough values to unpack"):
        return f"expected MODULE.FUNCTION.PARAMETER = value or MACRO = value, got `{code}`"
    else:
        return None
    if flags := describe_t5x_flags(name):
        return f"{name} belongs to T5X: pass {flags}"
    return f"unknown name {name}{suggest_names(name, _configurables())}"


def _full_name(prefix: str, code: str) -> str:
    """Returns the dotted name that starts with `prefix` in a line of gin."""
    match = re.search(rf"(?<![\w.]){re.escape(prefix)}(?:\.\w+)*", code)
    return match[0] if match else prefix


def _describe_parameter(function: str, parameter: str) -> str:
    """Describes that a function does not have a parameter."""
    import gin

    if parameter in _T5X_BINDINGS.get(function, {}):
        name = f"{function}.{parameter}"
        return f"{name} belongs to T5X: pass {describe_t5x_flags(name)}"
    configurable = gin.config._REGISTRY.get_match(function)
    names = [*inspect.signature(configurable.wrapped).parameters] if configurable else []
    known = (
        f" (it has: {', '.join(names)})" if len(names) <= 12 else suggest_names(parameter, names)
    )
    return f"{function} has no parameter {parameter!r}{known}"


def _describe_missing_file(name: str) -> str:
    """Describes that gin did not find a file."""
    names = [
        str(path.relative_to(gin_help.GIN_DIR).with_suffix(""))
        for path in sorted(gin_help.GIN_DIR.glob("*/*.gin"))
    ]
    # Names are compared without '.gin', which would make all of them similar, and shown with it.
    hint = re.sub(r"(?<=\w)(?=,|$)", ".gin", suggest_names(name.removesuffix(".gin"), names))
    searched = "the working folder, --gin_search_paths or the package's gin/"
    return f"{name}: no such file in {searched}{hint}"


def macro_names() -> list[str]:
    """Returns the names of the macros that the gin files and bindings parsed so far set."""
    import gin

    return re.findall(r"^\s*([A-Z][A-Z0-9_]*)\s*=", gin.config_str(), re.MULTILINE)


def _configurables() -> Iterator[str]:
    """Yields 'module.name' of the public functions and classes in this package's loaded modules."""
    for module in [*sys.modules.values()]:
        package = getattr(module, "__name__", "")
        # The modules that handle gin itself have nothing to configure.
        if not package.startswith("pemoe_jax.") or ".runtime.gin" in package:
            continue
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", None) == package
            if is_own and callable(value) and not name.startswith("_"):
                yield f"{package.rpartition('.')[2]}.{name}"


def _find_unclosed(lines: Sequence[str]) -> str | None:
    """Returns the first line with an unclosed bracket, quoted; None if there is none."""
    for line in lines:
        try:
            [*tokenize.generate_tokens(io.StringIO(line).readline)]
        except tokenize.TokenError:
            return f"`{line}`"
    return None
