"""Selects tasks and routers, reads examples and accumulates router probabilities over them.

jax and seqio are imported within the functions that need them, which keeps `pemoe routes --help`
fast.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pemoe_jax.core.errors import InputError

if TYPE_CHECKING:
    import jax

    from pemoe_jax.analysis.routing import probe as probe_lib
    from pemoe_jax.checkpoints import models
    from pemoe_jax.core import network
    from pemoe_jax.core.params import Params
    from pemoe_jax.data.choices import ChoiceGroup
    from pemoe_jax.runtime import progress
    from pemoe_jax.tasks import TaskRoles

# Examples per task: enough for about a hundred target tokens even in tasks with short targets.
DEFAULT_EXAMPLES = 32
_SCORE_SUFFIX = "_score_eval"  # of tasks that have a row for each answer choice


# --- tasks ---


def select_tasks(
    patterns: Sequence[str] | None, task_roles: "TaskRoles", use_cached: bool = False
) -> list[str]:
    """Returns the names of the tasks that match, in the order of the patterns.

    A `_score_eval` task is replaced by the task whose answers it scores, if that task has data.

    Args:
      patterns: names of tasks or mixtures, or shell-style patterns of task names. None: the first
        prompt of each dataset, first of the training tasks, then of the held-out tasks.
      task_roles: return value of `tasks.register`.
      use_cached: whether tasks are read from seqio's offline caches.

    Raises:
      InputError: a pattern matches no task with data, or the tasks have no roles.
    """
    from pemoe_jax.data import seqio_import

    if patterns is None:
        return _tasks_by_role(task_roles, use_cached)
    patterns = _check_patterns("ROUTES_TASKS", "name", patterns)
    registry = set(seqio_import.import_seqio().TaskRegistry.names())
    names = [
        name
        for name in task_roles.datasets or sorted(registry)
        if name in registry
        and not (name.endswith(_SCORE_SUFFIX) and name.removesuffix(_SCORE_SUFFIX) in registry)
    ]
    # A dict as an ordered set: a task that several patterns match is listed at the first.
    selected: dict[str, None] = {}
    for pattern in patterns:
        selected |= dict.fromkeys(_match_tasks(pattern, names, use_cached))
    if not selected:
        raise InputError("ROUTES_TASKS must name at least one task, got []")
    return list(selected)


def _check_patterns(setting: str, kind: str, patterns: object) -> Sequence[str]:
    """Returns the patterns as a sequence, also a single one; raises InputError for other values."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"{setting} must be a list of {kind} patterns, got {patterns!r}")
    return patterns


def _match_tasks(pattern: str, names: Sequence[str], use_cached: bool) -> list[str]:
    """Returns the tasks with data that are in the mixture `pattern`, or whose names match it."""
    from pemoe_jax.data import seqio_import, seqio_tasks

    if pattern in seqio_import.import_seqio().MixtureRegistry.names():
        matches = seqio_tasks.subtask_names(pattern)
    else:
        glob = pattern if pattern in names else pattern.removesuffix(_SCORE_SUFFIX)
        matches = fnmatch.filter(names, glob)
    if not matches:
        close = difflib.get_close_matches(pattern.strip("*"), names, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"ROUTES_TASKS: {pattern!r} matches none of {len(names)} tasks{hint}")
    available = _available_tasks(matches, use_cached)
    if not available:
        # Without caches, only P3's tasks can lack their data, see `P3Task.has_data`.
        source = "seqio's caches contain" if use_cached else "P3_DIR contains"
        raise InputError(f"ROUTES_TASKS: {source} none of the {len(matches)} tasks of {pattern!r}")
    return available


def _available_tasks(names: Sequence[str], use_cached: bool) -> list[str]:
    """Returns the tasks that have data.

    For `<task>_score_eval`, it returns `<task>` instead if `<task>` has data.
    """
    from pemoe_jax.data import seqio_import, seqio_tasks

    registry = seqio_import.import_seqio().TaskRegistry.names()
    available: dict[str, None] = {}
    for name in names:
        for candidate in (name.removesuffix(_SCORE_SUFFIX), name):
            if candidate in registry and seqio_tasks.has_data(candidate, use_cached):
                available[candidate] = None
                break
    return list(available)


