"""Estimates the cost of a train step on many devices without them: `pemoe plan --help`."""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    import optax

    from pemoe_jax.analysis.planning import compiled_step
    from pemoe_jax.core import network, optim

# This command has no run file, so these are the bindings that a run file would have. The value of
# --optimizer completes the last line.
_BINDINGS = f"""\
{gin_flags.FREEZE_BINDINGS}\
from pemoe_jax.tools import plan
from pemoe_jax.core import network
from pemoe_jax.core import optim
network.T5Config.scan_layers = %SCAN_LAYERS
network.T5Config.remat_policy = %REMAT_POLICY
network.T5Config.attention = %ATTENTION
plan.configured_step.model = %MODEL
plan.configured_step.method = %METHOD
plan.configured_step.trainable = @freezing.trainable_patterns()
plan.configured_step.frozen_dtype = %FROZEN_DTYPE
plan.configured_step.optimizer = @optim."""

# Macros that run files set, with the same defaults.
_MACROS = """\
SCAN_LAYERS = False
REMAT_POLICY = 'none'
ATTENTION = 'plain'
FROZEN_DTYPE = 'activations'
"""

FLAGS = gin_flags.make_parser(
    "plan",
    "Compiles the train step of any size for any number of devices, on this machine's CPU and\n"
    "without weights, and prints its memory, collectives and FLOPs on each device.",
    example="""\
  pemoe plan --gin_file=models/t5_1_1_xxl.gin --gin_file=methods/mov.gin \\
    --gin.NUM_EXPERTS=60 --gin.DTYPE=bfloat16 \\
    --mesh 32x1:fsdp --mesh 4x8 --mesh 1x32 --hbm v4
""",
    macros=(*gin_flags.MODEL_AND_METHOD_FILES, _MACROS + _BINDINGS),
)
FLAGS.add_argument(
    "--mesh",
    action="append",
    default=[],
    metavar="DATAx[EXPERTx]MODEL[:fsdp]",
    help="devices, such as 4x8: the batch over 4, matrices over 8; or 2x4x1: the batch over 2 x 4,"
    " experts over 4; :fsdp also shards parameters over the data axis; may be repeated (default:"
    " 1x1)",
)
FLAGS.add_argument("--fsdp", action="store_true", help="append :fsdp to every mesh")
FLAGS.add_argument("--batch_size", type=int, default=32, help="rows over all devices (default: 32)")
FLAGS.add_argument(
    "--lengths",
    default="1024,256",
    metavar="N,N",
    help="tokens of inputs and of targets in a row (default: 1024,256)",
)
FLAGS.add_argument(
    "--microbatches", type=int, default=1, help="microbatches of a batch (default: 1)"
)
FLAGS.add_argument(
    "--optimizer",
    choices=("adafactor", "adamw"),
    default="adafactor",
    help="adafactor (default, that of gin/paper/) or adamw (that of runs/finetune.gin)",
)
FLAGS.add_argument("--hbm", metavar="SIZE", help="memory of a device: 32GB, or a chip such as v4")
FLAGS.add_argument(
    "--every_layer",
    action="store_true",
    help="compile all layers of a deep model instead of extrapolating from 2 and 4",
)
FLAGS.add_argument("--markdown", action="store_true", help="print Markdown")
FLAGS.add_argument(
    "--output", metavar="FILE", help="also write the tables to FILE.md, or all figures to FILE.json"
)

