"""What a folder P3_DIR holds: for each published task one of three forms, found by looking.

(a) `<task>/<split>.tfrecord-*` with `info.<split>.json` and `COMPLETED`: the published seqio cache;
(b) `<task>/<split>*.parquet`, `<task>/<split>/*.parquet` or `<task>/<split>.jsonl`: prompted rows;
(c) `<dataset>[/<subset>]/templates.yaml`, in the folder or in its `templates/`, and the data set's
    examples beside it or in `raw/`, `huggingface/` or `tfds/`, in a form that `p3_raw` describes.

Tasks may lie in `data/` too, as in a clone of the hub's repository. A folder may hold several
forms; of a task the first is read. A twin that is not there is made of its task's answer choices.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping

from pemoe_jax.core.errors import InputError
from pemoe_jax.data.rows import Encode, RowReader
from pemoe_jax.data.tfrecords import TFRecordReader
from pemoe_jax.tasks.p3 import published, raw_examples, templates
from pemoe_jax.tasks.p3.from_templates import OnTheFly
from pemoe_jax.tasks.p3.published import SCORE_EVAL
from pemoe_jax.tasks.p3.row_files import Prompted, open_table, table_splits
from pemoe_jax.tasks.p3.rows import ChoiceReader

CACHE, PROMPTED, TEMPLATES, MADE = "tfrecord cache", "rows", "templates", "made of its task"


@dataclasses.dataclass(frozen=True)
class Found:
    """A task in the folder."""

    form: str
    splits: Mapping[str, list[pathlib.Path]]  # split -> its files
    folder: pathlib.Path
    template: templates.Template | None = None
    raw: raw_examples.Raw | None = None  # the data set that the template is for


def cached_splits(folder: pathlib.Path) -> list[str]:
    """The splits of a task's tfrecord cache."""
    names = sorted(path.name for path in folder.glob("info.*.json"))
    return [name.removeprefix("info.").removesuffix(".json") for name in names]


class Folder:
    """A folder P3_DIR.

    Raises:
      InputError: there is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).expanduser().absolute()
        if not self.path.is_dir():
            what = "a file" if self.path.exists() else "nothing there"
            raise InputError(f"P3_DIR {self.path} must be a folder, found {what}")
        self._found: dict[str, Found | None] = {}
        self._readers: dict[tuple[str, str], RowReader] = {}
        self.unreadable: dict[str, str] = {}  # path of a templates.yaml -> what is wrong with it
        self.lacking: dict[str, str] = {}  # task with a template -> why it cannot be made

    @functools.cached_property
    def _homes(self) -> dict[str, pathlib.Path]:
        """Name of each folder that may be a task's -> where it is."""
        homes: dict[str, pathlib.Path] = {}
        for root in (self.path, self.path / "data"):
            if root.is_dir():
                for entry in os.scandir(root):
                    if entry.is_dir():
                        homes.setdefault(entry.name, pathlib.Path(entry.path))
        return homes

    @functools.cached_property
    def _yaml(self) -> dict[tuple[str, str], pathlib.Path]:
        inside = self.path / "templates"
        return {
            **templates.find_templates(self.path),
            **(templates.find_templates(inside) if inside.is_dir() else {}),
        }

    @functools.cache  # noqa: B019  a folder lives as long as the process
    def _templates_of(self, dataset: str, subset: str) -> dict[str, templates.Template]:
        path = self._yaml.get((dataset, subset))
        if path is None:
            return {}
        try:
            return templates.read_templates(path)
        except InputError as error:
            self.unreadable[str(path)] = str(error)
            return {}

    def find(self, name: str) -> Found | None:
        """What there is of a task or twin, None where there is nothing."""
        if name not in self._found:
            self._found[name] = self._look_for(name)
        return self._found[name]

    def _look_for(self, name: str) -> Found | None:
        home = self._homes.get(name)
        if home is not None:
            cached = cached_splits(home)
            if cached or any(home.glob("*.tfrecord-*")):
                return Found(CACHE, {split: [] for split in cached}, home)
            files = table_splits(home)
            if files:
                return Found(PROMPTED, files, home)
        if name.endswith(SCORE_EVAL):
            task = self.find(name.removesuffix(SCORE_EVAL))
            if task is None or not published.tasks()[name.removesuffix(SCORE_EVAL)].has_choices:
                return None
            return dataclasses.replace(task, form=MADE)
        return self._templated(published.tasks()[name])

    def _templated(self, task: published.P3Task) -> Found | None:
        template = self._templates_of(task.dataset, task.subset).get(task.template)
        if template is None:
            return None
        try:
            raw = self._raw_of(task.dataset, task.subset)
            missing = raw.lacks(template.fields) if raw is not None else []
        except (InputError, templates.TemplateError) as error:
            self.lacking[task.name] = str(error)
            return None
        if raw is None:
            how = raw_examples.how_to_get(self.path, task.dataset, task.subset)
            self.lacking[task.name] = f"its template is there, its data set is not: {how}"
            return None
        if missing:
            self.lacking[task.name] = (
                f"its template reads {missing[0]!r}, which the builder"
                f" {raw.builder.name if raw.builder else ''!r} of tensorflow-datasets does not have"
            )
            return None
        splits = {
            split: list(raw.splits[task.raw_split(split)])
            for split in task.splits
            if task.raw_split(split) in raw.splits
        }
        return Found(TEMPLATES, splits, raw.folder, template, raw) if splits else None

    @functools.cache  # noqa: B019  a folder lives as long as the process
    def _raw_of(self, dataset: str, subset: str) -> raw_examples.Raw | None:
        return raw_examples.find(self.path, dataset, subset, self._yaml[dataset, subset].parent)

    def reader(self, name: str, split: str, encode: Encode) -> RowReader:
        """The rows of a split of a task or twin.

        Raises:
          InputError: it is not there, or not whole.
        """
        if (name, split) not in self._readers:
            self._readers[name, split] = self._open(name, split, encode)
        return self._readers[name, split]

    def _open(self, name: str, split: str, encode: Encode) -> RowReader:
        found = self.find(name)
        if found is None:
            bad = self.lacking.get(name.removesuffix(SCORE_EVAL)) or next(
                iter(self.unreadable.values()), ""
            )
            raise InputError(
                f"P3_DIR {self.path} has no task {name!r}"
                + (f"; {bad}" if bad else " (expected tfrecords, Parquet or templates of it)")
            )
        if found.form == CACHE and not (found.folder / "COMPLETED").exists():
            raise InputError(
                f"{found.folder}: no file COMPLETED, so the cache was not written to its end"
            )
        if split not in found.splits:
            raise InputError(
                f"{found.folder}: {name!r} has no split {split!r}"
                f" (it has: {', '.join(sorted(found.splits)) or 'none'})"
            )
        if found.form == CACHE:
            return TFRecordReader(found.folder, split)
        if found.form == MADE:
            return ChoiceReader(self.reader(name.removesuffix(SCORE_EVAL), split, encode), encode)
        if found.template is not None and found.raw is not None:
            task = published.tasks()[name]
            table = found.raw.table(task.raw_split(split))
            return OnTheFly(table, found.template, f"{name} {split}", encode)
        return Prompted(open_table(found.splits[split]), encode, name.endswith(SCORE_EVAL))
