"""The paper's zero-shot table from finished evaluations: `pemoe report --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.analysis.zero_shot import report as report_lib

_DESCRIPTION = """\
Prints the zero-shot table of arXiv 2309.05444: a row a run, accuracies in % by
data set (ANLI CB RTE WSC WiC COPA WNG HS, and others by their own names),
median and mean over prompts, with 95 % intervals. A RUN is a results.json that
evaluate wrote, or a folder with one; the runs in several are put together, of
equal ones (name, checkpoint, step) the last. Runs that differ by their seed
only are one row: the mean over seeds ± their standard deviation.
"""

_EPILOG = """\
marks: † an average over fewer data sets than others', * a data set that the run
was trained on.

intervals: a bootstrap over the examples of a data set, its prompts fixed, from
the predictions beside results.json (pemoe_jax/analysis/zero_shot/bootstrap.py says more).

examples:
  pemoe report /tmp/results
  pemoe report /tmp/mov_results /tmp/lora_results --with_paper \\
    --output=report
  pemoe report /tmp/sweep/*/results
  pemoe report /tmp/results --format=csv > table.csv
"""

FORMATS = ("table", "markdown", "csv", "json")

FLAGS = argparse.ArgumentParser(
    prog="pemoe report",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)
FLAGS.add_argument("runs", nargs="+", metavar="RUN", help="a results.json, or a folder with one")
FLAGS.add_argument(
    "--only", action="append", default=[], metavar="NAME", help="this run alone; may be repeated"
)
FLAGS.add_argument("--with_paper", action="store_true", help="published rows below ours")
FLAGS.add_argument("--seeds_apart", action="store_true", help="a row a run, whatever its seed")
FLAGS.add_argument(
    "--format", choices=FORMATS, default="table", help="of what is printed (default: table)"
)
FLAGS.add_argument(
    "--output", metavar="DIR", help="write report.md, report.csv, report.json and report.png there"
)
FLAGS.add_argument(
    "--draws", type=int, default=1000, help="of the bootstrap; 0: no intervals (default: 1000)"
)
FLAGS.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def report(args: argparse.Namespace, bindings: Sequence[str] = ()) -> None:
    """Reads, prints and writes what the flags ask for.

    Raises:
      InputError: a RUN is missing or no evaluation's, --only names no run, or a number is wrong.
    """
    from pemoe_jax.analysis import tables
    from pemoe_jax.analysis.zero_shot import report, results_file

    if bindings:
        raise InputError(f"--gin.{bindings[0].split(' ')[0]}: report takes no gin flags")
    for flag in ("draws", "seed"):
        if getattr(args, flag) < 0:
            raise InputError(f"--{flag} must be at least 0, found {getattr(args, flag)}")
    runs = tables.merge(results_file.load(path) for path in args.runs)["runs"]
    chosen = _chosen(runs, args.only)
    found = report.report(chosen, args.draws, args.seed, args.with_paper, args.seeds_apart)
    if args.output:
        write(found, Path(args.output))
    _print(found, args.format)
    if args.output:
        files = ", ".join(f"report.{kind}" for kind in ("md", "csv", "json", "png"))
        print(f"in {args.output}: {files}", file=sys.stderr)


def _chosen(runs: list[dict[str, Any]], only: Sequence[str]) -> list[dict[str, Any]]:
    known = list(dict.fromkeys(run["name"] for run in runs))
    for name in only:
        if name not in known:
            raise InputError(f"--only={name}: no such run (there are: {', '.join(known)})")
    return [run for run in runs if not only or run["name"] in only]


def _print(found: "report_lib.Report", kind: str) -> None:
    from pemoe_jax.analysis import layout
    from pemoe_jax.analysis.zero_shot import tables

    if kind == "table":
        layout.print_tables(tables.to_tables(found))
    elif kind == "markdown":
        print(layout.to_markdown(tables.to_tables(found)), end="")
    else:
        written = tables.to_csv if kind == "csv" else tables.to_json
        print(written(found), end="")


def write(found: "report_lib.Report", folder: Path) -> None:
    """Writes report.md, .csv, .json and .png, each beside and renamed, so never half there.

    Raises:
      InputError: the folder cannot be written to.
    """
    from pemoe_jax.analysis import layout
    from pemoe_jax.analysis.zero_shot import tables
    from pemoe_jax.runtime import atomic_write

    markdown = layout.to_markdown(tables.to_tables(found))
    texts = {
        "report.md": f"{markdown}\n![Median over prompts by data set](report.png)\n",
        "report.csv": tables.to_csv(found),
        "report.json": tables.to_json(found),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tables.draw(found, folder / "report.png")
        for name, text in texts.items():
            atomic_write.write_text(folder / name, text)
    except OSError as error:
        raise InputError(
            f"--output={folder}: expected a folder to write to, found {error.strerror}"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_command(FLAGS, report, argv)
