"""P3 as seqio tasks: importing this registers all published tasks under their published names.

- 544 tasks and 116 `<task>_score_eval` tasks (see `score_eval`);
- T0's mixtures at T0's rates: `t0_train`, `t0+_train`, `t0++_train`, `t0_train_one_og_prompt`,
  `t0_train_all_og_prompts`, `t0_eval_score_eval` and `t0_train_score_eval`;
- mixtures for each dataset (`super_glue_rte`, `super_glue_rte_score_eval`) and each round of ANLI.

The import reads only `tasks.csv`. Rows come from seqio's caches (`use_cached`, in
--seqio_additional_cache_dirs), or from a folder P3_DIR (set by `register`, or the environment's
PEMOE_P3_DIR) in one of the forms that `folder` lists.

To monitor training, T0 also scored its training tasks. P3 does not publish all of the `_score_eval`
tasks that this needs. The others are derived here from the tasks' answer choices. They are members
of `t0_train_score_eval`, and `register` adds them to seqio's registry.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pemoe_jax.core.errors import InputError, check_integer, plural
from pemoe_jax.data import seqio_import, seqio_tasks
from pemoe_jax.tasks import metrics, score_eval
from pemoe_jax.tasks.folder_tasks import trim_and_append_eos
from pemoe_jax.tasks.p3 import published, source
from pemoe_jax.tasks.task_roles import TaskRoles, abbreviate
from pemoe_jax.tasks.vocabulary import default_vocab_path, load_vocabulary, open_vocabulary

seqio_import.import_seqio()  # before TensorFlow: hides GPUs from it and filters its log
import seqio  # noqa: E402


def _default_folder() -> str | None:
    return os.environ.get("PEMOE_P3_DIR") or None


# The vocabulary's file is read at its first use, so that this import works without it.
settings = source.Settings(open_vocabulary(default_vocab_path()), _default_folder())
# What the tasks were registered with: the vocabulary's id, `inputs_eos` and the folder. None while
# no task is registered.
_registered_with: tuple[int, bool, str | None] | None = None


def remove() -> None:
    """Removes everything that this module added to seqio's registries."""
    global _registered_with
    # seqio's `remove` does nothing for names that are not registered.
    for name in (*published.names(), *published.unpublished_score_tasks()):
        seqio.TaskRegistry.remove(name)
    for name in published.mixtures():
        seqio.MixtureRegistry.remove(name)
    _registered_with = None


def _add_tasks(inputs_eos: bool) -> None:
    """Registers all tasks and mixtures, in place of those of an earlier call."""
    global _registered_with
    if _registered_with is not None:
        remove()
    features = {
        "inputs": seqio.Feature(settings.vocabulary, add_eos=inputs_eos),
        "targets": seqio.Feature(settings.vocabulary, add_eos=True),
    }
    tasks = {name: _make_task(name, features) for name in published.names()}
    for name, task in tasks.items():
        seqio.TaskRegistry.add_provider(name, task)
    tasks |= {name: _make_task(name, features) for name in published.unpublished_score_tasks()}
    for mixture, names in published.mixtures().items():
        rates = [(tasks[name], published.rate(name)) for name in names]
        seqio.MixtureRegistry.add_provider(mixture, source.P3Mixture(mixture, rates))
    if published.BIAS_MIXTURE not in published.mixtures():
        seqio_tasks.unavailable[published.BIAS_MIXTURE] = "none of its tasks is published in P3"
    _registered_with = id(settings.vocabulary), inputs_eos, settings.p3_dir


def _make_task(name: str, features: dict[str, seqio.Feature]) -> source.P3Task:
    scored = score_eval.is_score_eval(name)
    return source.P3Task(
        name,
        source=source.P3Source(name, settings),
        output_features=features,
        preprocessors=(seqio.CacheDatasetPlaceholder(), trim_and_append_eos),
        postprocess_fn=score_eval.target_of_row if scored else None,
        metric_fns=(
            [score_eval.rank_accuracy]
            if scored
            else metrics.metric_fns(published.metric_names(name))
        ),
    )


_add_tasks(inputs_eos=True)


