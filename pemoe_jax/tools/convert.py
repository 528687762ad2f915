"""Converts checkpoints to other formats: `pemoe convert --help`."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags, run_file

if TYPE_CHECKING:
    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.runtime.file_io import AnyPath

_DESCRIPTION = """\
Writes a checkpoint in another format. SOURCE is one of these; its format is detected:
  a base      a T5X checkpoint_<step> (legacy or Orbax), a Hugging Face folder of T5 or Switch
              Transformers, a .safetensors file that `convert base` wrote, or a run that trained
              the whole model
  a run       MODEL_DIR of pemoe train (its newest checkpoint), or one checkpoint_<step> in it
  an adapter  a folder that `convert adapter` wrote, or one of Hugging Face PEFT ((IA)3, LoRA)
Sources may be gs:// paths, and so may OUTPUT, which must not exist yet.
"""

_EXAMPLES = """\
examples:
  pemoe convert adapter /tmp/mov mov_for_a_colleague
  pemoe convert adapter peft_lora my_lora --base=t5-large-lm-adapt
  pemoe convert peft /tmp/lora peft_lora
  pemoe convert huggingface t5_1_1_lm100k_large/checkpoint_1100000 t5_large_hf
  pemoe convert base /tmp/lora merged.safetensors --dtype=bfloat16

`pemoe convert DIRECTION --help` describes each direction.
"""

_DIRECTIONS = {
    "adapter": (
        "a run or a PEFT adapter -> adapter.safetensors + adapter_config.json",
        "SOURCE is a run of an adapter method, or an adapter (PEFT's with --base, unless it names a"
        " local base). Writes a folder of some MB: the adapter's parameters, the method, its sites,"
        " experts, rank, alpha and router, and the base that it belongs to. `pemoe evaluate` takes"
        " the folder as CHECKPOINT_PATH.",
    ),
    "peft": (
        "a run or an adapter, of (IA)3 or LoRA -> Hugging Face PEFT's format",
        "Writes a folder for `peft.PeftModel.from_pretrained`. Routed adapters (MoV, MoLORA) are"
        " refused: PEFT would silently leave their routers out.",
    ),
    "huggingface": (
        "a base, or (IA)3 or LoRA merged into its base -> a Hugging Face folder",
        "SOURCE is a base, a run or an adapter. Writes config.json and model.safetensors (in shards"
        " of at most 5 GB) for `transformers.T5ForConditionalGeneration.from_pretrained`, or, if"
        " layers have experts, for SwitchTransformersForConditionalGeneration (which needs top-1"
        " routing, COMBINE='probability', experts with ungated MLPs and no EXTRA_MLP). If the"
        " base's folder has a spiece.model, it is copied; otherwise copy the base's SentencePiece"
        " file into OUTPUT as spiece.model.",
    ),
    "base": (
        "a base, or (IA)3 or LoRA merged into its base -> one .safetensors file",
        "SOURCE is a base, a run or an adapter. Writes one file for INITIAL_CHECKPOINT_PATH; needs"
        " memory for the whole model.",
    ),
}


def flags() -> argparse.ArgumentParser:
    """Returns the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="pemoe convert",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for name, (summary, text) in _DIRECTIONS.items():
        direction = directions.add_parser(name, help=summary, description=text, allow_abbrev=False)
        direction.add_argument("source", metavar="SOURCE", help="checkpoint to convert")
        direction.add_argument("output", metavar="OUTPUT", help="path to write; must not exist")
        direction.add_argument(
            "--base",
            metavar="PATH",
            help="base of the adapter, if it is not at the recorded path; must have the recorded"
            " fingerprint, if there is one; its path is recorded in OUTPUT",
        )
        if name in ("huggingface", "base"):
            direction.add_argument(
                "--dtype",
                choices=("float32", "bfloat16", "float16"),
                help="dtype of all arrays; default: that of the base. Adapters of a float32 base"
                " fit its bfloat16 copy, but not its float16 copy",
            )
        if name == "peft":
            direction.add_argument(
                "--base_name",
                metavar="NAME",
                help="base_model_name_or_path, e.g. google/t5-large-lm-adapt; default: the base's"
                " path",
            )
    return parser


def convert(args: argparse.Namespace) -> None:
    """Runs the command with parsed flags.

    Raises:
      InputError: the source cannot be converted to the output's format, or OUTPUT exists.
    """
    # Imported here, because they import jax, and `--help` must answer within a second.
    from pemoe_jax.checkpoints import export, models
    from pemoe_jax.runtime import file_io

    start = run_file.now()
    output = file_io.resolve_output(args.output, "OUTPUT")
    with file_io.remote_errors(output):
        if output.exists():
            raise InputError(f"OUTPUT must be a new path, got {args.output}, which exists")
    # Commands recognize a base in a single file by this suffix.
    if (output.suffix == ".safetensors") != (args.direction == "base"):
        expected = "a .safetensors file" if args.direction == "base" else "a folder"
        raise InputError(f"OUTPUT must be {expected}, got {args.output}")
    source = models.open_model(args.source, args.base)
    if args.base is not None:
        source = export.replace_base(source, args.base)
    if args.direction in ("base", "huggingface") and source.frozen_dtype != "activations":
        print(
            f"{args.source} was trained with its base in {source.frozen_dtype}; the output has the"
            " base as stored, and its scores may differ"
        )
    match args.direction:
        case "adapter":
            export.write_adapter(source, output)
        case "peft":
            export.write_peft(source, output, args.base_name)
        case "huggingface":
            export.write_huggingface(source, output, args.dtype)
        case "base":
            export.write_base(source, output, args.dtype)
    print(f"{args.output}: {_describe_size(output)}")
    if args.direction != "base":
        _begin_run_file(output, source, start)


def _begin_run_file(folder: "AnyPath", source: "OpenedModel", start: str) -> None:
    """Writes run.json into the output, after it was moved to its place as a whole."""
    import jax

    from pemoe_jax.checkpoints import records
    from pemoe_jax.runtime import step_times

    run_file.begin(
        folder,
        start=start,
        versions=records.package_versions(),
        devices=step_times.describe_devices(jax.devices()),
        source={"path": source.path, "step": source.step},
        base=source.record and source.record.base,
    )


def _describe_size(path: "AnyPath") -> str:
    """Returns the size of an output; for a folder, after the names of its files."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    # The size is `st_size` of a local file, and `length` in epath's `stat` of a gs:// path.
    stats = [file.stat() for file in files]
    total = sum(s.st_size if isinstance(s, os.stat_result) else s.length for s in stats)
    size = f"{total / 1e6:.1f} MB" if total < 1e9 else f"{total / 1e9:.2f} GB"
    return size if path.is_file() else f"{', '.join(f.name for f in files)} ({size})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def run(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        gin_flags.check_no_bindings(bindings)
        convert(args)

    return gin_flags.run_command(flags(), run, argv)
