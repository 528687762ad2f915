"""`pemoe verify`: reads files of any known format and reports which are damaged."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError, plural
from pemoe_jax.runtime import gin_flags

if TYPE_CHECKING:
    from etils import epath

    from pemoe_jax.checkpoints.base_model import BaseModel
    from pemoe_jax.checkpoints.lazy_array import LazyArray
    from pemoe_jax.checkpoints.records import Record
    from pemoe_jax.runtime.file_io import AnyPath

_DESCRIPTION = """\
Reads the files of PATH and prints a line for each file, checkpoint or table: what was verified, and
what its format cannot show. PATH is one of these; its format is detected:
  a run (MODEL_DIR) or a checkpoint_<step>, an adapter (also PEFT's), a base model (T5X, Hugging
  Face, .safetensors), weights (.safetensors, .bin), a sentence table (pemoe embed), or data: a
  folder with tfrecords, Parquet, Arrow or JSON files, or one of these files
PATH may be a gs:// path, except for data.
The exit code is 0 if nothing is damaged, else 1. Nothing is written.
"""

_NO_CHECKSUMS = "without checksums: a changed value is not noticed"
_ROWS = 512  # number of rows to read at a time

# The path of a file or folder, and a function that reads it and returns a text: what was verified.
# The function raises InputError or OSError if the file is damaged.
Check = tuple[str, Callable[[], str]]


def flags() -> argparse.ArgumentParser:
    """Returns the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="pemoe verify",
        description=_DESCRIPTION,
        epilog="example:\n  pemoe verify /tmp/mov",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="file or folder, local or gs://")
    return parser


def verify(path: str) -> int:
    """Prints a line for each file, checkpoint or table of a path; returns their number.

    Raises:
      InputError: the path is of no known format, or a part of it is damaged.
    """
    from pemoe_jax.runtime import file_io

    resolved = file_io.resolve(path)
    num_items = num_faults = 0
    with file_io.remote_errors(resolved):
        if not resolved.exists():
            raise InputError(f"PATH must be a file or folder, got {path}, which does not exist")
        for name, check in _checks(resolved):
            num_items += 1
            try:
                print(f"ok     {name}: {check()}", flush=True)
            except (InputError, OSError) as error:
                num_faults += 1
                print(f"FAULT  {str(error) or name}", flush=True)
    if not num_items:
        raise InputError(f"PATH must be one of those of pemoe verify --help, got {path}")
    if num_faults:
        raise InputError(f"{path}: damaged: {num_faults} of {plural(num_items, 'item')}")
    print(f"{path}: {plural(num_items, 'item')} verified, no fault", flush=True)
    return num_items