def register(
    p3_dir: str | os.PathLike[str] | None = None,
    vocab_path: str | None = None,
    eval_examples: int | None = None,
    inputs_eos: bool = True,
) -> TaskRoles:
    """Sets where P3's rows come from and how they are read; returns the tasks by role.

    Args:
      p3_dir: a folder of P3 (P3_DIR). None: the environment's PEMOE_P3_DIR, or if it is not set,
        seqio's caches alone. seqio can read tfrecords in the folder as caches too.
      vocab_path: see `load_vocabulary` (VOCAB_PATH), for text that is not tokenized yet.
      eval_examples: maximum number of examples of every split but `train`, counted from its start
        (EVAL_EXAMPLES); None: all. It does not apply to seqio's caches.
      inputs_eos: whether inputs end in EOS, as in JSON lines. T0's code adds none, and the example
        on the dataset's card has none. With either value, the ids do not depend on the form in
        which the folder holds a task.

    Raises:
      InputError: the folder does not exist, or holds nothing of P3.
    """
    if eval_examples is not None:
        check_integer("EVAL_EXAMPLES", eval_examples)
    path = os.fspath(p3_dir) if p3_dir is not None else _default_folder()
    if path is not None and "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
    vocab_path = vocab_path or default_vocab_path()
    # A remote file is read only if text is tokenized.
    is_remote = "://" in vocab_path
    vocabulary = open_vocabulary(vocab_path) if is_remote else load_vocabulary(vocab_path)
    # The summary lists the new folder, but an error must leave the settings as they were.
    previous = settings.p3_dir, settings.eval_examples
    settings.read_from(path, eval_examples)
    try:
        summary = _summarize(path)
    except InputError:
        settings.read_from(*previous)
        raise
    settings.vocabulary = vocabulary
    # A task keeps the vocabulary and the folder of its cache, so a change of these needs new tasks.
    if _registered_with != (id(vocabulary), inputs_eos, path):
        _add_tasks(inputs_eos)
    train_score_tasks = seqio.MixtureRegistry.get(published.TRAIN_SCORE_MIXTURE).tasks
    for task in train_score_tasks:
        if task.name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add_provider(task.name, task)
    # Lets USE_CACHED_TASKS read the folder's tfrecords without another flag.
    if path is not None and path not in seqio.utils.get_global_cache_dirs():
        seqio.add_global_cache_dirs([path])
    names = [*published.names(), *published.unpublished_score_tasks()]
    tasks = {name: seqio.TaskRegistry.get(name) for name in published.tasks()}
    return TaskRoles(
        folder=path or "",
        datasets={name: published.task_of(name).label for name in names},
        train_tasks=sorted(published.mixtures()[published.TRAIN_MIXTURE]),
        eval_tasks=sorted(published.mixtures()[published.SCORE_MIXTURE]),
        train_score_tasks=[
            task.name for task in train_score_tasks if path is None or task.source.files is not None
        ],
        eval_splits={
            name: split for name, task in tasks.items() if (split := task.eval_split) is not None
        },
        summary=summary,
    )


def _summarize(path: str | None) -> list[str]:
    """Returns the lines that a run prints.

    Raises:
      InputError: the folder holds nothing of P3.
    """
    if path is None:
        return [_summarize_caches()]
    if "://" in path:
        return [f"P3: {_count(published.names())}, to be read from the cache {path}"]
    folder = settings.folder
    files = {name: files for name in published.names() if (files := folder.find(name)) is not None}
    if not files:
        # The folder may hold templates that cannot be used. Their error says more.
        left_out = folder.describe_unavailable(folder.unavailable)
        reasons = [*folder.unreadable.values(), *left_out]
        if reasons:
            raise InputError(reasons[0])
        entries = abbreviate(sorted(os.listdir(folder.path)), 3) or "nothing"
        raise InputError(
            f"P3_DIR {path} holds nothing of P3: expected <task>/<split>.tfrecord-*,"
            " <task>/<split>*.parquet or <dataset>/[<subset>/]templates.yaml, got"
            f" {entries}"
        )
    forms = [task_files.form for task_files in files.values()]
    counts = ", ".join(f"{form}: {forms.count(form)}" for form in dict.fromkeys(forms))
    lines = [f"P3 in {path}: {_count(list(files), show_total=True)} ({counts})"]
    no_train = [
        name
        for name, task_files in files.items()
        if not score_eval.is_score_eval(name)
        and published.task_of(name).do_train
        and "train" not in task_files.splits
    ]
    no_eval = [
        name
        for name, task_files in files.items()
        if score_eval.is_score_eval(name)
        and seqio_tasks.first_eval_split(task_files.splits) is None
    ]
    for reason, names in (
        ("not in P3_DIR", [name for name in published.tasks() if name not in files]),
        ("no train split", no_train),
        (f"no evaluation split ({', '.join(seqio_tasks.EVAL_SPLITS)})", no_eval),
    ):
        if names:
            lines.append(f"{reason}: {plural(len(names), 'task')} ({abbreviate(names, 3)})")
    left_out = [*folder.describe_unavailable(folder.unavailable), *folder.unreadable.values()]
    return [*lines, *(f"left out: {line}" for line in left_out)]


def _count(names: Sequence[str], show_total: bool = False) -> str:
    """Returns '544 tasks and 116 _score_eval tasks', or with the totals '5 of 544 tasks and …'."""
    scored = sum(map(score_eval.is_score_eval, names))
    tasks, score_tasks = plural(len(names) - scored, "task"), plural(scored, "_score_eval task")
    if show_total:
        total = len(published.tasks())
        score_total = len(published.names()) - total
        tasks = f"{len(names) - scored} of {plural(total, 'task')}"
        score_tasks = f"{scored} of {plural(score_total, '_score_eval task')}"
    return f"{tasks} and {score_tasks}"


def _summarize_caches() -> str:
    """Returns the line for seqio's caches; InputError if local ones hold nothing of P3."""
    folders = seqio_import.import_seqio().utils.get_global_cache_dirs()
    if not folders or any("://" in folder for folder in folders):
        return f"P3: {_count(published.names())}, to be read from seqio's caches"
    cached = [
        name
        for name in published.names()
        if any(os.path.exists(os.path.join(folder, name, "COMPLETED")) for folder in folders)
    ]
    where = ", ".join(folders)
    if not cached:
        raise InputError(
            f"no cache of P3 in {where}: expected <task>/COMPLETED of a published name"
        )
    return (
        f"P3, cached in {where}: {_count(cached, show_total=True)}"
        " (USE_CACHED_TASKS=True reads them)"
    )
