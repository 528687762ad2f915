"""Runs lm-evaluation-harness with the model `pemoe`: `pemoe lm_eval --help`."""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime import gin_flags

_DESCRIPTION = """\
Runs lm-evaluation-harness's command `lm_eval`, in which --model pemoe is a base
with an adapter. All arguments are those of lm_eval: `pemoe lm_eval run --help`.
--model_args of pemoe: base, adapter, vocabulary, dtype, frozen_dtype,
max_input_tokens, max_target_tokens, max_gen_toks (docs/lm_eval.md).
"""

FLAGS = argparse.ArgumentParser(
    prog="pemoe lm_eval",
    usage="pemoe lm_eval --model pemoe --model_args base=…,adapter=… --tasks TASKS [options]",
    description=_DESCRIPTION,
    epilog="""\
example:
  pemoe lm_eval --model pemoe --tasks copa --batch_size 32 \\
    --model_args base=t5-large-lm-adapt,adapter=/tmp/mov,vocabulary=spiece.model
""",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["-h"], ["--help"]):
        FLAGS.print_help()
        return 0
    gin_flags.silence_libraries()
    try:
        # lm_eval is an extra, which may not be installed.
        from lm_eval.__main__ import cli_evaluate

        from pemoe_jax.tools import lm_eval_model  # noqa: F401 (its import registers the model)
    except ModuleNotFoundError as error:
        print(
            f"error: pemoe lm_eval needs the extra lm-eval ({first_line(error)}): pip install -c"
            " constraints.txt -e '.[lm-eval]'",
            file=sys.stderr,
        )
        return 1
    sys.argv = ["pemoe lm_eval", *arguments]  # `cli_evaluate` has no argument for them
    # lm_eval computes standard errors and formats its table in child processes. They must not be
    # forked: JAX has threads by then, and a forked process can deadlock.
    multiprocessing.set_start_method("spawn", force=True)
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0
