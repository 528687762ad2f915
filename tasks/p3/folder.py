"""A folder P3_DIR, which holds each published task in one of three forms.

(a) `<task>/<split>.tfrecord-*` with `info.<split>.json` and `COMPLETED`: the published seqio cache;
(b) `<task>/<split>*.parquet`, `<task>/<split>/*.parquet` or `<task>/<split>.jsonl`: prompted rows;
(c) `<dataset>[/<subset>]/templates.yaml`, in the folder or in its `templates/`, and the dataset's
    examples, in the places that `raw_examples` lists.

Tasks may also be in the folder's `data/`, as in a clone of the hub's repository. A folder may mix
forms. If it has a task in several forms, the first in this list is read. A task `<task>_score_eval`
without files is derived from the answer choices of `<task>`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection, Mapping

from pemoe_jax.core.errors import InputError
from pemoe_jax.data.row_reader import RowReader, Tokenizer
from pemoe_jax.data.tfrecords import TFRecordReader
from pemoe_jax.tasks import score_eval
from pemoe_jax.tasks.p3 import published, raw_examples, template_files, templates
from pemoe_jax.tasks.p3.readers import ChoiceReader, PromptedReader, TemplateReader
from pemoe_jax.tasks.p3.tables import find_splits, open_table

# The forms of a task, as the summary names them.
CACHE, PROMPTED, TEMPLATES, DERIVED = "tfrecord cache", "rows", "templates", "derived"


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """A task's data in the folder.

    Attributes:
      form: CACHE, PROMPTED, TEMPLATES or DERIVED.
      splits: split -> its files. The lists are empty for a cache, whose info.<split>.json names
        its files.
      folder: where the files are.
      template: the task's template, if its prompts are rendered from one.
      dataset: the examples of the template's dataset.
    """

    form: str
    splits: Mapping[str, list[pathlib.Path]]
    folder: pathlib.Path
    template: templates.Template | None = None
    dataset: raw_examples.RawDataset | None = None


def cached_splits(folder: pathlib.Path) -> list[str]:
    """Lists the splits of a task's tfrecord cache.

    Raises:
      InputError: a split has tfrecords but no info.<split>.json, while another split has one.
    """
    names = sorted(path.name for path in folder.glob("info.*.json"))
    splits = [name.removeprefix("info.").removesuffix(".json") for name in names]
    for path in sorted(folder.glob("*.tfrecord-*")):
        split = path.name.partition(".tfrecord-")[0]
        if splits and split not in splits:
            raise InputError(f"{path}: expected info.{split}.json beside it, got none")
    return splits


class Folder:
    """A folder P3_DIR; its files are listed at the first use.

    Attributes:
      path: the absolute path.
      unreadable: path of each templates.yaml that cannot be read -> the error.
      unavailable: name of each task that has a template but no rows -> why it has none.

    Raises:
      InputError: the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).expanduser().absolute()
        if not self.path.is_dir():
            kind = "a file" if self.path.exists() else "no such folder"
            raise InputError(f"P3_DIR {self.path} must be a folder, got {kind}")
        self.unreadable: dict[str, str] = {}
        self.unavailable: dict[str, str] = {}
        # Results are cached, because mixtures ask for 544 tasks again and again. Each object has
        # its own caches: decorated methods would keep every folder that was ever opened.
        for name in ("_read_templates", "_find_dataset", "find", "reader"):
            setattr(self, name, functools.cache(getattr(self, name)))

    @functools.cached_property
    def _task_folders(self) -> dict[str, pathlib.Path]:
        """Name of each folder that may be a task's -> its path."""
        folders: dict[str, pathlib.Path] = {}
        for root in (self.path, self.path / "data"):
            if root.is_dir():
                for entry in os.scandir(root):
                    # If data/ has a folder of the same name, the one outside of data/ is used.
                    if entry.is_dir():
                        folders.setdefault(entry.name, pathlib.Path(entry.path))
        return folders

    @functools.cached_property
    def _template_files(self) -> dict[tuple[str, str], pathlib.Path]:
        """(dataset, subset or '') -> its templates.yaml."""
        subfolder = self.path / "templates"
        files = template_files.find_templates(self.path)
        return files | (template_files.find_templates(subfolder) if subfolder.is_dir() else {})

    def _read_templates(self, dataset: str, subset: str) -> dict[str, templates.Template]:
        path = self._template_files.get((dataset, subset))
        if path is None:
            return {}
        try:
            return template_files.read_templates(path)
        # Recorded and not raised: the other datasets can still be read.
        except InputError as error:
            self.unreadable[str(path)] = str(error)
            return {}

    def _find_dataset(self, dataset: str, subset: str) -> raw_examples.RawDataset | None:
        templates_dir = self._template_files[dataset, subset].parent
        return raw_examples.find_dataset(self.path, dataset, subset, templates_dir)

    def find(self, name: str) -> TaskFiles | None:
        """Finds a published task or `_score_eval` task; None if the folder does not have it."""
        # Caches come first, because they need neither tokenizing nor rendering.
        folder = self._task_folders.get(name)
        if folder is not None:
            cached = cached_splits(folder)
            if cached or any(folder.glob("*.tfrecord-*")):
                return TaskFiles(CACHE, {split: [] for split in cached}, folder)
            files = find_splits(folder)
            if files:
                return TaskFiles(PROMPTED, files, folder)
        if score_eval.is_score_eval(name):
            task = self.find(score_eval.plain_name(name))
            if task is None or not published.task_of(name).has_choices:
                return None
            return dataclasses.replace(task, form=DERIVED)
        return self._find_template(published.tasks()[name])

    def _find_template(self, task: published.P3Task) -> TaskFiles | None:
        """Finds a task's template and dataset; None if one is missing.

        Records the reason in `unavailable` if there is a template but no usable dataset.
        """
        template = self._read_templates(task.dataset, task.subset).get(task.template)
        if template is None:
            return None
        try:
            dataset = self._find_dataset(task.dataset, task.subset)
            missing = dataset.describe_missing(template.fields) if dataset is not None else ""
        except (InputError, templates.TemplateError) as error:
            self.unavailable[task.name] = str(error)
            return None
        if dataset is None:
            expected = raw_examples.expected_files(self.path, task.dataset, task.subset)
            self.unavailable[task.name] = f"it has a template but no dataset: {expected}"
            return None
        if missing:
            self.unavailable[task.name] = (
                f"its template reads {missing}, which the examples in {dataset.folder} do not have"
            )
            return None
        splits = {
            split: list(dataset.splits[task.source_split(split)])
            for split in task.splits
            if task.source_split(split) in dataset.splits
        }
        return TaskFiles(TEMPLATES, splits, dataset.folder, template, dataset) if splits else None

    def describe_unavailable(self, names: Collection[str]) -> list[str]:
        """Returns a line on why the first unavailable task of `names` has no rows.

        The list is empty if none of the tasks is unavailable.
        """
        reasons = [
            f"{name}: {self.unavailable[name]}" for name in names if name in self.unavailable
        ]
        others = f" (and {len(reasons) - 1} more tasks)" if len(reasons) > 1 else ""
        return [f"{reason}{others}" for reason in reasons[:1]]

    def reader(self, name: str, split: str, tokenizer: Tokenizer) -> RowReader:
        """Returns the reader of a split of a task or `_score_eval` task.

        Raises:
          InputError: the folder does not have it, or it is incomplete.
        """
        files = self.find(name)
        plain_name = score_eval.plain_name(name)
        if files is None:
            reasons = [self.unavailable.get(plain_name), *self.unreadable.values()]
            reason = next(filter(None, reasons), "expected its tfrecords, Parquet or templates")
            raise InputError(f"P3_DIR {self.path} has no task {name!r}: {reason}")
        if files.form == CACHE and not (files.folder / "COMPLETED").exists():
            raise InputError(f"{files.folder}: no file COMPLETED, so the cache is incomplete")
        if split not in files.splits:
            raise InputError(
                f"{files.folder}: {name!r} has no split {split!r}"
                f" (it has: {', '.join(sorted(files.splits)) or 'none'})"
            )
        if files.form == CACHE:
            return TFRecordReader(files.folder, split, tokenizer.vocab_size)
        if files.form == DERIVED:
            return ChoiceReader(self.reader(plain_name, split, tokenizer), tokenizer)
        if files.template is not None and files.dataset is not None:
            table = files.dataset.table(published.tasks()[name].source_split(split))
            return TemplateReader(table, files.template, f"{name} {split}", tokenizer)
        table = open_table(files.splits[split])
        return PromptedReader(table, tokenizer, score_eval.is_score_eval(name))
