"""A value of the wrong type is a one-line error before any data or checkpoint is read."""

import collections.abc
import importlib
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from pemoe_jax import evaluate, train
from pemoe_jax.runtime import gin_flags, gin_ranges, gin_types
from pemoe_jax.tools import encoders

FILES = ("models/t5_1_1_tiny.gin", "methods/molora.gin", "runs/finetune.gin")
FLAGS = [f"--gin_file={name}" for name in FILES] + [
    *("--gin.MODEL_DIR=/nowhere/run", "--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.TRAIN_STEPS=1"),
    "--gin.JSONL_DIR=/nowhere/tasks",
]
EVALUATE = ["--gin_file=runs/evaluate.gin", "--gin.CHECKPOINT_PATH=/nowhere/run"]
EVALUATE += ["--gin.EVAL_OUTPUT_DIR=/nowhere/out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin.RANK=abc"], "RANK must be an integer, got 'abc'"),
        (["--gin.RANK=4.5"], "RANK must be an integer, got 4.5"),
        (["--gin.RANK=True"], "RANK must be an integer, got True"),
        (["--gin.RANK=None"], "RANK must be an integer, got None"),
        (["--gin.ALPHA=[1]"], "ALPHA must be a number, got [1]"),
        (["--gin.LEARNING_RATE=1e-3x"], "LEARNING_RATE must be a number, got '1e-3x'"),
        (["--gin.PACK=yes"], "PACK must be True or False, got 'yes'"),
        (["--gin.SEED=abc"], "SEED must be an integer, got 'abc'"),
        (["--gin.DROPOUT_RATE=a"], "DROPOUT_RATE must be a number, got 'a'"),
        (["--gin.KEEP_CHECKPOINTS=a"], "KEEP_CHECKPOINTS must be an integer or None"),
        (["--gin.MODEL_DIR=3"], "MODEL_DIR must be a string, got 3"),
        (
            ["--gin.TASK_FEATURE_LENGTHS=64"],
            "TASK_FEATURE_LENGTHS must be a dict of integers, got 64",
        ),
        (["--gin.TRAINABLE=.*"], "TRAINABLE must be a list of strings, got '.*'"),
        (["--gin.RANK=%SCHEDULE"], "SCHEDULE must be an integer, got 'constant"),
        (
            ["--gin.routing.Router.top_k=two"],
            "routing.Router.top_k must be an integer or None, got 'two'",
        ),
        (
            ["--gin.OPTIMIZER=adamw"],
            "OPTIMIZER must be a function or class (@… without parentheses) that returns Gr",
        ),
        (["--gin.MODEL=x"], "MODEL must be @network.Transformer() or None, got 'x'"),
        (
            ["--gin.adapters.Adapters.wi_1=LoRAExperts"],
            "adapters.Adapters.wi_1 must be a function or class (@… without parentheses) that"
            " returns Module or None, got 'LoRAExperts'",
        ),
        (["--gin.MICROBATCHES=0"], "MICROBATCHES must be a positive integer, got 0"),
        (["--gin.KEEP_CHECKPOINTS=0"], "KEEP_CHECKPOINTS must be a positive integer, got 0"),
        (
            ["--gin.network.T5Config.emb_dim=0"],
            "T5Config.emb_dim must be a positive integer",
        ),
        (["--gin.SEED=18446744073709551616"], "SEED must be an integer in [0, 2147483647], got 18"),
        (["--gin.SEED=-1"], "SEED must be an integer in [0, 2147483647], got -1"),
        (["--gin.TRAIN_STEPS=0"], "TRAIN_STEPS must be an integer in [1, 2147483647], got 0"),
        (["--gin.LABEL_SMOOTHING=1.5"], "LABEL_SMOOTHING must be a number in [0, 1), got 1.5"),
        (["--gin.LEARNING_RATE=-1e-3"], "LEARNING_RATE must be a number of at least 0, got -0.001"),
        (["--gin.LEARNING_RATE=1e999"], "LEARNING_RATE must be a number of at least 0, got inf"),
        (["--gin.WARMUP_STEPS=-1"], "WARMUP_STEPS must be an integer of at least 0, got -1"),
        (["--gin.EVAL_PERIOD=-1"], "EVAL_PERIOD must be an integer of at least 0, got -1"),
        (
            ["--gin.NUM_EXPERTS=2147483648"],
            "NUM_EXPERTS must be a positive integer up to 16777216, got 2147483648",
        ),
        (["--gin.LOG_PERIOD=0"], "LOG_PERIOD must be a positive integer, got 0"),
        (["--gin.ALPHA=-1"], "ALPHA must be a positive number, got -1"),
        (["--gin.optim.adamw.b1=1.0"], "optim.adamw.b1 must be a number in [0, 1), got 1.0"),
        (["--gin.RANK=%ALPHA", "--gin.ALPHA=%RANK"], "must be a value, got a reference to itself"),
        (["--gin.DTYPE=abc"], "T5Config.dtype must be float32 or bfloat16, got 'abc'"),
        # values of other types, in lists and dicts too
        (["--gin.TRAINABLE=(1,)"], "TRAINABLE must be a list of strings, got (1,)"),
        (["--gin.TRAINABLE=1j"], "TRAINABLE must be a list of strings, got 1j"),
        (["--gin.DROPOUT_RATE=1j"], "DROPOUT_RATE must be a number, got 1j"),
        (["--gin.MMLU_SPLIT=b'x'"], "MMLU_SPLIT must be a string, got b'x'"),
        (
            ["--gin.TASK_FEATURE_LENGTHS={'inputs': 'x'}"],
            "TASK_FEATURE_LENGTHS must be a dict of integers, got {'inputs': 'x'}",
        ),
        (["--gin.train.train.mesh=None"], "mesh must be @partitioning.MeshConfig(), got None"),
        # references to functions and classes, and to what they return
        (["--gin.JSONL_DIR=@optim.adamw"], "JSONL_DIR must be a string or None, got @optim.adamw"),
        (["--gin.MICROBATCHES=@options.Data()"], "MICROBATCHES must be an integer, got @options.D"),
        (["--gin.TRAINABLE=[@optim.adamw]"], "TRAINABLE must be a list of strings, got [@optim.a"),
        (
            ["--gin.VOCAB_SIZE=@tasks.default_vocab_path()"],
            "VOCAB_SIZE must be an integer, got @ta",
        ),
        (
            ["--gin.train.train.method=@options.Data()"],
            "must be @options.Method(), got @options.Da",
        ),
        (
            ["--gin.train.train.logging=@options.Logging"],
            "must be @options.Logging(), got @options.",
        ),
        (
            ["--gin.EVAL_TASKS=@train.train()"],
            "EVAL_TASKS must be a list of strings or None, got @",
        ),
        (
            ["--gin.adapters.LoRAExperts.router=@optim.adamw"],
            "that returns Router or None, got @opt",
        ),
        (
            ["--gin.adapters.Adapters.key=@routing.Router", "--gin.routing.Router.num_experts=2"],
            "Adapters.key must make VectorExperts or LoRAExperts, got Router",
        ),
        # references that lead back to their own function
        (
            ["--gin.options.Data.register=@train.train"],
            "Data.register must be a value, got a reference to itself: pemoe_jax.train.train.data →"
            " pemoe_jax.runtime.options.Data.register",
        ),
        (
            ["--gin.adapters.Adapters.key=@network.Transformer"],
            "Adapters.key must be a value, got a",
        ),
        (["--gin.DROPOUT_RATE=%MODEL"], "MODEL must be a number, got @network.Transformer()"),
        (["--gin.RANK=%RANK"], "RANK must be a value, got a reference to itself: RANK"),
        (["--gin.RANK=@gin.macro"], "RANK must be a value or %MACRO, got @gin.macro"),
        (["--gin.JSONL_DIR=['\\ud800']"], "JSONL_DIR must be text in UTF-8, got ['\\ud800']"),
        (["--gin.MODEL_DIR=\udcff"], "MODEL_DIR must be text in UTF-8, got '\\udcff'"),
        (["--gin.MIXTURE_OR_TASK_MODULE=''"], "MODULE must be the name of a module, got ''"),
    ],
)
def test_training(capsys, flags, message):
    assert train.main([*FLAGS, *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_evaluation(capsys):
    assert evaluate.main([*EVALUATE, "--gin.FSDP=abc"]) == 1
    assert capsys.readouterr().err == "error: FSDP must be True or False, got 'abc'\n"
    assert evaluate.main([*EVALUATE, "--gin.CHECKPOINT_PATH=5"]) == 1
    assert "CHECKPOINT_PATH must be a string or a list of strings, got 5" in capsys.readouterr().err


def test_correct_values_pass():
    flags = ["--gin.ALPHA=16", "--gin.KEEP_CHECKPOINTS=None", "--gin.RANK=%NUM_EXPERTS"]
    # A function may be called inside of itself with the settings of another scope.
    flags += ["--gin.a/options.Data.register=@b/options.Data", "--gin.VOCAB_PATH=%JSONL_DIR"]
    flags += ["--gin.EVAL_TASKS=['a', %METHOD]", "--gin.JSONL_DIR=@tasks.default_vocab_path()"]
    rest, bindings = gin_flags.split_bindings([*FLAGS, *flags])
    gin_flags.load_config(train.FLAGS.parse_args(rest), bindings)  # raises nothing


def test_every_number_has_a_range():
    """Of every function in the table, and of every function that a gin file binds."""
    functions = {}
    for package, names in gin_flags._MODULES.items():
        for name in names:
            module = importlib.import_module(f"{package}.{name}")
            functions |= {f"{name}.{key}": value for key, value in vars(module).items()}
    bound = r"^(\w+\.\w+)(?::$|\.\w+ =)"
    texts = [path.read_text() for path in gin_flags.GIN_DIR.glob("*/*.gin")]
    bound = {name for text in texts for name in re.findall(bound, text, re.MULTILINE)}
    for name in (bound & functions.keys()) | gin_ranges.RANGES.keys():
        types = gin_types._parameter_types(functions[name])
        numbers = {
            parameter
            for parameter, annotation in types.items()
            if {int, float} & {*gin_types._union_members(annotation)}
        }
        assert numbers == gin_ranges.RANGES.get(name, {}).keys(), name


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, [3, -1], [True, 3.0, "3", None]),
        (float, [3, 3.5], [True, "3"]),
        (bool, [True], [1, "True"]),
        (str | None, ["a", None], [1, ["a"]]),
        (Sequence[str], [["a"], ("a",)], ["a", {"a": 1}, None]),
        (str | Sequence[str], ["a", ["a"]], [1, None]),
        (collections.abc.Mapping[str, int], [{"a": 1}], [["a"], "a"]),
        (float | str | None, [1, "a", None], [[1], True]),
        (Any, [1, "a", None], []),
        (object, [1, "a", None], []),
        (Callable[[], Any], [], [1, "a", None]),
        (pathlib.Path | None, [None], [1, "a"]),
        (encoders.Encoder, [], [1, "a", ["a"]]),
        (inspect.Parameter.empty, [1, "a"], []),
        (Mapping, [{}], [[]]),
    ],
)
def test_types(annotation, right, wrong):
    assert all(gin_types._matches(value, annotation) for value in right)
    assert not any(gin_types._matches(value, annotation) for value in wrong)