def _checks(path: epath.Path) -> Iterator[Check]:
    """Detects the format of a path, and yields the checks for it."""
    from pemoe_jax.checkpoints import adapter_file, peft, runs, t5x, t5x_run, tensorstore_file
    from pemoe_jax.runtime import file_io

    name = str(path)
    check_by_suffix: dict[str, Callable[[epath.Path], str]] = {
        ".safetensors": _verify_weights,
        ".bin": _verify_weights,
        ".json": _verify_json,
        ".jsonl": _verify_rows,
        ".parquet": _verify_rows,
        ".arrow": _verify_rows,
    }
    if path.is_file():
        # The readers of data open local files only.
        if file_io.is_remote(path) and path.suffix not in (".safetensors", ".bin"):
            raise InputError(_describe_remote_data(path))
        if ".tfrecord-" in path.name:
            yield name, functools.partial(_verify_tfrecords, path)
        elif path.suffix in check_by_suffix:
            yield name, functools.partial(check_by_suffix[path.suffix], path)
    elif (path / "about.json").exists():  # a sentence table
        yield name, functools.partial(_verify_table, path)
    # Before PEFT's adapters: this package's adapters have an adapter_config.json as well.
    elif adapter_file.is_adapter(path):
        yield name, functools.partial(_verify_adapter, name)
        yield from _weight_checks(path)
    elif peft.is_adapter(path):
        file = path / "adapter_config.json"
        yield str(file), functools.partial(_verify_json, file)
        yield from _weight_checks(path)
    elif (path / "record").is_dir():  # one checkpoint_<step> of a run
        yield name, functools.partial(_verify_checkpoint, file_io.to_path(path))
    elif runs.is_run(name):
        for step in runs.finished_steps(path):
            yield from _checks(path / f"checkpoint_{step}")
    elif t5x_run.is_run(path):
        # The path is a run with several checkpoints, or one of them.
        is_folder_of_run = t5x_run.run_folder(path) == path
        steps = t5x.checkpoint_steps(path)
        for folder in [path / f"checkpoint_{n}" for n in steps] if is_folder_of_run else [path]:
            yield str(folder), functools.partial(_verify_t5x_run, str(folder))
    elif (
        (path / "config.json").exists()
        or (path / t5x.INDEX).is_file()
        or tensorstore_file.orbax_state_folder(path) is not None
        or t5x.checkpoint_steps(path)
    ):
        yield from _weight_checks(path)
        yield name, functools.partial(_verify_base, name)
    elif file_io.is_remote(path):
        raise InputError(_describe_remote_data(path))
    # A folder of data: all of its files, except hidden ones and those in hidden folders.
    else:
        for file in sorted(Path(path).rglob("*")):
            if file.is_file() and not any(part[0] == "." for part in file.parts[len(path.parts) :]):
                yield from _checks(path / str(file.relative_to(path)))


def _describe_remote_data(path: epath.Path) -> str:
    """Returns the message for a gs:// path that is not of a format that is read from buckets."""
    return (
        "PATH must be a run, an adapter, a base model, weights or a sentence table (data must be"
        f" local), got {path}"
    )


