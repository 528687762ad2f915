"""Data sets as tensorflow-datasets has prepared them, read by the row; nothing is ever downloaded.

`tfds.csv` says which builder has the examples of which of P3's data sets, for those of which
that was seen in the builders' sources, and how its fields and splits are called there:

    fields   premise=context        the field `premise` is the builder's `context`
             join(title,description) several, joined by a space
             name(label)             a class by its name, '' where there is none (-1)
             text(label)             a number as text, '' for -1
    splits   train=train_xl          and r1/train of a config

Prepared data lies in `<builder>[/<config>]/<version>/`, with its features in `features.json`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pemoe_jax.core.errors import InputError
from pemoe_jax.data.tfrecords import TFRecordFile
from pemoe_jax.runtime.file_io import read_json
from pemoe_jax.tasks.p3.row_files import Example, take_by_part

_FIELD = re.compile(r"(?P<made>\w+)=(?:(?P<how>join|name|text)\()?(?P<of>[\w,]+)\)?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of Hugging Face's data set that the builder has in another form."""

    made: str
    how: str  # join, name, text or ''
    of: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Builder:
    """A builder of tensorflow-datasets and what it calls otherwise."""

    name: str  # with its config, where splits do not name it
    fields: tuple[Field, ...]
    splits: Mapping[str, str]  # empty: the same

    @property
    def command(self) -> str:
        """What prepares it."""
        configs = {path.rpartition("/")[0] for path in self.splits.values()} - {""}
        names = [f"{self.name}/{config}" for config in sorted(configs)] or [self.name]
        return f"tfds build {' '.join(names)}"


@functools.cache
def builders() -> dict[tuple[str, str], Builder]:
    """(data set, subset or '') -> the builder that has its examples."""
    found = {}
    with pathlib.Path(__file__).with_name("tfds.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            fields = [_FIELD.fullmatch(field) for field in filter(None, row["fields"].split(";"))]
            pairs = (pair.split("=") for pair in filter(None, row["splits"].split(";")))
            found[row["dataset"], row["subset"]] = Builder(
                row["builder"],
                tuple(
                    Field(match["made"], match["how"] or "", tuple(match["of"].split(",")))
                    for match in fields
                    if match
                ),
                {ours: theirs for ours, theirs in pairs},
            )
    return found


def prepared_splits(root: pathlib.Path, builder: Builder) -> dict[str, list[pathlib.Path]]:
    """Split -> its tfrecords, of the newest prepared version under a data_dir; else empty.

    Raises:
      InputError: it is written in another format, or files are missing.
    """
    if builder.splits:
        found = {}
        for ours, theirs in builder.splits.items():
            config, _, split = theirs.rpartition("/")
            files = _files_in(root / builder.name / config)
            if split in files:
                found[ours] = files[split]
        return found
    return _files_in(root / builder.name)


def _files_in(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Split -> its files, of a builder or config's folder."""
    versions = [
        path.parent
        for path in folder.glob("*/dataset_info.json")
        if _VERSION.fullmatch(path.parent.name)
    ]
    if not versions:
        return {}
    newest = max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    path = newest / "dataset_info.json"
    info = read_json(path)
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise InputError(
            f"{path}: written as {info['fileFormat']}, expected tfrecord: run tfds build with"
            " --file_format=tfrecord"
        )
    found = {}
    for split in info.get("splits", []):
        count = len(split.get("shardLengths", []))
        files = [
            newest / f"{info['name']}-{split['name']}.tfrecord-{shard:05d}-of-{count:05d}"
            for shard in range(count)
        ]
        lacking = [file for file in files if not file.is_file()]
        if lacking:
            raise InputError(f"{lacking[0]}: no such file, expected {count} by dataset_info.json")
        if files:
            found[split["name"]] = files
    return found


def columns(folder: pathlib.Path, builder: Builder) -> set[str]:
    """The fields of a version's examples, with those that are made of others.

    Raises:
      InputError: the version does not say (prepared before tensorflow-datasets 4).
    """
    path = folder / "features.json"
    features = read_json(path).get("featuresDict", {}).get("features")
    if not isinstance(features, dict):
        raise InputError(f"{path}: expected the features of a data set; run tfds build again")
    return {*features, *(field.made for field in builder.fields)}


class PreparedTable:
    """A split's tfrecords, one after the other."""

    def __init__(self, paths: Sequence[pathlib.Path], builder: Builder) -> None:
        self.location = str(paths[0])
        self._paths, self._builder = paths, builder

    @functools.cached_property
    def _features(self) -> Any:
        from pemoe_jax.data import seqio_import

        seqio_import.import_seqio()  # hides GPUs from TensorFlow
        import tensorflow_datasets as tfds

        return tfds.features.FeatureConnector.from_config(str(self._paths[0].parent))

    @functools.cached_property
    def _files(self) -> list[TFRecordFile]:
        return [TFRecordFile(str(path)) for path in self._paths]

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(file.count() for file in self._files)])

    @property
    def num_rows(self) -> int:
        """See Table."""
        return int(self._firsts[-1])

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """See Table."""
        return take_by_part(self._firsts, numbers, self._take_of)

    def _take_of(self, shard: int, inside: list[int]) -> Sequence[Example]:
        path = self._paths[shard]
        return [self._example(record, path) for record in self._files[shard].read(inside)]

    def _example(self, record: bytes, path: pathlib.Path) -> Example:
        try:
            example = _plain(self._features.deserialize_example_np(record))
        except Exception as error:  # protobuf's kinds, and tensorflow-datasets' own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path}: not an example by features.json: {reason}") from None
        made = {field.made: self._made(field, example) for field in self._builder.fields}
        return {**example, **made}

    def _made(self, field: Field, example: Example) -> Any:
        values = [example[name] for name in field.of]
        if field.how == "join":
            return " ".join(values)
        if field.how == "name":
            return self._features[field.of[0]].int2str(values[0]) if values[0] >= 0 else ""
        if field.how == "text":
            return str(values[0]) if values[0] >= 0 else ""
        return values[0]


def _plain(value: Any) -> Any:
    """Arrays, scalars and bytes of tensorflow-datasets -> lists, numbers and text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic | np.ndarray) else value