def _tasks_by_role(task_roles: "TaskRoles", use_cached: bool) -> list[str]:
    """Returns the first task with data of each dataset: training datasets, then evaluation ones."""
    if not task_roles.datasets:
        raise InputError(
            "ROUTES_TASKS is not set: pass names of tasks or mixtures (tasks of"
            " MIXTURE_OR_TASK_MODULE are not marked as training or evaluation tasks)"
        )
    names: dict[str, None] = {}
    for tasks in (task_roles.train_tasks, task_roles.eval_tasks):
        available = _available_tasks(tasks, use_cached)
        datasets = {name: task_roles.datasets[name] for name in available}
        names |= dict.fromkeys(first_task_per_dataset(datasets))
    if not names:
        raise InputError("ROUTES_TASKS is not set, and no training or evaluation task has data")
    return list(names)


def first_task_per_dataset(datasets: Mapping[str, str]) -> list[str]:
    """Returns the first task of each dataset, from {task: dataset}."""
    first: dict[str, str] = {}
    for name, dataset in datasets.items():
        first.setdefault(dataset, name)
    return list(first.values())


def trained_datasets(opened: "models.OpenedModel", task_roles: "TaskRoles") -> set[str] | None:
    """Returns the datasets that a run was trained on.

    If the run has no record of them (base models, adapters of other tools), all registered training
    datasets are assumed. None if the registered tasks have no roles either.
    """
    recorded = getattr(opened.record, "trained_datasets", None)
    if recorded is not None:
        return set(recorded)
    if not task_roles.datasets:
        return None
    return set(task_roles.datasets_of(task_roles.train_tasks))


# --- examples ---


def task_split(name: str) -> str:
    """Returns a task's evaluation split, or `train` if it has none.

    Raises:
      InputError: the task has neither.
    """
    from pemoe_jax.data import seqio_tasks

    split = seqio_tasks.eval_split(name)
    splits = seqio_tasks.get_mixture_or_task(name).splits
    if split is None and "train" not in splits:
        raise InputError(f"{name}: expected an evaluation or train split, got {list(splits)}")
    return split or "train"


def read_examples(
    name: str,
    task_feature_lengths: Mapping[str, int],
    max_examples: int,
    use_cached: bool = False,
) -> "list[ChoiceGroup]":
    """Returns a task's first examples, each an input with its correct answer as the only choice.

    Args:
      name: a task; the rows of a `_score_eval` task are grouped by example.
      task_feature_lengths: numbers of tokens that 'inputs' and 'targets' are truncated to.
      max_examples: maximum number of examples to read.
      use_cached: whether to read seqio's offline caches.

    Raises:
      InputError: the task cannot be read or has no examples.
    """
    from pemoe_jax.data import choices, seqio_tasks

    split, task = task_split(name), seqio_tasks.get_mixture_or_task(name)
    if use_cached:
        seqio_tasks.subtask_names(name, use_cached=True)  # raises if the task has no cache
    else:
        seqio_tasks.check_source_files([name], split)
    lengths = seqio_tasks.validate_lengths(task_feature_lengths)
    # One token more than allowed, to tell truncated sequences from those that just fit.
    longer = {key: length + 1 for key, length in lengths.items()}
    with seqio_tasks.translate_read_errors(name, split, use_cached):
        ds = task.get_dataset(
            longer, split=split, use_cached=use_cached, shuffle=False, seed=0, num_epochs=1
        )
    if "is_correct" in ds.element_spec:
        groups = choices.load_choice_groups(
            name, lengths, split=split, max_examples=max_examples, use_cached=use_cached
        )
        groups = [keep_correct_choice(group) for group in groups]
    else:
        rows = seqio_tasks.numpy_iterator(ds.take(max_examples), name, split, use_cached)
        groups = [_make_group(task, index, row, lengths) for index, row in enumerate(rows)]
    if not groups:
        raise InputError(f"{name}: expected examples in the split {split!r}, got none")
    return groups


