"""Where the examples of P3's data sets lie, for templates, and in which form.

Looked for in the folders `raw/`, `huggingface/` and `tfds/` of P3_DIR, which may be links, and
beside templates.yaml; in each of them for

- `<dataset>[/<subset>]/<split>*.parquet` or `<split>.jsonl`;
- `<dataset>[/<subset>]/` as `datasets.save_to_disk` writes it;
- the cache of `datasets.load_dataset` (~/.cache/huggingface/datasets);
- a data_dir of tensorflow-datasets (~/tensorflow_datasets), with the data set prepared.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence

from pemoe_jax.tasks.p3 import arrow, tfds
from pemoe_jax.tasks.p3.row_files import Table, open_table, table_splits

FOLDERS = ("raw", "huggingface", "tfds")


@dataclasses.dataclass(frozen=True)
class Raw:
    """A data set's examples."""

    folder: pathlib.Path
    splits: Mapping[str, Sequence[pathlib.Path]]  # by the data set's own names
    builder: tfds.Builder | None = None  # of tensorflow-datasets, where its files they are
    _tables: dict[str, Table] = dataclasses.field(default_factory=dict)

    def lacks(self, fields: Collection[str]) -> list[str]:
        """Fields that a builder's examples do not have; of other forms it is not known."""
        if self.builder is None:
            return []
        folder = next(iter(self.splits.values()))[0].parent
        there = {name.replace("-", "_") for name in tfds.columns(folder, self.builder)}
        return sorted(set(fields) - there)

    def table(self, split: str) -> Table:
        """The examples of a split, one object for all templates."""
        if split not in self._tables:
            self._tables[split] = self._open(self.splits[split])
        return self._tables[split]

    def _open(self, paths: Sequence[pathlib.Path]) -> Table:
        if self.builder is not None:
            return tfds.PreparedTable(paths, self.builder)
        if paths[0].suffix == ".arrow":
            return arrow.ArrowTable(paths)
        return open_table(paths)


def find(p3_dir: pathlib.Path, dataset: str, subset: str, beside: pathlib.Path) -> Raw | None:
    """The examples of a data set, of the first form that is there.

    Raises:
      InputError: they are there, but not whole.
    """
    builder = tfds.builders().get((dataset, subset))
    roots = [root for name in FOLDERS if (root := p3_dir / name).is_dir()]
    for folder in [*(root / dataset / subset for root in roots), beside]:
        splits = table_splits(folder) or arrow.saved_splits(folder)
        if splits:
            return Raw(folder, splits)
    for root in roots:
        splits = arrow.cached_splits(root, dataset, subset)
        if splits:
            return Raw(root, splits)
        splits = tfds.prepared_splits(root, builder) if builder else {}
        if splits:
            return Raw(root, splits, builder)
    return None


def how_to_get(p3_dir: pathlib.Path, dataset: str, subset: str) -> str:
    """What to do where a data set's examples are not there."""
    name = "/".join(filter(None, (dataset, subset)))
    builder = tfds.builders().get((dataset, subset))
    expected = f"expected {p3_dir / 'raw' / name}/<split>.jsonl or *.parquet, or what `datasets`"
    if builder is None:
        return f"{expected} leaves on disk"
    return f"{expected} leaves, or `{builder.command} --data_dir={p3_dir / 'tfds'}`"
