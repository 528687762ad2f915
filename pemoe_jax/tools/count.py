"""Counts parameters without allocating weights: `pemoe count --help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.analysis import counts, tables
    from pemoe_jax.core import network

FLAGS = gin_flags.make_parser(
    "count",
    "Prints how many parameters a method trains, of how many, at which sites.\n"
    "Without gin files: every size with every method, beside what the papers print.",
    example="""\
  pemoe count
  pemoe count --gin_file=models/t5_1_1_xxl.gin --gin_file=methods/mov.gin
  pemoe count --gin_file=models/t5_1_1_xl.gin --gin_file=methods/lora.gin \\
    --gin.RANK=16 --gin.adapters.Adapters.wi_1=@adapters.LoRAExperts
""",
    macros=gin_flags.MODEL_AND_METHOD_FILES,
)
FLAGS.add_argument("--markdown", action="store_true", help="print Markdown")

SIZES = ("small", "base", "large", "xl", "xxl")
# method file and number of experts, those of arXiv 2309.05444
METHODS = (
    ("full", None),
    ("ia3", None),
    ("lora", None),
    ("mov", 10),
    ("mov", 30),
    ("mov", 60),
    ("molora", 10),
    ("molora", 15),
)

_WIRING = """\
from pemoe_jax.tools import count
count.configured.model = %MODEL
count.configured.method = %METHOD
count.configured.trainable = %TRAINABLE
"""


def configured(
    model: "network.Transformer | None", method: str | None, trainable: Sequence[str] | None
) -> "counts.Count":
    """Counts what the gin files configure.

    Args:
      model: network with its adapters.
      method: its name.
      trainable: patterns of the parameters that train; each must match something.

    Raises:
      InputError: there is no model or no method, or a pattern matches nothing.
    """
    if model is None:
        raise InputError("no model: expected --gin_file=models/…")
    if not trainable:
        raise InputError("TRAINABLE is not set: expected --gin_file=methods/…")
    from pemoe_jax.analysis import counts
    from pemoe_jax.core import network, params

    shapes = params.flatten(network.param_shapes(model))
    return counts.count(shapes, params.trainable_paths(shapes, trainable), method or "custom")


def count(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Prints the tables that the flags ask for.

    Raises:
      InputError: see `config.load` and `configured`.
    """
    from pemoe_jax.analysis import counts

    if args.gin_file or args.gin_bindings or bindings:
        name = " ".join(Path(file).stem for file in args.gin_file)
        found = counts.by_site(name, _load(args, args.gin_file, bindings))
    else:
        found = [table for size in SIZES for table in _of_size(args, f"t5_1_1_{size}")]
    if args.markdown:
        print(counts.to_markdown(found), end="")
    else:
        counts.print_tables(found)


def _of_size(args: argparse.Namespace, name: str) -> "list[tables.Table]":
    """A size with every method."""
    from pemoe_jax.analysis import counts

    found = []
    for method, experts in METHODS:
        bindings = [] if experts is None else [f"NUM_EXPERTS = {experts}"]
        files = [f"models/{name}.gin", f"methods/{method}.gin"]
        found.append(_load(args, files, bindings))
    return counts.by_method(name, found)


def _load(
    args: argparse.Namespace, files: Sequence[str], bindings: Sequence[str]
) -> "counts.Count":
    wired = argparse.Namespace(
        gin_file=list(files),
        gin_search_paths=args.gin_search_paths,
        gin_bindings=[_WIRING, *args.gin_bindings],
    )
    gin_flags.load_config(wired, bindings)
    return gin_flags.call_configured(configured)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_command(FLAGS, count, argv)