def _make_group(
    task: Any, index: int, row: Mapping[str, Any], lengths: Mapping[str, int]
) -> "ChoiceGroup":
    """Returns the choice group of an example whose target is its only choice."""
    from pemoe_jax.data import choices, seqio_tasks

    seqio_tasks.check_ids(task.output_features, row, f"{task.name}: example {index + 1}")
    ids, is_truncated = {}, {}
    for key, length in lengths.items():
        eos_id = task.output_features[key].vocabulary.eos_id
        ids[key], is_truncated[key] = choices.truncate(row[key], length, eos_id)
    return choices.ChoiceGroup(
        task=task.name,
        idx=index,
        inputs=ids["inputs"],
        choices=(ids["targets"],),
        is_correct=(True,),
        input_text=choices.feature_text(task.output_features, row, "inputs"),
        choice_texts=(choices.feature_text(task.output_features, row, "targets"),),
        input_truncated=is_truncated["inputs"],
        target_truncated=is_truncated["targets"],
        sentence_embedding=row.get(seqio_tasks.SENTENCE_FEATURE),
    )


def keep_correct_choice(group: "ChoiceGroup") -> "ChoiceGroup":
    """Returns the group with its correct choice only, or with its first if none is correct."""
    index = group.is_correct.index(True) if any(group.is_correct) else 0
    return dataclasses.replace(
        group,
        choices=(group.choices[index],),
        is_correct=(group.is_correct[index],),
        choice_texts=(group.choice_texts[index],),
    )


# --- the probe ---


def example_tasks(groups: "Mapping[str, Sequence[ChoiceGroup]]") -> np.ndarray:
    """Returns the index of each example's task, [N], for {task: its examples}."""
    return np.repeat(np.arange(len(groups)), [len(members) for members in groups.values()])


def measure_examples(
    model: "network.Transformer",
    params: "Params",
    groups: "Mapping[str, Sequence[ChoiceGroup]]",
    batch_size: int,
    mesh: "jax.sharding.Mesh",
    token_sites: Collection[str] = (),
    bar: "progress.Progress | None" = None,
) -> "probe_lib.ProbeTotals":
    """Sums router probabilities and entropies over the tokens of each example.

    The decoder reads the correct answers. The result has NumPy arrays. Their axis T (the tasks, in
    `ProbeTotals`) has the N examples instead.

    Args:
      model: network with routers.
      params: its parameters, replicated on every device.
      groups: {task: its examples}; the totals have the examples in this order.
      batch_size: examples per batch, over all devices.
      mesh: the devices.
      token_sites: sites whose probabilities are also summed by token id.
      bar: progress bar to be advanced by the number of examples.
    """
    import jax

    from pemoe_jax.analysis.routing import probe as probe_lib
    from pemoe_jax.core import partitioning
    from pemoe_jax.data import inference_batches, prefetch

    correct = [keep_correct_choice(g) for members in groups.values() for g in members]
    # `score_batches` sorts the groups by length. Equal groups may occur twice, so they are found
    # again by identity.
    example_ids = {id(group): index for index, group in enumerate(correct)}
    probe = probe_lib.make_probe(model)
    # The probe sums by task; here each example is a task.
    totals = partitioning.replicate(probe_lib.init_totals(model, len(correct), token_sites), mesh)
    batches = inference_batches.score_batches(
        correct,
        batch_size,
        multiple_of=partitioning.data_parallelism(mesh),
    )
    done = 0
    for batch, batch_groups in prefetch.prefetch(batches):
        # a single choice per example: [B, 1, Lt] -> [B, Lt]
        flat = {name: array[:, 0] if array.ndim == 3 else array for name, array in batch.items()}
        # Padding rows belong to example 0, whose totals they do not change: they have no tokens.
        flat["tasks"] = np.zeros(len(flat["encoder_input_tokens"]), np.int32)
        flat["tasks"][: len(batch_groups)] = [example_ids[id(group)] for group in batch_groups]
        sharded = partitioning.shard_batch(flat, mesh)
        task_ids = sharded.pop("tasks")
        totals = probe(params, sharded, task_ids, totals)
        done += len(batch_groups)
        if bar is not None:
            bar.report_if_due(done, "examples")
    return jax.device_get(totals)


