"""Passes odd values to the macros of gin files, and damaged gin files, to the commands.

    python tests/faults/odd_settings.py [--cases 2000] [--seed 0] [--record]

A command must refuse its settings in one line, or accept them: then it is stopped right before it
would read or draw a model. The values are drawn with the seed.
"""

import argparse
import contextlib
import io
import json
import pathlib
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import damaged_files
import summary

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Python literals of all types, malformed ones, gin's references, paths, and values of other macros.
VALUES = (
    *("None", "True", "False", "-1", "0", "1", "2", "3", "1.5", "-0.5", "nan", "inf", "-inf"),
    *("1e400", "1e-320", "9" * 5000, "2147483647", "2147483648", "18446744073709551616", "0x10"),
    *("1_000", "1e-3x", "1+2", "'1'", "''", '""', "'", '"', "x", "x y", "a b: c", "~", "*", "."),
    *("..", "/dev/null", "/dev/full", "/proc/self/mem", "gs://", "s3://x/y"),
    *("http://x", "file:///tmp", "\u00e9", "\u2603", "'\\ud800'", "'\\x00'", "'a\\nb'", "a" * 5000),
    *("", " ", "\t", "#", "# x", "(", ")", "[", "]", "{", "}", "[[", "()", "[]", "{}", "(1,)"),
    *("[1, 2]", "[None]", "['x']", "['.*']", "['(']", "['']", "[[]]", "[" * 200, "(" * 200),
    *("{'a': 1}", "{'inputs': 8}", "{'inputs': 8, 'targets': 8}", "{'inputs': 0, 'targets': 0}"),
    *("{'inputs': -1, 'targets': 8}", "{'inputs': 'x', 'targets': 8}", "{1: 2}", "{None: None}"),
    *("{'inputs': 1.5, 'targets': True}", "{'inputs': 99999999999999999999, 'targets': 8}"),
    *("@", "%", "@x", "%X", "%gin.REQUIRED", "@gin.macro", "@gin.singleton()", "%BATCH_SIZE"),
    *("@train.train", "@train.train()", "@optim.adamw", "@optim.adamw()", "@optim.adafactor"),
    *("@network.Transformer()", "@network.Transformer", "@routing.Router()", "@options.Data()"),
    *("[@optim.adamw]", "{'a': @optim.adamw()}", "@a/b/c.d()", "lambda: 1", "__import__('os')"),
    *("b'x'", "f'x'", "r'x'", "1j", "...", "not True", "1 if True else 2", "{1, 2}", "[*[1]]"),
    *("constant", "'constant * linear_warmup'", "'linear_decay * x'", "'* *'", "float32"),
    *("bfloat16", "int8", "float8_e4m3fn", "eval/loss", "skip", "sites", "NUM_TOKENS"),
    *("'AVERAGE_PER_SEQUENCE'", "dots", "full", "jsonl_train", "no_such_task", "mmlu", "os", "sys"),
)

# Command -> its gin files.
COMMANDS = {
    "train": ("models/t5_1_1_tiny.gin", "methods/{method}.gin", "runs/finetune.gin"),
    "evaluate": ("runs/evaluate.gin",),
    "infer": ("runs/infer.gin",),
}
METHODS = ("ia3", "lora", "mov", "molora", "full", "flan_switch", "flan_ec")


class Configured(BaseException):
    """Raised where a command would read or draw a model: its settings were accepted.

    Not an Exception, so that no command catches it.
    """


def required_flags(folder: pathlib.Path, command: str) -> list[str]:
    """Returns the flags without which a command does not start."""
    flags = [f"--gin.JSONL_DIR={folder / 'tasks'}", f"--gin.VOCAB_PATH={folder / 'vocab.model'}"]
    flags.append("--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}")
    if command == "train":
        flags += [f"--gin.MODEL_DIR={folder / 'run'}", "--gin.INITIAL_CHECKPOINT_PATH=None"]
        return [*flags, "--gin.TRAIN_STEPS=3", "--gin.BATCH_SIZE=8"]
    flags += [f"--gin.EVAL_OUTPUT_DIR={folder / 'out'}", "--gin.BATCH_SIZE=8"]
    return [*flags, f"--gin.CHECKPOINT_PATH={folder / 'base.safetensors'}"]


