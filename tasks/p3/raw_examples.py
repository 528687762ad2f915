"""Finds the examples of P3's datasets, which templates turn into prompts.

Searched are the folders `raw/`, `huggingface/` and `tfds/` of P3_DIR, which may be links, and the
folder of templates.yaml, each for

- `<dataset>[/<subset>]/<split>*.parquet` or `<split>.jsonl`;
- `<dataset>[/<subset>]/` as `datasets.save_to_disk` writes it;
- the cache of `datasets.load_dataset` (~/.cache/huggingface/datasets);
- a data_dir of tensorflow-datasets (~/tensorflow_datasets) with the prepared dataset.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

from pemoe_jax.tasks.p3 import arrow, tfds
from pemoe_jax.tasks.p3.tables import Table, find_splits, open_table

FOLDERS = ("raw", "huggingface", "tfds")


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """A dataset's examples.

    Attributes:
      folder: where they are.
      splits: split, by the dataset's own names -> its files.
      builder: the builder of tensorflow-datasets that wrote the files; None in other forms.
    """

    folder: pathlib.Path
    splits: Mapping[str, Sequence[pathlib.Path]]
    builder: tfds.Builder | None = None
    # Tables are shared by all templates of a dataset, because each indexes its files.
    _tables: dict[str, Table] = dataclasses.field(default_factory=dict)

    def describe_missing(self, fields: Collection[str]) -> str:
        """Returns the fields that no split has, each with the nearest that there is; '' if none."""
        names = set().union(*(self.table(split).field_names() for split in self.splits))
        by_words = {" ".join(sorted(re.split("[-_]", name))): name for name in sorted(names)}
        missing = sorted(set(fields) - {name.replace("-", "_") for name in names})
        described = []
        for field in missing if names else ():
            # words are sorted, so that label_coarse is near to coarse_label
            words = " ".join(sorted(field.split("_")))
            (nearest,) = difflib.get_close_matches(words, by_words, n=1, cutoff=0)
            described.append(f"{field!r} (nearest: {by_words[nearest]!r})")
        return ", ".join(described)

    def table(self, split: str) -> Table:
        """Returns the examples of a split, one object for all templates."""
        if split not in self._tables:
            paths = self.splits[split]
            if self.builder is not None:
                self._tables[split] = tfds.TfdsTable(paths, self.builder)
            elif paths[0].suffix == ".arrow":
                self._tables[split] = arrow.ArrowTable(paths)
            else:
                self._tables[split] = open_table(paths)
        return self._tables[split]


def find_dataset(
    p3_dir: pathlib.Path, dataset: str, subset: str, templates_dir: pathlib.Path
) -> RawDataset | None:
    """Finds the examples of a dataset, in the first form that exists.

    Raises:
      InputError: a form exists but is incomplete.
    """
    builder = tfds.builders().get((dataset, subset))
    roots = [root for name in FOLDERS if (root := p3_dir / name).is_dir()]
    # A user's own files come before what other libraries left in their caches.
    for folder in [*(root / dataset / subset for root in roots), templates_dir]:
        splits = find_splits(folder) or arrow.saved_splits(folder)
        if splits:
            return RawDataset(folder, splits)
    for root in roots:
        splits = arrow.cached_splits(root, dataset, subset)
        if splits:
            return RawDataset(root, splits)
        splits = tfds.prepared_splits(root, builder) if builder else {}
        if splits:
            return RawDataset(root, splits, builder)
    return None


def expected_files(p3_dir: pathlib.Path, dataset: str, subset: str) -> str:
    """Returns the end of a message: what a dataset's examples are expected to be."""
    name = "/".join(filter(None, (dataset, subset)))
    builder = tfds.builders().get((dataset, subset))
    expected = f"expected {p3_dir / 'raw' / name}/<split>.jsonl or *.parquet, the dataset as"
    if builder is None:
        return f"{expected} `datasets` writes it"
    return f"{expected} `datasets` writes it, or `{builder.command} --data_dir={p3_dir / 'tfds'}`"
