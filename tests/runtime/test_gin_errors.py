"""gin's errors: one line, with the names that the user may have meant."""

import argparse
import importlib

import gin
import pytest

from pemoe_jax import train
from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_errors, gin_flags, gin_help

FILES = ("models/t5_1_1_tiny.gin", "methods/mov.gin", "runs/finetune.gin")
FLAGS = [f"--gin_file={name}" for name in FILES]
FLAGS += [f"--gin.{name}=1" for name in ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TRAIN_STEPS")]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--gin.trainer.Trainer.num_microbatches=2",
            "trainer.Trainer.num_microbatches belongs to T5X: pass --gin.MICROBATCHES=…",
        ),
        ("--gin.utils.SaveCheckpointConfig.period=9", "pass --gin.CHECKPOINT_PERIOD=…"),
        (
            "--gin.utils.SaveCheckpointConfig.foo=9",
            "pass --gin.CHECKPOINT_PERIOD=… or --gin.KEEP_CHECKPOINTS=…",
        ),
        (
            "--gin.OPTIMIZER=@adafactor.Adafactor()",
            "adafactor.Adafactor belongs to T5X: pass --gin.OPTIMIZER=@optim.adafactor",
        ),
        ("--gin.partitioning.PjitPartitioner.num_partitions=2", "pass --gin.MODEL_PARALLELISM=…"),
        ("--gin.train.train.random_seed=2", "pass --gin.SEED=…"),
        ("--gin.RANDOM_SEED=2", "RANDOM_SEED belongs to T5X: pass --gin.SEED=…"),
        ("--gin_file=routing/top2.gin", "routing/top2.gin: no such file in"),
        ("--gin_file=routing/top2.gin", "; close: routing/top_2.gin, "),
        (
            "--gin.adapters.Adapters.q=None",
            "'q' (it has: query, key, value, out, wi_0, wi_1, gate, wo)",
        ),
        ("--gin.adapters.LoraExperts.rank=4", "adapters.LoraExperts.rank; close: adapters.LoRA"),
        ("--gin.OPTIMIZER=@adamw", "unknown name adamw; close: optim.adamw"),
        ("--gin.network.T5Config.num_layers=3", "'num_layers'; close: scan_layers, num_encoder_"),
        ("--gin.TRAIN_STEPS=%STEPS", "%STEPS: no gin file has a macro of this name; close: TRAIN_"),
        ("--gin.TRAIN_STEP=2", "TRAIN_STEP: no gin file has a macro of this name; close: TRAIN_"),
        ("--gin.TASK_FEATURE_LENGTHS={'inputs': 3", "a closing bracket in `TASK_FEATURE_LENGTHS ="),
        ("--gin.TASK_FEATURE_LENGTHS={x}", "x is not a value (text needs quotes), got `TASK_FEA"),
        ("--gin.optim.adafactor=3", "expected MODULE.FUNCTION.PARAMETER = value or MACRO = value"),
        ("--gin_bindings=foo bar", "expected ':' or '=', got `foo bar`"),
    ],
)
def test_an_error_names_what_was_meant(flag, message):
    rest, bindings = gin_flags.split_bindings([*FLAGS, flag])
    with pytest.raises(InputError) as error:
        gin_flags.load_config(train.FLAGS.parse_args(rest), bindings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_in_files_name_their_line(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text("from __gin__ import dynamic_registration\n\nBATCH_SIZE = @utils.foo()\n")
    with pytest.raises(InputError, match=r"mine\.gin line 3: unknown name utils\.foo"):
        gin_flags.load_config(train.FLAGS.parse_args([*FLAGS[:3], f"--gin_file={file}"]), [])


def test_macros_for_bindings_of_t5x_exist():
    tables = [gin_errors._T5X_MACROS, *gin_errors._T5X_BINDINGS.values()]
    macros = {macro.partition("=")[0] for table in tables for macro in table.values()}
    assert [macro for macro in macros if not gin_help.find_macro_owners(macro)] == []


def test_errors_of_the_system_are_one_line_also_through_gin(tmp_path, capsys):
    def read(args, bindings):
        try:
            tmp_path.read_text()
        except OSError as error:
            gin.utils.augment_exception_message_and_reraise(error, "\n  In call to configurable")

    assert gin_flags.run_command(argparse.ArgumentParser(prog="pemoe x"), read, []) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


@pytest.mark.parametrize("command", ["convert", "verify", "report", "cache_tasks"])
def test_commands_without_gin_settings(command, tmp_path, capsys):
    tool = importlib.import_module(f"pemoe_jax.tools.{command}")
    arguments = {
        "convert": ["adapter", str(tmp_path), str(tmp_path / "a")],
        "cache_tasks": [f"--output={tmp_path / 'c'}"],
    }.get(command, [str(tmp_path)])
    assert tool.main([*arguments, "--gin.SEED=1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: --gin.SEED: this command takes no gin settings"
    assert not list(tmp_path.iterdir())