def list_settings(command: str, method: str) -> list[str]:
    """Returns the names of macros and of bound parameters in a command's gin files."""
    from pemoe_jax.runtime import gin_flags

    # Files that a file includes are read as well.
    texts, names = [], [name.format(method=method) for name in COMMANDS[command]]
    while names:
        texts.append((gin_flags.GIN_DIR / names.pop()).read_text())
        names += re.findall(r"^include '(.+)'", texts[-1], re.MULTILINE)
    settings: dict[str, None] = {}  # a dict, to keep the order and each name once
    for text in texts:
        settings |= dict.fromkeys(re.findall(r"^([A-Z]\w+) =", text, re.MULTILINE))
        for block, lines in re.findall(r"^([\w.]+):\n((?:  .+\n)+)", text, re.MULTILINE):
            settings |= {f"{block}.{name}": None for name in re.findall(r"^  (\w+) =", lines, re.M)}
    return [*settings]


def draw_cases(
    num_cases: int, folder: pathlib.Path, rng: random.Random
) -> Iterator[tuple[str, list[str]]]:
    """Yields (command, flags). Every sixth case has a damaged gin file, the others odd values."""
    from pemoe_jax.runtime import gin_flags

    for number in range(num_cases):
        # Training has the most settings, so it is drawn most often.
        command = rng.choice(("train", "train", "train", "evaluate", "infer"))
        method = rng.choice(METHODS)
        files = [name.format(method=method) for name in COMMANDS[command]]
        flags = required_flags(folder, command)
        if number % 6 == 5:
            place = rng.randrange(len(files))
            content = (gin_flags.GIN_DIR / files[place]).read_bytes()
            path = folder / "damaged.gin"
            path.write_bytes(damaged_files.damage_bytes(content, rng))
            files[place] = str(path)
        else:
            names = list_settings(command, method)
            for _ in range(rng.choice((1, 1, 1, 2))):
                name = rng.choice(names)
                if rng.random() < 0.05:  # a misspelled name
                    at = rng.randrange(len(name))
                    name = name[:at] + rng.choice(("", "x", ".", "/", "=", " ", "%")) + name[at:]
                flags.append(f"--gin.{name}={rng.choice(VALUES)}")
        yield command, [*(f"--gin_file={file}" for file in files), *flags]


@contextlib.contextmanager
def stop_before_models() -> Iterator[None]:
    """Makes the commands raise `Configured` where they would read or draw a model."""
    from pemoe_jax.checkpoints import models, new_run

    with (
        mock.patch.object(new_run, "initialize", side_effect=Configured),
        mock.patch.object(models, "open_selected", side_effect=Configured),
    ):
        yield


def run_case(command: str, flags: list[str]) -> tuple[str, str]:
    """Runs a command in this process; returns its outcome, as counted by `run`, and its message."""
    import importlib

    from pemoe_jax.runtime import folder_lock

    module = importlib.import_module(f"pemoe_jax.{command}")
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = module.main(flags)
    except Configured:
        return "accepted", ""
    except BaseException as error:
        if isinstance(error, SystemExit):  # argparse prints its own errors, of two lines
            return ("clear" if error.code == 2 else "traceback"), errors.getvalue()
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "traceback",
            f"{type(error).__name__}: {error!s:.200} at {last.filename}:{last.lineno}",
        )
    finally:
        # A command that was stopped still holds its locks, which the next case needs.
        folder_lock.release_all()
    text = errors.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    is_clear = code == 1 and len(lines) == 1 and text.endswith(f"{lines[0]}\n")
    return ("clear" if is_clear else "traceback"), text


def run(num_cases: int, seed: int = 0) -> dict[str, Any]:
    """Returns the number of cases by outcome, and the tracebacks."""
    import jsonl_folder

    counts = dict.fromkeys(("clear", "accepted", "traceback"), 0)
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name, stop_before_models():
        folder = pathlib.Path(name)
        jsonl_folder.write_folder(folder / "tasks")
        jsonl_folder.write_vocabulary(folder / "vocab.model")
        # An empty file will do, because commands are stopped before they read it. Files that an odd
        # value names are written to the working directory.
        (folder / "base.safetensors").touch()
        (folder / "work").mkdir()
        with contextlib.chdir(folder / "work"):
            for command, flags in draw_cases(num_cases, folder, random.Random(seed)):
                outcome, message = run_case(command, flags)
                counts[outcome] += 1
                if outcome == "traceback":
                    # Reported once for messages that begin alike, with the odd flags alone.
                    odd = [flag for flag in flags if flag not in required_flags(folder, command)]
                    errors.setdefault(message[:60], f"{command} {' '.join(odd)}: {message}"[:2000])
    return {"cases": num_cases, **counts, "errors": [*errors.values()]}


def main() -> int:
    """Runs the command; returns 1 if a setting gave a traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--record", action="store_true", help="into docs/reliability.json")
    args = parser.parse_args()
    result = run(args.cases, args.seed)
    print("\n".join(result.pop("errors")))
    print(json.dumps(result))
    if args.record:
        summary.record("settings", result)
    return int(result["traceback"] > 0)


if __name__ == "__main__":
    sys.exit(main())