# Name -> memory in GB of what jax counts as a device: a core of TPU v2 and v3, else a chip.
CHIPS = {"v2": 8, "v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "h100": 80}


def configured_step(
    model: "network.Transformer | None",
    method: str | None,
    trainable: Sequence[str] | None,
    optimizer: "optim.OptimizerFactory",
    frozen_dtype: str,
) -> "tuple[network.Transformer, str, Sequence[str], optax.GradientTransformation, str]":
    """Returns the arguments that gin files configure, with the optimizer constructed.

    `--help` takes the descriptions of macros from the following lines.

    Args:
      model: the network with its adapters, from a model file and a method file.
      method: name of the method in the tables; None: 'custom'.
      trainable: patterns of the parameters that train.
      optimizer: (schedule, param_axes=…) -> optax transformation.
      frozen_dtype: dtype of frozen matrices: 'activations' (the dtype of activations), 'int8' or
        'float8_e4m3fn'.

    Raises:
      InputError: `model` or `trainable` is not set.
    """
    if model is None:
        raise InputError("MODEL is not set: pass --gin_file=models/…")
    if not trainable:
        raise InputError("TRAINABLE is not set: pass --gin_file=methods/…")
    from pemoe_jax.core import network

    # The learning rate changes neither shapes nor FLOPs.
    transformation = optimizer(lambda step: 1e-3, param_axes=network.param_axes(model))
    return model, method or "custom", trainable, transformation, frozen_dtype


def plan(args: argparse.Namespace, bindings: Sequence[str]) -> None:
    """Compiles the step for each mesh, and prints and writes the costs.

    Raises:
      InputError: a flag is wrong, or a mesh cannot divide the batch evenly; see also
        `gin_flags.load_config`.
    """
    from pemoe_jax.analysis import tables
    from pemoe_jax.analysis.planning import cost_tables
    from pemoe_jax.runtime import atomic_write

    layouts = [cost_tables.MeshLayout.parse(text, args.fsdp) for text in args.mesh or ["1x1"]]
    lengths = _parse_lengths(args.lengths)
    size = parse_memory(args.hbm)
    chip = cost_tables.Chip(*size) if size else None
    for flag in ("batch_size", "microbatches"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if args.output and Path(args.output).suffix not in (".md", ".json"):
        raise InputError(f"--output must end in .md or .json, got {args.output!r}")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise InputError(f"--output must be in an existing folder, got {args.output!r}")
    # jax reads the number of devices from the environment when it is first used.
    _create_virtual_devices(max(layout.devices for layout in layouts))

    from pemoe_jax.analysis.planning import compiled_step

    step, method = _load_step(args, bindings, lengths)
    # All meshes are checked before the first is compiled, which may take minutes.
    for layout in layouts:
        compiled_step.make_mesh(step, layout)
    costs = []
    for layout in layouts:
        start = time.perf_counter()
        print(f"compiling {layout} …", file=sys.stderr, flush=True)
        costs.append(compiled_step.estimate_cost(step, layout, args.every_layer))
        print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    title = _title(args, method, step)
    results = cost_tables.to_tables(title, costs, chip)
    tables.print_tables(results, args.markdown)
    if args.output:
        is_json = Path(args.output).suffix == ".json"
        text = cost_tables.to_json(title, costs, chip) if is_json else tables.to_markdown(results)
        atomic_write.write_text(args.output, text)


def _load_step(
    args: argparse.Namespace, bindings: Sequence[str], lengths: tuple[int, int]
) -> "tuple[compiled_step.TrainStep, str]":
    """Returns the step that gin files and flags configure, and the method as text."""
    from pemoe_jax.analysis import counts
    from pemoe_jax.analysis.planning import compiled_step, flops
    from pemoe_jax.core import adapters, network, params, quantized

    args.gin_bindings = [_BINDINGS + args.optimizer, *args.gin_bindings]
    gin_flags.load_config(args, bindings, [_MACROS])
    model, method, trainable, optimizer, frozen_dtype = gin_flags.call_configured(configured_step)
    quantized.check_frozen_dtype(frozen_dtype)
    step = compiled_step.TrainStep(
        model, trainable, optimizer, args.batch_size, lengths, args.microbatches, frozen_dtype
    )
    shapes = params.flatten(network.param_shapes(model))
    params.trainable_paths(shapes, trainable)  # raises before anything is compiled
    label = counts.method_label(method, shapes, adapters.describe(model.adapters), model.sparse)
    if model.sparse is not None:
        used = flops.used_parameters(shapes, model.sparse)
        label += f", {used:,} of {params.count(shapes):,} parameters a token"
    return step, label


def _title(args: argparse.Namespace, method: str, step: "compiled_step.TrainStep") -> str:
    """Returns the title of the tables: model, method, batch, dtype and optimizer."""
    # The model file is the first one that is not in a folder methods/.
    names = [Path(file).stem for file in args.gin_file if "methods" not in Path(file).parts]
    microbatches = f" in {step.microbatches} microbatches" if step.microbatches > 1 else ""
    return (
        f"{names[0] if names else 'model'} {method}: {step.batch_size} rows of"
        f" {step.lengths[0]} + {step.lengths[1]} tokens{microbatches},"
        f" {step.model.config.as_dict()['dtype']}, {args.optimizer}"
    )


def _parse_lengths(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if not match:
        raise InputError(f"--lengths must be INPUTS,TARGETS, got {text!r}")
    return int(match[1]), int(match[2])


def parse_memory(text: str | None) -> tuple[str, int] | None:
    """Parses 'v4', '32GB' or '79.6 GiB' -> (text, bytes) of a device's memory; None for None."""
    if text is None:
        return None
    if size := CHIPS.get(text.lower()):
        return f"{size} GB ({text})", size * 10**9
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", text)
    if not match or not float(match[1]):
        raise InputError(
            f"--hbm must be a size such as 32GB, or one of {', '.join(CHIPS)}, got {text!r}"
        )
    unit = 10**9 if match[2] == "GB" else 2**30
    return f"{match[1]} {match[2]}", int(float(match[1]) * unit)


def _create_virtual_devices(count: int) -> None:
    """Makes jax start with virtual CPU devices; must be called before jax is first used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    name = "--xla_force_host_platform_device_count"
    # XLA_FLAGS may have other flags of the user.
    other_flags = re.sub(rf" *{name}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{other_flags} {name}={count}".strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return gin_flags.run_command(FLAGS, plan, argv)
