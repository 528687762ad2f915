"""Prints the paper's zero-shot table of finished evaluations: `pemoe report --help`."""

import argparse
import sys
from collections.abc import Sequence

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

_DESCRIPTION = """\
Prints the zero-shot table of arXiv 2309.05444: a row for each run, a column
for each dataset (ANLI CB RTE WSC WiC COPA WNG HS, then others by name), and
in the cells the median and mean accuracy over prompts in %, with 95 %
intervals. A RUN is a results.json of pemoe evaluate, or a folder with one;
several are merged. If the tasks of a run were evaluated separately (with equal
name, checkpoint, step and shots), their results are joined; if a task has
several results, the last one counts. Runs that differ only in the seed share a row:
the mean over seeds ± the standard deviation. Results of a run with another
number of shots (SHOTS=5) are in the same row, in columns of their own. The
last table has what a run costs: parameters, those that a token uses, FLOPs of
a token, the size of the trained parameters' file, the step time and the peak
memory of its training with the device, and the time of its evaluation.
"""

_EPILOG = """\
marks: † an average over fewer datasets than the others, * a dataset that the
run was trained on.

intervals: a bootstrap over the examples of each dataset, with its prompts
fixed, from the predictions next to results.json; details are in
pemoe_jax/analysis/zero_shot/bootstrap.py.

examples:
  pemoe report /tmp/results
  pemoe report /tmp/mov_results /tmp/lora_results --with_paper --output=report
  pemoe report /tmp/sweep/*/results
  pemoe report /tmp/results --format=csv > table.csv
"""

FLAGS = argparse.ArgumentParser(
    prog="pemoe report",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)
FLAGS.add_argument("runs", nargs="+", metavar="RUN", help="a results.json, or a folder with one")
FLAGS.add_argument(
    "--only", action="append", default=[], metavar="NAME", help="only this run; may be repeated"
)
FLAGS.add_argument("--with_paper", action="store_true", help="add published results below the runs")
FLAGS.add_argument("--seeds_apart", action="store_true", help="print a row for every seed")
FLAGS.add_argument(
    "--format",
    choices=("table", "markdown", "csv", "json"),
    default="table",
    help="format of the output (default: table)",
)
FLAGS.add_argument(
    "--output", metavar="DIR", help="also write report.md, .csv, .json and .png to it"
)
FLAGS.add_argument(
    "--draws",
    type=int,
    default=1000,
    help="number of bootstrap draws; 0: no intervals (default: 1000)",
)
FLAGS.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")


def report(args: argparse.Namespace, bindings: Sequence[str] = ()) -> None:
    """Loads results, and prints and writes the table.

    Raises:
      InputError: a RUN has no results of an evaluation, or a flag is wrong.
    """
    # Imported here, because they import numpy, and `--help` must answer within a second.
    from pemoe_jax.analysis.zero_shot import paper_table, paper_table_formats, results
    from pemoe_jax.runtime import file_io

    gin_flags.check_no_bindings(bindings)
    # argparse checks the type only.
    for flag in ("draws", "seed"):
        if getattr(args, flag) < 0:
            raise InputError(f"--{flag} must be at least 0, got {getattr(args, flag)}")
    # Checked first, because the bootstrap takes longest.
    if args.output is not None:
        folder = file_io.resolve_output_folder(args.output, "--output")
    runs = results.merge_runs(results.load_results(path) for path in args.runs)
    names = list(dict.fromkeys(run["name"] for run in runs))
    for name in args.only:
        if name not in names:
            raise InputError(f"--only must be one of {', '.join(names)}, got {name}")
    selected = [run for run in runs if not args.only or run["name"] in args.only]
    table = paper_table.build_paper_table(
        selected, args.draws, args.seed, args.with_paper, args.seeds_apart
    )
    if args.output:
        try:
            paper_table_formats.write_paper_table(table, folder)
        except OSError as error:
            raise InputError(
                f"--output must be a writable folder, got {args.output} ({error.strerror})"
            ) from None
    paper_table_formats.print_paper_table(table, args.format)
    if args.output:
        print(f"in {args.output}: report.md, report.csv, report.json, report.png", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return gin_flags.run_command(FLAGS, report, argv)