def sum_by_task(
    examples: "probe_lib.ProbeTotals", names: Sequence[str], tasks: np.ndarray
) -> "probe_lib.ProbeTotals":
    """Adds up the totals of the examples of each task.

    Args:
      examples: totals with N examples in place of T tasks, from `measure_examples`.
      names: names of the tasks.
      tasks: index of each example's task, [N].

    Raises:
      InputError: a router's probabilities are not finite.
    """

    def sums(array: Any) -> Any:
        # Sums in float64 are rounded only once, to float32.
        by_task = np.zeros((len(names), *array.shape[1:]), np.float64)
        np.add.at(by_task, tasks, array)
        return by_task.astype(np.float32)

    totals = dataclasses.replace(
        examples,
        probs={site: sums(array) for site, array in examples.probs.items()},
        entropy={site: sums(array) for site, array in examples.entropy.items()},
        num_tokens={stack: sums(array) for stack, array in examples.num_tokens.items()},
    )
    check_finite(totals, names)
    return totals


def check_finite(totals: "probe_lib.ProbeTotals", tasks: Sequence[str]) -> None:
    """Raises InputError if a router's probabilities for one of the tasks are not finite."""
    from pemoe_jax.analysis.evaluation import NOT_FINITE_ADVICE

    for site, probs in totals.probs.items():
        nonfinite_tasks = np.flatnonzero(~np.isfinite(probs).all(axis=-1))
        if len(nonfinite_tasks):
            raise InputError(
                f"expected finite router probabilities, got infinite or NaN ones at {site} for"
                f" {tasks[nonfinite_tasks[0]]}: {NOT_FINITE_ADVICE}"
            )


def mean_probs(
    totals: "probe_lib.ProbeTotals", tasks: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns {site: {task: [E]}}, each task's mean distribution over experts at every router."""
    from pemoe_jax.analysis.routing import metrics

    return {
        site: dict(zip(tasks, metrics.mean_distributions(totals, site), strict=True))
        for site in totals.probs
    }


def select_sites(patterns: Sequence[str] | None, num_experts: Mapping[str, int]) -> list[str]:
    """Returns the sites that match, in layer order.

    Args:
      patterns: shell-style patterns of names such as 'decoder/layers_3/mlp/gate'. None selects
        sites of the last layer with routers (in arXiv 2309.05444, the last decoder layer): the last
        site, and those with as many experts. If the last router is that of a sparse layer, not of
        an adapter, None selects the last sparse layer of each stack instead.
      num_experts: {site: E} of every router.

    Raises:
      InputError: a pattern matches nothing, or the sites differ in E.
    """
    if patterns is None:
        from pemoe_jax.core import routing  # imports jax, which `--help` does without

        last = list(num_experts)[-1]
        if routing.is_sparse_layer(last):
            sparse_sites = filter(routing.is_sparse_layer, num_experts)
            # Later sites of a stack replace earlier ones.
            return list({site.partition("/")[0]: site for site in sparse_sites}.values())
        layer = last.rsplit("/", 2)[0] + "/"
        return [
            site
            for site, size in num_experts.items()
            if site.startswith(layer) and size == num_experts[last]
        ]
    patterns = _check_patterns("ROUTES_SITES", "site", patterns)
    selected: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(num_experts, pattern)
        if not matches:
            # With the cutoff 0, there always is a closest site.
            close = difflib.get_close_matches(pattern.strip("*"), num_experts, n=1, cutoff=0.0)
            raise InputError(
                f"ROUTES_SITES: {pattern!r} matches none of the {len(num_experts)} sites with"
                f" routers, such as {close[0]!r}"
            )
        selected.update(matches)
    if not selected:
        raise InputError("ROUTES_SITES must name at least one site, got []")
    # `analysis.plots.routing_map` draws a panel per site; the panels share their columns, the
    # experts.
    sizes = {num_experts[site] for site in selected}
    if len(sizes) != 1:
        raise InputError(
            "ROUTES_SITES must select sites with the same number of experts, got sites with"
            f" {' and '.join(map(str, sorted(sizes)))} experts"
        )
    return [site for site in num_experts if site in selected]
