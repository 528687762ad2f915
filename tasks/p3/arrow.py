"""Data sets as Hugging Face's `datasets` leaves them on disk: Arrow streams, read by the row.

Two forms, read with pyarrow alone: what `save_to_disk` writes, and what `load_dataset` leaves in
its cache, `<dataset>/<config>/<version>/<hash>/<dataset>-<split>.arrow` (`<owner>___<dataset>` of a
data set on the hub). Files are mapped into memory, not read into it.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.runtime.file_io import read_json
from pemoe_jax.tasks.p3.row_files import Example, take_by_part

_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[\w.]+)-\d{5}-of-(?P<count>\d{5})\.arrow")
_WHOLE = re.compile(r"(?P<name>.+)-(?P<split>[\w.]+)\.arrow")
_DEFAULTS = ("default", "plain_text")  # names of configs where a data set has one only
Splits = dict[str, list[pathlib.Path]]


def saved_splits(folder: pathlib.Path) -> Splits:
    """Split -> its files, of a folder that `save_to_disk` wrote; empty where it is none.

    Raises:
      InputError: its JSON is not what it writes.
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
    """A saved Dataset's split (train, where it does not say) and files."""
    path = folder / "state.json"
    state = read_json(path)
    try:
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(f"{path}: expected a list '_data_files' of 'filename'") from None
    if state.get("_indices_data_files"):
        raise InputError(
            f"{path}: rows are chosen by '_indices_data_files', which are not read: save it anew"
            " after flatten_indices()"
        )
    return str(state.get("_split") or "train"), files


def cached_splits(root: pathlib.Path, dataset: str, subset: str) -> Splits:
    """Split -> its files, in the cache of `load_dataset`; empty where the data set is not there.

    Of several versions or downloads the newest.

    Raises:
      InputError: a split lacks files.
    """
    for home in [root / dataset, *sorted(root.glob(f"*___{dataset}"))]:
        for config in (subset,) if subset else (*_DEFAULTS, dataset):
            infos = [
                path for path in (home / config).glob("*/*/dataset_info.json") if _is_whole(path)
            ]
            if infos:
                newest = max(infos, key=lambda path: (path.stat().st_mtime_ns, str(path)))
                return _files_in(newest.parent)
    return {}


def _is_whole(info: pathlib.Path) -> bool:
    return not info.parent.name.endswith((".incomplete", "_tmp"))


def _files_in(folder: pathlib.Path) -> Splits:
    found: Splits = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.arrow")):
        match = _SHARD.fullmatch(path.name) or _WHOLE.fullmatch(path.name)
        if match is None or match["name"] == "cache":  # of what `map` has made of it
            continue
        found.setdefault(match["split"], []).append(path)
        counts[match["split"]] = int(match.groupdict().get("count") or 1)
    for split, files in found.items():
        if len(files) != counts[split]:
            raise InputError(
                f"{folder}: {len(files)} Arrow files of split {split!r}, expected {counts[split]}"
            )
    return found


class ArrowTable:
    """Arrow files, one after the other."""

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.location = str(paths[0])
        self._paths = paths

    @functools.cached_property
    def _batches(self) -> list[Any]:
        return [batch for path in self._paths for batch in _batches_of(path)]

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @property
    def num_rows(self) -> int:
        """See Table."""
        return int(self._firsts[-1])

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """See Table."""
        return take_by_part(self._firsts, numbers, self._take_of)

    def _take_of(self, batch: int, inside: list[int]) -> Sequence[Example]:
        try:
            return self._batches[batch].take(inside).to_pylist()
        except (OSError, ValueError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self.location}: damaged: {reason}") from None


def _batches_of(path: pathlib.Path) -> Iterator[Any]:
    """The record batches of a file, mapped; offsets in them are checked, or they could crash."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            for batch in pyarrow.ipc.open_stream(file):
                batch.validate(full=True)
                yield batch
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a whole Arrow stream: {reason}") from None
