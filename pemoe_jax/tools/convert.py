"""Converts checkpoints to other formats: `pemoe convert --help`."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    import numpy as np

    from pemoe_jax.checkpoints.lazy_array import Index, LazyArray
    from pemoe_jax.checkpoints.models import OpenedModel
    from pemoe_jax.core.merging import KernelUpdate

# jax and the checkpoint modules are imported in functions: `--help` must answer within a second.

_DESCRIPTION = """\
Writes a checkpoint in another format. SOURCE is one of these; its format is detected:
  a base     a T5X checkpoint_<step> (legacy or Orbax), a Hugging Face folder of T5 v1.1,
             a .safetensors file that `convert base` wrote, a run that trained the whole model
  a run      MODEL_DIR of train (its newest checkpoint), or one checkpoint_<step> in it
  an adapter a folder that `convert adapter` wrote, or one of Hugging Face PEFT ((IA)3, LoRA)
Sources may be gs:// paths; OUTPUT is a local path that does not exist yet.
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
        "SOURCE is a run of an adapter method, an exported adapter, or a PEFT adapter with --base."
        " Writes a folder of some MB: the adapter's parameters, the method, its sites, experts,"
        " rank, alpha and router, and the base that it belongs to. `evaluate` takes the folder as"
        " CHECKPOINT_PATH.",
    ),
    "peft": (
        "a run or an adapter, of (IA)3 or LoRA -> Hugging Face PEFT's format",
        "Writes a folder for `peft.PeftModel.from_pretrained`. Routed adapters (MoV, MoLORA) are"
        " refused: PEFT would silently leave their routers out.",
    ),
    "huggingface": (
        "a base, or (IA)3 or LoRA merged into theirs -> a Hugging Face folder",
        "SOURCE is a base or a run. Writes config.json and model.safetensors (in shards of at most"
        " 5 GB) for `transformers.T5ForConditionalGeneration.from_pretrained`. Tokenizer files are"
        " not written: copy them from the base's folder.",
    ),
    "base": (
        "a base, or (IA)3 or LoRA merged into theirs -> one .safetensors file",
        "SOURCE is a base or a run. Writes one file for INITIAL_CHECKPOINT_PATH; needs memory for"
        " the whole model.",
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
            help="base of the adapter, if it differs from the recorded path; its fingerprint is"
            " checked, and its path recorded",
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
    """Converts a checkpoint as the arguments say.

    Raises:
      InputError: this direction cannot convert the source, or OUTPUT exists.
    """
    from pemoe_jax.checkpoints import models
    from pemoe_jax.runtime import file_io

    output = file_io.resolve_local(args.output, "OUTPUT")
    if output.exists():
        raise InputError(f"OUTPUT must be a new path, got {args.output}, which exists")
    # A base is recognized by this suffix.
    if (output.suffix == ".safetensors") != (args.direction == "base"):
        expected = "a .safetensors file" if args.direction == "base" else "a folder"
        raise InputError(f"OUTPUT must be {expected}, got {args.output}")
    source = models.open_model(args.source, args.base)
    if args.base is not None:
        source = _with_base(source, args.base)
    if args.direction in ("base", "huggingface") and source.frozen_dtype != "activations":
        print(
            f"{args.source} was trained with its base in {source.frozen_dtype}; the output has the"
            " base as stored, and its scores may differ"
        )
    write = {
        "adapter": _write_adapter,
        "peft": _write_peft,
        "huggingface": _write_huggingface,
        "base": _write_base,
    }[args.direction]
    write(source, output, args)
    print(f"{args.output}: {_describe_size(output)}")


def _with_base(source: "OpenedModel", base_path: str) -> "OpenedModel":
    """Returns the source with the path and fingerprint of a base, after checking the latter."""
    from pemoe_jax.checkpoints import base_model as base_lib

    assert source.record is not None
    base = base_lib.open_base(base_path)
    # The fingerprint is recorded too: PEFT adapters come without one.
    identity = {**source.record.base, "path": base.path, "fingerprint": base.fingerprint()}
    source.check_base(identity["fingerprint"])
    record = dataclasses.replace(source.record, base=identity)
    return dataclasses.replace(source, record=record)


def _describe_size(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.iterdir())
    total = sum(file.stat().st_size for file in files)
    size = f"{total / 1e6:.1f} MB" if total < 1e9 else f"{total / 1e9:.2f} GB"
    return size if path.is_file() else f"{', '.join(f.name for f in files)} ({size})"


def _load_adapter(source: "OpenedModel") -> "dict[str, np.ndarray]":
    import jax

    from pemoe_jax.core import params as params_lib

    if not source.needs_base:
        raise InputError(
            f"{source.path}: expected adapters on a frozen base, got a whole model"
            " (for a whole model: convert huggingface, convert base)"
        )
    return jax.device_get(params_lib.flatten(source.load_trained()))


def _write_adapter(source: "OpenedModel", output: Path, _: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import adapter_file
    from pemoe_jax.checkpoints import base_model as base_lib

    arrays, record = _load_adapter(source), source.record
    assert record is not None
    if record.base["fingerprint"] is None:  # a PEFT adapter
        assert source.base_path is not None
        fingerprint = base_lib.open_base(source.base_path).fingerprint()
        record = dataclasses.replace(record, base={**record.base, "fingerprint": fingerprint})
    adapter_file.save_adapter(output, arrays, record, source.step)


def _write_peft(source: "OpenedModel", output: Path, args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import peft
    from pemoe_jax.core import params as params_lib

    arrays = _load_adapter(source)
    assert source.record is not None
    # TRAINABLE may add parameters of the base, norms for example.
    others = [path for path in arrays if not params_lib.is_adapter(path)]
    if others:
        raise InputError(
            f"{source.path}: PEFT's format has adapters only, the run trained {others[0]} as well"
        )
    base_name = args.base_name or source.base_path
    peft.save_adapter(output, source.record.adapters, arrays, base_name)


def _write_huggingface(source: "OpenedModel", output: Path, args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import huggingface

    arrays = _merged_arrays(source, args.dtype)
    with _progress("writing", len(arrays)) as report:
        huggingface.save_checkpoint(output, arrays, dtype=_dtype(args.dtype), report=report)


def _write_base(source: "OpenedModel", output: Path, args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import base_model as base_lib
    from pemoe_jax.core import params as params_lib

    merged = _merged_arrays(source, args.dtype)
    arrays = {}
    with _progress("reading", len(merged)) as report:
        for path, array in merged.items():
            arrays[path] = array.read()
            report(len(arrays))
    config = source.model.config.as_dict()
    base_lib.save_base(output, params_lib.unflatten(arrays), config, overwrite=False)


@contextlib.contextmanager
def _progress(label: str, num_arrays: int) -> Iterator[Callable[[int], None]]:
    from pemoe_jax.runtime import progress

    bar = progress.Progress(label, num_arrays, note="arrays")
    try:
        yield lambda done: bar.report_if_slow(done, "arrays")
    finally:
        bar.close()


def _dtype(name: str | None) -> "np.dtype | None":
    import jax.numpy as jnp

    return None if name is None else jnp.dtype(name)  # numpy alone does not know bfloat16


def _merged_arrays(source: "OpenedModel", dtype: str | None = None) -> "dict[str, LazyArray]":
    """Returns the arrays of a model without adapters; (IA)³ and LoRA are merged when read.

    Args:
      source: a base, a run or an adapter.
      dtype: dtype of all arrays; None: that of the base.

    Returns:
      path -> array.

    Raises:
      InputError: an adapter is routed, or belongs to another base.
    """
    import numpy as np

    from pemoe_jax.checkpoints import base_model as base_lib
    from pemoe_jax.checkpoints import lazy_array
    from pemoe_jax.core import merging
    from pemoe_jax.core import params as params_lib

    arrays: dict[str, LazyArray] = {}
    if source.record is None:
        arrays = base_lib.open_base(source.path).arrays
    elif source.needs_base:
        merging.check_mergeable(source.record.adapters)  # before the base is read
        if source.base_path is None:
            raise InputError(
                f"{source.path} was trained on random weights (seed {source.record.base['seed']}):"
                " pass --base, a checkpoint of them"
            )
        base = base_lib.open_base(source.base_path)
        source.check_base(base.fingerprint())
        arrays = base.arrays
    updates: dict[str, KernelUpdate] = {}
    if source.record is not None:
        trained = params_lib.flatten(source.load_trained())
        adapter = {path: array for path, array in trained.items() if params_lib.is_adapter(path)}
        updates = merging.kernel_updates(source.record.adapters, adapter)
        # Parameters of the base that were trained replace the stored ones.
        others = trained.keys() - adapter.keys()
        arrays = arrays | {p: lazy_array.from_numpy(np.asarray(trained[p])) for p in others}
    missing = sorted(updates.keys() - arrays.keys())
    if missing:
        raise InputError(f"{source.path}: expected {missing[0]} in its base, got none")
    return {
        path: _merged(path, array, updates.get(path), _dtype(dtype))
        for path, array in arrays.items()
    }


def _merged(
    path: str, array: "LazyArray", update: "KernelUpdate | None", dtype: "np.dtype | None"
) -> "LazyArray":
    import numpy as np

    from pemoe_jax.checkpoints.lazy_array import LazyArray
    from pemoe_jax.core import params as params_lib

    output_dtype = array.dtype if dtype is None else dtype

    # The whole array is merged, whatever slice is read: writers read whole arrays.
    def read_slice(index: "Index") -> "np.ndarray":
        values = array.read()
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused below
            if update is not None:
                values = update(values.astype(np.float32))
            values = values.astype(output_dtype, copy=False)  # rounded once, after merging
        if not params_lib.all_finite(values):
            raise InputError(f"{path}: NaN or infinity as {output_dtype}: not written")
        return values[index]

    return LazyArray(array.shape, output_dtype, read_slice)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return gin_flags.run_command(flags(), lambda args, _: convert(args), argv)
