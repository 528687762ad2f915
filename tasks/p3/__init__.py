"""P3 as seqio tasks: importing this registers all that is published, by its published names.

- 544 tasks and 116 twins `<task>_score_eval` (a row an answer choice, with `idx`, `is_correct`,
  `weight`, and a metric);
- T0's mixtures at T0's rates: `t0_train`, `t0+_train`, `t0++_train`, `t0_train_one_og_prompt`,
  `t0_train_all_og_prompts`, `t0_eval_score_eval` and `t0_train_score_eval`; and one for each data
  set (`super_glue_rte`, and `super_glue_rte_score_eval` of its twins; ANLI's rounds too).

Nothing is read but the table beside this file. Rows come from seqio's caches (`use_cached`, in
--seqio_additional_cache_dirs), or from a folder P3_DIR (by `register`, or the environment's
PEMOE_P3_DIR), which `p3_folder` describes.

T0 caches twins of its training tasks that are not published, to see how training goes; such twins
are made here of the tasks' answer choices. They are in `t0_train_score_eval`, and `register` gives
them their names in seqio's registry.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.tasks import default_vocab_path, metrics
from pemoe_jax.tasks.jsonl import source as jsonl_source
from pemoe_jax.tasks.jsonl.files import few
from pemoe_jax.tasks.p3 import published as published_lib
from pemoe_jax.tasks.p3 import source
from pemoe_jax.tasks.p3.folder import Folder
from pemoe_jax.tasks.p3.published import SCORE_EVAL

seqio_import.import_seqio()  # before TensorFlow: it hides GPUs from it, and its log from the user
import seqio  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Registered:
    """What `register` says of P3."""

    folder: str
    datasets: dict[str, str]  # every task's and twin's data set, as tables name it; ANLI is one
    eval_splits: dict[str, str]  # task -> its evaluation split, of the tasks that have one
    train_score_tasks: list[str]  # twins of T0's training tasks
    summary: list[str]

    def lines(self) -> list[str]:
        """The summary that a run prints."""
        return self.summary


def _p3_dir() -> str | None:
    return os.environ.get("PEMOE_P3_DIR") or None


def _vocabulary(path: str) -> Any:
    return seqio.SentencePieceVocabulary(path, extra_ids=100)  # loads it when it is first used


settings = source.Settings(_vocabulary(default_vocab_path()), _p3_dir())
_registered_for: tuple[int, bool, str | None] | None = None


def _features(inputs_eos: bool) -> dict[str, Any]:
    return {
        "inputs": seqio.Feature(settings.vocabulary, add_eos=inputs_eos),
        "targets": seqio.Feature(settings.vocabulary, add_eos=True),
    }


_PREPROCESSORS = (seqio.CacheDatasetPlaceholder(), source.end_in_eos)


def _remove_everything() -> None:
    """Takes it all out of seqio's registries."""
    global _registered_for
    for task in published_lib.tasks().values():
        for name in _names(task):
            seqio.TaskRegistry.remove(name)
    for name in published_lib.made_twins():
        seqio.TaskRegistry.remove(name)
    for name in published_lib.mixtures():
        seqio.MixtureRegistry.remove(name)
    _registered_for = None


def _add_everything(inputs_eos: bool) -> None:
    """Registers it all, in place of what an earlier call has registered."""
    global _registered_for
    if _registered_for is not None:
        _remove_everything()
    names = [name for task in published_lib.tasks().values() for name in _names(task)]
    made = published_lib.made_twins()
    mixtures = published_lib.mixtures()
    features = _features(inputs_eos)
    for name in names:
        seqio.TaskRegistry.add_provider(name, _task(name, features))
    of_name = {name: seqio.TaskRegistry.get(name) for name in names}
    of_name |= {name: _task(name, features) for name in made}
    for mixture, tasks in mixtures.items():
        pairs = [(of_name[name], published_lib.rate(name)) for name in tasks]
        seqio.MixtureRegistry.add_provider(mixture, source.P3Mixture(mixture, pairs))
    if published_lib.BIAS_MIXTURE not in mixtures:
        seqio_tasks.unavailable[published_lib.BIAS_MIXTURE] = "none of its tasks is published in P3"
    _registered_for = id(settings.vocabulary), inputs_eos, settings.p3_dir


def _names(task: published_lib.P3Task) -> list[str]:
    return [task.name, task.name + SCORE_EVAL] if task.has_twin else [task.name]


def _task(name: str, features: Any) -> Any:
    measured: dict[str, Any]
    if name.endswith(SCORE_EVAL):
        measured = {
            "postprocess_fn": jsonl_source._score_target,
            "metric_fns": [jsonl_source.rank_accuracy],
        }
    else:
        measured = {"metric_fns": metrics.metric_fns(published_lib.tasks()[name].metrics)}
    return source.P3Task(
        name,
        source=source.P3Source(name, settings),
        output_features=features,
        preprocessors=_PREPROCESSORS,
        **measured,
    )


_add_everything(inputs_eos=True)