def _weight_checks(folder: epath.Path) -> Iterator[Check]:
    """Yields the checks of the files in a folder that hold weights."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin") and file.is_file():
            yield from _checks(file)


def _read_all(arrays: Mapping[str, LazyArray], source: str) -> str:
    """Reads arrays one at a time; returns a text: their number, and what was verified."""
    from pemoe_jax.core import params as params_lib

    for name, array in arrays.items():
        params_lib.check_finite({name: array.read()}, source)
    return f"{plural(len(arrays), 'array')}: names, shapes, sizes, finite values"


def _verify_weights(path: epath.Path) -> str:
    from pemoe_jax.checkpoints import base_model, safetensors_file, torch_pickle

    if path.suffix == ".bin":
        return f"{_read_all(torch_pickle.open_file(path), str(path))}, the zip's CRC-32s"
    arrays, metadata = safetensors_file.open_file(path)
    # A base that `pemoe convert base` wrote; other files of weights do not state their model.
    if base_model.CONFIG_KEY in metadata:
        _check_model(str(path))
    has_checksums = safetensors_file.CHECKSUMS_KEY in metadata
    return f"{_read_all(arrays, str(path))}, {'CRC-32Cs' if has_checksums else _NO_CHECKSUMS}"


def _verify_adapter(path: str) -> str:
    from pemoe_jax.checkpoints import adapter_file

    return _verify_trained(path, *adapter_file.open_adapter(path))


def _verify_t5x_run(path: str) -> str:
    from pemoe_jax.checkpoints import t5x_run

    text = _verify_trained(path, *t5x_run.open_trained(path))
    return f"{text}; {_NO_CHECKSUMS}, and the optimizer's state was not read"


def _verify_trained(name: str, arrays: dict[str, LazyArray], record: Record, step: int) -> str:
    """Loads the arrays of a run or an adapter, and compares them with the model of its record."""
    from pemoe_jax.checkpoints import models

    model = models.build_model(record)
    models.OpenedModel(name, name, model, record, step, arrays).load_trained()
    return (
        f"{plural(len(arrays), 'array')} of {record.method}: record, names, shapes, finite values"
    )


def _verify_checkpoint(folder: AnyPath) -> str:
    from pemoe_jax.checkpoints import runs
    from pemoe_jax.runtime import checksums

    names = checksums.verify_checksums(folder)
    arrays, record, step = runs.open_trained(str(folder))
    runs.read_data_position(str(folder))
    text = _verify_trained(str(folder), arrays, record, step)
    if names is None:
        return f"{text}; {_NO_CHECKSUMS}, and the optimizer's state was not read"
    return f"{text}; CRC-32Cs of {plural(len(names), 'file')}"


def _verify_base(path: str) -> str:
    base = _check_model(path)
    # The checks of `_weight_checks` read the files of its arrays.
    if base.format == "Hugging Face":
        return "config.json, index of the files, names and shapes of the model"
    return f"{base.format}: {_read_all(base.arrays, str(base))}; {_NO_CHECKSUMS}"


def _check_model(path: str) -> BaseModel:
    """Opens a base; raises InputError if its arrays do not match its dimensions."""
    from pemoe_jax.checkpoints import base_model, models
    from pemoe_jax.core import network
    from pemoe_jax.core import params as params_lib

    base = base_model.open_base(path)
    shapes = network.param_shapes(models.open_model(path).model)
    params_lib.check_matches(params_lib.unflatten(base.arrays), shapes, str(base))
    return base


def _verify_table(path: epath.Path) -> str:
    import numpy as np

    from pemoe_jax.data import sentence_table

    table = sentence_table.SentenceTable(path)
    num_files = table.verify()
    for start in range(0, len(table), _ROWS):
        rows = np.arange(start, min(len(table), start + _ROWS))
        if not np.isfinite(np.stack(table.vectors(rows))).all():
            raise InputError(
                f"{path}: a vector of rows {start} to {rows[-1]} holds NaN or infinity"
            )
    note = f"CRC-32Cs of the index and {plural(num_files, 'file')}" if num_files else _NO_CHECKSUMS
    return f"{plural(len(table), 'input')}: about.json, index, finite vectors; {note}"


def _verify_json(path: epath.Path) -> str:
    from pemoe_jax.data import row_checks, tfrecords
    from pemoe_jax.runtime import file_io

    row_checks.read_object(file_io.to_path(path))
    if path.name.startswith("info.") and (split := path.name.split(".")[1]):
        # A split of a cache of tfrecords. Its rows are counted, not read, so the reader never asks
        # for the vocabulary's size, and a 0 can stand in for it.
        reader = tfrecords.TFRecordReader(Path(path.parent), split, lambda: 0)
        if (actual := sum(file.count() for file in reader.files)) != reader.num_rows:
            raise InputError(
                f"{path.parent}: split {split!r}: expected {plural(reader.num_rows, 'row')} by its"
                f" stats, got {actual:,}"
            )
        return f"the {plural(len(reader.files), 'tfrecord file')} of {split!r} and their rows"
    return f"a JSON object; {_NO_CHECKSUMS}"


def _verify_rows(path: epath.Path) -> str:
    from pemoe_jax.tasks.p3 import arrow, tables

    kinds = {".arrow": arrow.ArrowTable, ".parquet": tables.ParquetTable}
    table = kinds.get(path.suffix, tables.JsonLinesTable)([Path(path)])
    for _ in table.chunks(_ROWS):
        pass
    note = _NO_CHECKSUMS
    if path.suffix == ".parquet":
        note = "the CRC-32s of pages that have one, which few writers add"
    return f"{plural(table.num_rows, 'row')}: structure, types; {note}"


def _verify_tfrecords(path: epath.Path) -> str:
    from pemoe_jax.data import tfrecords

    file = tfrecords.TFRecordFile(str(path))
    num_rows = file.count()
    for start in range(0, num_rows, _ROWS):
        file.read(range(start, min(num_rows, start + _ROWS)))
    return f"{plural(num_rows, 'row')}: lengths, the CRC-32C of each row; not what the rows hold"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def run(args: argparse.Namespace, bindings: Sequence[str]) -> None:
        gin_flags.check_no_bindings(bindings)
        verify(args.path)

    return gin_flags.run_command(flags(), run, argv)
