"""Checkpoints from one format to another: `pemoe convert --help`."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from pemoe_jax.checkpoints.lazy_array import LazyArray
    from pemoe_jax.checkpoints.models import OpenedModel

_DESCRIPTION = """\
Writes a checkpoint in another format. What SOURCE is, is found out:
  a base     a T5X checkpoint_<step> (legacy or Orbax), a Hugging Face folder of T5 v1.1,
             a .safetensors file of ours, a run that trained the whole model
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

`pemoe convert DIRECTION --help` says more of each.
"""

_DIRECTIONS = {
    "adapter": (
        "a run or an adapter of PEFT's -> adapter.safetensors + adapter_config.json",
        "SOURCE is a run of an adapter method, an adapter of ours, or one of PEFT's with --base."
        " Writes a folder of some MB: the adapter's parameters, the method, its sites, experts,"
        " rank, alpha and router, and which base it belongs to. `evaluate` takes the folder as"
        " CHECKPOINT_PATH.",
    ),
    "peft": (
        "a run or an adapter, of (IA)3 or LoRA -> Hugging Face PEFT's format",
        "Writes a folder for `peft.PeftModel.from_pretrained`. Routed adapters (MoV, MoLORA) are"
        " refused: PEFT would leave their routers out and say nothing.",
    ),
    "huggingface": (
        "a base, or (IA)3 or LoRA merged into theirs -> a Hugging Face folder",
        "SOURCE is a base or a run. Writes config.json and model.safetensors (in shards of at most"
        " 5 GB) for `transformers.T5ForConditionalGeneration.from_pretrained`. Tokenizer files are"
        " not written: copy them from the base's folder.",
    ),
    "base": (
        "a base, or (IA)3 or LoRA merged into theirs -> one .safetensors file of ours",
        "SOURCE is a base or a run. Writes one file for INITIAL_CHECKPOINT_PATH; the whole model"
        " is in memory meanwhile.",
    ),
}


def flags() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pemoe convert",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for name, (summary, text) in _DIRECTIONS.items():
        one = directions.add_parser(name, help=summary, description=text, allow_abbrev=False)
        one.add_argument("source", metavar="SOURCE", help="what is converted")
        one.add_argument("output", metavar="OUTPUT", help="where it is written; must not exist")
        one.add_argument(
            "--base",
            metavar="PATH",
            help="the adapter's base, where it is not what the source names; checked, and recorded",
        )
        if name in ("huggingface", "base"):
            one.add_argument(
                "--dtype",
                choices=("float32", "bfloat16", "float16"),
                help="of all arrays; default: as the base has them. Adapters of a float32 base fit"
                " its bfloat16 copy and not its float16 one",
            )
        if name == "peft":
            one.add_argument(
                "--base_name",
                metavar="NAME",
                help="base_model_name_or_path, e.g. google/t5-large-lm-adapt; default: the base's"
                " path",
            )
    return parser


def convert(args: argparse.Namespace) -> None:
    """Does what the arguments say.

    Raises:
      InputError: the source is none that this direction takes, or OUTPUT is there already.
    """
    from pemoe_jax.checkpoints import models
    from pemoe_jax.runtime import file_io

    output = file_io.resolve_local(args.output, "OUTPUT")
    if output.exists():
        raise InputError(f"{args.output} is there already: expected a new path")
    if (output.suffix == ".safetensors") != (args.direction == "base"):
        raise InputError(
            f"{args.output}: expected "
            + ("a file ending in .safetensors" if args.direction == "base" else "a folder's name")
        )
    source = models.open_model(args.source, args.base)
    if args.base is not None:
        source = _on(source, args.base)
    write: Callable[[Any, argparse.Namespace], None] = {
        "adapter": _to_adapter,
        "peft": _to_peft,
        "huggingface": _to_huggingface,
        "base": _to_base,
    }[args.direction]
    if args.direction in ("base", "huggingface") and source.frozen_dtype != "activations":
        print(
            f"{args.source} was trained with its base kept in {source.frozen_dtype}: what is"
            " written has the base as it is stored, and may score otherwise"
        )
    write(source, args)
    print(f"{args.output}: {_size(output)}")


def _on(source: "OpenedModel", base: str) -> "OpenedModel":
    """The source with the base that is named, once it is seen to be the right one."""
    from pemoe_jax.checkpoints import base_model as base_lib

    assert source.record is not None
    found = base_lib.open_base(base)
    identity = {**source.record.base, "path": found.path, "fingerprint": found.fingerprint()}
    source.check_base(identity["fingerprint"])
    record = dataclasses.replace(source.record, base=identity)
    return dataclasses.replace(source, record=record)


def _size(path: Any) -> str:
    files = [path] if path.is_file() else sorted(path.iterdir())
    total = sum(file.stat().st_size for file in files)
    amount = f"{total / 1e6:.1f} MB" if total < 1e9 else f"{total / 1e9:.2f} GB"
    return amount if path.is_file() else f"{', '.join(f.name for f in files)} ({amount})"


def _trained(source: "OpenedModel") -> dict[str, Any]:
    """Path -> numpy array, of a run or adapter whose base is needed."""
    import jax

    from pemoe_jax.core import params as params_lib

    if not source.needs_base:
        raise InputError(
            f"{source.path} is a whole model: expected adapters on a base that did not train"
            " (for a whole model: convert huggingface, convert base)"
        )
    return jax.device_get(params_lib.flatten(source.load_trained()))


def _to_adapter(source: "OpenedModel", args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import adapter_file
    from pemoe_jax.checkpoints import base_model as base_lib

    arrays = _trained(source)
    assert source.record is not None
    identity = source.record.base
    if identity["fingerprint"] is None:
        assert source.base_path is not None
        fingerprint = base_lib.open_base(source.base_path).fingerprint()
        identity = {**identity, "fingerprint": fingerprint}
    record = dataclasses.replace(source.record, base=identity)
    adapter_file.save_adapter(args.output, arrays, record, source.step)


def _to_peft(source: "OpenedModel", args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import peft
    from pemoe_jax.core import params as params_lib

    arrays = _trained(source)
    assert source.record is not None
    others = [path for path in arrays if not params_lib.is_adapter(path)]
    if others:
        raise InputError(f"{source.path} trained {others[0]} too: PEFT's format cannot hold it")
    name = args.base_name or source.base_path
    peft.save_adapter(args.output, source.record.adapters, arrays, name)


def _to_huggingface(source: "OpenedModel", args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import huggingface

    dtype = _dtype(args.dtype)
    arrays = merged_arrays(source, dtype)
    with _progress("writing", len(arrays)) as report:
        huggingface.save_checkpoint(args.output, arrays, dtype=dtype, report=report)


def _to_base(source: "OpenedModel", args: argparse.Namespace) -> None:
    from pemoe_jax.checkpoints import base_model as base_lib
    from pemoe_jax.core import params as params_lib

    dtype = _dtype(args.dtype)
    found = merged_arrays(source, dtype)
    arrays = {}
    with _progress("reading", len(found)) as report:
        for path, array in found.items():
            arrays[path] = array.read()
            report(len(arrays))
    config = source.model.config.as_dict()
    base_lib.save_base(args.output, params_lib.unflatten(arrays), config, overwrite=False)


@contextlib.contextmanager
def _progress(label: str, arrays: int) -> Iterator[Callable[[int], None]]:
    """A bar over arrays, of which nothing is seen where it is quick."""
    from pemoe_jax.runtime import progress

    bar = progress.Progress(label, arrays, note="arrays")
    try:
        yield lambda done: bar.report_if_slow(done, "arrays")
    finally:
        bar.close()


def _dtype(name: str | None) -> Any:
    import jax.numpy as jnp

    return None if name is None else jnp.dtype(name)


def merged_arrays(source: "OpenedModel", dtype: Any = None) -> "dict[str, LazyArray]":
    """Path -> array of a model without adapters: (IA)³ and LoRA are merged as arrays are read.

    Args:
      source: a base, a run or an adapter.
      dtype: of the merged matrices; None: as the base has them.

    Raises:
      InputError: an adapter routes by its input, or belongs to another base.
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
        merging.check_mergeable(source.record.adapters)  # before a base is read
        if source.base_path is None:
            raise InputError(
                f"{source.path} was trained on random weights (seed {source.record.base['seed']}):"
                " expected --base, a checkpoint of them"
            )
        base = base_lib.open_base(source.base_path)
        source.check_base(base.fingerprint())
        arrays = base.arrays
    folds: dict[str, Callable[[Any], Any]] = {}
    if source.record is not None:
        trained = params_lib.flatten(source.load_trained())
        own = {path: array for path, array in trained.items() if params_lib.is_adapter(path)}
        folds = merging.kernel_updates(source.record.adapters, own)
        others = trained.keys() - own.keys()
        arrays = arrays | {
            path: lazy_array.from_numpy(np.asarray(trained[path])) for path in others
        }
    missing = sorted(folds.keys() - arrays.keys())
    if missing:
        raise InputError(f"{source.path}: expected {missing[0]} in its base, found none")
    return {path: _written(path, arrays[path], folds.get(path), dtype) for path in arrays}


def _written(
    path: str, array: "LazyArray", fold: Callable[[Any], Any] | None, dtype: Any
) -> "LazyArray":
    """An array as it is written: merged in float32 when it is read, rounded once, and finite."""
    import numpy as np

    from pemoe_jax.checkpoints.lazy_array import LazyArray
    from pemoe_jax.core import params as params_lib

    rounded = np.dtype(array.dtype if dtype is None else dtype)

    def read_slice(index: tuple[slice, ...]) -> Any:
        found = array.read()
        with np.errstate(over="ignore"):  # what is too large for the type is refused below
            found = (fold(found.astype(np.float32)) if fold else found).astype(rounded, copy=False)
        if not params_lib.all_finite(found):
            raise InputError(f"{path}: NaN or infinity as {rounded}: not written")
        return found[index]

    return LazyArray(array.shape, rounded, read_slice)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return gin_flags.run_command(flags(), lambda args, _: convert(args), argv)