def register(
    p3_dir: str | os.PathLike[str] | None = None,
    vocab_path: str | None = None,
    eval_examples: int | None = None,
    inputs_eos: bool = True,
) -> Registered:
    """Sets where P3's rows come from and how they are read.

    Args:
      p3_dir: a folder of P3 (P3_DIR); None: by the environment's PEMOE_P3_DIR, else none, and
        only seqio's caches can be read. Tfrecords in it are made known to seqio as caches too.
      vocab_path: SentencePiece file (VOCAB_PATH), for text that has no ids yet.
      eval_examples: at most this many examples, the first, of every split but `train`
        (EVAL_EXAMPLES); not of seqio's caches.
      inputs_eos: whether inputs end in EOS, as JSON lines' do. T0's code gives them none, nor has
        the example on the data set's card. Either way all sources give the same ids.

    Raises:
      InputError: there is no such folder, or it holds nothing of P3.
    """
    if eval_examples is not None and (not isinstance(eval_examples, int) or eval_examples < 1):
        raise InputError(
            f"EVAL_EXAMPLES must be a positive integer or None, found {eval_examples!r}"
        )
    path = os.fspath(p3_dir) if p3_dir is not None else _p3_dir()
    if path is not None and "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
        source._folder.cache_clear()  # what has been added since is found
    vocab_path = vocab_path or default_vocab_path()
    if "://" not in vocab_path:
        from pemoe_jax.tasks import jsonl

        vocabulary = jsonl.vocabulary(vocab_path)  # looks at it
    elif settings.vocabulary.sentencepiece_model_file == vocab_path:
        vocabulary = settings.vocabulary
    else:
        vocabulary = _vocabulary(vocab_path)
    before = settings.p3_dir, settings.eval_examples
    settings.p3_dir, settings.eval_examples = path, eval_examples
    try:
        summary = _summary(path)
    except InputError:
        settings.p3_dir, settings.eval_examples = before
        raise
    settings.vocabulary = vocabulary
    if _registered_for != (id(vocabulary), inputs_eos, path):  # a task keeps where its cache is
        _add_everything(inputs_eos)
    mixture = seqio.MixtureRegistry.get(published_lib.TRAIN_EVAL_MIXTURE)
    for task in mixture.tasks:
        if task.name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add_provider(task.name, task)
    if path is not None and path not in seqio.utils.get_global_cache_dirs():
        seqio.add_global_cache_dirs([path])
    tasks = published_lib.tasks().values()
    twins = [
        *(task.name + SCORE_EVAL for task in tasks if task.has_twin),
        *published_lib.made_twins(),
    ]
    scored = [task for task in mixture.tasks if path is None or task.source.found is not None]
    return Registered(
        folder=path or "",
        datasets={
            name: published_lib.tasks()[name.removesuffix(SCORE_EVAL)].label
            for name in [*published_lib.tasks(), *twins]
        },
        eval_splits={
            task.name: split
            for task in map(seqio.TaskRegistry.get, published_lib.tasks())
            if (split := source._eval_split(task))
        },
        train_score_tasks=[task.name for task in scored],
        summary=summary,
    )


def _summary(path: str | None) -> list[str]:
    published = [name for task in published_lib.tasks().values() for name in _names(task)]
    if path is None:
        return [_cached_summary(published)]
    if "://" in path:
        return [f"P3: {len(published)} tasks and twins, to be read from the cache {path}"]
    folder = settings.folder
    found = {name: there for name in published if (there := folder.find(name)) is not None}
    if not found:
        bad = [*folder.unreadable.values(), *folder.lacking.values()]
        raise InputError(bad[0] if bad else _nothing_in(folder))
    tasks = [name for name in found if not name.endswith(SCORE_EVAL)]
    forms = [there.form for there in found.values()]
    counts = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
    lines = [
        f"P3 in {path}: {len(tasks)} of {len(published_lib.tasks())} tasks,"
        f" {len(found) - len(tasks)} of {len(published) - len(published_lib.tasks())}"
        f" twins ({counts})"
    ]
    missing = [name for name in published_lib.tasks() if name not in found]
    if missing:
        lines.append(f"not in P3_DIR: {len(missing)} tasks ({few(missing, 3)})")
    no_train = [
        name
        for name in tasks
        if published_lib.tasks()[name].do_train and "train" not in found[name].splits
    ]
    if no_train:
        lines.append(f"no train split: {len(no_train)} tasks ({few(no_train, 3)})")
    twins = [name for name in found if name.endswith(SCORE_EVAL)]
    no_eval = [name for name in twins if not set(seqio_tasks.EVAL_SPLITS) & set(found[name].splits)]
    if no_eval:
        lines.append(
            f"no evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)}): {len(no_eval)} tasks"
            f" ({few(no_eval, 3)})"
        )
    lacking = [f"{name}: {why}" for name, why in folder.lacking.items()]
    if lacking:
        more = f" (and {len(lacking) - 1} more tasks)" if len(lacking) > 1 else ""
        lines.append(f"left out: {lacking[0]}{more}")
    return [*lines, *(f"left out: {line}" for line in folder.unreadable.values())]


def _cached_summary(published: Sequence[str]) -> str:
    """What seqio's folders of caches have, of those that are on this machine."""
    folders = seqio_import.global_cache_dirs()
    if not folders or any("://" in folder for folder in folders):
        return f"P3: {len(published)} tasks and twins, to be read from seqio's caches"
    there = [
        name
        for name in published
        if any(os.path.exists(os.path.join(folder, name, "COMPLETED")) for folder in folders)
    ]
    where = ", ".join(folders)
    if not there:
        raise InputError(
            f"no cache of P3 in {where}: expected <task>/COMPLETED of a published name"
        )
    twins = sum(name.endswith(SCORE_EVAL) for name in there)
    tasks = len(published_lib.tasks())
    return (
        f"P3, cached in {where}: {len(there) - twins} of {tasks} tasks,"
        f" {twins} of {len(published) - tasks} twins (USE_CACHED_TASKS=True reads them)"
    )


def _nothing_in(folder: Folder) -> str:
    entries: Sequence[str] = sorted(os.listdir(folder.path))
    return (
        f"P3_DIR {folder.path} holds nothing of P3: expected <task>/<split>.tfrecord-*,"
        " <task>/<split>*.parquet or <dataset>/[<subset>/]templates.yaml, found"
        f" {few(entries, 3) or 'nothing'}"
    )
