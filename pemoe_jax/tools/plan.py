"""What a train step takes on many devices, without them: `pemoe plan --help`."""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.analysis.planning import compile
    from pemoe_jax.core import network

_WIRING = """\
from pemoe_jax.tools import plan
from pemoe_jax.core import network
from pemoe_jax.core import optim
network.T5Config.scan_layers = %SCAN_LAYERS
network.T5Config.remat_policy = %REMAT_POLICY
network.T5Config.attention = %ATTENTION
plan.configured.model = %MODEL
plan.configured.method = %METHOD
plan.configured.trainable = %TRAINABLE
plan.configured.frozen_dtype = %FROZEN_DTYPE
plan.configured.optimizer = @optim."""

# where no run file has them
_MACROS = (
    "SCAN_LAYERS = False",
    "REMAT_POLICY = 'none'",
    "ATTENTION = 'plain'",
    "FROZEN_DTYPE = 'activations'",
)

FLAGS = gin_flags.make_parser(
    "plan",
    "Compiles the train step of any size for any number of devices, on this machine's CPU and\n"
    "without weights, and prints what it takes on each: memory, communication, FLOPs.",
    example="""\
  pemoe plan --gin_file=models/t5_1_1_xxl.gin --gin_file=methods/mov.gin \\
    --gin.NUM_EXPERTS=60 --gin.DTYPE=bfloat16 \\
    --mesh 32x1:fsdp --mesh 4x8 --mesh 1x32 --hbm v4
""",
    macros=(*gin_flags.MODEL_AND_METHOD_FILES, "\n".join([*_MACROS, _WIRING])),
)
FLAGS.add_argument(
    "--mesh",
    action="append",
    default=[],
    metavar="DATAxMODEL[:fsdp]",
    help="devices, e.g. 4x8: a batch over 4, each matrix over 8; may be repeated (default: 1x1)",
)
FLAGS.add_argument("--fsdp", action="store_true", help="all meshes spread parameters over data too")
FLAGS.add_argument("--batch_size", type=int, default=32, help="rows over all devices (default: 32)")
FLAGS.add_argument(
    "--lengths", default="1024,256", metavar="N,N", help="of inputs and targets (default: 1024,256)"
)
FLAGS.add_argument("--microbatches", type=int, default=1, help="pieces of a batch (default: 1)")
FLAGS.add_argument(
    "--optimizer", choices=("adafactor", "adamw"), default="adafactor", help="(default: adafactor)"
)
FLAGS.add_argument("--hbm", metavar="SIZE", help="memory of a device: 32GB, or its name, e.g. v4")
FLAGS.add_argument(
    "--every_layer",
    action="store_true",
    help="compile all layers, where 2 and 4 tell what each further one adds",
)
FLAGS.add_argument("--markdown", action="store_true", help="print Markdown")
FLAGS.add_argument("--output", metavar="FILE", help="write the plan there, by its end .md or .json")

