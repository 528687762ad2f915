"""Datasets on disk as Hugging Face's `datasets` writes them: Arrow streams, read by index.

pyarrow alone reads both forms: that of `save_to_disk`, and the cache of `load_dataset`,
`<dataset>/<config>/<version>/<hash>/<dataset>-<split>.arrow` (`<owner>___<dataset>` for a dataset
of the hub). Files are memory-mapped.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from pemoe_jax.core.errors import InputError, first_line
from pemoe_jax.runtime.file_io import read_json
from pemoe_jax.tasks.p3.tables import Example, Splits, Table

if TYPE_CHECKING:
    import pyarrow

_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[\w.]+)-\d{5}-of-(?P<count>\d{5})\.arrow")
_WHOLE = re.compile(r"(?P<name>.+)-(?P<split>[\w.]+)\.arrow")
_DEFAULT_CONFIGS = ("default", "plain_text")  # of datasets that have only one


def saved_splits(folder: pathlib.Path) -> Splits:
    """Lists the files of a folder of `save_to_disk`; empty if it is not one.

    Raises:
      InputError: its JSON is not what `datasets` writes.
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
    """Returns the split and the files of a saved Dataset; without a name the split is train."""
    path = folder / "state.json"
    state = read_json(path)
    try:
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(f"{path}: expected a list '_data_files' of 'filename'") from None
    if state.get("_indices_data_files"):
        raise InputError(
            f"{path}: rows are selected by '_indices_data_files', which is not supported: save the"
            " dataset again after flatten_indices()"
        )
    return str(state.get("_split") or "train"), files


def cached_splits(root: pathlib.Path, dataset: str, subset: str) -> Splits:
    """Lists a dataset's files in the cache of `load_dataset`; empty if the cache has none.

    Of several versions or downloads the newest is used.

    Raises:
      InputError: files of a split are missing.
    """
    for home in [root / dataset, *sorted(root.glob(f"*___{dataset}"))]:
        for config in (subset,) if subset else (*_DEFAULT_CONFIGS, dataset):
            # `datasets` renames a folder when its download is complete
            infos = [
                path
                for path in (home / config).glob("*/*/dataset_info.json")
                if not path.parent.name.endswith((".incomplete", "_tmp"))
            ]
            # the folders are named by hashes, so only their times show which is newest
            if infos:
                newest = max(infos, key=lambda path: (path.stat().st_mtime_ns, str(path)))
                return _files_in(newest.parent)
    return {}


def _files_in(folder: pathlib.Path) -> Splits:
    splits: Splits = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.arrow")):
        match = _SHARD.fullmatch(path.name) or _WHOLE.fullmatch(path.name)
        # `Dataset.map` writes cache-<hash>.arrow into the same folder
        if match is None or match["name"] == "cache":
            continue
        splits.setdefault(match["split"], []).append(path)
        counts[match["split"]] = int(match.groupdict().get("count") or 1)
    for split, files in splits.items():
        if len(files) != counts[split]:
            raise InputError(
                f"{folder}: expected {counts[split]} Arrow files of split {split!r}, got"
                f" {len(files)}"
            )
    return splits


class ArrowTable(Table):
    """Arrow files, one after the other."""

    @functools.cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        return [batch for path in self._paths for batch in _read_batches(path)]

    def part_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._batches]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        try:
            return cast(list[Example], self._batches[part].take(numbers).to_pylist())
        except (OSError, ValueError, IndexError) as error:
            raise InputError(f"{self.location}: damaged: {first_line(error)}") from None


def _read_batches(path: pathlib.Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            for batch in pyarrow.ipc.open_stream(file):
                # pyarrow trusts offsets: reading a damaged batch would crash the process
                batch.validate(full=True)
                yield batch
    except (OSError, ValueError) as error:  # base classes of pyarrow's errors
        raise InputError(f"{path}: not a whole Arrow stream: {first_line(error)}") from None
