"""Finds the examples of P3's datasets, which templates turn into prompts.

The examples may be in P3_DIR's folders `raw/`, `huggingface/` and `tfds/`. Each of these may be a
link, and may hold

- `<dataset>[/<subset>]/<split>*.parquet` or `<split>.jsonl`;
- `<dataset>[/<subset>]/` as `datasets.save_to_disk` writes it;
- the cache of `datasets.load_dataset` (~/.cache/huggingface/datasets);
- a data_dir of tensorflow-datasets (~/tensorflow_datasets) with the prepared dataset.

Files of the first two kinds may also be beside the dataset's templates.yaml.
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
      folder: the folder that holds the files, or the cache, for messages.
      splits: the dataset's own name of a split -> its files.
      builder: the builder of tensorflow-datasets that wrote the files; None for other files.
    """

    folder: pathlib.Path
    splits: Mapping[str, Sequence[pathlib.Path]]
    builder: tfds.Builder | None = None
    # All templates of a dataset share its tables, because opening a table indexes its files.
    _tables: dict[str, Table] = dataclasses.field(default_factory=dict)

    def describe_missing(self, fields: Collection[str]) -> str:
        """Describes the fields that no split has, each with the most similar existing one.

        Returns '' if all fields exist, or if the splits show no fields at all, as empty files do.
        """
        names = set().union(*(self.table(split).field_names() for split in self.splits))
        by_words = {" ".join(sorted(re.split("[-_]", name))): name for name in sorted(names)}
        missing = sorted(set(fields) - {name.replace("-", "_") for name in names})
        described = []
        for field in missing if names else ():
            # Words are sorted, so that label_coarse is similar to coarse_label.
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
    """Finds the examples of a dataset in the first form that exists; None if there is none.

    Args:
      p3_dir: the folder P3_DIR.
      dataset: name of the dataset.
      subset: name of its subset, '' without one.
      templates_dir: folder of the dataset's templates.yaml.

    Raises:
      InputError: a form exists but is incomplete.
    """
    builder = tfds.builders().get((dataset, subset))
    roots = [root for name in FOLDERS if (root := p3_dir / name).is_dir()]
    # A user's own files come first, before the caches of other libraries.
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
    """Returns 'expected …', the end of an error: the files that would hold a dataset's examples."""
    name = "/".join(filter(None, (dataset, subset)))
    builder = tfds.builders().get((dataset, subset))
    expected = f"expected {p3_dir / 'raw' / name}/<split>.jsonl or *.parquet, the dataset as"
    if builder is None:
        return f"{expected} `datasets` writes it"
    return f"{expected} `datasets` writes it, or `{builder.command} --data_dir={p3_dir / 'tfds'}`"
