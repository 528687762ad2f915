"""Reads datasets that tensorflow-datasets has prepared, by index; nothing is ever downloaded.

`tfds.csv` maps datasets of P3 to the builders that have their examples. Where a builder has other
fields or splits than the dataset on the Hugging Face hub, the table says how to derive them (taken
from the builders' source code):

    fields   premise=context            the field `premise` is the builder's `context`
             text=join(title,body)      the builder's fields `title` and `body`, joined by a space
             answer=name(label)         the name of the class in `label`, '' for -1
             label=text(label)          the number in `label` as text, '' for -1
    splits   train=train_xl             the split `train` is the builder's `train_xl`
             train_r1=r1/train          the split `train` of the builder's config `r1`

Prepared data is in `<builder>[/<config>]/<version>/`, with its features in `features.json`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pemoe_jax.core.errors import InputError, first_line, plural
from pemoe_jax.data.tfrecords import TFRecordFile
from pemoe_jax.runtime.file_io import read_json
from pemoe_jax.tasks.p3.tables import Example, Splits, Table

if TYPE_CHECKING:
    import tensorflow_datasets

_FIELD = re.compile(r"(?P<name>\w+)=(?:(?P<transform>join|name|text)\()?(?P<sources>[\w,]+)\)?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the dataset on the Hugging Face hub, derived from fields of the builder."""

    name: str
    transform: str  # join, name, text or ''
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Builder:
    """A builder of tensorflow-datasets.

    Attributes:
      name: the builder's name, with its config unless `splits` has the configs.
      fields: the derived fields.
      splits: split on the hub -> [<config>/]<split of the builder>; empty if the names are equal.
    """

    name: str
    fields: tuple[Field, ...]
    splits: Mapping[str, str]

    @property
    def command(self) -> str:
        """The command of tensorflow-datasets that prepares the dataset."""
        configs = {path.rpartition("/")[0] for path in self.splits.values()} - {""}
        names = [f"{self.name}/{config}" for config in sorted(configs)] or [self.name]
        return f"tfds build {' '.join(names)}"


@functools.cache
def builders() -> dict[tuple[str, str], Builder]:
    """Returns the builder of each (dataset, subset or '') that has one."""
    builders = {}
    with pathlib.Path(__file__).with_name("tfds.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            matches = map(_FIELD.fullmatch, filter(None, row["fields"].split(";")))
            fields = tuple(
                Field(match["name"], match["transform"] or "", tuple(match["sources"].split(",")))
                for match in matches
                if match
            )
            pairs = (pair.split("=") for pair in filter(None, row["splits"].split(";")))
            splits = {split: builder_split for split, builder_split in pairs}
            builders[row["dataset"], row["subset"]] = Builder(row["builder"], fields, splits)
    return builders


def prepared_splits(root: pathlib.Path, builder: Builder) -> Splits:
    """Lists the tfrecords of a builder's newest version; empty if it has not been prepared.

    Args:
      root: the data_dir of tensorflow-datasets.
      builder: the builder.

    Raises:
      InputError: the newest version is not in tfrecords, or files are missing.
    """
    if not builder.splits:
        return _list_splits(root / builder.name)
    splits = {}
    for split, builder_split in builder.splits.items():
        config, _, name = builder_split.rpartition("/")
        files = _list_splits(root / builder.name / config)
        if name in files:
            splits[split] = files[name]
    return splits


def _list_splits(folder: pathlib.Path) -> Splits:
    """Lists the tfrecords of the newest version in a folder `<builder>[/<config>]`."""
    versions = [
        path.parent
        for path in folder.glob("*/dataset_info.json")
        if _VERSION.fullmatch(path.parent.name)
    ]
    if not versions:
        return {}
    # Versions are compared as numbers: 1.0.10 is newer than 1.0.2.
    newest = max(versions, key=lambda path: tuple(map(int, path.name.split("."))))
    path = newest / "dataset_info.json"
    info = read_json(path)
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise InputError(
            f"{path}: expected the format tfrecord, got {info['fileFormat']}: run tfds build with"
            " --file_format=tfrecord"
        )
    splits = {}
    for split in info.get("splits", []):
        count = len(split.get("shardLengths", []))
        files = [
            newest / f"{info['name']}-{split['name']}.tfrecord-{shard:05d}-of-{count:05d}"
            for shard in range(count)
        ]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"{file}: no such file, but dataset_info.json lists"
                    f" {plural(count, 'shard')} of the split"
                )
        if files:
            splits[split["name"]] = files
    return splits


class TfdsTable(Table):
    """A split's tfrecords, one after the other."""

    def __init__(self, paths: Sequence[pathlib.Path], builder: Builder) -> None:
        super().__init__(paths)
        self._builder = builder

    @functools.cached_property
    def _features(self) -> tensorflow_datasets.features.FeatureConnector:
        from pemoe_jax.data import seqio_import

        seqio_import.import_seqio()  # hides GPUs from TensorFlow
        import tensorflow_datasets as tfds

        return tfds.features.FeatureConnector.from_config(str(self._paths[0].parent))

    @functools.cached_property
    def _files(self) -> list[TFRecordFile]:
        return [TFRecordFile(str(path)) for path in self._paths]

    def field_names(self) -> set[str]:
        path = self._paths[0].parent / "features.json"
        features = read_json(path).get("featuresDict", {}).get("features")
        if not isinstance(features, dict):  # prepared before tensorflow-datasets 4
            raise InputError(f"{path}: expected the features of a dataset; run tfds build again")
        return {*features, *(field.name for field in self._builder.fields)}

    def part_sizes(self) -> list[int]:
        return [file.count() for file in self._files]

    def read_part(self, part: int, numbers: list[int]) -> list[Example]:
        path = self._paths[part]
        return [self._example(record, path) for record in self._files[part].read(numbers)]

    def _example(self, record: bytes, path: pathlib.Path) -> Example:
        try:
            example = {
                key: _to_python(value)
                for key, value in self._features.deserialize_example_np(record).items()
            }
        except Exception as error:  # protobuf and tensorflow-datasets each raise their own types
            raise InputError(
                f"{path}: not an example of the features in features.json: {first_line(error)}"
            ) from None
        # The builder's own fields stay, under their own names.
        derived = {field.name: self._derive(field, example) for field in self._builder.fields}
        return {**example, **derived}

    def _derive(self, field: Field, example: Example) -> object:
        # The label -1 means that there is none, as in test splits whose answers are not public.
        values = [example[name] for name in field.sources]
        if field.transform == "join":
            return " ".join(values)
        if field.transform == "name":
            return self._features[field.sources[0]].int2str(values[0]) if values[0] >= 0 else ""
        if field.transform == "text":
            return str(values[0]) if values[0] >= 0 else ""
        return values[0]


def _to_python(value: object) -> object:
    """Turns arrays, scalars and bytes of tensorflow-datasets into lists, numbers and text."""
    if isinstance(value, dict):
        return {key: _to_python(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_to_python(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic | np.ndarray) else value