# Memory of a device as jax counts them: of TPU v2 and v3 a core, of the others a chip.
CHIPS = {"v2": 8, "v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "h100": 80}


def configured(
    model: "network.Transformer | None",
    method: str | None,
    trainable: Sequence[str] | None,
    optimizer: Any,
    frozen_dtype: str,
) -> "tuple[network.Transformer, str, Sequence[str], Any, str]":
    """What the gin files configure: the arguments, with the optimizer's transformation.

    Args:
      model: network with its adapters.
      method: its name.
      trainable: patterns of the parameters that train.
      optimizer: schedule -> optax transformation.
      frozen_dtype: of frozen matrices, one of `quantized.FROZEN_DTYPES`.

    Raises:
      InputError: there is no model or no method.
    """
    if model is None:
        raise InputError("no model: expected --gin_file=models/…")
    if not trainable:
        raise InputError("TRAINABLE is not set: expected --gin_file=methods/…")
    # any rate: it changes no shape
    return model, method or "custom", trainable, optimizer(lambda step: 1e-3), frozen_dtype


def plan(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Prints and writes what the flags ask for.

    Raises:
      InputError: a flag is wrong, a batch does not divide; see `config.load` too.
    """
    from pemoe_jax.analysis import tables as tables_lib
    from pemoe_jax.analysis.planning import tables

    layouts = [tables.Layout.parse(text, args.fsdp) for text in args.mesh or ["1x1"]]
    lengths = _lengths(args.lengths)
    chip = memory(args.hbm)
    for flag in ("batch_size", "microbatches"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag}: expected at least 1, found {getattr(args, flag)}")
    _check_output(args.output)
    _make_devices(max(one.devices for one in layouts))  # before jax looks for any

    from pemoe_jax.analysis.planning import compile

    step, method = _step(args, bindings, lengths)
    for one in layouts:
        compile.mesh_of(step, one)  # before minutes are spent on those before it
    found = []
    for one in layouts:
        start = time.perf_counter()
        print(f"compiling {one} …", file=sys.stderr, flush=True)
        found.append(compile.plan(step, one, args.every_layer))
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    title = _title(args, method, step)
    shown = tables.to_tables(title, found, tables.Chip(*chip) if chip else None)
    if args.markdown:
        print(tables_lib.to_markdown(shown), end="")
    else:
        tables_lib.print_tables(shown)
    if args.output:
        path = Path(args.output)
        as_json = tables.to_json(title, found, tables.Chip(*chip) if chip else None)
        from pemoe_jax.runtime import atomic_write

        text = as_json if path.suffix == ".json" else tables_lib.to_markdown(shown)
        atomic_write.write_text(path, text)


def _step(
    args: argparse.Namespace, bindings: Sequence[str], lengths: tuple[int, int]
) -> "tuple[compile.Step, str]":
    """What the gin files and flags describe, and the method's label."""
    from pemoe_jax.analysis import counts
    from pemoe_jax.analysis.planning import compile
    from pemoe_jax.core import adapters, network, params, quantized

    args.gin_bindings = [_WIRING + args.optimizer, *args.gin_bindings]
    gin_flags.load_config(args, bindings, _MACROS)
    model, method, trainable, optimizer, frozen_dtype = gin_flags.call_configured(configured)
    quantized.check_frozen_dtype(frozen_dtype)
    rows = args.batch_size
    step = compile.Step(model, trainable, optimizer, rows, lengths, args.microbatches, frozen_dtype)
    shapes = params.flatten(network.param_shapes(model))
    params.trainable_paths(shapes, trainable)  # fails before anything is compiled
    return step, counts.method_label(method, shapes, adapters.describe(model.adapters))


def _title(args: argparse.Namespace, method: str, step: "compile.Step") -> str:
    files = [Path(file).stem for file in args.gin_file if "methods" not in Path(file).parts]
    pieces = f" in {step.microbatches} pieces" if step.microbatches > 1 else ""
    return (
        f"{' '.join([files[0] if files else 'model', method])}: {step.batch_size} rows of"
        f" {step.lengths[0]} + {step.lengths[1]} tokens{pieces},"
        f" {step.model.config.as_dict()['dtype']}, {args.optimizer}"
    )


def _lengths(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if not found:
        raise InputError(f"--lengths: expected lengths of inputs and targets, found {text!r}")
    return int(found[1]), int(found[2])


def memory(text: str | None) -> tuple[str, int] | None:
    """'v4', '32GB' or '79.6 GiB' -> (how it is called, bytes)."""
    if text is None:
        return None
    if text.lower() in CHIPS:
        size = CHIPS[text.lower()]
        return f"{size} GB ({text})", size * 10**9
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", text)
    if not found or not float(found[1]):
        known = ", ".join(CHIPS)
        raise InputError(f"--hbm: expected a size as 32GB, or one of {known}; found {text!r}")
    unit = 10**9 if found[2] == "GB" else 2**30
    return f"{found[1]} {found[2]}", int(float(found[1]) * unit)


def _make_devices(count: int) -> None:
    """Virtual ones, of the CPU; jax reads this when it first looks for devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    name = "--xla_force_host_platform_device_count"
    others = re.sub(rf" *{name}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{others} {name}={count}".strip()


def _check_output(path: str | None) -> None:
    if path is None:
        return
    if Path(path).suffix not in (".md", ".json"):
        raise InputError(f"--output: expected a file that ends in .md or .json, found {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"--output={path}: expected a file in a folder that exists")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_command(FLAGS, plan, argv)
