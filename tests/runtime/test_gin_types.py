"""Values of another type than their parameter's are one line, before anything is read."""

import collections.abc
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from pemoe_jax import evaluate, train
from pemoe_jax.runtime import gin_flags, gin_types
from pemoe_jax.tools import embed

FILES = ("models/t5_1_1_tiny.gin", "methods/molora.gin", "runs/finetune.gin")
FLAGS = [f"--gin_file={name}" for name in FILES] + [
    *("--gin.MODEL_DIR=/nowhere/run", "--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.TRAIN_STEPS=1"),
    "--gin.JSONL_DIR=/nowhere/tasks",
]
EVALUATE = ["--gin_file=runs/evaluate.gin", "--gin.CHECKPOINT_PATH=/nowhere/run"]
EVALUATE += ["--gin.EVAL_OUTPUT_DIR=/nowhere/out"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gin.RANK=abc"], "RANK: expected a whole number, found 'abc'"),
        (["--gin.RANK=4.5"], "RANK: expected a whole number, found 4.5"),
        (["--gin.RANK=True"], "RANK: expected a whole number, found True"),
        (["--gin.RANK=None"], "RANK: expected a whole number, found None"),
        (["--gin.ALPHA=[1]"], "ALPHA: expected a number, found [1]"),
        (["--gin.LEARNING_RATE=1e-3x"], "LEARNING_RATE: expected a number, found '1e-3x'"),
        (["--gin.PACK=yes"], "PACK: expected True or False, found 'yes'"),
        (["--gin.SEED=abc"], "SEED: expected a whole number, found 'abc'"),
        (["--gin.DROPOUT_RATE=a"], "DROPOUT_RATE: expected a number, found 'a'"),
        (["--gin.KEEP_CHECKPOINTS=a"], "KEEP_CHECKPOINTS: expected a whole number or None"),
        (["--gin.MODEL_DIR=3"], "MODEL_DIR: expected a text, found 3"),
        (["--gin.TASK_FEATURE_LENGTHS=64"], "TASK_FEATURE_LENGTHS: expected a dict, found 64"),
        (["--gin.TRAINABLE=.*"], "TRAINABLE: expected a list, found '.*'"),
        (["--gin.RANK=%SCHEDULE"], "SCHEDULE: expected a whole number, found 'constant'"),
        (
            ["--gin.routing.Router.top_k=two"],
            "routing.Router.top_k: expected a whole number or None, found 'two'",
        ),
        (["--gin.OPTIMIZER=adamw"], "OPTIMIZER: expected a reference (@…) or None, found 'adamw'"),
        (["--gin.MODEL=x"], "MODEL: expected a reference (@…) or None, found 'x'"),
        (
            ["--gin.adapters.Adapters.wi_1=LoRAExperts"],
            "adapters.Adapters.wi_1: expected a reference (@…) or None, found 'LoRAExperts'",
        ),
        (["--gin.MICROBATCHES=0"], "MICROBATCHES must be an integer of at least 1, found 0"),
        (["--gin.KEEP_CHECKPOINTS=0"], "KEEP_CHECKPOINTS must be an integer of at least 1"),
        (["--gin.network.T5Config.emb_dim=0"], "T5Config.emb_dim: must be at least 1, found 0"),
        (["--gin.RANK=%ALPHA", "--gin.ALPHA=%RANK"], "expected a value, found itself"),
        (["--gin.DTYPE=abc"], "T5Config.dtype: expected float32 or bfloat16, found 'abc'"),
    ],
)
def test_training(capsys, flags, says):
    assert train.main([*FLAGS, *flags]) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_evaluation(capsys):
    assert evaluate.main([*EVALUATE, "--gin.FSDP=abc"]) == 1
    assert capsys.readouterr().err == "error: FSDP: expected True or False, found 'abc'\n"
    assert evaluate.main([*EVALUATE, "--gin.CHECKPOINT_PATH=5"]) == 1
    assert "CHECKPOINT_PATH: expected a text or a list, found 5" in capsys.readouterr().err


def test_what_is_right_passes():
    flags = ["--gin.ALPHA=16", "--gin.KEEP_CHECKPOINTS=None", "--gin.RANK=%NUM_EXPERTS"]
    rest, bound = gin_flags.split_bindings([*FLAGS, *flags])
    gin_flags.load_config(train.FLAGS.parse_args(rest), bound)  # raises nothing


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
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
        (embed.Encoder, [], [1, "a", ["a"]]),
        (inspect.Parameter.empty, [1, "a"], []),
        (Mapping, [{}], [[]]),
    ],
)
def test_kinds(kind, right, wrong):
    assert all(gin_types._fits(value, kind) for value in right)
    assert not any(gin_types._fits(value, kind) for value in wrong)
