"""Help texts: every macro with its default and description, without importing jax or seqio."""

import re
import subprocess
import sys

import pytest

from pemoe_jax import train
from pemoe_jax.runtime import gin_help

GIN = """\
from pemoe_jax.runtime import options
SIZE = 3  # comment
NAME = %gin.REQUIRED
UNREAD = 1
options.Logging.log_period = %SIZE
other.function:
  name = %NAME
"""

# Prints the modules that no --help may import, and the CPU seconds that all of them took together.
HELP = """
import contextlib, io, sys, time
from pemoe_jax import __main__
for command in ["--help", *__main__.COMMANDS]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        __main__.main([command, *(["--help"] if command != "--help" else [])])
    assert "usage: pemoe" in text.getvalue(), command
heavy = {"jax", "flax", "gin", "seqio", "tensorflow"} & set(sys.modules)
print(time.process_time(), *heavy)
"""


def test_macros_of_a_text():
    first, second = gin_help.read_macros([GIN])
    assert (first.name, first.default) == ("SIZE", "3")
    assert first.description.startswith("steps between two reports")
    assert second == gin_help.Macro("NAME", "%gin.REQUIRED", "")
    lines = gin_help.describe_macros([GIN]).splitlines()
    assert lines[0] == "  NAME (required)" and lines[1].startswith("  SIZE = 3    ")


def test_a_comment_describes_a_macro_whose_parameter_has_no_docstring():
    (macro,) = gin_help.read_macros(["A = None  # what A does\nx.y.z = %A\n"])
    assert macro == gin_help.Macro("A", "None", "what A does")


def test_descriptions_name_macros_instead_of_code():
    text = gin_help.describe_macros(["models/t5_1_1.gin", "methods/flan_moe.gin"])
    assert "MIN_CAPACITY) places in a group" in text
    assert not re.search(r"min_capacity|capacity_factor|top_k|sparse_step|`\w+\.\w+`", text)
    trainable = gin_help.describe_macros(["methods/flan_moe.gin", "runs/finetune.gin"])
    assert "even if TRAINABLE matches" in " ".join(trainable.split())


def test_a_run_file_describes_what_its_command_reads():
    embed = {m.name: m.description for m in gin_help.read_macros(["runs/embed.gin"])}
    assert embed["SENTENCE_EMBEDDINGS"].startswith("folder of the table; an existing")
    assert "BATCH_SIZE" in embed
    export = [macro.name for macro in gin_help.read_macros(["runs/export_tasks.gin"])]
    assert "LM_EVAL_DIR" in export and "BATCH_SIZE" not in export


@pytest.mark.parametrize(
    "run", ["finetune", "evaluate", "infer", "embed", "routes", "export_tasks"]
)
def test_every_macro_of_a_run_file_is_described(run):
    macros = gin_help.read_macros([f"runs/{run}.gin"])
    assert len(macros) > 15
    unset = {"MODEL", "METHOD", "TRAINABLE", "LEARNING_RATE"}  # model and method files set them
    assert not [m.name for m in macros if not m.description and m.name not in unset]


def test_help_lists_the_macros(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for line in ("  MODEL_DIR (required)", "  EVAL_BATCHES = 10", "  NUM_EXPERTS = 10"):
        assert f"\n{line} " in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_every_command_answers_at_once():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert not heavy
    assert float(seconds) < 2.0  # of CPU time, together; 0.7 on an idle machine
