"""Counts parameters without allocating weights: `pemoe count --help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.analysis import counts
    from pemoe_jax.core import network

FLAGS = gin_flags.make_parser(
    "count",
    "Prints how many of a model's parameters a method trains, and at which sites; for sparse\n"
    "models also how many parameters a token uses, and its FLOPs.\n"
    "Without gin files: every size with every method, next to the papers' figures.",
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
# Method file and bindings of each row of the table that is printed without gin files: the methods
# of arXiv 2309.05444, then those of arXiv 2305.14705, whose experts are whole MLPs.
METHODS: list[tuple[str, list[str]]] = [("full", []), ("ia3", []), ("lora", [])]
METHODS += [("mov", [f"NUM_EXPERTS = {experts}"]) for experts in (10, 30, 60)]
METHODS += [("molora", [f"NUM_EXPERTS = {experts}"]) for experts in (10, 15)]
METHODS += [(f"flan_{routing}", []) for routing in ("switch", "gshard", "st", "ec")]

# This command has no run file, so these are the bindings that a run file would have.
_BINDINGS = f"""\
{gin_flags.FREEZE_BINDINGS}\
from pemoe_jax.tools import count
count.configured_count.model = %MODEL
count.configured_count.method = %METHOD
count.configured_count.trainable = @freezing.trainable_patterns()
"""


def configured_count(
    model: "network.Transformer | None", method: str | None, trainable: Sequence[str] | None
) -> "counts.ParameterCount":
    """Counts the parameters of the model that the gin files configure.

    Args:
      model: network with its adapters.
      method: name of the method; None: 'custom'.
      trainable: patterns of the parameters that train; each must match a parameter.

    Raises:
      InputError: `model` or `trainable` is not set, or a pattern matches no parameter.
    """
    if model is None:
        raise InputError("MODEL is not set: pass --gin_file=models/…")
    if not trainable:
        raise InputError("TRAINABLE is not set: pass --gin_file=methods/…")
    from pemoe_jax.analysis import counts
    from pemoe_jax.analysis.planning import flops
    from pemoe_jax.core import adapters, network, params

    shapes = params.flatten(network.param_shapes(model))
    trainable_paths = params.trainable_paths(shapes, trainable)
    router_reads = flops.describe_router_reads(adapters.describe(model.adapters))
    return counts.count_parameters(
        shapes, trainable_paths, method or "custom", model.sparse, router_reads
    )


def count(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Prints the table of the configured model; without gin files, those of all sizes and methods.

    Raises:
      InputError: see `gin_flags.load_config` and `configured_count`.
    """
    # Imported here, because they import jax, and `--help` must answer within a second.
    from pemoe_jax.analysis import counts, tables

    if args.gin_file or args.gin_bindings or bindings:
        name = " ".join(Path(file).stem for file in args.gin_file)
        results = counts.site_tables(name, _count_files(args, args.gin_file, bindings))
    else:
        results = []
        for name in (f"t5_1_1_{size}" for size in SIZES):
            by_method = [
                _count_files(args, [f"models/{name}.gin", f"methods/{method}.gin"], method_bindings)
                for method, method_bindings in METHODS
            ]
            results += counts.method_tables(name, by_method)
    tables.print_tables(results, args.markdown)


def _count_files(
    args: argparse.Namespace, files: Sequence[str], bindings: Sequence[str]
) -> "counts.ParameterCount":
    """Counts the parameters of the model that `files` and the flags other than --gin_file set."""
    overrides = {"gin_file": files, "gin_bindings": [_BINDINGS, *args.gin_bindings]}
    gin_flags.load_config(argparse.Namespace(**{**vars(args), **overrides}), bindings)
    return gin_flags.call_configured(configured_count)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return gin_flags.run_command(FLAGS, count, argv)
