"""Reads datasets that Hugging Face's `datasets` wrote to disk: Arrow streams, read by row number.

There are two layouts: the folder of `save_to_disk`, and the cache of `load_dataset`,
`<dataset>/<config>/<version>/<hash>/<dataset>-<split>.arrow` (in a folder `<owner>___<dataset>` if
the dataset has an owner on the Hub). pyarrow memory-maps the files; `datasets` is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import read_json
from pemoe_jax.tasks.p3.tables import (
    Example,
    Splits,
    Table,
    arrow_errors,
    check_unique,
    take_examples,
)

if TYPE_CHECKING:
    import pyarrow

_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[\w.]+)-\d{5}-of-(?P<count>\d{5})\.arrow")
_WHOLE = re.compile(r"(?P<name>.+)-(?P<split>[\w.]+)\.arrow")
_DEFAULT_CONFIGS = ("default", "plain_text")  # names of a dataset's only config


def saved_splits(folder: pathlib.Path) -> Splits:
    """Returns the splits in a folder that `save_to_disk` wrote; empty for any other folder.

    Raises:
      InputError: the folder's JSON is malformed, or it selects rows by a file of indices.
    """
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list):
            raise InputError(f"{folder / 'dataset_dict.json'}: expected a list 'splits'")
        return {str(name): _saved_files(folder / str(name))[1] for name in names}
    if (folder / "state.json").is_file():
        split, files = _saved_files(folder)
        return {split: files}
    return {}


def _saved_files(folder: pathlib.Path) -> tuple[str, list[pathlib.Path]]:
    """Returns the split of a saved `Dataset` ('train' if its split has no name) and its files."""
    path = folder / "state.json"
    state = read_json(path)
    try:
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(f"{path}: expected a list '_data_files', each with a 'filename'") from None
    if state.get("_indices_data_files"):
        raise InputError(
            f"{path}: rows are selected by '_indices_data_files', which is not supported: save the"
            " dataset again after flatten_indices()"
        )
    return str(state.get("_split") or "train"), files


def cached_splits(root: pathlib.Path, dataset: str, subset: str) -> Splits:
    """Returns a dataset's splits in the cache of `load_dataset`; empty if the cache has none.

    If the cache has several versions or downloads of the config, the one written last is used.

    Args:
      root: the cache.
      dataset: name of the dataset, without its owner.
      subset: name of the config; '' for a dataset that has only one (its name is then 'default',
        'plain_text' or the dataset's).

    Raises:
      InputError: files of a split are missing.
    """
    for dataset_folder in [root / dataset, *sorted(root.glob(f"*___{dataset}"))]:
        for config in (subset,) if subset else (*_DEFAULT_CONFIGS, dataset):
            # `datasets` renames a folder when its download is complete.
            infos = [
                path
                for path in (dataset_folder / config).glob("*/*/dataset_info.json")
                if not path.parent.name.endswith((".incomplete", "_tmp"))
            ]
            if infos:
                # Hashes have no order, so the time of this file shows which was written last.
                last = max(infos, key=lambda path: (path.stat().st_mtime_ns, str(path)))
                return _list_splits(last.parent)
    return {}


def _list_splits(folder: pathlib.Path) -> Splits:
    """Returns the splits of one download; InputError if files of a split are missing."""
    splits: Splits = {}
    expected_counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.arrow")):
        match = _SHARD.fullmatch(path.name) or _WHOLE.fullmatch(path.name)
        # `Dataset.map` writes cache-<hash>.arrow into the same folder.
        if match is None or match["name"] == "cache":
            continue
        splits.setdefault(match["split"], []).append(path)
        expected_counts[match["split"]] = int(match.groupdict().get("count") or 1)
    for split, files in splits.items():
        if len(files) != expected_counts[split]:
            raise InputError(
                f"{folder}: expected {expected_counts[split]} Arrow files of split {split!r}, got"
                f" {len(files)}"
            )
    return splits


class ArrowTable(Table):
    """A split's Arrow files, one after the other; each record batch is a part."""

    @functools.cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        return [batch for path in self._paths for batch in _read_batches(path)]

    def field_names(self) -> set[str]:
        with _open_stream(self._paths[0]) as stream:
            return {*stream.schema.names}

    def part_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._batches]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        import pyarrow

        table = pyarrow.Table.from_batches([self._batches[part]])
        with arrow_errors(f"{self.location}: damaged"):
            return take_examples(table, numbers, self.location)


def _read_batches(path: pathlib.Path) -> Iterator[pyarrow.RecordBatch]:
    with _open_stream(path) as stream:
        check_unique(stream.schema.names, str(path))
        for batch in stream:
            # pyarrow trusts a batch's offsets: reading a damaged one would crash the process.
            batch.validate(full=True)
            yield batch


@contextlib.contextmanager
def _open_stream(path: pathlib.Path) -> Iterator[pyarrow.RecordBatchReader]:
    import pyarrow

    message = f"{path}: not an intact Arrow stream"
    with arrow_errors(message), pyarrow.memory_map(str(path)) as file:
        yield pyarrow.ipc.open_stream(file)
